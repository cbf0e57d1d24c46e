"""What two officers sign: only they, only once, only for this ledger, and only what an override may do."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.encoding import canonical_json
from common.errors import RefusedError, VerificationError, WardroundError
from common.identity import key_text, new_signing_key, public_key
from common.ledger.entries import Opened, Override, PolicyChange, Restored, Rules
from common.ledger.overrides import Proposal, check_override, standing
from common.ledger.store import Ledger
from common.ledger.tree import root

REGISTER = "0123456789abcdef" * 2
ACTOR = key_text(public_key(new_signing_key()))
OFFICERS = [new_signing_key() for _ in range(3)]
NAMED = tuple(key_text(public_key(key)) for key in OFFICERS[:2])


def rules(officers: tuple[str, ...] = NAMED) -> Rules:
    return Rules(
        epsilon_t="3", epsilon_w="3", delta="0.000001", minimum_hospitals=3, max_round_minutes=60,
        without_differential_privacy=False, without_masks=False, coordinators=(), officers=officers,
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(
        tmp_path / "l.db", new_signing_key(), create=True, clock=lambda: datetime.now(UTC)
    ) as made:
        made.append(Opened(actor=ACTOR, register_id=REGISTER, epsilon_t="3", epsilon_w="3", delta="0.000001"))
        made.append(PolicyChange(actor=ACTOR, before=None, after=rules()))
        yield made


def proposal(ledger: Ledger, **changes: Any) -> Proposal:
    head = ledger.head()
    stated: dict[str, Any] = {
        "schema": 1, "action": "raise_caps", "register_id": REGISTER, "epsilon_t": "4", "epsilon_w": "3",
        "size": head.size, "root": head.root.hex(), "reason": "a last study",
    }  # fmt: skip
    return Proposal.model_validate({**stated, **changes})


def both(found: Proposal) -> Proposal:
    return found.signed(OFFICERS[0]).signed(OFFICERS[1])


def apply(ledger: Ledger, found: Proposal) -> Override:
    entries, entry = ledger.entries(), found.entry(ACTOR)
    check_override(entry, entries, root(ledger.leaf_hashes()[: entry.size]))
    ledger.append(entry)
    return entry


def refused(act: Callable[[], object], words: str, error: type[WardroundError] = RefusedError) -> None:
    with pytest.raises(error) as caught:
        act()
    assert words in caught.value.problem


def test_two_officers_sign_an_override(ledger: Ledger) -> None:
    found = proposal(ledger)
    two = "two different officers"
    refused(lambda: apply(ledger, found), two)
    refused(lambda: apply(ledger, found.signed(OFFICERS[0])), two)
    refused(lambda: apply(ledger, found.signed(OFFICERS[0]).signed(OFFICERS[0])), two)
    refused(lambda: apply(ledger, found.signed(OFFICERS[0]).signed(OFFICERS[2])), two)
    refused(lambda: apply(ledger, both(found).signed(OFFICERS[2])), two)
    assert len(ledger.entries()) == 2
    apply(ledger, both(found))
    now = standing(ledger.entries())
    assert (now.epsilon_t, now.epsilon_w, now.delta, now.closed, now.reopened) == (
        "4", "3", "0.000001", False, False,
    )  # fmt: skip
    ledger.verify()


@pytest.mark.parametrize(
    "changes",
    [{"epsilon_t": "5"}, {"epsilon_w": "4"}, {"reason": "another"}, {"size": 1}],
    ids=str,
)
def test_a_tampered_override_does_not_verify(ledger: Ledger, changes: dict[str, Any]) -> None:
    tampered = both(proposal(ledger)).model_copy(update=changes)
    refused(lambda: apply(ledger, tampered), "does not verify", VerificationError)


def test_one_officers_signature_twice_is_not_two(ledger: Ledger) -> None:
    found = proposal(ledger).signed(OFFICERS[0])
    signature = found.signatures[NAMED[0]]
    copied = found.model_copy(update={"signatures": {NAMED[0]: signature, NAMED[1]: signature}})
    refused(lambda: apply(ledger, copied), "does not verify", VerificationError)


def test_overrides_cannot_be_replayed(ledger: Ledger, tmp_path: Path) -> None:
    first, second = both(proposal(ledger)), both(proposal(ledger, epsilon_t="5"))
    apply(ledger, first)
    for again in (first, second):
        refused(lambda p=again: apply(ledger, p), "applied already")
    # On a ledger whose beginning is another one's, size and register alone do not fit.
    with Ledger.open(tmp_path / "2.db", new_signing_key(), create=True) as other:
        other.append(Opened(actor=ACTOR, register_id=REGISTER, epsilon_t="3", epsilon_w="3", delta="0.00001"))
        other.append(PolicyChange(actor=ACTOR, before=None, after=rules()))
        refused(lambda: apply(other, first), "does not verify", VerificationError)
    late = both(proposal(ledger, epsilon_t="6", size=len(ledger.entries()) + 1))
    refused(lambda: apply(ledger, late), "as it stands")
    apply(ledger, both(proposal(ledger, epsilon_t="6")))


def test_a_reopened_register_can_be_charged_again(ledger: Ledger) -> None:
    reopen = {"action": "reopen", "epsilon_t": "3"}
    refused(lambda: apply(ledger, both(proposal(ledger, **reopen))), "a restore has closed")
    early = both(proposal(ledger, **reopen))
    ledger.append(Restored(actor=ACTOR, reason="A. Person: the disk broke"))
    assert standing(ledger.entries()).closed
    refused(lambda: apply(ledger, early), "as it stands")
    refused(lambda: apply(ledger, both(proposal(ledger, action="reopen"))), "under its own caps")
    apply(ledger, both(proposal(ledger, **reopen)))
    now = standing(ledger.entries())
    assert (now.closed, now.reopened) == (False, True)
    ledger.append(Restored(actor=ACTOR, reason="A. Person: again"))
    assert standing(ledger.entries()).closed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"register_id": "f" * 32}, "another register"),
        ({"epsilon_t": "2"}, "lowers one"),
        ({"epsilon_t": "4", "epsilon_w": "2.5"}, "lowers one"),
        ({"epsilon_t": "3"}, "raises no cap"),
        ({"epsilon_t": "20.5"}, "above 20"),
    ],
    ids=str,
)
def test_what_no_override_may_do(ledger: Ledger, changes: dict[str, str], words: str) -> None:
    refused(lambda: apply(ledger, both(proposal(ledger, **changes))), words)
    apply(ledger, both(proposal(ledger, epsilon_t="20")))


def test_officers_are_those_of_the_policy_then(ledger: Ledger) -> None:
    found = both(proposal(ledger))
    ledger.append(PolicyChange(actor=ACTOR, before=rules(), after=rules((NAMED[0],))))
    refused(lambda: apply(ledger, found), "two different officers")


@given(st.data())
def test_proposals_are_read_as_written(data: st.DataObject) -> None:
    caps = st.sampled_from(["1", "2.5", "20", "0.125"])
    found = Proposal.model_validate(
        {
            "schema": 1,
            "action": data.draw(st.sampled_from(["raise_caps", "reopen"])),
            "register_id": REGISTER,
            "epsilon_t": data.draw(caps),
            "epsilon_w": data.draw(caps),
            "size": data.draw(st.integers(1, 2**53 - 1)),
            "root": "ab" * 32,
            "reason": "why",
        }
    )
    for key in OFFICERS[: data.draw(st.integers(0, 3))]:
        found = found.signed(key)
    written = found.to_bytes()
    assert Proposal.from_bytes(written) == found
    fields = found.model_dump(by_alias=True)
    name = data.draw(st.sampled_from(sorted(fields)))
    for wrong in (
        {**fields, name: None},
        {**fields, "more": 1},
        {k: v for k, v in fields.items() if k != name},
    ):
        with pytest.raises(VerificationError):
            Proposal.from_bytes(canonical_json(wrong))
    with pytest.raises(VerificationError):
        Proposal.from_bytes(written + b" ")
