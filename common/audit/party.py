"""One party's evidence, read: its ledger, the studies that it names, and the heads that were cosigned.

Source: DESIGN "Ledger"; RFC 6962; c2sp.org/tlog-checkpoint; PROTOCOL L1, L2. Rules: everything here concerns
one evidence file and the trusted keys; a problem names the entry, the study or the party; what does not
verify is not used by later checks, whatever stands in the file.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar, get_args

from common.admissible import Admitted, check
from common.audit.evidence import Evidence
from common.audit.trust import Trust
from common.encoding import digest
from common.errors import RefusedError, UsageError, VerificationError, WardroundError
from common.identity import key_text
from common.ledger.entries import Approval, Charge, Entry, HubEntry, Submission, decode
from common.ledger.history import History
from common.ledger.notes import Checkpoint, note_of, open_note, origin_of, read_checkpoint
from common.ledger.tree import Frontier, leaf_hash
from common.roster import Member, Roster
from common.run import read_study_document
from common.secagg import records
from common.secagg.records import Head
from common.study import Manifest
from common.witness import HUB, Offer, Witness

HUB_NAME: Final = "hub"

E = TypeVar("E", bound=Entry)

Study = tuple[Manifest, Roster, Admitted | None]
Studies = Mapping[str, Study]
Roots = Mapping[int, bytes]
"""The roots of one ledger by its size; a size that it never had is absent."""

_RUNNABLE: Final = "every study can be run"
_HUB_ENTRIES: Final = get_args(HubEntry)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of ``audit verify``.

    ``party`` is a hospital's name, "hub", or empty for all; ``name`` a slug; ``detail`` one sentence: what
    was checked, or what is wrong and where.
    """

    party: str
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Party:
    """One evidence file, read. ``id`` 0 is the hub.

    ``entries`` as far as they are sound; ``checkpoint`` None when it is not signed by the trusted key;
    ``studies`` by manifest digest in hex, those that verify, Admitted None for what cannot be run; ``seen``
    the last heads of others' ledgers; ``cosigned`` the own head that others cosigned last.
    """

    id: int
    name: str
    evidence: Evidence
    entries: tuple[Entry, ...]
    checkpoint: Checkpoint | None
    studies: Studies
    seen: Mapping[int, Head] = field(default_factory=dict)
    cosigned: Offer | None = None

    def of(self, kind: type[E]) -> list[E]:
        """The entries of one kind, in order."""
        return [entry for entry in self.entries if isinstance(entry, kind)]


def checked(party: str, name: str, good: str, rule: Callable[[], str]) -> Check:
    """The check that ``rule`` makes: it returns or raises what is wrong; otherwise ``good`` is said."""
    try:
        problem = rule()
    except WardroundError as error:
        problem = error.problem
    return Check(party, name, not problem, problem or good)


def read_party(evidence: Evidence, trust: Trust) -> tuple[Party, list[Check]]:
    """One evidence file, and the checks of its form and of the signatures in it.

    Guarantee: hostile_evidence_never_raises - whatever stands in the file, it becomes a failed check.
    """
    entries, wrong_leaf = read_entries(evidence)
    studies, wrong_study = _read_studies(evidence, trust, entries)
    checkpoint, wrong_head = _read_head(evidence, trust)
    seen, cosigned, wrong_heads = _read_heads(evidence)
    known = {HUB: HUB_NAME} | {member.id: member.name for member in trust.roster.members}
    name = known.get(evidence.party, evidence.name)
    party = Party(evidence.party, name, evidence, entries, checkpoint, studies, seen, cosigned)
    whole = f"{len(evidence.leaves)} entries decode and follow each other"
    others = f"heads of others, each signed by its owner: {len(seen)}"
    own_roster = partial(evidence.roster.verify, trust.hub_key)
    table: tuple[tuple[str, str, Callable[[], str]], ...] = (
        ("identity", "it is this party of the trusted roster", lambda: _identity(evidence, trust, known)),
        ("roster", "its roster agrees with the trusted one", lambda: replaced(own_roster(), trust.roster)),
        ("leaves", whole, lambda: wrong_leaf),
        ("actor", "every entry was written under the trusted ledger key", lambda: _actor(party, trust)),
        ("head-signature", "the head is signed by the trusted ledger key", lambda: wrong_head),
        ("studies", f"all of its studies are there and signed: {len(studies)}", lambda: wrong_study),
        ("admissible", _admissibility(studies), lambda: _admissible(party)),
        ("heads", others, lambda: wrong_heads or _seen(party, trust)),
    )
    return party, [checked(name, slug, good, rule) for slug, good, rule in table]


