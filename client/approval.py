"""What a person reads before approving a study, and the local checks that come with it.

Source: PRIVACY "What else may cross the wire" (a person's decision is the one declared release); PROTOCOL
"A hospital itself refuses" (approval prints n, t, rho, m, n-m), "Roster". Rules: everything here stays at
the hospital; no value of a record is shown or kept; a study that was approved here before under the same name
is shown as what has changed since.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client import quality
from client.guard import Guard
from client.snapshot import local
from client.sources.extract import load_table
from client.sources.source import DataSource
from client.state import SiteHome
from client.studies import StudyFolder
from common.admissible import Admitted
from common.errors import ContractError
from common.identity import fingerprint, key_bytes, read_secret
from common.ledger.entries import Approval
from common.ledger.store import Ledger
from common.privacy.events import Event
from common.privacy.filter import odometer
from common.roster import Roster
from common.study import DifferentialPrivacy, Manifest, Study

WHO: Final = ("while at most t collude", "if all other hospitals do")


@dataclass(frozen=True, slots=True)
class Change:
    """What differs from the version approved last; ``old`` or ``new`` is None where it is absent.

    ``path`` is a field of the study; "roster" with the two digests; "roster[NAME]" with that hospital's
    fingerprints.
    """

    path: str
    old: object
    new: object

    def __str__(self) -> str:
        both = (value if isinstance(value, list) else [value] for value in (self.old, self.new))
        old, new = (", ".join(str(item) for item in value if item is not None) or "none" for value in both)
        if not self.path.startswith("roster"):
            return f"{self.path}: {old} -> {new}"
        if self.old is None or self.new is None:
            return f"{self.path} was removed" if self.new is None else f"{self.path} was added: {new}"
        return f"{self.path} changed: {old} -> {new}"


@dataclass(frozen=True, slots=True)
class Review:
    """One received study as this hospital sees it.

    ``earlier`` is the digest of the version approved last, empty for none; ``changes`` are those since it.
    """

    digest: str
    manifest: Manifest
    roster: Roster
    admitted: Admitted
    source: DataSource
    earlier: str
    changes: tuple[Change, ...]
    new_fingerprints: dict[str, str]
    rounds_left: int | None
    planned_epsilon: tuple[float, float]
    largest_epsilon: tuple[float, float]
    caps: tuple[float, float]
    guard: Guard
    split_key: bytes
    copies: Path

    def check_approvable(self) -> None:
        """Check the data contract on the local extract and that the budget pays for every planned round.

        Raises: ContractError naming file, column and rule; BudgetExhaustedError.
        """
        contract = self.manifest.study.contract
        with local(self.source, contract, self.copies) as source:
            quality.check(source, contract).refuse()
            table = load_table(source, contract, key=self.split_key, part="train")
        table = table.without(self.guard.opt_outs(self.manifest))
        privacy, fewest = self.manifest.study.privacy, self.guard.policy.rules.minimum_patients
        if table.patients < fewest:
            problem = f"{self.source.where} holds fewer usable patients than the {fewest} of minimum_patients"
            remedy = "Deny the study, or lower minimum_patients in policy.toml; the hub learns neither."
            raise ContractError("contract.minimum-patients", problem, remedy=remedy)
        if isinstance(privacy, DifferentialPrivacy) and table.patients > privacy.max_patients:
            problem = f"{self.source.where} holds more patients than the study's privacy.max_patients"
            remedy = "Ask the coordinator for a study with a higher max_patients."
            raise ContractError("contract.max-patients", problem, remedy=remedy)
        self.guard.check_budget(self.manifest, self.admitted, 1, self.manifest.study.rounds)

    def data(self) -> dict[str, Any]:
        """The review for machines."""
        return {
            "digest": self.digest,
            "name": self.manifest.study.name,
            "members": [party.name for party in self.manifest.members],
            "rounds": self.manifest.study.rounds,
            "rounds_max": self.manifest.study.aggregation.rounds_max,
            "planned_epsilon": self.planned_epsilon[0],
            "planned_epsilon_w": self.planned_epsilon[1],
            "largest_epsilon": self.largest_epsilon[0],
            "largest_epsilon_w": self.largest_epsilon[1],
            "consents": list(self.manifest.study.consents),
            "rounds_left": self.rounds_left,
            "new_fingerprints": self.new_fingerprints,
            "earlier": self.earlier,
            "changes": [{"path": c.path, "old": c.old, "new": c.new} for c in self.changes],
        }

    def text(self) -> str:
        """The review for people."""
        study = self.manifest.study
        aggregation, training = study.aggregation, study.training
        n, m = len(self.manifest.members), aggregation.minimum_hospitals
        lines = [
            *summary(self.manifest),
            f"data         {study.data} -> {self.source.source}",
            f"columns      {len(study.contract.columns)}, patient column {study.contract.patient!r}",
            f"model        {study.model.kind}, {self.admitted.dim} numbers",
            f"training     {training.rounds} rounds of {training.steps} steps, {training.mode}",
            f"evaluation   {_evaluated(study)}",
            f"aggregation  n = {n}, t = {aggregation.colluders}, rho = {aggregation.rollbacks}, m = {m}, "
            f"n - m = {n - m}",
            f"charges      {study.rounds} rounds as planned, at most {aggregation.rounds_max}: "
            "a lost round is computed and charged again",
            f"consents     {', '.join(study.consents) or 'none'} before a model leaves the hub's circle",
            f"expires      {study.expires}",
        ]
        if isinstance(study.privacy, DifferentialPrivacy):
            lines += [
                "privacy      the study alone would spend, as planned and at most:",
                *(
                    f"             epsilon {planned:.4f}, {most:.4f} of {cap:g} {who}"
                    for planned, most, cap, who in zip(
                        self.planned_epsilon, self.largest_epsilon, self.caps, WHO, strict=True
                    )
                ),
                f"budget       {self.rounds_left} more rounds like these fit under the caps",
            ]
            if aggregation.colluders == 0:
                lines.insert(0, "OUTSIDERS ONLY: with t = 0 one curious hospital sees through the noise")
            if study.privacy.arithmetic == "f32_assumed":
                assumed = "assumes that float32 sums err by at most clip_norm / 1000"
                lines += [f"note         f32_assumed: {assumed}"]
        else:
            lines.insert(0, "WITHOUT DIFFERENTIAL PRIVACY: this register's epsilon becomes infinite for ever")
        if self.source.opt_out:
            lines += ["opted out    left out of every round to come; what was released before is not undone"]
        if aggregation.rollbacks == 0:
            lines += ["note         rho = 0: a cloned honest site may make two sums of one round known"]
        if aggregation.ready_s == 0:
            lines += ["note         ready_s = 0: how long the computation takes is visible to the hub"]
        if not aggregation.masked:
            lines.insert(0, "WITHOUT MASKS: the hub sees every update of this hospital")
        for name, key in self.new_fingerprints.items():
            lines += [f"compare      {name}: {key}  (by telephone; approving accepts it)"]
        if self.earlier:
            lines += [f"since        {self.earlier}, approved here before:"]
            lines += [f"  {change}" for change in self.changes] or ["  no changes"]
        return "\n".join(lines)


def summary(manifest: Manifest) -> list[str]:
    """What a study says of itself, a line each."""
    study = manifest.study
    return [
        f"study        {study.name}",
        f"purpose      {study.purpose}",
        f"legal basis  {study.legal_basis}",
        f"contact      {study.contact}",
        f"coordinator  {manifest.coordinator}",
        f"hub          {fingerprint(key_bytes(manifest.hub))}",
        f"digest       {manifest.digest.hex()}",
        f"members      {', '.join(party.name for party in manifest.members)}",
    ]


def offered(site: SiteHome, guard: Guard, digest: str) -> tuple[Manifest, Roster]:
    """A received study that verifies, whatever the policy says of it. Raises VerificationError."""
    manifest, signed_roster = StudyFolder(site).read(bytes.fromhex(digest))
    return manifest, guard.check_offer(manifest, signed_roster)


def review(site: SiteHome, guard: Guard, digest: str) -> Review:
    """Read and check one received study. Raises what the guard's checks raise."""
    manifest, roster = offered(site, guard, digest)
    admitted = guard.check_runnable(manifest)
    private = isinstance(manifest.study.privacy, DifferentialPrivacy)
    # Every round costs the same, whatever its number.
    event, delta = guard.plan(admitted, 1), guard.cap.delta
    # Before anything is shown: a changed key of a hospital that is pinned here is refused.
    new_fingerprints = dict(guard.unpinned(manifest, roster))
    earlier = approved_last(site, guard, manifest)
    return Review(
        digest=digest,
        manifest=manifest,
        roster=roster,
        admitted=admitted,
        source=guard.source(manifest),
        earlier=earlier[0].digest.hex() if earlier else "",
        changes=tuple(changes(*earlier, manifest, roster)) if earlier else (),
        new_fingerprints=new_fingerprints,
        rounds_left=guard.rounds_left(manifest, admitted) if private else None,
        planned_epsilon=_views(event, manifest.study.rounds, delta),
        largest_epsilon=_views(event, manifest.study.aggregation.rounds_max, delta),
        caps=(guard.cap.epsilon_t, guard.cap.epsilon_w or 0.0),
        guard=guard,
        split_key=guard.split_key(read_secret(site.split_secret), manifest.digest),
        copies=site.copies,
    )


