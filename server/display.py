"""How a study looks to the coordinator: the text of ``study show``, the table of ``study watch``.

Rules: what a hospital approved is read from the verified manifest, the rest is what the hub says; a study
without differential privacy or without masks says so in its own line.
"""

from collections.abc import Iterator

from rich.table import Table

from common import link_pb2
from common.study import DifferentialPrivacy, Manifest


def study_text(manifest: Manifest, detail: link_pb2.StudyDetail) -> str:
    """A study in lines: what it is, who takes part, every round that was started."""
    return "\n".join((*_summary(manifest, detail.study), *_sites(detail), *_rounds(detail)))


def _summary(manifest: Manifest, info: link_pb2.StudyInfo) -> Iterator[str]:
    study, rules, training = manifest.study, manifest.study.aggregation, manifest.study.training
    reason = f" ({info.detail})" if info.detail else ""
    yield f"{info.name}: {info.status}{reason}, round {info.round} of {info.rounds}"
    yield f"  digest     {info.digest}"
    yield f"  submitted  {info.submitted}, expires {study.expires}"
    yield f"  purpose    {study.purpose}"
    yield f"  model      {study.model.kind}, {training.mode}, {training.server.strategy} at the hub"
    if isinstance(study.privacy, DifferentialPrivacy):
        noise = study.privacy.noise_multiplier
        yield f"  privacy    noise multiplier {noise:g} in each of {training.steps} steps a round"
    else:
        yield "  privacy    NONE: without differential privacy"
    if not rules.masked:
        yield "  masks      NONE: the hub sees every update"
    yield (
        f"  cohort     at least {rules.minimum_hospitals} of {len(study.members)} hospitals, of which "
        f"{rules.colluders} may collude; {rules.attempts} attempts a round, at most {rules.rounds_max} rounds"
    )


def _sites(detail: link_pb2.StudyDetail) -> Iterator[str]:
    for site in detail.sites:
        link = "online" if site.online else "offline"
        yield f"  site {site.id:<5} {site.name}: {site.decision or 'undecided'}, {link}"


def _rounds(detail: link_pb2.StudyDetail) -> Iterator[str]:
    for r in detail.rounds:
        if r.lost:
            yield f"  lost       number {r.number}: {r.lost}"
        elif r.step:
            told = f"number {r.number}, attempt {r.attempt}, sites {', '.join(map(str, r.cohort))}"
            yield f"  round {r.step:<4} {told}, {r.seconds:.3f} s"
        else:
            yield f"  now        number {r.number}"


def event_table(event: link_pb2.StudyEvent) -> Table:
    """The state of a study and its sites."""
    info = event.study
    title = f"{info.name}: {info.status}, round {info.round} of {info.rounds}"
    table = Table("site", "decision", "online", "in the last round", title=title, caption=info.detail or None)
    for site in event.sites:
        taking_part = "yes" if site.id in event.cohort else "-"
        table.add_row(site.name, site.decision or "-", "yes" if site.online else "no", taking_part)
    return table
