"""Commands as subprocesses: one that works, one that fails, and the end of all that were started."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import FailureError
from server import processes
from server.processes import Processes, free_port


def script(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the command be a small program instead of wardround."""
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", text))


def test_a_free_port_can_be_taken() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_a_command_gives_its_data(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as running:
        home = str(tmp_path / "hub")
        data = running.json("hub", "init", "--home", home, "--address", "localhost:8443")
        assert data["hub_key"].startswith("ed25519:")
        with pytest.raises(
            FailureError, match=r"'wardround hub init' ended with 2: error: .* holds a hub already"
        ):
            running.json("hub", "init", "--home", home, "--address", "localhost:8443")


def test_a_command_that_hangs_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "import time; time.sleep(30)")
    monkeypatch.setattr(processes, "COMMAND_TIMEOUT_S", 0.3)
    with Processes(tmp_path) as running, pytest.raises(FailureError, match="'wardround a b' gave no end"):
        running.json("a", "b")


def test_lines_come_one_by_one_and_errors_go_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "import sys; print('one'); print('two words'); print('trouble', file=sys.stderr)")
    with Processes(tmp_path / "logs") as running:
        started = running.start("talker")
        assert started.wait_for_line("two", 10) == "two words"
        assert list(started.lines(10)) == []
        with pytest.raises(FailureError, match="gave no end in 0 s"):
            list(started.lines(0.05))
        second = running.start("talker")
        with pytest.raises(FailureError, match="talker ended before it was ready"):
            second.wait_for_line("three", 10)
        assert second.end() == 0
    assert (tmp_path / "logs" / "talker.log").read_text() == "trouble\ntrouble\n"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_everything_started_is_ended_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "import time; print('up', flush=True); time.sleep(60)")
    pids: list[int] = []

    def block() -> None:
        with Processes(tmp_path) as running:
            for name in ("a", "b"):
                started = running.start(name)
                started.wait_for_line("up", 10)
                pids.append(started.process.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_a_process_that_ignores_the_request_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(
        monkeypatch,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('up', flush=True); time.sleep(60)",
    )
    monkeypatch.setattr(processes, "END_GRACE_S", 0.3)
    with Processes(tmp_path) as running:
        started = running.start("stubborn")
        started.wait_for_line("up", 10)
        began = time.monotonic()
        assert started.end() == -signal.SIGKILL
        assert time.monotonic() - began < 5


def test_a_command_that_is_just_being_started_is_ended_by_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    script(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path) as running:
        running.json("study", "list")
    (process,) = started
    assert not alive(process.pid)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
