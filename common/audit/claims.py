"""The facts of a report: each register's budget, each study's plan and course, each ledger's integrity.

Source: PRIVACY "Registers, budget, filter", "What is reported"; notes/users.md section 3.4. Rules: whether
the evidence is genuine is common.audit.verify's to say, and is said first; what was spent rounds up, what
remains rounds down; the same evidence gives the same facts, and their time is the evidence's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.audit.notices import Notice, notices
from common.audit.party import HUB_NAME, Party, Studies, Study, studied
from common.audit.sheet import NOT_COVERED, Line, Planned, claim_sheet, register_lines, when
from common.audit.spending import Costs, Epsilons, Hospital, Hub, round_of, studies_in_order
from common.audit.trust import Trust
from common.audit.verify import Verification
from common.identity import fingerprint
from common.ledger.entries import Entry
from common.ledger.reservations import reserved_rounds
from common.privacy.accountant import View
from common.privacy.events import Event
from common.privacy.filter import VIEWS, Cap, rounds_left
from common.study import DifferentialPrivacy, Manifest
from common.witness import HUB

POINTS: Final = 32
"""The course of a register's epsilon is computed after this many of its charges, at most."""
STATED: Final = ("name", "purpose", "legal_basis", "contact", "permit", "members", "expires")
"""What a study says of itself and a report repeats."""
UNKNOWN_DELTA: Final = "0.000001"
"""The delta of a plan for which no hospital's register is in the evidence: the default of policies."""


@dataclass(frozen=True, slots=True)
class Account:
    """One view of a register; ``cap`` in force; ``reserved`` is what rounds still chargeable would add."""

    view: View
    cap: float | None
    spent: float
    reserved: float
    remaining: float


@dataclass(frozen=True, slots=True)
class Point:
    """The odometer after charge number ``charge``, from 1."""

    charge: int
    time: str
    study: str
    round: int
    epsilon: Epsilons


