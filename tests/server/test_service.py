"""The hub as a whole, in this process: real listening, real certificates, agents over the real link."""

import sqlite3
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from common.errors import FailureError, RefusedError
from server import rounds
from server.desk import CoordinatorDesk
from server.service import Hub
from server.store import Store
from tests.conftest import Credentials
from tests.server.hospitals import WITHOUT_DP, Founded, Hospital, found
from tests.server.test_link import RunningAgent, wait_until
from tests.server.test_rounds import exact_model


def agent(hub: Hub, founded: Founded, hospital: Hospital) -> RunningAgent:
    admission = founded.admissions[hospital.id]
    credentials = Credentials(
        founded.keys[hospital.id].tls_key_pem, admission.certificate_pem, admission.ca_pem
    )
    return RunningAgent(hub.link, credentials, hospital.id, hospital.answer_message)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "CONSENT_PERIOD_S", 0.02)
    monkeypatch.setattr(rounds, "REPLY_MARGIN_S", 0.5)


def test_studies_run_one_after_the_other_over_the_link(tmp_path: Path) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    hospitals = [Hospital(founded, site) for site in founded.admissions]
    try:
        with CoordinatorDesk(founded.coordinator) as desk, ExitStack() as agents:
            for hospital in hospitals:
                agents.enter_context(agent(hub, founded, hospital))
            digests = []
            for name in ("first", "second"):
                signed = founded.sign_study(name=name, privacy=WITHOUT_DP)
                digests.append(desk.submit(signed.manifest_bytes, signed.signature).digest)
            for digest in digests:
                last = list(desk.watch(digest))[-1]
                assert (last.study.status, last.study.round, list(last.cohort)) == ("done", 3, [1, 2, 3])
                assert [(site.decision, site.online) for site in last.sites] == [("approved", True)] * 3
                state = load(desk.export(digest))
                model = np.concatenate([state["weight"].ravel(), state["bias"].ravel()])
                assert np.array_equal(model, exact_model([[1, 2, 3]] * 3))
    finally:
        hub.stop()
    for hospital in hospitals:
        assert hospital.asked.count("query.close") == 2


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
            assert last.study.detail == "hospitals [2] have not uploaded"
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
        assert hub.online() == {}
    finally:
        hub.stop()
