"""The hub's tables on a real SQLite file."""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import RefusedError
from server.store import ENDED, PART_SIZE_BYTES, Checkpoint, SiteRow, Store, StudyRow


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "hub.db")
    yield opened
    opened.close()


def site(number: int, **changes: object) -> SiteRow:
    values = {
        "id": number,
        "name": f"Site {number}",
        "protocol_key": bytes([number]) * 32,
        "ledger_key": bytes([100 + number]) * 32,
        "tls_fingerprint": f"{number:064x}",
        "admitted": "2026-01-01T00:00Z",
    }
    return SiteRow(**(values | changes))


def study(digest: str = "a" * 64, **changes: object) -> StudyRow:
    values = {
        "digest": digest,
        "name": "small",
        "manifest": b"manifest",
        "signature": b"s",
        "roster": b"roster",
        "roster_signature": b"r",
        "status": "queued",
        "rounds": 3,
        "submitted": "2026-01-01T00:00Z",
    }
    return StudyRow(**(values | changes))


def checkpoint(number: int, step: int) -> Checkpoint:
    digests = (b"c" * 32, b"s" * 32, b"m" * 32)
    return Checkpoint(
        number, step, 1, (1, 3), *digests, f"state {step}".encode(), f"m_t {step}".encode(), b"t", 0.25
    )


def test_the_file_is_durable_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    first = Store.open(path)
    first.add_site(site(1))
    with first._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    first.close()
    second = Store.open(path)
    assert [row.name for row in second.sites()] == ["Site 1"]
    second.close()


def test_sites_come_back_by_id(store: Store) -> None:
    assert store.next_site_id() == 1
    for number in (2, 1, 7):
        store.add_site(site(number))
    assert [row.id for row in store.sites()] == [1, 2, 7]
    assert store.next_site_id() == 8
    found = store.site(7)
    assert found is not None
    assert found.protocol_key == bytes([7]) * 32
    assert store.site(3) is None


@pytest.mark.parametrize("taken", ["id", "name", "protocol_key", "ledger_key", "tls_fingerprint"])
def test_nothing_of_a_site_is_used_twice(store: Store, taken: str) -> None:
    store.add_site(site(1))
    with pytest.raises(RefusedError, match="admitted already") as caught:
        store.add_site(site(2, **{taken: getattr(site(1), taken)}))
    assert caught.value.remedy
    assert [row.id for row in store.sites()] == [1]


def test_submitting_twice_changes_nothing(store: Store) -> None:
    assert store.add_study(study())
    store.set_status("a" * 64, "running")
    assert not store.add_study(study(name="another name"))
    found = store.study("a" * 64)
    assert (found.name, found.status, found.number) == ("small", "running", 1)


def test_studies_come_in_the_order_of_submission(store: Store) -> None:
    for digest in ("c", "a", "b"):
        store.add_study(study(digest * 64))
    assert [row.digest[0] for row in store.studies()] == ["c", "a", "b"]
    assert [row.number for row in store.studies()] == [1, 2, 3]


def test_an_unknown_study_is_named(store: Store) -> None:
    with pytest.raises(RefusedError, match="there is no study beef") as caught:
        store.study("beef")
    assert "study list" in caught.value.remedy


@pytest.mark.parametrize("end", ENDED)
def test_an_ended_study_stays_as_it_is(store: Store, end: str) -> None:
    store.add_study(study())
    store.set_status("a" * 64, end, "why")
    for status in (
        "waiting for approval",
        "queued",
        "setting up",
        "waiting for hospitals",
        "running",
        *ENDED,
    ):
        store.set_status("a" * 64, status, "something else")
    found = store.study("a" * 64)
    assert (found.status, found.detail) == (end, "why")


def test_decisions_are_kept_by_site(store: Store) -> None:
    store.add_study(study())
    store.set_decisions("a" * 64, {10: "approved", 2: "received"})
    assert store.study("a" * 64).decisions == '{"2": "received", "10": "approved"}'


def test_a_round_its_model_and_the_strategy_are_one_transaction(store: Store) -> None:
    store.add_study(study())
    assert store.strategy("a" * 64) == b""
    for step in (1, 2):
        assert store.start_round("a" * 64) == step
        store.complete_round("a" * 64, checkpoint(step, step))
        assert store.study("a" * 64).round == step
    # A round that was never started, or of a study that is not there, leaves nothing behind.
    for digest, number in (("a" * 64, 3), ("b" * 64, 1)):
        with pytest.raises(Exception, match="No row"):
            store.complete_round(digest, checkpoint(number, number))
    assert store.rounds("b" * 64) == []
    assert [row.step for row in store.rounds("a" * 64)] == [1, 2]
    assert [row.step for row in store.rounds("a" * 64, after=1)] == [2]
    assert store.state("a" * 64) == b"state 2"
    assert store.state("a" * 64, 1) == b"state 1"
    assert store.strategy("a" * 64) == b"m_t 2"


