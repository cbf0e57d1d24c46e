"""The tamper table: every kind of change to evidence, and the check that catches it.

Where the owner of a ledger is the forger, the head is signed anew over the changed entries: then the ledger alone
is sound, and its studies or the others' evidence contradict it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from common.admissible import check
from common.audit.evidence import Evidence
from common.audit.trust import Trust
from common.audit.verify import Verification, verify
from common.identity import key_text, new_signing_key, public_key
from common.ledger.entries import (
    Approval,
    Charge,
    Completed,
    Ended,
    Entry,
    Membership,
    Opened,
    Outcome,
    Override,
    PolicyChange,
    Rules,
    Submission,
    decode,
    encode,
)
from common.ledger.notes import origin_of, sign_note
from common.roster import Roster, SignedRoster
from common.secagg import records
from common.secagg.transcript import Transcript
from common.study import Manifest
from common.witness import HUB, Offer, Witness, read_state
from tests.common.audit.federation import Federation, charged

MARY, NORTHGATE, RIVERSIDE, CROSS = 1, 2, 3, 4

Change = Callable[[Federation, Evidence], Evidence]
Entries = list[Entry]


def failing(found: Verification) -> set[tuple[str, str]]:
    return {(check.party, check.name) for check in found.checks if not check.passed}


def changed(ran: Federation, party: int, change: Change) -> Verification:
    """The whole federation's evidence with that of one party changed, verified."""
    evidences = ran.evidences()
    evidences[party] = change(ran, evidences[party])
    return verify(evidences, ran.trust)


def rewrite(change: Callable[[Entries], Any]) -> Change:
    """By the owner of the ledger, who signs anew."""
    return lambda ran, evidence: ran.rewritten(evidence, change)


def leaves(change: Callable[[list[bytes]], Any]) -> Change:
    """By somebody without the key."""

    def apply(_: Federation, evidence: Evidence) -> Evidence:
        found = list(evidence.leaves)
        change(found)
        return replace(evidence, leaves=tuple(found))

    return apply


def first(entries: Entries, kind: type[Any], **fields: Any) -> int:
    for at, entry in enumerate(entries):
        if isinstance(entry, kind) and all(getattr(entry, name) == value for name, value in fields.items()):
            return at
    raise AssertionError(kind)


def put(entries: Entries, kind: type[Any], **fields: Any) -> None:
    """Change fields of the first entry of a kind."""
    at = first(entries, kind)
    entries[at] = entries[at].model_copy(update=fields)


def put_event(entries: Entries, **fields: Any) -> None:
    at = first(entries, Charge)
    entries[at] = charged(entries[at], **fields)


def swap(items: list[Any], a: int, b: int) -> None:
    items[a], items[b] = items[b], items[a]


def drop(entries: Entries, kind: type[Any], **fields: Any) -> None:
    del entries[first(entries, kind, **fields)]


def again(entries: Entries, **fields: Any) -> None:
    """The last charge once more, under another event id."""
    last = max(at for at, entry in enumerate(entries) if isinstance(entry, Charge))
    entries.append(
        charged(entries[last], event_id="ab" * 16, **fields).model_copy(update={"time": entries[-1].time})
    )


def bytes_changed(found: list[bytes]) -> None:
    found[1] = found[1].replace(b"approved", b"approvec")


def field_changed(found: list[bytes]) -> None:
    found[1] = encode(decode(found[1]).model_copy(update={"reason": "A. Person: for another test"}))


def noise_lowered(ran: Federation, evidence: Evidence) -> Evidence:
    """The event of the same study with less noise: it is sound, but it is not what was approved."""
    real = next(iter(ran.manifests.values()))
    study = real.study.model_copy(
        update={"privacy": real.study.privacy.model_copy(update={"noise_multiplier": 16.0})}
    )
    other = check(real.model_copy(update={"study": study}), None)

    def change(entries: Entries) -> None:
        at = first(entries, Charge)
        old = entries[at]
        assert isinstance(old, Charge)
        event = other.event(old.register_id, 1, 1, old.event_id).to_fields()
        entries[at] = charged(old, **{**event, "manifest_digest": real.digest.hex()})

    return ran.rewritten(evidence, change)


