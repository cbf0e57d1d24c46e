"""What stands out in evidence, the gravest first: an auditor reads this before anything else.

Source: PRIVACY "What is reported", "Registers, budget, filter"; notes/users.md section 3.4. Rules: nothing
that belongs here is left out because there is much of it; rounds of one study are told together; a person's
words are quoted, never interpreted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from common.audit.party import Study
from common.audit.spending import Hospital, completions, endings, round_of
from common.audit.verify import Verification
from common.ledger.entries import Membership, Pause, PolicyChange, Restored
from common.roster import Roster
from common.study import NoDifferentialPrivacy

LARGEST_DELTA: Final = 1e-5
KINDS: Final = (
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
    verification: Verification, hospitals: Sequence[Hospital], studies: Mapping[str, Study]
) -> tuple[Notice, ...]:
    """All notices by KINDS, then as the ledgers have them.

    Guarantee: exceptions_stand_in_their_order - the gravest kind first, none left out.
    """
    found = [
        *(
            Notice("failed check", c.party, "", f"{c.name}: {c.detail}")
            for c in verification.checks
            if not c.passed
        ),
        *_of_studies(verification, hospitals, studies),
        *(notice for hospital in hospitals for notice in _of_hospital(hospital, studies)),
        *_of_hub(verification),
    ]
    return tuple(sorted(found, key=lambda notice: KINDS.index(notice.kind)))


def _of_studies(
    verification: Verification, hospitals: Sequence[Hospital], studies: Mapping[str, Study]
) -> Iterator[Notice]:
    ended, completed = endings(verification.parties), completions(verification.parties)
    for digest, (manifest, _, _) in studies.items():
        name = label(digest, studies)
        if isinstance(manifest.study.privacy, NoDifferentialPrivacy):
            charged = ", ".join(h.name for h in hospitals if digest in h.by_study) or "no hospital yet"
            text = (
                f"{name} runs without differential privacy: charged at {charged}, epsilon infinite for ever"
            )
            yield Notice("no differential privacy", "", "", text)
        if digest in ended and ended[digest].status != "done":
            text = f"{name} ended as {ended[digest].status}"
            yield Notice("refused or ended early", "hub", ended[digest].time, text)
        members = {party.id: party.name for party in manifest.members}
        for done in completed.get(digest, ()):
            absent = [member for number, member in members.items() if number not in done.cohort]
            if absent:
                text = f"{name}, round {done.round}: over {len(done.cohort)} of {len(members)}, without "
                yield Notice("smaller cohort", "hub", done.time, text + ", ".join(absent))
    for (_, (earlier, before, _)), (_, (later, after, _)) in pairwise(studies.items()):
        changes = roster_changes(before, after)
        if changes:
            text = f"between {earlier.study.name} and {later.study.name}: {'; '.join(changes)}"
            yield Notice("changed roster", "", "", text)


def _of_hospital(hospital: Hospital, studies: Mapping[str, Study]) -> Iterator[Notice]:
    name = hospital.name
    for charge, event in zip(hospital.charges, hospital.events, strict=True):
        if event is None:
            text = f"entry {charge.seq} charges what is no event: it counts as infinite"
            yield Notice("unreadable event", name, charge.time, text)
        elif event.kind == "declared":
            about = label(event.manifest_digest, studies)
            text = f"entry {charge.seq} declares {event.reason or 'something'} for {about}"
            yield Notice("declared event", name, charge.time, text)
    for entry in hospital.entries:
        if isinstance(entry, Restored):
            text = f"entry {entry.seq}: restored from a backup, its register is closed: {entry.reason}"
            yield Notice("restored", name, entry.time, text)
        elif isinstance(entry, Pause):
            yield Notice("pause", name, entry.time, f"entry {entry.seq}: {entry.decision}: {entry.reason}")
        elif isinstance(entry, PolicyChange) and entry.before is not None:
            old, new = (rules.model_dump(mode="json") for rules in (entry.before, entry.after))
            changed = [f"{key} was {old[key]}, is {new[key]}" for key in old if old[key] != new[key]]
            yield Notice("policy change", name, entry.time, f"entry {entry.seq}: {'; '.join(changed)}")
    for digest, decisions in hospital.decisions.items():
        for entry in decisions:
            if entry.decision == "denied":
                text = f"entry {entry.seq} denies {label(digest, studies)}: {entry.reason}"
                yield Notice("refused or ended early", name, entry.time, text)
    cap = hospital.cap
    if hospital.opened and (cap is None or cap.delta > LARGEST_DELTA):
        text = f"delta is {hospital.opened.delta}, above 0.00001: allowed by an override by name"
        yield Notice("large delta", name, hospital.opened.time, text)
    for digest, charges in hospital.by_study.items():
        lost = [charge for charge in charges if not hospital.completed(charge)]
        if lost:
            rounds = ", ".join(str(round_of(charge)) for charge in lost)
            count = f"{len(lost)} of {len(charges)} charged rounds have no result: round"
            text = f"{label(digest, studies)}: {count} {rounds}"
            yield Notice("charged without a result", name, lost[-1].time, text)


def _of_hub(verification: Verification) -> Iterator[Notice]:
    for party in verification.parties:
        for entry in party.entries:
            if isinstance(entry, Membership) and entry.decision == "revoked":
                text = f"entry {entry.seq} revokes {entry.name}, {entry.fingerprint}"
                yield Notice("changed roster", party.name, entry.time, text)
        if party.cosigned is None or not party.cosigned.cosigns:
            text = (
                "no hospital has cosigned a head of this ledger: a copy of it from before could not be told"
            )
            yield Notice("never cosigned", party.name, "", text)


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
