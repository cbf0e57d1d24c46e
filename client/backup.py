"""A site's folder as one file, and back again: closed, because what a backup lacks may have been spent.

Source: PRIVACY "Registers, budget, filter" (restored state); PROTOCOL I10. Rules: secrets of running studies
and the ledger's mark are in no backup; a backup is checked whole before anything is written; the restored
ledger is closed before it stands in its place; the settings, without which a folder is no site, come last.
"""

import hashlib
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.identity import SiteIdentity, load_policy
from client.state import SiteHome, write_durable
from client.studies import StudyFolder
from common import archive
from common.admissible import Admitted, check
from common.audit.spending import cap_of
from common.encoding import canonical_json, parse_canonical_json
from common.errors import FailureError, UsageError, VerificationError, WardroundError
from common.identity import key_text, name_problem, public_key, read_private_pem, sync_folder
from common.ledger import entries as leaves
from common.ledger.entries import Approval, Charge, Entry, Opened, Outcome, Pause, Restored
from common.ledger.overrides import standing
from common.ledger.store import Head, Ledger
from common.privacy.events import Event
from common.privacy.filter import rounds_left
from common.run import read_study_document
from common.version import SOFTWARE_VERSION

SCHEMA: Final = 1
FACTS: Final = "backup.json"

_STUDY: Final = re.compile(r"studies/([0-9a-f]{64})\.study")
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}Z")
_HERE: Final = SiteHome(Path())
_KEY, _LEDGER = (path.as_posix() for path in (_HERE.ledger_key, _HERE.ledger))
_OPTIONAL: Final = {path.as_posix() for path in (_HERE.pins, _HERE.heads)}
_SETTINGS: Final = _HERE.settings.as_posix()
_KEYS: Final = (_HERE.tls_key, _HERE.protocol_key, _HERE.split_secret)
_REQUIRED: Final = {_KEY, _LEDGER, _SETTINGS} | {
    path.as_posix() for path in (_HERE.policy, _HERE.request, _HERE.admission, *_KEYS)
}
_OPEN_TO_OTHERS: Final = {_HERE.request.as_posix()}


@dataclass(frozen=True, slots=True)
class Closing:
    """What a restore charges: ``reserved`` holds an event for each round of an open study not charged yet.

    ``charged`` is false where the ledger takes no charge, because the site was paused, or restored already,
    when it was backed up: it is closed all the same.
    """

    reserved: tuple[Event, ...]
    charged: bool

    @property
    def rounds(self) -> Mapping[str, int]:
        """The number of reserved rounds by the study's digest."""
        return Counter(event.manifest_digest for event in self.reserved)


