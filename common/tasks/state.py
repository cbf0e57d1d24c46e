"""A model's state between rounds: one digest, one byte form, and a strict way in.

Source: PROTOCOL "Bytes" (model digest over tensors in layout order, dtype named, -0.0 written as 0.0), R0
(the state is checked before rows are touched); the safetensors format.
Rules: numpy only, no torch and no pickle; a state has exactly one sequence of bytes, so equal digests mean
equal bytes; whatever comes from the hub is checked for names, dtype, shape, finite values and norm before
anything is computed with it; a large model is gone through in blocks and never copied whole for it.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from common.encoding import labelled, u64
from common.errors import VerificationError
from common.tasks.models.layout import Tensor, layout_digest, size_bytes

State: TypeAlias = dict[str, NDArray[np.float32]]
Values: TypeAlias = Mapping[str, NDArray[np.floating[Any]]]

HEADER_LIMIT_BYTES = 1 << 20
_BLOCK: Final = 1 << 16
_NAMES: Final = {"float32": "F32", "float64": "F64"}


def check_state(state: Values, tensors: Sequence[Tensor], norm_bound: float) -> None:
    """Refuse a state that is not finite and of the layout with an L2 norm of at most ``norm_bound``.

    Guarantee: crafted_states_are_refused - a missing, extra, misshapen, differently typed, non-finite or too
    large tensor is refused, and nothing else.
    Raises: VerificationError.
    """
    # Squares of float32 values are at most 1e77; only float64 ones can overflow, and are then too large.
    total = 0.0
    with np.errstate(over="ignore"):
        for tensor in _checked(state, tensors):
            for block in _blocks(state, tensor):
                # Sums over patients are as large as there are patients; finite is all they have to be.
                total += 0.0 if tensor.counts else float(np.square(block, dtype=np.float64).sum())
    norm = math.sqrt(total)
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
    total = hashlib.sha256(labelled("model", layout_digest(tensors)))
    for tensor in _checked(state, tensors):
        total.update(u64(size_bytes([tensor])))
        for block in _blocks(state, tensor):
            total.update(block.data)
    return total.digest()


def state_bytes(state: Values, tensors: Sequence[Tensor]) -> bytes:
    """The one safetensors form of a state: layout's tensors, no metadata, zeros positive.

    Raises: VerificationError for a state that does not match the layout or is not finite.
    """
    # BytesIO gives its own memory away; joining parts would hold the model twice.
    file = io.BytesIO()
    file.write(_header(tensors))
    for tensor in sorted(_checked(state, tensors), key=lambda tensor: tensor.name):
        for block in _blocks(state, tensor):
            file.write(block.data)
    return file.getvalue()


def load_state(data: bytes, tensors: Sequence[Tensor], norm_bound: float) -> State:
    """The state inside ``data``, in layout order, fully checked: read-only arrays over ``data`` itself.

    Guarantee: load_inverts_state_bytes - load_state(state_bytes(s)) is s.
    Guarantee: every_state_has_one_byte_form - bytes that ``state_bytes`` would not have written are refused:
    metadata, padding, another order, gaps, negative zeros.
    Raises: VerificationError.
    """
    if len(data) > size_bytes(tensors) + HEADER_LIMIT_BYTES:
        raise VerificationError("state.size", "the model's bytes are longer than its layout allows")
    header = _header(tensors)
    if not data.startswith(header) or len(data) != len(header) + size_bytes(tensors):
        _refuse_form(data, tensors, norm_bound)
    views: State = {}
    start = len(header)
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        view = np.frombuffer(data, _stored(tensor), tensor.size, start)
        start += view.nbytes
        views[tensor.name] = view.reshape(tensor.shape)
        sign = 1 << (8 * view.itemsize - 1)
        if any((part.view(f"<u{view.itemsize}") == sign).any() for part in _parts(view)):
            _refuse_form(data, tensors, norm_bound)
    check_state(views, tensors, norm_bound)
    return {tensor.name: views[tensor.name] for tensor in tensors}


def _header(tensors: Sequence[Tensor]) -> bytes:
    """What safetensors writes in front of these tensors, all of one dtype: sorted, padded to eight bytes."""
    entries, start = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        stop = start + size_bytes([tensor])
        shape = list(tensor.shape)
        entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return u64(len(text)) + text


def _refuse_form(data: bytes, tensors: Sequence[Tensor], norm_bound: float) -> NoReturn:
    """Bytes that are not canonical: say what is wrong with the state in them, if one can be read at all."""
    try:
        loaded = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise VerificationError("state.format", "the model's bytes are not safetensors") from error
    check_state(loaded, tensors, norm_bound)
    raise VerificationError("state.not-canonical", "the model's bytes are not in their one canonical form")


def _checked(state: Values, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """``tensors``, when the state has them and no others, in their dtypes and shapes."""
    expected = {tensor.name for tensor in tensors}
    if set(state) != expected:
        differing = sorted(expected.symmetric_difference(state))
        raise VerificationError(
            "state.names", f"the tensors do not match the layout: {', '.join(map(repr, differing))}"
        )
    for tensor in tensors:
        found, name = state[tensor.name], repr(tensor.name)
        if found.dtype != np.dtype(tensor.dtype):
            rule = f"tensor {name} is {found.dtype}, the layout says {tensor.dtype}"
            raise VerificationError("state.dtype", rule)
        if found.shape != tensor.shape:
            rule = f"tensor {name} has shape {found.shape}, the layout says {tensor.shape}"
            raise VerificationError("state.shape", rule)
    return tensors


def _stored(tensor: Tensor) -> np.dtype[Any]:
    return np.dtype(tensor.dtype).newbyteorder("<")


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = array.reshape(-1)
    return (flat[at : at + _BLOCK] for at in range(0, flat.size, _BLOCK))


def _blocks(state: Values, tensor: Tensor) -> Iterator[NDArray[np.floating[Any]]]:
    """The tensor, row-major, little-endian, zeros positive. Raises VerificationError unless it is finite."""
    for part in _parts(state[tensor.name]):
        if not np.isfinite(part).all():
            raise VerificationError("state.not-finite", f"tensor {tensor.name!r} holds NaN or infinity")
        # Adding +0 turns -0 into +0 and leaves every other number as it is.
        yield (part + part.dtype.type(0)).astype(_stored(tensor), copy=False)
