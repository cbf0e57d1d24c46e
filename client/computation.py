"""The supervisor's handle on the worker: start, ask, kill.

Source: DESIGN "The agent is two processes". Rules: the worker gets no key, no ledger and no environment
but what it needs; it can be killed at any moment, from any thread, and its death ends that round's
computation only; it is started when a study needs it and ended when the study closes.
"""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from client.frames import passed_environment, read_frame, write_frame
from client.snapshot import local
from client.sources.source import DataSource
from common.errors import ContractError, FailureError, WardroundError
from common.study import Manifest

log = logging.getLogger("wardround.site.worker")

END_TIMEOUT_S: Final = 5.0

# prctl(2): a worker dies with the thread that started it, so that must be one which lasts.
_SPAWNER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawn")
_GREETED: Final = ThreadPoolExecutor(max_workers=16, thread_name_prefix="greet")


class Computation:
    """One worker process for one study. Thread-safe; one round is computed at a time.

    ``copies`` is the folder for the copy of a database's rows, which the worker cannot reach itself.

    Guarantee: worker_death_is_one_failure - a killed worker gives a FailureError, and the next round a
    fresh worker.
    """

    def __init__(self, manifest_bytes: bytes, source: DataSource, split_key: bytes, copies: Path) -> None:
        self._manifest_bytes = manifest_bytes
        self._source, self._copies = source, copies
        self._split_key = split_key
        # Patients to leave out of the next round.
        self.opted_out: Collection[str] = ()
        # This hospital's place among the study's members.
        self.member = 0
        self._turn = threading.Lock()
        # Held for moments only: which process there is, and for which round it computes.
        self._changing = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._greeting: Future[None] | None = None
        self._prepared: subprocess.Popen[bytes] | None = None
        self._proven: subprocess.Popen[bytes] | None = None
        self._round: threading.Event | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether ``end`` was called."""
        return self._ended

    @property
    def running(self) -> bool:
        """Whether there is a worker, ready or starting."""
        return self._process is not None and self._process.poll() is None

    def warm(self) -> None:
        """Begin to start a worker without waiting for it: imports take seconds, and no row is read yet."""
        with self._changing:
            if not self._ended:
                self._running()

    def started(self, timeout_s: float) -> bool:
        """Whether a worker is there that has imported all it needs, waiting for one that is starting."""
        self.warm()
        greeting = self._greeting
        return greeting is not None and bool(wait([greeting], timeout_s).done) and not greeting.exception()

    def compute(
        self, state: bytes, dim: int, timeout_s: float, cut: threading.Event | None = None
    ) -> NDArray[np.int64]:
        """The integers of one round's release, int64 [dim]. ``state`` is a safetensors file.

        ``cut`` is this round's and set when the round must not be computed any more: see ``stop``.

        Guarantee: an_overrun_is_killed - a worker that takes longer than ``timeout_s`` is a dead one.
        Raises: FailureError, ContractError.
        """
        cut = cut or threading.Event()
        overrun = threading.Event()
        timer = threading.Timer(timeout_s, self._kill_overrun, (cut, overrun))
        timer.start()
        try:
            with self._turn:
                try:
                    process = self._loaded(cut, overrun)
                    if cut.is_set() or overrun.is_set():
                        raise FailureError("worker.cut", "the round was over before its rows were loaded")
                    header = {"op": "compute", "opted_out": sorted(self.opted_out), "member": self.member}
                    result = self._ask(process, header, state)
                    self._proven = process
                finally:
                    self._round = None
        finally:
            timer.cancel()
        if len(result) != 8 * dim:
            raise FailureError("worker.result", "the worker's result has another length than the model")
        return np.frombuffer(result, dtype="<i8").astype(np.int64)

    def _kill_overrun(self, cut: threading.Event, overrun: threading.Event) -> None:
        overrun.set()
        with self._changing:
            process = self._process if self._round is cut else None
        self._drop(process)

    def stop(self, cut: threading.Event) -> None:
        """Set ``cut`` and kill the worker that computes for it; the next round gets a fresh one.

        One still starting, loading rows or computing for the first time goes on with that, for the
        next round: else a slow starter would be started anew for ever.

        Guarantee: a_cut_round_is_not_computed - whether its worker is running, starting or not there yet.
        """
        cut.set()
        with self._changing:
            process = self._process if self._round is cut else None
            if process is not self._proven:
                process = None
        self._drop(process)

    def end(self) -> None:
        """Kill the worker for good.

        Guarantee: an_ended_computation_starts_no_worker - whatever another thread is just about to do.
        """
        with self._changing:
            self._ended = True
            process = self._process
        self._drop(process)

    def _loaded(self, cut: threading.Event, overrun: threading.Event) -> "subprocess.Popen[bytes]":
        """The worker, with the rows loaded."""
        with self._changing:
            # Whoever sets these kills the worker afterwards: one that is there now is seen by them.
            if self._ended or cut.is_set():
                raise FailureError("worker.ended", "the round was stopped before its computation began")
            self._round = cut
            process = self._running()
        if process is not self._prepared:
            try:
                if self._greeting is not None:
                    self._greeting.result()
                self._prepare(process, lambda: overrun.is_set() or self._ended)
            except BaseException:
                # It has greeted already: only a fresh one can be started again.
                self._drop(process)
                raise
            self._prepared = process
        return process

    def _prepare(self, process: "subprocess.Popen[bytes]", stopped: Callable[[], bool]) -> None:
        contract = Manifest.from_bytes(self._manifest_bytes).study.contract
        with local(self._source, contract, self._copies, stopped=stopped) as source:
            self._ask(process, self.header(source), self._manifest_bytes)

    def header(self, source: DataSource) -> dict[str, Any]:
        """What asks a worker to load the rows of ``source``."""
        described = source.model_dump(mode="json")
        return {"op": "prepare", "source": described, "split_key": self._split_key.hex()}

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            _finish(self._process)
            self._process = _SPAWNER.submit(_spawn).result()
            self._greeting = _GREETED.submit(_greet, self._process)
        return self._process

    def _ask(self, process: "subprocess.Popen[bytes]", header: dict[str, Any], blob: bytes) -> bytes:
        try:
            write_frame(_pipe(process.stdin), header, blob)
            frame = read_frame(_pipe(process.stdout))
        except (OSError, ValueError, WardroundError):
            frame = None
        if frame is None:
            self._drop(process)
            raise FailureError("worker.died", "the worker process died")
        reply, result = frame
        if reply.get("status") != "ok":
            code = str(reply.get("code", "worker.failed"))
            at = reply.get("at", [])
            places = ", ".join(map(str, at)) if isinstance(at, list) else ""
            kind = ContractError if code.startswith(("contract.", "source.")) else FailureError
            raise kind(code, f"the worker could not do it ({code}{': ' + places if places else ''})")
        return result

    def _drop(self, process: "subprocess.Popen[bytes] | None") -> None:
        with self._changing:
            if process is self._process:
                self._process = None
        _finish(process)


def _spawn() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "client.isolation"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=passed_environment(),
        cwd="/",
    )


def _greet(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a worker's first frame. Raises FailureError."""
    try:
        frame = read_frame(_pipe(process.stdout))
    except (OSError, ValueError, WardroundError):
        frame = None
    if frame is None:
        remedy = "Check the installation, unless it was stopped."
        raise FailureError("worker.start", "the worker process did not start", remedy=remedy)
    log.info("worker %d started, network: %s", process.pid, frame[0].get("network"))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise FailureError("worker.pipe", "the worker has no pipe")
    return stream


def _finish(process: "subprocess.Popen[bytes] | None") -> None:
    """Kill a process, wait for it and close its pipes; again changes nothing."""
    if process is None:
        return
    process.kill()
    try:
        process.wait(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        log.error("worker %d was killed and has not ended", process.pid)
        return
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                log.debug("the worker's pipe was closed by its end")