def test_numbers_go_on_after_lost_rounds_and_restarts(store: Store) -> None:
    store.add_study(study())
    store.add_study(study("b" * 64))
    assert [store.start_round("a" * 64) for _ in range(3)] == [1, 2, 3]
    assert store.start_round("b" * 64) == 1
    store.lose_round("a" * 64, 1, "two hospitals were silent")
    store.complete_round("a" * 64, checkpoint(3, 1))
    rows = [(row.number, row.step, row.lost) for row in store.started("a" * 64)]
    assert rows == [(1, None, "two hospitals were silent"), (2, None, ""), (3, 1, "")]
    assert [row.number for row in store.rounds("a" * 64)] == [3]
    assert store.state("a" * 64) == b"state 1"


def test_a_setup_is_kept_before_and_after_its_pairs_are_known(store: Store) -> None:
    store.add_study(study())
    store.keep_setup("a" * 64, b"directory", None)
    assert (store.study("a" * 64).directory, store.study("a" * 64).pairs) == (b"directory", "")
    store.keep_setup("a" * 64, b"directory", [(2, 3), (1, 2)])
    assert store.study("a" * 64).pairs == "[[1, 2], [2, 3]]"


def test_who_has_erased_a_run_is_remembered_once(store: Store) -> None:
    store.add_study(study())
    for site in (3, 1, 3):
        store.closed_at("a" * 64, site)
    assert store.study("a" * 64).closed == "[1, 3]"


def test_a_revoked_site_leaves_the_roster_and_keeps_its_name(store: Store) -> None:
    store.add_site(site(1))
    store.add_site(site(2))
    name = store.sites()[0].name
    store.revoke_site(name, "2026-01-01T00:00Z", "its key was copied")
    assert [row.id for row in store.sites()] == [2]
    assert [(row.id, row.revoked) for row in store.sites(revoked=True)] == [
        (1, "2026-01-01T00:00Z its key was copied")
    ]
    assert store.next_site_id() == 3
    for unknown in (name, "Nobody"):
        with pytest.raises(RefusedError, match="no site named"):
            store.revoke_site(unknown, "2026-01-01T00:00Z", "again")
    with pytest.raises(RefusedError, match="admitted already"):
        store.add_site(site(1))


def test_a_large_model_comes_back_whole(store: Store) -> None:
    store.add_study(study())
    large = bytes(range(256)) * (PART_SIZE_BYTES // 100)
    for step, state in ((1, large), (2, large[:PART_SIZE_BYTES]), (3, b"x")):
        store.start_round("a" * 64)
        store.complete_round("a" * 64, replace(checkpoint(step, step), state=state))
        assert store.state("a" * 64) == state
    assert store.state("a" * 64, 1) == large


def test_listing_leaves_documents_on_disk(store: Store) -> None:
    store.add_study(study())
    store.start_round("a" * 64)
    store.complete_round("a" * 64, checkpoint(1, 1))
    assert "manifest" not in store.studies()[0].__dict__


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_model_is_a_clear_refusal(store: Store, number: int) -> None:
    store.add_study(study())
    with pytest.raises(RefusedError, match="no such completed round"):
        store.state("a" * 64, number)


def test_writers_see_what_they_change(store: Store) -> None:
    store.add_study(study("f" * 64))
    problems: list[BaseException] = []

    def write(letter: str) -> None:
        try:
            for number in range(10):
                store.set_decisions("f" * 64, {number: "approved"})
                store.add_study(study(f"{letter}{number:063d}"))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [row.number for row in store.studies()] == list(range(1, 22))


def test_an_end_is_never_overwritten_by_a_status_set_meanwhile(store: Store) -> None:
    for number in range(20):
        digest = f"{number:064d}"
        store.add_study(study(digest))
        barrier = threading.Barrier(2)

        def change(status: str, digest: str = digest, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            store.set_status(digest, status)

        threads = [threading.Thread(target=change, args=(status,)) for status in ("aborted", "running")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.study(digest).status == "aborted"


def test_nothing_but_the_declared_columns_is_stored(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "hub.db") as database:
        tables = {
            table: {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
    database.close()
    assert tables["rounds"] == {
        "study", "number", "step", "lost", "attempt", "cohort", "context", "sum_digest", "model_digest", "seconds",
    }  # fmt: skip
    assert tables["strategies"] == {"study", "state"}
    assert tables["heads"] == {"party", "size", "head", "cosigns"}
    assert tables["transcripts"] == {"study", "number", "data"}
    assert set(tables) == {"sites", "studies", "rounds", "models", "strategies", "heads", "transcripts"}
