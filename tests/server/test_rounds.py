"""One study through its phases, over a Grid in this process whose hospitals are the real machines."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from common import flower, messages
from common.audit.evidence import Evidence
from common.audit.openings import recomputed
from common.audit.party import Check
from common.audit.payloads import kept_payloads
from common.audit.verify import verify
from common.errors import FailureError, RefusedError, UsageError, VerificationError
from common.ledger.entries import Completed, Ended
from common.messages import Reply
from common.secagg import records
from common.secagg.codec import quantise
from common.study import WITHOUT_MASKS
from server import round as round_module
from server import rounds
from server.evidence import collect, trust
from server.ledger import HubLedger
from server.payloads import pack_payloads
from server.rounds import StudyRun
from server.store import Store
from server.strategy import ServerStep
from tests.server.hospitals import WITHOUT_DP, Founded, Hospital, Room, found, known_update

DIM = 6
QUICK = {"CONSENT_PERIOD_S": 0.001, "CONSENT_TIMEOUT_S": 0.2, "SETUP_TIMEOUT_S": 0.2, "CLOSE_TIMEOUT_S": 0.2}
# The shortest times a manifest can state: who is silent is then soon known to be.
SHORT = {
    "aggregation__straggler_s": 0,
    "aggregation__upload_s": 1,
    "aggregation__deadline_s": 1,
    "aggregation__quorum_s": 1,
}


@dataclass
class Stage:
    """A hub, its hospitals in one room, and one stored study."""

    founded: Founded
    store: Store
    room: Room
    digest: str

    def run(self, **options: Any) -> None:
        StudyRun(self.founded.home, self.store, self.room, self.digest, **options).run()

    @property
    def status(self) -> tuple[str, str]:
        row = self.store.study(self.digest)
        return row.status, row.detail

    def model(self, round_number: int = 0) -> np.ndarray:
        state = load(self.store.state(self.digest, round_number))
        return np.concatenate([state["weight"].ravel(), state["bias"].ravel()])

    def cohorts(self) -> list[list[int]]:
        return [json.loads(row.cohort) for row in self.store.rounds(self.digest)]


Make = Callable[..., Stage]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    for name, seconds in QUICK.items():
        monkeypatch.setattr(rounds, name, seconds)
    monkeypatch.setattr(round_module, "REPLY_MARGIN_S", 0.0)
    monkeypatch.setattr(round_module, "ASK_AGAIN_S", 0.05)
    opened: list[Store] = []

    def make(hospitals: int = 3, **changes: Any) -> Stage:
        founded = found(tmp_path, hospitals)
        store = Store.open(founded.home.database)
        opened.append(store)
        digest = founded.store_study(store, founded.sign_study(**{**SHORT, **changes}))
        room = Room([Hospital(founded, site) for site in founded.admissions])
        return Stage(founded, store, room, digest)

    yield make
    for store in opened:
        store.close()


def steps_of(sites: list[int], round_number: int, step: float = 1e-5, limit: float = 100.0) -> np.ndarray:
    """The exact mean of what hospitals sum in a round: rounded to the grid one by one, then averaged."""
    zeros = {"all": np.zeros(DIM, dtype=np.float32)}
    q = [quantise(known_update(site, round_number, zeros), step, limit) for site in sites]
    return np.sum(q, axis=0) * step / len(sites)


def exact_model(cohorts: list[list[int]]) -> np.ndarray:
    """The model that the study must give: float32 after every round, as the layout stores it."""
    model = np.zeros(DIM, dtype=np.float32)
    for number, cohort in enumerate(cohorts, start=1):
        model = (model.astype(np.float64) + steps_of(cohort, number)).astype(np.float32)
    return model


def test_a_study_runs_through_its_phases_to_the_exact_sum(stage: Make) -> None:
    study = stage(training__rounds=4)
    seen: list[tuple[str, str]] = []
    study.room.before = lambda _site, kind: seen.append((kind, study.status[0]))
    study.run()

    assert study.status == ("done", "")
    assert study.cohorts() == [[1, 2, 3]] * 4
    assert np.array_equal(study.model(), exact_model(study.cohorts()))
    for number in range(1, 5):
        assert np.array_equal(study.model(number), exact_model(study.cohorts()[:number]))

    order = list(dict.fromkeys(seen))
    assert order[:5] == [
        ("query.study", "waiting for approval"),
        ("query.keys", "setting up"),
        ("query.directory", "setting up"),
        ("query.seeds", "setting up"),
        ("query.confirms", "setting up"),
    ]
    assert ("train.ready", "running") in order
    assert seen[-3:] == [("query.close", "done")] * 3
    for hospital in study.room.hospitals.values():
        assert hospital.site is not None
        assert hospital.site.closed
        assert len(hospital.results) == 4


def test_each_round_starts_from_the_model_of_the_last(stage: Make) -> None:
    study = stage()
    study.run()
    stored = study.store.rounds(study.digest)
    assert [(row.step, row.number) for row in stored] == [(1, 1), (2, 2), (3, 3)]
    for hospital in study.room.hospitals.values():
        assert not any(value.any() for value in hospital.states[0].values())
        for number, state in enumerate(hospital.states[1:], start=1):
            after = load(study.store.state(study.digest, number))
            assert all(np.array_equal(state[name], after[name]) for name in state)
        # R6 tells each hospital the sum and the model that the checkpoint holds.
        told = [(result.ctx, result.sum_digest, result.model_digest) for result in hospital.results]
        assert told == [(row.context, row.sum_digest, row.model_digest) for row in stored]


def test_the_model_is_plain_fedavg_to_the_codec(stage: Make) -> None:
    study = stage(privacy=WITHOUT_DP, training__rounds=5, aggregation__codec__step=1e-6)
    study.run()
    plain = np.zeros(DIM)
    for number in range(1, 6):
        plain += np.mean(
            [known_update(site, number, {"all": np.zeros(DIM, np.float32)}) for site in (1, 2, 3)], axis=0
        )
    assert np.abs(study.model() - plain).max() <= 5 * 1e-6
    assert np.abs(plain).max() > 1


@pytest.mark.parametrize("silence", ["unavailable", "no reply", "garbled"])
@pytest.mark.parametrize("missing", [1, 4])
def test_a_hospital_missing_from_a_round_is_left_out_of_its_sum(
    stage: Make, silence: str, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    study = stage(4, training__rounds=2)
    asked = {"count": 0}

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if (site, kind) != (missing, "train.ready"):
            return body, payload
        asked["count"] += 1
        if asked["count"] == 2:
            return body, payload
        return {
            "unavailable": (messages.encode_reply(Reply(messages.READY, available=False)), ()),
            "no reply": None,
            "garbled": (body[:-1], ()),
        }[silence]

    study.room.meddle = meddle
    with caplog.at_level(logging.INFO):
        study.run()
    assert study.status[0] == "done"
    others = [i for i in (1, 2, 3, 4) if i != missing]
    # Having missed a round, it takes part in the next.
    assert study.cohorts() == [others, [1, 2, 3, 4]]
    assert np.array_equal(study.model(), exact_model(study.cohorts()))
    said = {"unavailable": ": unavailable", "no reply": "no reply to train.ready", "garbled": "was dropped"}
    name = study.founded.admissions[missing].name
    assert any(said[silence] in r.message and repr(name) in r.message for r in caplog.records)


def forged(record: Any) -> bytes:
    """A reply with that record, its signature one bit off."""
    kind = {records.Ready: messages.READY, records.Open: messages.OPEN}[type(record)]
    sig = bytes([record.sig[0] ^ 1]) + record.sig[1:]
    return messages.encode_reply(Reply(kind, True, (replace(record, sig=sig),)))


def test_a_reply_that_does_not_verify_counts_as_missing(
    stage: Make, caplog: pytest.LogCaptureFixture
) -> None:
    study = stage(4, training__rounds=1)
    study.room.meddle = lambda site, kind, body, payload: (
        (forged(messages.decode_reply(kind, body).records[0]), ())
        if (site, kind) == (2, "train.ready")
        else (body, payload)
    )
    study.run()
    assert study.cohorts() == [[1, 3, 4]]
    assert any("refused" in r.message and "not signed by hospital 2" in r.message for r in caplog.records)


def test_a_record_in_anothers_name_counts_as_missing(stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    study = stage(4, training__rounds=1)
    kept: list[bytes] = []

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if kind == "train.ready" and site == 1:
            kept.append(body)
        return (kept[0], ()) if kind == "train.ready" and site == 3 else (body, payload)

    study.room.meddle = meddle
    study.run()
    assert study.cohorts() == [[1, 2, 4]]
    assert any("in the name of 1" in r.message for r in caplog.records)


def silent(study: Stage, missing: int, kind: str, times: int) -> None:
    """Let a hospital be silent to the first ``times`` messages of a kind."""
    asked = {"count": 0}

    def meddle(site: int, asked_kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if (site, asked_kind) != (missing, kind):
            return body, payload
        asked["count"] += 1
        return None if asked["count"] <= times else (body, payload)

    study.room.meddle = meddle


def lost(study: Stage) -> list[tuple[int, str]]:
    return [(row.number, row.lost) for row in study.store.started(study.digest) if row.lost]


def test_an_upload_that_is_missing_costs_an_attempt(stage: Make) -> None:
    study = stage(4, training__rounds=2)
    silent(study, 2, "train.upload", 1)
    study.run()
    assert study.status == ("done", "")
    assert study.cohorts() == [[1, 3, 4], [1, 2, 3, 4]]
    assert [row.attempt for row in study.store.rounds(study.digest)] == [2, 1]
    assert np.array_equal(study.model(), exact_model(study.cohorts()))
    assert lost(study) == []


def test_an_unavailable_upload_is_not_waited_for(stage: Make) -> None:
    study = stage(5, training__rounds=1, aggregation__upload_s=600, aggregation__deadline_s=600)
    gone = messages.encode_reply(Reply(messages.UPLOAD, available=False))
    study.room.meddle = lambda site, kind, body, payload: (
        (gone, ()) if (site, kind) == (4, "train.upload") else (body, payload)
    )
    study.run()
    assert study.cohorts() == [[1, 2, 3, 5]]
    assert np.array_equal(study.model(), exact_model(study.cohorts()))


def test_attempts_end_at_the_manifests_number(stage: Make) -> None:
    study = stage(4, training__rounds=1, aggregation__attempts=1)
    silent(study, 2, "train.upload", 1)
    study.run()
    assert lost(study) == [(1, "all attempts of this round are used up")]
    assert study.cohorts() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("train.ready", "2 hospitals can be summed together, and the study needs 3"),
        ("train.upload", "2 hospitals can be summed together, and the study needs 3"),
        ("train.open", "did not open"),
    ],
)
def test_a_lost_round_is_computed_again_under_a_new_number(stage: Make, kind: str, problem: str) -> None:
    study = stage(training__rounds=2)
    silent(study, 2, kind, 1 if kind != "train.open" else 1000)
    if kind == "train.open":
        # Silent for the whole of the round, however often it is asked.
        real = study.room.meddle
        study.room.meddle = lambda site, asked, body, payload: (
            real(site, asked, body, payload)
            if study.room.hospitals[2].asked.count("train.ready") == 1
            else (body, payload)
        )
    study.run()
    assert study.status == ("done", "")
    assert [(row.number, row.step) for row in study.store.started(study.digest)] == [
        (1, None),
        (2, 1),
        (3, 2),
    ]
    ((number, reason),) = lost(study)
    assert number == 1
    assert problem in reason
    # After a loss each is asked whether it still takes part, before anybody is charged again.
    for hospital in study.room.hospitals.values():
        first, second = [at for at, kind in enumerate(hospital.asked) if kind == "train.ready"][:2]
        assert hospital.asked[first:second].count("query.study") == 1
        assert hospital.asked.count("train.ready") == 3


def test_an_opening_is_asked_for_until_the_deadline(stage: Make) -> None:
    study = stage(training__rounds=1)
    later = messages.encode_reply(Reply(messages.OPEN, available=False))
    times = iter(range(1000))
    study.room.meddle = lambda site, kind, body, payload: (
        (later, ()) if (site, kind) == (3, "train.open") and next(times) < 3 else (body, payload)
    )
    study.run()
    assert study.cohorts() == [[1, 2, 3]]
    assert lost(study) == []


@pytest.mark.parametrize("kind", ["train.ready", "train.upload"])
def test_three_lost_rounds_in_a_row_end_the_study(stage: Make, kind: str) -> None:
    study = stage()
    silent(study, 2, kind, 1000)
    with pytest.raises(FailureError, match="3 rounds in a row were lost, the last because 2 hospitals"):
        study.run()
    assert study.status[0] == "failed"
    assert [number for number, _ in lost(study)] == [1, 2, 3]
    assert study.cohorts() == []
    # Whatever ended it, every hospital is told to erase the run.
    assert all(h.site is not None and h.site.closed for h in study.room.hospitals.values())


def test_lost_rounds_end_at_the_manifests_number(stage: Make) -> None:
    study = stage(training__rounds=3, aggregation__rounds_max=3)
    silent(study, 2, "train.upload", 1)
    with pytest.raises(FailureError, match="1 rounds were lost, and the study has no more"):
        study.run()
    assert len(study.cohorts()) == 2


def test_a_study_waits_for_its_quorum_and_says_so(stage: Make) -> None:
    study = stage(4, training__rounds=3, aggregation__quorum_s=60)
    away = [study.room.hospitals[i] for i in (2, 3)]
    shown: list[tuple[str, str]] = []
    real = study.room.get_node_ids

    def coming_and_going() -> list[int]:
        if len(study.cohorts()) == 1 and len(shown) < 5:
            for hospital in away:
                study.room.hospitals.pop(hospital.id, None)
            shown.append(study.status)
        else:
            study.room.hospitals |= {hospital.id: hospital for hospital in away}
        return real()

    study.room.get_node_ids = coming_and_going  # type: ignore[method-assign]
    study.run()
    assert study.status == ("done", "")
    names = [study.founded.admissions[i].name for i in (2, 3)]
    assert ("waiting for hospitals", f"3 hospitals are needed; waiting for {', '.join(names)}") in shown
    assert lost(study) == []


def test_a_quorum_is_not_waited_for_without_end(stage: Make) -> None:
    study = stage(training__rounds=2)
    real = study.room.get_node_ids
    study.room.get_node_ids = lambda: [i for i in real() if i != 3 or not study.cohorts()]  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="waiting for Riverside was in vain"):
        study.run()
    assert study.status[0] == "failed"


def test_a_hospital_that_is_offline_is_not_asked(stage: Make) -> None:
    study = stage(4, training__rounds=3, aggregation__straggler_s=600, aggregation__deadline_s=600)
    real = study.room.get_node_ids
    study.room.get_node_ids = lambda: [i for i in real() if i != 3 or len(study.cohorts()) != 1]  # type: ignore[method-assign]
    study.run()
    assert study.cohorts() == [[1, 2, 3, 4], [1, 2, 4], [1, 2, 3, 4]]


def test_hospitals_that_withdraw_are_left_out_while_a_quorum_stays(stage: Make) -> None:
    study = stage(4, training__rounds=4)
    unavailable = messages.encode_reply(Reply(messages.READY, available=False))

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        withdrawn = study.room.hospitals[site].decision == "denied"
        return (unavailable, ()) if withdrawn and kind == "train.ready" else (body, payload)

    def before(site: int, kind: str) -> None:
        if kind == "train.ready":
            study.room.hospitals[2].decision = "denied" if study.cohorts() else "approved"
            study.room.hospitals[4].decision = "denied" if len(study.cohorts()) == 2 else "approved"

    study.room.meddle, study.room.before = meddle, before
    study.run()
    assert study.cohorts() == [[1, 2, 3, 4], [1, 3, 4]]
    assert study.status == ("denied", "denied by Northgate, Holy Cross")


@pytest.mark.parametrize("kind", ["query.directory", "query.seeds", "query.confirms"])
def test_one_refusal_in_the_setup_is_asked_again(stage: Make, kind: str) -> None:
    study = stage(training__rounds=1)
    refusal = messages.encode_reply(Reply(messages.KINDS[kind], available=False))
    times = iter(range(1000))
    study.room.meddle = lambda site, asked, body, payload: (
        (refusal, ()) if (site, asked) == (3, kind) and next(times) < 2 else (body, payload)
    )
    study.run()
    assert study.status == ("done", "")
    assert lost(study) == []


def test_who_never_gets_the_confirmations_is_in_no_cohort(stage: Make) -> None:
    study = stage(4, training__rounds=1)
    refusal = messages.encode_reply(Reply(messages.CONFIRMS, available=False))
    study.room.meddle = lambda site, asked, body, payload: (
        (refusal, ()) if (site, asked) == (4, "query.confirms") else (body, payload)
    )
    study.run()
    assert study.cohorts() == [[1, 2, 3]]
    assert json.loads(study.store.study(study.digest).pairs) == [[1, 2], [1, 3], [2, 3]]


def test_dropouts_at_one_time_cost_one_attempt(stage: Make) -> None:
    """Three of ten restart between R1 and R2: the seven that are left are enough, and soon."""
    study = stage(10, training__rounds=1)
    gone = messages.encode_reply(Reply(messages.UPLOAD, available=False))
    study.room.meddle = lambda site, kind, body, payload: (
        (gone, ()) if kind == "train.upload" and site in (2, 5, 9) else (body, payload)
    )
    study.run()
    (row,) = study.store.rounds(study.digest)
    assert (json.loads(row.cohort), row.attempt) == ([1, 3, 4, 6, 7, 8, 10], 2)
    assert lost(study) == []


def test_a_round_that_can_have_no_cohort_is_not_waited_for(stage: Make) -> None:
    study = stage(4, training__rounds=1, aggregation__deadline_s=600, aggregation__rounds_max=1)
    unavailable = messages.encode_reply(Reply(messages.READY, available=False))

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if kind != "train.ready" or site > 3:
            return body, payload
        return None if site == 1 else (unavailable, ())

    study.room.meddle = meddle
    with pytest.raises(FailureError, match="1 rounds were lost"):
        study.run()


def test_what_a_round_waits_for_is_in_the_status(stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_module, "SAY_AFTER_S", 0.0)
    study = stage(4, training__rounds=1, aggregation__straggler_s=1)
    shown: set[str] = set()
    later = messages.encode_reply(Reply(messages.OPEN, available=False))
    times = iter(range(1000))

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        shown.add(study.status[1])
        if (site, kind) == (3, "train.ready"):
            return None
        return (later, ()) if (site, kind) == (2, "train.open") and next(times) < 2 else (body, payload)

    study.room.meddle = meddle
    study.run()
    assert {"waiting for the update of Riverside", "waiting for the opening of Northgate"} <= shown
    assert study.status == ("done", "")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("query.directory", "2 hospitals share keys, and the study needs 3"),
        ("query.seeds", "2 hospitals share keys, and the study needs 3"),
    ],
)
def test_a_hospital_lost_in_the_setup_ends_a_study_that_needs_it(
    stage: Make, kind: str, problem: str
) -> None:
    study = stage()
    silent(study, 2, kind, 1000)
    with pytest.raises(RefusedError, match=problem):
        study.run()
    assert study.status == ("failed", problem)
    assert study.cohorts() == []


def test_the_setup_goes_on_without_one_who_announces_nothing(stage: Make) -> None:
    study = stage(4, training__rounds=1)
    silent(study, 2, "query.keys", 1000)
    study.run()
    assert study.cohorts() == [[1, 3, 4]]


def test_an_altered_payload_is_refused_and_never_added(stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    study = stage(training__rounds=1)
    altered = {"times": 0}

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if (site, kind) == (3, "train.upload") and not altered["times"]:
            altered["times"] += 1
            payload = (bytes([payload[0][0] ^ 1]) + payload[0][1:], *payload[1:])
        return body, payload

    study.room.meddle = meddle
    study.run()
    assert any("chunk 0 of hospital 3 was altered" in r.message for r in caplog.records)
    assert len(lost(study)) == 1
    assert study.cohorts() == [[1, 2, 3]]


def test_a_forged_opening_is_refused(stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    study = stage(training__rounds=1)
    times = iter(range(1000))
    study.room.meddle = lambda site, kind, body, payload: (
        (forged(messages.decode_reply(kind, body).records[0]), ())
        if (site, kind) == (1, "train.open") and next(times) < 1
        else (body, payload)
    )
    study.run()
    assert any("not signed by hospital 1" in r.message for r in caplog.records)
    # Asked once more, it opens, and the sum is exact.
    assert np.array_equal(study.model(), exact_model(study.cohorts()))


def test_one_denial_ends_the_study(stage: Make) -> None:
    study = stage()
    study.room.hospitals[2].decision = "denied"
    study.run()
    assert study.status == ("denied", "denied by Northgate")
    assert json.loads(study.store.study(study.digest).decisions) == {
        "1": "approved",
        "2": "denied",
        "3": "approved",
    }
    assert not any("query.keys" in h.asked for h in study.room.hospitals.values())


def test_a_study_waits_for_the_last_approval(stage: Make) -> None:
    study = stage(training__rounds=1)
    slow = study.room.hospitals[3]
    slow.decision = "received"
    shown: list[str] = []

    def before(site: int, kind: str) -> None:
        if (site, kind) == (3, "query.study"):
            shown.append(json.loads(study.store.study(study.digest).decisions).get("3", ""))
            if len(shown) == 3:
                slow.decision = "approved"

    study.room.before = before
    study.run()
    assert shown == ["", "received", "received"]
    assert study.status[0] == "done"
    # Who has approved is not asked again.
    assert study.room.hospitals[1].asked.count("query.study") == 1


def test_an_absent_hospital_is_waited_for(stage: Make) -> None:
    study = stage(training__rounds=1)
    late = study.room.hospitals.pop(3)
    asked: list[str] = []
    real = study.room.get_node_ids

    def arriving() -> list[int]:
        asked.append(study.status[0])
        if len(asked) == 4:
            study.room.hospitals[3] = late
        return real()

    study.room.get_node_ids = arriving  # type: ignore[method-assign]
    study.run()
    assert asked[:4] == ["waiting for approval"] * 4
    assert study.status[0] == "done"


@pytest.mark.parametrize(("kind", "done"), [("query.study", 0), ("query.keys", 0), ("train.ready", 1)])
def test_an_abort_ends_the_study_at_its_next_step(stage: Make, kind: str, done: int) -> None:
    study = stage()
    times = {"asked": 0}

    def before(site: int, asked: str) -> None:
        if (site, asked) == (1, kind):
            times["asked"] += 1
            if times["asked"] == done + 1:
                study.store.set_status(study.digest, "aborted", "wrong question")

    study.room.before = before
    study.run()
    assert study.status == ("aborted", "wrong question")
    assert len(study.cohorts()) == done
    for hospital in study.room.hospitals.values():
        assert hospital.asked[-1] == "query.close"
        assert hospital.asked.count("train.upload") == done


def test_an_ended_study_is_not_run_again(stage: Make) -> None:
    study = stage()
    study.store.set_status(study.digest, "aborted", "before it began")
    study.run()
    assert study.status == ("aborted", "before it began")
    assert {kind for h in study.room.hospitals.values() for kind in h.asked} <= {"query.close"}


def test_a_study_that_expires_while_it_waits_ends(stage: Make) -> None:
    study = stage(expires="2030-01-01T00:00Z")
    study.room.hospitals[1].decision = "received"

    def patience(_site: int, _kind: str) -> None:
        assert len(study.room.hospitals[1].asked) < 100, "the study waits for ever"

    study.room.before = patience
    minute = iter(range(10_000))
    # 2029-12-31T23:58Z, then ten seconds at every look at the clock.
    with pytest.raises(RefusedError, match="expired at 2030-01-01T00:00Z"):
        study.run(clock=lambda: 1893455880.0 + 10 * next(minute))
    assert study.room.hospitals[1].asked.count("query.study") > 1
    assert study.cohorts() == []


def test_an_expired_study_is_refused_before_anybody_is_asked(stage: Make) -> None:
    study = stage(expires="2030-01-01T00:00Z")
    with pytest.raises(UsageError, match="expired"):
        study.run(clock=lambda: 1893456000.0)
    assert not any(h.asked for h in study.room.hospitals.values())


def test_a_study_of_another_hub_is_refused(stage: Make, tmp_path: Path) -> None:
    study = stage()
    (tmp_path / "other").mkdir()
    stranger = found(tmp_path / "other", 0)
    with pytest.raises(VerificationError, match="roster"):
        StudyRun(stranger.home, study.store, study.room, study.digest)


def test_a_model_that_has_grown_past_its_bound_ends_the_study(stage: Make) -> None:
    study = stage(training__rounds=2, aggregation__state_norm_bound=0.5)
    with pytest.raises(VerificationError, match="not within the manifest's state_norm_bound"):
        study.run()
    assert study.status[0] == "failed"
    assert study.cohorts() == []


def test_messages_of_another_app_are_dropped(stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    study = stage(4, training__rounds=1)
    real = study.room.pull_messages

    def foreign(message_ids: Any) -> list[flower.Message]:
        replies = real(message_ids)
        for reply in replies:
            if reply.metadata.src_node_id == 4 and reply.metadata.message_type == "train.ready":
                reply.content["more"] = reply.content[flower.RECORD]
        return replies

    study.room.pull_messages = foreign  # type: ignore[method-assign]
    study.run()
    assert study.cohorts() == [[1, 2, 3]]
    assert any("exactly one record" in r.message for r in caplog.records)


@given(
    st.lists(st.lists(st.floats(-50, 50), min_size=DIM, max_size=DIM), min_size=3, max_size=3),
    st.sampled_from([1e-5, 0.25, 0.001]),
)
@settings(max_examples=8, deadline=None)
def test_sums_are_exact_for_any_update(values: list[list[float]], step: float) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "CONSENT_PERIOD_S", 0.0)
        founded = found(Path(folder), 3)
        store = Store.open(founded.home.database)
        signed = founded.sign_study(training__rounds=1, aggregation__codec__step=step)
        digest = founded.store_study(store, signed)
        vectors = {site: np.array(vector) for site, vector in enumerate(values, start=1)}
        hospitals = [Hospital(founded, i, lambda site, _round, _state: vectors[site]) for i in vectors]
        StudyRun(founded.home, store, Room(hospitals), digest).run()
        total = np.sum([quantise(vector, step, 100.0) for vector in vectors.values()], axis=0)
        state = load(store.state(digest))
        store.close()
    got = np.concatenate([state["weight"].ravel(), state["bias"].ravel()])
    assert np.array_equal(got, (total.astype(np.float64) * step / 3).astype(np.float32))


def test_an_upload_sink_takes_headers_only() -> None:
    sink = round_module._Uploads(SimpleNamespace(accumulator=None), None)  # type: ignore[arg-type]
    with pytest.raises(FailureError, match="without an upload header"):
        sink.header(1, messages.encode_reply(Reply(messages.UPLOAD, available=False)))
    with pytest.raises(VerificationError):
        sink.header(1, messages.encode_reply(Reply(messages.CLOSE)))


# -- kept payloads -------------------------------------------------------------------------------------------


def audited(study: Stage, tmp_path: Path) -> list[Check]:
    """What an auditor finds with the hub's evidence and the payloads that it kept."""
    home, out = study.founded.home, tmp_path / f"{len(list(tmp_path.glob('*.zip')))}.zip"
    evidence = collect(home, datetime.now(UTC))
    found = verify([Evidence.from_bytes(evidence.to_bytes(), "hub")], trust(home))
    assert [check.detail for check in found.checks if not check.passed] == []
    pack_payloads(home.payloads / study.digest, study.digest, out)
    with kept_payloads(out) as payload:
        return list(recomputed(found.parties[0], payload))


