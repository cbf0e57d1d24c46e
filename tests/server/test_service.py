"""The hub as a whole, in this process: real listening, real certificates, agents over the real link."""

import sqlite3
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from common import flower, messages
from common.errors import FailureError, RefusedError
from common.messages import Reply
from server import round as round_module
from server import rounds
from server.desk import CoordinatorDesk
from server.service import Hub
from server.store import Store
from tests.conftest import Credentials
from tests.server.hospitals import WITHOUT_DP, Founded, Hospital, found
from tests.server.test_link import RunningAgent, wait_until
from tests.server.test_rounds import exact_model


def agent(hub: Hub, founded: Founded, hospital: "Hospital | Ward") -> RunningAgent:
    admission = founded.admissions[hospital.id]
    credentials = Credentials(
        founded.keys[hospital.id].tls_key_pem, admission.certificate_pem, admission.ca_pem
    )
    return RunningAgent(hub.link, credentials, hospital.id, hospital.answer_message)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "CONSENT_PERIOD_S", 0.02)
    monkeypatch.setattr(round_module, "REPLY_MARGIN_S", 0.5)


class Ward:
    """One hospital that takes part in several studies: a machine for each, decisions by study."""

    def __init__(self, founded: Founded, site: int) -> None:
        self.id = site
        self.decisions: dict[str, str] = {}
        self.runs: dict[str, Hospital] = {}
        self._founded = founded

    def answer_message(self, message: flower.Message) -> flower.Message:
        group = message.metadata.group_id
        run = self.runs.setdefault(group, Hospital(self._founded, self.id))
        run.decision = self.decisions.get(group, "approved")
        return run.answer_message(message)


