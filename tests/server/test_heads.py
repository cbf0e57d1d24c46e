"""Heads of ledgers between hospitals that are the real witnesses: who is left out, and what is remembered."""

import threading
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import messages
from common.audit.evidence import Evidence
from common.audit.trust import Trust
from common.errors import RefusedError
from common.ledger.entries import Completed, Ended, Membership, Submission
from common.ledger.store import Ledger
from common.ledger.tree import leaf_hash
from common.messages import Reply
from common.secagg import records
from common.secagg.records import Head, HeadPlease
from common.witness import HUB, Witness, read_state
from server import evidence, heads
from server.ledger import HubLedger
from server.rounds import StudyRun
from server.store import Store
from tests.server.hospitals import NOW
from tests.server.test_rounds import Make, Stage, stage  # noqa: F401 - a fixture


def entries(study: Stage) -> list[Any]:
    with closing(Ledger.open(study.founded.home.ledger)) as ledger:
        return list(ledger.entries())


def test_every_ledger_is_seen_by_all_others_and_the_hub(stage: Make) -> None:  # noqa: F811
    study = stage(4, training__rounds=3)
    study.run()
    assert study.cohorts() == [[1, 2, 3, 4]] * 3
    for hospital in study.room.hospitals.values():
        others = {HUB, 1, 2, 3, 4} - {hospital.id}
        assert set(hospital.witness.seen) == others
        # Shown once more at the end: the first leaf and three charges.
        assert {hospital.witness.seen[other].size for other in others - {HUB}} == {4}
        assert hospital.asked.count("query.head") == hospital.asked.count("query.cosign") == 4
        assert hospital.witness.cosigned is not None
        assert set(hospital.witness.cosigned.cosigns) == others - {HUB}
    kept = {row.party: records.decode(Head, row.head) for row in study.store.heads()}
    assert set(kept) == {HUB, 1, 2, 3, 4}
    assert all(hospital.witness.seen[HUB] == kept[HUB] for hospital in study.room.hospitals.values())


