"""The ledger's file: durable appends, tampered rows named, crashes, clocks, and two processes at once."""

import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import FailureError, RefusedError, VerificationError, WardroundError
from common.identity import key_text, new_signing_key, public_key, save_signing_key
from common.ledger import entries, notes, store, tree
from common.ledger.entries import Approval, Charge, Entry, Opened, Outcome
from common.ledger.store import Ledger

KEY = new_signing_key()
PUBLIC = public_key(KEY)
ACTOR = key_text(PUBLIC)
REGISTER = "0123456789abcdef" * 2
DIGEST = "0123456789abcdef" * 4
START = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[3]


def opened() -> Opened:
    return Opened(actor=ACTOR, register_id=REGISTER, epsilon_t="3", epsilon_w="5.5", delta="0.000001")


def charge(number: int) -> Charge:
    event: dict[str, str | int] = {"event_id": f"{number:032x}", "register_id": REGISTER, "round": number}
    return Charge(actor=ACTOR, event=event)


def outcome(number: int) -> Outcome:
    return Outcome(
        actor=ACTOR, event_id=f"{number:032x}", state="charged", attempt=1, ctx=None, reason="round_lost"
    )


def approval(reason: str = "yes") -> Approval:
    return Approval(actor=ACTOR, manifest=DIGEST, decision="approved", reason=reason)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed ledger of six entries."""
    path = tmp_path / "ledger.db"
    with Ledger.open(path, KEY, create=True, clock=Clock()) as ledger:
        for entry in (opened(), approval(), charge(1), outcome(1), charge(2), outcome(2)):
            ledger.append(entry)
    return path


def test_appends_are_numbered_chained_and_signed(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.db", KEY, create=True, clock=Clock()) as ledger:
        assert ledger.head() == (0, tree.EMPTY_ROOT)
        assert ledger.verify(PUBLIC) == (0, tree.EMPTY_ROOT)
        hashes: list[bytes] = []
        for number, entry in enumerate((opened(), charge(1), outcome(1), approval())):
            assert ledger.append(entry) == number
            placed = ledger.entries()[-1]
            assert (placed.seq, placed.time) == (number, "2026-03-01T12:30Z")
            hashes.append(tree.leaf_hash(entries.encode(placed)))
            assert ledger.head() == (number + 1, tree.root(hashes))
            note = notes.open_note(ledger.checkpoint(PUBLIC), notes.origin_of(PUBLIC), PUBLIC)
            assert notes.read_checkpoint(note) == notes.Checkpoint(
                notes.origin_of(PUBLIC), number + 1, tree.root(hashes)
            )
        assert ledger.verify(PUBLIC) == ledger.head()


def test_appended_entries_are_durable(path: Path, tmp_path: Path) -> None:
    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        connection = ledger._connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        ledger.append(approval("after"))
        # What another process would find if this one died now: the files as they are, nothing closed.
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in path.parent.glob("ledger.db*"):
            shutil.copy(file, copy)
        with Ledger.open(copy / "ledger.db", KEY) as found:
            assert found.head() == ledger.head()
            assert found.entries() == ledger.entries()


def test_files_are_private(path: Path) -> None:
    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        ledger.append(approval())
        for file in path.parent.glob("ledger.db*"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_missing_ledger_is_never_made_by_opening(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is missing"):
        Ledger.open(tmp_path / "l.db", KEY)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FailureError, match="cannot be made"):
        Ledger.open(tmp_path / "nowhere" / "l.db", KEY, create=True)


def test_a_ledger_is_never_made_over_another(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="exists already"):
        Ledger.open(path, KEY, create=True)
    with Ledger.open(path, KEY) as ledger:
        assert ledger.head().size == 6
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = foreign.read_bytes()
    with pytest.raises(RefusedError, match="exists already"):
        Ledger.open(foreign, KEY, create=True)
    with pytest.raises(VerificationError, match="tables and triggers"):
        Ledger.open(foreign, KEY)
    assert foreign.read_bytes() == before
    # An empty file is what a crash in the middle of creation leaves.
    (tmp_path / "empty.db").touch()
    with Ledger.open(tmp_path / "empty.db", KEY, create=True, clock=Clock()) as ledger:
        assert ledger.append(opened()) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET leaf = x'00' WHERE seq = 1",
        "UPDATE entries SET seq = 9 WHERE seq = 5",
        "UPDATE OR REPLACE entries SET seq = 4 WHERE seq = 5",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE seq = 5",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE seq = 5",
        "REPLACE INTO entries SELECT 2, leaf, leaf_hash, root, signature FROM entries WHERE seq = 3",
        "INSERT INTO entries SELECT 7, leaf, leaf_hash, root, signature FROM entries WHERE seq = 5",
        "INSERT INTO entries SELECT -1, leaf, leaf_hash, root, signature FROM entries WHERE seq = 5",
        "INSERT OR IGNORE INTO entries SELECT 3, leaf, leaf_hash, root, signature FROM entries WHERE seq = 5",
    ],
)
def test_rows_are_never_changed(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    try:
        before = connection.execute("SELECT * FROM entries").fetchall()
        with pytest.raises(sqlite3.IntegrityError, match="ledger entries are"):
            connection.execute(statement)
        assert connection.execute("SELECT * FROM entries").fetchall() == before
    finally:
        connection.close()
    with Ledger.open(path, KEY) as ledger:
        assert ledger.verify(PUBLIC).size == 6


def test_rows_have_types(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        for row in ("6, 'text', {h}, {h}, {s}", "6, x'00', x'00', {h}, {s}", "6, x'00', {h}, {h}, x'00'"):
            values = row.format(h=f"x'{'00' * 32}'", s=f"x'{'00' * 64}'")
            with pytest.raises(sqlite3.IntegrityError):
                connection.execute(f"INSERT INTO entries VALUES ({values})")
    finally:
        connection.close()


# --- tampering by someone who can write the file past its triggers ---


def tamper(path: Path, *statements: str | tuple[str, tuple[object, ...]]) -> None:
    connection = sqlite3.connect(path)
    try:
        with connection:
            for trigger in ("only_next", "no_update", "no_delete"):
                connection.execute(f"DROP TRIGGER {trigger}")
            for statement in statements:
                connection.execute(*((statement,) if isinstance(statement, str) else statement))
            for trigger_sql in store.TRIGGERS:
                connection.execute(trigger_sql)
    finally:
        connection.close()


def rows(path: Path) -> list[tuple[int, bytes, bytes, bytes, bytes]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT * FROM entries ORDER BY seq").fetchall()
    finally:
        connection.close()


def rewrite(path: Path, changed: Sequence[bytes], key: Ed25519PrivateKey | None = None) -> None:
    """Replace every leaf, with hashes and roots all recomputed; signed anew only with ``key``."""
    old, frontier, made = rows(path), tree.Frontier(), []
    for seq, leaf in enumerate(changed):
        hashed = tree.leaf_hash(leaf)
        frontier = frontier.append(hashed)
        signature = old[seq][4]
        if key is not None:
            signature = key.sign(store._signed_bytes(public_key(key), seq + 1, frontier.root()))
        made.append((seq, leaf, hashed, frontier.root(), signature))
    tamper(path, "DELETE FROM entries", *(("INSERT INTO entries VALUES (?,?,?,?,?)", row) for row in made))


@pytest.mark.parametrize("seq", range(6))
def test_tampered_rows_are_named(path: Path, seq: int) -> None:
    leaf = rows(path)[seq][1]
    changed = leaf.replace(b'"version":"', b'"version":"9')
    swap = (seq + 1) % 6
    damage: list[tuple[list[str | tuple[str, tuple[object, ...]]], int]] = [
        ([("UPDATE entries SET leaf = ? WHERE seq = ?", (changed, seq))], seq),
        (
            [
                (
                    "UPDATE entries SET leaf = ?, leaf_hash = ? WHERE seq = ?",
                    (changed, tree.leaf_hash(changed), seq),
                )
            ],
            seq,
        ),
        ([("UPDATE entries SET leaf_hash = zeroblob(32) WHERE seq = ?", (seq,))], seq),
        ([("UPDATE entries SET root = zeroblob(32) WHERE seq = ?", (seq,))], seq),
        ([("UPDATE entries SET signature = zeroblob(64) WHERE seq = ?", (seq,))], seq),
        (
            [
                ("UPDATE entries SET seq = 100 WHERE seq = ?", (seq,)),
                ("UPDATE entries SET seq = ? WHERE seq = ?", (seq, swap)),
                ("UPDATE entries SET seq = ? WHERE seq = 100", (swap,)),
            ],
            min(seq, swap),
        ),
    ]
    if seq < 5:
        damage.append(([("DELETE FROM entries WHERE seq = ?", (seq,))], seq))
    for number, (statements, named) in enumerate(damage):
        copy = path.with_name(f"copy{number}.db")
        shutil.copy(path, copy)
        with Ledger.open(copy) as reader:
            tamper(copy, *statements)
            with pytest.raises(VerificationError, match=rf"ledger entry {named}\b"):
                reader.verify(PUBLIC)
        # Opening with the key finds all of it too, but for a signature that a newer one has replaced.
        if number != 4 or seq == 5:
            with pytest.raises(VerificationError, match=rf"ledger entry {named}\b"):
                Ledger.open(copy, KEY)


def test_a_history_rewritten_with_all_hashes_is_found_by_its_signatures(path: Path) -> None:
    leaves = [row[1] for row in rows(path)]
    leaves[2] = leaves[2].replace(b'"round":1', b'"round":7')
    rewrite(path, leaves)
    with Ledger.open(path) as reader:
        reader.verify()  # consistent in itself: this is why keys are needed
        with pytest.raises(VerificationError, match=r"ledger entry 2 is not signed"):
            reader.verify(PUBLIC)
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"is not signed"):
            Ledger.open(path, KEY)
    other = new_signing_key()
    rewrite(path, leaves, other)
    with Ledger.open(path, other) as reader:
        reader.verify(public_key(other))
        with pytest.raises(VerificationError, match="ledger entry 0 is not signed"):
            reader.verify(PUBLIC)


def test_a_wrong_history_is_found_though_it_is_signed(path: Path) -> None:
    leaves = [row[1] for row in rows(path)]
    wrong: dict[str, list[bytes]] = {
        r"ledger entry 3 .*charged already": [*leaves[:3], leaves[2].replace(b'"seq":2', b'"seq":3')],
        r"ledger entry 0 .*never opened": [leaves[2].replace(b'"seq":2', b'"seq":0')],
        r"ledger entry 1 .*belongs": [leaves[0], leaves[2]],
        r"ledger entry 1 .*clock": [leaves[0], leaves[1].replace(b"T12:30Z", b"T12:29Z")],
        r"ledger entry 1 .*valid entry": [leaves[0], b"{}"],
    }
    for number, (pattern, changed) in enumerate(wrong.items()):
        copy = path.with_name(f"copy{number}.db")
        shutil.copy(path, copy)
        rewrite(copy, changed, KEY)
        with pytest.raises(VerificationError, match=pattern):
            Ledger.open(copy, KEY)


def test_changes_under_an_open_ledger_are_seen(path: Path) -> None:
    def attempts(ledger: Ledger) -> list[Callable[[], object]]:
        return [ledger.entries, ledger.head, lambda: ledger.append(approval()), lambda: ledger.verify(PUBLIC)]

    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        tamper(path, "DELETE FROM entries WHERE seq >= 4")
        for attempt in attempts(ledger)[:3]:
            for _ in range(2):
                with pytest.raises(VerificationError, match="entry 5, read before, is no longer"):
                    attempt()
    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        row = (4, b"{}", bytes(32), bytes(32), bytes(64))
        tamper(path, ("INSERT INTO entries VALUES (?,?,?,?,?)", row))
        for attempt in attempts(ledger):
            for _ in range(2):
                with pytest.raises(VerificationError, match="entry 4 was changed"):
                    attempt()


def test_an_unsigned_append_is_never_believed(path: Path) -> None:
    """A well-formed row of another key: refused again and again, not only the first time it is read."""
    entry = entries.placed(approval("forged"), 6, "2026-03-01T12:30Z")
    leaf = entries.encode(entry)
    frontier = tree.Frontier()
    for row in rows(path):
        frontier = frontier.append(row[2])
    frontier = frontier.append(tree.leaf_hash(leaf))
    row6 = (6, leaf, tree.leaf_hash(leaf), frontier.root(), bytes(64))
    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        tamper(path, ("INSERT INTO entries VALUES (?,?,?,?,?)", row6))
        for attempt in (ledger.entries, ledger.head, lambda: ledger.append(approval()), ledger.entries):
            with pytest.raises(VerificationError, match="entry 6 is not signed"):
                attempt()


def test_missing_triggers_are_seen(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP TRIGGER no_delete")
    connection.close()
    with pytest.raises(VerificationError, match="tables and triggers"):
        Ledger.open(path, KEY)


def test_damaged_files_are_refused(path: Path, tmp_path: Path) -> None:
    for name, content in (("text.db", b"not a database at all" * 100), ("half.db", path.read_bytes()[:5000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((VerificationError, FailureError)):
            Ledger.open(tmp_path / name, KEY)
    (tmp_path / "empty.db").touch()
    with pytest.raises(VerificationError, match="tables and triggers"):
        Ledger.open(tmp_path / "empty.db", KEY)


def test_a_changed_byte_is_found_or_changes_nothing(path: Path) -> None:
    """300 single-byte changes anywhere in the file: the same entries, or an error of ours; nothing else."""
    with Ledger.open(path, KEY) as ledger:
        right, head = ledger.entries(), ledger.head()
    chance, content, found = random.Random(7), path.read_bytes(), 0
    for _ in range(300):
        data = bytearray(content)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            with Ledger.open(path, KEY) as ledger:
                assert ledger.entries() == right
                assert ledger.verify(PUBLIC) == head
        except WardroundError:
            found += 1
    assert found > 20


# --- deciding and appending ---


def test_reading_needs_no_key_and_writing_does(path: Path) -> None:
    with Ledger.open(path) as ledger:
        assert len(ledger.entries()) == 6
        assert notes.origin_of(PUBLIC) in ledger.checkpoint(PUBLIC)
        with pytest.raises(RefusedError, match="without its key"):
            ledger.append(approval())
        with pytest.raises(VerificationError, match="not signed"):
            ledger.checkpoint(public_key(new_signing_key()))
        assert ledger.head().size == 6


def test_an_empty_ledger_has_no_signed_head(tmp_path: Path) -> None:
    with (
        Ledger.open(tmp_path / "l.db", KEY, create=True) as ledger,
        pytest.raises(RefusedError, match="no signed head"),
    ):
        ledger.checkpoint(PUBLIC)


def test_a_refusal_appends_nothing(path: Path) -> None:
    class ExhaustedError(Exception):
        pass

    def refuse(_: Sequence[Entry]) -> Entry:
        raise ExhaustedError

    bad: list[Entry] = [
        opened(),
        charge(1),
        outcome(9),
        approval().model_copy(update={"seq": 7}),
        approval().model_copy(update={"seq": 5}),
        approval().model_copy(update={"time": "2026-03-01T12:31Z"}),
        approval().model_copy(update={"time": "2026-03-01T12:29Z"}),
    ]
    unwritable: list[Entry] = [
        approval().model_copy(update={"reason": "two\nlines"}),
        approval().model_copy(update={"decision": "perhaps"}),
    ]
    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        head = ledger.head()
        with pytest.raises(ExhaustedError):
            ledger.append_if(refuse)
        # An error of the caller's own database is not one of the ledger's.
        with pytest.raises(sqlite3.OperationalError):
            ledger.append_if(lambda _: sqlite3.connect(":memory:").execute("no statement"))  # type: ignore[arg-type,return-value]
        for entry in bad:
            with pytest.raises(RefusedError):
                ledger.append(entry)
        for entry in unwritable:
            with pytest.raises(VerificationError):
                ledger.append(entry)
        assert ledger.head() == ledger.verify(PUBLIC) == head
        assert ledger.append(approval()) == 6


def test_a_clock_set_back_is_refused(path: Path) -> None:
    clock = Clock()
    with Ledger.open(path, KEY, clock=clock) as ledger:
        clock.now = START - timedelta(minutes=1)
        with pytest.raises(RefusedError, match=r"2026-03-01T12:29Z.*entry 5.*2026-03-01T12:30Z") as caught:
            ledger.append(approval())
        assert "clock" in caught.value.remedy
        assert ledger.head().size == 6
        # Seconds do not count: the ledger knows minutes.
        clock.now = START + timedelta(seconds=59)
        assert ledger.append(approval()) == 6
        clock.now = START + timedelta(days=400)
        assert ledger.append(approval()) == 7
        clock.now = START + timedelta(days=399)
        with pytest.raises(RefusedError, match="clock"):
            ledger.append(approval())


def test_two_open_ledgers_see_each_other(path: Path) -> None:
    clock = Clock()
    with Ledger.open(path, KEY, clock=clock) as first, Ledger.open(path, KEY, clock=clock) as second:
        assert first.append(charge(3)) == 6
        assert second.append(charge(4)) == 7
        with pytest.raises(RefusedError, match="charged already"):
            second.append(charge(3))
        assert first.entries() == second.entries()
        assert first.head() == second.head() == first.verify(PUBLIC)


def test_threads_share_one_ledger(path: Path) -> None:
    limit = 20

    def decide(known: Sequence[Entry]) -> Entry:
        charges = [entry for entry in known if isinstance(entry, Charge)]
        if len(charges) >= limit:
            raise RefusedError("budget", "enough")
        return charge(100 + len(charges))

    with Ledger.open(path, KEY, clock=Clock()) as ledger:

        def work() -> None:
            for _ in range(10):
                try:
                    ledger.append_if(decide)
                except RefusedError:
                    return

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        charges = [entry for entry in ledger.verify(PUBLIC) and ledger.entries() if isinstance(entry, Charge)]
        assert len(charges) == limit


CHILD = """
import os, sys
from pathlib import Path
from common.errors import RefusedError
from common.identity import key_text, load_signing_key, public_key
from common.ledger.entries import Approval, Charge
from common.ledger.store import Ledger

