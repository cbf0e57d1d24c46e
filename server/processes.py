"""Real commands as subprocesses: run one, start one that stays, end everything that was started.

Rules: every process gets its own log; ending means SIGTERM, then SIGKILL after a grace, by pid, for what was
started here and nothing else; a failing command becomes one clear error with its own message.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Self

from common.errors import FailureError

COMMAND_TIMEOUT_S: Final = 120.0
END_GRACE_S: Final = 5.0
COMMAND: Final = (sys.executable, "-P", "-m", "wardround")


def free_port() -> int:
    """A port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: a process that was started must be written down before we may be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def _begin(arguments: Sequence[str], errors: int | IO[bytes]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


class Running:
    """A started command whose standard output is read line by line."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self.process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = self.process.stdout
        if stream is not None:
            for line in stream:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def lines(self, timeout_s: float) -> Iterator[str]:
        """Lines until the process closes its output. Raises FailureError after ``timeout_s`` in all."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                problem = f"{self.name} gave no end in {timeout_s:.0f} s"
                raise FailureError("process.timeout", problem) from None
            if line is None:
                return
            yield line

    def wait_for_line(self, text: str, timeout_s: float) -> str:
        """The first line that holds ``text``. Raises FailureError when the process ends before."""
        for line in self.lines(timeout_s):
            if text in line:
                return line
        raise FailureError("process.ended", f"{self.name} ended before it was ready", remedy="Read its log.")

    def end(self) -> int:
        """Terminate, then kill after a grace; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait(END_GRACE_S)
        self._reader.join(END_GRACE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


class Processes:
    """All commands of one demo. As a context manager it ends what it started, whatever happened."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[Running] = []
        self._asked: set[subprocess.Popen[str]] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _uninterrupted():
            for process in list(self._asked):
                process.kill()
                process.wait(END_GRACE_S)
            for running in self._running:
                if running.process.poll() is None:
                    running.process.terminate()
            for running in reversed(self._running):
                running.end()

    def start(self, name: str, *arguments: str) -> Running:
        """Start a command that stays; its standard error goes to ``logs/NAME.log``."""
        with _uninterrupted(), (self._logs / f"{name}.log").open("ab") as log:
            running = Running(name, _begin(arguments, log))
            self._running.append(running)
        return running

    def json(self, *arguments: str) -> dict[str, Any]:
        """Run a command with ``--json`` and give its data. Raises FailureError with its message."""
        name = f"'wardround {' '.join(arguments[:2])}'"
        with _uninterrupted():
            # Interrupted inside of Popen, the command would run on with nobody to end it.
            process = _begin([*arguments, "--json"], subprocess.PIPE)
            self._asked.add(process)
        with process:
            try:
                output, problem = process.communicate(timeout=COMMAND_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                problem = f"{name} gave no end in {COMMAND_TIMEOUT_S:.0f} s"
                raise FailureError("process.timeout", problem) from error
            finally:
                process.kill()
                self._asked.discard(process)
        if process.returncode != 0:
            raise FailureError("process.failed", f"{name} ended with {process.returncode}: {problem.strip()}")
        data: dict[str, Any] = json.loads(output)["data"]
        return data
