"""Masks: one AES-256-CTR keystream per key, expanded and added in place; the digests of a payload.

Source: PROTOCOL.md "Keystream" and R3; NIST SP 800-38A (CTR). Rules: the initial counter block is 16 zero
bytes, so a key serves one vector of one context; the keystream is read as little-endian words and added
modulo 2^bits in blocks that stay in the second-level cache; counter mode starts anywhere, so a long vector
is cut into ranges for several cores; of a pair, the lower id adds.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from common.encoding import digest
from common.errors import RefusedError, VerificationError
from common.secagg.codec import SCALAR_BITS, Layout, Vector, Words, with_one
from common.secagg.keys import VECTORS, mask_key, self_mask_key

BLOCK_BYTES: Final = 1 << 18
RANGE_BYTES: Final = 1 << 22
_COUNTER_BLOCK_BYTES: Final = 16
_ZEROS: Final = bytes(BLOCK_BYTES)


def apply_keystreams(words: Words, added: Sequence[bytes], subtracted: Sequence[bytes] = ()) -> None:
    """Add and subtract, in place, the keystreams of AES keys (32 bytes each) to contiguous words.

    A vector of several ranges is worked on by several threads; the lock of the interpreter is released.

    Guarantee: masks_cancel - adding and subtracting one key leaves the words as they were.
    Raises: VerificationError for words or keys of another shape.
    """
    if words.ndim != 1 or not words.flags.c_contiguous or words.dtype.kind != "u":
        raise VerificationError("secagg.masks.words", "masks apply to one contiguous vector of words")
    if any(len(key) != 32 for key in (*added, *subtracted)):
        raise VerificationError("secagg.masks.key", "a mask key must have 32 bytes")

    def apply(start: int) -> None:
        stop = start + RANGE_BYTES
        part = words[start // words.itemsize : stop // words.itemsize]
        _apply_to_range(part, added, subtracted, start // _COUNTER_BLOCK_BYTES)

    starts = range(0, words.nbytes, RANGE_BYTES)
    if len(starts) < 2:
        for start in starts:
            apply(start)
        return
    with ThreadPoolExecutor() as threads:
        list(threads.map(apply, starts))


def _apply_to_range(words: Words, added: Sequence[bytes], subtracted: Sequence[bytes], counter: int) -> None:
    """The keystreams from block ``counter`` of the cipher on."""
    first = CTR(counter.to_bytes(_COUNTER_BLOCK_BYTES, "big"))
    streams = [Cipher(AES(key), first).encryptor() for key in (*added, *subtracted)]
    operations = [np.add] * len(added) + [np.subtract] * len(subtracted)
    scratch = bytearray(min(BLOCK_BYTES, words.nbytes) + _COUNTER_BLOCK_BYTES)
    masks = np.frombuffer(scratch, dtype=np.uint8)
    zeros = memoryview(_ZEROS)
    block_words = BLOCK_BYTES // words.itemsize
    for start in range(0, words.size, block_words):
        # All streams of a block are applied while it is in the cache.
        block = words[start : start + block_words]
        mask = masks[: block.nbytes].view(block.dtype)
        for stream, operation in zip(streams, operations, strict=True):
            stream.update_into(zeros[: block.nbytes], scratch)
            operation(block, mask, out=block)


def cohort_mask_keys(
    pair_keys: Mapping[int, bytes], ids: Sequence[int], me: int, vector: Vector, ctx: bytes
) -> tuple[list[bytes], list[bytes]]:
    """The keys that ``me`` adds and subtracts for one vector: one for every other id of the cohort.

    ``pair_keys`` maps a peer to the K of the round.
    Guarantee: a_missing_key_refuses - a cohort with a peer that has no key is refused.
    Raises: RefusedError naming the peer.
    """
    added: list[bytes] = []
    subtracted: list[bytes] = []
    # The loop is over the cohort, so that a peer without a key refuses it and never goes unmasked.
    for peer in ids:
        if peer == me:
            continue
        key = pair_keys.get(peer)
        if key is None:
            raise RefusedError("secagg.masks.no-key", f"there is no accepted pair with hospital {peer}")
        (added if me < peer else subtracted).append(mask_key(key, vector, ctx))
    return added, subtracted


def mask_payload(
    params: Words,
    scalars: Words,
    *,
    pair_keys: Mapping[int, bytes],
    ids: Sequence[int],
    me: int,
    b: bytes,
    ctx: bytes,
) -> bytes:
    """The payload of one upload: both vectors with their 1, under every pair mask and the self-mask.

    Guarantee: every_cohort_member_masks - each id of the cohort contributes one keystream a vector.
    Raises: RefusedError when a pair key is missing or the cohort is this hospital alone.
    """
    if me not in ids or len(set(ids)) != len(ids) or len(ids) < 2:
        raise RefusedError("secagg.masks.cohort", "a cohort holds this hospital once, and others")
    masked = []
    for vector, words in zip(VECTORS, (params, scalars), strict=True):
        added, subtracted = cohort_mask_keys(pair_keys, ids, me, vector, ctx)
        buffer = with_one(words)
        apply_keystreams(buffer, [self_mask_key(b, vector, ctx), *added], subtracted)
        masked.append(buffer)
    return b"".join(buffer.data for buffer in masked)


def plain_payload(params: Words, scalars: Words) -> bytes:
    """The payload of one upload without masks: both vectors with their 1, for the hub to read."""
    return b"".join(with_one(words).data for words in (params, scalars))


def remove_self_masks(params: Words, scalars: Words, seeds: Sequence[bytes], ctx: bytes) -> None:
    """Subtract, in place, the self-masks of the opened hospitals from both sums (with their last word)."""
    for vector, words in zip(VECTORS, (params, scalars), strict=True):
        apply_keystreams(words, (), [self_mask_key(b, vector, ctx) for b in seeds])


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """Digest of one chunk of a payload, 32 bytes."""
    return digest("chunk", chunk)


def chunk_digests(payload: bytes, layout: Layout) -> tuple[bytes, ...]:
    """The digest of every chunk, in order. Raises VerificationError for a payload of another length."""
    if len(payload) != layout.payload_bytes:
        raise VerificationError("secagg.payload.length", f"a payload must have {layout.payload_bytes} bytes")
    view = memoryview(payload)
    return tuple(chunk_digest(view[span.start : span.stop]) for span in layout.spans)


def empty_sums(layout: Layout) -> tuple[Words, Words]:
    """Zeroed sums of both vectors, each with room for its trailing 1."""
    params = np.zeros(layout.parameters + 1, dtype=f"<u{layout.bits // 8}")
    return params, np.zeros(layout.scalars + 1, dtype=f"<u{SCALAR_BITS // 8}")
