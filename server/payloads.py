"""Masked payloads kept on disk, for studies whose manifest says ``audit = "payloads"``.

Source: PROTOCOL.md C6. Rules: only the payloads of the one opened context of a round stay, whole and durable
before the round counts as completed; those of an abandoned attempt or a lost round are removed; a payload is
masked, and says nothing by itself as long as the masks hold.
"""

import os
import shutil
import threading
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from common.audit.payloads import member_name
from common.errors import FailureError, RefusedError, UsageError
from common.secagg.codec import Layout

_PART: Final = ".part"
_WRITE_S: Final = 60.0
_REMEDY: Final = "Give the hub's folder more room, or let the coordinator submit the study with other rounds."


class Attempt:
    """The payloads of one attempt while they arrive. Chunks may come from several threads."""

    def __init__(self, folder: Path, number: int, attempt: int, layout: Layout) -> None:
        self._part = folder / f"{number}.{attempt}{_PART}"
        self._whole = folder / str(number)
        self._spans = layout.spans
        self._failure: FailureError | None = None
        self._writing, self._idle = 0, threading.Condition()
        with _kept_in(self._part):
            self._part.mkdir(parents=True, mode=0o700)

    @property
    def failed(self) -> bool:
        """Whether a chunk could not be written."""
        return self._failure is not None

    @contextmanager
    def taking(self) -> Iterator[None]:
        """While a chunk is counted and written: ``check`` waits for it."""
        with self._idle:
            self._writing += 1
        try:
            yield
        finally:
            with self._idle:
                self._writing -= 1
                self._idle.notify_all()

    def write(self, site: int, index: int, data: bytes) -> None:
        """Keep one chunk that has been checked and counted. Raises FailureError when it cannot be written."""
        try:
            with _kept_in(self._part):
                file = os.open(self._part / str(site), os.O_WRONLY | os.O_CREAT, 0o600)
                try:
                    if os.pwrite(file, data, self._spans[index].start) != len(data):
                        raise OSError(0, "a chunk was written in part")
                finally:
                    os.close(file)
        except FailureError as error:
            self._failure = error
            raise

    def check(self) -> None:
        """Wait for what is being written; refuse to go on after a chunk could not be.

        It is in the sum, and is not asked for again.

        Guarantee: a_sum_is_opened_only_with_all_payloads - where a study keeps them.
        Raises: FailureError.
        """
        with self._idle:
            done = self._idle.wait_for(lambda: not self._writing, _WRITE_S)
        if self._failure is not None or not done:
            problem = f"a payload could not be written to {self._part} in {_WRITE_S:.0f} s"
            raise self._failure or FailureError("payloads.write", problem, remedy=_REMEDY)

    def seal(self, sites: Collection[int]) -> None:
        """Make the payloads of these hospitals durable as those of the round. Raises FailureError."""
        self.check()
        with _kept_in(self._part):
            files = {path.name: path.stat().st_size for path in self._part.iterdir()}
            if files != {str(site): self._spans[-1].stop for site in sites}:
                raise OSError(0, "they are not whole")
            for path in (*self._part.iterdir(), self._part):
                _sync(path)
            self._part.rename(self._whole)
            _sync(self._whole.parent)

    def drop(self) -> None:
        """Remove what has arrived, unless it was sealed."""
        shutil.rmtree(self._part, ignore_errors=True)


class Payloads:
    """The kept payloads of one study in ``folder``: a folder a completed round, in it a file a hospital.

    Guarantee: only_opened_payloads_stay - none of an abandoned attempt or a lost round, also after a kill.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout

    def keep_only(self, rounds: Collection[int]) -> None:
        """Remove everything but the payloads of these rounds: what a hub that was killed left behind."""
        kept = set(map(str, rounds))
        with _kept_in(self._folder):
            for path in self._folder.iterdir() if self._folder.exists() else ():
                if path.name not in kept:
                    shutil.rmtree(path)

    def check_room(self, hospitals: int) -> None:
        """Refuse to begin a round whose payloads would not fit on the disk. Raises FailureError."""
        with _kept_in(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            needed, free = hospitals * self._layout.payload_bytes, shutil.disk_usage(self._folder).free
        if free < needed:
            problem = f"a round's payloads take {needed} bytes, and {self._folder} has room for {free}"
            raise FailureError("payloads.room", problem, remedy=_REMEDY)

    def attempt(self, number: int, attempt: int) -> Attempt:
        """Where the payloads of an attempt go."""
        return Attempt(self._folder, number, attempt, self._layout)


def pack_payloads(folder: Path, digest: str, out: Path) -> int:
    """Write the kept payloads of a study into a new zip file for an auditor; how many rounds there are.

    Raises: RefusedError when none are kept; UsageError when the file cannot be written.
    """
    rounds = sorted(_rounds(folder))
    if not rounds:
        remedy = 'Only a study with audit = "payloads" keeps them, until they are erased.'
        raise RefusedError("payloads.none", f"no payloads are kept of study {digest}", remedy=remedy)
    try:
        with zipfile.ZipFile(out, "x") as archive:
            for number in rounds:
                for path in sorted((folder / str(number)).iterdir()):
                    archive.write(path, member_name(digest, number, int(path.name)))
    except OSError as error:
        if not isinstance(error, FileExistsError):
            out.unlink(missing_ok=True)
        problem = f"{out} cannot be written: {error.strerror}"
        remedy = "Name a new file in a folder that has room."
        raise UsageError("output.file", problem, remedy=remedy) from error
    return len(rounds)


def erase_payloads(folder: Path) -> int:
    """Remove all payloads of a study, whose audit has ended; how many rounds there were.

    Raises: FailureError when they cannot be removed.
    """
    with _kept_in(folder):
        rounds = len(list(_rounds(folder)))
        if folder.exists():
            shutil.rmtree(folder)
    return rounds


def _rounds(folder: Path) -> Iterator[int]:
    for path in folder.iterdir() if folder.exists() else ():
        if not path.name.endswith(_PART):
            yield int(path.name)


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"the payloads in {folder} cannot be kept or removed: {error.strerror}"
        raise FailureError("payloads.write", problem, remedy=_REMEDY) from error


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
