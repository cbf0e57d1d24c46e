"""Which tensors a model has, in which order, and how they become one flat vector.

Source: PROTOCOL "Bytes" (digests run over tensors in layout order with the dtype named); names are those of
``torch.nn.Module.state_dict`` so that a released model loads without renaming.
Rules: numpy only, no torch, so that hub, command line and auditor can size a study without it; the layout
depends on the model and the contract alone, never on data; a flat vector is float64 until it is stored.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from common.contract import Contract
from common.encoding import digest, u16, u64
from common.errors import VerificationError
from common.methods import Model
from common.study import Study
from common.tasks.evaluation import length
from common.tasks.models.shapes import tensors_of
from common.tasks.models.tensor import Tensor

EVALUATION: Final = "evaluation.counts"
"""The tensor of what held-out patients said of the model before a round's step."""
ITEM_SIZE_BYTES: Final[dict[str, int]] = {"float32": 4, "float64": 8}


__all__ = [
    "EVALUATION",
    "ITEM_SIZE_BYTES",
    "Layout",
    "Tensor",
    "flatten",
    "layout",
    "layout_digest",
    "size",
    "size_bytes",
    "state_layout",
]

Layout = tuple[Tensor, ...]


def layout(model: Model, contract: Contract) -> Layout:
    """The tensors of ``model`` for inputs of ``contract``, in the order of the flat vector.

    Assumes: ``common.tasks.fit`` accepted them.
    """
    return tuple(tensors_of(model, contract))


def state_layout(study: Study) -> Layout:
    """The tensors of a study's state: the model's, then the evaluation's counts where there are any."""
    tensors = layout(study.model, study.contract)
    if study.evaluation is None:
        return tensors
    cells = length(study.evaluation, study.model, study.contract, len(study.members))
    return (*tensors, Tensor(EVALUATION, (cells,), counts=True))


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
