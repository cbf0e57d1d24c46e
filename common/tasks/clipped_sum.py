"""The sum of clipped per-patient gradients, without a gradient of any single patient: book-keeping.

Source: Bu et al., arXiv 2210.00038 (book-keeping); Goodfellow, arXiv 1510.01799 (norms from activations);
PRIVACY.md "The release gate", step 2 (norms that never come out too small). Rules: one forward and one
backward pass to the outputs of the layers; norms in float64 from activations and output gradients; one
weighted contraction; all rows of a patient are one unit; stateless: nothing stays on the module; a layer
without a rule here is refused, never left unclipped.

Of a layer with inputs a_t and output gradients b_t at the T positions of a patient (rows, places in a row,
calls of the layer) the gradient is the sum of b_t a_t^T. Its squared norm G is the sum over s and t of
(a_s a_t)(b_s b_t), or that of the product itself where it is smaller. Both can cancel, and A, the sum of
|a_t||b_t|, cannot, so the norm is taken as max(sqrt(G + 2 (d + p + T^2) 2^-53 A^2), A / 1024).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from common.errors import RefusedError

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Positions: TypeAlias = torch.Tensor

PIECE_ROWS: Final = 4096
"""Rows of one forward and backward pass, at the least one patient's. It bounds memory, not the result."""

_CANCELLATION: Final = 1024
_UNIT_ROUNDOFF: Final = 2.0**-53
# Covers the roundings of the root, the quotient and the product by the scale.
_SLACK: Final = 1.0 + 2.0**-48
_SMALLEST: Final = 1e-140
_PADDING: Final = 4


