"""One run of a study's own code at one hospital whose patients are canaries, watched from inside.

Source: Steinke, Nasr, Jagielski, arXiv 2305.08846, section 6 (white box); PRIVACY.md "Tests by name". Rules:
the rows are synthetic and public, inside the contract, new in every round, as a patient's rows may be; each
canary is in all rounds or in none, by a fair coin from the given entropy, as noise and sampling coins are;
what canaries add is computed here a second time, each alone and by another way than training's; the watching
gates change nothing of what gates do; all other hospitals are silent.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call, grad, vmap

from common.contract import Category, Contract, Events, Text
from common.contract.sequences import FIRST_CODE
from common.errors import UsageError
from common.privacy.gate import Entropy, GateParams, LocalGate, SharedGate, Vector
from common.privacy.noise import coins, discrete_gaussian
from common.secagg.codec import dequantise, from_words, to_words
from common.secagg.noise import with_noise
from common.study import DifferentialPrivacy, Study
from common.tasks.holdout import HeldOut
from common.tasks.models.layout import flatten
from common.tasks.models.modules import build, losses, native
from common.tasks.state import State
from common.tasks.training import Rows, contribute, train_local

if TYPE_CHECKING:
    from common.admissible import Admitted

Seen: TypeAlias = tuple[list[NDArray[np.bool_]], list[Vector], list[Vector]]
"""Of each release: whose coins fell, what came in, what went out."""

CANARIES: Final = 1000
RELEASES: Final = 60
SHARE: Final = 0.75
LARGEST_WORK: Final = 1e11
MAX_ROWS: Final = 8
WITHOUT_NOISE: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Observed:
    """What one run showed.

    ``scores`` float64 [3, m], high where a canary seems to be in, read as if all is as stated, as if there is
    no noise, and as if nothing is clipped; ``included`` bool [m]; ``rounds`` that were run; ``sum_error`` the
    largest distance of a sum at the gate from the known clipped one, in clip norms; ``noise_ratio`` mean
    square of released minus known sums over the stated variance, of ``noise_count`` coordinates.
    """

    scores: Vector
    included: NDArray[np.bool_]
    rounds: int
    sum_error: float
    noise_ratio: float
    noise_count: int


class _Watched(LocalGate):
    """The gate of ``local``, remembering whose coins fell, what came in and what was released."""

    __slots__ = ("seen",)

    def __init__(self, params: GateParams, entropy: Entropy) -> None:
        super().__init__(params, entropy)
        self.seen: Seen = ([], [], [])

    def coins(self, n_patients: int) -> NDArray[np.bool_]:
        self.seen[0].append(super().coins(n_patients))
        return self.seen[0][-1].copy()

    def step(self, clipped_sum: Vector) -> Vector:
        self.seen[1].append(clipped_sum.copy())
        self.seen[2].append(super().step(clipped_sum))
        return self.seen[2][-1].copy()


class _WatchedShared(SharedGate):
    """The gate of ``shared-noise``, remembering whose coins fell; what came in is the release."""

    __slots__ = ("fallen",)

    def coins(self, n_patients: int) -> NDArray[np.bool_]:
        self.fallen = super().coins(n_patients)
        return self.fallen.copy()


def observe(study: Study, admitted: "Admitted", start: State, seed: int, entropy: Entropy) -> Observed:
    """Run all rounds of a study, or as many as make 60 releases (one round at least), on canaries alone.

    ``start`` is the public state before round 1; ``seed`` makes the synthetic rows; product code passes
    os.urandom as ``entropy``. With shared noise what is watched is the sum that the hub and t members see:
    one hospital's contribution and the noise of |U| - t, each drawn as under the masks, the cohort complete.

    Guarantee: correct_code_passes - a bound above the stated epsilon at most once in twenty runs.
    Guarantee: no_noise_is_flagged - also half of it, by its variance.
    Guarantee: no_clipping_is_flagged - where a patient of the contract can exceed the clip norm.
    Raises: UsageError for a study without differential privacy, which claims nothing.
    """
    params, privacy, training = admitted.params, study.privacy, study.training
    if not isinstance(params, GateParams) or not isinstance(privacy, DifferentialPrivacy):
        problem = "a study without differential privacy claims nothing that canaries could contradict"
        raise UsageError("audit.no-privacy", problem, remedy="Name a study with differential privacy.")
    if study.counts:
        problem = f"canaries are made for models that are trained, not for {study.model.kind}"
        raise UsageError("audit.counts", problem, remedy="Check its ledger and its claims instead.")
    rounds = min(training.rounds, max(1, RELEASES // params.steps))
    classes = study.contract.label.limit
    # No more than the rounds have independent directions, or they could not be told from each other.
    told_apart = int(SHARE * rounds * params.dim * (max(2, classes) - 1) / max(2, classes))
    affordable = int(math.sqrt(LARGEST_WORK / (rounds * params.steps * params.dim)))
    count = max(2, min(CANARIES, params.max_patients, told_apart, affordable))
    public = np.random.default_rng(seed)
    included = coins(0.5, count, entropy)
    patients = np.flatnonzero(included)
    copies = min(study.contract.rows_per_patient, MAX_ROWS)
    here = np.repeat(patients, copies)
    rate = training.learning_rate / (training.sampling_rate * training.patients_public)
    honest = _honest(admitted)
    share = params.variance(honest)

    overlaps, found, state = np.zeros((2, count, count)), np.zeros((2, count)), dict(start)
    squares = sum_error = 0.0
    for _ in range(rounds):
        x, y = _rows(study.contract, count, public), public.integers(0, classes, count)
        model = flatten(state, admitted.layout)
        mine = x[here], y[here], here
        one_round = _shared_round if admitted.shared else _local_round
        seen, moved = one_round(study, admitted, params, state, mine, entropy)
        after = model + moved
        for fallen, clipped_sum, released in zip(*seen, strict=True):
            raw = copies * _gradients(model, study, admitted, x, y)
            norms = np.linalg.norm(raw, axis=1, keepdims=True)
            gradients = raw * np.minimum(1.0, privacy.clip_norm / np.maximum(norms, 1e-300))
            known = np.clip(gradients[patients[fallen]].sum(axis=0), -params.limit, params.limit)
            sum_error = max(sum_error, float(np.linalg.norm(clipped_sum - known)) / privacy.clip_norm)
            noise = np.rint(released / params.grid_step) - np.rint(known / params.grid_step)
            squares += float(np.square(noise).sum())
            for at, added in enumerate((gradients, raw)):
                overlaps[at] += added @ added.T
                found[at] += added @ (released - params.rate / 2 * added.sum(axis=0))
            model = model - rate * released
        parts = _parts(torch.from_numpy(after), admitted)
        state = {name: part.numpy().astype(np.float32) for name, part in parts.items()}

    # Inner products alone would count for each canary what it has in common with others.
    stated = 4.0 * honest * share * params.grid_step**2
    ways = (0, stated), (0, WITHOUT_NOISE * float(np.trace(overlaps[0])) / count + 1e-300), (1, stated)
    scores = np.stack([np.linalg.solve(overlaps[at] + r * np.eye(count), found[at]) for at, r in ways])
    numbers = rounds * params.steps * params.dim
    return Observed(scores, included, rounds, sum_error, squares / numbers / (honest * share), numbers)


def _honest(admitted: "Admitted") -> int:
    """How many shares of the noise are counted on."""
    return admitted.members - admitted.colluders if admitted.shared else 1


def _shared_round(
    study: Study, admitted: "Admitted", params: GateParams, state: State, mine: Rows, entropy: Entropy
) -> tuple[Seen, Vector]:
    """One round of ``shared-noise``: what was seen, and how the hub moves the model; float64 [d]."""
    training, honest = study.training, _honest(admitted)
    watched = _WatchedShared(params, entropy)
    q = contribute(state, *mine, study, watched, _nobody(study)).q
    words = to_words(q, admitted.codec.bits, q.size, 2 ** (admitted.codec.bits - 1) - 1, "sums")
    for _ in range(honest):
        words = with_noise(words, params.variance(honest), entropy(32), entropy(32), discrete_gaussian)
    # What is summed points downhill.
    uphill = -dequantise(from_words(words), params.grid_step)
    rate = training.learning_rate / (training.sampling_rate * training.patients_public)
    seen = [watched.fallen], [-dequantise(q, params.grid_step)], [uphill]
    return seen, -rate / admitted.members * uphill


def _local_round(
    study: Study, admitted: "Admitted", params: GateParams, state: State, mine: Rows, entropy: Entropy
) -> tuple[Seen, Vector]:
    """One round of ``local``: what was seen of its steps, and how the hub moves the model; float64 [d]."""
    gate = _Watched(params, entropy)
    change = train_local(state, *mine, study, gate, lambda _done, _steps: None, _nobody(study))
    release = gate.finish(change, admitted.quantiser(entropy))
    return gate.seen, dequantise(release.q, admitted.codec.step) / admitted.members


def _nobody(study: Study) -> HeldOut | None:
    """No held-out patients: canaries are trained on, and evaluation's coordinates are noise alone."""
    if study.evaluation is None:
        return None
    none = np.zeros(0, dtype=np.int64)
    return HeldOut(np.zeros((0, study.contract.width)), none, none, 0, 0)