def test_kept_payloads_give_every_sum_again(stage: Make, tmp_path: Path) -> None:
    study = stage(4, aggregation__audit="payloads", training__rounds=3)
    study.run()
    assert study.status == ("done", "")
    checks = audited(study, tmp_path)
    assert [check.passed for check in checks] == [True] * 3
    assert [json.loads(row.cohort) for row in study.store.rounds(study.digest)] == [[1, 2, 3, 4]] * 3


def test_an_abandoned_attempt_keeps_no_payload(stage: Make, tmp_path: Path) -> None:
    """A hospital that drops out after the others uploaded costs an attempt: only the opened one stays."""
    study = stage(4, aggregation__audit="payloads", training__rounds=2)
    silent(study, 4, "train.upload", 1)
    study.run()
    assert study.status == ("done", "")
    assert [row.attempt for row in study.store.rounds(study.digest)] == [2, 1]
    assert study.cohorts() == [[1, 2, 3], [1, 2, 3, 4]]
    folder = study.founded.home.payloads / study.digest
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*/*")) == [
        *("1/1", "1/2", "1/3"),
        *("2/1", "2/2", "2/3", "2/4"),
    ]
    assert [check.passed for check in audited(study, tmp_path)] == [True] * 2


def test_without_payloads_only_signatures_are_kept(stage: Make, tmp_path: Path) -> None:
    study = stage(training__rounds=2)
    study.run()
    assert not study.founded.home.payloads.exists()
    with pytest.raises(RefusedError, match="no payloads are kept"):
        audited(study, tmp_path)


def test_a_sum_is_opened_only_with_all_payloads(stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that cannot be written is in the sum already: the study ends before anybody opens."""
    study = stage(aggregation__audit="payloads")
    asked: list[str] = []
    study.room.before = lambda _site, kind: asked.append(kind)
    real, written = os.pwrite, []

    def full(file: int, data: bytes, at: int) -> int:
        written.append(at)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return real(file, data, at)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(FailureError, match="No space left on device"):
        study.run()
    assert study.status[0] == "failed"
    assert "train.upload" in asked
    assert "train.open" not in asked
    assert list((study.founded.home.payloads / study.digest).iterdir()) == []


def test_a_hub_without_room_charges_nobody(stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = stage(aggregation__audit="payloads")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FailureError, match="has room for 10"):
        study.run()
    assert study.status[0] == "failed"
    assert "has room for 10" in study.status[1]
    assert study.store.started(study.digest) == []


# -- without masks -------------------------------------------------------------------------------------------


def test_without_masks_the_hub_reads_every_update(stage: Make, tmp_path: Path) -> None:
    """The same sums, bit for bit, and each payload is a hospital's own integers in plain: hence the name."""
    study = stage(aggregation__masks=WITHOUT_MASKS, aggregation__audit="payloads", training__rounds=2)
    study.run()
    assert study.status == ("done", "")
    assert np.array_equal(study.model(), exact_model(study.cohorts()))
    assert [check.passed for check in audited(study, tmp_path)] == [True] * 2
    zeros = {"all": np.zeros(DIM, dtype=np.float32)}
    for site in (1, 2, 3):
        payload = (study.founded.home.payloads / study.digest / "1" / str(site)).read_bytes()
        sent = np.frombuffer(payload[: 4 * (DIM + 1)], dtype="<i4")
        assert sent.tolist() == [*quantise(known_update(site, 1, zeros), 1e-5, 100.0).tolist(), 1]


def test_with_masks_no_payload_is_an_update(stage: Make) -> None:
    study = stage(aggregation__audit="payloads", training__rounds=1)
    study.run()
    zeros = {"all": np.zeros(DIM, dtype=np.float32)}
    for site in (1, 2, 3):
        payload = (study.founded.home.payloads / study.digest / "1" / str(site)).read_bytes()
        sent = np.frombuffer(payload[: 4 * (DIM + 1)], dtype="<i4")
        # 224 bits that all differ: a false alarm has a probability below 1e-9 for each word.
        assert not np.any(sent == [*quantise(known_update(site, 1, zeros), 1e-5, 100.0).tolist(), 1])


def test_an_opened_round_is_never_left_out(
    stage: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator aborts while an opened sum is being stored, and the hub looks at its studies meanwhile."""
    study = stage(4, training__rounds=3)
    advance = ServerStep.advance

    def aborted(self: ServerStep, *arguments: Any) -> Any:
        new = advance(self, *arguments)
        if self.advances == 2:
            study.store.set_status(study.digest, "aborted", "a person")
            with closing(HubLedger(study.founded.home, study.store)) as ledger:
                ledger.catch_up(over=lambda _: False)
        return new

    monkeypatch.setattr(ServerStep, "advance", aborted)
    study.run()
    assert study.status == ("aborted", "a person")
    with closing(HubLedger(study.founded.home, study.store)) as ledger:
        said = [entry for entry in ledger.ledger.entries() if isinstance(entry, Completed | Ended)]
    assert [type(entry) for entry in said] == [Completed, Completed, Ended]
    assert {len(hospital.results) for hospital in study.room.hospitals.values()} == {2}
    found = verify([collect(study.founded.home, datetime.now(UTC))], trust(study.founded.home))
    assert found.passed
