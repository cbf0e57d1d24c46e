"""What one party has seen of the others' ledgers, and who has cosigned its own.

Source: PROTOCOL L1, L2; PRIVACY "Rollback"; RFC 6962 section 2.1.2. Rules: a head is cosigned only when it
extends, by proof, the last one seen of that ledger; what was cosigned is remembered durably before the
cosignature leaves; an own head counts for one round of one study, by its nonce; party 0 is the hub, whose
ledger is signed by the hub key.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from common.encoding import base64_bytes, base64_text, canonical_json, parse_canonical_json
from common.errors import RefusedError, VerificationError
from common.ledger.tree import consistency_proof, root, verify_consistency
from common.secagg import records
from common.secagg.records import Cosign, Cosigned, Extension, Head, HeadPlease

HUB: Final = 0
MAX_SINCE: Final = 64

Sign = Callable[[bytes], bytes]
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """An own head, and the cosignatures that have come back for it, by cosigner."""

    head: Head
    cosigns: Mapping[int, Cosign]


class Witness:
    """The memory of one party. Not thread-safe: the caller holds its lock.

    ``persist`` gets to_bytes() and has stored it durably when it returns; ``state`` is what was stored;
    ``contradicted`` names whose heads, in the last request, cannot be of the ledger that was seen before.

    Guarantee: rolled_back_ledgers_are_not_cosigned - a head that is shorter than the last one seen, or does
    not extend it, by whatever proof.
    """

    def __init__(self, me: int, persist: Callable[[bytes], None], state: bytes = b"") -> None:
        self._me = me
        self._persist = persist
        self.seen, self.cosigned = read_state(state) if state else ({}, None)
        self._offers: dict[bytes, Offer] = {}
        self.contradicted: set[int] = set()

    def to_bytes(self) -> bytes:
        """The memory as canonical JSON: read_state reads it."""
        return _state_bytes(self.seen, self.cosigned)

    def offer(
        self, man: bytes, please: HeadPlease, nonce: bytes, leaf_hashes: Sequence[bytes], sign: Sign
    ) -> Head:
        """L1 of the own ledger for a round, with a proof from each size asked for. ``nonce`` is fresh.

        Raises: VerificationError for a size that the ledger does not have, or too many sizes.
        """
        since = sorted(set(please.since))
        if len(since) > MAX_SINCE:
            raise VerificationError("witness.since", f"a head is asked for with more than {MAX_SINCE} proofs")
        if since and since[-1] > len(leaf_hashes):
            raise VerificationError(
                "witness.rolled-back",
                f"others have seen {since[-1]} entries of this ledger, but it has {len(leaf_hashes)}",
                remedy="If it came from a backup, put the newest ledger back; until then nothing is charged.",
            )
        proofs = tuple(Extension(size, consistency_proof(leaf_hashes, size)) for size in since)
        unsigned = Head(self._me, man, please.round, nonce, len(leaf_hashes), root(leaf_hashes), proofs)
        head = records.signed(unsigned, man, sign)
        self._offers[man] = Offer(head, {})
        return head

    def see(
        self, man: bytes, heads: Iterable[Head], keys: Mapping[int, bytes]
    ) -> tuple[dict[int, Head], Sizes]:
        """Check heads and remember those that extend what was seen; the size remembered of the others.

        ``keys`` are the ledger keys of the study's parties by id, the hub's under 0.

        Raises: VerificationError for a head of another study, a stranger's, or one not signed by its owner.
        Nothing is remembered then.
        """
        given = list(heads)
        for head in given:
            if head.man != man or head.id == self._me or head.id not in keys:
                raise VerificationError("witness.head", "a head is not of another party of this study")
            records.check_signature(head, man, keys[head.id], f"the ledger key of party {head.id}")
        found = {head.id: (head, self._relation(head)) for head in given}
        self.contradicted = {party for party, (_, relation) in found.items() if relation == "contradicts"}
        good = {party: head for party, (head, relation) in found.items() if relation == "extends"}
        if good:
            self.seen |= good
            self._persist(self.to_bytes())
        return good, tuple((party, self.seen[party].size) for party in sorted(found.keys() - good.keys()))

    def cosign(self, man: bytes, heads: Iterable[Head], keys: Mapping[int, bytes], sign: Sign) -> Cosigned:
        """L2 for each head that extends what was seen, and what is remembered of those that do not.

        Guarantee: cosigned_heads_are_remembered - durably, before any cosignature is returned.
        Raises: as ``see``; nothing is cosigned then.
        """
        good, remembered = self.see(man, heads, keys)
        cosigns = (Cosign(self._me, records.head_digest(head)) for head in good.values())
        return Cosigned(tuple(records.signed(cosign, man, sign) for cosign in cosigns), remembered)

    def take(self, man: bytes, cosigns: Iterable[Cosign], keys: Mapping[int, bytes]) -> int:
        """Keep the valid cosignatures of the head offered last for a study; how many there are now.

        Guarantee: foreign_cosignatures_do_not_count - of strangers, of other heads, twice by one hospital,
        the hub's and the own.
        """
        offer = self._offers.get(man)
        if offer is None:
            return 0
        wanted, kept = records.head_digest(offer.head), dict(offer.cosigns)
        for cosign in cosigns:
            if cosign.id not in keys or cosign.id in (HUB, self._me) or cosign.head != wanted:
                continue
            with suppress(VerificationError):
                # One member's bad signature must not keep the others' from counting.
                records.check_signature(cosign, man, keys[cosign.id], "its ledger key")
                kept[cosign.id] = cosign
        self._offers[man] = Offer(offer.head, kept)
        # Of studies side by side the longest head is the one to show.
        if self.cosigned is None or self.cosigned.head.size <= offer.head.size:
            self.cosigned = self._offers[man]
            self._persist(self.to_bytes())
        return len(kept)

    def spend(self, man: bytes, round: int, needed: int) -> None:
        """Use up the cosigned head of one round of a study.

        Guarantee: nothing_runs_without_fresh_cosignatures - of this very round, from enough others, once.
        Raises: RefusedError.
        """
        offer = self._offers.pop(man, None)
        found = len(offer.cosigns) if offer is not None and offer.head.round == round else 0
        if found < needed:
            raise RefusedError(
                "witness.cosignatures",
                f"{found} others have cosigned this ledger's head for the round, {needed} are needed",
                remedy="If it stays so, this ledger may be an older copy than the others have seen.",
            )

    def _relation(self, head: Head) -> Literal["extends", "unproven", "contradicts"]:
        """``unproven``: longer than what was seen here, and it came without a proof since then."""
        last = self.seen.get(head.id)
        if last is None:
            return "extends"
        proofs = [extension.path for extension in head.extensions if extension.since == last.size]
        if head.size > last.size and not proofs:
            return "unproven"
        try:
            verify_consistency(last.size, head.size, last.root, head.root, proofs[0] if proofs else ())
        except VerificationError:
            return "contradicts"
        return "extends"


def read_state(data: bytes) -> tuple[dict[int, Head], Offer | None]:
    """Heads seen, by party, and the own head last cosigned; no signature is checked.

    Guarantee: records_of_heads_have_one_form - only the bytes that to_bytes makes are read.
    Raises: VerificationError.
    """
    value = parse_canonical_json(data, "the record of heads")
    try:
        if set(value) != {"schema", "seen", "own"} or value["schema"] != 1:
            raise ValueError("fields")
        seen = {int(party): records.decode(Head, base64_bytes(text)) for party, text in value["seen"].items()}
        own = None
        if value["own"] is not None:
            first, *rest = map(base64_bytes, value["own"])
            cosigns = [records.decode(Cosign, data) for data in rest]
            own = Offer(records.decode(Head, first), {cosign.id: cosign for cosign in cosigns})
        if any(party != head.id for party, head in seen.items()) or _state_bytes(seen, own) != data:
            raise ValueError("ids, or another form")
    except (ValueError, TypeError, AttributeError) as error:
        raise VerificationError(
            "witness.state", "this is not a record of heads", remedy="Restore it."
        ) from error
    return seen, own


def _state_bytes(seen: Mapping[int, Head], own: Offer | None) -> bytes:
    written = own and [_text(own.head), *map(_text, own.cosigns.values())]
    by_party = {str(party): _text(head) for party, head in seen.items()}
    return canonical_json({"schema": 1, "seen": by_party, "own": written})


def _text(record: records.Record) -> str:
    return base64_text(records.encode(record))
