"""PROTOCOL.md's formulas once more, the slow way and on nothing of ``common``: the oracle of the tests."""

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
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


def unsealed(ct: bytes, mlkem_seed: bytes, x25519_key: bytes, info: bytes) -> bytes:
    """HPKE, base mode, empty aad, of KEM 0x647A (X-Wing: ML-KEM-768, X25519), HKDF-SHA256 and AES-256-GCM."""
    mlkem, x25519 = (
        MLKEM768PrivateKey.from_seed_bytes(mlkem_seed),
        X25519PrivateKey.from_private_bytes(x25519_key),
    )
    own, theirs = x25519.public_key().public_bytes_raw(), ct[1088:1120]
    halves = mlkem.decapsulate(ct[:1088]) + x25519.exchange(X25519PublicKey.from_public_bytes(theirs))
    shared = hashlib.sha3_256(halves + theirs + own + bytes.fromhex("5c2e2f2f5e5c")).digest()
    suite = b"HPKE-v1HPKE" + struct.pack(">HHH", 0x647A, 1, 2)

    def extract(salt: bytes, label: bytes, part: bytes) -> bytes:
        return hmac.new(salt, suite + label + part, hashlib.sha256).digest()

    def expand(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return hmac.new(
            key, struct.pack(">H", size) + suite + label + context + b"\x01", hashlib.sha256
        ).digest()[:size]

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    key, nonce = expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)
    return AESGCM(key).decrypt(nonce, ct[1120:], b"")


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
