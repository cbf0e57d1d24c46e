"""Proofs that an auditor takes away: that an entry is in a ledger, and that one ledger extends another.

Source: c2sp.org/tlog-proof@v1 (format); RFC 6962 sections 2.1.1, 2.1.2. Rules: the extra data of a proof is
the entry itself, which the proof then authenticates; a proof is read only in the form in which it is written.
"""

import re
from dataclasses import dataclass
from typing import Final

from common.audit.evidence import Evidence
from common.audit.party import read_entries, read_head
from common.audit.trust import claimed
from common.encoding import base64_bytes, base64_text
from common.errors import UsageError, VerificationError
from common.ledger import tree
from common.ledger.entries import Entry, decode
from common.ledger.notes import Checkpoint

HEADER: Final = "c2sp.org/tlog-proof@v1"
MAX_PROOF_CHARACTERS: Final = 1 << 17

_PROOF: Final = re.compile(
    rf"{re.escape(HEADER)}\nextra (\S+)\nindex (0|[1-9][0-9]{{0,15}})\n((?:\S+\n)*)\n(.+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Extension:
    """From ``old`` to ``new``: RFC 6962 consistency proof (32 bytes each) and the entries that were added."""

    old: Checkpoint
    new: Checkpoint
    proof: tuple[bytes, ...]
    entries: tuple[Entry, ...]


def own_key(evidence: Evidence) -> bytes:
    """The ledger key that the evidence states for itself. Raises VerificationError."""
    return claimed([evidence]).ledger_key(evidence.party)


def prove(evidence: Evidence, index: int, public: bytes) -> str:
    """The proof that entry ``index`` is in the ledger, as the text of a .tlog-proof file.

    ``public`` is the raw ledger key. Raises: UsageError when there is no such entry; VerificationError when
    the ledger is not the one whose head that key signed.
    """
    if not 0 <= index < len(evidence.leaves):
        problem = f"the ledger has {len(evidence.leaves)} entries, there is no entry {index}"
        raise UsageError("audit.entry", problem, remedy="See 'wardround audit log' for their numbers.")
    leaf = evidence.leaves[index]
    path = tree.inclusion_proof([tree.leaf_hash(each) for each in evidence.leaves], index)
    lines = [HEADER, f"extra {base64_text(leaf)}", f"index {index}", *map(base64_text, path)]
    proof = "\n".join((*lines, "", evidence.head))
    verify_proof(proof, public)
    return proof


def verify_proof(proof: str, public: bytes) -> Entry:
    """The entry that a proof shows to be in the ledger of this raw key.

    Guarantee: proofs_show_their_entry - what prove writes verifies; with a changed character, for another
    entry or under another key it does not.
    Raises: VerificationError.
    """
    match = _PROOF.fullmatch(proof) if len(proof) <= MAX_PROOF_CHARACTERS else None
    if match is None:
        raise VerificationError("audit.proof", f"this is not a proof of the form {HEADER}")
    try:
        leaf, *path = map(base64_bytes, (match[1], *match[3].split("\n")[:-1]))
    except ValueError as error:
        raise VerificationError("audit.proof", "a line of the proof is not base64") from error
    head = read_head(match[4], public)
    tree.verify_inclusion(tree.leaf_hash(leaf), int(match[2]), head.size, path, head.root)
    return decode(leaf)


def extension(old: Evidence, new: Evidence, public: bytes) -> Extension:
    """What a ledger has added between two evidences of it; ``public`` is its raw ledger key.

    Guarantee: a_ledger_that_does_not_extend_is_named - by its first entry that differs.
    Raises: UsageError for different parties; VerificationError.
    """
    if old.party != new.party:
        problem = f"the files are of {old.name} and of {new.name}"
        raise UsageError("audit.files", problem, remedy="Give two files of one party, the older one first.")
    heads = [read_head(each.head, public) for each in (old, new)]
    hashes = [tree.leaf_hash(leaf) for leaf in new.leaves]
    for index, leaf in enumerate(old.leaves):
        if new.leaves[index : index + 1] != (leaf,):
            problem = f"the newer ledger does not extend the older one: entry {index} differs"
            if index >= len(new.leaves):
                problem = f"the newer ledger does not extend the older one: it lacks entry {index}"
            raise VerificationError("audit.diff", problem, remedy="Keep both files.", entry=index)
    for head, leaves in zip(heads, (old.leaves, new.leaves), strict=True):
        if (head.size, head.root) != (len(leaves), tree.root(hashes[: len(leaves)])):
            raise VerificationError("audit.tree", "a signed head is not of the entries beside it")
    proof = tree.consistency_proof(hashes, heads[0].size)
    tree.verify_consistency(heads[0].size, heads[1].size, heads[0].root, heads[1].root, proof)
    entries, problem = read_entries(new)
    if problem:
        raise VerificationError("audit.leaves", problem)
    return Extension(heads[0], heads[1], proof, entries[heads[0].size :])
