"""Evidence that nobody touched holds, whatever was legitimate happened, and no change of a byte passes."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.admissible import check
from common.audit.conduct import SITE_RULES, caps, policy
from common.audit.evidence import Evidence
from common.audit.party import Party, read_head, read_party, roots
from common.audit.trust import claimed, read_trust
from common.audit.verify import Verification, verify
from common.errors import UsageError, VerificationError, WardroundError
from common.identity import fingerprint, key_text, new_signing_key, public_key
from common.ledger.entries import (
    Charge,
    Entry,
    Membership,
    Opened,
    Outcome,
    Pause,
    PolicyChange,
    Restored,
    Rules,
    decode,
    encode,
)
from common.ledger.tree import leaf_hash, root
from common.privacy.events import Event
from common.privacy.filter import Cap, admits
from common.roster import Roster, SignedRoster
from tests.common.audit.federation import WITHOUT_DP, Federation

EVERYBODY = {"identity", "roster", "leaves", "actor", "head-signature", "studies", "admissible", "heads"}
EVERYBODY |= {"tree", "cosignatures", "study-members", "as-seen", "same-hospitals"}
SITE = {
    "register",
    "approvals",
    "approval-before-charge",
    "charges",
    "overrides",
    "caps",
    "policy",
    "outcomes",
    "remembers",
}
SITE |= {"charged-as-completed", "completed-as-said"}
HUB = {"membership", "completions", "openings"}


def wrong(found: Verification) -> list[str]:
    return [f"{check.party} {check.name}: {check.detail}" for check in found.checks if not check.passed]


def test_untouched_evidence_passes_every_check(ran: Federation, evidences: list[Evidence]) -> None:
    found = verify(evidences, ran.trust)
    assert wrong(found) == []
    assert (found.passed, found.trusted, found.missing) == (True, True, ())
    made = {
        name: {c.name for c in found.checks if c.party == name} for name in ("hub", "St. Mary", "Holy Cross")
    }
    assert made["hub"] == EVERYBODY | HUB
    assert made["St. Mary"] == EVERYBODY | SITE
    # Each pair is compared: four others have seen this ledger.
    assert sum(c.name == "as-seen" for c in found.checks if c.party == "Holy Cross") == 4
    assert [party.id for party in found.parties] == [0, 1, 2, 3, 4]
    assert [len(party.entries) for party in found.parties] == [12, 18, 18, 18, 15]
    assert all(party.checkpoint and len(party.studies) == 2 for party in found.parties)


def test_each_file_stands_alone(ran: Federation, evidences: list[Evidence]) -> None:
    for evidence in evidences:
        found = verify([evidence], ran.trust)
        assert wrong(found) == []
        assert evidence.name not in found.missing
        assert len(found.missing) == 4


def test_order_of_files_does_not_matter(ran: Federation, evidences: list[Evidence]) -> None:
    assert verify(evidences[::-1], ran.trust) == verify(evidences, ran.trust)


def test_without_trust_the_keys_are_the_evidences_own(ran: Federation, evidences: list[Evidence]) -> None:
    found = verify(evidences, None)
    assert (found.passed, found.trusted) == (True, False)
    unsigned = [replace(e, roster=SignedRoster.create(ran.roster, new_signing_key())) for e in evidences]
    with pytest.raises(VerificationError, match="its own hub key"):
        verify(unsigned, None)


def test_another_federation_is_self_consistent_only(ran: Federation, tmp_path: Path) -> None:
    other = Federation(tmp_path)
    other.round(other.submit(), 1)
    shown = other.evidences()
    other.close()
    assert verify(shown, None).passed
    found = verify(shown, ran.trust)
    # Not a single party of it is believed.
    assert {check.party for check in found.checks if check.name == "head-signature" and not check.passed} == {
        "hub", "St. Mary", "Northgate", "Riverside", "Holy Cross",
    }  # fmt: skip


def test_two_files_of_one_party_are_refused(ran: Federation, evidences: list[Evidence]) -> None:
    for given_ in ([], [evidences[1], evidences[1]]):
        with pytest.raises(UsageError) as error:
            verify(given_, ran.trust)
        assert error.value.code == "audit.files"


def test_a_federation_before_its_first_round_holds(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.submit()
    evidences = [replace(evidence, heads=b"") for evidence in federation.evidences()]
    assert wrong(verify(evidences, federation.trust)) == []
    federation.close()


def test_a_lost_round_a_pause_and_a_restore_hold(tmp_path: Path) -> None:
    """A round that was charged and lost is charged again under another number; heads of a lost round have too
    few cosignatures; a restored register charges nothing more."""
    federation = Federation(tmp_path)
    study = federation.submit()
    mary = federation.keepers[1]
    federation.cosign(study, 1)
    event = check(study, None).event(mary.register, 1, 1, "ab" * 16)
    mary.append(Charge, event=event.to_fields())
    mary.append(Pause, decision="paused", reason="A. Person: maintenance")
    mary.append(Pause, decision="resumed", reason="A. Person: done")
    federation.round(study, 2)
    mary.append(Restored, reason="A. Person: disk")
    federation.cosign(study, 3)
    offer = mary.witness.cosigned
    assert offer is not None
    mary.witness.cosigned = replace(offer, cosigns={})
    assert wrong(verify(federation.evidences(), federation.trust)) == []
    federation.close()


def test_a_restored_site_is_charged_without_cosignatures(tmp_path: Path) -> None:
    """A backup from before the first round: its reservation is charged in full, and nobody cosigns that."""
    federation = Federation(tmp_path)
    study, mary = federation.submit(), federation.keepers[1]
    for number in (1, 2):
        event = check(study, None).event(mary.register, number, 1, f"{number:032x}")
        mary.append(Charge, event=event.to_fields())
    unsaid = wrong(verify([replace(federation.evidence(1), heads=b"")], federation.trust))
    assert unsaid == ["St. Mary cosignatures: entry 2 was made without any head that others had cosigned"]
    said = {"state": "charged", "attempt": 1, "ctx": None, "reason": "site_restored"}
    for number in (1, 2):
        mary.append(Outcome, event_id=f"{number:032x}", **said)
    mary.append(Restored, reason="A. Person: disk")
    # What a restore charges is bounded by the register's caps alone.
    party, _ = read_party(federation.evidence(1), federation.trust)
    lowered = PolicyChange(actor=mary.actor, before=None, after=rules(federation, "0.1", coordinators=()))
    party = replace(party, entries=(party.entries[0], lowered, *party.entries[1:]))
    assert (caps(party), policy(party)) == ("", "")
    assert wrong(verify([replace(federation.evidence(1), heads=b"")], federation.trust)) == []
    federation.close()


def test_a_restored_ledger_is_another_than_was_seen(ran: Federation, evidences: list[Evidence]) -> None:
    """True, and not to be kept from the auditor: what the backup lacked is gone. The line says why."""
    actor, last = ran.keepers[1].actor, decode(evidences[1].leaves[8]).time
    evidences[1] = ran.rewritten(
        evidences[1],
        lambda entries: entries.__setitem__(
            slice(9, None), [Restored(actor=actor, time=last, reason="A: disk")]
        ),
    )
    lines = [line for line in wrong(verify(evidences, ran.trust)) if "as-seen" in line]
    assert len(lines) == 4
    assert all(line.endswith("; it says that it was restored from a backup") for line in lines)


def test_a_revoked_hospital_stays_accounted_for(tmp_path: Path) -> None:
    """Who has left is in the rosters of the studies of then, and in the hub's ledger, but no more trusted."""
    federation = Federation(tmp_path)
    federation.round(federation.submit(), 1)
    gone = federation.roster.members[3]
    fields = {"id": gone.id, "name": gone.name, "fingerprint": gone.fingerprint}
    federation.hub.append(Membership, decision="revoked", **fields)
    left = SignedRoster.create(Roster(federation.roster.members[:3]), federation.hub_key)
    hub, *sites, last = federation.evidences()
    shown = [replace(hub, roster=left), *sites]
    trust = read_trust(fingerprint(public_key(federation.hub_key)), shown)
    assert len(trust.roster.members) == 3
    found = verify(shown, trust)
    assert (wrong(found), found.missing) == ([], ())
    assert ("Holy Cross", "identity") in {
        (c.party, c.name) for c in verify([*shown, last], trust).checks if not c.passed
    }
    federation.close()


