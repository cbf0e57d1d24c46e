"""The ledger's file: an append-only SQLite table of leaves, each with the signed head that it made.

Source: RFC 6962 (tree), DESIGN "Ledger"; sqlite.org/wal.html, sqlite.org/stricttables.html. Rules: an
append is durable when it returns; whoever decides on what the ledger says decides and appends under one
lock, so two processes see one total; every row is checked before it is believed; a missing ledger is
never made by opening it, because an empty ledger would forget what was spent. The schema is frozen.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import FailureError, RefusedError, VerificationError
from common.identity import public_key, sign, sync_folder, verify
from common.ledger import entries as leaves
from common.ledger.entries import Entry
from common.ledger.history import History
from common.ledger.notes import Checkpoint, note_of, origin_of
from common.ledger.tree import Frontier, Tree, leaf_hash

APPLICATION_ID: Final = 0x77617264
LOCK_TIMEOUT_S: Final = 30.0

TABLE: Final = """CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    leaf BLOB NOT NULL,
    leaf_hash BLOB NOT NULL CHECK (length(leaf_hash) = 32),
    root BLOB NOT NULL CHECK (length(root) = 32),
    signature BLOB NOT NULL CHECK (length(signature) = 64)
) STRICT"""
# REPLACE deletes without firing the delete trigger: the insert trigger stops it by the number.
TRIGGERS: Final = (
    """CREATE TRIGGER only_next BEFORE INSERT ON entries
    WHEN NEW.seq IS NOT (SELECT coalesce(max(seq) + 1, 0) FROM entries)
    BEGIN SELECT RAISE(ABORT, 'ledger entries are numbered without gaps'); END""",
    """CREATE TRIGGER no_update BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries are never changed'); END""",
    """CREATE TRIGGER no_delete BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries are never deleted'); END""",
)

_ROWS: Final = "SELECT seq, leaf, leaf_hash, root, signature FROM entries WHERE seq >= ? ORDER BY seq"
_RESTORE: Final = (
    "Stop the agent and keep this file as evidence; 'wardround audit verify' says what is affected."
)

Decision = Callable[[Sequence[Entry]], Entry]


class Head(NamedTuple):
    """Size and root (32 bytes) of the ledger at one moment."""

    size: int
    root: bytes


class _Row(NamedTuple):
    seq: int
    leaf: bytes
    leaf_hash: bytes
    root: bytes
    signature: bytes


class _Chain:
    """Rows taken one after another, each checked against all before it."""

    def __init__(self) -> None:
        self.frontier = Frontier()
        self.history = History()
        self.entries: list[Entry] = []
        self.leaf_hashes = Tree()
        self.last: _Row | None = None

    def take(self, row: _Row) -> None:
        """Check and take the next row. Raises VerificationError naming it; nothing is taken then."""
        # A damaged page can hold NULL or text in spite of STRICT.
        if type(row.seq) is not int or not all(isinstance(column, bytes) for column in row[1:]):
            raise _tampered(self.frontier.size, "is damaged: a column has another type")
        if row.seq != self.frontier.size:
            problem = f"ledger entry {self.frontier.size} is missing; entry {row.seq} stands in its place"
            raise VerificationError("ledger.gap", problem, remedy=_RESTORE)
        if leaf_hash(row.leaf) != row.leaf_hash:
            raise _tampered(row.seq, "was changed: its bytes do not have the recorded hash")
        frontier = self.frontier.append(row.leaf_hash)
        if frontier.root() != row.root:
            raise _tampered(row.seq, "does not continue the recorded history: the root differs")
        try:
            entry = leaves.decode(row.leaf)
            self.history.check(entry)
        except (VerificationError, RefusedError) as error:
            raise _tampered(row.seq, f"is not a valid entry: {error.problem}") from error
        self.frontier = frontier
        self.history.add(entry)
        self.entries.append(entry)
        self.leaf_hashes.append(row.leaf_hash)
        self.last = row

    def head(self) -> Head:
        """Size and root of the rows taken so far."""
        return Head(self.frontier.size, self.frontier.root())

    def check_signature(self, public: bytes) -> None:
        """Check that ``public`` signed the newest head, and by it everything before."""
        if self.last is not None:
            _check_signature(self.last, public)


