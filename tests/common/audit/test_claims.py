"""The facts of a report against naive computations, and what stands out, in its order."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.admissible import check
from common.audit.claims import POINTS, Facts, Register, read_facts
from common.audit.evidence import Evidence
from common.audit.notices import KINDS, roster_changes
from common.audit.report import render
from common.audit.sheet import NOT_COVERED, down, up
from common.audit.verify import verify
from common.console import envelope
from common.identity import key_text, new_signing_key, public_key
from common.ledger.entries import (
    Approval,
    Charge,
    Closed,
    Consent,
    Ended,
    Entry,
    Membership,
    Opened,
    Outcome,
    Override,
    Pause,
    PolicyChange,
    Restored,
    Rules,
    decode,
)
from common.ledger.overrides import Proposal
from common.privacy.accountant import Term, compose_epsilon, pld_epsilon
from common.privacy.events import Event, settled
from common.privacy.filter import Cap, admits, odometer
from common.roster import Member, Roster, SignedRoster
from common.study import WITHOUT_MASKS, Manifest
from tests.common.audit.federation import SHARED, WITHOUT_DP, Federation, charged

DELTA = 1e-6
POISSON: dict[str, Any] = {
    "training__sampling": "poisson",
    "training__sampling_rate": 0.1,
    "training__steps": 4,
    "privacy__noise_multiplier": 3.0,
}


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


def facts_of(federation: Federation, evidences: list[Evidence] | None = None) -> Facts:
    shown = federation.evidences() if evidences is None else evidences
    return read_facts(verify(shown, federation.trust), federation.trust)


def register(facts: Facts, hospital: str) -> Register:
    return next(found for found in facts.registers if found.hospital == hospital)


def events(federation: Federation, number: int) -> list[Event]:
    """Each charge read by itself."""
    entries = federation.keepers[number].ledger.entries()
    return [Event.from_fields(entry.event) for entry in entries if isinstance(entry, Charge)]


def lose(federation: Federation, manifest: Manifest, round: int, member: int = 1) -> None:
    """A charge whose upload never left."""
    keeper = federation.keepers[member]
    event = check(manifest, None).event(keeper.register, round, 1, os.urandom(16).hex())
    keeper.append(Charge, event=event.to_fields())
    said: dict[str, Any] = {"state": "charged", "attempt": 1, "ctx": None, "reason": "round_lost"}
    keeper.append(Outcome, event_id=event.event_id, **said)


def rules(epsilon_t: str = "3", **changes: Any) -> Rules:
    said: dict[str, Any] = {"epsilon_t": epsilon_t, "epsilon_w": "3", "delta": "0.000001"}
    said |= {"minimum_hospitals": 3, "max_round_minutes": 60, "coordinators": ()}
    said |= {"sources": ({"name": "extract", "patient": "patient", "columns": ("age", "bmi", "readmitted")},)}
    return Rules.model_validate(
        {**said, "without_differential_privacy": False, "without_masks": False, **changes}
    )


# -- budgets -----------------------------------------------------------------------------------------------


def test_spent_is_the_odometer_of_every_charge(federation: Federation) -> None:
    for changes in ({}, POISSON):
        manifest = federation.submit(**changes)
        for number in (1, 2, 3):
            federation.round(manifest, number)
    lose(federation, manifest, 4)
    facts = facts_of(federation)
    for number, name in ((1, "St. Mary"), (2, "Northgate")):
        found, history = register(facts, name), events(federation, number)
        assert found.charges == len(history) == (7 if number == 1 else 6)
        for account in found.accounts:
            # By brute force: a cap there admits the history, one a little lower does not.
            for cap, admitted in ((account.spent, True), (account.spent - 1e-5, False)):
                assert admits(history[:-1], history[-1], Cap(cap, cap, DELTA)).admitted is admitted
        fixed = up(pld_epsilon(history, DELTA, "t"))
        lines = {line.key: line.text for line in found.lines}
        assert lines["as_if_fixed"] == f"epsilon_t = {fixed}, epsilon_w = {fixed}"
        assert up(found.accounts[0].spent) in lines["odometer"]
        assert "(3.0, 0.000001)-DP if at most t" in lines["guarantee"]
        assert "over 6 uploads" in lines["masks_fail"]


def test_reserved_is_what_may_still_be_charged(federation: Federation) -> None:
    manifest = federation.submit(training__rounds=4)
    assert manifest.study.aggregation.rounds_max == 7
    federation.round(manifest, 1)
    lose(federation, manifest, 2)
    facts = facts_of(federation)
    found, history = register(facts, "St. Mary"), events(federation, 1)
    assert (found.reserved_rounds, register(facts, "Northgate").reserved_rounds) == (3, 3)
    for view, account in zip(("t", "w"), found.accounts, strict=True):
        whole = odometer([*history, *[history[0]] * 3], DELTA, view)  # type: ignore[arg-type]
        assert account.spent + account.reserved == pytest.approx(whole)
        assert account.remaining == pytest.approx(3.0 - whole)


def test_more_rounds_are_those_that_the_filter_admits(federation: Federation) -> None:
    manifest = federation.submit(training__rounds=3, privacy__noise_multiplier=6.0)
    federation.round(manifest, 1)
    found, history = register(facts_of(federation), "St. Mary"), events(federation, 1)
    reserved = [history[0]] * found.reserved_rounds
    assert found.reserved_rounds == 2
    count = 0
    while admits(history + reserved, fresh(history[0]), Cap(3.0, 3.0, DELTA)).admitted:
        history.append(fresh(history[0]))
        count += 1
    assert (found.more_rounds, found.like) == (count, "small")
    assert count > 0


def fresh(event: Event) -> Event:
    return event.model_copy(update={"event_id": os.urandom(16).hex()})


def test_a_lowered_cap_counts_at_once(federation: Federation) -> None:
    federation.round(federation.submit(), 1)
    before = register(facts_of(federation), "St. Mary")
    site = federation.keepers[1]
    site.append(PolicyChange, before=None, after=rules("2"))
    lowered = register(facts_of(federation), "St. Mary")
    assert [account.cap for account in lowered.accounts] == [2.0, 3.0]
    assert lowered.accounts[0].remaining == pytest.approx(before.accounts[0].remaining - 1)
    assert (lowered.more_rounds or 0) < (before.more_rounds or 0)
    assert "(3.0, 0.000001)-DP if at most t" in lowered.lines[0].text
    # Never above the first, and of what is no cap nothing is claimed.
    site.append(PolicyChange, before=rules("2"), after=rules("9", epsilon_w=None))
    assert [a.cap for a in register(facts_of(federation), "St. Mary").accounts] == [3.0, None]
    site.append(PolicyChange, before=rules("9", epsilon_w=None), after=rules("0"))
    assert [a.cap for a in register(facts_of(federation), "St. Mary").accounts] == [None, None]


def test_nothing_is_reserved_of_what_cannot_be_charged(federation: Federation) -> None:
    first = federation.submit()
    federation.round(first, 1)
    assert {found.reserved_rounds for found in facts_of(federation).registers} == {2}
    federation.keepers[1].append(
        Approval, manifest=first.digest.hex(), decision="denied", reason="A. Person: no"
    )
    federation.keepers[2].append(Restored, reason="A. Person: the disk broke")
    found = {found.hospital: found for found in facts_of(federation).registers}
    assert [found[name].reserved_rounds for name in ("St. Mary", "Northgate", "Riverside")] == [0, 0, 2]
    assert found["Northgate"].closed
    assert found["Northgate"].more_rounds == 0
    expired = [replace(evidence, time="2099-12-31T23:59Z") for evidence in federation.evidences()]
    assert {found.reserved_rounds for found in facts_of(federation, expired).registers} == {0}
    federation.end(first)
    assert {found.reserved_rounds for found in facts_of(federation).registers} == {0}
    # Whether a study has ended is the hub's to say, or the hospital's that closed it.
    assert register(facts_of(federation, federation.evidences()[1:]), "Riverside").reserved_rounds == 2
    federation.keepers[3].append(Closed, manifest=first.digest.hex())
    assert register(facts_of(federation, federation.evidences()[1:]), "Riverside").reserved_rounds == 0


def test_before_the_first_charge(federation: Federation) -> None:
    found = register(facts_of(federation), "St. Mary")
    assert (found.charges, found.points, found.more_rounds, found.like) == (0, (), None, "")
    assert [account.spent for account in found.accounts] == [0.0, 0.0]
    federation.submit(name="next")
    found = register(facts_of(federation), "St. Mary")
    assert found.like == "next"
    assert found.more_rounds is not None
    assert found.more_rounds > 0


def test_without_privacy_a_register_is_infinite_for_ever(ran: Federation, evidences: list[Evidence]) -> None:
    facts = facts_of(ran, evidences)
    for found in facts.registers:
        assert [(a.spent, a.remaining) for a in found.accounts] == [(math.inf, 0.0)] * 2
        assert (found.more_rounds, found.like) == (0, "plain")
        assert {line.key: line.text for line in found.lines}["guarantee"].startswith("None")
    private, plain = facts.studies
    assert (private.private, plain.private) == (True, False)
    assert plain.planned[0].epsilon.t == plain.planned[0].two_hospitals.w == math.inf
    assert facts.notices[0].kind == "no differential privacy"
    # JSON has no infinity.
    assert json.loads(envelope("ok", "ok", asdict(facts), ""))["data"]["registers"][0]["accounts"][0][
        "spent"
    ] == ("infinite")


def test_the_course_is_the_odometer_of_each_beginning(federation: Federation) -> None:
    manifest = federation.submit(training__rounds=POINTS + 8, privacy__noise_multiplier=20.0)
    for round in range(1, POINTS + 6):
        lose(federation, manifest, round)
    found, history = register(facts_of(federation), "St. Mary"), events(federation, 1)
    assert len(found.points) == POINTS < found.charges == POINTS + 5
    assert (found.points[0].charge, found.points[-1].charge) == (1, found.charges)
    for point in found.points:
        assert point.epsilon.t == odometer(history[: point.charge], DELTA, "t")
        assert (point.study, point.round) == ("small", point.charge)


# -- studies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, POISSON], ids=["full", "poisson"])
def test_planned_epsilon_is_that_of_all_planned_rounds(
    federation: Federation, changes: dict[str, Any]
) -> None:
    manifest = federation.submit(training__rounds=5, **changes)
    federation.round(manifest, 1)
    federation.hub.append(Ended, manifest=manifest.digest.hex(), status="aborted")
    (study,) = facts_of(federation).studies
    (planned,) = study.planned
    event = check(manifest, None).event("0" * 32, 1, 1, "1" * 32)
    m, rounds = event.mechanism, [event] * 5
    naive = compose_epsilon([Term(m.q, m.z_t, m.steps)] * 5, DELTA, 5 * m.slack)
    assert planned.epsilon.t == planned.epsilon.w == naive
    assert planned.odometer.t == odometer(rounds, DELTA, "t") >= naive
    # z / 2, by the filter: above the PLD of halved noise, and not far above it.
    halved = compose_epsilon([Term(m.q, m.z_t / 2, m.steps)] * 5, DELTA, 5 * m.slack)
    assert halved <= planned.two_hospitals.t <= 1.5 * halved
    assert planned.hospitals == ("St. Mary", "Northgate", "Riverside", "Holy Cross")
    assert planned.delta_ratio == pytest.approx(DELTA * manifest.study.training.patients_public)
    assert (study.status, study.completed, study.rounds) == ("aborted", 1, 5)
    sheet = {line.key: line.text for line in study.sheet}
    assert f"epsilon_t = {up(naive)}, epsilon_w = {up(naive)}, delta = 0.000001" in sheet["epsilon"]


def test_each_delta_has_its_own_plan(federation: Federation) -> None:
    federation.submit()
    shown = federation.evidences()

    def larger(entries: list[Entry]) -> None:
        entries[0] = entries[0].model_copy(update={"delta": "0.0001"})

    shown[2] = federation.rewritten(shown[2], larger)
    facts = facts_of(federation, shown)
    plans = facts.studies[0].planned
    assert [plan.delta for plan in plans] == ["0.000001", "0.0001"]
    assert plans[1].hospitals == ("Northgate",)
    assert plans[1].epsilon.t < plans[0].epsilon.t
    assert [(n.kind, n.party) for n in facts.notices if n.kind == "large delta"] == [
        ("large delta", "Northgate")
    ]


def test_without_any_hospitals_evidence_a_plan_has_the_default_delta(federation: Federation) -> None:
    federation.submit()
    facts = facts_of(federation, federation.evidences()[:1])
    assert facts.registers == ()
    assert [(plan.delta, plan.hospitals) for plan in facts.studies[0].planned] == [("0.000001", ())]
    assert facts.missing == ("St. Mary", "Northgate", "Riverside", "Holy Cross")


def test_a_course_tells_decisions_and_rounds(federation: Federation) -> None:
    manifest = federation.submit()
    federation.round(manifest, 1)
    lose(federation, manifest, 2)
    federation.round(manifest, 3)
    (study,) = facts_of(federation).studies
    course = study.courses[0]
    assert (course.hospital, course.charged, course.completed, course.lost) == (
        "St. Mary",
        (1, 2, 3),
        (1, 3),
        (2,),
    )
    assert [(d.decision, d.words) for d in course.decisions] == [("approved", "A. Person: for the test")]
    assert course.decisions[0].time < course.first < course.last
    assert study.submitted < course.decisions[0].time
    sheet = {line.key: line.text for line in study.sheet}
    assert sheet["approved"].count("A. Person: for the test") == 4


PRIVATE_CLAIMS = [
    "unit",
    "neighbours",
    "epsilon",
    "odometer",
    "two_hospitals",
    "delta",
    "flavour",
    "mechanism",
    "z",
    "sigma",
    "C",
    "q",
    "T",
    "step",
    "Delta_g",
    "eta",
    "arith",
    "accountant",
    "sampling",
    "composition",
    "trust",
    "masks",
    "rng",
    "post_processing",
    "tuning",
    "approved",
]


def test_claim_sheets_are_complete(ran: Federation, evidences: list[Evidence]) -> None:
    private, plain = facts_of(ran, evidences).studies
    assert [line.key for line in private.sheet] == PRIVATE_CLAIMS
    plain_keys = [line.key for line in plain.sheet]
    assert plain_keys == [
        "unit",
        "neighbours",
        "epsilon",
        "flavour",
        "mechanism",
        "trust",
        "masks",
        "approved",
    ]
    for line in (*private.sheet, *plain.sheet):
        assert line.text
        assert "{" not in line.text
    sheet = {line.key: line.text for line in private.sheet}
    assert "dp-accounting 0." in sheet["accountant"]
    assert "interval 0.0001" in sheet["accountant"]
    assert sheet["tuning"].startswith("Tuning is not in epsilon")
    assert "ASSUMPTION" not in sheet["arith"]


def test_a_study_without_masks_says_so(federation: Federation) -> None:
    federation.submit(aggregation__masks=WITHOUT_MASKS)
    facts = facts_of(federation)
    (study,) = facts.studies
    assert not study.masked
    assert {line.key: line.text for line in study.sheet}["masks"].startswith(
        "NONE: the hub sees every update"
    )
    assert facts.notices[0].kind == "no masks"
    assert "runs without masks: the hub sees every update" in facts.notices[0].text


def test_assumed_arithmetic_is_called_an_assumption(federation: Federation) -> None:
    federation.submit(
        privacy__arithmetic="f32_assumed", model={"kind": "mlp", "hidden": [4]}, privacy__grid_step=0.0005
    )
    sheet = {line.key: line.text for line in facts_of(federation).studies[0].sheet}
    assert "ASSUMPTION" in sheet["arith"]


def test_everything_not_covered_is_listed() -> None:
    text = " ".join(NOT_COVERED)
    for words in (
        "Human decisions", "Participation", "Timing", "side channels", "drops out", "dishonest", "colluders",
        "several hospitals", "outside the ledger", "Inferences about the population", "no outside review yet",
        "false sum", "payloads are not kept", "if masks fail",
    ):  # fmt: skip
        assert words in text


# -- numbers -----------------------------------------------------------------------------------------------


@given(st.floats(min_value=0, max_value=1e11))
def test_epsilon_never_rounds_down(value: float) -> None:
    assert Decimal(value) <= Decimal(up(value)) <= Decimal(value) + Decimal("0.0001")
    assert Decimal(value) - Decimal("0.0001") <= Decimal(down(value)) <= Decimal(value)


def test_what_has_no_bound_is_infinite_in_print() -> None:
    assert [up(value) for value in (math.inf, 1e12, math.nan, 1e300)] == ["infinite"] * 4
    assert (up(0.0), up(1.00001), down(1.99999)) == ("0.0000", "1.0001", "1.9999")


# -- exceptions --------------------------------------------------------------------------------------------


def test_exceptions_stand_in_their_order(federation: Federation) -> None:
    first = federation.submit(name="first")
    federation.round(first, 1, cohort=(1, 2, 3))
    lose(federation, first, 2, member=2)
    site = federation.keepers[3]
    site.append(Pause, decision="paused", reason="N. Okafor: maintenance")
    site.append(Pause, decision="resumed", reason="N. Okafor: it is over")
    site.append(Approval, manifest=first.digest.hex(), decision="denied", reason="N. Okafor: no renewal")
    site.append(PolicyChange, before=None, after=rules())
    site.append(PolicyChange, before=rules(), after=rules("1.5", minimum_hospitals=4))
    federation.end(first)
    second = federation.submit(**WITHOUT_DP, aggregation__masks=WITHOUT_MASKS)
    lose(federation, second, 1, member=4)
    gone = federation.keepers[2].member
    federation.hub.append(Membership, id=2, name=gone.name, fingerprint=gone.fingerprint, decision="revoked")
    federation.keepers[2].append(Restored, reason="N. Okafor: the disk broke")
    signed = {key_text(public_key(new_signing_key())): "0" * 128 for _ in range(2)}
    federation.keepers[4].append(
        Override, action="raise_caps", register_id=federation.keepers[4].register, epsilon_t="4",
        epsilon_w="5", size=1, reason="two people: a last study", signatures=signed,
    )  # fmt: skip
    shown = federation.evidences()

    def spoil(entries: list[Entry]) -> None:
        at = next(index for index, entry in enumerate(entries) if isinstance(entry, Charge))
        entries[at] = charged(entries[at], z_t="1")
        declared = {"kind": "declared", "reason": "contract_holds", "event_id": "7" * 32}
        kept = (
            "schema",
            "register_id",
            "manifest_digest",
            "task",
            "round",
            "attempt",
            "unit",
            "adjacency",
            "state",
        )
        fields = {name: entries[at].event[name] for name in kept} | declared  # type: ignore[union-attr]
        entries[at + 1] = entries[at].model_copy(update={"event": fields})
        entries[0] = entries[0].model_copy(update={"delta": "0.001"})

    shown[1] = replace(federation.rewritten(shown[1], spoil), heads=b"")
    facts = facts_of(federation, shown)
    kinds = [notice.kind for notice in facts.notices]
    assert kinds == sorted(kinds, key=KINDS.index)
    assert set(kinds) == set(KINDS)
    assert facts.verdict == "failed"
    said = {notice.kind: notice for notice in facts.notices}
    assert said["unreadable event"].party == said["declared event"].party == "St. Mary"
    policy = [notice.text for notice in facts.notices if notice.kind == "policy change"]
    assert [text.partition(": ")[2] for text in policy] == [
        "epsilon_t was 3, is 1.5; minimum_hospitals was 3, is 4"
    ]
    assert "over 3 of 4, without Holy Cross" in said["smaller cohort"].text
    assert "the disk broke" in said["restored"].text
    over = said["override"].text
    assert "epsilon_t 4, epsilon_w 5: two people: a last study" in over
    assert all(key in over for key in signed)
    assert f"OVERRIDE at Holy Cross, {over}." in render(facts).partition("FAILED")[0]
    assert "charged at Holy Cross" in said["no differential privacy"].text
    assert (said["never cosigned"].party, said["changed roster"].party) == ("St. Mary", "hub")
    lost = [n.text for n in facts.notices if n.kind == "charged without a result" and n.party == "Northgate"]
    assert lost == [f"first ({first.digest.hex()[:12]}): 1 of 2 charged rounds have no result: round 2"]
    # What cannot be read is not taken for nothing.
    assert register(facts, "St. Mary").accounts[0].spent == math.inf


def test_a_changed_roster_between_studies_is_told(federation: Federation) -> None:
    federation.submit(name="first")
    before = federation.roster
    keys = [public_key(new_signing_key()) for _ in range(3)]
    newcomer = Member(5, "Eastfield", keys[0], keys[1])
    grown = Roster((*before.members, newcomer))
    manifest = federation.manifest(grown, name="second")
    document = federation.document(manifest, SignedRoster.create(grown, federation.hub_key))
    federation.documents[manifest.digest] = document
    facts = facts_of(federation)
    told = [notice.text for notice in facts.notices if notice.kind == "changed roster"]
    assert told == [f"between first and second: Eastfield joined, {newcomer.fingerprint}"]
    assert facts.verdict == "verified"
    changed = replace(before.members[1], ledger_key=keys[2])
    after = Roster((before.members[0], changed, before.members[2]))
    assert roster_changes(before, before) == []
    assert roster_changes(before, after) == [
        "Holy Cross left",
        f"Northgate has other keys, {changed.fingerprint}",
    ]


def test_nothing_to_look_at(federation: Federation) -> None:
    manifest = federation.submit()
    federation.round(manifest, 1)
    federation.cosign(manifest, 2)
    facts = facts_of(federation)
    assert (facts.verdict, facts.notices, facts.missing) == ("verified", (), ())
    assert [ledger.cosigned_size for ledger in facts.ledgers] == [6, 5, 5, 5, 5]
    hub, first, *_ = facts.ledgers
    assert hub.cosigned_by == ("St. Mary", "Northgate", "Riverside", "Holy Cross")
    assert first.cosigned_by == ("Northgate", "Riverside", "Holy Cross")
    assert first.seen_by == ("hub", "Northgate", "Riverside", "Holy Cross")
    assert first.root == verify(federation.evidences(), None).parties[1].checkpoint.root.hex()  # type: ignore[union-attr]


def test_verdicts(ran: Federation, evidences: list[Evidence]) -> None:
    assert read_facts(verify(evidences, ran.trust), ran.trust).verdict == "verified"
    assert read_facts(verify(evidences, None), ran.trust).verdict == "self-consistent only"
    broken = [*evidences[:-1], replace(evidences[-1], leaves=evidences[-1].leaves[:-1])]
    for trust in (ran.trust, None):
        facts = read_facts(verify(broken, trust), ran.trust)
        assert facts.verdict == "failed"
        assert facts.notices[0].kind == "failed check"


def test_a_report_is_determined_by_its_evidence(ran: Federation, evidences: list[Evidence]) -> None:
    facts = facts_of(ran, evidences)
    again = facts_of(ran, [Evidence.from_bytes(e.to_bytes(), "it") for e in reversed(evidences)])
    assert facts == again
    assert facts.time == max(evidence.time for evidence in evidences)


def test_forged_ledgers_give_facts_too(ran: Federation, evidences: list[Evidence]) -> None:
    changes: list[dict[str, Any]] = [
        {"delta": "0"}, {"delta": "7"}, {"epsilon_t": "0"}, {"epsilon_t": "99999999999999999999"},
    ]  # fmt: skip
    for change in changes:

        def opened(entries: list[Entry], change: dict[str, Any] = change) -> None:
            entries[0] = entries[0].model_copy(update=change)

        facts = facts_of(ran, [ran.rewritten(evidences[1], opened), *evidences[2:]])
        assert "large delta" in {notice.kind for notice in facts.notices}
        assert register(facts, "St. Mary").accounts[0].cap is None

    def unopened(entries: list[Entry]) -> None:
        assert isinstance(entries.pop(0), Opened)

    facts = facts_of(ran, [ran.rewritten(evidences[1], unopened)])
    assert register(facts, "St. Mary").register_id == ""
    assert facts.verdict == "failed"


def test_a_charge_without_its_study_still_counts(ran: Federation, evidences: list[Evidence]) -> None:
    (private, *_) = sorted(
        evidences[1].studies, key=lambda digest: ran.manifests[bytes.fromhex(digest)].study.name
    )
    facts = facts_of(ran, [replace(evidences[1], studies={private: evidences[1].studies[private]})])
    found = register(facts, "St. Mary")
    assert found.charges == sum(isinstance(decode(leaf), Charge) for leaf in evidences[1].leaves)
    assert len(facts.studies) == 1
    assert any(point.study.startswith("unknown ") for point in found.points)


def test_wide_sampled_compositions_are_not_computed(federation: Federation) -> None:
    """Else a coordinator could keep an auditor busy for ever."""
    federation.submit(**{**POISSON, "privacy__noise_multiplier": 0.02})
    (study,) = facts_of(federation, federation.evidences()[:1]).studies
    assert study.planned[0].epsilon.t == math.inf


def test_documents_are_the_manifests(federation: Federation) -> None:
    manifest = federation.submit(permit="ethics 12/34", purpose="Readmission.")
    (study,) = facts_of(federation).studies
    assert (study.digest, study.permit, study.purpose) == (
        manifest.digest.hex(),
        "ethics 12/34",
        "Readmission.",
    )
    assert study.columns == ("age", "bmi", "readmitted")
    assert study.members == tuple(sorted(m.name for m in federation.roster.members))


# -- overrides, consent, shared noise ------------------------------------------------------------------------


def overridden(federation: Federation, action: str, epsilon: str) -> None:
    """What 'override propose', 'sign' twice and 'apply' do, at the first hospital."""
    site, officers = federation.keepers[1], [new_signing_key() for _ in range(2)]
    named = tuple(key_text(public_key(key)) for key in officers)
    known: dict[str, Any] = {
        "officers": named,
        "coordinators": (key_text(public_key(federation.coordinator)),),
    }
    site.append(PolicyChange, before=None, after=rules(**known))
    head = site.ledger.head()
    found = Proposal.model_validate(
        {
            "schema": 1, "action": action, "register_id": site.register, "epsilon_t": epsilon,
            "epsilon_w": epsilon, "size": head.size, "root": head.root.hex(), "reason": "the board",
        }
    )  # fmt: skip
    site.ledger.append(found.signed(officers[0]).signed(officers[1]).entry(site.actor))
    after = rules(epsilon, **known | {"epsilon_w": epsilon, "max_round_minutes": 50})
    site.append(PolicyChange, before=rules(**known), after=after)


def test_raised_caps_are_claimed_and_checked(federation: Federation) -> None:
    manifest = federation.submit(privacy__noise_multiplier=8.0)
    federation.round(manifest, 1)
    before = register(facts_of(federation), "St. Mary")
    overridden(federation, "raise_caps", "4")
    federation.round(manifest, 2)
    facts = facts_of(federation)
    assert facts.verdict == "verified"
    found = register(facts, "St. Mary")
    assert [account.cap for account in found.accounts] == [4.0, 4.0]
    assert (found.more_rounds or 0) + 1 > (before.more_rounds or 0)
    assert "(4.0, 0.000001)-DP if at most t" in {line.key: line.text for line in found.lines}["guarantee"]
    assert facts.notices[0].kind == "override"
    # A charge over what was in force then, and an override that nobody signed so.
    shown = federation.evidences()

    def other_caps(entries: list[Entry]) -> None:
        at = next(index for index, entry in enumerate(entries) if isinstance(entry, Override))
        entries[at] = entries[at].model_copy(update={"epsilon_t": "5"})

    shown[1] = federation.rewritten(shown[1], other_caps)
    failed = {
        check.name: check.detail for check in verify(shown, federation.trust).checks if not check.passed
    }
    assert "the signature of the override does not verify" in failed["overrides"]
    shown = federation.evidences()
    shown[1] = federation.rewritten(
        shown[1], lambda e: e.remove(next(x for x in e if isinstance(x, Override)))
    )
    failed = {
        check.name: check.detail for check in verify(shown, federation.trust).checks if not check.passed
    }
    assert "under caps above those of the register" in failed["caps"]


def test_a_reopened_register_says_so_first(federation: Federation) -> None:
    manifest = federation.submit()
    federation.round(manifest, 1)
    federation.keepers[1].append(Restored, reason="A. Person: the disk broke")
    assert register(facts_of(federation), "St. Mary").closed
    overridden(federation, "reopen", "3")
    federation.round(manifest, 2)
    facts = facts_of(federation)
    found = register(facts, "St. Mary")
    assert (facts.verdict, found.closed, found.reopened) == ("verified", False, True)
    assert "what may have been spent after the backup is unknown" in facts.notices[0].text
    page = render(facts)
    assert page.index("OVERRIDE at St. Mary") < page.index("VERIFIED")
    assert "Reopened by override: what may have been spent after the backup is unknown" in page


def test_consents_stand_with_the_decisions(federation: Federation) -> None:
    manifest = federation.submit()
    for decision in ("given", "withdrawn"):
        said = {"manifest": manifest.digest.hex(), "decision": decision, "reason": f"A. Person: {decision}"}
        federation.keepers[2].append(Consent, **said)
    facts = facts_of(federation)
    (course,) = [c for c in facts.studies[0].courses if c.hospital == "Northgate"]
    assert [d.decision for d in course.decisions] == ["approved", "consent given", "consent withdrawn"]
    assert "<strong>consent withdrawn</strong>: A. Person: withdrawn" in render(facts)


def test_shared_noise_is_settled_at_the_cohorts_and_unmasked_at_each_upload(federation: Federation) -> None:
    manifest = federation.submit(**SHARED)
    federation.round(manifest, 1)
    federation.round(manifest, 2, cohort=(1, 2, 3))
    planned, shares = events(federation, 1), check(manifest, None).shares
    site, ctx = federation.keepers[1], "ab" * 32
    # A second attempt of round 2, in another cohort: at the least noise, and one more upload.
    again = {"event_id": planned[1].event_id, "state": "released", "attempt": 2, "ctx": ctx}
    site.append(Outcome, **again, U_size=4, s_g_squared=shares[1], reason="upload_started")
    facts = facts_of(federation)
    assert facts.verdict == "verified"
    uploads = [[(4, shares[1])], [(3, shares[0]), (4, shares[1])]]
    history = [settled(event, made) for event, made in zip(planned, uploads, strict=True)]
    found = register(facts, "St. Mary")
    for view, account in zip(("t", "w"), found.accounts, strict=True):
        assert account.spent == odometer(history, DELTA, view)  # type: ignore[arg-type]
    assert found.accounts[1].spent > found.accounts[0].spent
    alone = [settled(planned[0], [u]) for u in uploads[0]] + [settled(planned[1], [u]) for u in uploads[1]]
    lines = {line.key: line.text for line in found.lines}
    worst = odometer([event.model_copy(update={"z_t": event.z_w}) for event in alone], DELTA, "w")
    assert lines["masks_fail"].startswith(f"epsilon_w = {up(worst)}, composed over 3 uploads")
    sheet = {line.key: line.text for line in facts.studies[0].sheet}
    assert "one share of the noise" in sheet["trust"]
    assert "one hospital's share in the largest cohort" in sheet["sigma"]
    assert "OUTSIDERS ONLY" not in sheet["trust"]


def test_outsiders_only_is_said_of_t_0(federation: Federation) -> None:
    federation.submit(**SHARED, aggregation__colluders=0)
    (study,) = facts_of(federation).studies
    assert "OUTSIDERS ONLY: t = 0" in {line.key: line.text for line in study.sheet}["trust"]


@pytest.mark.parametrize(
    "change", [{"s_g_squared": 2**40}, {"U_size": 3}, {"U_size": None, "s_g_squared": None}]
)
def test_a_settled_noise_is_the_studys(federation: Federation, change: dict[str, int | None]) -> None:
    federation.round(federation.submit(**SHARED), 1)
    shown = federation.evidences()

    def other(entries: list[Entry]) -> None:
        at = next(i for i, entry in enumerate(entries) if isinstance(entry, Outcome))
        names = {"U_size": "u_size"}
        entries[at] = entries[at].model_copy(update={names.get(k, k): v for k, v in change.items()})

    shown[1] = federation.rewritten(shown[1], other)
    failed = {
        check.name: check.detail for check in verify(shown, federation.trust).checks if not check.passed
    }
    assert "another noise than its study gives" in failed["outcomes"]


def test_what_was_settled_may_be_charged_again_and_no_more(federation: Federation) -> None:
    """Cohorts smaller than the largest have more noise each: the ledger may hold more such rounds."""
    manifest = federation.submit(**SHARED | {"privacy__noise_multiplier": 6.0}, training__rounds=200)
    admitted, site = check(manifest, None), federation.keepers[1]
    cap, uploads = Cap(3.0, 3.0, DELTA), (3, admitted.shares[0])
    planned: list[Event] = []
    history: list[Event] = []

    def charge(number: int) -> Event:
        event = admitted.event(site.register, number, 1, os.urandom(16).hex())
        site.append(Charge, event=event.to_fields())
        return event

    for number in range(1, 200):
        event = admitted.event(site.register, number, 1, os.urandom(16).hex())
        if not admits(history, event, cap).admitted:
            break
        planned.append(charge(number))
        history.append(settled(planned[-1], [uploads]))
        said = {"event_id": planned[-1].event_id, "state": "released", "attempt": 1, "ctx": "ab" * 32}
        site.append(Outcome, **said, U_size=3, s_g_squared=uploads[1], reason="upload_started")
    assert 3 < len(planned) < 199
    assert not admits(planned[:-1], planned[-1], cap).admitted

    def failed() -> dict[str, str]:
        found = verify([federation.evidence(1)], federation.trust)
        return {check.name: check.detail for check in found.checks if not check.passed}

    assert "caps" not in failed()
    charge(len(planned) + 1)
    assert "charges more than the caps in force admit" in failed()["caps"]