# -- what is recomputed ------------------------------------------------------------------------------------


def test_a_charge_is_what_the_manifest_gives(ran: Federation) -> None:
    """The auditor plans one event a study and exchanges ids and round: that is Admitted.event, field by field."""
    party, _ = read_party(ran.evidence(1), ran.trust)
    for entry in party.entries:
        if isinstance(entry, Charge):
            _, _, admitted = party.studies[str(entry.event["manifest_digest"])]
            assert admitted is not None
            number = entry.event["round"]
            assert type(number) is int
            event = admitted.event(entry.register_id, number, 1, entry.event_id)
            assert event.to_fields() == entry.event


def long_ledger(federation: Federation, rounds: int, cap: str) -> Party:
    """A party whose ledger holds that many charges of one study, under that cap."""
    study = federation.submit(training__rounds=rounds)
    keeper, admitted = federation.keepers[1], check(study, None)
    entries: list[Entry] = [e for e in keeper.ledger.entries() if isinstance(e, Opened)]
    entries[0] = entries[0].model_copy(update={"epsilon_t": cap, "epsilon_w": cap})
    for number in range(1, rounds + 1):
        event = admitted.event(keeper.register, number, 1, f"{number:032x}")
        charge = Charge(actor=keeper.actor, seq=len(entries), time=entries[0].time, event=event.to_fields())
        entries.append(charge)
    evidence = federation.evidence(1)
    party, _ = read_party(evidence, federation.trust)
    return replace(party, entries=tuple(entries))


