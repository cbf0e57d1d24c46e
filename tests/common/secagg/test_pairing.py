"""Sealed seeds: only for the keys, the manifest, the directory and the pair they were made for."""

import copy
import pickle

import pytest
from cryptography.hazmat.primitives import hpke

from common.encoding import u16
from common.errors import VerificationError
from common.secagg import pairing
from tests.common.secagg.federation import Counter
from tests.common.secagg.reference import hash_of, unsealed

MAN, DIRH, SEED = bytes(32), b"\x01" * 32, b"\x07" * 32
KEYS = pairing.SetupKeys.new(Counter("a"))
INFO = pairing.pair_info(MAN, DIRH, 1, 2)


def test_a_sealed_seed_opens_once_sealed_and_never_looks_the_same() -> None:
    first, second = (pairing.seal_seed(SEED, *KEYS.public(), INFO) for _ in range(2))
    assert len(first) == 1168
    assert first != second
    assert pairing.unseal_seed(first, KEYS, INFO) == pairing.unseal_seed(second, KEYS, INFO) == SEED


def test_a_sealed_seed_is_the_one_of_the_reference() -> None:
    ct = pairing.seal_seed(SEED, *KEYS.public(), INFO)
    assert unsealed(ct, KEYS.mlkem_seed, KEYS.x25519_key, INFO) == SEED


def test_another_key_info_or_byte_does_not_open() -> None:
    ct = pairing.seal_seed(SEED, *KEYS.public(), INFO)
    other = pairing.SetupKeys.new(Counter("b"))
    halves = [
        pairing.SetupKeys(KEYS.mlkem_seed, other.x25519_key),
        pairing.SetupKeys(other.mlkem_seed, KEYS.x25519_key),
    ]
    infos = [pairing.pair_info(*args) for args in ((DIRH, MAN, 1, 2), (MAN, DIRH, 1, 3), (MAN, DIRH, 2, 2))]
    broken = [ct[:at] + bytes([ct[at] ^ 1]) + ct[at + 1 :] for at in (0, 1087, 1088, 1119, 1120, 1151, 1167)]
    cases = [(ct, keys, INFO) for keys in (other, *halves)]
    cases += [(ct, KEYS, info) for info in infos]
    cases += [(changed, KEYS, INFO) for changed in [*broken, b"", ct[:-1], ct + b"\x00", bytes(1168)]]
    for changed, keys, info in cases:
        with pytest.raises(VerificationError, match="does not open"):
            pairing.unseal_seed(changed, keys, info)


def test_a_seed_of_another_length_is_not_accepted() -> None:
    public = hpke.MLKEM768X25519PublicKey(*(key.public_key() for key in KEYS.private()))
    for seed in (SEED + b"\x00", SEED[:-1]):
        with pytest.raises(VerificationError, match="HPKE format"):
            pairing.seal_seed(seed, *KEYS.public(), INFO)
        # A peer that seals by itself can seal anything.
        with pytest.raises(VerificationError, match="does not open"):
            pairing.unseal_seed(pairing._SUITE.encrypt(seed, public, info=INFO), KEYS, INFO)


def test_what_is_not_a_public_key_is_refused() -> None:
    mlkem, x25519 = KEYS.public()
    for bad in ((b"\xff" * 1184, x25519), (mlkem[:-1], x25519), (mlkem, bytes(32)), (mlkem, x25519[:-1])):
        with pytest.raises(VerificationError, match="not a public key"):
            pairing.seal_seed(SEED, *bad, INFO)


def test_exactly_one_of_a_pair_sends_and_all_share_the_work() -> None:
    for n in (3, 10, 101):
        sent = dict.fromkeys(range(1, n + 1), 0)
        for i in sent:
            for j in range(i + 1, n + 1):
                sender = pairing.sender_of(i, j)
                assert sender == (i if (j - i) % 2 == 1 else j)
                sent[sender] += 1
        assert max(sent.values()) - min(sent.values()) <= 1


def test_the_info_is_the_labelled_digest() -> None:
    assert pairing.pair_info(MAN, DIRH, 3, 9) == hash_of("pair", MAN, DIRH, u16(3), u16(9))


@pytest.mark.parametrize(
    "drawn", [b"", bytes(31), bytes(32), bytearray(b"x" * 32), b"x" * 31, b"x" * 33, None]
)
def test_broken_randomness_is_refused(drawn: bytes) -> None:
    with pytest.raises(VerificationError, match="randomness"):
        pairing.fresh(lambda size: drawn, 32)


def test_setup_keys_are_neither_printed_nor_pickled() -> None:
    assert KEYS.x25519_key.hex()[:8] not in repr(KEYS)
    assert repr(KEYS) == "SetupKeys()"
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(KEYS)
