"""Method by mode: every kind of model against a naive loop over patients, in both training modes."""

from typing import Any

import numpy as np
import pytest
import torch

from common.privacy.gate import GateParams, LocalGate, PlainGate, PlainParams, SharedGate
from common.tasks.counting import vectors
from common.tasks.models.layout import flatten, layout, size
from common.tasks.models.modules import build, load, losses
from common.tasks.training import contribute, train_local
from tests.common.tasks.kinds import COUNTING, KINDS, encoded, study_of

COUNTS = {"none": [], "one": [1], "ragged": [3, 1, 2, 3, 1], "many": [2] * 40}


class Seen(LocalGate):
    """The real gate, remembering what came in."""

    def __init__(self, params: GateParams) -> None:
        super().__init__(params, np.random.default_rng(0).bytes)
        self.sums: list[Any] = []

    def step(self, clipped_sum: Any) -> Any:
        self.sums.append(clipped_sum.copy())
        return super().step(clipped_sum)


def params_of(study: Any) -> GateParams:
    shared = study.training.mode == "shared-noise"
    return GateParams(
        clip_norm=study.privacy.clip_norm, grid_step=study.privacy.grid_step,
        dim=size(layout(study.model, study.contract)), noise_multiplier=study.privacy.noise_multiplier,
        sampling="full", rate=1.0, steps=1, max_patients=1000, arithmetic=study.privacy.arithmetic,
        mode=study.training.mode, minimum=3, clamp=study.aggregation.codec.range if shared else None,
    )  # fmt: skip


def state_of(study: Any, seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    tensors = layout(study.model, study.contract)
    return {t.name: rng.normal(0, 0.5, t.shape).astype(np.float32) for t in tensors}


def patients_of(study: Any, counts: list[int], seed: int = 0) -> tuple[Any, Any, Any]:
    index = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    x, y = encoded(study.contract, len(index), seed)
    return x, y, index


def naive(study: Any, state: Any, x: Any, y: Any, index: Any, clip: float | None) -> Any:
    """The sum over patients, each by itself through plain autograd, or its rows' vectors."""
    total = np.zeros(size(layout(study.model, study.contract)))
    for patient in np.unique(index):
        here = index == patient
        if study.counts:
            vector = vectors(study, x[here], y[here]).sum(axis=0)
        else:
            module = load(build(study.model, study.contract), state)
            loss = losses(study.model, study.contract)
            loss(module, torch.tensor(x[here]), torch.tensor(y[here])).sum().backward()  # type: ignore[no-untyped-call]
            parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
            vector = torch.cat([part.flatten() for part in parts]).numpy()
        norm = float(np.linalg.norm(vector))
        total += vector if clip is None or norm <= clip else vector * clip / norm
    return total


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        (name, engine)
        for name in KINDS
        for engine in ("opacus", "bookkeeping")[: 1 if name in COUNTING else 2]
    ],
)
def test_a_step_is_the_clipped_sum(name: str, engine: str, counts: str) -> None:
    study = study_of(name, training__engine=engine)
    state, rows = state_of(study), patients_of(study, COUNTS[counts])
    gate = Seen(params_of(study))
    train_local(state, *rows, study, gate, lambda _done, _steps: None)
    expected = naive(study, state, *rows, study.privacy.clip_norm)  # type: ignore[union-attr]
    exact = engine == "opacus" or study.privacy.arithmetic == "f64_bounded"  # type: ignore[union-attr]
    limit = 1e-9 if exact else 1e-3
    assert np.abs(gate.sums[0] - expected).max(initial=0.0) <= limit * max(1, len(COUNTS[counts]))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_contribution_is_the_clipped_sum(name: str, counts: str) -> None:
    study = study_of(name, "shared-noise")
    state, rows = state_of(study), patients_of(study, COUNTS[counts])
    gate = SharedGate(params_of(study), np.random.default_rng(0).bytes)
    release = contribute(state, *rows, study, gate)
    sign = 1.0 if study.counts else -1.0
    expected = sign * naive(study, state, *rows, study.privacy.clip_norm)  # type: ignore[union-attr]
    found = release.q * study.privacy.grid_step  # type: ignore[union-attr]
    assert np.abs(found - expected).max(initial=0.0) <= 1e-3 * max(1, len(COUNTS[counts]))


@pytest.mark.parametrize("name", KINDS)
def test_without_privacy_a_step_is_the_mean_gradient(name: str) -> None:
    study = study_of(name, dp=False)
    state, rows = state_of(study), patients_of(study, COUNTS["ragged"])
    dim = size(layout(study.model, study.contract))
    gate = PlainGate(PlainParams(dim=dim, steps=1))
    found = train_local(state, *rows, study, gate, lambda _done, _steps: None)
    total = naive(study, state, *rows, None)
    expected = total if study.counts else -total / len(rows[0])
    start = flatten(state, layout(study.model, study.contract))
    assert np.abs(found - expected).max() <= 1e-9 * (1 + np.abs(start).max())


@pytest.mark.parametrize("name", KINDS)
def test_a_patient_moves_the_sum_by_at_most_the_clip(name: str) -> None:
    study = study_of(name, "shared-noise")
    state = state_of(study)
    x, y, index = patients_of(study, COUNTS["ragged"])
    sums = []
    for kept in (index >= 0, index != 2):
        gate = SharedGate(params_of(study), np.random.default_rng(0).bytes)
        sums.append(contribute(state, x[kept], y[kept], index[kept], study, gate).q)
    moved = float(np.linalg.norm((sums[0] - sums[1]) * study.privacy.grid_step))  # type: ignore[union-attr]
    assert moved <= study.privacy.clip_norm * 1.001 + 0.01 * study.privacy.clip_norm  # type: ignore[union-attr]
