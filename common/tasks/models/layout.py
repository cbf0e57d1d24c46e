"""Which tensors a model has, in which order, and how they become one flat vector.

Source: PROTOCOL "Bytes" (digests run over tensors in layout order with the dtype named); names are those of
``torch.nn.Module.state_dict`` so that a released model loads without renaming.
Rules: numpy only, no torch, so that hub, command line and auditor can size a study without it; the layout
depends on the model and the contract alone, never on data; a flat vector is float64 until it is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from common.contract import Contract
from common.encoding import digest, u16, u64
from common.errors import VerificationError
from common.study import Model

ITEM_SIZE_BYTES: Final[dict[str, int]] = {"float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor of a model: native torch name, shape, and the dtype in which it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "float64"] = "float32"

    @property
    def size(self) -> int:
        """Number of elements, at least 1."""
        count = 1
        for axis in self.shape:
            count *= axis
        return count


Layout = tuple[Tensor, ...]


def layout(model: Model, contract: Contract) -> Layout:
    """The tensors of ``model`` for inputs of ``contract``, in the order of the flat vector.

    Logistic regression is multinomial: one row of weights for each class, also for two classes, so that one
    loss (softmax cross-entropy) serves all labels. ``weight`` [classes, width], ``bias`` [classes]. An MLP is
    an ``nn.Sequential`` of such layers, activations between them: ``0.weight``, ``0.bias``, ``2.weight``...
    """
    widths = (contract.width, *(model.hidden if model.kind == "mlp" else ()), len(contract.label.classes))
    tensors: list[Tensor] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        prefix = f"{2 * index}." if model.kind == "mlp" else ""
        tensors += [Tensor(f"{prefix}weight", (outputs, inputs)), Tensor(f"{prefix}bias", (outputs,))]
    return tuple(tensors)


def size(tensors: Sequence[Tensor]) -> int:
    """Length d of the flat vector."""
    return sum(tensor.size for tensor in tensors)


def size_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the stored tensors without any header."""
    return sum(tensor.size * ITEM_SIZE_BYTES[tensor.dtype] for tensor in tensors)


def layout_digest(tensors: Sequence[Tensor]) -> bytes:
    """H("layout", count, (name, dtype, rank, axes...) of each tensor), 32 bytes."""
    parts: list[bytes] = [u16(len(tensors))]
    for tensor in tensors:
        parts += [tensor.name.encode(), tensor.dtype.encode(), u16(len(tensor.shape))]
        parts += [u64(axis) for axis in tensor.shape]
    return digest("layout", *parts)


def flatten(values: Mapping[str, npt.ArrayLike], tensors: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """All tensors, in layout order and row-major, as one new float64 vector of length d.

    Guarantee: flat_vectors_are_in_layout_order - whatever the order of ``values``, and bit for bit.
    Raises: VerificationError when a tensor is missing, unknown or of another shape.
    """
    expected = {tensor.name for tensor in tensors}
    if set(values) != expected:
        differing = sorted(expected.symmetric_difference(values))
        raise VerificationError(
            "layout.names", f"the tensors do not match the layout: {', '.join(differing)}"
        )
    vector = np.empty(size(tensors), dtype=np.float64)
    start = 0
    for tensor in tensors:
        array = np.asarray(values[tensor.name])
        if array.shape != tensor.shape:
            raise VerificationError(
                "layout.shape",
                f"tensor {tensor.name!r} has shape {array.shape}, the layout says {tensor.shape}",
            )
        vector[start : start + tensor.size] = array.reshape(-1)
        start += tensor.size
    return vector
