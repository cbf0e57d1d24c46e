"""A model's state between rounds: one digest, one byte form, and a strict way in.

Source: PROTOCOL "Bytes" (model digest over tensors in layout order, dtype named, -0.0 written as 0.0), R0
(the state is checked before rows are touched); the safetensors format.
Rules: numpy and safetensors only, no torch and no pickle; a state has exactly one sequence of bytes, so equal
digests mean equal bytes; whatever comes from the hub is checked for names, dtype, shape, finite values and
norm before anything is computed with it.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from common.encoding import digest
from common.errors import VerificationError
from common.tasks.models.layout import Tensor, flatten, layout_digest, size_bytes

State: TypeAlias = dict[str, NDArray[np.float32]]
Values: TypeAlias = Mapping[str, NDArray[np.float32]]

HEADER_LIMIT_BYTES = 1 << 20
_LITTLE_ENDIAN_FLOAT32 = np.dtype("<f4")


def check_state(state: Values, tensors: Sequence[Tensor], norm_bound: float) -> None:
    """Refuse a state that is not finite float32 of the layout with an L2 norm of at most ``norm_bound``.

    Guarantee: crafted_states_are_refused - a missing, extra, misshapen, differently typed, non-finite or too
    large tensor is refused, and nothing else.

    Raises: VerificationError.
    """
    _canonical(state, tensors)
    # Squares of float32 values are at most 1e77, so the float64 sum can't overflow.
    norm = float(np.linalg.norm(flatten(state, tensors)))
    if not norm <= norm_bound:
        raise VerificationError(
            "state.norm",
            f"the model's norm {norm:.6g} is not within the manifest's state_norm_bound {norm_bound:.6g}",
            remedy="Ask the coordinator; a model that grows without bound has diverged or was crafted.",
        )


def model_digest(state: Values, tensors: Sequence[Tensor]) -> bytes:
    """H("model", layout digest, little-endian bytes of each tensor in layout order), 32 bytes.

    Guarantee: digest_ignores_only_the_sign_of_zero - any other change of a bit, name or shape changes it.

    Raises: VerificationError for a state that does not match the layout or is not finite.
    """
    values = _canonical(state, tensors)
    return digest("model", layout_digest(tensors), *(array.tobytes() for array in values.values()))


def state_bytes(state: Values, tensors: Sequence[Tensor]) -> bytes:
    """The one safetensors form of a state: layout's tensors, no metadata, zeros positive.

    Raises: VerificationError for a state that does not match the layout or is not finite.
    """
    return safetensors.numpy.save(_canonical(state, tensors))


def load_state(data: bytes, tensors: Sequence[Tensor], norm_bound: float) -> State:
    """The state inside ``data``, in layout order, as new float32 arrays, fully checked.

    Guarantee: load_inverts_state_bytes - load_state(state_bytes(s)) is s.
    Guarantee: every_state_has_one_byte_form - bytes that ``state_bytes`` would not have written are refused:
    metadata, padding, another order, gaps, negative zeros.

    Raises: VerificationError.
    """
    if len(data) > size_bytes(tensors) + HEADER_LIMIT_BYTES:
        raise VerificationError("state.size", "the model's bytes are longer than its layout allows")
    try:
        loaded = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise VerificationError("state.format", "the model's bytes are not safetensors") from error
    check_state(loaded, tensors, norm_bound)
    if state_bytes(loaded, tensors) != data:
        raise VerificationError(
            "state.not-canonical", "the model's bytes are not in their one canonical form"
        )
    return {tensor.name: loaded[tensor.name].copy() for tensor in tensors}


def _canonical(state: Values, tensors: Sequence[Tensor]) -> State:
    """Contiguous little-endian copies in layout order without negative zeros."""
    expected = {tensor.name for tensor in tensors}
    if set(state) != expected:
        differing = sorted(expected.symmetric_difference(state))
        raise VerificationError(
            "state.names", f"the tensors do not match the layout: {', '.join(map(repr, differing))}"
        )
    values: State = {}
    for tensor in tensors:
        array = state[tensor.name]
        if array.dtype != np.dtype(tensor.dtype):
            raise VerificationError(
                "state.dtype", f"tensor {tensor.name!r} is {array.dtype}, the layout says {tensor.dtype}"
            )
        if array.shape != tensor.shape:
            raise VerificationError(
                "state.shape",
                f"tensor {tensor.name!r} has shape {array.shape}, the layout says {tensor.shape}",
            )
        if not np.isfinite(array).all():
            raise VerificationError("state.not-finite", f"tensor {tensor.name!r} holds NaN or infinity")
        # Adding +0 turns -0 into +0 and leaves every other number as it is.
        values[tensor.name] = np.ascontiguousarray(array + np.float32(0), dtype=_LITTLE_ENDIAN_FLOAT32)
    return values