def test_the_first_charge_over_the_caps_is_named(tmp_path: Path) -> None:
    """The entry at which the filter, asked charge by charge, refuses first."""
    federation = Federation(tmp_path)
    for cap in ("0.3", "0.5", "1", "2"):
        party = long_ledger(federation, 12, cap)
        events = [Event.from_fields(e.event) for e in party.entries if isinstance(e, Charge)]
        limit = Cap(float(cap), float(cap), 1e-6)
        verdicts = [admits(events[:at], event, limit).admitted for at, event in enumerate(events)]
        said = caps(party)
        if all(verdicts):
            assert said == ""
        else:
            assert said == f"entry {1 + verdicts.index(False)} charges more than the caps in force admit"
        assert verdicts == sorted(verdicts, reverse=True)
    federation.close()


def test_a_lowered_cap_acts_at_once(tmp_path: Path) -> None:
    """Charge by charge, under the caps in force: the same answer as asking the filter each time."""
    federation = Federation(tmp_path)
    party = long_ledger(federation, 12, "3")
    events = [Event.from_fields(e.event) for e in party.entries if isinstance(e, Charge)]
    opened, *charges = party.entries
    for turns in (
        {3: "0.5"},
        {3: "0.9", 9: "0.6"},
        {5: "0.3", 8: "3"},
        {2: "0.5", 4: "3", 9: "0.5"},
        {2: "3"},
    ):
        cap, entries, expected = 3.0, [opened], list[int]()
        for at, charge in enumerate(charges):
            if at in turns:
                cap = float(turns[at])
                change = PolicyChange(actor=opened.actor, before=None, after=rules(federation, turns[at]))
                entries.append(change)
            entries.append(charge)
            if not admits(events[:at], events[at], Cap(cap, cap, 1e-6)).admitted:
                expected.append(charge.seq)
        said = caps(replace(party, entries=tuple(entries)))
        assert said == (f"entry {expected[0]} charges more than the caps in force admit" if expected else "")
    above = PolicyChange(actor=opened.actor, before=None, after=rules(federation, "3.5"))
    assert "above those of the register" in caps(replace(party, entries=(opened, above, *charges)))
    federation.close()


SOURCE = {"name": "extract", "patient": "patient", "columns": ("age", "bmi", "readmitted")}


def rules(federation: Federation, epsilon: str = "3", **changes: Any) -> Rules:
    allowed = {
        "epsilon_t": epsilon,
        "epsilon_w": epsilon,
        "delta": "0.000001",
        "minimum_hospitals": 3,
        "max_round_minutes": 1,
        "without_differential_privacy": False,
        "without_masks": False,
        "coordinators": (key_text(public_key(federation.coordinator)),),
        "sources": (SOURCE,),
    }
    return Rules.model_validate({**allowed, **changes})


