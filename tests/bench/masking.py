"""Masking on one core: against the speed of its parts, Flower's primitives and CKKS; a whole upload."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from common.secagg.masks import BLOCK_BYTES, apply_keystreams, mask_payload, remove_self_masks
from common.secagg.records import Cohort
from tests.bench.cohorts import InMemory
from tests.bench.result import Result
from tests.common.secagg.federation import MODEL

PARAMETERS = 10**6
LARGE = 25 * 10**6
PEERS = 10
ME = 6
IDS = tuple(range(1, PEERS + 2))
KEYS = {i: bytes([i]) * 32 for i in IDS}
CTX = bytes(32)
REPEATS = 15


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This thread, and those that it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(*calls: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """The least CPU time of each call, of all threads of the process; the calls take turns."""
    least = [float("inf")] * len(calls)
    for _ in range(repeats):
        for at, call in enumerate(calls):
            started = time.process_time()
            call()
            least[at] = min(least[at], time.process_time() - started)
    return least


def expand_and_add() -> list[Result]:
    """11 keystreams on a vector, beside its two parts on one block in the cache, as often."""
    words = np.zeros(PARAMETERS, dtype="<u4")
    rounds = len(IDS) * words.nbytes // BLOCK_BYTES
    zeros, out = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES + 16)
    stream = Cipher(AES(KEYS[1]), CTR(bytes(16))).encryptor()
    block, mask = words[: BLOCK_BYTES // 4].copy(), np.frombuffer(out, dtype="<u4")[: BLOCK_BYTES // 4]

    def encrypt() -> None:
        for _ in range(rounds):
            stream.update_into(zeros, out)

    def add() -> None:
        for _ in range(rounds):
            np.add(block, mask, out=block)

    keys = list(KEYS.values())
    aes_s, add_s, both_s = cpu_s(encrypt, add, lambda: apply_keystreams(words, keys[:ME], keys[ME:]))
    parts_bytes, whole_bytes = rounds * BLOCK_BYTES, len(keys) * words.nbytes
    ceiling, rate = parts_bytes / (aes_s + add_s), whole_bytes / both_s
    return [
        Result("mask.AES-256-CTR", parts_bytes / aes_s / 1e9, "GB/s"),
        Result("mask.in-place add in the cache", parts_bytes / add_s / 1e9, "GB/s"),
        Result("mask.expand and add, 10⁶ parameters, 11 keystreams", rate / 1e9, "GB/s"),
        Result("mask.expand and add / its serial ceiling", rate / ceiling, "x", at_least=0.8),
    ]


def upload_s(parameters: int, repeats: int) -> float:
    """CPU of all that a hospital does from the cohort to its kept upload; only its own vector is real."""
    federation = InMemory(len(IDS), parameters=parameters)
    federation.pair()
    site = federation.sites[ME]
    least = float("inf")
    for number in range(1, repeats + 1):
        site.on_round_start(federation.round(number, start_at=()).start)
        ready = site.ready(*federation.vectors(ME, number), MODEL)
        members = tuple((i, ready.nu if i == ME else KEYS[i]) for i in IDS)
        for attempt in range(1, federation.params.attempts + 1):
            cohort = Cohort(number, attempt, members)
            least = min(least, *cpu_s(lambda: site.on_cohort(cohort), repeats=1))  # noqa: B023 - called at once
    return least


def uploads() -> list[Result]:
    words = np.ones(PARAMETERS, dtype="<u4")
    (add_s,) = cpu_s(lambda: words + words)
    return [
        Result("upload.a bare numpy add, 10⁶ parameters", add_s * 1e3, "ms"),
        Result("upload.10⁶ parameters, 10 peers", upload_s(PARAMETERS, 5) * 1e3, "ms", 15),
        Result("upload.25·10⁶ parameters, 10 peers", upload_s(LARGE, 1), "s", 0.5),
    ]


def ours() -> tuple[Callable[[], bytes], Callable[[], object], Callable[[], object]]:
    """One hospital's payload, its addition at the hub, and the removal of its self-mask there."""
    vectors = np.arange(PARAMETERS, dtype="<u4"), np.zeros(1, dtype="<u8")
    sums = np.zeros(PARAMETERS + 1, dtype="<u4"), np.zeros(2, dtype="<u8")

    def mask() -> bytes:
        return mask_payload(*vectors, pair_keys=KEYS, ids=IDS, me=ME, b=KEYS[ME], ctx=CTX)

    payload = np.frombuffer(mask(), dtype="<u4")[: PARAMETERS + 1]
    return (
        mask,
        lambda: np.add(sums[0], payload, out=sums[0]),
        lambda: remove_self_masks(*sums, [KEYS[ME]], CTX),
    )


