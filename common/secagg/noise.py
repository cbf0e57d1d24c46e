"""A hospital's share of the noise of a round, expanded from its round seed for one context.

Source: PROTOCOL.md "Keystream" (noise: one key per vector and block of 2^18 coordinates, refused past 2^24
cipher blocks), "Codec" (noise is added modulo 2^b, never clipped); PRIVACY.md "Randomness". Rules: equal
contexts give equal noise, another context gives independent noise; the sampler is an argument, the same for
hospital and tests; who reads the round seed before it is erased can remove this noise.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from common.errors import RefusedError
from common.secagg.codec import Words
from common.secagg.keys import noise_key

Sampler: TypeAlias = Callable[[int, int, Callable[[int], bytes]], NDArray[np.int64]]
"""``sampler(variance, size, entropy)``: int64 [size]; common.privacy.noise.discrete_gaussian."""

BLOCK_WORDS: Final = 1 << 18
LARGEST_KEYSTREAM_BYTES: Final = 16 << 24


def keystream(key: bytes) -> Callable[[int], bytes]:
    """The AES-256-CTR keystream of a key, read on at each call; ``read(n)`` gives n bytes.

    Guarantee: a_keystream_ends - past 2^24 cipher blocks it is refused.
    """
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
    left = LARGEST_KEYSTREAM_BYTES

    def read(count: int) -> bytes:
        nonlocal left
        if count > left:
            raise RefusedError("secagg.noise.keystream", "a noise key has given all that it may")
        left -= count
        return stream.update(bytes(count))

    return read


def with_noise(words: Words, variance: int, s: bytes, ctx: bytes, sampler: Sampler) -> Words:
    """A copy of the parameter words with noise of ``variance`` (squared grid units) added modulo 2^bits.

    ``s`` the round seed, 32 bytes; ``ctx`` the context of the upload.

    Guarantee: equal_contexts_give_equal_noise - and another context, or seed, independent noise.
    Guarantee: noise_is_added_on_every_coordinate - the sampler's integers, modulo 2^bits.
    """
    noisy = words.copy()
    for block, start in enumerate(range(0, words.size, BLOCK_WORDS)):
        part = noisy[start : start + BLOCK_WORDS]
        drawn = sampler(variance, part.size, keystream(noise_key(s, ctx, "params", block)))
        # To unsigned words of fewer bits: modulo 2^bits.
        part += drawn.astype(words.dtype)
    return noisy