class Ledger:
    """One hospital's ledger. Thread-safe; several processes may hold it open at once.

    Guarantee: appended_entries_are_durable - when append returns, the entry is on disk (WAL, FULL).
    Guarantee: rows_are_never_changed - UPDATE, DELETE and REPLACE are aborted by the file itself.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        key: Ed25519PrivateKey | None,
        clock: Callable[[], datetime],
    ) -> None:
        """Use Ledger.open."""
        self._connection = connection
        self._path = path
        self._key = key
        self._clock = clock
        self._lock = threading.Lock()
        self._chain = _Chain()
        self._signed_size = 0

    @classmethod
    def open(
        cls,
        path: Path,
        key: Ed25519PrivateKey | None = None,
        *,
        create: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Self:
        """Open a ledger and check every row; with ``create`` make a new, empty one instead.

        ``key`` is the ledger key: it signs what is appended, and the newest head found must be signed by
        it. Without it the ledger can only be read. ``clock`` gives the aware time of an append.

        Raises: RefusedError when the file is missing (or exists, with ``create``); VerificationError
        naming the first entry that is wrong; FailureError when the file cannot be used.
        """
        _claim(path, create=create)
        with _sqlite_errors(path):
            connection = sqlite3.connect(
                path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        ledger = cls(connection, path, key, clock)
        try:
            with _sqlite_errors(path):
                ledger._prepare(create=create)
                ledger._refresh()
        except BaseException:
            connection.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file. Everything appended is on disk already."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, entry: Entry) -> int:
        """Append one entry and return its number. Raises as append_if."""
        return self.append_if(lambda _: entry)

    def append_if(self, decide: Decision) -> int:
        """Let ``decide`` see every entry and return the next one; append that. All under one lock.

        An entry that states no number or time gets the next number and the time of the lock. An exception
        of ``decide`` goes through and nothing is appended. ``decide`` must not call this ledger.

        Guarantee: decisions_see_one_total - between what ``decide`` saw and its entry there is no other.
        Raises: RefusedError (no ledger key, clock set back, entry that may not follow); VerificationError
        when the file was changed; FailureError when it cannot be written: nothing was appended then.
        """
        if self._key is None:
            raise RefusedError("ledger.read-only", "this ledger was opened without its key, for reading only")
        with self._lock, self._transaction():
            with _sqlite_errors(self._path):
                self._refresh()
            chain = self._chain
            entry = decide(tuple(chain.entries))
            minute = leaves.utc_minute(self._clock())
            entry = leaves.placed(entry, chain.frontier.size, minute)
            if entry.time > minute:
                raise RefusedError("ledger.future", f"the entry says {entry.time}, but it is {minute}")
            chain.history.check(entry)
            leaf = leaves.encode(entry)
            leaves.decode(leaf)  # what could not be read again is never written
            hashed = leaf_hash(leaf)
            frontier = chain.frontier.append(hashed)
            signature = sign(self._key, _signed_bytes(public_key(self._key), frontier.size, frontier.root()))
            row = _Row(entry.seq, leaf, hashed, frontier.root(), signature)
            with _sqlite_errors(self._path):
                self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
        # Nothing is remembered before the commit: the next refresh reads this row like any other.
        return entry.seq

    def entries(self) -> tuple[Entry, ...]:
        """Every entry, oldest first. Raises VerificationError when the file was changed."""
        with self._current() as chain:
            return tuple(chain.entries)

    def head(self) -> Head:
        """Size and root now. Raises VerificationError when the file was changed."""
        with self._current() as chain:
            return chain.head()

    def leaf_hashes(self) -> Tree:
        """The hash of every leaf now, in order. Raises VerificationError when the file was changed."""
        with self._current() as chain:
            return chain.leaf_hashes.frozen()

    def leaves(self) -> tuple[bytes, ...]:
        """The bytes of every leaf, in order. Raises VerificationError when the file was changed."""
        with self._current() as chain:
            return tuple(row.leaf for row in self._rows(0) if row.seq < chain.frontier.size)

    def checkpoint(self, public: bytes) -> str:
        """The newest head as the ledger key signed it: a C2SP checkpoint in a signed note.

        ``public`` is the raw ledger key. Raises RefusedError while the ledger is empty.
        """
        with self._current() as chain:
            chain.check_signature(public)
            row = chain.last
        if row is None:
            raise RefusedError("ledger.empty", "an empty ledger has no signed head")
        origin = origin_of(public)
        return note_of(Checkpoint(origin, row.seq + 1, row.root).body(), origin, public, row.signature)

    def verify(self, public: bytes | None = None) -> Head:
        """Read the whole file again and recompute everything; with ``public`` check each signature too.

        Guarantee: tampered_rows_are_named - a changed, missing, added or reordered row is found, and the
        first one is named.
        Assumes: a file rewritten by whoever holds the ledger key, or replaced by an older copy of itself,
        is found only by comparing heads with someone who remembers them.
        Raises: VerificationError naming the entry.
        """
        chain = _Chain()
        with self._lock, _sqlite_errors(self._path):
            self._check_schema()
            for row in self._rows(0):
                chain.take(row)
                if public is not None:
                    _check_signature(row, public)
            self._refresh()
        return chain.head()

    def _prepare(self, *, create: bool) -> None:
        connection = self._connection
        connection.execute("PRAGMA trusted_schema = OFF")
        if create:
            self._check_empty()
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if create:
            with self._transaction():
                self._check_empty()
                for statement in (TABLE, *TRIGGERS, f"PRAGMA application_id = {APPLICATION_ID}"):
                    connection.execute(statement)
        self._check_schema()

    def _check_empty(self) -> None:
        if self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            problem = f"{self._path} exists already; a ledger is never made anew over another"
            raise RefusedError("ledger.exists", problem, remedy="Open it.")

    def _check_schema(self) -> None:
        found = {row[0] for row in self._connection.execute("SELECT sql FROM sqlite_master")}
        application = self._connection.execute("PRAGMA application_id").fetchone()[0]
        if found != {TABLE, *TRIGGERS} or application != APPLICATION_ID:
            problem = f"{self._path} does not have the tables and triggers of a ledger"
            raise VerificationError("ledger.schema", problem, remedy=_RESTORE)
        if self._connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            raise VerificationError("ledger.journal", f"{self._path} is not in WAL mode", remedy=_RESTORE)

    def _rows(self, first: int) -> Iterator[_Row]:
        return map(_Row._make, self._connection.execute(_ROWS, (first,)))

    def _refresh(self) -> None:
        chain = self._chain
        known = chain.last
        rows = self._rows(0 if known is None else known.seq)
        if known is not None and next(rows, None) != known:
            problem = f"ledger entry {known.seq}, read before, is no longer in {self._path} as it was"
            raise VerificationError("ledger.rewritten", problem, remedy=_RESTORE)
        for row in rows:
            chain.take(row)
        if self._key is not None and chain.frontier.size > self._signed_size:
            chain.check_signature(public_key(self._key))
            self._signed_size = chain.frontier.size

    @contextmanager
    def _current(self) -> Iterator[_Chain]:
        """Every row of the file now, under the lock."""
        with self._lock, _sqlite_errors(self._path):
            self._refresh()
            yield self._chain

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _sqlite_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            with _sqlite_errors(self._path):
                self._connection.execute("COMMIT")
        except BaseException:
            # A failed COMMIT (disk full) may have ended the transaction itself.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _claim(path: Path, *, create: bool) -> None:
    """Make the empty file with mode 0600 (SQLite copies the mode to its WAL), or check that it is there."""
    if not create:
        if not path.exists():
            remedy = "Restore it; a register whose ledger is lost stays closed until it is re-keyed."
            raise RefusedError("ledger.missing", f"the ledger {path} is missing", remedy=remedy)
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        # An empty file is what a crash during creation leaves; anything more is refused by _prepare.
        return
    except OSError as error:
        raise FailureError("ledger.create", f"the ledger {path} cannot be made: {error.strerror}") from error
    sync_folder(path.parent)


def _signed_bytes(public: bytes, size: int, root: bytes) -> bytes:
    return Checkpoint(origin_of(public), size, root).body().encode("utf-8")


def _check_signature(row: _Row, public: bytes) -> None:
    data = _signed_bytes(public, row.seq + 1, row.root)
    try:
        verify(public, row.signature, data, f"ledger head after entry {row.seq}")
    except VerificationError as error:
        raise _tampered(row.seq, "is not signed by the ledger key") from error


def _tampered(seq: int, what: str) -> VerificationError:
    return VerificationError("ledger.tampered", f"ledger entry {seq} {what}", remedy=_RESTORE, entry=seq)


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Errors of SQLite as ours. Never around a caller's code, which may have errors of the same kinds."""
    try:
        yield
    except sqlite3.OperationalError as error:
        # Locked, full, read-only, no permission: the file may be sound.
        problem = f"the ledger {path} cannot be used: {error}"
        remedy = "Check free space, permissions and whether another process holds it; then try again."
        raise FailureError("ledger.unusable", problem, remedy=remedy) from error
    # Text of a damaged schema may not even be UTF-8.
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        problem = f"{path} is not a sound ledger file: {error}"
        raise VerificationError("ledger.corrupt", problem, remedy=_RESTORE) from error
