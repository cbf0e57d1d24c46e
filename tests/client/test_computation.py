"""The supervisor's handle on real worker processes: one answer each, one failure a death."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from client.computation import PASSED_ENVIRONMENT, Computation
from client.settings import DataSource
from common.admissible import check
from common.errors import ContractError, FailureError
from common.tasks.models import initial_state
from common.tasks.state import state_bytes
from tests.client.federation import Federation

SECRET = "WARDROUND_TEST_SECRET"
TIMEOUT_S = 30.0


@dataclass
class Running:
    """A computation with its study's first state."""

    computation: Computation
    extract: Path
    state: bytes
    dim: int

    def compute(self, timeout_s: float = TIMEOUT_S) -> int:
        """One round; how many integers came."""
        return len(self.computation.compute(self.state, self.dim, timeout_s))

    @property
    def pid(self) -> int:
        process = self.computation._process
        assert process is not None
        return process.pid


@pytest.fixture(scope="module")
def running(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    federation = Federation(template, tmp_path_factory.mktemp("computation"))
    manifest = federation.manifest()
    admitted = check(manifest, None)
    extract = federation.sites[1].folder / "extract.csv"
    os.environ[SECRET] = "must not be passed on"
    computation = Computation(
        manifest.to_bytes(), DataSource(source=f"csv:{extract}", patient="patient"), bytes(32)
    )
    state = state_bytes(initial_state(manifest), admitted.layout)
    yield Running(computation, extract, state, admitted.dim)
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
    running.computation.end()
    with pytest.raises(FailureError):
        running.compute(timeout_s=0.0)
    running.compute()


def test_a_failed_start_is_mended_by_mending_the_file(running: Running) -> None:
    running.computation.end()
    aside = running.extract.with_suffix(".aside")
    running.extract.rename(aside)
    try:
        with pytest.raises(ContractError) as caught:
            running.compute()
        assert caught.value.code == "source.unreadable"
    finally:
        aside.rename(running.extract)
    assert running.compute() == running.dim


def test_ending_is_safe_twice_and_from_another_thread(running: Running) -> None:
    running.computation.warm()
    threads = [threading.Thread(target=running.computation.end) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    running.computation.end()
    assert running.computation._process is None


def test_an_installation_that_cannot_start_is_a_clear_error(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.computation.end()
    monkeypatch.setattr("client.computation.sys.executable", "/bin/false")
    with pytest.raises(FailureError) as caught:
        running.compute()
    assert caught.value.code == "worker.start"
    assert running.computation._process is None
