"""PROTOCOL.md's formulas once more, the slow way and on nothing of ``common``: the oracle of the tests."""

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB


def enc(*parts: bytes) -> bytes:
    out = b""
    for part in parts:
        out += struct.pack("<Q", len(part)) + part
    return out


def labelled(label: str, *parts: bytes) -> bytes:
    return enc(b"wardround/v1/" + label.encode(), *parts)


def hash_of(label: str, *parts: bytes) -> bytes:
    return hashlib.sha256(labelled(label, *parts)).digest()


def kdf(key: bytes, label: str, *parts: bytes) -> bytes:
    """HKDF-Expand to 32 bytes is one block: HMAC(key, info || 0x01)."""
    return hmac.new(key, labelled(label, *parts) + b"\x01", hashlib.sha256).digest()


def keystream(key: bytes, size: int) -> bytes:
    """AES-256 of the 128-bit big-endian counters 0, 1, 2, ..., block by block."""
    encryptor = Cipher(AES(key), ECB()).encryptor()  # noqa: S305 - one block at a time, as CTR is defined
    blocks = [encryptor.update(counter.to_bytes(16, "big")) for counter in range(-(-size // 16))]
    return b"".join(blocks)[:size]


def words(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def masked(
    q: list[int],
    size: int,
    b: bytes,
    pair_keys: dict[int, bytes],
    me: int,
    ids: list[int],
    vector: bytes,
    ctx: bytes,
) -> bytes:
    """q and a 1, plus the self-mask, plus the masks of higher ids, minus those of lower ones."""
    total = [*q, 1]
    streams = [(1, kdf(b, "selfmask", vector, ctx))]
    streams += [
        (1 if me < peer else -1, kdf(pair_keys[peer], "mask", vector, ctx)) for peer in ids if peer != me
    ]
    for sign, key in streams:
        stream = words(keystream(key, len(total) * size), size)
        total = [value + sign * mask for value, mask in zip(total, stream, strict=True)]
    return b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in total)