@dataclass(frozen=True, slots=True)
class Register:
    """A hospital's budget. ``more_rounds``: how many rounds like those of the study ``like`` the filter would
    admit after the reserved ones, None where there was none yet."""

    hospital: str
    register_id: str
    opened: str
    delta: str
    accounts: tuple[Account, ...]
    charges: int
    reserved_rounds: int
    more_rounds: int | None
    like: str
    closed: bool
    reopened: bool
    lines: tuple[Line, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's decision - approved, denied, consent given or withdrawn - in their words."""

    time: str
    decision: str
    words: str


@dataclass(frozen=True, slots=True)
class Course:
    """A study at one hospital: the decisions, the rounds charged and what came of them; times of the first
    and the last charge."""

    hospital: str
    decisions: tuple[Decision, ...]
    charged: tuple[int, ...]
    completed: tuple[int, ...]
    lost: tuple[int, ...]
    first: str
    last: str


@dataclass(frozen=True, slots=True)
class StudyFacts:
    """One study; ``completed`` counts the hub's rounds, None without its evidence."""

    digest: str
    name: str
    purpose: str
    legal_basis: str
    contact: str
    permit: str
    coordinator: str
    columns: tuple[str, ...]
    members: tuple[str, ...]
    private: bool
    masked: bool
    submitted: str
    expires: str
    ended: str
    status: str
    rounds: int
    rounds_max: int
    completed: int | None
    planned: tuple[Planned, ...]
    courses: tuple[Course, ...]
    sheet: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """The integrity of one ledger; ``cosigned_size`` is that of its last head with cosignatures."""

    party: str
    time: str
    version: str
    size: int
    root: str
    signed_by: str
    cosigned_size: int
    cosigned_by: tuple[str, ...]
    seen_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a report shows. ``verdict`` is verified, failed or self-consistent only."""

    verdict: str
    hub: str
    time: str
    shown: tuple[str, ...]
    missing: tuple[str, ...]
    notices: tuple[Notice, ...]
    registers: tuple[Register, ...]
    studies: tuple[StudyFacts, ...]
    ledgers: tuple[LedgerFacts, ...]
    not_covered: tuple[str, ...] = NOT_COVERED


def read_facts(verification: Verification, trust: Trust) -> Facts:
    """The facts of evidence that ``verify`` has looked at, whether or not it passed.

    Guarantee: a_report_is_determined_by_its_evidence - no clock, no order of files, nothing random.
    """
    parties = sorted(verification.parties, key=lambda party: party.id)
    time = max((party.evidence.time for party in parties), default="")
    costs, studies, hub = Costs(), studies_in_order(parties), Hub(parties)
    hospitals = [Hospital(party, costs) for party in parties if party.id != HUB]
    unended = ((digest, study) for digest, study in studies.items() if digest not in hub.ended)
    open_studies = {digest: study for digest, study in unended if time < study[0].study.expires}
    return Facts(
        verification.verdict,
        fingerprint(trust.hub_key),
        time,
        shown=tuple(party.name for party in parties),
        missing=verification.missing,
        notices=notices(verification, hospitals, hub, studies),
        registers=tuple(_register(hospital, studies, open_studies) for hospital in hospitals),
        studies=tuple(_study(digest, hub, hospitals, studies[digest], costs) for digest in studies),
        ledgers=tuple(_ledger(party, parties, trust) for party in parties),
    )


def _register(hospital: Hospital, studies: Studies, open_studies: Studies) -> Register:
    cap, opened, costs = hospital.cap_in_force, hospital.opened, hospital.costs
    delta = cap.delta if cap else math.nan
    reserved = [] if hospital.closed else _reserved(hospital, open_studies)
    spent = costs.spent(hospital.events, delta)
    scheduled = costs.spent([*hospital.events, *reserved], delta)
    fixed = costs.fixed(hospital.events, delta)
    like, event = _last(hospital, studies)
    stated = (opened.register_id, opened.time, opened.delta) if opened else ("", "", "")
    unmasked = costs.spent(hospital.unmasked, delta)
    return Register(
        hospital.name,
        *stated,
        accounts=tuple(_account(view, cap, spent, scheduled) for view in VIEWS),
        charges=len(hospital.charges),
        reserved_rounds=len(reserved),
        more_rounds=_more_rounds(hospital, event, cap, reserved) if like else None,
        like=like,
        closed=hospital.closed,
        reopened=any(entry.action == "reopen" for entry in hospital.overrides),
        lines=register_lines(hospital.cap, stated[2], spent, fixed, unmasked, hospital.uploads),
        points=_points(hospital, studies, delta),
    )


def _account(view: View, cap: Cap | None, spent: Epsilons, scheduled: Epsilons) -> Account:
    limit = cap.epsilon(view) if cap else None
    now, then = (epsilon.t if view == "t" else epsilon.w for epsilon in (spent, scheduled))
    remaining = max(0.0, (limit or 0.0) - then)
    return Account(view, limit, now, then - now if now < math.inf else 0.0, remaining)


def _reserved(hospital: Hospital, open_studies: Studies) -> list[Event | None]:
    """The rounds that the hospital keeps for studies that are unexpired and not known to have ended."""
    planned = {digest: hospital.costs.planned(study[2]) for digest, study in open_studies.items() if study[2]}

    def rounds(digest: str) -> tuple[int, int] | None:
        if digest not in planned or planned[digest].kind != "sum":
            return None
        study = open_studies[digest][0].study
        return study.rounds, study.aggregation.rounds_max

    found = reserved_rounds(hospital.entries, rounds)
    return [planned[digest] for digest, count in found.items() for _ in range(count)]


def _last(hospital: Hospital, studies: Studies) -> tuple[str, Event | None]:
    """The study charged last, or else approved last, and a round of it; no name where there is none."""
    if hospital.charges:
        return _name(hospital.charges[-1], studies), hospital.events[-1]
    approvals = [hospital.decisions[digest][-1] for digest in studies if hospital.approves(digest)]
    if not approvals:
        return "", None
    latest = max(approvals, key=lambda entry: entry.seq)
    admitted = studies[latest.manifest][2]
    return _name(latest, studies), hospital.costs.planned(admitted) if admitted else None


def _more_rounds(
    hospital: Hospital, event: Event | None, cap: Cap | None, reserved: Sequence[Event | None]
) -> int:
    history = [past for past in (*hospital.events, *reserved) if past is not None]
    unknown = len(history) < len(hospital.events) + len(reserved)
    if hospital.closed or unknown or cap is None or event is None or event.kind != "sum":
        return 0
    return rounds_left(history, event, cap)


def _points(hospital: Hospital, studies: Studies, delta: float) -> tuple[Point, ...]:
    last = len(hospital.charges) - 1
    chosen: Sequence[int] = range(last + 1)
    if last >= POINTS:
        chosen = [i * last // (POINTS - 1) for i in range(POINTS)]
    points = []
    for at in chosen:
        charge, epsilon = hospital.charges[at], hospital.costs.spent(hospital.events[: at + 1], delta)
        points.append(Point(at + 1, charge.time, _name(charge, studies), round_of(charge), epsilon))
    return tuple(points)


def _name(entry: Entry, studies: Studies) -> str:
    digest = studied(entry)
    return studies[digest][0].study.name if digest in studies else f"unknown {digest[:12]}"


def _study(digest: str, hub: Hub, hospitals: Sequence[Hospital], found: Study, costs: Costs) -> StudyFacts:
    manifest, _, admitted = found
    study, ended, submitted = manifest.study, hub.ended.get(digest), hub.submitted.get(digest)
    members = {party.id for party in manifest.members}
    taking_part = [hospital for hospital in hospitals if hospital.id in members]
    event = costs.planned(admitted) if admitted else None
    planned = _planned(manifest, event, taking_part, costs)
    courses = tuple(_course(digest, hospital) for hospital in taking_part)
    said = ((course.hospital, decision) for course in courses for decision in course.decisions)
    approvals = [f"{by}, {when(d.time)}: {d.words}" for by, d in said if d.decision == "approved"]
    stated = {name: getattr(study, name) for name in STATED}
    return StudyFacts(
        digest,
        **stated,
        coordinator=manifest.coordinator,
        columns=tuple(study.contract.columns),
        private=isinstance(study.privacy, DifferentialPrivacy),
        masked=study.aggregation.masked,
        submitted=submitted.time if submitted else "",
        ended=ended.time if ended else "",
        status=ended.status if ended else "",
        rounds=study.rounds,
        rounds_max=study.aggregation.rounds_max,
        completed=len(hub.completed.get(digest, ())) if hub.shown else None,
        planned=planned,
        courses=courses,
        sheet=claim_sheet(manifest, event, planned, approvals),
    )


def _planned(
    manifest: Manifest, event: Event | None, hospitals: Sequence[Hospital], costs: Costs
) -> tuple[Planned, ...]:
    """The plan at each delta of the members' registers."""
    deltas: dict[str, list[str]] = {}
    for hospital in hospitals:
        if hospital.opened is not None:
            deltas.setdefault(hospital.opened.delta, []).append(hospital.name)
    rounds = [event] * manifest.study.rounds
    twice = [costs.present_twice(event) if event else None] * len(rounds)
    plans = []
    for text, names in (deltas or {UNKNOWN_DELTA: []}).items():
        delta = float(text)
        cost = costs.fixed(rounds, delta), costs.spent(rounds, delta), costs.spent(twice, delta)
        plans.append(Planned(text, tuple(names), *cost, delta * manifest.study.training.patients_public))
    return tuple(plans)


def _course(digest: str, hospital: Hospital) -> Course:
    charges = hospital.by_study.get(digest, [])
    decisions = tuple(
        Decision(said.time, f"{word}{said.decision}", said.reason)
        for word, entries in (("", hospital.decisions), ("consent ", hospital.consents))
        for said in entries.get(digest, ())
    )
    completed = tuple(round_of(charge) for charge in charges if hospital.completed(charge))
    lost = tuple(round_of(charge) for charge in charges if not hospital.completed(charge))
    ends = (charges[0].time, charges[-1].time) if charges else ("", "")
    return Course(hospital.name, decisions, tuple(map(round_of, charges)), completed, lost, *ends)


def _ledger(party: Party, parties: Sequence[Party], trust: Trust) -> LedgerFacts:
    names = {HUB: HUB_NAME} | {member.id: member.name for member in trust.roster.members}
    offer, head = party.cosigned, party.checkpoint
    signed = (head.size, head.root.hex(), head.origin) if head else (0, "", "")
    return LedgerFacts(
        party.name,
        party.evidence.time,
        party.evidence.version,
        *signed,
        cosigned_size=offer.head.size if offer and offer.cosigns else 0,
        cosigned_by=tuple(names.get(by, f"site {by}") for by in sorted(offer.cosigns)) if offer else (),
        seen_by=tuple(other.name for other in parties if party.id in other.seen),
    )
