"""Witnesses of ledgers: what is cosigned, what is remembered, and when a round may be charged."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import witness
from common.encoding import canonical_json
from common.errors import RefusedError, VerificationError
from common.identity import new_signing_key, public_key
from common.ledger.tree import leaf_hash
from common.secagg import records
from common.secagg.records import Cosign, Head, HeadPlease
from common.witness import HUB, Witness

MAN, OTHER = bytes(range(32)), bytes(32)
SIGNERS = {party: new_signing_key() for party in range(6)}
KEYS = {party: public_key(key) for party, key in SIGNERS.items()}
LEAVES = [leaf_hash(b"%d" % number) for number in range(40)]
FORKED = [*LEAVES[:7], leaf_hash(b"another"), *LEAVES[8:]]


class Party:
    """A witness with its key; ``stored`` is what it has made durable."""

    def __init__(self, me: int, state: bytes = b"") -> None:
        self.me, self.stored = me, state
        self.witness = Witness(me, self._store, state)

    def _store(self, data: bytes) -> None:
        self.stored = data

    def head(
        self,
        size: int,
        since: tuple[int, ...] = (),
        leaves: list[bytes] = LEAVES,
        man: bytes = MAN,
        round: int = 1,
    ) -> Head:
        please = HeadPlease(round, since)
        return self.witness.offer(man, please, b"n" * 32, leaves[:size], SIGNERS[self.me].sign)

    def cosign(self, *heads: Head) -> records.Cosigned:
        return self.witness.cosign(MAN, heads, KEYS, SIGNERS[self.me].sign)


def cosigned(answer: records.Cosigned, *heads: Head) -> bool:
    """Whether just these heads were cosigned."""
    return {cosign.head for cosign in answer.cosigns} == {records.head_digest(head) for head in heads}


@pytest.fixture
def one() -> Party:
    return Party(1)


@pytest.fixture
def two() -> Party:
    return Party(2)


def test_heads_are_cosigned_as_they_grow(one: Party, two: Party) -> None:
    for size, since in ((3, ()), (3, ()), (7, (3,)), (8, (2, 7)), (40, (8, 3))):
        head = one.head(size, since)
        answer = two.cosign(head)
        assert cosigned(answer, head)
        assert answer.remembered == ()
        assert two.witness.seen[1] == head
        records.check_signature(answer.cosigns[0], MAN, KEYS[2], "two")


@pytest.mark.parametrize(
    ("size", "since", "leaves"),
    [(6, (), LEAVES), (6, (5,), LEAVES), (8, (), FORKED), (20, (8,), FORKED), (0, (), LEAVES)],
)
def test_rolled_back_ledgers_are_not_cosigned(
    one: Party, two: Party, size: int, since: tuple[int, ...], leaves: list[bytes]
) -> None:
    seen = one.head(8)
    two.cosign(seen)
    kept = two.stored
    answer = two.cosign(one.head(size, since, leaves))
    assert answer.cosigns == ()
    assert answer.remembered == ((1, 8),)
    assert two.witness.contradicted == {1}
    assert two.witness.seen[1] == seen
    assert two.stored == kept


def test_a_longer_head_without_its_proof_is_only_not_cosigned(one: Party, two: Party) -> None:
    two.cosign(one.head(8))
    answer = two.cosign(one.head(12, (7,)))
    assert (answer.cosigns, answer.remembered, two.witness.contradicted) == ((), ((1, 8),), set())
    assert cosigned(two.cosign(head := one.head(12, (8,))), head)


def test_a_rolled_back_hub_is_not_cosigned_and_stops_nobody_else(one: Party, two: Party) -> None:
    hub = Party(HUB)
    two.cosign(hub.head(8))
    for rolled_back in (hub.head(6), hub.head(8, (), FORKED), hub.head(9, (8,), FORKED)):
        other = one.head(3, (3,))
        assert cosigned(two.cosign(rolled_back, other), other)
        assert two.witness.contradicted == {HUB}
        assert two.witness.seen[HUB].size == 8


def test_cosigned_heads_are_remembered(one: Party, two: Party) -> None:
    three = Party(3)
    heads = (one.head(5), three.head(9))
    two.cosign(*heads)
    again = Party(2, two.stored)
    assert again.witness.seen == {1: heads[0], 3: heads[1]}
    assert again.cosign(one.head(4)).cosigns == ()
    # What cannot be stored is not cosigned.
    broken = Witness(2, lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        broken.cosign(MAN, heads, KEYS, SIGNERS[2].sign)


def test_heads_that_are_not_their_owners_are_refused(one: Party, two: Party) -> None:
    head = one.head(5)
    forged = [
        replace(head, size=6),
        replace(head, id=3),
        replace(head, id=2),
        replace(head, id=99),
        replace(head, man=OTHER),
        one.head(5, man=OTHER),
    ]
    for wrong in forged:
        with pytest.raises(VerificationError):
            two.cosign(head, wrong)
    assert two.witness.seen == {}


def test_foreign_cosignatures_do_not_count(one: Party) -> None:
    head = one.head(5)
    digest = records.head_digest(head)

    def by(party: int, what: bytes = digest, man: bytes = MAN, signer: int | None = None) -> Cosign:
        return records.signed(Cosign(party, what), man, SIGNERS[party if signer is None else signer].sign)

    worthless = [by(1), by(HUB), by(2, OTHER), by(2, man=OTHER), by(2, signer=3), Cosign(2, digest)]
    few = {party: KEYS[party] for party in range(4)}
    assert one.witness.take(MAN, [*worthless, by(4), by(5)], few) == 0
    assert one.witness.take(MAN, [by(2), by(2)], few) == 1
    assert one.witness.take(MAN, [by(3)], few) == 2
    assert one.witness.take(OTHER, [by(3)], few) == 0


def test_nothing_runs_without_fresh_cosignatures(one: Party) -> None:
    def given(round: int, *cosigners: int) -> None:
        head = one.head(5, round=round)
        cosigns = [Cosign(party, records.head_digest(head)) for party in cosigners]
        one.witness.take(MAN, [records.signed(c, MAN, SIGNERS[c.id].sign) for c in cosigns], KEYS)

    def refused(round: int, man: bytes = MAN) -> None:
        with pytest.raises(RefusedError, match="2 are needed"):
            one.witness.spend(man, round, 2)

    refused(1)
    given(1, 2)
    refused(1)
    given(1, 2, 3)
    refused(2)
    # Asked for with the wrong round, they are used up.
    refused(1)
    given(1, 2, 3)
    refused(1, OTHER)
    one.witness.spend(MAN, 1, 2)
    refused(1)
    # A new head of the same round needs its own.
    given(2, 2, 3)
    given(2)
    refused(2)


def test_sizes_that_this_ledger_does_not_have_are_refused(one: Party) -> None:
    with pytest.raises(VerificationError, match="have seen 6 entries of this ledger, but it has 5"):
        one.head(5, (2, 6))
    with pytest.raises(VerificationError, match="more than 64 proofs"):
        one.head(5, tuple(range(witness.MAX_SINCE + 1)))


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"own":null,"schema":2,"seen":{}}', b"\x00"])
def test_a_damaged_memory_is_refused(one: Party, two: Party, damage: bytes) -> None:
    two.cosign(one.head(5))
    state = damage or two.stored.replace(b'"1"', b'"3"')
    with pytest.raises(VerificationError):
        Party(2, state)


def test_records_of_heads_have_one_form(one: Party, two: Party) -> None:
    """The same heads in other words: numbers with zeros in front, true for 1, a cosignature said twice."""
    one.cosign(two.head(3))
    head = one.head(2)
    for party in (2, 3):
        cosign = records.signed(Cosign(party, records.head_digest(head)), MAN, SIGNERS[party].sign)
        one.witness.take(MAN, [cosign], KEYS)
    found = json.loads(one.stored)
    assert canonical_json(found) == one.stored
    own, seen = found["own"], found["seen"]
    others = [
        {**found, "schema": True},
        {**found, "own": [*own, own[1]]},
        {**found, "own": dict.fromkeys(own)},
        {**found, "seen": {"0" + party: text for party, text in seen.items()}},
        {**found, "seen": {" " + party: text for party, text in seen.items()}},
    ]
    for other in others:
        with pytest.raises(VerificationError, match="not a record of heads"):
            Party(1, canonical_json(other))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sets(st.integers(0, 40), max_size=4), st.booleans()), max_size=8
    )
)
def test_what_is_cosigned_is_one_growing_ledger(steps: list[tuple[int, set[int], bool]]) -> None:
    one, two, last = Party(1), Party(2), -1
    for size, sizes, fork in steps:
        leaves = FORKED if fork and size > 7 else LEAVES
        since = tuple(sorted(at for at in sizes if at <= size))
        answer = two.cosign(one.head(size, since, leaves))
        forked = leaves is FORKED
        if last < 0:
            last, first_forked = size, forked
            seen_forked = first_forked
            assert len(answer.cosigns) == 1
            continue
        same = seen_forked == forked or last <= 7
        extends = same and (size == last or (size > last and last in since))
        assert len(answer.cosigns) == int(extends), (size, last, since)
        if extends:
            last, seen_forked = size, forked
