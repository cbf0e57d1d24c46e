"""What a ledger says that its owner did, held against the studies that it names: all can be recomputed.

Source: PRIVACY "Registers, budget, filter", "Event fields"; PROTOCOL I8, I12. Rules: a
charge is exactly the event that the approved manifest gives; the caps are the policy's, and never above those
with which the register was opened; each rule returns the first problem with its entry, or an empty text.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from common.audit.openings import completions, openings
from common.audit.party import Party, roots, studied
from common.audit.spending import OWN, Costs, cap_of
from common.contract import FORMS
from common.ledger.entries import Approval, Charge, Completed, Opened, Outcome, Override, PolicyChange, Rules
from common.ledger.overrides import Standing, check_override, standing
from common.privacy.events import Event, settled
from common.privacy.filter import Cap, admits
from common.study import NoDifferentialPrivacy


def computed(party: Party) -> list[Charge]:
    """The charges without those that a restore made, for rounds that nothing is known of."""
    reserved = _reserved(party)
    return [charge for charge in party.of(Charge) if charge.event_id not in reserved]


def _reserved(party: Party) -> set[str]:
    return {o.event_id for o in party.of(Outcome) if o.reason == "site_restored" and o.ctx is None}


def register(party: Party) -> str:
    """One register, opened before everything else: another one would begin at nothing spent."""
    opened = [entry.seq for entry in party.of(Opened)]
    if opened[:1] != [0]:
        return "the ledger does not begin with the opening of its register"
    return f"entry {opened[1]} opens a second register, which begins at nothing spent" if opened[1:] else ""


def approvals(party: Party) -> str:
    """Nothing was approved that had expired."""
    for entry in party.of(Approval):
        if entry.decision == "approved" and entry.manifest in party.studies:
            expires = party.studies[entry.manifest][0].study.expires
            # As for charges: the clock is read for the study before the ledger takes its own time.
            if entry.time > expires:
                return f"entry {entry.seq} approves a study at {entry.time} that expired at {expires}"
    return ""


def approved_before_charged(party: Party) -> str:
    """The latest decision on a study before each of its charges is a yes."""
    decisions: dict[str, str] = {}
    for entry in party.entries:
        if isinstance(entry, Approval):
            decisions[entry.manifest] = entry.decision
        elif isinstance(entry, Charge) and decisions.get(studied(entry)) != "approved":
            return f"entry {entry.seq} charges study {studied(entry)[:12]}, which was not approved then"
    return ""


def as_planned(party: Party) -> str:
    """Every charge is what its manifest gives for that round, once a round."""
    charged, costs = set[tuple[str, int]](), Costs()
    planned = {name: costs.planned(a).to_fields() for name, (_, _, a) in party.studies.items() if a}
    for entry in party.of(Charge):
        name = studied(entry)
        if name not in planned:
            return f"entry {entry.seq} charges study {name[:12]}, which is not there or cannot be run"
        study, fields = party.studies[name][0].study, entry.event
        expected = planned[name] | _own(entry)
        if fields != expected:
            wrong = sorted(key for key in {*fields, *expected} if fields.get(key) != expected.get(key))
            return f"entry {entry.seq}: {', '.join(wrong)} of the event is not what the study gives"
        number = fields["round"]
        if type(number) is not int or not 1 <= number <= study.aggregation.rounds_max:
            return f"entry {entry.seq} charges a round that study {name[:12]} does not have"
        if (name, number) in charged:
            return f"entry {entry.seq} charges round {number} of study {name[:12]} a second time"
        if entry.time > study.expires:
            return f"entry {entry.seq} charges study {name[:12]} after it expired"
        charged.add((name, number))
    return ""


def _own(charge: Charge) -> dict[str, str | int]:
    return {key: charge.event.get(key, "") for key in OWN}


def _in_force(party: Party) -> Iterator[tuple[Charge, Rules | None, Standing]]:
    """Each charge with the policy for it: none that the ledger states yet, and none for what a restore
    charges, which may have been spent whatever the policy has said since; and with the register then."""
    rules, now, reserved = None, None, _reserved(party)
    for at, entry in enumerate(party.entries):
        if isinstance(entry, PolicyChange):
            rules = entry.after
        elif isinstance(entry, Opened | Override):
            now = standing(party.entries[: at + 1])
        elif isinstance(entry, Charge) and now is not None:
            yield entry, None if entry.event_id in reserved else rules, now


def overrides(party: Party) -> str:
    """Every override was signed by two officers of the policy then, for this ledger as it was."""
    sizes = roots(party.evidence.leaves, [entry.size for entry in party.of(Override)])
    for at, entry in enumerate(party.entries):
        if isinstance(entry, Override):
            check_override(entry, party.entries[:at], sizes.get(entry.size, b""))
    return ""


def caps(party: Party) -> str:
    """The filter would have admitted every charge under the caps that were in force for it."""
    opened = next(iter(party.of(Opened)), None)
    if opened is None:
        return "no register was opened"
    mine, force = list[Charge](), list[Cap]()
    for entry, rules, limit in _in_force(party):
        if entry.register_id == opened.register_id:
            cap, most = cap_of(rules or limit), cap_of(limit)
            force.append(cap)
            mine.append(entry)
            higher = cap.epsilon_t > most.epsilon_t or (cap.epsilon_w or 0.0) > (most.epsilon_w or 0.0)
            if higher or cap.delta != most.delta:
                return f"entry {entry.seq} is charged under caps above those of the register"
    history = _events(mine)
    closed = next((at for at, event in enumerate(history) if event.kind == "no_dp"), len(history))
    for entry, event in zip(mine[closed:], history[closed:], strict=True):
        if event.kind != "no_dp":
            return f"entry {entry.seq} charges a register that a study without privacy had closed"

    def over(at: int, cap: Cap) -> bool:
        return not admits(history[:at], history[at], cap).admitted

    # What was spent only grows: where the last charge under a cap fits it, those before it did.
    last = {cap: at for at, cap in enumerate(force[:closed])}
    wrong = [mine[_first(cap, force, over)].seq for cap, at in last.items() if over(at, cap)]
    if wrong and any(event.mode == "shared-noise" for event in history):
        # Charged as planned, and settled since: what was spent may have been less than it seems.
        caps_of = {entry.seq: cap for entry, cap in zip(mine, force, strict=True)}
        past = _settled_before(party, dict(zip((entry.event_id for entry in mine), history, strict=True)))
        wrong = [e.seq for e, event, before in past if not admits(before, event, caps_of[e.seq]).admitted]
    return f"entry {min(wrong)} charges more than the caps in force admit" if wrong else ""


def _settled_before(
    party: Party, planned: Mapping[str, Event]
) -> Iterator[tuple[Charge, Event, tuple[Event, ...]]]:
    """Each charge with sums, its event, and those before it as they were settled by then."""
    events, uploads = dict[str, Event](), defaultdict[str, list[tuple[int, int]]](list)
    for entry in party.entries:
        if isinstance(entry, Charge) and entry.event_id in planned:
            event = planned[entry.event_id]
            if event.kind == "sum":
                yield entry, event, tuple(events.values())
                events[entry.event_id] = event
        elif isinstance(entry, Outcome) and entry.event_id in events and entry.u_size and entry.s_g_squared:
            uploads[entry.event_id].append((entry.u_size, entry.s_g_squared))
            events[entry.event_id] = settled(planned[entry.event_id], uploads[entry.event_id])


def _first(cap: Cap, force: list[Cap], over: Callable[[int, Cap], bool]) -> int:
    """The first charge under a cap that does not fit it, where there is one."""
    under = [at for at, found in enumerate(force) if found == cap]
    return under[bisect_left(under, True, key=lambda at: over(at, cap))]


def policy(party: Party) -> str:
    """Every charge is of a study that the policy allowed then, as far as the ledger says what it was."""
    for entry, rules, _ in _in_force(party):
        if rules is None or studied(entry) not in party.studies:
            continue
        manifest = party.studies[studied(entry)][0]
        contract, aggregation = manifest.study.contract, manifest.study.aggregation
        private = not isinstance(manifest.study.privacy, NoDifferentialPrivacy)
        source = next((one for one in rules.sources if one.name == manifest.study.data), None)
        allowed = (
            manifest.coordinator in rules.coordinators
            and (private or rules.without_differential_privacy)
            and (aggregation.masked or rules.without_masks)
            and (aggregation.colluders > 0 or rules.outsiders_only)
            and aggregation.minimum_hospitals >= rules.minimum_hospitals
            and aggregation.deadline_s <= 60 * rules.max_round_minutes
            and source is not None
            and source.patient == contract.patient
            # The ledger does not say what kind a source is: any form that it allows may be its own.
            and not all(contract.beyond(source.columns, form) for form in FORMS)
        )
        if not allowed:
            return f"entry {entry.seq} charges study {studied(entry)[:12]}, which the policy did not allow"
    return ""


def _events(charges: list[Charge]) -> list[Event]:
    """The charges as events; a copy of one like it is a hundred times cheaper than reading one anew."""
    costs = Costs()
    return [
        (costs.kind(charge.event) or Event.from_fields(charge.event)).model_copy(update=_own(charge))
        for charge in charges
    ]


def outcomes(party: Party) -> str:
    """A result came back only of an upload that was recorded before its first byte left, with its noise."""
    started: set[tuple[str, str | None]] = set()
    charged = {entry.event_id: studied(entry) for entry in party.of(Charge)}
    for entry in party.of(Outcome):
        found = party.studies.get(charged.get(entry.event_id, ""))
        admitted = found[2] if found else None
        if admitted is not None and (entry.u_size or (admitted.shared and entry.reason == "upload_started")):
            share = dict(enumerate(admitted.shares, admitted.minimum)).get(entry.u_size or 0)
            if entry.reason != "upload_started" or share is None or entry.s_g_squared != share:
                return f"entry {entry.seq} states another noise than its study gives that cohort"
        if (entry.state == "released") != (entry.ctx is not None):
            return f"entry {entry.seq} says that a result left without naming it, or the reverse"
        if entry.reason == "upload_started":
            started.add((entry.event_id, entry.ctx))
        elif entry.reason == "completed" and (entry.event_id, entry.ctx) not in started:
            return f"entry {entry.seq} completes a round of which no upload is recorded"
    return ""


def same_hospitals(party: Party) -> str:
    """Without differential privacy every round has all members, and every study the same ones (I12)."""
    first: set[int] = set()
    for entry in party.entries:
        found = party.studies.get(studied(entry)) if isinstance(entry, Charge | Completed) else None
        if found is None or not isinstance(found[0].study.privacy, NoDifferentialPrivacy):
            continue
        members = {member.id for member in found[0].members}
        cohort = set(entry.cohort) if isinstance(entry, Completed) else members
        minimum = found[0].study.aggregation.minimum_hospitals
        if cohort != members or minimum != len(members) or (first and party.id and members != first):
            rule = "without differential privacy the hospitals must be all, and always the same"
            return f"entry {entry.seq}: {rule}"
        first = members
    return ""


Rule = tuple[str, str, Callable[[Party], str]]
"""A slug, what is said when it holds, and the rule itself."""

SITE_RULES: Final[tuple[Rule, ...]] = (
    ("register", "one register, opened by the first entry", register),
    ("approvals", "no study was approved after it had expired", approvals),
    ("approval-before-charge", "every charge follows an approval in force", approved_before_charged),
    ("charges", "every charge is what its study gives, once a round", as_planned),
    ("overrides", "every override was signed by two of the policy's officers", overrides),
    ("caps", "the filter admits every charge under the caps in force", caps),
    ("policy", "every charge is of a study that the policy in force allows", policy),
    ("outcomes", "every result follows the record of its upload", outcomes),
    ("same-hospitals", "without differential privacy, always all and the same hospitals", same_hospitals),
)
_OPENED: Final = "every sum was uploaded to and opened by each of its hospitals, under its own key"
HUB_RULES: Final[tuple[Rule, ...]] = (
    ("completions", "every sum was opened over hospitals that its study allows", completions),
    ("openings", _OPENED, openings),
    ("same-hospitals", "without differential privacy, always all of the hospitals", same_hospitals),
)
