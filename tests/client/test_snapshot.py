"""Copies of databases: made by another process, for this account alone, and gone afterwards."""

import os
import signal
import sqlite3
import stat
import threading
import time
from pathlib import Path

import duckdb
import pytest

from client import snapshot
from client.frames import PASSED_ENVIRONMENT
from client.reader import answer
from client.snapshot import local, sweep
from client.sources.source import DataSource
from common.contract import Category, Contract, Label
from common.encoding import canonical_json
from common.errors import ContractError, FailureError

CONTRACT = Contract(
    patient="pid",
    features=(Category(kind="category", name="sex", codes=("m", "w")),),
    label=Label(name="died", classes=("0", "1")),
)


def database(folder: Path, rows: int = 3) -> DataSource:
    file = folder / "a.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE t (pid TEXT, sex TEXT, died INTEGER, note TEXT)")
        cells = ((f"p{i}", "m", i % 2, "kept at home") for i in range(rows))
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", cells)
    connection.close()
    return DataSource(source=f"sql:sqlite:///{file}", patient="pid", table="t", columns=["sex", "died"])


def test_a_file_is_its_own_copy(tmp_path: Path) -> None:
    source = DataSource(source=f"csv:{tmp_path}/a.csv", patient="pid")
    with local(source, CONTRACT, tmp_path / "copies") as found:
        assert found is source
    assert not (tmp_path / "copies").exists()


def test_a_copy_holds_what_the_contract_reads_for_this_account_alone(tmp_path: Path) -> None:
    with local(database(tmp_path), CONTRACT, tmp_path / "run" / "copies") as copy:
        with duckdb.connect(":memory:") as connection:
            found = connection.execute(f"FROM '{copy.path}'")
            assert [column[0] for column in found.description or []] == ["pid", "sex", "died"]
            assert len(found.fetchall()) == 3
        assert stat.S_IMODE(copy.path.stat().st_mode) == 0o600
        for folder in (copy.path.parent, copy.path.parent.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list((tmp_path / "run" / "copies").iterdir()) == []


def test_copies_do_not_stay(tmp_path: Path) -> None:
    source, copies = database(tmp_path), tmp_path / "copies"
    with pytest.raises(KeyError), local(source, CONTRACT, copies):
        raise KeyError
    assert list(copies.iterdir()) == []
    missing = source.model_copy(update={"table": "absent"})
    with pytest.raises(ContractError) as caught, local(missing, CONTRACT, copies):
        pass
    assert caught.value.code == "source.table"
    assert "policy.toml" in (caught.value.remedy or "")
    assert list(copies.iterdir()) == []
    (copies / "left").mkdir()
    (copies / "left" / "copy.parquet").write_text("rows")
    sweep(copies)
    sweep(copies)
    assert not copies.exists()


def test_a_reader_that_must_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = tmp_path / "copies"
    for stopped, limit_s in ((lambda: True, 60.0), (lambda: False, 0.0)):
        monkeypatch.setattr(snapshot, "TIMEOUT_S", limit_s)
        began = time.monotonic()
        with (
            pytest.raises(FailureError) as caught,
            local(database(tmp_path), CONTRACT, copies, stopped=stopped),
        ):
            pass
        assert caught.value.code == "source.stopped"
        assert time.monotonic() - began < 10
        assert list(copies.iterdir()) == []
        (tmp_path / "a.db").unlink()


def test_a_reader_that_dies_is_a_failure_and_has_neither_keys_nor_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARDROUND_TEST_SECRET", "must not be passed on")
    seen: list[set[str]] = []

    def kill() -> None:
        for _ in range(500):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if b"client.reader" in (folder / "cmdline").read_bytes():
                        parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                        if int(parent) != os.getpid():
                            continue
                        pairs = (folder / "environ").read_bytes().split(b"\0")
                        seen.append({pair.partition(b"=")[0].decode() for pair in pairs if pair})
                        os.kill(int(folder.name), signal.SIGKILL)
                        return
                except OSError:
                    continue
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(FailureError) as caught, local(database(tmp_path, 10), CONTRACT, tmp_path / "copies"):
        pass
    thread.join()
    assert caught.value.code == "source.reader"
    assert seen[0] <= set(PASSED_ENVIRONMENT)
    assert list((tmp_path / "copies").iterdir()) == []


def test_an_answer_holds_no_value_of_a_record(tmp_path: Path) -> None:
    blob = canonical_json(CONTRACT.model_dump(mode="json"))
    assert answer({}, b"{}")["status"] == "failure"
    said = answer({"out": str(tmp_path / "absent" / "a.parquet")}, blob)
    assert (said["status"], said["code"]) == ("failure", "source.reader")
    assert said["problem"] == "the reader ended with KeyError"
