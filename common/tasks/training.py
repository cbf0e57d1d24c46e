"""Training at one hospital: per-patient gradients are clipped and summed, the gate makes the release.

Source: Abadi et al., arXiv 1607.00133 (DP-SGD); PRIVACY.md "The release gate"; Opacus 1.6
(``GradSampleModule``, ``DPOptimizer``, ``ModuleValidator``), or ``clipped_sum`` (book-keeping).
Rules: all rows of a patient are summed before clipping; every trainable parameter is in the one optimizer;
model, wrapper and optimizer are new in each call, so nothing crosses rounds but the released state; noise,
coins and rounding are the gate's: no torch generator and no accountant of Opacus takes part; an empty batch
is a step like any other; normalisers are public constants. No size, value or count of rows reaches an error
or the progress callback.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import nn

from common.errors import FailureError, RefusedError
from common.privacy.clipping import clip, sanitise, weight_limit
from common.privacy.gate import LocalGate, PlainGate, Release, SharedGate, SteppingGate, Vector
from common.study import DifferentialPrivacy, Study
from common.tasks.clipped_sum import PIECE_ROWS, clipped_sum, pieces
from common.tasks.counting import counted
from common.tasks.holdout import Counting, HeldOut
from common.tasks.models.layout import Tensor, flatten, layout, size
from common.tasks.models.modules import Losses, build, load, losses, named
from common.tasks.state import State

Progress: TypeAlias = Callable[[int, int], None]
# Inputs, labels and patients of the same rows.
Rows: TypeAlias = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]

# Memory for the per-row gradients of one piece of a batch. It does not change what is computed.
PIECE_SIZE_BYTES: Final = 64 * 2**20
# Rows of one pass where a row is many positions: activations, not gradients, take the memory there.
ROWS_AT_ONCE: Final = {
    "cnn": 256, "resnet18": 16, "recurrent": 256, "transformer": 128, "skip_gram": 64,
    "sequence_to_sequence": 64,
}  # fmt: skip


class Steps(Protocol):
    """Something that releases a sum, as the gate does."""

    def step(self, clipped_sum: Vector) -> Vector:
        """Release one sum, float64 [d]."""
        ...


class GatedOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """SGD on what the gate lets through: group rows by patient, clip, sum, release, descend.

    ``module`` is wrapped by a ``GradSampleModule`` with ``loss_reduction="sum"``; ``learning_rate``
    multiplies the released sum, so it holds the public normaliser; ``clip_norm`` is None only without
    differential privacy. A batch may come in several pieces (``signal_skip_step``), a patient in one only.

    Guarantee: patients_are_clipped_whole - the sum given to the gate is that of a naive loop over patients.
    Guarantee: only_released_gradients_are_applied - from ``step`` on ``p.grad`` holds nothing but what
    ``gate.step`` returned.
    Guarantee: parameters_outside_the_optimizer_are_refused - also frozen, shared or later ones, and buffers.

    Raises: RefusedError when the module's parameters are not exactly the layout's.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Sequence[Tensor],
        *,
        learning_rate: float,
        clip_norm: float | None,
        gate: Steps,
    ) -> None:
        parameters = dict(named(module))
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != {tensor.name: tensor.shape for tensor in tensors} or list(module.buffers()):
            raise RefusedError("training.parameters", "the module's tensors are not those of its layout")
        if not all(p.requires_grad and p.dtype == torch.float64 for p in parameters.values()):
            raise RefusedError("training.parameters", "every parameter must be trainable and float64")
        ordered = [parameters[tensor.name] for tensor in tensors]
        super().__init__(
            torch.optim.SGD(ordered, lr=learning_rate),
            noise_multiplier=0.0,  # unused: add_noise asks the gate
            max_grad_norm=math.inf if clip_norm is None else clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._module = module
        self._gate = gate
        self._clip_norm = clip_norm
        self._dim = size(tensors)
        self._patients: torch.Tensor | None = None
        self._patient_count = 0
        self._sum: Vector | None = None

    def take_patients(self, patients: torch.Tensor, count: int) -> None:
        """Say whose the rows of the next backward pass are: int64 [rows], values in [0, count)."""
        self._patients = patients
        self._patient_count = count

    def clip_and_accumulate(self) -> None:
        """Add this piece's clipped patients to the sum of the batch.

        Raises: RefusedError when the piece's patients were not told, or a parameter joined the module later.
        """
        patients, self._patients = self._patients, None
        if patients is None:
            raise RefusedError("training.patients", "a gradient step needs to know whose rows it sums")
        if {id(p) for p in self._module.parameters()} != {id(p) for p in self.params}:
            raise RefusedError("training.parameters", "a parameter of the module is outside the optimizer")
        rows = torch.cat([sample.flatten(start_dim=1) for sample in self.grad_samples], dim=1)
        whole = torch.zeros((self._patient_count, self._dim), dtype=torch.float64)
        whole.index_add_(0, patients, rows)
        vectors = whole.numpy()
        clean = sanitise(vectors) if self._clip_norm is None else clip(vectors, self._clip_norm)
        piece: Vector = clean.sum(axis=0)
        self._sum = piece if self._sum is None else self._sum + piece
        for parameter in self.params:
            parameter.grad = None  # the backward pass left the raw, unclipped sum here
            # Opacus hangs it on the parameter; a row's gradient is used once.
            parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]

    def add_noise(self) -> None:
        """Hand the batch's sum to the gate and make what it releases the gradient."""
        if self._sum is None:
            raise RefusedError("training.sum", "there is no sum to release")
        total, self._sum = self._sum, None
        released = torch.from_numpy(self._gate.step(total))
        start = 0
        for parameter in self.params:
            parameter.grad = released[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; the sum is kept only between the pieces of one batch."""
        super().zero_grad(set_to_none=set_to_none)
        if not self._is_last_step_skipped:
            self._sum = None


class _Beside:
    """What surrounds the gate in a step: held-out patients' counts in the release, a pull after it.

    ``pull`` is the proximal term's weight times the public divisor of sums (Li et al., arXiv 1812.06127); it
    is a function of released values alone.
    """

    def __init__(
        self, gate: SteppingGate, module: nn.Module, start: Vector, pull: float, counting: Counting | None
    ) -> None:
        self._gate, self._module, self._start, self._pull = gate, module, start, pull
        self._counting = counting
        self._chosen: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self.counts: Vector | None = None if counting is None else np.zeros(counting.length)

    def take(self, chosen: NDArray[np.bool_]) -> None:
        """Whose coins fell of the held-out patients, in the step to come."""
        self._chosen = chosen

    def step(self, clipped_sum: Vector) -> Vector:
        """Release a sum; what comes back for the model."""
        if self._counting is not None and self.counts is not None:
            clipped_sum = np.concatenate([clipped_sum, self._counting.total(self._chosen)])
        released = self._gate.step(clipped_sum)
        back = released[: self._start.size]
        if self.counts is not None:
            self.counts = self.counts + released[self._start.size :]
        if self._pull:
            now = torch.cat([p.detach().flatten() for p in self._module.parameters()]).numpy()
            back = back + self._pull * (now - self._start)
        return back


def _counting(state: State, study: Study, held: HeldOut | None) -> Counting | None:
    if study.evaluation is None:
        return None
    if held is None:
        raise RefusedError("training.held-out", "a study with an evaluation needs the held-out patients")
    return Counting(study, study.evaluation, held, state)


def train_local(
    state: State,
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    patient_index: NDArray[np.int64],
    study: Study,
    gate: LocalGate | PlainGate,
    progress: Progress,
    held: HeldOut | None = None,
    member: int = 0,
) -> Vector:
    """All steps of one round of ``local`` at one hospital: the change of the model, float64 [d].

    ``state`` is checked (``common.tasks.state``); ``x`` [rows, width] and ``y`` [rows] come from
    ``Contract.encode``, rows with a label outside its limit (-1: unusable) are left out; ``patient_index``
    [rows] is any integer that is equal for exactly the rows of one patient. ``progress(done, steps)`` is
    called after each step. ``held`` are the held-out patients of a study with an evaluation, whose counts
    stand behind the model's change; ``member`` is the hospital's place. With differential privacy a step is
    ``learning_rate / (q n_pub)`` times the released sum (q = 1 for full batches); without, ``learning_rate``
    times the mean over the own usable rows.

    Guarantee: agrees_with_a_naive_patient_loop - to 1e-12, ragged, empty and huge batches included.
    Guarantee: a_nan_row_changes_only_its_patient - such a patient counts as zero.
    Guarantee: an_empty_batch_is_a_noised_step - it asks the gate for noise and counts.
    Guarantee: no_state_is_kept_between_calls - also after a call that was interrupted.
    Guarantee: the_torch_seed_reaches_nothing - results don't depend on it, and it is not advanced.
    Assumes: the gate was made for this study's clip norm; entries of ``x`` are in [-1, 1]. The last bits of a
    row's gradient depend on which other rows share its matrix product; eta (``clipping.eta``) covers that
    up to ``clipping.weight_limit``, which is checked before every step.

    Raises: RefusedError for a gate that does not fit the study's privacy, a model that Opacus' validator
    refuses, or more patients than max_patients.
    """
    privacy, training = study.privacy, study.training
    clip_norm = privacy.clip_norm if isinstance(privacy, DifferentialPrivacy) else None
    if not isinstance(gate, PlainGate if clip_norm is None else LocalGate):
        raise RefusedError("training.gate", "the release gate does not fit the study's privacy")
    if x.ndim != 2 or x.shape[1] != study.contract.width or not len(x) == y.size == patient_index.size:
        raise RefusedError("training.shapes", "rows, labels and patients do not have the study's shape")

    tensors = layout(study.model, study.contract)
    start = flatten({tensor.name: state[tensor.name] for tensor in tensors}, tensors)
    rows, patient_count = _by_patient(x, y, patient_index, study.contract.label.limit)
    if study.counts:
        total = counted(study, *_chosen(rows, gate.coins(patient_count)), size(tensors), clip_norm)
        released = gate.step(total)
        progress(1, 1)
        return released
    public = training.sampling_rate * training.patients_public
    divisor = public if clip_norm is not None else max(1, len(rows[1]))
    rate = training.learning_rate / divisor

    # Gradients are needed whatever mode the caller is in: without them Opacus' hooks capture nothing.
    with torch.enable_grad():
        module = _module(state, study)
        beside = _Beside(gate, module, start, training.proximal * divisor, _counting(state, study, held))
        if clip_norm is None:
            step = _by_hand(module, study, beside, rate, _whole)
        elif training.engine == "opacus":
            step = _opacus(module, study, tensors, beside, rate, clip_norm)
        else:
            step = _by_hand(module, study, beside, rate, _clipped)
        for done in range(1, training.steps + 1):
            _check_norm(module, study)
            chosen = gate.coins(patient_count + (held.count if held else 0))
            beside.take(chosen[patient_count:])
            step(_chosen(rows, chosen[:patient_count]))
            progress(done, training.steps)
        end = flatten({name: p.detach().numpy() for name, p in named(module).items()}, tensors)
    change = (end - start) * study.weight(held.member if held else member)
    if beside.counts is None:
        return change
    # As a share of a public number, so that counts fit the codec that fits a model's change.
    return np.concatenate([change, beside.counts / (training.steps * training.patients_public)])


def contribute(
    state: State,
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    patient_index: NDArray[np.int64],
    study: Study,
    gate: SharedGate,
    held: HeldOut | None = None,
) -> Release:
    """One round of ``shared-noise`` at one hospital: the clipped sum of its patients' descent directions.

    Arguments as of ``train_local``. The hub's step is ``learning_rate / (q n_pub)`` times the mean of the
    hospitals' sums, so the sign is turned here: what is released is minus the gradients.

    Guarantee: a_contribution_is_the_clipped_sum - that of a naive loop over patients, on the grid.
    Raises: RefusedError as ``train_local``.
    """
    rows, patient_count = _by_patient(x, y, patient_index, study.contract.label.limit)
    if study.counts and isinstance(study.privacy, DifferentialPrivacy):
        dim = size(layout(study.model, study.contract))
        mine = _chosen(rows, gate.coins(patient_count))
        return gate.contribute(counted(study, *mine, dim, study.privacy.clip_norm))
    with torch.enable_grad():
        module = _module(state, study)
        _check_norm(module, study)
        counting = _counting(state, study, held)
        chosen = gate.coins(patient_count + (held.count if held else 0))
        downhill = -_clipped(module, study, _chosen(rows, chosen[:patient_count]))
        if counting is None:
            return gate.contribute(downhill)
        return gate.contribute(np.concatenate([downhill, counting.total(chosen[patient_count:])]))


def _module(state: State, study: Study) -> nn.Module:
    """The model at a state, in the dtype in which the study's clipped sums are computed."""
    return load(build(study.model, study.contract), state)


def _clipped(module: nn.Module, study: Study, rows: Rows) -> Vector:
    privacy = study.privacy
    if not isinstance(privacy, DifferentialPrivacy):
        raise RefusedError("training.engine", "book-keeping clips, and the study has no differential privacy")
    if privacy.arithmetic == "f32_assumed":
        module = copy.deepcopy(module).to(torch.float32)
    x, y, patients = rows
    inputs = torch.tensor(x, dtype=next(module.parameters()).dtype)
    loss = losses(study.model, study.contract)
    rows_at_once = ROWS_AT_ONCE.get(study.model.kind, PIECE_ROWS)
    return clipped_sum(
        module, inputs, torch.tensor(y), patients, loss, privacy.clip_norm, piece_rows=rows_at_once
    )


def _whole(module: nn.Module, study: Study, rows: Rows) -> Vector:
    """The sum of the rows' gradients without clipping; a patient whose own is not finite counts as zero."""
    x, y, patients = rows
    loss, total = losses(study.model, study.contract), np.zeros(sum(p.numel() for p in module.parameters()))
    rows_at_once = ROWS_AT_ONCE.get(study.model.kind, PIECE_ROWS)
    for piece in pieces(patients, rows_at_once):
        value = loss(module, torch.tensor(x[piece]), torch.tensor(y[piece])).sum()
        parts = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
        flat = [
            torch.zeros(p.numel(), dtype=p.dtype) if part is None else part.flatten()
            for p, part in zip(module.parameters(), parts, strict=True)
        ]
        found = torch.cat(flat).numpy()
        if np.isfinite(found).all():
            total += found
        elif patients[piece][0] != patients[piece][-1]:
            # Somebody's is not: each by itself, to leave out nobody else's.
            for own in pieces(patients[piece], 1):
                total += _whole(module, study, (x[piece][own], y[piece][own], patients[piece][own]))
    return total


def _by_hand(
    module: nn.Module,
    study: Study,
    gate: Steps,
    rate: float,
    summed: Callable[[nn.Module, Study, Rows], Vector],
) -> Callable[[Rows], None]:
    """A step on a sum of gradients, descended by hand."""

    def step(rows: Rows) -> None:
        released = torch.from_numpy(gate.step(summed(module, study, rows)))
        start = 0
        with torch.no_grad():
            for parameter in module.parameters():
                part = released[start : start + parameter.numel()]
                parameter.sub_(part.view_as(parameter), alpha=rate)
                start += parameter.numel()

    return step


def _opacus(
    module: nn.Module,
    study: Study,
    tensors: Sequence[Tensor],
    gate: Steps,
    rate: float,
    clip_norm: float,
) -> Callable[[Rows], None]:
    """A step on the sum of Opacus' per-row gradients."""
    errors = ModuleValidator.validate(module, strict=False)
    if errors:
        raise RefusedError("training.model", f"Opacus refuses the model: {type(errors[0]).__name__}")
    wrapped = GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=True)
    optimizer = GatedOptimizer(module, tensors, learning_rate=rate, clip_norm=clip_norm, gate=gate)
    piece_rows = max(1, PIECE_SIZE_BYTES // (8 * size(tensors)))
    return partial(_step, wrapped, losses(study.model, study.contract), optimizer, piece_rows)


def _check_norm(module: nn.Module, study: Study) -> None:
    """Refuse weights for which eta does not hold; they are released values, so this tells nothing."""
    privacy, contract = study.privacy, study.contract
    if not isinstance(privacy, DifferentialPrivacy) or privacy.arithmetic != "f64_bounded":
        return
    limit = weight_limit(privacy.max_patients, privacy.clip_norm, contract.rows_per_patient, contract.width)
    norm = torch.linalg.vector_norm(torch.cat([p.detach().flatten() for p in module.parameters()]))
    if not norm <= limit:
        raise FailureError(
            "training.diverged",
            "the weights have grown past what the bound on rounding errors covers",
            remedy="Lower training.learning_rate.",
        )


def _by_patient(
    x: NDArray[np.float64], y: NDArray[np.int64], patient_index: NDArray[np.int64], limit: int
) -> tuple[Rows, int]:
    """Usable rows ordered by patient, with the patients numbered from 0, and how many patients there are.

    A patient without a usable row is still one: coins are tossed for it, and it contributes zero.
    """
    patients, dense = np.unique(patient_index, return_inverse=True)
    usable = np.flatnonzero((y >= 0) & (y < limit))
    order = usable[np.argsort(dense[usable], kind="stable")]
    if np.array_equal(order, np.arange(len(y))):
        # As a table has them: rows that may be larger than memory are not copied.
        return (x, y, dense.astype(np.int64)), len(patients)
    return (x[order], y[order], dense[order].astype(np.int64)), len(patients)


def _chosen(rows: Rows, chosen: NDArray[np.bool_]) -> Rows:
    """The rows of the patients whose coin fell."""
    x, y, patients = rows
    here = chosen[patients]
    return x[here], y[here], patients[here]


def _step(wrapped: nn.Module, loss: Losses, optimizer: GatedOptimizer, piece_rows: int, rows: Rows) -> None:
    """One release of these rows, in pieces of about ``piece_rows`` rows, then noise and descent."""
    x, y, patients = rows
    # No rows are a step like any other: one empty piece.
    for piece in list(pieces(patients, piece_rows)) or [slice(0, 0)]:
        _, local = np.unique(patients[piece], return_inverse=True)
        # Hooks on a module none of whose inputs needs a gradient make torch warn.
        inputs = torch.tensor(x[piece], dtype=torch.float64, requires_grad=True)
        optimizer.zero_grad()
        with warnings.catch_warnings():
            # Of a layer that reads tokens or the zeros before a first step: no input has a gradient there.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss(wrapped, inputs, torch.tensor(y[piece])).sum().backward()  # type: ignore[no-untyped-call]
        count = int(local[-1]) + 1 if len(local) else 0
        optimizer.take_patients(torch.tensor(local, dtype=torch.int64), count)
        optimizer.signal_skip_step(do_skip=piece.stop < len(patients))
        optimizer.step()
    optimizer.zero_grad()
