"""The site's folder: closed to others, one live agent, writes that are whole and durable."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from client.state import RunFile, SiteHome, write_durable
from common.errors import RefusedError, UsageError, VerificationError

MAN = bytes(range(32))
SECRET = bytes(range(200, 256)) * 30

SAVE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from client.state import RunFile
runs = RunFile(Path(sys.argv[1]))
for number in range(5):
    runs.save(b"m" * 32, b"state %d" % number)
os.kill(os.getpid(), signal.SIGKILL)
"""
HOLD = """
import sys
import threading
from pathlib import Path
from client.state import SiteHome
with SiteHome(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_run_state_is_durable(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    done = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(path)], timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    runs = RunFile(path)
    assert runs.load(b"m" * 32) == b"state 4"
    runs.close()


def test_runs_are_kept_apart_and_replaced_whole(tmp_path: Path) -> None:
    runs = RunFile(tmp_path / "run" / "runs.db")
    assert runs.runs() == ()
    assert runs.load(MAN) is None
    other = bytes(32)
    for state in (b"first", b"second"):
        runs.save(MAN, state)
        runs.save(other, state + b" of the other")
    assert (runs.load(MAN), runs.load(other)) == (b"second", b"second of the other")
    assert runs.runs() == (other, MAN)
    runs.close()
    again = RunFile(tmp_path / "run" / "runs.db")
    assert again.load(MAN) == b"second"
    again.close()


def test_replaced_secrets_leave_the_file_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs = RunFile(folder / "runs.db")
    runs.save(MAN, SECRET)
    assert SECRET in (folder / "runs.db").read_bytes()
    runs.save(MAN, b"closed")
    assert not any(SECRET[:64] in path.read_bytes() for path in folder.iterdir())
    assert all(mode(path) & 0o077 == 0 for path in (folder, *folder.iterdir()))
    runs.close()


def test_a_damaged_run_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(VerificationError) as caught:
        RunFile(path)
    assert str(path) in caught.value.problem
    assert "remove" in caught.value.remedy


def test_a_failed_save_changes_nothing(tmp_path: Path) -> None:
    runs = RunFile(tmp_path / "runs.db")
    runs.save(MAN, b"good")
    with pytest.raises(sqlite3.IntegrityError):
        runs.save(MAN, "text is no state")  # type: ignore[arg-type]
    assert runs.load(MAN) == b"good"
    runs.close()


def test_several_threads_share_a_run_file(tmp_path: Path) -> None:
    runs = RunFile(tmp_path / "runs.db")
    problems: list[BaseException] = []

    def work(number: int) -> None:
        man = bytes([number]) * 32
        try:
            for step in range(10):
                runs.save(man, b"%d/%d" % (number, step))
                assert runs.load(man) == b"%d/%d" % (number, step)
                assert man in runs.runs()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs.close()
    assert problems == []


def test_folders_are_made_once_and_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir(mode=0o755)
    home = SiteHome(tmp_path / "site")
    home.create_folders()
    folders = [home.folder, home.runs.parent, home.ledger_key.parent, home.study("0").parent]
    assert [mode(folder) for folder in folders] == [0o700] * 4
    home.settings.write_text("")
    with pytest.raises(UsageError) as caught:
        home.create_folders()
    assert caught.value.code == "site.exists"


def test_every_path_is_inside_the_folder_and_secrets_of_runs_are_apart(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    paths = [path for name, path in vars(home).items() if name != "folder"] + [home.study("ab" * 32)]
    assert len(set(paths)) == len(paths) == 15
    assert all(tmp_path in path.parents for path in paths)
    assert not any(
        path.parent == home.runs.parent
        for path in paths
        if path not in (home.runs, home.ledger_mark, home.copies)
    )


def test_one_agent_lives_on_a_folder(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    home.create_folders()
    with home.locked(), pytest.raises(RefusedError) as caught, home.locked():
        pytest.fail("two agents on one state")
    assert caught.value.code == "site.locked"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RefusedError), home.locked():
            pytest.fail("two agents on one state")
    finally:
        process.kill()
        process.communicate(timeout=10)
    # The lock dies with its process, however that ended.
    with home.locked():
        assert mode(home.runs.parent / "lock") == 0o600


def test_a_folder_restored_without_its_run_folder_can_be_locked(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    with home.locked():
        assert mode(home.runs.parent) == 0o700


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"first, and longer", b"second"):
        write_durable(path, data)
        assert path.read_bytes() == data
    write_durable(tmp_path / "public", b"x", 0o644)
    assert (mode(path), mode(tmp_path / "public") & 0o600) == (0o600, 0o600)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "public"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_durable(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                write_durable(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
