"""The key schedule against the slow reference, and the separation of its keys."""

import re
from pathlib import Path

import numpy as np

from common.encoding import u16
from common.secagg import keys
from tests.common.secagg.reference import hash_of, kdf

KEY, MAN, DIRH, CTX = (bytes([byte]) * 32 for byte in (1, 2, 3, 4))
CT = b"\x05" * 1168


def test_every_label_against_the_reference() -> None:
    pairbind = hash_of("pairbind", MAN, DIRH, b"\x02\x00", b"\x07\x00", CT)
    assert keys.pair_key(KEY, MAN, DIRH, 2, 7, CT) == kdf(KEY, "pair", pairbind)
    assert keys.confirm_tag(KEY, DIRH, 7, 2) == kdf(KEY, "confirm", DIRH, b"\x07\x00", b"\x02\x00")
    assert keys.ratchet(KEY, 0) == KEY
    assert keys.ratchet(KEY, 2) == kdf(kdf(KEY, "ratchet"), "ratchet")
    assert keys.mask_key(KEY, "params", CTX) == kdf(KEY, "mask", b"params", CTX)
    assert keys.mask_key(KEY, "scalars", CTX) == kdf(KEY, "mask", b"scalars", CTX)
    assert keys.ready_tag(KEY, MAN, 70000, 258, CTX) == kdf(
        KEY, "ready", MAN, b"\x70\x11\x01\x00", b"\x02\x01", CTX
    )
    assert keys.self_seed(KEY, CTX) == kdf(KEY, "self", CTX)
    assert keys.noise_key(KEY, CTX, "params", 3) == kdf(KEY, "noise", CTX, b"params", b"\x03\x00\x00\x00")
    assert keys.self_mask_key(KEY, "scalars", CTX) == kdf(KEY, "selfmask", b"scalars", CTX)
    assert keys.commitment(KEY, CTX, 513) == kdf(KEY, "commit", CTX, b"\x01\x02")


def test_known_answers_of_the_key_schedule() -> None:
    """Frozen: a change of a label, a width or an order of parts changes these."""
    found = [
        keys.pair_key(KEY, MAN, DIRH, 2, 7, CT),
        keys.confirm_tag(KEY, DIRH, 7, 2),
        keys.ratchet(KEY, 1),
        keys.mask_key(KEY, "params", CTX),
        keys.ready_tag(KEY, MAN, 1, 2, CTX),
        keys.self_seed(KEY, CTX),
        keys.noise_key(KEY, CTX, "params", 0),
        keys.self_mask_key(KEY, "params", CTX),
        keys.commitment(KEY, CTX, 2),
    ]
    frozen = Path(__file__).parents[2] / "vectors" / "secagg" / "keys.txt"
    assert [key.hex() for key in found] == frozen.read_text().split()


def test_the_list_of_labels_is_closed() -> None:
    source = Path(keys.__file__).read_text()
    labels = set(re.findall(r'derive\([a-z]+, "([a-z]+)"', source))
    assert labels == {"pair", "confirm", "ratchet", "mask", "ready", "self", "noise", "selfmask", "commit"}
    assert source.count("return derive(") + source.count("key = derive(") == len(labels)
    for module in Path(keys.__file__).parent.glob("*.py"):
        if module.name != "keys.py":
            assert "import derive" not in module.read_text()
            assert ", derive" not in module.read_text()


def test_all_keys_of_a_run_are_distinct() -> None:
    found = []
    for number in range(1, 4):
        key = keys.ratchet(KEY, number)
        found.append(key)
        for attempt in range(3):
            ctx = hash_of("ctx", u16(number), u16(attempt))
            b = keys.self_seed(hash_of("s", u16(number)), ctx)
            found.append(b)
            for vector in keys.VECTORS:
                found += [keys.mask_key(key, vector, ctx), keys.self_mask_key(b, vector, ctx)]
                found += [keys.noise_key(hash_of("s", u16(number)), ctx, vector, block) for block in range(3)]
    assert len(set(found)) == len(found)


def test_vectors_digest_is_the_labelled_digest_of_both_parts() -> None:
    params, scalars = np.arange(5, dtype="<u4"), np.arange(2, dtype="<u8")
    expected = hash_of("q", params.tobytes(), scalars.tobytes())
    assert keys.vectors_digest("q", params, scalars) == expected
    empty = np.zeros(0, dtype="<u8")
    assert keys.vectors_digest("q", params[::2], empty) == hash_of("q", params[::2].tobytes(), b"")