def beside_flower() -> list[Result]:
    """SecAgg+ of Flower: the masks of one hospital alone, and all from the keys it holds to the masked bytes."""
    try:
        from flwr.common import ndarray_to_bytes
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
        from flwr.supercore.primitives import asymmetric
    except ImportError:
        print("secagg: this flwr has no primitives of secure aggregation to compare with")
        return []
    modulus, quantised = 1 << 32, [np.arange(PARAMETERS, dtype=np.int64)]
    private = asymmetric.private_key_to_bytes(asymmetric.generate_key_pairs()[0])
    public = asymmetric.public_key_to_bytes(asymmetric.generate_key_pairs()[1])

    def masks() -> list[NDArray[np.int64]]:
        vector = quantised
        for key in KEYS.values():
            vector = parameters_addition(vector, pseudo_rand_gen(key, modulus, [(PARAMETERS,)]))
        return parameters_mod(vector, modulus)

    def upload() -> bytes:
        for _ in range(PEERS):
            generate_shared_key(
                asymmetric.bytes_to_private_key(private), asymmetric.bytes_to_public_key(public)
            )
        return ndarray_to_bytes(masks()[0])

    words, keys = np.zeros(PARAMETERS, dtype="<u4"), list(KEYS.values())
    our_upload, _, _ = ours()
    ours_s, theirs_s, our_upload_s, their_upload_s = cpu_s(
        lambda: apply_keystreams(words, keys[:ME], keys[ME:]), masks, our_upload, upload
    )
    return [
        Result("flower.its 11 masks, added", theirs_s * 1e3, "ms"),
        Result("flower.our 11 masks, added", ours_s * 1e3, "ms"),
        Result("flower.its masks / ours", theirs_s / ours_s, "x"),
        Result("flower.its upload", their_upload_s * 1e3, "ms"),
        Result("flower.our upload", our_upload_s * 1e3, "ms"),
        Result("flower.its upload / ours", their_upload_s / our_upload_s, "x", at_least=5),
        Result("flower.its bytes / ours", len(upload()) / len(our_upload()), "x"),
    ]


def beside_ckks() -> list[Result]:
    """For one hospital: encrypt, add it at the hub, decrypt the sum; beside ours with 10 peers.

    8192 coefficients and a modulus of 60 + 40 + 60 bits: at most 218 would still be 128-bit secure
    (homomorphicencryption.org standard, ternary secret); 2^40 as scale leaves an error near 1e-7.
    """
    try:
        import tenseal
    except ImportError:
        print("secagg: no TenSEAL to compare with; the extra 'bench' brings it")
        return []
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1
    )
    context.global_scale = 2.0**40
    values = np.random.Generator(np.random.PCG64(5)).uniform(-1, 1, PARAMETERS)
    slots = [values[at : at + 4096] for at in range(0, PARAMETERS, 4096)]

    def encrypt() -> list[Any]:
        return [tenseal.ckks_vector(context, part) for part in slots]

    encrypted, total = encrypt(), encrypt()

    def add() -> None:
        for at, part in enumerate(encrypted):
            total[at] += part

    def decrypt() -> NDArray[np.float64]:
        return np.concatenate([part.decrypt() for part in total])

    for _ in range(PEERS - 1):
        add()
    if np.abs(decrypt() - PEERS * values).max() > 1e-5:
        raise RuntimeError("the CKKS sum is wrong")
    theirs_s, ours_s = sum(cpu_s(encrypt, add, decrypt, repeats=3)), sum(cpu_s(*ours()))
    sent = sum(len(part.serialize()) for part in encrypted)
    return [
        Result("ckks.encrypt, add and decrypt", theirs_s * 1e3, "ms"),
        Result("ckks.our mask, add and unmask", ours_s * 1e3, "ms"),
        Result("ckks.its time / ours", theirs_s / ours_s, "x", at_least=50),
        Result("ckks.its bytes / ours", sent / len(ours()[0]()), "x"),
    ]


def run() -> Sequence[Result]:
    with one_core():
        return [*expand_and_add(), *uploads(), *beside_flower(), *beside_ckks()]