def test_no_study_waits_for_another_one(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    wards = [Ward(founded, site) for site in founded.admissions]
    try:
        with CoordinatorDesk(founded.coordinator) as desk, ExitStack() as agents:
            digests = []
            signed = [
                founded.sign_study(name=name, privacy=WITHOUT_DP) for name in ("stuck", "first", "second")
            ]
            for ward in wards:
                ward.decisions[signed[0].verify().digest.hex()] = "received"
                agents.enter_context(agent(hub, founded, ward))
            for one in signed:
                digests.append(desk.submit(one.manifest_bytes, one.signature).digest)
            for digest in digests[1:]:
                last = list(desk.watch(digest))[-1]
                assert (last.study.status, last.study.round, list(last.cohort)) == ("done", 3, [1, 2, 3])
                assert [(site.decision, site.online) for site in last.sites] == [("approved", True)] * 3
                state = load(desk.export(digest))
                model = np.concatenate([state["weight"].ravel(), state["bias"].ravel()])
                assert np.array_equal(model, exact_model([[1, 2, 3]] * 3))
            assert hub.store.study(digests[0]).status == "waiting for approval"
            desk.abort(digests[0], "not needed")
            wait_until(lambda: all(w.runs[digests[0]].asked[-1] == "query.close" for w in wards))
    finally:
        hub.stop()
    for ward in wards:
        assert [ward.runs[digest].asked.count("query.close") for digest in digests] == [1, 1, 1]


def test_a_site_that_was_away_is_told_what_has_ended(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    hospitals = [Hospital(founded, site) for site in founded.admissions]
    try:
        with CoordinatorDesk(founded.coordinator) as desk, ExitStack() as agents:
            for hospital in hospitals[:2]:
                agents.enter_context(agent(hub, founded, hospital))
            with agent(hub, founded, hospitals[2]):
                signed = founded.sign_study(training__rounds=10_000, aggregation__rounds_max=10_000)
                digest = desk.submit(signed.manifest_bytes, signed.signature).digest
                wait_until(lambda: hub.store.study(digest).round >= 2)
            desk.abort(digest, "wrong question")
            wait_until(lambda: [h.asked[-1] for h in hospitals[:2]] == ["query.close"] * 2)
            assert "query.close" not in hospitals[2].asked
            assert hospitals[2].site is not None
            assert not hospitals[2].site.closed
            with agent(hub, founded, hospitals[2]):
                wait_until(lambda: hub.store.study(digest).closed == "[1, 2, 3]")
            assert hospitals[2].site.closed
    finally:
        hub.stop()


def test_a_revoked_sites_stream_is_cut_at_once_and_refused_after(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    hospital = Hospital(founded, 2)
    try:
        with agent(hub, founded, hospital) as running:
            wait_until(lambda: 2 in hub.link.online())
            hub.store.revoke_site("Northgate", "2026-01-01T00:00Z", "its key was copied")
            began = time.monotonic()
            wait_until(lambda: 2 not in hub.link.online())
            assert time.monotonic() - began < 2
            wait_until(lambda: not running.thread.is_alive())
            assert isinstance(running.error, RefusedError)
            assert "the admission of 'Northgate' was revoked" in running.error.problem
    finally:
        hub.stop()


def test_a_payload_altered_on_the_way_ends_the_round_and_not_the_hub(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    hospitals = [Hospital(founded, site) for site in founded.admissions]
    real = hospitals[1].answer

    def altered(kind: str, body: bytes, attachment: object) -> tuple[bytes, tuple[bytes, ...]]:
        reply, payload = real(kind, body, attachment)  # type: ignore[arg-type]
        return reply, tuple(bytes([chunk[0] ^ 1]) + chunk[1:] for chunk in payload)

    hospitals[1].answer = altered  # type: ignore[method-assign]
    try:
        with CoordinatorDesk(founded.coordinator) as desk, ExitStack() as agents:
            for hospital in hospitals:
                agents.enter_context(agent(hub, founded, hospital))
            short = {"aggregation__upload_s": 1, "aggregation__deadline_s": 2}
            signed = founded.sign_study(**short)
            digest = desk.submit(signed.manifest_bytes, signed.signature).digest
            last = list(desk.watch(digest))[-1]
            assert (last.study.status, last.study.round) == ("failed", 0)
            problem = "2 hospitals can be summed together, and the study needs 3"
            assert last.study.detail == f"3 rounds in a row were lost, the last because {problem}"
            assert [info.status for info in desk.studies()] == ["failed"]
    finally:
        hub.stop()


def test_a_stopped_hub_leaves_its_studies_as_they_are(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    hospital = Hospital(founded, 1)
    hospital.decision = "received"
    with agent(hub, founded, hospital):
        with CoordinatorDesk(founded.coordinator) as desk:
            signed = founded.sign_study()
            digest = desk.submit(signed.manifest_bytes, signed.signature).digest
        wait_until(lambda: "query.study" in hospital.asked)
        stopper = threading.Thread(target=hub.stop)
        stopper.start()
        stopper.join(10)
        assert not stopper.is_alive()
    # A second stop changes nothing.
    hub.stop()
    store = Store.open(founded.home.database)
    assert store.study(digest).status == "waiting for approval"
    store.close()

    again = Hub(founded.home)
    again.start()
    try:
        hospital.asked.clear()
        with agent(again, founded, hospital):
            wait_until(lambda: "query.study" in hospital.asked)
    finally:
        again.stop()


def test_a_defect_ends_its_study_and_not_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)

    def broken(self: object, *_: object) -> None:
        raise ZeroDivisionError

    hub.start()
    try:
        with CoordinatorDesk(founded.coordinator) as desk:
            monkeypatch.setattr(rounds.StudyRun, "run", broken)
            signed = founded.sign_study(name="broken")
            digest = desk.submit(signed.manifest_bytes, signed.signature).digest
            last = list(desk.watch(digest))[-1]
            assert (last.study.status, last.study.detail) == ("failed", "internal error; see the hub's log")
            monkeypatch.undo()
            signed = founded.sign_study(name="next")
            next_digest = desk.submit(signed.manifest_bytes, signed.signature).digest
            wait_until(lambda: hub.store.study(next_digest).status == "waiting for approval")
    finally:
        hub.stop()
    assert any("ZeroDivisionError" in (record.exc_text or "") for record in caplog.records)


def test_two_hubs_cannot_share_a_port(tmp_path: Path) -> None:
    founded = found(tmp_path, 0)
    hub = Hub(founded.home)
    hub.start()
    second = Hub(founded.home)
    try:
        with pytest.raises(FailureError, match="cannot listen"):
            second.start()
    finally:
        second.link.stop()
        second.store.close()
        hub.stop()


def test_a_site_taken_off_the_roster_is_refused(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    try:
        with sqlite3.connect(founded.home.database) as database:
            database.execute("UPDATE sites SET tls_fingerprint = 'x' WHERE id = 2")
        database.close()
        with agent(hub, founded, Hospital(founded, 2)) as refused:
            refused.join()
            assert isinstance(refused.error, RefusedError)
            assert "another key than admitted" in str(refused.error)
        assert hub.link.online() == {}
    finally:
        hub.stop()


def test_no_model_leaves_without_consent(tmp_path: Path) -> None:
    """Over the real link: who is here is asked at export, who is away is taken at its last word."""
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    hospitals = [Hospital(founded, site) for site in founded.admissions]
    try:
        with CoordinatorDesk(founded.coordinator) as desk, ExitStack() as agents:
            for hospital in hospitals[:2]:
                agents.enter_context(agent(hub, founded, hospital))
            signed = founded.sign_study(consents=["St. Mary", "Riverside"])
            with agent(hub, founded, hospitals[2]):
                digest = desk.submit(signed.manifest_bytes, signed.signature).digest
                assert list(desk.watch(digest))[-1].study.status == "done"
                assert missing(desk, digest) == "St. Mary, Riverside"
                hospitals[0].decision = hospitals[2].decision = "consented"
                assert desk.export(digest) == desk.export(digest, 3)
                # It was asked; a word taken back before the export counts.
                hospitals[0].decision = "approved"
                assert missing(desk, digest) == "St. Mary"
                hospitals[0].decision = "consented"
            wait_until(lambda: 3 not in hub.link.online())
            assert desk.export(digest, 1)
            assert [site.decision for site in desk.show(digest)[1].sites] == [
                "consented", "approved", "consented",
            ]  # fmt: skip
            # Whoever is here and does not answer has not consented, whatever it said before.
            hospitals[0].answer = lambda kind, *_: (  # type: ignore[method-assign]
                messages.encode_reply(Reply(messages.kind_of(kind), available=False)), ()
            )  # fmt: skip
            assert missing(desk, digest) == "St. Mary"
    finally:
        hub.stop()
    assert "query.consent" not in hospitals[1].asked


def missing(desk: CoordinatorDesk, digest: str) -> str:
    with pytest.raises(RefusedError, match="without the consent of") as caught:
        desk.export(digest)
    assert caught.value.code == "study.consent"
    assert caught.value.exit_code == 3
    assert f"site consent {digest[:12]}" in caught.value.remedy
    return caught.value.problem.partition("the consent of ")[2]