def _rows(contract: Contract, count: int, public: np.random.Generator) -> Vector:
    """Encoded rows at the corners of the contract, where gradients are largest; float64 [count, width]."""
    blocks = [
        np.eye(feature.width)[public.integers(0, feature.width, count)]
        if isinstance(feature, Category)
        else _tokens(feature, count, public)
        if isinstance(feature, Events | Text) and feature.form == "tokens"
        else public.choice([-1.0, 1.0], (count, feature.width))
        for feature in contract.features
    ]
    return np.concatenate(blocks, axis=1)


def _tokens(feature: Events | Text, count: int, public: np.random.Generator) -> Vector:
    terms = len(feature.vocabulary if isinstance(feature, Text) else feature.codes)
    tokens = public.integers(1, FIRST_CODE + terms, (count, feature.length)).astype(np.float64)
    if feature.width == feature.length:
        return tokens
    times = public.choice([-1.0, 1.0], tokens.shape)
    return np.stack([tokens, times], axis=2).reshape(count, -1)


def _parts(model: torch.Tensor, admitted: "Admitted") -> dict[str, torch.Tensor]:
    parts = torch.split(model, [tensor.size for tensor in admitted.layout])
    return {t.name: part.view(t.shape) for t, part in zip(admitted.layout, parts, strict=True)}


def _gradients(model: Vector, study: Study, admitted: "Admitted", x: Vector, y: NDArray[np.int64]) -> Vector:
    """Each row's gradient by itself, float64 [rows, d]."""
    module, of_row = build(study.model, study.contract), losses(study.model, study.contract)
    own = {native(name): name for name, _ in module.named_parameters()}

    def loss(values: torch.Tensor, row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        parts = {own[name]: part for name, part in _parts(values, admitted).items() if name in own}

        def called(inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = functional_call(module, parts, (inputs,))
            return outputs

        return of_row(called, row[None], label[None])[0]

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    found: Vector = each(*map(torch.from_numpy, (model, x, y))).numpy()
    return found