folder, mode = Path(sys.argv[1]), sys.argv[2]
key = load_signing_key(folder / "key.pem")
actor = key_text(public_key(key))
ledger = Ledger.open(folder / "ledger.db", key)
print("ready", flush=True)
sys.stdin.readline()

def decide(entries):
    charges = [e for e in entries if isinstance(e, Charge)]
    if mode == "decide":
        os._exit(9)
    if len(charges) >= 42:
        raise RefusedError("budget", "spent")
    number = 1000 + len(charges)
    event = {"event_id": f"{number:032x}", "register_id": charges[0].register_id, "round": len(charges)}
    return Charge(actor=actor, event=event)

if mode == "commit":
    ledger._connection.set_trace_callback(lambda sql: os._exit(9) if sql == "COMMIT" else None)
made = 0
try:
    while True:
        ledger.append_if(decide)
        made += 1
        if mode == "after":
            os._exit(9)
except RefusedError:
    print(made, flush=True)
"""


def start(folder: Path, mode: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD, str(folder), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_decisions_see_one_total(path: Path) -> None:
    """Two processes spend one budget of 42 charges as fast as they can: never one more."""
    save_signing_key(path.parent / "key.pem", KEY)
    children = [start(path.parent, "spend") for _ in range(2)]
    outputs = []
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        outputs.append(int(output))
    assert sum(outputs) == 40
    with Ledger.open(path, KEY) as ledger:
        assert ledger.verify(PUBLIC).size == 46
        rounds = [entry.event["round"] for entry in ledger.entries() if isinstance(entry, Charge)]
        assert rounds[2:] == list(range(2, 42))


@pytest.mark.parametrize(("mode", "size"), [("decide", 6), ("commit", 6), ("after", 7)])
def test_a_crash_leaves_all_or_nothing(path: Path, mode: str, size: int) -> None:
    """Killed while deciding, between the write and its commit, and right after append returned."""
    save_signing_key(path.parent / "key.pem", KEY)
    child = start(path.parent, mode)
    output, _ = child.communicate("go\n", timeout=60)
    assert (child.returncode, output) == (9, "ready\n")
    with Ledger.open(path, KEY) as ledger:
        assert ledger.verify(PUBLIC).size == size
        assert ledger.append(approval()) == size


def test_a_failed_commit_appends_nothing(path: Path) -> None:
    """The disk is full at the moment of writing: an error that says so, and the ledger goes on as before."""
    with Ledger.open(path, KEY, clock=Clock()) as ledger:
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        head = ledger.head()

        def fill() -> None:
            nonlocal head
            for _ in range(100):
                ledger.append(approval("x" * 500))
                head = ledger.head()

        with pytest.raises(FailureError, match="full") as caught:
            fill()
        assert "free space" in caught.value.remedy
        assert ledger.verify(PUBLIC) == head
        ledger._connection.execute("PRAGMA max_page_count = 100000")
        assert ledger.append(approval()) == head.size


def test_a_ledger_held_by_another_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with Ledger.open(path, KEY, clock=Clock()) as ledger:
            assert ledger.head().size == 6
            with pytest.raises(FailureError, match="locked"):
                ledger.append(approval())
            holder.execute("ROLLBACK")
            assert ledger.append(approval()) == 6
    finally:
        holder.close()
