"""The site's folder on disk, and the run file that holds the secrets of running studies.

Source: PROTOCOL I10, I13; PRIVACY "Registers". Rules: keys and secrets are files of mode 0600; the run
file is a SQLite file of its own with secure_delete and without a WAL copy, outside the ledger and outside
backups (erasure on flash is best effort); one live agent, by an exclusive lock; every write is durable
when it returns.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from common.errors import RefusedError, UsageError, VerificationError
from common.identity import sync_folder

RUN_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS runs (man BLOB PRIMARY KEY, state BLOB NOT NULL) STRICT;
"""
PRAGMAS: Final = ("journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY")


class SiteHome:
    """Paths inside a site's folder. Nothing is read or created by making one.

    ``request`` goes to the coordinator, ``admission`` comes back; ``protocol_key`` and ``ledger_key`` sign
    nothing but what their names say; from ``split_secret`` (32 random bytes) split keys are derived;
    ``ledger_mark`` remembers the last charge and ``runs`` holds secrets of running studies, both outside
    backups, as are ``copies`` of databases while they are read; ``pins`` are the fingerprints of other
    hospitals that a person here has accepted; ``heads`` is what this site has seen of the others' ledgers
    (common.witness).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings, self.policy = folder / "site.toml", folder / "policy.toml"
        self.request, self.admission = folder / "request.json", folder / "admission.json"
        keys, run = folder / "keys", folder / "run"
        self.tls_key, self.protocol_key = keys / "tls.pem", keys / "protocol.pem"
        self.ledger_key, self.split_secret = keys / "ledger.pem", keys / "split.secret"
        self.ledger, self.pins = folder / "ledger.db", folder / "pins.json"
        self.heads = folder / "heads.json"
        self.ledger_mark, self.runs, self.copies = run / "ledger.mark", run / "runs.db", run / "copies"

    def study(self, digest: str) -> Path:
        """The folder entry of one received study."""
        return self.folder / "studies" / f"{digest}.study"

    def create_folders(self) -> None:
        """Make the folder, closed to other users. Raises UsageError when it holds a site already."""
        if self.settings.exists():
            raise UsageError(
                "site.exists", f"{self.folder} holds a site already", remedy="Choose a new folder."
            )
        for folder in (self.folder, self.folder / "keys", self.folder / "run", self.folder / "studies"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the site's lock: one live agent. Raises RefusedError when another process holds it."""
        # Not part of a backup, so a restored folder comes without it.
        self.runs.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.runs.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RefusedError(
                    "site.locked",
                    f"another agent runs on {self.folder}",
                    remedy="End it first; two agents on one state would break the masks' safety.",
                ) from error
            yield
        finally:
            os.close(descriptor)


def write_durable(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class RunFile:
    """One row of secret state a study, replaced in one durable transaction. Thread-safe.

    Guarantee: run_state_is_durable - what save() returned from is there after kill -9.
    Assumes: erasure of replaced pages by secure_delete is best effort on flash.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises VerificationError when it is damaged."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in PRAGMAS:
                self._connection.execute(f"PRAGMA {pragma}").fetchall()
            self._connection.executescript(RUN_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise VerificationError(
                "state.run-file",
                f"{path} cannot be used: {error}",
                remedy="End every other agent; if it is damaged, remove it: its studies stay closed here.",
            ) from error

    def runs(self) -> tuple[bytes, ...]:
        """Manifest digests of all runs that have a state, open or closed."""
        with self._lock:
            return tuple(
                bytes(row[0]) for row in self._connection.execute("SELECT man FROM runs ORDER BY man")
            )

    def load(self, man: bytes) -> bytes | None:
        """The state of a run, or None when there is none."""
        with self._lock:
            row = self._connection.execute("SELECT state FROM runs WHERE man = ?", (man,)).fetchone()
        return None if row is None else bytes(row[0])

    def save(self, man: bytes, state: bytes) -> None:
        """Replace the state of a run durably."""
        # Without the lock two threads' statements would share one transaction.
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(
                "INSERT INTO runs (man, state) VALUES (?, ?) "
                "ON CONFLICT (man) DO UPDATE SET state = excluded.state",
                (man, state),
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
