"""A site from its backup: whole or not at all, closed, and nothing in the backup that must not live twice."""

import io
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import backup
from client.backup import Backup, pack, read_backup
from client.evidence import collect
from client.guard import Guard
from client.identity import SiteIdentity, create_site
from client.participation import Participation
from client.state import RunFile, SiteHome, write_durable
from common import archive, messages
from common.admissible import check
from common.audit.trust import Trust
from common.audit.verify import verify
from common.errors import (
    BudgetExhaustedError,
    FailureError,
    RefusedError,
    UsageError,
    VerificationError,
    WardroundError,
)
from common.identity import key_text, public_key
from common.ledger.entries import Charge, Entry, Outcome, Restored
from common.ledger.store import Head, Ledger
from common.study import Manifest
from tests.client.federation import (
    ADDRESS,
    ALLOW_WITHOUT_DP,
    WITHOUT_DP,
    ComputedHere,
    Federation,
    Hub,
)

WORDS = "Dr. Roe: the disk was lost"
CTX = bytes(range(32))
RESTORE_AND_DIE = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from client import backup
from client.state import SiteHome
left, write = int(sys.argv[3]), backup.write_durable
def dying(*arguments):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(*arguments)
backup.write_durable = dying
found = backup.read_backup(Path(sys.argv[1]))
found.restore(SiteHome(Path(sys.argv[2])), "t: t", datetime.now(UTC))
"""


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def new(tmp_path: Path) -> SiteHome:
    return SiteHome(tmp_path / "new")


def taken(federation: Federation, number: int = 1) -> Backup:
    """A backup as it comes back from its file."""
    return Backup.from_bytes(pack(federation.sites[number], now()).to_bytes(), "it")


def entries(home: SiteHome) -> list[Entry]:
    with Ledger.open(home.ledger) as ledger:
        ledger.verify(public_key(SiteIdentity.load(home).ledger_key))
        return list(ledger.entries())


def charge(guard: Guard, manifest: Manifest, *rounds: int) -> None:
    for number in rounds:
        guard.charge(manifest, guard.check_runnable(manifest), number)


def charged(home: SiteHome, manifest: Manifest) -> list[int]:
    """The rounds of a study that the ledger has charged."""
    fields = [e.event for e in entries(home) if isinstance(e, Charge)]
    return [int(f["round"]) for f in fields if f["manifest_digest"] == manifest.digest.hex()]


def failed(federation: Federation, home: SiteHome) -> set[str]:
    """What an auditor finds wrong, but for the heads of reserved rounds, which nobody was ever shown."""
    trust = Trust(public_key(federation.hub_key), federation.roster)
    checks = verify([collect(home, now())], trust).checks
    return {check.name for check in checks if not check.passed} - {"cosignatures"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the backup --------------------------------------------------------------------------------------------


def test_a_backup_holds_the_whole_site(federation: Federation) -> None:
    home, manifest = federation.sites[1], federation.manifest()
    federation.decide(1, manifest)
    federation.receive(1, federation.manifest(name="waiting"))
    home.heads.write_bytes(b"{}")
    found = pack(home, datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC))
    assert (found.name, found.time) == ("St. Mary", "2026-03-04T05:06Z")
    assert Backup.from_bytes(found.to_bytes(), "it") == found
    kept = content(home.folder)
    assert kept.keys() - found.files.keys() == {"extract.csv"}
    assert found.files.keys() <= kept.keys()
    assert all(found.files[name] == kept[name] for name in found.files.keys() - {"ledger.db"})
    with Ledger.open(home.ledger) as ledger:
        assert found.head == ledger.head()
        assert found.head.size > 1
    # What does not exist yet is not missed.
    assert "heads.json" not in taken(federation, 2).files


def test_backups_hold_no_run_state(federation: Federation) -> None:
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    hub = Hub(federation, federation.manifest(), sites).joined()
    hub.whole_round()
    home = federation.sites[1]
    runs = RunFile(home.runs)
    state = runs.load(hub.man)
    runs.close()
    assert state is not None
    assert home.ledger_mark.exists()
    # Taken in the middle of a study, beside the agent that holds everything open.
    data = pack(home, now()).to_bytes()
    for site in sites.values():
        site.close()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names, whole = archive.namelist(), b"".join(archive.read(name) for name in archive.namelist())
    assert not any(name.startswith("run") for name in names)
    run = b"".join(path.read_bytes() for path in home.ledger_mark.parent.iterdir())
    assert state in run
    for start in range(0, len(state) - 32, 32):
        assert state[start : start + 32] not in whole or not any(state[start : start + 32])
    assert home.ledger_mark.read_bytes() not in whole


def test_a_backup_is_of_one_moment_while_the_agent_writes(federation: Federation) -> None:
    guard, ended = federation.guard(1), threading.Event()

    def agent() -> None:
        while not ended.is_set():
            guard.pause("paused", "a tester: for the test")
            guard.pause("resumed", "a tester: for the test")

    thread = threading.Thread(target=agent)
    thread.start()
    try:
        sizes = [taken(federation).head.size for _ in range(10)]
    finally:
        ended.set()
        thread.join()
        guard.close()
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1


def test_only_a_sound_and_admitted_site_is_backed_up(federation: Federation, tmp_path: Path) -> None:
    def refused(home: SiteHome) -> str:
        with pytest.raises(WardroundError) as caught:
            pack(home, now())
        return caught.value.code

    create_site(SiteHome(tmp_path / "site"), name="St. Mary", hub=ADDRESS)
    assert refused(SiteHome(tmp_path / "site")) == "site.not-admitted"
    home = federation.sites[1]
    federation.guard(1).close()
    home.tls_key.chmod(0o640)
    assert refused(home) == "identity.secret-mode"
    home.tls_key.chmod(0o600)
    good = home.policy.read_bytes()
    home.policy.write_text("[rules", encoding="utf-8")
    assert refused(home) == "settings.toml"
    home.policy.write_bytes(good)
    with sqlite3.connect(home.ledger) as connection:
        connection.executescript("DROP TRIGGER no_update; UPDATE entries SET leaf = x'00';")
    connection.close()
    assert refused(home) == "ledger.schema"
    home.ledger.write_bytes(b"not a ledger" * 1000)
    assert refused(home) == "ledger.corrupt"
    home.ledger.unlink()
    assert refused(home) == "ledger.missing"


def test_a_backup_that_could_not_be_restored_is_not_made(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(FailureError) as caught:
        pack(federation.sites[1], now())
    assert caught.value.code == "backup.size"


# -- what a backup must be to be restored --------------------------------------------------------------------


def rewritten(data: bytes, change: Callable[[dict[str, bytes]], object]) -> bytes:
    """The zip with other files in it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, found in files.items():
            archive.writestr(name, found)
    return buffer.getvalue()