def test_a_rolled_back_ledger_is_left_out(stage: Make, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    study = stage(4, training__rounds=3)

    def roll_back(site: int, kind: str) -> None:
        if (site, kind) == (2, "train.ready") and len(study.room.hospitals[2].leaf_hashes) == 2:
            # It computes this round with the ledger it had before the first.
            del study.room.hospitals[2].leaf_hashes[1:]

    study.room.before = roll_back
    study.run()
    # The second round restores its length with another charge: no proof fits what the others have seen.
    assert study.cohorts() == [[1, 2, 3, 4], [1, 2, 3, 4], [1, 3, 4]]
    assert study.status == ("done", "")
    assert "its ledger is older or another than before" in caplog.text


def test_without_enough_cosignatures_the_study_ends(stage: Make) -> None:  # noqa: F811
    study = stage(3, training__rounds=3)

    def fork(site: int, kind: str) -> None:
        hospital = study.room.hospitals[2]
        if (site, kind) == (2, "query.head") and len(hospital.leaf_hashes) == 3:
            hospital.leaf_hashes[1] = leaf_hash(b"another history")

    study.room.before = fork
    with pytest.raises(Exception, match="not cosigned of Northgate"):
        study.run()
    assert len(study.cohorts()) == 2
    # Nothing was charged in the rounds that were lost.
    assert all(len(hospital.leaf_hashes) == 3 for hospital in study.room.hospitals.values())


def test_who_was_away_gets_the_proofs_from_where_it_was(stage: Make) -> None:  # noqa: F811
    study = stage(4, training__rounds=6)
    rounds = {"count": 0}
    away = study.room.hospitals[4]

    def before(site: int, kind: str) -> None:
        if (site, kind) == (1, "query.result"):
            rounds["count"] += 1
            if rounds["count"] == 2:
                study.room.hospitals.pop(4)
            if rounds["count"] == 4:
                study.room.hospitals[4] = away

    study.room.before = before
    study.run()
    assert [len(cohort) for cohort in study.cohorts()] == [4, 4, 3, 3, 4, 4]
    assert len(study.store.started(study.digest)) == 6


def test_a_new_hub_process_asks_again_for_the_proofs(stage: Make) -> None:  # noqa: F811
    study = stage(3, training__rounds=4)
    stop = {"at": 2}

    def before(site: int, kind: str) -> None:
        if (site, kind) == (1, "train.ready") and len(study.cohorts()) == stop["at"]:
            stop["at"] = 99
            # As if the hub had never kept a head.
            with study.store._writing() as session:
                session.query(heads.HeadRow).delete()
            raise KeyboardInterrupt

    study.room.before = before
    with pytest.raises(KeyboardInterrupt):
        study.run()
    study.run()
    assert study.status == ("done", "")
    assert study.cohorts() == [[1, 2, 3]] * 4


def test_studies_side_by_side_do_not_leave_each_other_out(stage: Make) -> None:  # noqa: F811
    """In the middle of an exchange the others have just seen later heads of a hospital and of the hub."""
    study = stage(3, training__rounds=4)
    hospitals, meanwhile = study.room.hospitals, {"done": 0}

    def before(site: int, kind: str) -> None:
        if (site, kind) != (1, "query.cosign") or len(study.cohorts()) < 1 or meanwhile["done"] == 3:
            return
        meanwhile["done"] += 1
        hospitals[3].leaf_hashes.append(leaf_hash(b"another study %d" % meanwhile["done"]))
        later = Witness(3, lambda _: None).offer(
            hospitals[3].man,
            HeadPlease(9, ()),
            bytes(32),
            list(hospitals[3].leaf_hashes),
            hospitals[3].ledger_sign,
        )
        for other in (1, 2):
            hospitals[other].witness.seen[3] = later

    study.room.before = before
    study.run()
    assert meanwhile["done"] == 3
    assert study.cohorts() == [[1, 2, 3]] * 4
    assert len(study.store.started(study.digest)) == 4


@pytest.mark.parametrize("wrong", ["another round", "another site", "forged", "unavailable"])
def test_a_wrong_head_leaves_its_site_out_of_the_round(stage: Make, wrong: str) -> None:  # noqa: F811
    study = stage(4, training__rounds=2)

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if (site, kind) != (3, "query.head") or study.cohorts():
            return body, payload
        head = messages.decode_reply(kind, body).records[0]
        assert isinstance(head, Head)
        changed = {
            "another round": replace(head, round=head.round + 1),
            "another site": replace(head, id=1),
            "forged": replace(head, size=head.size + 1),
        }
        reply = (
            Reply(messages.HEAD, True, (changed[wrong],)) if wrong in changed else Reply(messages.HEAD, False)
        )
        return messages.encode_reply(reply), ()

    study.room.meddle = meddle
    study.run()
    assert study.cohorts() == [[1, 2, 4], [1, 2, 3, 4]]


def test_heads_go_to_a_ring_of_enough_cosigners(stage: Make) -> None:  # noqa: F811
    study = stage(8, training__rounds=1)
    study.run()
    for hospital in study.room.hospitals.values():
        assert hospital.witness.cosigned is not None
        found = sorted(hospital.witness.cosigned.cosigns)
        expected = 1 + 1 + heads.SPARE_COSIGNERS  # t is 1
        assert len(found) == expected
        ring = [((hospital.id - 1 - back) % 8) + 1 for back in range(1, expected + 1)]
        assert found == sorted(ring)


@pytest.mark.parametrize(
    "claims", [[(2, size) for size in range(1, 101)], [(2, 5), (2, 6)], [(9, 5)], [(1, 5)]]
)
def test_nobody_fills_up_the_questions_to_another(
    stage: Make,  # noqa: F811
    claims: list[tuple[int, int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each size that somebody claims to have seen is a proof that its owner is asked for, and 64 are too many."""
    study = stage(4, training__rounds=3)
    for hospital in study.room.hospitals.values():
        hospital.leaf_hashes = [leaf_hash(b"%d" % number) for number in range(120)]

    def meddle(site: int, kind: str, body: bytes, payload: tuple[bytes, ...]) -> Any:
        if (site, kind) != (1, "query.cosign"):
            return body, payload
        (answer,) = messages.decode_reply(kind, body).records
        assert isinstance(answer, records.Cosigned)
        return messages.encode_reply(
            Reply(messages.COSIGN, True, (replace(answer, remembered=tuple(claims)),))
        ), ()

    study.room.meddle = meddle
    study.run()
    assert study.status == ("done", "")
    assert all(2 in cohort for cohort in study.cohorts())
    assert (
        sum("refused: it remembers heads that it was not shown" in r.getMessage() for r in caplog.records)
        >= 3
    )


def test_a_party_is_asked_for_the_newest_claims_only() -> None:
    asking = heads.Heads.__new__(heads.Heads)
    asking._sizes = defaultdict(list, {2: [*range(500), 7, 499]})
    assert asking._please(3, 2) == HeadPlease(3, tuple(sorted({499, 7, *range(498, 436, -1)})))
    assert asking._please(3, 1) == HeadPlease(3, ())


def test_the_hubs_ledger_catches_up(stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    study = stage(3, training__rounds=3)
    calls = {"count": 0}
    catch_up = HubLedger.catch_up

    def killed(self: HubLedger, **options: Any) -> None:
        calls["count"] += 1
        # The second one comes after the first checkpoint.
        if calls["count"] == 2:
            raise KeyboardInterrupt
        catch_up(self, **options)

    monkeypatch.setattr(HubLedger, "catch_up", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run()
    assert [entry.step for entry in entries(study) if isinstance(entry, Completed)] == []
    assert len(study.cohorts()) == 1
    study.run()
    kinds = [type(entry) for entry in entries(study)]
    assert kinds == [Membership] * 3 + [Submission] + [Completed] * 3 + [Ended]
    rows = study.store.rounds(study.digest)
    told = [(e.round, e.step, e.ctx, e.sum_digest) for e in entries(study) if isinstance(e, Completed)]
    assert told == [(r.number, r.step, r.context.hex(), r.sum_digest.hex()) for r in rows]
    study.store.revoke_site("Northgate", "2026-01-01T00:00Z", "a test")
    with closing(HubLedger(study.founded.home, study.store)) as ledger:
        ledger.catch_up()
        ledger.catch_up()
    assert [(e.id, e.decision) for e in entries(study) if isinstance(e, Membership)][3:] == [(2, "revoked")]


def test_threads_that_catch_up_at_once_write_each_entry_once(stage: Make) -> None:  # noqa: F811
    study = stage(3, training__rounds=3)
    study.run()
    for number in range(4):
        study.founded.admit(f"Late {number}")
    ledgers = [HubLedger(study.founded.home, study.store) for _ in range(4)]
    threads = [threading.Thread(target=ledger.catch_up) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for ledger in ledgers:
        ledger.close()
    assert sorted(e.id for e in entries(study) if isinstance(e, Membership)) == list(range(1, 8))


def test_a_hub_whose_clock_was_set_back_says_so(stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    study = stage(3, training__rounds=1)
    study.run()
    study.founded.admit("Late")
    with closing(HubLedger(study.founded.home, study.store)) as ledger:
        monkeypatch.setattr(ledger.ledger, "_clock", lambda: NOW)
        with pytest.raises(RefusedError, match="the clock says"):
            ledger.catch_up()


def test_the_hubs_evidence_holds_its_ledger_its_studies_and_the_heads(stage: Make, tmp_path: Path) -> None:  # noqa: F811
    study = stage(3, training__rounds=2)
    study.run()
    found = evidence.collect(study.founded.home, NOW)
    assert Evidence.from_bytes(found.to_bytes(), "the hub's") == found
    assert (found.party, found.name, set(found.studies)) == (HUB, "hub", {study.digest})
    assert len(found.leaves) == 3 + 1 + 2 + 1
    seen, own = read_state(found.heads)
    assert set(seen) == {1, 2, 3}
    assert own is not None
    assert set(own.cosigns) == {1, 2, 3}
    trusted = evidence.trust(study.founded.home)
    assert Trust.from_bytes(trusted.to_bytes()).roster == trusted.roster
    # Nothing of a model, an update or a key.
    model = study.store.state(study.digest)
    assert all(model not in part for part in (*found.leaves, found.heads, *found.studies.values()))


def test_a_study_with_the_hubs_ledger_gone_does_not_run(stage: Make) -> None:  # noqa: F811
    study = stage(3, training__rounds=1)
    study.founded.home.ledger.unlink()
    store = Store.open(study.founded.home.database)
    try:
        with pytest.raises(RefusedError, match="is missing"):
            StudyRun(study.founded.home, store, study.room, study.digest).run()
    finally:
        store.close()
    assert not any("train.ready" in hospital.asked for hospital in study.room.hospitals.values())
