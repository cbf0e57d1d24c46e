"""Evidence: everything that a hospital or the hub can show of itself, in one zip file.

Source: DESIGN "Ledger"; c2sp.org/tlog-checkpoint; RFC 8785. Rules: the file holds no key, no row and no
model; its names are a closed list and its sizes are bounded before anything is read; nothing in it is
believed here: common.audit.verify does that, against keys from elsewhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common import archive, identity
from common.encoding import base64_bytes, base64_text, canonical_json, parse_canonical_json
from common.errors import UsageError, VerificationError
from common.roster import SignedRoster

SCHEMA: Final = 1
FACTS: Final = "evidence.json"
LEAVES: Final = "ledger.jsonl"
HEAD: Final = "ledger.head"
HEADS: Final = "heads.json"

_FIELDS: Final = ("schema", "party", "name", "time", "version", "hub_key", "roster", "roster_signature")
_STUDY: Final = re.compile(r"studies/([0-9a-f]{64})\.(study|rounds)")
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one party shows. Nothing of it is verified yet.

    ``party`` is the roster id, 0 for the hub, whose ``name`` is "hub"; ``time`` when it was written (UTC, to
    the minute); ``roster`` the newest that the party holds; ``hub_key`` raw, 32 bytes; ``leaves`` the
    ledger's leaves in order; ``head`` its checkpoint as a signed note; ``heads`` what
    common.witness.read_state reads, empty when nothing was cosigned yet; ``studies`` the study documents
    (common.run) by manifest digest in hex.
    """

    party: int
    name: str
    time: str
    version: str
    roster: SignedRoster
    hub_key: bytes
    leaves: tuple[bytes, ...]
    head: str
    heads: bytes
    studies: Mapping[str, bytes]
    rounds: Mapping[str, bytes] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The zip file; the same evidence gives the same bytes.

        Guarantee: evidence_is_read_as_written - from_bytes gives the same evidence back.
        """
        roster = base64_text(self.roster.data), base64_text(self.roster.signature)
        stated = (self.party, self.name, self.time, self.version, identity.key_text(self.hub_key), *roster)
        facts = canonical_json(dict(zip(_FIELDS, (SCHEMA, *stated), strict=True)))
        leaves = b"".join(leaf + b"\n" for leaf in self.leaves)
        files = {FACTS: facts, LEAVES: leaves, HEAD: self.head.encode("utf-8"), HEADS: self.heads}
        for kind, found in (("study", self.studies), ("rounds", self.rounds)):
            files |= {f"studies/{digest}.{kind}": data for digest, data in sorted(found.items())}
        return archive.pack(files)

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Evidence":
        """Read to_bytes strictly; ``what`` names the file.

        Guarantee: hostile_evidence_is_refused - unknown, missing and repeated names, and sizes past the
        bounds, before anything is unpacked.
        Raises: VerificationError.
        """
        try:
            files = archive.unpack(data, {FACTS, LEAVES, HEAD, HEADS}, _STUDY)
        except VerificationError as error:
            raise _refused(what, error.problem) from error
        facts: Any = parse_canonical_json(files.pop(FACTS), f"{FACTS} of {what}")
        leaves, head, heads = (files.pop(name) for name in (LEAVES, HEAD, HEADS))
        if leaves and not leaves.endswith(b"\n"):
            raise _refused(what, f"{LEAVES} ends in the middle of a line")
        try:
            schema, party, name, time, version, hub_key, *roster = map(facts.pop, _FIELDS)
            sound = (type(schema), schema) == (int, SCHEMA) and not facts
            sound = sound and type(party) is int and 0 <= party <= identity.MAX_ID
            sound = sound and not identity.name_problem(name, "name") and bool(_TIME.fullmatch(time))
            if not sound or not isinstance(version, str):
                raise ValueError("fields")
            signed, hub_key = SignedRoster(*map(base64_bytes, roster)), identity.key_bytes(hub_key, "hub key")
            studies = _of_studies(files, "study"), _of_studies(files, "rounds")
            lines, note = tuple(leaves.split(b"\n")[:-1]), head.decode("utf-8")
            return cls(party, name, time, version, signed, hub_key, lines, note, heads, *studies)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _refused(what, f"{FACTS} does not have exactly its fields") from error


def _of_studies(files: Mapping[str, bytes], kind: str) -> dict[str, bytes]:
    found = ((_STUDY.fullmatch(name), data) for name, data in files.items())
    return {match[1]: data for match, data in found if match is not None and match[2] == kind}


def read_evidence(path: Path) -> Evidence:
    """Read an evidence file. Raises UsageError when it cannot be read, VerificationError when it is none."""
    try:
        if path.stat().st_size > archive.MAX_TOTAL_BYTES:
            raise _refused(str(path), "it is larger than any evidence")
        data = path.read_bytes()
    except OSError as error:
        remedy = "Give the path of a file that 'wardround site evidence' or 'hub evidence' wrote."
        raise UsageError("audit.file", f"{path} cannot be read: {error.strerror}", remedy=remedy) from error
    return Evidence.from_bytes(data, str(path))


def _refused(what: str, problem: str) -> VerificationError:
    text = f"{what} is no evidence: {problem}"
    return VerificationError("audit.evidence", text, remedy="Ask for it again.")
