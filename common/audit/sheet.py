"""The DP claim sheet: every claim of a study with its assumptions, and what may be said of a register.

Source: notes/users.md section 3.2; PRIVACY "What is reported"; NIST SP 800-226. Rules: the words stand in
templates/claims.toml; a claim names its unit, its neighbours, its accountant and its assumptions; epsilon
rounds up in print; a study without differential privacy claims none.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from common.audit.spending import Epsilons
from common.privacy.accountant import PLD_COMPOSE_TAIL, PLD_INTERVAL, PLD_TAIL_LOG
from common.privacy.events import Event
from common.privacy.filter import Cap
from common.study import Manifest
from common.version import SOFTWARE_VERSION

WORDS: Final[Mapping[str, Any]] = tomllib.loads(
    files("common.audit").joinpath("templates/claims.toml").read_text(encoding="utf-8")
)
NOT_COVERED: Final[tuple[str, ...]] = tuple(WORDS["not_covered"])

_PLACES: Final = Decimal("0.0001")
_LARGEST: Final = 1e12


@dataclass(frozen=True, slots=True)
class Planned:
    """What all planned rounds of a study cost at one delta, and at which hospitals.

    ``epsilon`` by privacy loss distributions, ``odometer`` by the filter, ``two_hospitals`` also by it, for
    a patient present in two of them; ``delta_ratio`` is delta over 1 / n_pub.
    """

    delta: str
    hospitals: tuple[str, ...]
    epsilon: Epsilons
    odometer: Epsilons
    two_hospitals: Epsilons
    delta_ratio: float


@dataclass(frozen=True, slots=True)
class Line:
    """One claim: a stable key, its name for people, and what is claimed."""

    key: str
    label: str
    text: str


def up(value: float) -> str:
    """An epsilon in print, to 4 decimals.

    Guarantee: epsilon_never_rounds_down - the text is at least the value, "infinite" for what is too large.
    """
    return _rounded(value, ROUND_CEILING)


def down(value: float) -> str:
    """What remains, in print: at most the value."""
    return _rounded(value, ROUND_FLOOR)


def _rounded(value: float, rounding: str) -> str:
    if not value < _LARGEST:
        return "infinite"
    return format(Decimal(value).quantize(_PLACES, rounding=rounding), "f")


def when(minute: str) -> str:
    """A ledger's time in print, without its letters: "2026-11-23 08:09"."""
    return minute.replace("T", " ").removesuffix("Z")


def claim_sheet(
    manifest: Manifest, event: Event | None, planned: Sequence[Planned], approvals: Sequence[str]
) -> tuple[Line, ...]:
    """Every claim of one study. ``event`` is one of its rounds, ``approvals`` who approved it and why."""
    study, rules = manifest.study, manifest.study.aggregation
    private = event is not None and event.kind == "sum"
    of = {"both", "private" if private else "plain", event.mode if event else None}

    values: dict[str, object] = {
        name: "; ".join(f"{_both(getattr(plan, name))}, delta = {plan.delta}" for plan in planned)
        for name in ("epsilon", "odometer", "two_hospitals")
    }
    ratios = (f"delta = {p.delta} is {p.delta_ratio:.3g} times 1 / n_pub" for p in planned)
    approved = "; ".join(approvals) or "No approval is in this evidence."
    values |= {"delta_ratio": "; ".join(ratios), "approved": approved}
    values |= {"n_pub": study.training.patients_public, "rounds": study.rounds}
    values |= {"rounds_max": rules.rounds_max, "t": rules.colluders, "masks": WORDS["masks"][rules.masks]}
    values |= {"outsiders": "" if rules.colluders else WORDS["outsiders_only"]}
    values |= {"interval": f"{PLD_INTERVAL:g}", "tail": f"{PLD_TAIL_LOG:g}"}
    values |= {"compose_tail": f"{PLD_COMPOSE_TAIL:g}", "dp_accounting": version("dp-accounting")}
    values["version"] = SOFTWARE_VERSION
    if event is not None and event.kind == "sum":
        values |= event.to_fields() | {"beta": f"{float(event.mechanism.beta):.2g}"}
        for name, key in (("floating", event.arith), ("noise_by", event.mode), ("sampled", event.sampling)):
            values[name] = WORDS[name][key]
    claims = (claim for claim in WORDS["claim"] if claim.get("of", "both") in of)
    return tuple(Line(one["key"], one["label"], one["text"].format_map(values)) for one in claims)


def register_lines(
    cap: Cap | None, delta: str, spent: Epsilons, fixed: Epsilons, unmasked: Epsilons, uploads: int
) -> tuple[Line, ...]:
    """What may be said of a register, and under which name; ``unmasked`` is what its uploads say alone."""
    caps = {"cap_t": cap and cap.epsilon_t, "cap_w": cap and (cap.epsilon_w or "infinite")}
    values = {**caps, "delta": delta, "unmasked_w": up(unmasked.w), "uploads": uploads}
    guarantee = "no_guarantee" if spent.t == math.inf else "guarantee" if cap else "unknown_caps"
    return (
        Line("guarantee", "The guarantee, by the filter and the caps", WORDS[guarantee].format_map(values)),
        Line("odometer", "The filter's value so far (odometer)", _both(spent)),
        Line("as_if_fixed", "All events as if fixed in advance, no guarantee", _both(fixed)),
        Line("masks_fail", "If masks fail, no part of the guarantee", WORDS["masks_fail"].format_map(values)),
    )


def _both(epsilon: Epsilons) -> str:
    return f"epsilon_t = {up(epsilon.t)}, epsilon_w = {up(epsilon.w)}"
