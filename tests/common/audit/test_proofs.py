"""Proofs that an auditor takes away, against an oracle that reads the published format by hand."""

import base64
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.audit.evidence import Evidence
from common.audit.proofs import HEADER, extension, own_key, prove, verify_proof
from common.errors import UsageError, VerificationError
from common.identity import new_signing_key, public_key
from common.ledger.entries import Approval, Pause, decode
from common.ledger.tree import verify_consistency
from tests.common.audit.federation import Federation


def test_proofs_show_their_entry(ran: Federation) -> None:
    for party in (0, 1, 4):
        evidence, key = ran.evidence(party), public_key(ran.keepers[party].key)
        assert own_key(evidence) == key
        for index, leaf in enumerate(evidence.leaves):
            proof = prove(evidence, index, key)
            assert verify_proof(proof, key) == decode(leaf)
            with pytest.raises(VerificationError):
                verify_proof(proof, public_key(new_signing_key()))
    first, second = (prove(evidence, index, key).split("\n") for index in (1, 2))
    for line in (1, 2, 3):
        with pytest.raises(VerificationError):
            verify_proof("\n".join([*first[:line], second[line], *first[line + 1 :]]), key)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_changed_character_of_a_proof_passes(ran: Federation, data: st.DataObject) -> None:
    evidence, key = ran.evidence(1), public_key(ran.keepers[1].key)
    proof = prove(evidence, 5, key)
    place = data.draw(st.integers(0, len(proof) - 1))
    other = data.draw(st.sampled_from("\nAz0+/= ").filter(lambda character: character != proof[place]))
    for changed in (proof[:place] + other + proof[place + 1 :], proof[:place] + proof[place + 1 :]):
        with pytest.raises(VerificationError):
            verify_proof(changed, key)


def test_the_form_is_the_published_one(ran: Federation) -> None:
    """c2sp.org/tlog-proof, read by hand: header, extra, index, path from the leaf to the root, checkpoint."""
    evidence = ran.evidence(1)
    proof = prove(evidence, 6, own_key(evidence))
    above, checkpoint = proof.split("\n\n", 1)
    header, extra, index, *path = above.split("\n")
    assert (header, index) == (HEADER, "index 6")
    assert header == "c2sp.org/tlog-proof@v1"
    assert base64.b64decode(extra.removeprefix("extra ")) == evidence.leaves[6]
    assert checkpoint == evidence.head
    node, number, last = hashlib.sha256(b"\0" + evidence.leaves[6]).digest(), 6, len(evidence.leaves) - 1
    for line in path:
        sibling = base64.b64decode(line)
        if number % 2 or number == last:
            node = hashlib.sha256(b"\1" + sibling + node).digest()
            while number % 2 == 0:
                number, last = number // 2, last // 2
        else:
            node = hashlib.sha256(b"\1" + node + sibling).digest()
        number, last = number // 2, last // 2
    assert base64.b64encode(node).decode() == evidence.head.split("\n")[2]


def test_nothing_is_proven_of_another_tree(ran: Federation) -> None:
    evidence = ran.evidence(1)
    key = own_key(evidence)
    for index in (-1, len(evidence.leaves)):
        with pytest.raises(UsageError, match="there is no entry"):
            prove(evidence, index, key)
    with pytest.raises(VerificationError):
        prove(replace(evidence, leaves=evidence.leaves[:-1]), 1, key)
    for text in ("", HEADER, f"{HEADER}\nindex 0\n\n{evidence.head}", "x" * (1 << 18)):
        with pytest.raises(VerificationError, match="not a proof"):
            verify_proof(text, key)


def earlier(ran: Federation, evidence: Evidence, size: int) -> Evidence:
    leaves = evidence.leaves[:size]
    return replace(evidence, leaves=leaves, head=ran.head(evidence.party, leaves))


def test_an_extension_is_proven(ran: Federation) -> None:
    new = ran.evidence(1)
    key = own_key(new)
    for size in range(1, len(new.leaves) + 1):
        old = earlier(ran, new, size)
        found = extension(old, new, key)
        assert found.entries == tuple(map(decode, new.leaves[size:]))
        assert (found.old.size, found.new.size) == (size, len(new.leaves))
        verify_consistency(found.old.size, found.new.size, found.old.root, found.new.root, found.proof)


def test_a_ledger_that_does_not_extend_is_named(ran: Federation) -> None:
    new = ran.evidence(1)
    key, old = own_key(new), earlier(ran, new, 8)
    with pytest.raises(VerificationError, match="it lacks entry 8") as error:
        extension(new, old, key)
    assert error.value.fields == {"entry": 8}
    other = ran.rewritten(new, lambda e: e.__setitem__(1, e[1].model_copy(update={"reason": "B: no"})))
    assert isinstance(decode(other.leaves[1]), Approval)
    with pytest.raises(VerificationError, match="entry 1 differs"):
        extension(old, other, key)
    added = ran.rewritten(old, lambda e: e.append(pause(ran)))
    with pytest.raises(VerificationError, match="entry 8 differs"):
        extension(added, new, key)


def pause(ran: Federation) -> Pause:
    return Pause(actor=ran.keepers[1].actor, time="2099-01-01T00:00Z", decision="paused", reason="A: b")


def test_an_extension_is_of_signed_heads_of_one_party(ran: Federation) -> None:
    new = ran.evidence(1)
    key, old = own_key(new), earlier(ran, new, 8)
    with pytest.raises(UsageError, match=r"St\. Mary and of Northgate"):
        extension(old, ran.evidence(2), key)
    with pytest.raises(VerificationError):
        extension(old, new, public_key(new_signing_key()))
    with pytest.raises(VerificationError, match="not of the entries"):
        extension(replace(old, head=ran.head(1, new.leaves[:7])), new, key)
    with pytest.raises(VerificationError, match="not of the entries"):
        extension(old, replace(new, head=old.head), key)