@dataclass(frozen=True, slots=True)
class _Captured:
    """A layer's inputs a [n, T, d], or indices [n, T], and output gradients b [n, T, p]: T places a row."""

    layer: nn.Module
    a: Positions
    b: Positions

    def units(self, index: torch.Tensor, mask: torch.Tensor) -> "_Captured":
        """The same with units for rows: rows ``index`` [units, m], absent where ``mask`` is False."""
        # Not multiplied by zero: what is absent may be another patient's, and not finite.
        a, b = (
            x[index].masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 1)), 0) for x in (self.a, self.b)
        )
        return _Captured(self.layer, a.flatten(1, 2), b.flatten(1, 2))

    def squared_norms(self) -> torch.Tensor:
        """Squared norm of each unit's gradient, from above, float64 [units]; not finite where that is not."""
        b = self.b.double()
        one = float(getattr(self.layer, "bias", None) is not None)
        if isinstance(self.layer, nn.Linear):
            a = self.a.double()
            sizes = (a.square().sum(2) + one).sqrt() * b.square().sum(2).sqrt()
            total, (positions, width) = sizes.sum(1), a.shape[1:]
            if positions == 1:
                squared = sizes.square().sum(1)
            elif 2 * positions**2 <= (width + one) * b.shape[2]:
                squared = ((a @ a.mT + one) * (b @ b.mT)).sum((1, 2))
            else:
                squared = (b.mT @ a).square().sum((1, 2)) + one * b.sum(1).square().sum(1)
            return self._from_above(squared, total, width + 1 + b.shape[2])
        if isinstance(self.layer, nn.Embedding):
            same = self.a[:, :, None] == self.a[:, None, :]
            total = b.square().sum(2).sqrt().sum(1)
            return self._from_above((same * (b @ b.mT)).sum((1, 2)), total, 1 + b.shape[2])
        scaled = self.a.double() * b
        total = scaled.square().sum(2).sqrt().sum(1) + one * b.square().sum(2).sqrt().sum(1)
        squared = scaled.sum(1).square().sum(1) + one * b.sum(1).square().sum(1)
        return self._from_above(squared, total, 2 * b.shape[2])

    def _from_above(self, squared: torch.Tensor, total: torch.Tensor, terms: int) -> torch.Tensor:
        """A bound on the squared norm that no cancellation gets under."""
        rounding = 2 * (terms + self.b.shape[1] ** 2) * _UNIT_ROUNDOFF
        size = total.square()
        return torch.maximum(squared.clamp(min=0) + rounding * size, size / _CANCELLATION**2)

    def contract(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient, by parameter, of the rows weighted by ``weights`` [n]; without those of weight 0."""
        live = weights != 0
        a, b, weights = (
            (self.a, self.b, weights) if bool(live.all()) else (self.a[live], self.b[live], weights[live])
        )
        b = b * weights.to(b.dtype)[:, None, None]
        if isinstance(self.layer, nn.Linear):
            weight = b.flatten(0, 1).T @ a.flatten(0, 1)
        elif isinstance(self.layer, nn.Embedding):
            weight = torch.zeros_like(self.layer.weight)
            weight.index_add_(0, a.flatten(), b.flatten(0, 1))
        else:
            weight = (a * b).sum((0, 1))
        return {"weight": weight, "bias": b.sum((0, 1))}


def check_supported(module: nn.Module) -> None:
    """Refuse a module that has a parameter outside the layers with a rule, or that mixes rows.

    Raises: RefusedError naming the layer and the remedy.
    """
    seen: set[int] = set()
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            raise _refusal(
                name, layer, "computes with other patients' rows", "Use nn.GroupNorm or nn.LayerNorm."
            )
        if own and type(layer) not in _LAYERS:
            raise _refusal(
                name, layer, "has no clipping rule", "Build it from nn.Linear layers, or use Opacus."
            )
        if isinstance(layer, nn.Embedding) and (
            layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
        ):
            raise _refusal(name, layer, "changes its gradients by itself", "Leave out its options.")
        for parameter in own:
            if id(parameter) in seen or not parameter.requires_grad:
                raise _refusal(
                    name, layer, "shares or freezes a parameter", "Train each parameter in one layer."
                )
            seen.add(id(parameter))


def _refusal(name: str, layer: nn.Module, problem: str, remedy: str) -> RefusedError:
    said = f"layer {name or 'the model'} ({type(layer).__name__}) {problem}"
    return RefusedError("training.layer", said, remedy=remedy)


def clipped_sum(
    module: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    patients: NDArray[np.int64],
    loss: Loss,
    clip_norm: float,
    *,
    piece_rows: int = PIECE_ROWS,
) -> NDArray[np.float64]:
    """Sum over patients of c times the gradient of their rows' losses, float64 [d], c = min(1, C / norm).

    ``inputs`` [n, ...] and ``labels`` [n] go row by row through ``loss(module(inputs), labels)`` [n];
    ``patients`` [n] ascending, equal for exactly the rows of one patient; the order of the result is that
    of ``module.named_parameters()``. The contraction has the module's dtype, sums over pieces are float64.

    Guarantee: agrees_with_a_naive_loop - given the same c; without rows it is zero.
    Guarantee: norms_are_never_too_small - not even where activations cancel, so that no patient's part has
    a norm above C, but for the rounding of the contraction.
    Guarantee: a_non_finite_patient_is_zero - and takes nothing of the others.
    Guarantee: nothing_stays_on_the_module - no hook, no gradient, also after an error.
    Assumes: the module computes each row alone.
    Raises: RefusedError as ``check_supported``, or when a layer sees other than one entry a row.
    """
    check_supported(module)
    names = {id(p): name for name, p in module.named_parameters()}
    total = {name: np.zeros(p.shape) for name, p in module.named_parameters()}
    for rows in _pieces(patients, piece_rows):
        captured = _captured(module, inputs[rows], labels[rows], loss)
        with torch.no_grad():
            weights = _scales(captured, patients[rows], clip_norm)
            for one in captured:
                found = one.contract(weights)
                for own, parameter in one.layer.named_parameters(recurse=False):
                    total[names[id(parameter)]] += found[own].double().numpy()
    return np.concatenate([part.ravel() for part in total.values()])


def _pieces(patients: NDArray[np.int64], piece_rows: int) -> Iterator[slice]:
    """Slices of about ``piece_rows`` of the sorted rows, cut only between patients; none without rows."""
    begin = 0
    while begin < len(patients):
        stop = begin + piece_rows
        if stop < len(patients):
            cut = int(np.searchsorted(patients, patients[stop], side="left"))
            stop = cut if cut > begin else int(np.searchsorted(patients, patients[stop], side="right"))
        yield slice(begin, stop)
        begin = stop


def _captured(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, loss: Loss) -> list[_Captured]:
    """Inputs and output gradients of every layer with parameters that took part."""
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if given[0].shape[0] != len(inputs):
            raise _refusal("", layer, "does not see one entry a row", "Keep the rows in the first dimension.")
        calls.append((layer, given[0].detach(), output))

    layers = [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.enable_grad():
            value = loss(module(inputs), labels).sum()
            outputs = [output for _, _, output in calls]
            gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(value, outputs, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[nn.Module, list[tuple[Positions, Positions]]] = {}
    for (layer, given, _), gradient in zip(calls, gradients, strict=True):
        if gradient is None:
            continue
        found.setdefault(layer, []).append(_LAYERS[type(layer)](layer, given, gradient))
    return [_Captured(layer, *_joined(parts)) for layer, parts in found.items()]


def _joined(parts: Sequence[tuple[Positions, Positions]]) -> tuple[Positions, Positions]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts], 1)


def _of_linear(_layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor) -> tuple[Positions, Positions]:
    n = len(given)
    return given.reshape(n, -1, given.shape[-1]), gradient.reshape(n, -1, gradient.shape[-1])


def _of_embedding(
    layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor
) -> tuple[Positions, Positions]:
    indices = given.reshape(len(given), -1)
    gradient = gradient.reshape(len(given), -1, gradient.shape[-1])
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        gradient = gradient * (indices != layer.padding_idx)[:, :, None]
    return indices, gradient


def _of_layer_norm(
    layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor
) -> tuple[Positions, Positions]:
    if not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) != 1:
        raise _refusal("", layer, "normalises over several dimensions", "Normalise over the last one.")
    return _of_linear(layer, functional.layer_norm(given, layer.normalized_shape, eps=layer.eps), gradient)


def _of_group_norm(
    layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor
) -> tuple[Positions, Positions]:
    if not isinstance(layer, nn.GroupNorm):
        raise _refusal("", layer, "is no nn.GroupNorm", "Use nn.GroupNorm.")
    shape = (len(given), layer.num_channels, -1)
    normal = functional.group_norm(given, layer.num_groups, eps=layer.eps)
    return normal.reshape(shape).mT, gradient.reshape(shape).mT


_LAYERS: Final[dict[type[nn.Module], Callable[..., tuple[Positions, Positions]]]] = {
    nn.Linear: _of_linear,
    nn.Embedding: _of_embedding,
    nn.LayerNorm: _of_layer_norm,
    nn.GroupNorm: _of_group_norm,
}


def _scales(captured: Sequence[_Captured], patients: NDArray[np.int64], clip_norm: float) -> torch.Tensor:
    """c of each row's patient, float64 [n]: 0 where the norm is not finite."""
    first = np.flatnonzero(np.concatenate([[True], patients[1:] != patients[:-1]]))
    counts = np.diff(np.append(first, len(patients)))
    if len(first) == len(patients):
        return _scale(captured, clip_norm)
    scales = torch.zeros(len(first), dtype=torch.float64)
    for group in _groups(counts):
        most = int(counts[group].max())
        place = np.arange(most)[None, :]
        mask = torch.from_numpy(place < counts[group][:, None])
        index = torch.from_numpy(np.minimum(first[group][:, None] + place, len(patients) - 1))
        scales[group] = _scale([one.units(index, mask) for one in captured], clip_norm)
    return scales.repeat_interleave(torch.from_numpy(counts))


def _scale(units: Sequence[_Captured], clip_norm: float) -> torch.Tensor:
    squared = sum((one.squared_norms() for one in units), torch.zeros(()))
    norm = squared.sqrt() * _SLACK + _SMALLEST
    scale = (clip_norm / norm).clamp(max=1.0)
    return torch.where(norm.isfinite(), scale, torch.zeros_like(scale))


def _groups(counts: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Patients to be padded to the same number of rows: all, or such as differ by less than twofold."""
    if len(counts) * int(counts.max()) <= _PADDING * int(counts.sum()):
        yield np.arange(len(counts))
        return
    sizes = np.ceil(np.log2(counts))
    for size in np.unique(sizes):
        yield np.flatnonzero(sizes == size)