def consistent(found: Backup, **files: bytes) -> bytes:
    """A backup whose digests fit, whatever is in it."""
    return replace(found, files={**found.files, **files}).to_bytes()


def forged_ledger(found: Backup, federation: Federation) -> bytes:
    """As ``found``, with the ledger of another hospital and its head."""
    other = pack(federation.sites[2], now())
    files = {**found.files, "ledger.db": other.files["ledger.db"]}
    return replace(found, files=files, head=other.head).to_bytes()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def doubled(data: bytes) -> bytes:
    buffer = io.BytesIO(data)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("site.toml", b"")
    return buffer.getvalue()


def test_damaged_backups_change_nothing(federation: Federation, new: SiteHome, tmp_path: Path) -> None:
    for number in (1, 2):
        federation.decide(number, federation.manifest((1, 2, 3)))
    found = taken(federation)
    good, facts = found.to_bytes(), "backup.json"
    study = next(name for name in found.files if name.startswith("studies/"))
    size, root = found.head
    bad: dict[str, bytes] = {
        "empty": b"",
        "no zip": b"x" * 100,
        "cut": good[:-200],
        "twice": doubled(good),
        "no facts": rewritten(good, lambda files: files.pop(facts)),
        "no keys": rewritten(good, lambda files: files.pop("keys/tls.pem")),
        "no ledger": rewritten(good, lambda files: files.pop("ledger.db")),
        "a study less": rewritten(good, lambda files: files.pop(study)),
        "changed policy": rewritten(good, lambda files: files.update({"policy.toml": b"# anything"})),
        "changed facts": rewritten(good, lambda files: files.update({facts: files[facts][:-1]})),
        "facts of a list": rewritten(good, lambda files: files.update({facts: b"[]"})),
        "another head": replace(found, head=Head(size, bytes(32))).to_bytes(),
        "a longer head": replace(found, head=Head(size + 1, root)).to_bytes(),
        "another's ledger": forged_ledger(found, federation),
        "no ledger at all": consistent(found, **{"ledger.db": b"x" * 5000}),
        "no key at all": consistent(found, **{"keys/ledger.pem": b"x"}),
        "hostile name": replace(found, name="a\nb").to_bytes(),
        "hostile time": replace(found, time="yesterday").to_bytes(),
    }
    for name in (
        "../evil", "/etc/evil", "run/runs.db", "run/ledger.mark", "keys/other.pem", "studies/x.study",
        "studies/../../evil", "extract.csv", "keys/",
    ):  # fmt: skip
        bad[name] = consistent(found, **{name: b""})
    for at in range(0, len(good), max(1, len(good) // 150)):
        changed = flipped(good, at)
        try:
            # Flags and times of the container may change; then what is in it is the same, to the byte.
            assert Backup.from_bytes(changed, "it") == found
        except VerificationError:
            bad[f"byte {at}"] = changed
    assert len(bad) > 100
    file = tmp_path / "backup.zip"
    for what, data in bad.items():
        file.write_bytes(data)
        with pytest.raises(VerificationError) as caught:
            read_backup(file).restore(new, WORDS, now())
        assert caught.value.code.split(".")[0] in ("restore", "encoding"), what
        assert not new.folder.exists(), what
    file.write_bytes(good)
    assert read_backup(file) == found


def test_a_backup_that_unpacks_too_large_is_not_unpacked(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = taken(federation)
    bomb = consistent(found, **{"pins.json": bytes(10_000_000)})
    assert len(bomb) < 100_000
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(VerificationError):
        Backup.from_bytes(bomb, "it")
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 100)
    (tmp_path / "b.zip").write_bytes(bytes(101))
    with pytest.raises(VerificationError):
        read_backup(tmp_path / "b.zip")


def test_a_backup_is_never_printed(federation: Federation) -> None:
    assert "PRIVATE" in str(taken(federation).files)
    assert "PRIVATE" not in repr(taken(federation)) + str(taken(federation))


# -- the restored site -----------------------------------------------------------------------------------------


def test_a_restored_site_is_the_same_site(federation: Federation, new: SiteHome) -> None:
    federation.decide(1, federation.manifest())
    found, before = taken(federation), federation.entries(1)
    home = federation.sites[1]
    kept = content(home.folder)
    shutil.rmtree(home.folder)
    found.restore(new, WORDS, now())
    back = content(new.folder)
    assert {name: back[name] for name in back if name != "ledger.db"} == {
        name: kept[name] for name in kept if name not in ("ledger.db", "extract.csv")
    }
    assert entries(new)[: len(before)] == before
    identity = SiteIdentity.load(new)
    assert (identity.id, identity.name) == (1, "St. Mary")
    for path in (new.folder, *new.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o644 if path == new.request else 0o600), path
    assert list((new.folder / "run").iterdir()) == []


def test_restored_sites_are_closed(federation: Federation, new: SiteHome) -> None:
    manifest, other = federation.manifest(), federation.manifest(name="other", training__rounds=2)
    for study in (manifest, other):
        federation.decide(1, study)
    guard = federation.guard(1)
    charge(guard, manifest, 1, 2, 4)
    guard.released(manifest.digest, 4, 1, CTX)
    found = taken(federation)
    # What the backup lacks: it may have been spent, and is.
    charge(guard, manifest, 5, 6)
    charge(guard, other, 1)
    before = guard.budget()
    guard.close()
    done = found.restore(new, WORDS, now())
    assert done.charged
    assert done.rounds == {manifest.digest.hex(): 3, other.digest.hex(): 5}
    assert sorted(charged(new, manifest)) == [1, 2, 3, 4, 5, 6]
    assert sorted(charged(new, other)) == [1, 2, 3, 4, 5]
    last = entries(new)[-1]
    assert isinstance(last, Restored)
    assert last.reason == WORDS
    # Nothing is charged any more: not by the guard, not by anything that holds the key.
    restored = Guard(new, SiteIdentity.load(new), now)
    spent = restored.budget()
    assert spent.charges == 11
    assert spent.epsilon_t >= before.epsilon_t
    third = federation.manifest(name="third")
    restored.decide(third, federation.verified_roster, "approved", WORDS)
    for study, number in ((manifest, 7), (other, 6), (third, 1)):
        with pytest.raises((RefusedError, BudgetExhaustedError)):
            restored.charge(study, restored.check_runnable(study), number)
        # Said before anything begins: when a person approves it, and when the hub asks.
        with pytest.raises(RefusedError) as early:
            restored.check_budget(study, restored.check_runnable(study), number)
        assert early.value.code == "guard.restored"
    restored.close()
    with Ledger.open(new.ledger, SiteIdentity.load(new).ledger_key) as ledger:
        size = ledger.head().size
        for study in (manifest, third):
            event = check(study, None).event(restored.register_id, 9, 1, os.urandom(16).hex())
            with pytest.raises(RefusedError) as caught:
                ledger.append(
                    Charge(
                        actor=key_text(public_key(SiteIdentity.load(new).ledger_key)), event=event.to_fields()
                    )
                )
            assert caught.value.code == "ledger.restored"
        assert ledger.head().size == size


def test_every_open_charge_has_an_outcome(federation: Federation, new: SiteHome) -> None:
    manifest = federation.manifest()
    federation.decide(1, manifest)
    guard = federation.guard(1)
    charge(guard, manifest, 1)
    guard.released(manifest.digest, 1, 1, CTX)
    guard.settle(manifest.digest, "completed", CTX)
    charge(guard, manifest, 2)
    guard.released(manifest.digest, 2, 1, CTX)
    guard.released(manifest.digest, 2, 2, bytes(32))
    guard.close()
    taken(federation).restore(new, WORDS, now())
    events = {e.event_id: int(e.event["round"]) for e in entries(new) if isinstance(e, Charge)}
    said: dict[int, list[tuple[str, str, int, str | None]]] = {n: [] for n in sorted(events.values())}
    for entry in entries(new):
        if isinstance(entry, Outcome):
            said[events[entry.event_id]].append((entry.reason, entry.state, entry.attempt, entry.ctx))
    assert [reason for reason, *_ in said[1]] == ["upload_started", "completed"]
    assert said[2][-1] == ("site_restored", "released", 2, bytes(32).hex())
    for number in (3, 4, 5, 6):
        assert said[number] == [("site_restored", "charged", 1, None)]


def test_what_cannot_have_been_charged_is_not(federation: Federation, new: SiteHome) -> None:
    """Denied, expired, unknown and whole studies, and rounds that the caps never admitted."""
    soon = (now() + timedelta(minutes=2)).strftime("%Y-%m-%dT%H:%MZ")
    whole = federation.manifest(training__rounds=1, aggregation__rounds_max=2)
    denied, expired = federation.manifest(name="denied"), federation.manifest(name="expired", expires=soon)
    gone, large = federation.manifest(name="gone"), federation.manifest(name="large", training__rounds=500)
    for study in (whole, denied, expired, gone, large):
        federation.decide(1, study)
    federation.decide(1, denied, "denied")
    federation.receive(1, federation.manifest(name="waiting"))
    federation.sites[1].study(gone.digest.hex()).unlink()
    guard = federation.guard(1)
    charge(guard, whole, 1, 2)
    guard.close()
    found = taken(federation)
    later = now() + timedelta(minutes=3)
    guard = federation.guard(1, later)
    affordable = guard.rounds_left(large, check(large, None))
    guard.close()
    done = found.restore(new, WORDS, later)
    assert done.rounds == {large.digest.hex(): affordable}
    assert found.plan(now()).rounds[expired.digest.hex()] == 6
    assert charged(new, large) == list(range(1, affordable + 1))
    # An auditor finds every charge as the approved studies and the caps allow it.
    assert failed(federation, new) == {"studies"}


def test_a_study_that_is_not_the_approved_one_is_not_charged(federation: Federation, new: SiteHome) -> None:
    damaged, swapped = federation.manifest(), federation.manifest(name="swapped")
    for study in (damaged, swapped):
        federation.decide(1, study)
    home, other = federation.sites[1], federation.manifest(name="other")
    home.study(damaged.digest.hex()).write_bytes(b"damaged")
    home.study(swapped.digest.hex()).write_bytes(federation.document(other))
    # It can be restored all the same, and is closed.
    assert taken(federation).restore(new, WORDS, now()).reserved == ()
    assert isinstance(entries(new)[-1], Restored)


def test_a_study_without_privacy_is_charged_last_and_one_is_enough(
    template: Path, tmp_path: Path, new: SiteHome
) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    plain = {"privacy": WITHOUT_DP, "aggregation__minimum_hospitals": 3}
    first, second = federation.manifest(**plain), federation.manifest((1, 2, 4), **plain)
    private = federation.manifest()
    for study in (first, second, private):
        federation.decide(1, study)
    done = taken(federation).restore(new, WORDS, now())
    assert done.rounds == {private.digest.hex(): 6, first.digest.hex(): 6}
    assert failed(federation, new) == set()
    guard = Guard(new, SiteIdentity.load(new), now)
    assert guard.budget().epsilon_t == float("inf")
    guard.close()


def test_a_paused_site_is_closed_without_a_charge(federation: Federation, new: SiteHome) -> None:
    manifest = federation.manifest()
    federation.decide(1, manifest)
    guard = federation.guard(1)
    charge(guard, manifest, 1)
    guard.pause("paused", "a tester: for the test")
    guard.close()
    done = taken(federation).restore(new, WORDS, now())
    assert (dict(done.rounds), done.charged) == ({manifest.digest.hex(): 5}, False)
    assert charged(new, manifest) == [1]
    assert [type(entry) for entry in entries(new)[-2:]] == [Outcome, Restored]
    # Resuming it opens nothing.
    guard = Guard(new, SiteIdentity.load(new), now)
    guard.pause("resumed", "a tester: for the test")
    with pytest.raises(RefusedError):
        guard.charge(manifest, guard.check_runnable(manifest), 2)
    guard.close()


def test_a_restored_site_can_be_backed_up_and_restored_again(
    federation: Federation, new: SiteHome, tmp_path: Path
) -> None:
    manifest = federation.manifest()
    federation.decide(1, manifest)
    taken(federation).restore(new, WORDS, now())
    again = SiteHome(tmp_path / "again")
    done = Backup.from_bytes(pack(new, now()).to_bytes(), "it").restore(again, "Dr. Doe: moved", now())
    assert (done.reserved, done.charged) == ((), False)
    assert entries(again)[:-1] == entries(new)
    assert [e.reason for e in entries(again) if isinstance(e, Restored)] == [WORDS, "Dr. Doe: moved"]


def test_a_site_that_never_charged_is_closed_too(federation: Federation, new: SiteHome) -> None:
    federation.guard(1).close()
    taken(federation).restore(new, WORDS, now())
    assert entries(new)[:-1] == federation.entries(1)
    assert isinstance(entries(new)[-1], Restored)
    untouched = SiteHome(new.folder.parent / "untouched")
    taken(federation, 2).restore(untouched, WORDS, now())
    assert [type(entry) for entry in entries(untouched)] == [Restored]
    # Its register was never opened, and is not from now on.
    with pytest.raises(RefusedError) as caught:
        Guard(untouched, SiteIdentity.load(untouched), now)
    assert caught.value.code == "guard.register"


def test_its_open_runs_stay_closed(federation: Federation, new: SiteHome) -> None:
    manifest = federation.manifest()
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    hub = Hub(federation, manifest, sites).joined()
    found = taken(federation)
    hub.whole_round()
    sites[1].close()
    found.restore(new, WORDS, now())
    shutil.copy(federation.sites[1].folder / "extract.csv", new.folder)
    sites[1] = Participation(new, computation=ComputedHere)
    assert not hub.ask(1, messages.KEYS).available
    assert not hub.ask(1, messages.STUDY, document=federation.document(manifest)).available
    assert hub.ready(hub.start(), 1) == {1: False}
    for site in sites.values():
        site.close()


# -- refusals and crashes ----------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(federation: Federation, new: SiteHome, tmp_path: Path) -> None:
    found = taken(federation)
    new.folder.mkdir(mode=0o755)
    found.restore(new, WORDS, now())
    before = content(new.folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes").write_text("mine")
    for folder in (new.folder, other, federation.sites[2].folder):
        with pytest.raises(UsageError) as caught:
            found.restore(SiteHome(folder), WORDS, now())
        assert caught.value.code == "restore.folder"
    assert content(new.folder) == before
    assert content(other) == {"notes": b"mine"}


def test_words_and_a_clock_that_the_ledger_refuses_change_nothing(
    federation: Federation, new: SiteHome
) -> None:
    federation.guard(1).close()
    found = taken(federation)
    with pytest.raises(UsageError) as unsaid:
        found.restore(new, "a\nb", now())
    assert unsaid.value.code == "ledger.reason"
    with pytest.raises(RefusedError) as caught:
        found.restore(new, WORDS, now() - timedelta(days=1))
    assert caught.value.code == "ledger.clock"
    assert not new.folder.exists()


def usable(home: SiteHome) -> list[Callable[[], object]]:
    """What the commands begin with."""
    return [
        lambda: SiteIdentity.load(home),
        lambda: Participation(home, computation=ComputedHere),
        lambda: pack(home, now()),
    ]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_restored_sites_do_not_start(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    federation.decide(1, federation.manifest())
    found = taken(federation)
    writes = len(found.files)
    assert writes > 10
    for number in range(writes):
        home, left = SiteHome(tmp_path / f"half{number}"), [number]

        def failing(path: Path, data: bytes, mode: int, left: list[int] = left) -> None:
            if not left[0]:
                raise error
            left[0] -= 1
            write_durable(path, data, mode)

        monkeypatch.setattr(backup, "write_durable", failing)
        with pytest.raises((FailureError, KeyboardInterrupt)) as caught:
            found.restore(home, WORDS, now())
        if isinstance(caught.value, FailureError):
            assert "Remove that folder" in caught.value.remedy
        monkeypatch.undo()
        for use in usable(home):
            with pytest.raises(UsageError) as unusable:
                use()
            assert unusable.value.code == "settings.missing"
        # Should somebody put settings there by hand: the ledger is closed, or not there.
        if home.ledger.exists():
            with Ledger.open(home.ledger) as ledger:
                assert isinstance(ledger.entries()[-1], Restored)
        if any(home.folder.rglob("*.*")):
            with pytest.raises(UsageError):
                found.restore(home, WORDS, now())
            shutil.rmtree(home.folder)
            found.restore(home, WORDS, now())
            SiteIdentity.load(home)


@pytest.mark.parametrize("write", [0, 5, -1])
def test_a_restore_that_is_killed_leaves_no_site(federation: Federation, tmp_path: Path, write: int) -> None:
    federation.guard(1).close()
    found = taken(federation)
    file, home = tmp_path / "backup.zip", SiteHome(tmp_path / "half")
    file.write_bytes(found.to_bytes())
    number = write % len(found.files)
    done = subprocess.run(
        [sys.executable, "-c", RESTORE_AND_DIE, str(file), str(home.folder), str(number)],
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(content(home.folder)) == number
    with pytest.raises(UsageError) as caught:
        SiteIdentity.load(home)
    assert caught.value.code == "settings.missing"


def test_the_temporary_copy_is_gone_and_held_no_key(
    federation: Federation, new: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is closed in a folder of its own: nothing of it stays, whatever happens."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    found = taken(federation)
    seen: list[str] = []
    monkeypatch.setattr(
        backup, "_snapshot", lambda path: seen.extend(content(path.parent)) or found.files["ledger.db"]
    )
    found.restore(new, WORDS, now())
    assert {name.partition("-")[0] for name in seen} == {"ledger.db"}
    assert list(place.iterdir()) == []

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FailureError) as caught:
        found.plan(now())
    assert caught.value.code == "backup.temporary"
