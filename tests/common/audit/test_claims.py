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
from common.audit.sheet import NOT_COVERED, down, up
from common.audit.verify import verify
from common.console import envelope
from common.identity import new_signing_key, public_key
from common.ledger.entries import (
    Approval,
    Charge,
    Ended,
    Entry,
    Membership,
    Opened,
    Outcome,
    Pause,
    PolicyChange,
    Restored,
    Rules,
    decode,
)
from common.privacy.accountant import Term, compose_epsilon, pld_epsilon
from common.privacy.events import Event
from common.privacy.filter import Cap, admits, odometer
from common.roster import Member, Roster, SignedRoster
from common.study import WITHOUT_MASKS, Manifest
from tests.common.audit.federation import WITHOUT_DP, Federation, charged

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
    assert (found.reserved_rounds, register(facts, "Northgate").reserved_rounds) == (5, 6)
    for view, account in zip(("t", "w"), found.accounts, strict=True):
        whole = odometer([*history, *[history[0]] * 5], DELTA, view)  # type: ignore[arg-type]
        assert account.spent + account.reserved == pytest.approx(whole)
        assert account.remaining == pytest.approx(3.0 - whole)


def test_more_rounds_are_those_that_the_filter_admits(federation: Federation) -> None:
    manifest = federation.submit(training__rounds=1, privacy__noise_multiplier=6.0)
    federation.round(manifest, 1)
    found, history = register(facts_of(federation), "St. Mary"), events(federation, 1)
    reserved = [history[0]] * found.reserved_rounds
    assert found.reserved_rounds == 3
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
    assert {found.reserved_rounds for found in facts_of(federation).registers} == {5}
    federation.keepers[1].append(
        Approval, manifest=first.digest.hex(), decision="denied", reason="A. Person: no"
    )
    federation.keepers[2].append(Restored, reason="A. Person: the disk broke")
    found = {found.hospital: found for found in facts_of(federation).registers}
    assert [found[name].reserved_rounds for name in ("St. Mary", "Northgate", "Riverside")] == [0, 0, 5]
    assert found["Northgate"].closed
    assert found["Northgate"].more_rounds == 0
    expired = [replace(evidence, time="2099-12-31T23:59Z") for evidence in federation.evidences()]
    assert {found.reserved_rounds for found in facts_of(federation, expired).registers} == {0}
    federation.end(first)
    assert {found.reserved_rounds for found in facts_of(federation).registers} == {0}
    # Whether a study has ended is the hub's to say.
    assert register(facts_of(federation, federation.evidences()[1:]), "Riverside").reserved_rounds == 5


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