@dataclass(frozen=True, slots=True)
class Backup:
    """A site's files by their path in its folder, private keys among them.

    ``name`` is the hospital's; ``time`` when the backup was made (UTC, to the minute); ``head`` its ledger's.
    """

    name: str
    time: str
    head: Head
    files: Mapping[str, bytes] = field(repr=False)

    def to_bytes(self) -> bytes:
        """The zip file, to be kept like a private key."""
        facts = {
            "schema": SCHEMA,
            "name": self.name,
            "time": self.time,
            "version": SOFTWARE_VERSION,
            "ledger": {"size": self.head.size, "root": self.head.root.hex()},
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()},
        }
        return archive.pack({FACTS: canonical_json(facts), **self.files})

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Backup":
        """Read to_bytes strictly; ``what`` names the file.

        Guarantee: damaged_backups_change_nothing - names, sizes, digests, the ledger and its head are checked
        here, before anything is written.
        Raises: VerificationError.
        """
        try:
            files = archive.unpack(data, _REQUIRED | {FACTS}, _STUDY, _OPTIONAL)
        except VerificationError as error:
            raise _refused(what, error.problem) from error
        facts: Any = parse_canonical_json(files.pop(FACTS), f"{FACTS} of {what}")
        try:
            schema, name, time, version, ledger, digests = (
                facts.pop(key) for key in ("schema", "name", "time", "version", "ledger", "files")
            )
            sound = (type(schema), schema) == (int, SCHEMA) and not facts and isinstance(version, str)
            sound = sound and not name_problem(name, "name") and bool(_TIME.fullmatch(time))
            sound = sound and set(ledger) == {"size", "root"} and type(ledger["size"]) is int
            if not sound or digests.keys() != files.keys():
                raise ValueError("fields")
            head = Head(ledger["size"], bytes.fromhex(ledger["root"]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _refused(what, f"{FACTS} does not have exactly its fields") from error
        for path, content in files.items():
            if hashlib.sha256(content).hexdigest() != digests[path]:
                raise _refused(what, f"{path} in it is not the file that was put there")
        backup = cls(name, time, head, files)
        try:
            with backup._staged() as (staged, _):
                same = staged.head() == head
        except VerificationError as error:
            raise _refused(what, f"its ledger does not verify ({error.code})") from error
        if not same:
            raise _refused(what, "its ledger has another head than was noted")
        return backup

    @property
    def _ledger_key(self) -> Ed25519PrivateKey:
        try:
            key = read_private_pem(self.files[_KEY])
        except ValueError as error:
            raise _refused("the backup", f"{_KEY} in it holds no readable private key") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise _refused("the backup", f"{_KEY} in it is not an Ed25519 key")
        return key

    @contextmanager
    def _staged(self, now: datetime | None = None) -> Iterator[tuple[Ledger, Path]]:
        """The ledger in a folder of its own, open; no key is written there."""
        with TemporaryDirectory(prefix="wardround-") as folder:
            path = Path(folder) / _LEDGER
            try:
                path.write_bytes(self.files[_LEDGER])
            except OSError as error:
                problem = f"{folder} cannot be written: {error.strerror}"
                remedy = "Free some space, or set TMPDIR."
                raise FailureError("backup.temporary", problem, remedy=remedy) from error
            with Ledger.open(path, self._ledger_key, clock=lambda: now or datetime.now(UTC)) as ledger:
                yield ledger, path

    def plan(self, now: datetime) -> Closing:
        """What ``restore`` would write into the ledger."""
        with self._staged() as (ledger, _):
            return closing_of(ledger.entries(), self._studies(), now)

    def restore(self, home: SiteHome, words: str, now: datetime) -> Closing:
        """Write the site into a folder that does not exist or is empty, with its ledger closed.

        ``words`` are the person's name and reason; ``now`` (aware) is the time of the entries.

        Guarantee: restored_sites_are_closed - the reservation of every open study is charged in full, as far
        as the caps admit it, and no charge can follow, whatever the policy says.
        Guarantee: half_restored_sites_do_not_start - what a crash at any moment leaves is a whole, closed
        site, or none that a command takes for one; a second try there is refused unless it is empty.
        Raises: UsageError for a folder in use or words that cannot stand in a ledger; RefusedError when the
        clock is behind the ledger; FailureError when the folder cannot be written.
        """
        check_empty(home)
        leaves.check_reason(words)
        with self._staged(now) as (ledger, path):
            done = closing_of(ledger.entries(), self._studies(), now)
            _close(ledger, key_text(public_key(self._ledger_key)), done, words)
            closed = {**self.files, _LEDGER: _snapshot(path)}
        try:
            home.create_folders()
            sync_folder(home.folder.parent)
            for name in sorted(closed, key=lambda name: name == _SETTINGS):
                mode = 0o644 if name in _OPEN_TO_OTHERS else 0o600
                write_durable(home.folder / name, closed[name], mode)
        except OSError as error:
            problem = f"{home.folder} cannot be written: {error.strerror}"
            remedy = "Remove that folder, then restore again: the backup holds all of it."
            raise FailureError("restore.write", problem, remedy=remedy) from error
        return done

    def _studies(self) -> dict[str, bytes]:
        found = ((_STUDY.fullmatch(name), data) for name, data in self.files.items())
        return {match[1]: data for match, data in found if match}


def pack(home: SiteHome, now: datetime) -> Backup:
    """The backup of an admitted site, also while its agent runs. ``now`` (aware) is noted in it.

    Guarantee: backups_hold_no_run_state - nothing of the run folder: who had it could mask a round twice, or
    make an older ledger pass for the newest.
    Raises: as SiteIdentity.load, load_policy and Ledger.open; FailureError for a folder that is too large.
    """
    identity = SiteIdentity.load(home)
    load_policy(home)
    names = _REQUIRED - {_LEDGER} | {name for name in _OPTIONAL if (home.folder / name).exists()}
    files = {name: (home.folder / name).read_bytes() for name in sorted(names)}
    # After the heads and before the studies, so that it is never behind the former nor ahead of the latter.
    with Ledger.open(home.ledger, identity.ledger_key) as ledger:
        head, files[_LEDGER] = ledger.head(), _snapshot(home.ledger)
        while (later := ledger.head()) != head:
            head, files[_LEDGER] = later, _snapshot(home.ledger)
    for found in StudyFolder(home).digests():
        files[f"studies/{found}.study"] = home.study(found).read_bytes()
    if sum(map(len, files.values())) > archive.MAX_TOTAL_BYTES:
        problem = f"{home.folder} holds more than a backup of {archive.MAX_TOTAL_BYTES} bytes"
        raise FailureError("backup.size", problem)
    return Backup(identity.name, leaves.utc_minute(now), head, files)


def read_backup(path: Path) -> Backup:
    """Read a backup file. Raises UsageError when it cannot be read, VerificationError when it is none."""
    try:
        if path.stat().st_size > archive.MAX_TOTAL_BYTES:
            raise _refused(str(path), "it is larger than any backup")
        data = path.read_bytes()
    except OSError as error:
        remedy = "Give the path of a file that 'wardround site backup' wrote."
        raise UsageError("restore.file", f"{path} cannot be read: {error.strerror}", remedy=remedy) from error
    return Backup.from_bytes(data, str(path))


def check_empty(home: SiteHome) -> None:
    """Refuse a folder that holds anything. Raises UsageError."""
    remedy = "Choose a new folder. Only what an interrupted restore left, without site.toml, may be removed."
    try:
        if home.folder.exists() and any(home.folder.iterdir()):
            raise UsageError("restore.folder", f"{home.folder} is not empty", remedy=remedy)
    except OSError as error:
        problem = f"{home.folder} cannot be read: {error.strerror}"
        raise UsageError("restore.folder", problem, remedy=remedy) from error


# -- closing the ledger --------------------------------------------------------------------------------------


def closing_of(entries: Sequence[Entry], studies: Mapping[str, bytes], now: datetime) -> Closing:
    """What may have been charged after these entries; ``studies`` are the documents by digest in hex.

    Every round up to rounds_max of every study that is approved and has not expired, as far as the filter
    admits it: what it does not admit was not charged after the backup either. A study that expired since then
    takes no charge any more; what it spent is not known here, and the register is closed all the same.
    """
    pauses = [entry.decision for entry in entries if isinstance(entry, Pause)]
    charged = pauses[-1:] != ["paused"]
    if not any(isinstance(entry, Opened) for entry in entries):
        return Closing((), charged)
    opened = standing(entries)
    cap, charged = cap_of(opened), charged and not opened.closed
    history = [Event.from_fields(fields) for fields in leaves.events(entries, opened.register_id)]
    past = len(history)
    # A charge without differential privacy ends all others, so those with it come first.
    for admitted, rounds_max in sorted(_open(entries, studies, now), key=lambda found: not found[0].private):
        name = admitted.manifest_digest.hex()
        done = {event.round for event in history if event.manifest_digest == name}
        left = [number for number in range(1, rounds_max + 1) if number not in done]
        events = [admitted.event(opened.register_id, n, 1, os.urandom(16).hex()) for n in left]
        if admitted.private:
            events = events[: rounds_left(history, events[0], cap)] if events else []
        elif any(event.kind == "no_dp" and event.manifest_digest != name for event in history):
            events = []  # nothing can be added to an infinite epsilon
        history += events
    return Closing(tuple(history[past:]), charged)


def _open(
    entries: Sequence[Entry], studies: Mapping[str, bytes], now: datetime
) -> Iterator[tuple[Admitted, int]]:
    """The studies whose latest decision is a yes and which can still be run, with their rounds_max."""
    decisions = {entry.manifest: entry.decision for entry in entries if isinstance(entry, Approval)}
    for name, decision in decisions.items():
        if decision != "approved" or name not in studies:
            continue
        # What does not verify or cannot be run here was not run with this file either.
        with suppress(WardroundError):
            manifest = read_study_document(studies[name])[0].verify()
            if manifest.digest.hex() == name:
                yield check(manifest, leaves.utc_minute(now)), manifest.study.aggregation.rounds_max


def _close(ledger: Ledger, actor: str, planned: Closing, words: str) -> None:
    for event in planned.reserved if planned.charged else ():
        ledger.append(Charge(actor=actor, event=event.to_fields()))
    last = {said.event_id: said for said in ledger.entries() if isinstance(said, Charge | Outcome)}
    here: dict[str, Any] = {"actor": actor, "reason": "site_restored"}
    for event_id, said in last.items():
        if isinstance(said, Charge):
            ledger.append(Outcome(event_id=event_id, state="charged", attempt=1, ctx=None, **here))
        elif said.reason == "upload_started":
            upload = said.model_dump(include={"state", "attempt", "ctx"})
            ledger.append(Outcome(event_id=event_id, **upload, **here))
    ledger.append(Restored(actor=actor, reason=words))


# -- files -------------------------------------------------------------------------------------------------


def _snapshot(ledger: Path) -> bytes:
    """One moment of a ledger's file, with what stands in its write-ahead log; writers go on meanwhile."""
    try:
        with (
            closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=rw", uri=True)) as source,
            closing(sqlite3.connect(":memory:")) as copy,
        ):
            source.backup(copy)
            return copy.serialize()
    except sqlite3.Error as error:
        problem = f"the ledger {ledger} cannot be copied: {error}"
        remedy = "Check that the file is there and sound."
        raise FailureError("backup.ledger", problem, remedy=remedy) from error


def _refused(what: str, problem: str) -> VerificationError:
    remedy = "Take another backup; nothing was written."
    return VerificationError("restore.backup", f"{what} is no backup of a site: {problem}", remedy=remedy)
