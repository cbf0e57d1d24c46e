"""Labelled bytes, digests, derived keys, canonical JSON: known answers, one form each, no other form read."""

import hashlib
import hmac
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import (
    canonical_json,
    derive,
    digest,
    enc,
    labelled,
    parse_canonical_json,
    split_labelled,
    u8,
    u16,
    u32,
    u64,
)
from common.errors import VerificationError

parts = st.lists(st.binary(max_size=12), max_size=5)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def test_integers_have_a_fixed_width() -> None:
    assert (u8(255), u16(0x0102), u32(1), u64(2**64 - 1)) == (
        b"\xff",
        b"\x02\x01",
        b"\x01\0\0\0",
        b"\xff" * 8,
    )
    for function, size in ((u8, 1), (u16, 2), (u32, 4), (u64, 8)):
        for wrong in (-1, 1 << 8 * size):
            with pytest.raises(OverflowError):
                function(wrong)


@given(parts, parts)
@settings(max_examples=200)
def test_enc_is_injective(left: list[bytes], right: list[bytes]) -> None:
    assert (enc(*left) == enc(*right)) == (left == right)
    # The classical confusion of a plain join.
    assert enc(b"ab", b"c") != enc(b"a", b"bc") != enc(b"abc")
    # Naive oracle: read the parts back.
    data, found = enc(*left), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(data[8 : 8 + size])
        data = data[8 + size :]
    assert found == left


@given(st.sampled_from(["a", "b", ""]), parts)
def test_split_inverts_labelled(label: str, values: list[bytes]) -> None:
    assert split_labelled(label, labelled(label, *values), "thing") == values
    with pytest.raises(VerificationError, match="the thing does not carry the label 'other'"):
        split_labelled("other", labelled(label, *values), "thing")


@given(parts, st.data())
def test_truncated_bytes_are_refused(values: list[bytes], data: st.DataObject) -> None:
    whole = labelled("x", *values)
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        read = split_labelled("x", whole[:cut], "thing")
    except VerificationError:
        return
    assert labelled("x", *read) == whole[:cut]


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x01" + bytes(7)])
def test_lengths_past_the_end_are_refused(data: bytes) -> None:
    with pytest.raises(VerificationError, match="thing"):
        split_labelled("x", data, "thing")


def test_known_answers() -> None:
    label = b"wardround/v1/thing"
    encoded = len(label).to_bytes(8, "little") + label + (2).to_bytes(8, "little") + b"ab"
    assert labelled("thing", b"ab") == encoded
    assert digest("thing", b"ab") == hashlib.sha256(encoded).digest()
    # RFC 5869, section 2.3: one block of HKDF-Expand is HMAC(key, info || 0x01).
    key = bytes(range(32))
    assert derive(key, "thing", b"ab") == hmac.new(key, encoded + b"\x01", "sha256").digest()


@given(st.text("abc/", min_size=1, max_size=4), st.text("abc/", min_size=1, max_size=4))
def test_labels_separate_domains(left: str, right: str) -> None:
    assert (digest(left, b"x") == digest(right, b"x")) == (left == right)
    assert (derive(bytes(32), left) == derive(bytes(32), right)) == (left == right)


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_derivation_keys_have_32_bytes(size: int) -> None:
    with pytest.raises(VerificationError, match="32 bytes"):
        derive(bytes(size), "x")


@given(json_values)
@settings(max_examples=150)
def test_only_canonical_json_is_read(value: Any) -> None:
    data = canonical_json(value)
    assert parse_canonical_json(data, "it") == value
    for other in (
        json.dumps(value, indent=1).encode(),
        data + b" ",
        b" " + data,
        b"\xef\xbb\xbf" + data,
        json.dumps({"b": value, "a": 1}).encode(),
    ):
        if other != data:
            with pytest.raises(VerificationError, match="it is not"):
                parse_canonical_json(other, "it")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"nul", b'{"a":1,"a":1}', b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b"-Infinity", b"1.0",
        b"1e2", b"01", b"-0", b'"\\u0061"', b"\xff", b'{"b":1,"a":2}', b"[1, 2]", b"9007199254740993",
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_other_forms_of_json_are_refused(data: bytes) -> None:
    with pytest.raises(VerificationError, match="the thing is not"):
        parse_canonical_json(data, "the thing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, -(2**53), {1: 2}, b"x", "\ud800"])
def test_values_without_a_canonical_form_are_refused(value: Any) -> None:
    with pytest.raises(VerificationError, match="no RFC 8785 form"):
        canonical_json(value)
