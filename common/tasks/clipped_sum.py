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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from common.errors import RefusedError

Loss: TypeAlias = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Layers: TypeAlias = dict[nn.Module, dict[str, nn.Parameter]]

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
    a: torch.Tensor
    b: torch.Tensor

    def units(self, rows: slice | NDArray[np.intp], present: NDArray[np.bool_]) -> "_Captured":
        """The same with units for rows: ``rows`` in order where ``present`` [units, m], zero elsewhere."""
        return _Captured(self.layer, *(_padded(x[rows], present) for x in (self.a, self.b)))

    def squared_norms(self) -> torch.Tensor:
        """Squared norm of each unit's gradient, from above, float64 [units]; not finite where that is not."""
        one = float(getattr(self.layer, "bias", None) is not None)
        linear = isinstance(self.layer, nn.Linear | nn.Conv2d)
        positions, width, terms = self.b.shape[1], self.a.shape[-1], self.a.shape[-1] + 1 + self.b.shape[2]
        if linear and positions == 1:
            # By numpy: a call of it costs a third of one of torch.
            x, y = (np.vecdot(v, v, dtype=np.float64)[:, 0] for v in (self.a.numpy(), self.b.numpy()))
            return torch.from_numpy((x + one) * y * self._excess(terms))
        a, b = self.a.double(), self.b.double()
        if linear and 2 * positions**2 <= (width + one) * b.shape[2]:
            return self._from_products((a @ a.mT).add_(one).mul_(b @ b.mT), terms)
        if linear:
            sizes = (a.square().sum(2) + one).sqrt() * b.square().sum(2).sqrt()
            squared = (b.mT @ a).square().sum((1, 2)) + one * b.sum(1).square().sum(1)
            return self._from_above(squared, sizes.sum(1), terms)
        if isinstance(self.layer, nn.Embedding):
            same = self.a[:, :, None] == self.a[:, None, :]
            return self._from_products(same * (b @ b.mT), 1 + b.shape[2])
        scaled = a * b
        total = scaled.square().sum(2).sqrt().sum(1) + one * b.square().sum(2).sqrt().sum(1)
        squared = scaled.sum(1).square().sum(1) + one * b.sum(1).square().sum(1)
        return self._from_above(squared, total, 2 * b.shape[2])

    def _from_products(self, products: torch.Tensor, terms: int) -> torch.Tensor:
        """``_from_above`` of (a_s a_t)(b_s b_t), [units, T, T]."""
        total = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)
        return self._from_above(products.sum((1, 2)), total, terms)

    def _from_above(self, squared: torch.Tensor, total: torch.Tensor, terms: int) -> torch.Tensor:
        """A bound on the squared norm that no cancellation gets under."""
        size = total.square()
        squared = squared.clamp(min=0) + (self._excess(terms) - 1) * size
        return torch.maximum(squared, size / _CANCELLATION**2)

    def _excess(self, terms: int) -> float:
        return 1 + 2 * (terms + self.b.shape[1] ** 2) * _UNIT_ROUNDOFF

    def contract(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient, by parameter, of the rows weighted by ``weights`` [n]."""
        a, b = self.a, self.b * weights.to(self.b.dtype)[:, None, None]
        if isinstance(self.layer, nn.Linear | nn.Conv2d):
            weight = (b.flatten(0, 1).T @ a.flatten(0, 1)).view_as(self.layer.weight)
        elif isinstance(self.layer, nn.Embedding):
            weight = torch.zeros_like(self.layer.weight)
            weight.index_add_(0, a.flatten(), b.flatten(0, 1))
        else:
            weight = (a * b).sum((0, 1))
        return {"weight": weight, "bias": b.sum((0, 1))}


def check_supported(module: nn.Module) -> Layers:
    """The layers that have parameters; refuses one without a rule, or that mixes rows.

    Raises: RefusedError naming the layer and the remedy.
    """
    seen: set[int] = set()
    layers: Layers = {}
    for name, layer in module.named_modules():
        own = {key: p for key, p in layer._parameters.items() if p is not None}
        ids = set(map(id, own.values()))
        fault = None
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            fault = "computes with other patients' rows", "Use nn.GroupNorm or nn.LayerNorm."
        elif own and type(layer) not in _LAYERS:
            fault = "has no clipping rule", "Build it from nn.Linear layers, or use Opacus."
        elif isinstance(layer, nn.Embedding) and (
            layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
        ):
            fault = "changes its gradients by itself", "Leave out its options."
        elif isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            fault = "has no clipping rule for its options", "Leave out groups and padding_mode."
        elif ids & seen or len(ids) < len(own) or not all(p.requires_grad for p in own.values()):
            fault = "shares or freezes a parameter", "Train each parameter in one layer."
        if fault:
            raise _refusal(name, layer, *fault)
        seen |= ids
        layers |= {layer: own} if own else {}
    return layers


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

    ``inputs`` [n, ...] and ``labels`` [n] go row by row through ``loss(module, inputs, labels)`` [n];
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
    layers = check_supported(module)
    total = {layer: {name: np.zeros(p.shape) for name, p in own.items()} for layer, own in layers.items()}
    for rows in pieces(patients, piece_rows):
        captured = _captured(module, layers, inputs[rows], labels[rows], loss)
        weights = _scales(captured, patients[rows], clip_norm)
        if not weights.numpy().all():
            # Not multiplied by zero: what is not finite has to go.
            live = weights != 0
            weights = weights[live]
            captured = [_Captured(one.layer, one.a[live], one.b[live]) for one in captured]
        for one in captured:
            found = one.contract(weights)
            for name, part in total[one.layer].items():
                part += found[name].double().numpy()
    return np.concatenate([part.ravel() for own in total.values() for part in own.values()])


def pieces(patients: NDArray[np.int64], piece_rows: int) -> Iterator[slice]:
    """Slices of about ``piece_rows`` of the sorted rows, cut only between patients; none without rows."""
    begin = 0
    while begin < len(patients):
        stop = min(begin + piece_rows, len(patients))
        if stop < len(patients):
            cut = int(np.searchsorted(patients, patients[stop], side="left"))
            stop = cut if cut > begin else int(np.searchsorted(patients, patients[stop], side="right"))
        yield slice(begin, stop)
        begin = stop


def _captured(
    module: nn.Module, layers: Layers, inputs: torch.Tensor, labels: torch.Tensor, loss: Loss
) -> list[_Captured]:
    """Inputs and output gradients of every one of the layers that took part."""
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if given[0].shape[0] != len(inputs):
            raise _refusal("", layer, "does not see one entry a row", "Keep the rows in the first dimension.")
        calls.append((layer, given[0].detach(), output))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.enable_grad():
            value = loss(module, inputs, labels).sum()
            outputs = [output for _, _, output in calls]
            gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(value, outputs, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[nn.Module, list[Pair]] = {}
    for (layer, given, _), gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            found.setdefault(layer, []).append(_LAYERS[type(layer)](layer, given, gradient))
    return [_Captured(layer, *_joined(parts)) for layer, parts in found.items()]


def _joined(parts: Sequence[Pair]) -> Iterable[torch.Tensor]:
    return parts[0] if len(parts) == 1 else (torch.cat(x, 1) for x in zip(*parts, strict=True))


def _of_linear(_layer: Any, given: torch.Tensor, gradient: torch.Tensor) -> Pair:
    n = len(given)
    return given.reshape(n, -1, given.shape[-1]), gradient.reshape(n, -1, gradient.shape[-1])


def _of_convolution(layer: Any, given: torch.Tensor, gradient: torch.Tensor) -> Pair:
    # Each place of the output saw one patch of the input.
    patches = functional.unfold(given, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
    return patches.mT, gradient.flatten(2).mT


def _padding(layer: Any) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        raise _refusal("", layer, "names its padding", "Give it as a number.")
    padding: tuple[int, ...] = layer.padding
    return padding


def _of_embedding(layer: Any, given: torch.Tensor, gradient: torch.Tensor) -> Pair:
    indices = given.reshape(len(given), -1)
    gradient = gradient.reshape(len(given), -1, gradient.shape[-1])
    if layer.padding_idx is not None:
        gradient = gradient * (indices != layer.padding_idx)[:, :, None]
    return indices, gradient


def _of_layer_norm(layer: Any, given: torch.Tensor, gradient: torch.Tensor) -> Pair:
    if len(layer.normalized_shape) != 1:
        raise _refusal("", layer, "normalises over several dimensions", "Normalise over the last one.")
    return _of_linear(layer, functional.layer_norm(given, layer.normalized_shape, eps=layer.eps), gradient)


def _of_group_norm(layer: Any, given: torch.Tensor, gradient: torch.Tensor) -> Pair:
    shape = (len(given), layer.num_channels, -1)
    normal = functional.group_norm(given, layer.num_groups, eps=layer.eps)
    return normal.reshape(shape).mT, gradient.reshape(shape).mT


_LAYERS: Final[dict[type[nn.Module], Callable[..., Pair]]] = {
    nn.Linear: _of_linear,
    nn.Conv2d: _of_convolution,
    nn.Embedding: _of_embedding,
    nn.LayerNorm: _of_layer_norm,
    nn.GroupNorm: _of_group_norm,
}


def _scales(captured: Sequence[_Captured], patients: NDArray[np.int64], clip_norm: float) -> torch.Tensor:
    """c of each row's patient, float64 [n]: 0 where the norm is not finite."""
    starts = patients[1:] != patients[:-1]
    if starts.all():
        return _scale(captured, clip_norm)
    first = np.flatnonzero(np.concatenate([[True], starts]))
    counts = np.diff(np.append(first, len(patients)))
    scales = np.zeros(len(first))
    for group in _groups(counts):
        place = np.arange(counts[group].max())
        present = place < counts[group][:, None]
        rows = slice(None) if len(group) == len(counts) else (first[group][:, None] + place)[present]
        scales[group] = _scale((one.units(rows, present) for one in captured), clip_norm).numpy()
    return torch.from_numpy(np.repeat(scales, counts))


def _padded(rows: torch.Tensor, present: NDArray[np.bool_]) -> torch.Tensor:
    """``rows`` [k, T, d] where ``present`` [units, m], in order, and zeros, as float64: [units, m T, d]."""
    padded = np.zeros((*present.shape, *rows.shape[1:]), np.float64 if rows.is_floating_point() else np.int64)
    padded[present] = rows.numpy()
    return torch.from_numpy(padded).flatten(1, 2)


def _scale(units: Iterable[_Captured], clip_norm: float) -> torch.Tensor:
    with np.errstate(all="ignore"):
        squared = sum(one.squared_norms().numpy() for one in units)
        scale = np.minimum(clip_norm / (np.sqrt(squared) * _SLACK + _SMALLEST), 1.0)
        # An infinite norm gives 0 by itself; of NaN and 0, fmax takes 0.
        return torch.from_numpy(np.fmax(scale, 0.0))


def _groups(counts: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Patients to be padded to the same number of rows: all, or such as differ by less than twofold."""
    if len(counts) * int(counts.max()) <= _PADDING * int(counts.sum()):
        yield np.arange(len(counts))
        return
    sizes = np.ceil(np.log2(counts))
    for size in np.unique(sizes):
        yield np.flatnonzero(sizes == size)
