"""The supervisor's handle on real worker processes: one answer each, one failure a death."""

import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from client.computation import Computation
from client.frames import PASSED_ENVIRONMENT
from client.sources.source import DataSource
from common.admissible import check
from common.errors import ContractError, FailureError
from common.study import Manifest
from common.tasks.models import initial_state
from common.tasks.state import state_bytes
from tests.client.federation import Federation
from tests.federation import extract_rows

SECRET = "WARDROUND_TEST_SECRET"
TIMEOUT_S = 30.0


@dataclass
class Running:
    """A computation with its study's first state."""

    computation: Computation
    extract: Path
    state: bytes
    dim: int
    manifest: Manifest

    def compute(self, timeout_s: float = TIMEOUT_S) -> int:
        """One round; how many integers came."""
        return len(self.computation.compute(self.state, self.dim, timeout_s))

    @property
    def pid(self) -> int:
        process = self.computation._process
        assert process is not None
        return process.pid


def computation_of(manifest: Manifest, extract: Path) -> Computation:
    source = DataSource(source=f"csv:{extract}", patient="patient")
    return Computation(manifest.to_bytes(), source, bytes(32), extract.parent)


def kill(computation: Computation) -> None:
    """Kill the worker, if there is one, as a fault would."""
    if computation._process is not None:
        computation._process.kill()
        computation._process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def running(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    federation = Federation(template, tmp_path_factory.mktemp("computation"))
    manifest = federation.manifest()
    admitted = check(manifest, None)
    extract = federation.sites[1].folder / "extract.csv"
    os.environ[SECRET] = "must not be passed on"
    computation = computation_of(manifest, extract)
    state = state_bytes(initial_state(manifest), admitted.layout)
    yield Running(computation, extract, state, admitted.dim, manifest)
    computation.end()
    del os.environ[SECRET]


def test_one_worker_serves_many_rounds_without_keys_or_environment(running: Running) -> None:
    assert running.compute() == running.dim
    pid = running.pid
    results = [running.computation.compute(running.state, running.dim, TIMEOUT_S) for _ in range(2)]
    assert running.pid == pid
    assert all(result.dtype == np.int64 for result in results)
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    names = {entry.partition(b"=")[0].decode() for entry in environment if entry}
    assert names <= set(PASSED_ENVIRONMENT)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    # Three pipes or null, and files of libraries; no ledger, no key, no socket.
    opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert not any(name.startswith("socket:") or "ledger" in name or "/keys/" in name for name in opened)


def test_a_state_that_is_refused_leaves_the_worker_alive(running: Running) -> None:
    running.compute()
    pid = running.pid
    with pytest.raises(FailureError) as caught:
        running.computation.compute(b"garbage", running.dim, TIMEOUT_S)
    assert caught.value.code == "state.format"
    with pytest.raises(FailureError) as caught:
        running.computation.compute(running.state, running.dim + 1, TIMEOUT_S)
    assert caught.value.code == "worker.result"
    running.compute()
    assert running.pid == pid


def test_worker_death_is_one_failure(running: Running) -> None:
    running.compute()
    pid = running.pid
    os.kill(pid, signal.SIGSTOP)
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            running.compute()
        except FailureError as error:
            problems.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    thread.join(TIMEOUT_S)
    (problem,) = problems
    assert isinstance(problem, FailureError)
    assert problem.code == "worker.died"
    # The very next round has a fresh worker, and the dead one is no zombie.
    assert not Path(f"/proc/{pid}").exists()
    assert running.compute() == running.dim
    assert running.pid != pid


def test_an_overrun_is_killed(running: Running) -> None:
    running.compute()
    pid = running.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(FailureError) as caught:
        running.compute(timeout_s=0.2)
    assert caught.value.code == "worker.died"
    assert 0.2 <= time.monotonic() - began < 5
    assert not Path(f"/proc/{pid}").exists()


def test_a_time_that_is_over_at_once_gives_no_result(running: Running) -> None:
    kill(running.computation)
    with pytest.raises(FailureError):
        running.compute(timeout_s=0.0)
    running.compute()


def test_a_failed_start_is_mended_by_mending_the_file(running: Running) -> None:
    kill(running.computation)
    aside = running.extract.with_suffix(".aside")
    running.extract.rename(aside)
    try:
        with pytest.raises(ContractError) as caught:
            running.compute()
        assert caught.value.code == "source.unreadable"
    finally:
        aside.rename(running.extract)
    assert running.compute() == running.dim


def problem_of(action: Callable[[], object]) -> str:
    with pytest.raises(FailureError) as caught:
        action()
    return caught.value.code


def test_a_cut_round_is_not_computed(running: Running) -> None:
    computation = running.computation
    running.compute()
    pid = running.pid
    # Cut before it began: no worker is touched.
    cut = threading.Event()
    computation.stop(cut)
    assert (
        problem_of(lambda: computation.compute(running.state, running.dim, TIMEOUT_S, cut)) == "worker.ended"
    )
    # Another round's cut is not this one's business.
    computation.stop(threading.Event())
    assert (running.compute(), running.pid) == (running.dim, pid)
    # Cut while it computes: killed, and the next one has a fresh worker.
    os.kill(pid, signal.SIGSTOP)
    cut, codes = threading.Event(), list[str]()
    thread = threading.Thread(
        target=lambda: codes.append(
            problem_of(lambda: computation.compute(running.state, running.dim, TIMEOUT_S, cut))
        )
    )
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    computation.stop(cut)
    thread.join(TIMEOUT_S)
    assert time.monotonic() - began < 1
    assert codes == ["worker.died"]
    assert not Path(f"/proc/{pid}").exists()
    assert running.compute() == running.dim


def test_a_worker_outlives_the_thread_that_asked_for_it(running: Running) -> None:
    computation = computation_of(running.manifest, running.extract)
    try:
        thread = threading.Thread(target=computation.compute, args=(running.state, running.dim, TIMEOUT_S))
        thread.start()
        thread.join(TIMEOUT_S)
        process = computation._process
        assert process is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        assert len(computation.compute(running.state, running.dim, TIMEOUT_S)) == running.dim
        assert computation._process is process
    finally:
        computation.end()


@pytest.mark.parametrize("pause_s", [0.0, 0.001, 0.01, 0.1])
def test_an_ended_computation_starts_no_worker(running: Running, pause_s: float) -> None:
    """Ended from several threads at once, while others begin: nothing is left running, nothing begins again."""
    computation = computation_of(running.manifest, running.extract)
    codes: list[str] = []

    def ask() -> None:
        try:
            computation.warm()
            computation.compute(running.state, running.dim, TIMEOUT_S)
        except FailureError as error:
            codes.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    enders = [threading.Thread(target=computation.end) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(pause_s)
    process = computation._process
    for thread in enders:
        thread.start()
    for thread in (*threads, *enders):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert len(codes) == 2
    assert set(codes) <= {"worker.ended", "worker.died", "worker.start"}
    assert computation.ended
    assert computation._process is None
    assert process is None or process.poll() is not None
    computation.warm()
    computation.end()
    assert computation._process is None


def test_an_installation_that_cannot_start_is_a_clear_error(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(running.computation)
    monkeypatch.setattr("client.computation.sys.executable", "/bin/false")
    with pytest.raises(FailureError) as caught:
        running.compute()
    assert caught.value.code == "worker.start"
    assert running.computation._process is None


def test_the_rows_of_a_database_reach_the_worker_as_a_copy_that_is_gone(
    running: Running, tmp_path: Path
) -> None:
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE t (patient TEXT, age REAL, bmi REAL, readmitted TEXT)")
        database.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", extract_rows(1))
    database.close()
    address, copies = f"sql:sqlite:///{tmp_path}/a.db", tmp_path / "copies"
    source = DataSource(source=address, patient="patient", table="t", columns=["age", "bmi", "readmitted"])
    computation = Computation(running.manifest.to_bytes(), source, bytes(32), copies)
    try:
        for _ in range(2):
            assert len(computation.compute(running.state, running.dim, TIMEOUT_S)) == running.dim
            assert list(copies.iterdir()) == []
        # It is read once a worker; a new worker of a database that is gone has nothing to compute on.
        kill(computation)
        (tmp_path / "a.db").unlink()
        with pytest.raises(ContractError) as caught:
            computation.compute(running.state, running.dim, TIMEOUT_S)
        assert caught.value.code == "source.unreadable"
        assert list(copies.iterdir()) == []
    finally:
        computation.end()
