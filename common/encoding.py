"""Bytes that are hashed, signed or used as keys: one unambiguous encoding with domain separation.

Source: PROTOCOL "Bytes"; RFC 5869 (HKDF-Expand), RFC 8785 (canonical JSON), RFC 4648, FIPS 180-4.
Rules: every label starts with ``wardround/v1/``; every part is length-prefixed, so two different
sequences of parts never give the same bytes; integers are little-endian with a fixed width.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from inspect import get_annotations
from typing import Any, get_args

import rfc8785
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from common.errors import VerificationError

PREFIX = "wardround/v1/"
DIGEST_SIZE_BYTES = 32
LARGEST_INTEGER = (1 << 53) - 1


def _unsigned(size_bytes: int) -> Callable[[int], bytes]:
    return lambda value: value.to_bytes(size_bytes, "little")


u8, u16, u32, u64 = (_unsigned(size_bytes) for size_bytes in (1, 2, 4, 8))
"""The little-endian bytes of an unsigned integer of so many bits. Raises OverflowError past the width."""


def enc(*parts: bytes) -> bytes:
    """Concatenate parts, each behind its length as u64le.

    Guarantee: enc_is_injective - different sequences of parts give different bytes.
    """
    return b"".join(u64(len(part)) + part for part in parts)


def labelled(label: str, *parts: bytes) -> bytes:
    """Bytes of ``parts`` under the versioned domain-separation label."""
    return enc((PREFIX + label).encode("ascii"), *parts)


def split_labelled(label: str, data: bytes, what: str) -> list[bytes]:
    """The parts inside labelled(label, ...), and nothing else. Raises VerificationError naming ``what``."""
    parts: list[bytes] = []
    position = 0
    while position < len(data):
        end = position + 8
        size = int.from_bytes(data[position:end], "little")
        if end > len(data) or end + size > len(data):
            raise VerificationError("encoding.truncated", f"the {what} ends in the middle of a part")
        parts.append(data[end : end + size])
        position = end + size
    if not parts or parts[0] != (PREFIX + label).encode("ascii"):
        raise VerificationError("encoding.label", f"the {what} does not carry the label {label!r}")
    return parts[1:]


def digest(label: str, *parts: bytes | memoryview) -> bytes:
    """H(label, parts): SHA-256 of the labelled encoding, 32 bytes, without a copy of large parts."""
    total = hashlib.sha256()
    for part in ((PREFIX + label).encode("ascii"), *parts):
        total.update(u64(len(part)))
        total.update(part)
    return total.digest()


def derive(key: bytes, label: str, *parts: bytes) -> bytes:
    """KDF(key, label, parts): HKDF-Expand with SHA-256, 32 bytes.

    Assumes: ``key`` is 32 uniformly random bytes (so the extract step of HKDF is not needed).
    """
    if len(key) != DIGEST_SIZE_BYTES:
        raise VerificationError("encoding.key-size", "a derivation key must have 32 bytes")
    return HKDFExpand(algorithm=hashes.SHA256(), length=32, info=labelled(label, *parts)).derive(key)


def annotations_of(cls: type) -> tuple[tuple[str, Any], ...]:
    """(name, mark) of each field that ``cls`` declares as ``Annotated[type, mark]``, in their order.

    A document or a record states with each field how it is written; this is what its writer goes by.
    """
    return tuple((name, get_args(kind)[1]) for name, kind in get_annotations(cls).items())


def base64_text(data: bytes) -> str:
    """RFC 4648 base64 of ``data``."""
    return base64.b64encode(data).decode("ascii")


def base64_bytes(text: str) -> bytes:
    """Read base64_text, and nothing else. Raises ValueError."""
    data = base64.b64decode(text, validate=True)
    # The decoder ignores spare bits: only a round trip is exact.
    if base64_text(data) != text:
        raise ValueError("base64")
    return data


def canonical_json(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value. Raises VerificationError on NaN, Inf and integers past 2^53."""
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        problem = f"the value has no RFC 8785 form: {error}"
        raise VerificationError("encoding.not-canonical", problem) from error


def parse_canonical_json(data: bytes, what: str) -> Any:
    """Parse bytes that must be exactly the RFC 8785 form of their value.

    Whole numbers from 2^53 on are read as floats, which is what canonical_json can have written there.

    Guarantee: only_canonical_json_is_read - duplicate keys, NaN, white space, other key orders and
    other number forms are refused, because re-encoding would not give the same bytes.
    Raises: VerificationError naming ``what``.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_int=_number)
        same = rfc8785.dumps(value) == data
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise VerificationError("encoding.json", f"{what} is not valid JSON") from error
    if not same:
        raise VerificationError("encoding.not-canonical", f"{what} is not in RFC 8785 canonical form")
    return value


def _number(text: str) -> int | float:
    value = int(text)
    return value if abs(value) <= LARGEST_INTEGER else float(text)
