"""What a study's last state says: evaluation, statistics, a forest, and the card that goes with a model.

Source: Mitchell et al., arXiv 1810.03993 (model cards); PRIVACY.md "What is reported". Rules: everything here
is post-processing of a released state and of the manifest, so it costs nothing and may be repeated; each
number has the interval that the known noise leaves; the card claims what the sheet of the study claims, and
names what it does not know.
"""

import math
from typing import Any, Final

import numpy as np

from common.admissible import Admitted
from common.contract import Text
from common.contract.sequences import FIRST_CODE
from common.encoding import digest
from common.methods import RandomForest, SkipGram, Statistics
from common.privacy.filter import odometer
from common.privacy.gate import GateParams
from common.study import Manifest
from common.tasks import evaluation, forest, statistics
from common.tasks.estimates import Estimate
from common.tasks.models.layout import EVALUATION
from common.tasks.state import State

CARD_DELTA: Final = 1e-6
NEAREST: Final = 5
BLOCK: Final = 1024
_NO_ID: Final = "0" * 32


def noise_sd(manifest: Manifest, admitted: Admitted, cohort: int) -> float:
    """The standard deviation of the noise in each count of a state, of ``cohort`` hospitals; 0 for none.

    Guarantee: the_stated_noise_is_the_noise - of a state that the rounds of the study made.
    """
    params, study = admitted.params, manifest.study
    if not isinstance(params, GateParams):
        return 0.0
    each = params.variance(cohort - admitted.colluders) if admitted.shared else params.variance(1)
    found: float = math.sqrt(cohort * each / params.steps) * float(params.grid_step)
    if study.evaluation is None:
        return found
    per_count = evaluation.scale(study) * study.training.sampling_rate
    return found / (per_count * math.sqrt(study.evaluation.rounds))


def results(manifest: Manifest, admitted: Admitted, state: State, cohort: int) -> dict[str, Any]:
    """Everything that a state of ``manifest``'s last round says, as JSON; empty for a model without one."""
    study, sd = manifest.study, noise_sd(manifest, admitted, cohort)
    model, contract = study.model, study.contract
    if isinstance(model, Statistics):
        read = statistics.read_out(model, contract, state["counts"].astype(np.float64), sd)
        return {"kind": "statistics", "noise_sd": sd, **_plain(read)}
    terms = {"nearest": nearest(manifest, state)} if isinstance(model, SkipGram) else {}
    if isinstance(model, RandomForest) or study.evaluation is None:
        return terms
    counts = state[EVALUATION].astype(np.float64)
    read = evaluation.read_out(study.evaluation, model, contract, study.members, counts, sd)
    return {"kind": "evaluation", "noise_sd": sd, "groups": _plain(read), **terms}


def nearest(manifest: Manifest, state: State) -> dict[str, list[str]]:
    """Of each term of a skip-gram's vocabulary the ``NEAREST`` others whose embeddings point most its way."""
    (feature,) = manifest.study.contract.features
    terms = feature.vocabulary if isinstance(feature, Text) else getattr(feature, "codes", ())
    vectors = state["embedding.weight"][FIRST_CODE:].astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = {}
    for start in range(0, len(terms), BLOCK):
        alike = vectors[start : start + BLOCK] @ vectors.T
        for at, row in enumerate(alike):
            row[start + at] = -np.inf
            best = np.argsort(-row, kind="stable")[:NEAREST]
            found[terms[start + at]] = [terms[place] for place in best]
    return found


def forest_json(manifest: Manifest, admitted: Admitted, state: State, cohort: int) -> str:
    """A forest as JSON, scored without the project; empty for another model."""
    model = manifest.study.model
    if not isinstance(model, RandomForest):
        return ""
    planted = forest.plant(model, manifest.study.contract)
    counts = state["leaves"].astype(np.float64)
    return forest.read_out(planted, counts, noise_sd(manifest, admitted, cohort)).to_json()


def card(manifest: Manifest, admitted: Admitted, found: dict[str, Any], cohort: int) -> str:
    """The card of a model, Markdown: what it is for, on whom it was trained, its claim, how it does."""
    study = manifest.study
    lines = [
        f"# {study.name}",
        "",
        f"- Purpose: {study.purpose}",
        f"- Model: {study.model.kind}, {admitted.dim} numbers; {study.rounds} rounds, {study.training.mode}",
        f"- Hospitals: {', '.join(study.members)}; {cohort} in the last round",
        f"- Label: {study.contract.label.name or 'none'}; {len(study.contract.columns)} columns",
        f"- Legal basis: {study.legal_basis}",
        f"- Contact: {study.contact}",
        f"- Manifest: sha256-labelled digest {manifest.digest.hex()}",
        f"- Layout: {digest('layout', admitted.layout_digest).hex()}",
        "",
        "## Privacy",
        "",
        _claim(manifest, admitted),
        "",
        "## How it does",
        "",
    ]
    if not found:
        lines.append("No evaluation was part of this study: nothing is known here about how well it does.")
    for group, values in found.get("groups", {}).items():
        hidden = ("bin ", "interval ")
        shown = {name: value for name, value in values.items() if not name.startswith(hidden)}
        lines.append(f"- {group}: " + "; ".join(f"{name} {_said(value)}" for name, value in shown.items()))
    for term, others in list(found.get("nearest", {}).items())[:20]:
        lines.append(f"- near {term}: {', '.join(others)}")
    lines += [
        "",
        "Intervals are about the value in the study's own held-out patients, at 95 %, from the known noise;",
        "they say nothing about other patients. A model is no medical device: using it is a decision.",
        "",
    ]
    return "\n".join(lines)


def _claim(manifest: Manifest, admitted: Admitted) -> str:
    if not admitted.private:
        return "Without differential privacy: the model may tell of single patients."
    event = admitted.event(_NO_ID, 1, 1, _NO_ID)
    events = [event] * manifest.study.rounds
    colluders = admitted.colluders
    views = (odometer(events, CARD_DELTA, view) for view in ("t", "w"))
    # Never rounded down: it is a claim.
    t, w = (f"{math.ceil(1000 * value) / 1000:.3f}" for value in views)
    return (
        f"By patient, delta = {CARD_DELTA:g}: epsilon at most {t} while at most {colluders} hospitals "
        f"collude with the hub, {w} if all others do; for the rounds as planned. What each hospital "
        "really spent is in its ledger."
    )


def _said(value: dict[str, Any]) -> str:
    if "value" not in value:
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items())
    numbers = (float("nan") if value[name] is None else value[name] for name in ("value", "low", "high"))
    return str(Estimate(*numbers))


def _plain(found: Any) -> Any:
    if isinstance(found, Estimate):
        return found.to_json()
    return {name: _plain(value) for name, value in found.items()}