def signed_by_another(ran: Federation, evidence: Evidence) -> Evidence:
    """A head over the same entries under the right origin, signed by a key of nobody."""
    public, key = public_key(ran.keepers[MARY].key), new_signing_key()
    body = evidence.head.split("\n\n")[0] + "\n"
    return replace(evidence, head=sign_note(body, origin_of(public), public, key.sign))


def heads(change: Callable[[Federation, Witness], Any]) -> Change:
    """A changed record of heads, in its own form."""

    def apply(ran: Federation, evidence: Evidence) -> Evidence:
        witness = Witness(evidence.party, lambda _: None, evidence.heads)
        change(ran, witness)
        return replace(evidence, heads=witness.to_bytes())

    return apply


def forge_seen(_: Federation, witness: Witness) -> None:
    head = witness.seen[NORTHGATE]
    witness.seen[NORTHGATE] = replace(head, sig=bytes([head.sig[0] ^ 1]) + head.sig[1:])


def see_another_root(ran: Federation, witness: Witness) -> None:
    """What a hospital sees of a ledger that was forked: properly signed, but of other entries."""
    head = replace(witness.seen[NORTHGATE], root=b"\7" * 32)
    witness.seen[NORTHGATE] = records.signed(head, head.man, ran.keepers[NORTHGATE].key.sign)


def see_less(ran: Federation, witness: Witness) -> None:
    head = replace(witness.seen[NORTHGATE], size=1, root=b"\7" * 32)
    witness.seen[NORTHGATE] = records.signed(head, head.man, ran.keepers[NORTHGATE].key.sign)


def offered(witness: Witness) -> Offer:
    assert witness.cosigned is not None
    return witness.cosigned


def forge_cosignature(_: Federation, witness: Witness) -> None:
    offer = offered(witness)
    cosign = offer.cosigns[NORTHGATE]
    forged = replace(cosign, sig=offer.cosigns[RIVERSIDE].sig)
    witness.cosigned = Offer(offer.head, {**offer.cosigns, NORTHGATE: forged})


def few_cosignatures(_: Federation, witness: Witness) -> None:
    offer = offered(witness)
    witness.cosigned = Offer(offer.head, {NORTHGATE: offer.cosigns[NORTHGATE]})


def cosigned_by_itself(ran: Federation, witness: Witness) -> None:
    offer = offered(witness)
    own = records.Cosign(MARY, records.head_digest(offer.head))
    own = records.signed(own, offer.head.man, ran.keepers[MARY].key.sign)
    witness.cosigned = Offer(offer.head, {**offer.cosigns, MARY: own})


def never_cosigned(_: Federation, witness: Witness) -> None:
    witness.cosigned = None


def cosigned_another(ran: Federation, witness: Witness) -> None:
    """A fork: the others cosigned a head that is not of this ledger."""
    old = offered(witness)
    head = replace(old.head, root=b"\7" * 32)
    head = records.signed(head, head.man, ran.keepers[MARY].key.sign)
    witness.cosigned = Offer(head, {})


def other_roster(ran: Federation) -> Roster:
    """The roster with another ledger key for Holy Cross."""
    *others, last = ran.roster.members
    return Roster((*others, replace(last, ledger_key=public_key(new_signing_key()))))


def replaced_own_roster(ran: Federation, evidence: Evidence) -> Evidence:
    return replace(evidence, roster=SignedRoster.create(other_roster(ran), ran.hub_key))


def approve(ran: Federation, evidence: Evidence, manifest: Manifest, document: bytes) -> Evidence:
    """The evidence with one more study, approved by the owner of the ledger."""
    name = manifest.digest.hex()

    def change(entries: Entries) -> None:
        old = entries[first(entries, Approval)]
        entries.append(old.model_copy(update={"manifest": name, "time": entries[-1].time}))

    more = ran.rewritten(evidence, change)
    return replace(more, studies={**more.studies, name: document})


def replaced_study_roster(ran: Federation, evidence: Evidence) -> Evidence:
    """A hub gives one hospital a study with another key for a member."""
    roster = other_roster(ran)
    manifest = ran.manifest(roster)
    signed = SignedRoster.create(roster, ran.hub_key)
    return approve(ran, evidence, manifest, ran.document(manifest, signed))


