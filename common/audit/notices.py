"""What stands out in evidence, the gravest first: an auditor reads this before anything else.

Source: PRIVACY "What is reported", "Registers, budget, filter"; notes/users.md section 3.4. Rules: nothing
that belongs here is left out because there is much of it; rounds of one study are told together; a person's
words are quoted, never interpreted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from common.audit.party import Party, Study
from common.audit.spending import Hospital, Hub, round_of
from common.audit.verify import Verification
from common.ledger.entries import Membership
from common.roster import Roster
from common.study import NoDifferentialPrivacy

LARGEST_DELTA: Final = 1e-5
KINDS: Final = (
    "override",
    "no masks",
    "failed check",
    "unreadable event",
    "no differential privacy",
    "declared event",
    "restored",
    "large delta",
    "refused or ended early",
    "charged without a result",
    "pause",
    "policy change",
    "smaller cohort",
    "changed roster",
    "never cosigned",
)
"""Kinds of notices, the gravest first."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to look at: its kind, whose (empty for all), when (empty if not at one time), and what."""

    kind: str
    party: str
    time: str
    text: str

    @property
    def grave(self) -> bool:
        """Whether it needs an explanation before anything else is read."""
        return KINDS.index(self.kind) <= KINDS.index("large delta")


def notices(
    verification: Verification, hospitals: Sequence[Hospital], hub: Hub, studies: Mapping[str, Study]
) -> tuple[Notice, ...]:
    """All notices by KINDS, then as the ledgers have them.

    Guarantee: exceptions_stand_in_their_order - the gravest kind first, none left out.
    """
    failed = [check for check in verification.checks if not check.passed]
    found = [
        *(Notice("failed check", check.party, "", f"{check.name}: {check.detail}") for check in failed),
        *_of_studies(hub, hospitals, studies),
        *(Notice(kind, h.name, *said) for h in hospitals for kind, *said in _of_hospital(h, studies)),
        *_of_ledgers(verification.parties),
    ]
    return tuple(sorted(found, key=lambda notice: KINDS.index(notice.kind)))


def _of_studies(hub: Hub, hospitals: Sequence[Hospital], studies: Mapping[str, Study]) -> Iterator[Notice]:
    for digest, (manifest, _, _) in studies.items():
        name = label(digest, studies)
        if not manifest.study.aggregation.masked:
            yield Notice("no masks", "", "", f"{name} runs without masks: the hub sees every update")
        if isinstance(manifest.study.privacy, NoDifferentialPrivacy):
            charged = ", ".join(h.name for h in hospitals if digest in h.by_study) or "no hospital yet"
            text = f"{name} runs without differential privacy: charged at {charged}, epsilon infinite "
            yield Notice("no differential privacy", "", "", text + "for ever")
        ended = hub.ended.get(digest)
        if ended and ended.status != "done":
            yield Notice("refused or ended early", "hub", ended.time, f"{name} ended as {ended.status}")
        for done in hub.completed.get(digest, ()):
            if absent := [party.name for party in manifest.members if party.id not in done.cohort]:
                over = f"over {len(done.cohort)} of {len(manifest.members)}, without {', '.join(absent)}"
                yield Notice("smaller cohort", "hub", done.time, f"{name}, round {done.round}: {over}")
    for (_, (earlier, before, _)), (_, (later, after, _)) in pairwise(studies.items()):
        if changes := roster_changes(before, after):
            text = f"between {earlier.study.name} and {later.study.name}: {'; '.join(changes)}"
            yield Notice("changed roster", "", "", text)


def _of_hospital(hospital: Hospital, studies: Mapping[str, Study]) -> Iterator[tuple[str, str, str]]:
    """What stands out at one hospital: kind, time and text of each notice."""
    for charge, event in zip(hospital.charges, hospital.events, strict=True):
        at = f"entry {charge.seq}"
        if event is None:
            yield "unreadable event", charge.time, f"{at} charges what is no event: it counts as infinite"
        elif event.kind == "declared":
            about = label(event.manifest_digest, studies)
            yield "declared event", charge.time, f"{at} declares {event.reason or 'something'} for {about}"
    for over in hospital.overrides:
        what = f"caps raised over the whole history to epsilon_t {over.epsilon_t}, epsilon_w {over.epsilon_w}"
        if over.action == "reopen":
            what = "reopened after a restore: what may have been spent after the backup is unknown"
        signed = ", ".join(over.signatures)
        yield "override", over.time, f"entry {over.seq}: {what}: {over.reason}; signed by {signed}"
    now = "its register is closed" if hospital.closed else "reopened since"
    for back in hospital.restores:
        yield "restored", back.time, f"entry {back.seq}: restored from a backup, {now}: {back.reason}"
    for pause in hospital.pauses:
        yield "pause", pause.time, f"entry {pause.seq}: {pause.decision}: {pause.reason}"
    for change in hospital.changes:
        if change.before is not None:
            old, new = (rules.model_dump(mode="json") for rules in (change.before, change.after))
            changed = [f"{key} was {old[key]}, is {new[key]}" for key in old if old[key] != new[key]]
            yield "policy change", change.time, f"entry {change.seq}: {'; '.join(changed)}"
    for said in (entry for decisions in hospital.decisions.values() for entry in decisions):
        if said.decision == "denied":
            text = f"entry {said.seq} denies {label(said.manifest, studies)}: {said.reason}"
            yield "refused or ended early", said.time, text
    cap = hospital.cap
    if hospital.opened and (cap is None or cap.delta > LARGEST_DELTA):
        text = f"delta is {hospital.opened.delta}, above 0.00001: allowed by an override by name"
        yield "large delta", hospital.opened.time, text
    for digest, charges in hospital.by_study.items():
        if lost := [charge for charge in charges if not hospital.completed(charge)]:
            rounds = ", ".join(str(round_of(charge)) for charge in lost)
            text = f"{len(lost)} of {len(charges)} charged rounds have no result: round {rounds}"
            yield "charged without a result", lost[-1].time, f"{label(digest, studies)}: {text}"


def _of_ledgers(parties: Sequence[Party]) -> Iterator[Notice]:
    for party in parties:
        for entry in party.of(Membership):
            if entry.decision == "revoked":
                text = f"entry {entry.seq} revokes {entry.name}, {entry.fingerprint}"
                yield Notice("changed roster", party.name, entry.time, text)
        if party.cosigned is None or not party.cosigned.cosigns:
            text = "no hospital has cosigned a head of this ledger: a copy of it from before could not be "
            yield Notice("never cosigned", party.name, "", text + "told")


def roster_changes(before: Roster, after: Roster) -> list[str]:
    """What differs between two rosters, a hospital each."""
    old, new = ({m.name: m.fingerprint for m in roster.members} for roster in (before, after))
    return [
        *(f"{name} joined, {new[name]}" for name in new if name not in old),
        *(f"{name} left" for name in old if name not in new),
        *(f"{name} has other keys, {new[name]}" for name in new if name in old and old[name] != new[name]),
    ]


def label(digest: str, studies: Mapping[str, Study]) -> str:
    """A study's name and the beginning of its digest."""
    name = studies[digest][0].study.name if digest in studies else "unknown study"
    return f"{name} ({digest[:12]})"
