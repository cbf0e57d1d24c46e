"""A copy of a database's rows, made by a process of its own, for one that has no network.

Source: DESIGN.md "The agent is two processes". Rules: the copy lies in the site's run folder, which no backup
holds, for this account alone, and no longer than it is read; the reader can be killed at any moment.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from client.frames import passed_environment, read_frame, write_frame
from client.sources.source import DataSource
from common.contract import Contract
from common.encoding import canonical_json
from common.errors import ContractError, FailureError, WardroundError

TIMEOUT_S: Final = 1800.0
_POLL_S: Final = 0.2
_REMEDY: Final = "Check that the database is up, the account and its password_file; then try again."


@contextmanager
def local(
    source: DataSource, contract: Contract, folder: Path, *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[DataSource]:
    """The source itself, or that of a copy below ``folder`` which is deleted in the end.

    ``stopped`` is asked all the time; once it says true, the reader is killed.

    Guarantee: copies_do_not_stay - whatever ends their use; those of a crash are deleted by ``sweep``.
    Raises: ContractError, FailureError.
    """
    if not source.on_server:
        yield source
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name) / "copy.parquet"
        out.touch(mode=0o600)
        _read(source, contract, out, stopped)
        yield source.copied(out)


def sweep(folder: Path) -> None:
    """Delete the copies that a crash has left."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(source: DataSource, contract: Contract, out: Path, stopped: Callable[[], bool]) -> None:
    """Let a reader copy a source. Raises what it says, or FailureError."""
    command = [sys.executable, "-P", "-m", "client.reader"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=passed_environment(),
        cwd="/",
    )
    reply = None
    with process:
        try:
            if process.stdin is None or process.stdout is None:
                raise FailureError("worker.pipe", "the reader has no pipe")
            header = {"source": source.model_dump(mode="json"), "out": str(out)}
            with suppress(BrokenPipeError):
                write_frame(process.stdin, header, canonical_json(contract.model_dump(mode="json")))
            _await(process, stopped)
            with suppress(OSError, ValueError, WardroundError):
                reply = read_frame(process.stdout)
        finally:
            process.kill()
    if reply is None:
        raise FailureError("source.reader", f"the reader of {source.where} died", remedy=_REMEDY)
    said = {name: str(value) for name, value in reply[0].items()}
    if said["status"] != "ok":
        kind = ContractError if said["status"] == "contract" else FailureError
        raise kind(said["code"], said["problem"], remedy=said["remedy"])


def _await(process: "subprocess.Popen[bytes]", stopped: Callable[[], bool]) -> None:
    """Wait for the end of a reader. Raises FailureError when it may not go on."""
    ends = time.monotonic() + TIMEOUT_S
    while not stopped() and time.monotonic() < ends:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
            return
    problem = "reading the database was stopped or took too long"
    raise FailureError("source.stopped", problem, remedy="Offer a smaller table or view.")