def read_entries(evidence: Evidence) -> tuple[tuple[Entry, ...], str]:
    """The entries up to the first that does not decode or may not follow, and what is wrong with that one."""
    history, entries = History(), list[Entry]()
    for seq, leaf in enumerate(evidence.leaves):
        try:
            entry = decode(leaf)
            history.check(entry)
        except (VerificationError, RefusedError) as error:
            return tuple(entries), f"entry {seq}: {error.problem}"
        if isinstance(entry, _HUB_ENTRIES) != (evidence.party == HUB):
            return tuple(entries), f"entry {seq} is not one of this kind of party"
        history.add(entry)
        entries.append(entry)
    return tuple(entries), ""


def roots(leaves: Sequence[bytes], sizes: Iterable[int]) -> Roots:
    """The root of the first ``size`` leaves, for each size that there is, in one pass."""
    wanted, frontier, found = set(sizes), Frontier(), dict[int, bytes]()
    for leaf in (None, *leaves):
        if leaf is not None:
            frontier = frontier.append(leaf_hash(leaf))
        if frontier.size in wanted:
            found[frontier.size] = frontier.root()
    return found


def read_head(note: str, public: bytes) -> Checkpoint:
    """The checkpoint of a ledger, as the raw ledger key ``public`` signed it; other lines are not allowed.

    Raises: VerificationError.
    """
    origin = origin_of(public)
    body = open_note(note, origin, public)
    checkpoint = read_checkpoint(body)
    try:
        signature = base64.b64decode(note.rpartition(" ")[2].encode("utf-8"))[4:]
    except ValueError:
        signature = b""
    # Of base64 the last character has spare bits: only what would be written again is read.
    if checkpoint.origin != origin or note_of(body, origin, public, signature) != note:
        raise VerificationError("audit.head", "the head is not in the only form that it is written in")
    return checkpoint


def studied(entry: Entry) -> str:
    """The digest in hex of the manifest that an entry is about, empty for none."""
    if isinstance(entry, Charge):
        return str(entry.event.get("manifest_digest", ""))
    return str(getattr(entry, "manifest", ""))


def named_studies(entries: Iterable[Entry]) -> Iterator[tuple[int, str]]:
    """(entry number, manifest digest) of each entry that decides on, submits or charges a study."""
    for entry in entries:
        approved = isinstance(entry, Approval) and entry.decision == "approved"
        if approved or isinstance(entry, Charge | Submission):
            yield entry.seq, studied(entry)


def replaced(roster: Roster, trusted: Roster) -> str:
    """Which member ``roster`` and ``trusted`` contradict each other about; empty when none."""
    known = {member.id: member for member in trusted.members}
    taken = {mark: member.id for member in trusted.members for mark in _marks(member)}
    for member in roster.members:
        if member.id in known and member != known[member.id]:
            return f"site {member.id} has another name or other keys than in the trusted roster"
        if any(taken.get(mark, member.id) != member.id for mark in _marks(member)):
            return f"site {member.id} has the name or a key of another site of the trusted roster"
    return ""


def _marks(member: Member) -> tuple[str | bytes, ...]:
    """What no two hospitals share."""
    return member.name.lower(), member.protocol_key, member.ledger_key