def test_a_study_that_the_policy_forbids_is_found(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    mary = federation.keepers[1]
    mary.append(PolicyChange, before=None, after=rules(federation))
    federation.round(federation.submit(), 1)
    assert wrong(verify(federation.evidences(), federation.trust)) == []
    party, _ = read_party(federation.evidence(1), federation.trust)
    opened, recorded, *others = party.entries
    forbidding = [
        {"minimum_hospitals": 4},
        {"coordinators": ()},
        {"max_round_minutes": 1, "minimum_hospitals": 4},
        {"sources": ()},
        {"sources": (SOURCE | {"name": "other"},)},
        {"sources": (SOURCE | {"patient": "visit"},)},
        {"sources": (SOURCE | {"columns": ("age", "bmi")},)},
    ]
    for change in forbidding:
        said = recorded.model_copy(update={"after": rules(federation, **change)})
        assert "which the policy did not allow" in policy(replace(party, entries=(opened, said, *others)))
    plain = federation.submit(**WITHOUT_DP)
    federation.round(plain, 1)
    assert wrong(verify([federation.evidence(1)], federation.trust)) == [
        f"St. Mary policy: entry 7 charges study {plain.digest.hex()[:12]}, which the policy did not allow"
    ]
    long = federation.submit(aggregation__deadline_s=120)
    late, _ = read_party(federation.evidence(1), federation.trust)
    charge = next(entry for entry in late.entries if isinstance(entry, Charge))
    other = charge.model_copy(update={"event": {**charge.event, "manifest_digest": long.digest.hex()}})
    assert "did not allow" in policy(replace(late, entries=(opened, recorded, other)))
    federation.close()


def test_privacy_after_none_is_found(ran: Federation) -> None:
    """A study without privacy closes the register to every later one with it."""
    party, _ = read_party(ran.evidence(1), ran.trust)
    assert caps(party) == ""
    private = [e for e in party.entries if isinstance(e, Charge) and e.event["kind"] == "sum"]
    late = private[0].model_copy(update={"seq": 99})
    assert "entry 99" in caps(replace(party, entries=(*party.entries, late)))


def test_other_hospitals_without_privacy_are_found(tmp_path: Path) -> None:
    """PROTOCOL I12 over studies: the second one has other members."""
    federation = Federation(tmp_path, hospitals=5)
    plain = {**WITHOUT_DP, "aggregation__minimum_hospitals": 5}
    one, two = federation.submit(**plain), federation.submit(**plain)
    federation.round(one, 1, cohort=(1, 2, 3, 4, 5))
    federation.round(two, 1, cohort=(1, 2, 3, 4, 5))
    party, _ = read_party(federation.evidence(1), federation.trust)
    rule = next(rule for name, _, rule in SITE_RULES if name == "same-hospitals")
    assert rule(party) == ""
    manifest, roster, admitted = party.studies[two.digest.hex()]
    fewer = manifest.model_copy(update={"members": manifest.members[:4]})
    other = {**party.studies, two.digest.hex(): (fewer, roster, admitted)}
    assert "always the same" in rule(replace(party, studies=other))
    federation.close()


def test_roots_at_every_size() -> None:
    leaves = [b"%d" % number for number in range(70)]
    found = roots(leaves, range(100))
    assert set(found) == set(range(71))
    for size, value in found.items():
        assert value == root([leaf_hash(leaf) for leaf in leaves[:size]])
    assert roots(leaves, ()) == {}


def test_a_study_that_nobody_used_may_be_unrunnable(ran: Federation) -> None:
    manifest = ran.manifest(aggregation__codec__step=1e-9)
    evidence = ran.evidence(1)
    more = {**evidence.studies, manifest.digest.hex(): ran.document(manifest)}
    found = verify([replace(evidence, studies=more)], ran.trust)
    assert found.passed
    (line,) = (check.detail for check in found.checks if check.name == "admissible")
    assert manifest.digest.hex()[:12] in line


# -- what is hostile ---------------------------------------------------------------------------------------

PARTS = ("leaves", "head", "heads", "roster", "signature", "study")


def put(evidence: Evidence, part: str, data: bytes) -> Evidence:
    """The evidence with other bytes in one of its files."""
    if part == "leaves":
        return replace(evidence, leaves=tuple(data.split(b"\n")[:-1]))
    if part == "head":
        return replace(evidence, head=data.decode("utf-8", "replace"))
    if part == "heads":
        return replace(evidence, heads=data)
    if part == "roster":
        return replace(evidence, roster=SignedRoster(data, evidence.roster.signature))
    if part == "signature":
        return replace(evidence, roster=SignedRoster(evidence.roster.data, data))
    return replace(evidence, studies={**evidence.studies, next(iter(evidence.studies)): data})


def get(evidence: Evidence, part: str) -> bytes:
    return {
        "leaves": b"".join(leaf + b"\n" for leaf in evidence.leaves),
        "head": evidence.head.encode(),
        "heads": evidence.heads,
        "roster": evidence.roster.data,
        "signature": evidence.roster.signature,
        "study": next(iter(evidence.studies.values())),
    }[part]


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_byte_passes(ran: Federation, part: str, data: st.DataObject) -> None:
    evidence = ran.evidence(data.draw(st.sampled_from((0, 1))))
    whole = get(evidence, part)
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    changed = put(evidence, part, whole[:place] + bytes([other]) + whole[place + 1 :])
    assert not verify([changed], ran.trust).passed


def test_no_character_of_a_head_passes(ran: Federation) -> None:
    """All of them, also the spare bits of its base64."""
    evidence = ran.evidence(2)
    key = public_key(ran.keepers[2].key)
    assert read_head(evidence.head, key).size == len(evidence.leaves)
    for place, character in enumerate(evidence.head):
        for mask in (1, 2, 4, 8, 16, 32, 64):
            other = evidence.head[:place] + chr(ord(character) ^ mask) + evidence.head[place + 1 :]
            with pytest.raises(VerificationError):
                read_head(other, key)
    longer = replace(evidence, head=evidence.head + "\N{EM DASH} witness AAAA\n")
    assert not verify([longer], ran.trust).passed


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_hostile_evidence_never_raises(ran: Federation, data: st.DataObject) -> None:
    """Junk in every place: sound JSON of the wrong kind, leaves of others, half records."""
    own, other = ran.evidence(data.draw(st.integers(0, 4))), ran.evidence(data.draw(st.integers(0, 4)))
    junk = st.binary(max_size=80) | st.sampled_from([b"{}", b"[]", b"null", b'{"type":"charge"}', b"1e999"])
    leaf = junk | st.sampled_from(other.leaves) | st.sampled_from(own.leaves)
    event = st.dictionaries(
        st.sampled_from(["round", "manifest_digest", "q", "kind"]), st.sampled_from(["x", "", 1])
    )
    strange = [
        encode(entry.model_copy(update={"event": {**entry.event, **data.draw(event)}}))
        for entry in map(decode, own.leaves)
        if isinstance(entry, Charge)
    ]
    leaves = own.leaves[: data.draw(st.integers(0, 6))] + tuple(
        data.draw(st.lists(leaf | st.sampled_from(strange or [b""]), max_size=4))
    )
    changed = replace(
        own,
        party=data.draw(st.sampled_from((own.party, other.party, 7))),
        leaves=leaves,
        head=data.draw(st.sampled_from((own.head, other.head, "", "\n\n", ran.head(own.party, leaves)))),
        heads=data.draw(st.sampled_from((own.heads, other.heads, b"")) | junk),
        studies={**own.studies, data.draw(st.sampled_from([*own.studies, "ab" * 32])): data.draw(junk)},
        hub_key=data.draw(st.sampled_from((own.hub_key, public_key(ran.keepers[1].key)))),
    )
    verify([changed], ran.trust)
    rest = [evidence for evidence in ran.evidences() if evidence.party != changed.party]
    verify([changed, *rest], ran.trust)
    try:
        verify([changed], claimed([changed]))
    except WardroundError:
        return


def test_verification_needs_no_clock(
    ran: Federation, evidences: list[Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evidence is read many years later: nothing in it expires."""
    late = time.time() + timedelta(days=20_000).total_seconds()
    monkeypatch.setattr(time, "time", lambda: late)
    assert verify(evidences, ran.trust).passed