def forged_study_roster(ran: Federation, evidence: Evidence) -> Evidence:
    roster = other_roster(ran)
    manifest = ran.manifest(roster)
    signed = SignedRoster.create(roster, new_signing_key())
    return approve(ran, evidence, manifest, ran.document(manifest, signed))


def expired_study(ran: Federation, evidence: Evidence) -> Evidence:
    manifest = ran.manifest(expires="2026-11-23T07:00Z")
    return approve(ran, evidence, manifest, ran.document(manifest))


def unrunnable_study(ran: Federation, evidence: Evidence) -> Evidence:
    manifest = ran.manifest(aggregation__codec__step=1e-9)
    return approve(ran, evidence, manifest, ran.document(manifest))


def study_forged(ran: Federation, evidence: Evidence) -> Evidence:
    name = next(iter(evidence.studies))
    data = bytearray(evidence.studies[name])
    data[-1] ^= 1
    return replace(evidence, studies={**evidence.studies, name: bytes(data)})


def studies_exchanged(_: Federation, evidence: Evidence) -> Evidence:
    (a, one), (b, two) = evidence.studies.items()
    return replace(evidence, studies={a: two, b: one})


def study_gone(_: Federation, evidence: Evidence) -> Evidence:
    return replace(evidence, studies=dict(list(evidence.studies.items())[1:]))


def another_hub(ran: Federation, evidence: Evidence) -> Evidence:
    return replace(evidence, hub_key=public_key(new_signing_key()))


def replayed(ran: Federation, evidence: Evidence) -> Evidence:
    """Another hospital's approval, put into this ledger."""
    theirs = [decode(leaf) for leaf in ran.evidence(NORTHGATE).leaves]
    approval = theirs[first(theirs, Approval)]
    return ran.rewritten(
        evidence, lambda entries: entries.insert(1, approval.model_copy(update={"time": entries[0].time}))
    )


def unsigned(entries: Entries) -> Entry:
    """Caps raised with one key's word, which is nobody's that the policy names."""
    opened = entries[0]
    assert isinstance(opened, Opened)
    caps = {"epsilon_t": "9", "epsilon_w": "9", "register_id": opened.register_id, "size": len(entries)}
    said = {"actor": opened.actor, "time": entries[-1].time, "reason": "the board", "action": "raise_caps"}
    return Override.model_validate({**said, **caps, "signatures": {opened.actor: "0" * 128}})


def forbidding(opened: Entry) -> Entry:
    assert isinstance(opened, Opened)
    rules = {
        "minimum_hospitals": 4,
        "max_round_minutes": 60,
        "without_differential_privacy": True,
        "without_masks": False,
        "coordinators": (),
    }
    caps = {name: getattr(opened, name) for name in ("epsilon_t", "epsilon_w", "delta")}
    after = Rules.model_validate({**caps, **rules})
    return PolicyChange(actor=opened.actor, time=opened.time, before=None, after=after)


def transcripts(change: Callable[[Federation, list[Transcript]], Any]) -> Change:
    """Other transcripts of the first study's rounds."""

    def apply(ran: Federation, evidence: Evidence) -> Evidence:
        man = next(iter(ran.transcripts))
        found = list(ran.transcripts[man])
        change(ran, found)
        return replace(evidence, rounds={**evidence.rounds, man.hex(): ran.rounds(found)})

    return apply


def forged_opening(_: Federation, found: list[Transcript]) -> None:
    """Opened by the hub in the name of Northgate, under a signature of another record."""
    openings = found[0].openings
    found[0] = replace(
        found[0], openings=(openings[0], replace(openings[1], sig=openings[0].sig), *openings[2:])
    )


def another_result(ran: Federation, found: list[Transcript]) -> None:
    """A result that the hub signed later, of another sum."""
    result = replace(found[0].result, sum_digest=bytes(32))
    found[0] = replace(found[0], result=records.signed(result, found[0].start.man, ran.hub_key.sign))


def another_round(ran: Federation, found: list[Transcript]) -> None:
    """One more round that all hospitals have signed, and the hub's ledger does not have."""
    man = found[0].start.man
    kept, ran.transcripts[man] = ran.transcripts[man], list(found)
    try:
        found.append(ran.opened(ran.manifests[man], 5, (1, 2, 3, 4)))
    finally:
        ran.transcripts[man] = kept