def _identity(evidence: Evidence, trust: Trust, known: Mapping[int, str]) -> str:
    if evidence.party not in known:
        return f"the trusted roster has no site {evidence.party}"
    if evidence.name != known[evidence.party]:
        return f"the evidence calls it {evidence.name}, which is not its name in the trusted roster"
    return "" if evidence.hub_key == trust.hub_key else "it names another hub key than the trusted one"


def _actor(party: Party, trust: Trust) -> str:
    key = key_text(trust.ledger_key(party.id))
    for entry in party.entries:
        if entry.actor != key:
            return f"entry {entry.seq} was written under another key: it is not of this ledger"
    return ""


def _read_head(evidence: Evidence, trust: Trust) -> tuple[Checkpoint | None, str]:
    try:
        return read_head(evidence.head, trust.ledger_key(evidence.party)), ""
    except VerificationError as error:
        return None, error.problem


def _read_studies(evidence: Evidence, trust: Trust, entries: Iterable[Entry]) -> tuple[Studies, str]:
    studies, problem = dict[str, Study](), ""
    for name, data in evidence.studies.items():
        try:
            studies[name] = _read_study(name, data, evidence.party, trust)
        except (VerificationError, UsageError) as error:
            problem = problem or f"study {name[:12]}: {error.problem}"
    if problem:
        return studies, problem
    absent = next((found for found in named_studies(entries) if found[1] not in studies), None)
    return studies, f"the study {absent[1][:12]} of entry {absent[0]} is not there" if absent else ""


def _read_study(name: str, data: bytes, party: int, trust: Trust) -> Study:
    signed, signed_roster = read_study_document(data)
    if digest("manifest", signed.manifest_bytes).hex() != name:
        raise VerificationError("audit.study", "its document holds another study")
    manifest, roster = signed.verify(), signed_roster.verify(trust.hub_key)
    if manifest.hub != key_text(trust.hub_key):
        raise VerificationError("audit.study-hub", "it names another hub key than the trusted one")
    if roster.digest.hex() != manifest.roster:
        raise VerificationError("audit.study-roster", "its roster is not the one that it was made for")
    if problem := replaced(roster, trust.roster):
        raise VerificationError("audit.study-roster", f"its roster was replaced: {problem}")
    if any(roster.member(member.id).name != member.name for member in manifest.members):
        raise VerificationError("audit.study-member", "its roster has other names for its members")
    if party != HUB and all(member.id != party for member in manifest.members):
        raise VerificationError("audit.study-member", "this hospital is not a member of it")
    try:
        return manifest, roster, check(manifest, None)
    except UsageError:
        return manifest, roster, None


def _admissibility(studies: Studies) -> str:
    idle = ", ".join(name[:12] for name, (_, _, admitted) in studies.items() if admitted is None)
    return f"every study in use can be run; not in use, and not runnable: {idle}" if idle else _RUNNABLE


def _admissible(party: Party) -> str:
    for seq, name in named_studies(party.entries):
        if name in party.studies and party.studies[name][2] is None:
            return f"the study {name[:12]} of entry {seq} cannot be run as it stands"
    return ""


def _read_heads(evidence: Evidence) -> tuple[Mapping[int, Head], Offer | None, str]:
    if not evidence.heads:
        return {}, None, ""
    try:
        witness = Witness(evidence.party, lambda _: None, evidence.heads)
        if witness.to_bytes() != evidence.heads:
            raise VerificationError("audit.heads", "the record of heads is not in its only form")
    except VerificationError as error:
        return {}, None, error.problem
    return witness.seen, witness.cosigned, ""


def _seen(party: Party, trust: Trust) -> str:
    keys = {m.id: m.ledger_key for _, roster, _ in party.studies.values() for m in roster.members}
    keys |= {m.id: m.ledger_key for m in trust.roster.members} | {HUB: trust.hub_key}
    for other, head in party.seen.items():
        if other == party.id or other not in keys:
            return f"a head of party {other} is there, which is not another party of its studies"
        records.check_signature(head, head.man, keys[other], f"the ledger key of party {other}")
    return ""
