import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.encoding import digest
from common.errors import VerificationError
from common.tasks.models.layout import Tensor, layout_digest
from common.tasks.state import check_state, load_state, model_digest, state_bytes

# Not alphabetical: safetensors sorts by name, the layout does not.
TENSORS = (Tensor("weight", (2, 3)), Tensor("bias", (2,)))
BOUND = 1e6


def good():
    return {"bias": np.array([7, -8], np.float32), "weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def header_and_body(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header, body, padding=b""):
    text = json.dumps(header, separators=(",", ":")).encode() + padding
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


floats = st.floats(-1e5, 1e5, width=32)
states = st.fixed_dictionaries(
    {
        "weight": hnp.arrays(np.float32, (2, 3), elements=floats),
        "bias": hnp.arrays(np.float32, (2,), elements=floats),
    }
)


@given(states)
def test_load_inverts_state_bytes(state):
    loaded = load_state(state_bytes(state, TENSORS), TENSORS, BOUND)
    assert list(loaded) == ["weight", "bias"]
    for name, array in loaded.items():
        assert array.dtype == np.float32
        assert (array == state[name]).all()
        assert not np.signbit(array[array == 0]).any()
        assert not array.flags.writeable
    assert model_digest(state, TENSORS) == model_digest(
        load_state(state_bytes(state, TENSORS), TENSORS, BOUND), TENSORS
    )


def test_bytes_do_not_depend_on_the_order_or_memory_of_the_mapping():
    state = good()
    turned = {"weight": np.asfortranarray(state["weight"]), "bias": np.repeat(state["bias"], 2)[::2]}
    assert state_bytes(turned, TENSORS) == state_bytes(state, TENSORS)
    assert model_digest(turned, TENSORS) == model_digest(state, TENSORS)


def test_digest_has_the_bytes_of_the_protocol():
    expected = digest(
        "model",
        layout_digest(TENSORS),
        struct.pack("<6f", 0, 1, 2, 3, 4, 5),
        struct.pack("<2f", 7, -8),
    )
    assert model_digest(good(), TENSORS) == expected


@given(states, st.integers(0, 7), st.integers(0, 31))
def test_digest_ignores_only_the_sign_of_zero(state, element, bit):
    other = {name: array.copy() for name, array in state.items()}
    name, place = ("weight", element) if element < 6 else ("bias", element - 6)
    bits = other[name].reshape(-1).view(np.uint32)
    bits[place] ^= np.uint32(1 << bit)
    if not np.isfinite(other[name]).all():
        with pytest.raises(VerificationError, match=r"state\.not-finite"):
            model_digest(other, TENSORS)
        return
    same = all((state[n] == other[n]).all() for n in state)  # 0.0 == -0.0
    assert (model_digest(state, TENSORS) == model_digest(other, TENSORS)) == same


def test_digest_names_names_and_shapes():
    weight = np.zeros((2, 3), np.float32)
    digests = {
        model_digest({"weight": weight}, (Tensor("weight", (2, 3)),)),
        model_digest({"other": weight}, (Tensor("other", (2, 3)),)),
        model_digest({"weight": weight.reshape(3, 2)}, (Tensor("weight", (3, 2)),)),
        model_digest({"weight": weight.reshape(6)}, (Tensor("weight", (6,)),)),
    }
    assert len(digests) == 4


def changed(**tensors):
    return good() | tensors


CRAFTED = {
    "missing": ({"bias": good()["bias"]}, "state.names"),
    "extra": (changed(more=np.zeros(1, np.float32)), "state.names"),
    "renamed": ({"Weight": good()["weight"], "bias": good()["bias"]}, "state.names"),
    "empty": ({}, "state.names"),
    "transposed": (changed(weight=np.zeros((3, 2), np.float32)), "state.shape"),
    "flat": (changed(weight=np.zeros(6, np.float32)), "state.shape"),
    "scalar": (changed(bias=np.array(1, np.float32)), "state.shape"),
    "float64": (changed(bias=np.zeros(2)), "state.dtype"),
    "float16": (changed(bias=np.zeros(2, np.float16)), "state.dtype"),
    "int32": (changed(bias=np.zeros(2, np.int32)), "state.dtype"),
    "nan": (changed(bias=np.array([0, np.nan], np.float32)), "state.not-finite"),
    "inf": (changed(bias=np.array([np.inf, 0], np.float32)), "state.not-finite"),
    "large": (changed(bias=np.array([2e6, 0], np.float32)), "state.norm"),
    "largest": (changed(weight=np.full((2, 3), np.finfo(np.float32).max)), "state.norm"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_states_are_refused(name):
    state, code = CRAFTED[name]
    with pytest.raises(VerificationError) as caught:
        check_state(state, TENSORS, BOUND)
    assert caught.value.code == code
    with pytest.raises(VerificationError) as caught:
        load_state(safetensors.numpy.save(state), TENSORS, BOUND)
    assert caught.value.code == code
    check_state(good(), TENSORS, BOUND)


def test_the_norm_bound_is_inclusive_and_over_all_tensors():
    state = {"weight": np.zeros((2, 3), np.float32), "bias": np.array([3, 0], np.float32)}
    state["weight"][0, 0] = 4
    check_state(state, TENSORS, 5.0)
    with pytest.raises(VerificationError, match=r"state\.norm"):
        check_state(state, TENSORS, np.nextafter(5.0, 0))
    with pytest.raises(VerificationError, match=r"state\.norm"):
        check_state(state, TENSORS, float("nan"))


def other_forms():
    data = state_bytes(good(), TENSORS)
    header, body = header_and_body(data)
    swapped = {
        "weight": header["weight"] | {"data_offsets": [0, 24]},
        "bias": header["bias"] | {"data_offsets": [24, 32]},
    }
    yield "metadata", assemble({"__metadata__": {"note": "x"}} | header, body)
    yield "padding", assemble(header, body, padding=b" " * 8)
    yield "order of bodies", assemble(swapped, body[8:] + body[:8])
    yield "order of names", assemble(dict(reversed(header.items())), body)
    yield "negative zero", assemble(header, body[:8] + struct.pack("<f", -0.0) + body[12:])
    yield "trailing byte", data + b"\0"
    yield "truncated", data[:-1]
    yield "white space", assemble(header, body).replace(b'"dtype":', b'"dtype" :')
    yield "nothing", b""
    yield "huge", data + bytes(1 << 21)
    yield "header past the end", struct.pack("<Q", 2**40) + data[8:]


def test_the_other_forms_are_built_from_the_right_one():
    data = state_bytes(good(), TENSORS)
    assert assemble(*header_and_body(data)) == data
    forms = dict(other_forms())
    # Some are files that a lenient reader takes for the same model.
    for name in ("metadata", "padding", "order of bodies", "order of names", "negative zero"):
        lenient = safetensors.numpy.load(forms[name])
        assert all((lenient[n] == good()[n]).all() for n in good()), name


@pytest.mark.parametrize(("name", "data"), list(other_forms()), ids=[name for name, _ in other_forms()])
def test_every_state_has_one_byte_form(name, data):
    with pytest.raises(VerificationError):
        load_state(data, TENSORS, BOUND)


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_bytes_are_refused_or_are_the_form_of_what_was_read(data):
    valid = bytearray(state_bytes(good(), TENSORS))
    for _ in range(data.draw(st.integers(1, 3))):
        valid[data.draw(st.integers(0, len(valid) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = load_state(bytes(valid), TENSORS, BOUND)
    except VerificationError:
        return
    assert state_bytes(loaded, TENSORS) == bytes(valid)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(VerificationError):
        load_state(data, TENSORS, BOUND)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "BOOL", "U64", "F16"])
def test_other_dtypes_in_the_header_are_refused(dtype):
    width = {"BF16": 2, "F16": 2, "F8_E4M3": 1, "BOOL": 1, "U64": 8}[dtype]
    header = {
        "weight": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * width]},
        "bias": {"dtype": dtype, "shape": [2], "data_offsets": [6 * width, 8 * width]},
    }
    with pytest.raises(VerificationError):
        load_state(assemble(header, bytes(8 * width)), TENSORS, BOUND)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_form_is_that_of_safetensors(dtype):
    # Long and odd names move the padding; more elements than fit into one block.
    for names in (["a"], ["z", "0.weight", "0.bias"], ["x" * n for n in range(1, 20)]):
        tensors = tuple(Tensor(name, (3, 7 * i + 1), dtype) for i, name in enumerate(names))
        state = {t.name: np.random.default_rng(1).normal(size=t.shape).astype(dtype) for t in tensors}
        assert state_bytes(state, tensors) == safetensors.numpy.save(state)
        loaded = load_state(state_bytes(state, tensors), tensors, 1e9)
        assert all((loaded[t.name] == state[t.name]).all() for t in tensors)


def test_states_longer_than_a_block_are_whole():
    tensors = (Tensor("w", (2, 70_001)), Tensor("b", (5,)))
    state = {t.name: np.random.default_rng(2).normal(size=t.shape).astype(np.float32) for t in tensors}
    state["w"][1, 70_000] = -0.0
    positive = {name: value + np.float32(0) for name, value in state.items()}
    data = state_bytes(state, tensors)
    assert data == safetensors.numpy.save(positive)
    assert model_digest(state, tensors) == digest(
        "model", layout_digest(tensors), positive["w"].tobytes(), positive["b"].tobytes()
    )
    norm = np.linalg.norm(np.concatenate([state["w"].ravel(), state["b"]]).astype(np.float64))
    check_state(state, tensors, norm * (1 + 1e-9))
    with pytest.raises(VerificationError, match=r"state\.norm"):
        check_state(state, tensors, norm * (1 - 1e-9))
    with pytest.raises(VerificationError, match=r"state\.not-canonical"):
        load_state(safetensors.numpy.save(state), tensors, 1e9)
    state["w"][1, 70_000] = np.inf
    with pytest.raises(VerificationError, match=r"state\.not-finite"):
        state_bytes(state, tensors)


def test_state_and_model_registry_import_no_torch():
    code = "import sys, common.tasks.state, common.tasks.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