def invented_sum(ran: Federation, evidence: Evidence) -> Evidence:
    """The hub says that it completed a round of which the hospitals have signed nothing."""

    def change(entries: Entries) -> None:
        last = max(at for at, entry in enumerate(entries) if isinstance(entry, Completed))
        old = entries[last]
        assert isinstance(old, Completed)
        later = {"round": old.round + 1, "step": old.step + 1, "time": entries[-1].time}
        entries.append(old.model_copy(update=later))

    return ran.rewritten(evidence, change)


def hidden_round(ran: Federation, evidence: Evidence) -> Evidence:
    """A hub that leaves out the first sum of a study, of its ledger and of its transcripts."""
    man = next(iter(ran.transcripts))

    def change(entries: Entries) -> None:
        drop(entries, Completed, manifest=man.hex())
        for at, entry in enumerate(entries):
            if isinstance(entry, Completed) and entry.manifest == man.hex():
                entries[at] = entry.model_copy(update={"step": entry.step - 1})

    rounds = {**evidence.rounds, man.hex(): ran.rounds(ran.transcripts[man][1:])}
    return replace(ran.rewritten(evidence, change), rounds=rounds)


def old_head(ran: Federation, evidence: Evidence) -> Evidence:
    return replace(evidence, head=ran.head(evidence.party, evidence.leaves[:-1]))


def rolled_back(count: int) -> Change:
    """An older copy of the ledger, with the head of that time."""
    return rewrite(lambda entries: entries.__delitem__(slice(count, None)))


MARYS, HUBS, NORTHS = "St. Mary", "hub", "Northgate"

