"""The worker process: rows, torch and Opacus, without network, keys or ledger.

Source: DESIGN "The agent is two processes". Rules: it speaks to its supervisor through two pipes only; it
dies with its supervisor; sockets and new processes are refused after start, and the kernel's network is
taken away where it allows that; no core dump; an error leaves as a fixed code, its text stays here.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from types import FrameType
from typing import IO, Any

import numpy as np

from client.frames import read_frame, write_frame
from client.isolation import refuse_sockets_and_processes
from client.sources.extract import load_table
from client.sources.source import DataSource
from client.sources.table import Table
from common.admissible import Admitted, check
from common.errors import FailureError, WardroundError
from common.study import Manifest


class Worker:
    """One study's rows, loaded once, and the rounds computed on them.

    ``entropy`` is the OS generator in the product: coins, noise and dither come from it.
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy
        self._manifest: Manifest | None = None
        self._admitted: Admitted | None = None
        self._table: Table | None = None
        self._held: Table | None = None

    def prepare(self, header: dict[str, Any], manifest_bytes: bytes) -> None:
        """Load the training rows of the study's source. Raises ContractError naming file, column, rule."""
        manifest = Manifest.from_bytes(manifest_bytes)
        self._admitted = check(manifest, None)
        source = DataSource.model_validate(header["source"])
        key = bytes.fromhex(str(header["split_key"]))
        self._table = load_table(source, manifest.study.contract, key=key, part="train")
        if manifest.study.evaluation is not None:
            self._held = load_table(source, manifest.study.contract, key=key, part="holdout")
        self._manifest = manifest

    def compute(self, state_bytes: bytes, opted_out: Collection[str] = (), member: int = 0) -> bytes:
        """One round without the patients ``opted_out``: from the model to a Release, int64 little-endian.

        ``member`` is this hospital's place among the study's members.
        """
        from common.tasks.holdout import HeldOut
        from common.tasks.state import load_state
        from common.tasks.training import contribute, train_local

        if self._manifest is None or self._admitted is None or self._table is None:
            raise FailureError("worker.order", "the worker was asked to compute before it was prepared")
        study, admitted = self._manifest.study, self._admitted
        state = load_state(state_bytes, admitted.layout, study.aggregation.state_norm_bound)
        table = self._table.without(opted_out) if opted_out else self._table
        rows = table.x, table.y, table.patient_index
        held = None
        if self._held is not None:
            there = self._held.without(opted_out) if opted_out else self._held
            held = HeldOut(there.x, there.y, there.patient_index, there.patients, member)
        if admitted.shared:
            release = contribute(state, *rows, study, admitted.shared_gate(self._entropy), held)
        else:
            gate = admitted.gate(self._entropy)
            delta = train_local(state, *rows, study, gate, lambda _done, _steps: None, held, member)
            release = gate.finish(delta, admitted.quantiser(self._entropy))
        return release.q.astype("<i8").tobytes()


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer frames until the supervisor closes its end."""
    worker = Worker()
    while (frame := read_frame(requests)) is not None:
        header, blob = frame
        try:
            if header.get("op") == "prepare":
                worker.prepare(header, blob)
                write_frame(replies, {"status": "ok"})
            elif header.get("op") == "compute":
                write_frame(
                    replies,
                    {"status": "ok"},
                    worker.compute(blob, header.get("opted_out", ()), int(header.get("member", 0))),
                )
            else:
                raise FailureError("worker.op", "the supervisor asked for something the worker does not do")
        except WardroundError as error:
            write_frame(replies, {"status": "failed", "code": error.code})
        except Exception as error:
            # Only types and places: the text of an exception may quote a row.
            places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            write_frame(
                replies, {"status": "failed", "code": f"worker.{type(error).__name__}", "at": places[-3:]}
            )


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C reaches the whole process group; the supervisor decides when the worker ends."""


def main(without_network: bool) -> None:
    """Import what training needs, refuse sockets and processes from then on, serve the two pipes."""
    signal.signal(signal.SIGINT, _ignore)
    # Standard output is the pipe; a library that prints must not break the frames.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    import common.tasks.training  # noqa: F401 - imported before the process is cut off

    torch.set_num_threads(max(1, int(os.environ.get("WARDROUND_THREADS", "1"))))
    np.seterr(all="ignore")
    refuse_sockets_and_processes()
    write_frame(replies, {"status": "ok", "network": "none" if without_network else "refused in Python only"})
    serve(sys.stdin.buffer, replies)
