"""The supervisor's handle on the worker: start, ask, kill.

Source: DESIGN "The agent is two processes". Rules: the worker gets no key, no ledger and no environment
but what it needs; it can be killed at any moment and its death ends that round's computation only; it is
started when a study needs it and ended when the study closes.
"""

import logging
import os
import subprocess
import sys
import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client.frames import read_frame, write_frame
from client.settings import DataSource
from common.errors import ContractError, FailureError, WardroundError

log = logging.getLogger("wardround.site.worker")

PASSED_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "WARDROUND_THREADS")
END_TIMEOUT_S: Final = 5.0


class Computation:
    """One worker process for one study.

    Guarantee: worker_death_is_one_failure - a killed worker gives a FailureError, and the next round a
    fresh worker.
    """

    def __init__(self, manifest_bytes: bytes, source: DataSource, split_key: bytes) -> None:
        self._manifest_bytes = manifest_bytes
        self._header = {
            "op": "prepare",
            "kind": source.kind,
            "path": str(source.path.resolve()),
            "split_key": split_key.hex(),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared = False
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Begin to start a worker without waiting for it: imports take seconds, and no row is read yet."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._spawn()
                self._prepared = False

    def start(self) -> None:
        """Have a worker with the rows loaded. Raises ContractError or FailureError."""
        self.warm()
        with self._lock:
            if self._prepared:
                return
            try:
                self._greet()
                self._ask(self._header, self._manifest_bytes)
            except BaseException:
                # It has greeted already: only a fresh one can be started again.
                self.end()
                raise
            self._prepared = True

    def _spawn(self) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "client.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
        )

    def _greet(self) -> None:
        process = self._process
        frame = read_frame(process.stdout) if process is not None and process.stdout else None
        if process is None or frame is None:
            raise FailureError(
                "worker.start", "the worker process did not start", remedy="Check the installation."
            )
        log.info("worker %d started, network: %s", process.pid, frame[0].get("network"))

    def _ask(self, header: dict[str, Any], blob: bytes) -> bytes:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise FailureError("worker.ended", "there is no worker")
        try:
            write_frame(process.stdin, header, blob)
            frame = read_frame(process.stdout)
        except (OSError, ValueError, WardroundError) as error:
            self.end()
            raise FailureError("worker.died", "the worker process died") from error
        if frame is None:
            self.end()
            raise FailureError("worker.died", "the worker process died")
        reply, result = frame
        if reply.get("status") != "ok":
            code = str(reply.get("code", "worker.failed"))
            places = ", ".join(reply.get("at", []))
            kind = ContractError if code.startswith(("contract.", "source.")) else FailureError
            raise kind(code, f"the worker could not do it ({code}{': ' + places if places else ''})")
        return result

    def compute(self, state: bytes, dim: int, timeout_s: float) -> NDArray[np.int64]:
        """The integers of one round's release, int64 [dim]. ``state`` is a safetensors file.

        Guarantee: an_overrun_is_killed - a worker that takes longer than ``timeout_s`` is a dead one.
        """
        overrun = threading.Event()

        def stop() -> None:
            overrun.set()
            self._kill()

        timer = threading.Timer(timeout_s, stop)
        timer.start()
        try:
            self.start()
            if overrun.is_set():
                # The time was over before there was a process to kill.
                self.end()
                raise FailureError("worker.died", "the round's time was over before the worker was ready")
            with self._lock:
                result = self._ask({"op": "compute"}, state)
        finally:
            timer.cancel()
        if len(result) != 8 * dim:
            raise FailureError("worker.result", "the worker's result has another length than the model")
        return np.frombuffer(result, dtype="<i8").astype(np.int64)

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> None:
        """Kill the worker. Safe at any moment, from any thread."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=END_TIMEOUT_S)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        log.debug("the worker's pipe was closed by its end")