TABLE: list[tuple[str, int, Change, str, str]] = [
    # A byte, a field, removal, reordering, truncation: by somebody without the key.
    ("a byte of an entry", MARY, leaves(bytes_changed), MARYS, "leaves"),
    ("a field of an entry", MARY, leaves(field_changed), MARYS, "tree"),
    ("an entry removed", MARY, leaves(lambda found: found.pop(1)), MARYS, "leaves"),
    ("entries reordered", MARY, leaves(lambda found: swap(found, 1, 2)), MARYS, "leaves"),
    ("entries cut off", MARY, leaves(lambda found: found.pop()), MARYS, "tree"),
    ("the last entry twice", MARY, leaves(lambda found: found.append(found[-1])), MARYS, "leaves"),
    # The same by the owner, who signs anew.
    ("a field, signed anew", MARY, rewrite(lambda e: put(e, Approval, reason="B: no")), MARYS, "as-seen"),
    ("removal, signed anew", MARY, rewrite(lambda e: drop(e, Outcome)), MARYS, "as-seen"),
    ("reordering, signed anew", MARY, rewrite(lambda e: swap(e, 3, 4)), MARYS, "as-seen"),
    ("truncation, signed anew", MARY, rolled_back(9), MARYS, "as-seen"),
    ("truncation to what was seen", MARY, rolled_back(15), MARYS, "charged-as-completed"),
    ("truncation of the hub", HUB, rolled_back(8), HUBS, "as-seen"),
    ("a fork", NORTHGATE, rewrite(lambda e: put(e, Opened, epsilon_t="2.5")), NORTHS, "as-seen"),
    ("a fork that one saw", MARY, heads(see_another_root), NORTHS, "as-seen"),
    # Sums that the hub says it opened.
    ("all transcripts gone", HUB, lambda _, e: replace(e, rounds={}), HUBS, "openings"),
    ("a transcript gone", HUB, transcripts(lambda _, found: found.pop(1)), HUBS, "openings"),
    ("a transcript twice", HUB, transcripts(lambda _, found: found.append(found[1])), HUBS, "openings"),
    ("a forged opening", HUB, transcripts(forged_opening), HUBS, "openings"),
    ("another result", HUB, transcripts(another_result), HUBS, "openings"),
    ("a round that the ledger does not have", HUB, transcripts(another_round), HUBS, "openings"),
    ("the first round hidden", HUB, hidden_round, HUBS, "openings"),
    ("an invented sum", HUB, invented_sum, HUBS, "openings"),
    ("transcripts that are none", HUB, lambda _, e: replace(e, rounds=dict.fromkeys(e.rounds, b"x")), HUBS, "openings"),
    # Signatures, heads, names, keys.
    ("a forged head", MARY, signed_by_another, MARYS, "head-signature"),
    ("a head of another ledger", MARY, lambda ran, e: replace(e, head=ran.evidence(NORTHGATE).head), MARYS, "head-signature"),
    ("an old head", MARY, old_head, MARYS, "tree"),
    ("a forged head of another", MARY, heads(forge_seen), MARYS, "heads"),
    ("an old head of another", MARY, heads(see_less), MARYS, "remembers"),
    ("all heads of others gone", MARY, heads(lambda _, w: w.seen.clear()), MARYS, "remembers"),
    ("a forged cosignature", MARY, heads(forge_cosignature), MARYS, "cosignatures"),
    ("too few cosignatures", MARY, heads(few_cosignatures), MARYS, "cosignatures"),
    ("cosigned by itself", MARY, heads(cosigned_by_itself), MARYS, "cosignatures"),
    ("no cosignature", MARY, heads(never_cosigned), MARYS, "cosignatures"),
    ("cosigned another ledger", MARY, heads(cosigned_another), MARYS, "cosignatures"),
    ("the hub without cosignatures", HUB, heads(never_cosigned), HUBS, "cosignatures"),
    ("another hub key", MARY, another_hub, MARYS, "identity"),
    ("another name", MARY, lambda _, e: replace(e, name="St. Marys"), MARYS, "identity"),
    ("a swapped site", MARY, lambda ran, e: replace(ran.evidence(NORTHGATE), party=MARY, name=MARYS), MARYS, "head-signature"),
    ("a site's ledger as the hub's", HUB, lambda ran, e: replace(ran.evidence(MARY), party=HUB, name="hub"), HUBS, "leaves"),
    ("a replaced roster", MARY, replaced_own_roster, MARYS, "roster"),
    ("a roster of nobody", MARY, lambda ran, e: replace(e, roster=SignedRoster.create(ran.roster, new_signing_key())), MARYS, "roster"),
    # Studies.
    ("a study with a replaced roster", MARY, replaced_study_roster, MARYS, "studies"),
    ("a study with a forged roster", MARY, forged_study_roster, MARYS, "studies"),
    ("a forged study", MARY, study_forged, MARYS, "studies"),
    ("studies exchanged", MARY, studies_exchanged, MARYS, "studies"),
    ("a study that is gone", MARY, study_gone, MARYS, "studies"),
    ("a study that cannot be run", MARY, unrunnable_study, MARYS, "admissible"),
    ("a study that the hub conceals", MARY, unrunnable_study, MARYS, "completed-as-said"),
    # Approvals.
    ("a replayed approval", MARY, replayed, MARYS, "actor"),
    ("an approval after expiry", MARY, expired_study, MARYS, "approvals"),
    ("no approval", MARY, rewrite(lambda e: drop(e, Approval)), MARYS, "approval-before-charge"),
    ("a denial", MARY, rewrite(lambda e: put(e, Approval, decision="denied")), MARYS, "approval-before-charge"),
    ("an approval after the charge", MARY, rewrite(lambda e: swap(e, 1, 2)), MARYS, "approval-before-charge"),
    # Charges.
    ("lowered noise", MARY, noise_lowered, MARYS, "charges"),
    ("another rate", MARY, rewrite(lambda e: put_event(e, q="0.5")), MARYS, "charges"),
    ("another task", MARY, rewrite(lambda e: put_event(e, task="statistics")), MARYS, "charges"),
    ("a field taken away", MARY, rewrite(lambda e: put_event(e, beta=None)), MARYS, "charges"),
    ("a round twice", MARY, rewrite(again), MARYS, "charges"),
    ("a round too many", MARY, rewrite(lambda e: again(e, round=99)), MARYS, "charges"),
    ("a round that is no number", MARY, rewrite(lambda e: again(e, round="3")), MARYS, "charges"),
    ("a charge of no study", MARY, rewrite(lambda e: put_event(e, manifest_digest="ab" * 32)), MARYS, "charges"),
    ("a lowered cap", MARY, rewrite(lambda e: put(e, Opened, epsilon_t="0.5")), MARYS, "caps"),
    ("a policy that forbids it", MARY, rewrite(lambda e: e.insert(1, forbidding(e[0]))), MARYS, "policy"),
    ("an override that nobody signed", MARY, rewrite(lambda e: e.append(unsigned(e))), MARYS, "overrides"),
    ("a second register", MARY, rewrite(lambda e: e.append(e[0].model_copy(update={"register_id": "ab" * 16, "time": e[-1].time}))), MARYS, "register"),
    ("a charge left out", MARY, rewrite(lambda e: e.__delitem__(slice(2, 5))), MARYS, "charged-as-completed"),
    ("an upload left out", MARY, rewrite(lambda e: drop(e, Outcome)), MARYS, "outcomes"),
    ("an upload of another sum", MARY, rewrite(lambda e: put(e, Outcome, ctx="ab" * 32)), MARYS, "charged-as-completed"),
    # The hub.
    ("a sum left out", HUB, rewrite(lambda e: (drop(e, Ended), e.__delitem__(slice(8, 9)))), MARYS, "completed-as-said"),
    ("a sum over one who was not there", HUB, rewrite(lambda e: e.__setitem__(6, e[6].model_copy(update={"cohort": (1, 2, 3, 4)}))), "Holy Cross", "charged-as-completed"),
    ("a sum over a stranger", HUB, rewrite(lambda e: put(e, Completed, cohort=(1, 2, 3, 9))), HUBS, "completions"),
    ("a round that the study does not have", HUB, rewrite(lambda e: put(e, Completed, round=99)), HUBS, "completions"),
    ("a sum without privacy over three", HUB, rewrite(lambda e: e.__setitem__(-1, e[-1].model_copy(update={"cohort": (1, 2, 3)}))), HUBS, "same-hospitals"),
    ("another coordinator", HUB, rewrite(lambda e: put(e, Submission, coordinator=key_text(public_key(new_signing_key())))), HUBS, "completions"),
    ("another fingerprint", HUB, rewrite(lambda e: put(e, Membership, fingerprint="-".join(["0000"] * 8))), HUBS, "membership"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("party", "change", "whose", "name"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_tampering_is_found(ran: Federation, party: int, change: Change, whose: str, name: str) -> None:
    found = changed(ran, party, change)
    assert not found.passed
    assert (whose, name) in failing(found)
    # What was changed is found in whoever holds only that one file and the trusted keys, or by the others'.
    assert all(check.detail for check in found.checks)


def test_the_table_covers_every_check(ran: Federation) -> None:
    made = {check.name for check in verify(ran.evidences(), ran.trust).checks}
    assert made - {row[4] for row in TABLE} == {"study-members"}


def test_an_omitted_ledger_is_named(ran: Federation) -> None:
    evidences = ran.evidences()
    del evidences[RIVERSIDE], evidences[HUB]
    found = verify(evidences, ran.trust)
    assert found.missing == ("hub", "Riverside")
    assert found.passed


def test_a_member_whom_nobody_vouches_for_is_found(ran: Federation) -> None:
    """A trusted roster from before Holy Cross was there: the hub's ledger says who it is, without it nobody."""
    older = Trust(public_key(ran.hub_key), SignedRoster.create(Roster(ran.roster.members[:3]), ran.hub_key))
    assert verify(ran.evidences()[:4], older).passed
    alone = verify([ran.evidence(MARY)], older)
    assert failing(alone) == {(MARYS, "study-members")}
    stranger = verify([ran.evidence(CROSS)], older)
    assert ("Holy Cross", "identity") in failing(stranger)
    assert ("Holy Cross", "head-signature") in failing(stranger)


def test_an_old_evidence_is_found_by_the_others(ran: Federation, evidences: list[Evidence]) -> None:
    """Everything of it was true once: entries, head, and what it had seen."""
    leaves = evidences[MARY].leaves[:6]
    _, own = read_state(evidences[MARY].heads)
    assert own is not None
    old = replace(evidences[MARY], leaves=leaves, head=ran.head(MARY, leaves), heads=b"")
    found = failing(verify([*evidences[:1], old, *evidences[2:]], ran.trust))
    assert {(MARYS, "as-seen"), (MARYS, "remembers"), (MARYS, "charged-as-completed")} <= found
