"""A hospital's share of the noise: what is drawn from which key, and what a sum of shares is."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from scipy import stats

from common.errors import RefusedError
from common.privacy.noise import discrete_gaussian
from common.secagg import noise
from common.secagg.codec import from_words
from common.secagg.noise import keystream, with_noise
from common.secagg.records import Cohort
from common.secagg.state import RunState
from tests.common.secagg.federation import Federation
from tests.common.secagg.reference import kdf
from tests.noise import FALSE_ALARM, chi_squared

S, CTX = bytes(range(32)), hashlib.sha256(b"ctx").digest()


def naive(size: int, variance: int, s: bytes, ctx: bytes) -> list[int]:
    """The noise by the page: one key for each 2^18 coordinates, its keystream read in order."""
    drawn: list[int] = []
    for block in range(-(-size // 2**18)):
        key = kdf(s, "noise", ctx, b"params", block.to_bytes(4, "little"))
        stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
        count = min(2**18, size - block * 2**18)
        drawn += discrete_gaussian(variance, count, lambda n, at=stream: at.update(bytes(n))).tolist()
    return drawn


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("size", [1, 7, 2**18, 2**18 + 3])
def test_noise_is_added_on_every_coordinate(size: int, bits: int) -> None:
    rng = np.random.Generator(np.random.PCG64([size, bits]))
    words = rng.integers(0, 2**bits, size, dtype=f"u{bits // 8}")
    before = words.copy()
    noisy = with_noise(words, 900, S, CTX, discrete_gaussian)
    assert (words == before).all()
    assert noisy.dtype == words.dtype
    expected = [
        (int(word) + drawn) % 2**bits for word, drawn in zip(before, naive(size, 900, S, CTX), strict=True)
    ]
    assert noisy.tolist() == expected


def test_equal_contexts_give_equal_noise() -> None:
    words = np.zeros(4096, dtype="<u4")
    again = [from_words(with_noise(words, 900, S, CTX, discrete_gaussian)) for _ in range(2)]
    assert (again[0] == again[1]).all()
    others = [
        from_words(with_noise(words, 900, s, ctx, discrete_gaussian))
        for s, ctx in ((S, hashlib.sha256(b"2").digest()), (bytes(32), CTX))
    ]
    for one, other in itertools.combinations([again[0], *others], 2):
        assert (one != other).any()
        assert stats.pearsonr(one, other).pvalue > FALSE_ALARM


def test_a_keystream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise.LARGEST_KEYSTREAM_BYTES == 16 * 2**24
    monkeypatch.setattr(noise, "LARGEST_KEYSTREAM_BYTES", 64)
    read = keystream(S)
    whole = Cipher(AES(S), CTR(bytes(16))).encryptor().update(bytes(64))
    assert read(40) + read(24) == whole
    with pytest.raises(RefusedError, match="noise key"):
        read(1)


VARIANCES = (2000, 1500)


def noisy_federation() -> Federation:
    federation = Federation(4, "noise", parameters=20_000, scalars=0, noise=VARIANCES)
    federation.pair()
    return federation


def test_z_is_that_of_opened_sums_and_of_single_shares() -> None:
    federation = noisy_federation()
    hub = federation.round()
    federation.ready(hub)
    federation.upload(hub, hub.cohort())
    federation.open(hub)
    plain = np.array(federation.expected(federation.ids)[0])
    opened = hub.finish().parameters.astype(np.int64) - plain
    assert chi_squared(opened, 4 * VARIANCES[1]) > FALSE_ALARM
    assert chi_squared(opened, 3 * VARIANCES[1]) < FALSE_ALARM
    for i in federation.ids:
        assert federation.disks[i].state.s == b""
        share = naive_share(federation, i, hub.accumulator.ctx)
        assert chi_squared(share, VARIANCES[1]) > FALSE_ALARM
        opened = opened - share
    assert not opened.any()


def naive_share(federation: Federation, i: int, ctx: bytes) -> np.ndarray:
    """A hospital's share from the round seed that its disk held before the opening."""
    seeds = {noise_state.s for noise_state in states(federation, i) if noise_state.s}
    assert len(seeds) == 1
    return np.array(naive(federation.params.parameters, VARIANCES[1], seeds.pop(), ctx))


def states(federation: Federation, i: int) -> list[RunState]:
    return [RunState.from_bytes(version) for version in federation.disks[i].versions]


def test_each_attempt_has_noise_of_its_own_and_of_its_cohort() -> None:
    federation = noisy_federation()
    hub = federation.round()
    readies = federation.ready(hub)
    uploads = {}
    for attempt, ids in enumerate([federation.ids, federation.ids, (1, 2, 3)], start=1):
        cohort = Cohort(1, attempt, tuple((i, readies[i].nu) for i in ids))
        federation.sites[1].on_cohort(cohort)
        state = federation.disks[1].state
        share = np.array(naive(20_000, VARIANCES[len(ids) - 3], state.s, state.header.ctx))
        uploads[attempt] = share
    assert chi_squared(uploads[3], VARIANCES[0]) > FALSE_ALARM
    assert chi_squared(uploads[3], VARIANCES[1]) < FALSE_ALARM
    for one, other in itertools.combinations(uploads.values(), 2):
        assert stats.pearsonr(one, other).pvalue > FALSE_ALARM


def test_without_shared_noise_sums_are_exact() -> None:
    federation = noisy_federation()
    plain = Federation(4, "noise", parameters=20_000, scalars=0)
    plain.pair()
    noisy, exact = federation.whole_round().parameters, plain.whole_round().parameters
    assert exact.tolist() == plain.expected(plain.ids)[0]
    assert (noisy != exact).mean() > 0.9
    assert dataclasses.replace(federation.params, noise=()) == plain.params
