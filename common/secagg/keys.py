"""The key schedule: every key and tag that is ever derived, each under its own label.

Source: PROTOCOL.md "KDF labels, closed list"; RFC 5869. Rules: nothing else in the package calls
``derive``; a key serves one vector of one context (a noise key: one block of it).
"""

import hashlib
from typing import Final

import numpy as np

from common.encoding import PREFIX, derive, digest, u16, u32, u64
from common.secagg.codec import Vector, Words

VECTORS: Final[tuple[Vector, ...]] = ("params", "scalars")


def pair_key(seed: bytes, man: bytes, dirh: bytes, i: int, j: int, ct: bytes) -> bytes:
    """K_0 of the pair i < j, bound to the sealed seed ``ct`` it came from."""
    return derive(seed, "pair", digest("pairbind", man, dirh, u16(i), u16(j), ct))


def confirm_tag(key: bytes, dirh: bytes, sender: int, peer: int) -> bytes:
    """Tag by which ``sender`` shows ``peer`` that it knows K_0."""
    return derive(key, "confirm", dirh, u16(sender), u16(peer))


def ratchet(key: bytes, steps: int) -> bytes:
    """K advanced by ``steps`` >= 0 rounds; there is no way back."""
    for _ in range(steps):
        key = derive(key, "ratchet")
    return key


def mask_key(key: bytes, vector: Vector, ctx: bytes) -> bytes:
    """AES key of the pair mask of one vector of one context, from the K of the round."""
    return derive(key, "mask", vector.encode("ascii"), ctx)


def ready_tag(s: bytes, man: bytes, number: int, member: int, q_digest: bytes) -> bytes:
    """nu of round ``number``: commits ``member`` to its round seed and to its vector."""
    return derive(s, "ready", man, u32(number), u16(member), q_digest)


def self_seed(s: bytes, ctx: bytes) -> bytes:
    """b: the seed of the self-mask of one context, the only secret that is ever revealed."""
    return derive(s, "self", ctx)


def noise_key(s: bytes, ctx: bytes, vector: Vector, block: int) -> bytes:
    """AES key of the noise of one block of 2^18 coordinates of one vector of one context."""
    return derive(s, "noise", ctx, vector.encode("ascii"), u32(block))


def self_mask_key(b: bytes, vector: Vector, ctx: bytes) -> bytes:
    """AES key of the self-mask of one vector of one context."""
    return derive(b, "selfmask", vector.encode("ascii"), ctx)


def commitment(b: bytes, ctx: bytes, member: int) -> bytes:
    """What the upload says of b before it is opened."""
    return derive(b, "commit", ctx, u16(member))


def vectors_digest(label: str, params: Words, scalars: Words) -> bytes:
    """H(label, bytes of params, bytes of scalars), without a copy of the vectors."""
    name = (PREFIX + label).encode("ascii")
    state = hashlib.sha256(u64(len(name)) + name)
    for words in (params, scalars):
        part = np.ascontiguousarray(words)
        state.update(u64(part.nbytes))
        state.update(part.data if part.nbytes else b"")
    return state.digest()