def _evaluated(study: Study) -> str:
    """What held-out patients are counted for, and whether a hospital's own error becomes known by name."""
    rules = study.evaluation
    if rules is None:
        return "none"
    groups = f", by {', '.join(rules.subgroups)}" if rules.subgroups else ""
    by_name = "; the error of EACH HOSPITAL BY NAME is released" if rules.per_hospital else ""
    return f"{study.contract.holdout:g} of the patients are held out and counted{groups}{by_name}"


def _views(event: Event, rounds: int, delta: float) -> tuple[float, float]:
    """The odometer of that many rounds alone, while t collude and when all others do."""
    return odometer([event] * rounds, delta, "t"), odometer([event] * rounds, delta, "w")


def approved_last(site: SiteHome, guard: Guard, manifest: Manifest) -> tuple[Manifest, Roster] | None:
    """The version of a study - by name and coordinator - that was approved here last, but for itself."""
    with Ledger.open(site.ledger) as ledger:
        said = [entry for entry in ledger.entries() if isinstance(entry, Approval)]
    for entry in reversed(said):
        if entry.decision != "approved" or not site.study(entry.manifest).exists():
            continue
        earlier, roster = offered(site, guard, entry.manifest)
        if (earlier.coordinator, earlier.study.name) == (manifest.coordinator, manifest.study.name):
            return None if earlier == manifest else (earlier, roster)
    return None


def changes(old: Manifest, old_roster: Roster, new: Manifest, new_roster: Roster) -> Iterator[Change]:
    """What a person must see of a new version of a study: its fields, and which hospitals or keys differ."""
    for path, was, now in old.diff(new):
        if path.startswith("study."):
            yield Change(path.removeprefix("study."), was, now)
    if old_roster.digest != new_roster.digest:
        yield Change("roster", old_roster.digest.hex(), new_roster.digest.hex())
    before, after = ({m.name: m.fingerprint for m in roster.members} for roster in (old_roster, new_roster))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield Change(f"roster[{name}]", before.get(name), after.get(name))
