"""The tree against published vectors, against the RFC's own recursive definitions, and against forgers."""

import hashlib
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UsageError, VerificationError
from common.ledger import tree

# The reference leaves and roots of RFC 6962 implementations (google/certificate-transparency's tests).
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
H01 = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
H1 = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
H23 = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
H03 = "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"
H4 = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
H45 = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
H67 = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
H47 = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
H0 = ROOTS[1]
INCLUSION = [
    (0, 1, []),
    (0, 8, [H1, H23, H47]),
    (5, 8, [H4, H67, H03]),
    (2, 3, [H01]),
    (1, 5, [H0, H23, H4]),
]
CONSISTENCY = [
    (1, 1, []),
    (1, 8, [H1, H23, H47]),
    (6, 8, [H45, H67, H03]),
    (2, 5, [H23, H4]),
]

MANY = [tree.leaf_hash(i.to_bytes(2, "big")) for i in range(64)]
LARGEST = 64


def _hex(proof: tuple[bytes, ...]) -> list[str]:
    return [element.hex() for element in proof]


# --- naive oracle: RFC 6962 section 2.1, word for word, over MANY[start:end] ---


def _k(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


@cache
def mth(start: int, end: int) -> bytes:
    if end == start:
        return hashlib.sha256().digest()
    if end - start == 1:
        return MANY[start]
    k = _k(end - start)
    return hashlib.sha256(b"\x01" + mth(start, start + k) + mth(start + k, end)).digest()


def path(m: int, start: int, end: int) -> list[bytes]:
    if end - start == 1:
        return []
    k = _k(end - start)
    if m < k:
        return [*path(m, start, start + k), mth(start + k, end)]
    return [*path(m - k, start + k, end), mth(start, start + k)]


def subproof(m: int, start: int, end: int, whole: bool) -> list[bytes]:
    n = end - start
    if m == n:
        return [] if whole else [mth(start, end)]
    k = _k(n)
    if m <= k:
        return [*subproof(m, start, start + k, whole), mth(start + k, end)]
    return [*subproof(m - k, start + k, end, False), mth(start, start + k)]


# --- vectors ---


@pytest.mark.parametrize("size", range(9))
def test_published_roots(size: int) -> None:
    assert tree.root([tree.leaf_hash(leaf) for leaf in LEAVES[:size]]).hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size", "proof"), INCLUSION)
def test_published_inclusion_proofs(index: int, size: int, proof: list[str]) -> None:
    hashes = [tree.leaf_hash(leaf) for leaf in LEAVES[:size]]
    assert _hex(tree.inclusion_proof(hashes, index)) == proof
    tree.verify_inclusion(
        hashes[index], index, size, [bytes.fromhex(h) for h in proof], bytes.fromhex(ROOTS[size])
    )


@pytest.mark.parametrize(("old", "new", "proof"), CONSISTENCY)
def test_published_consistency_proofs(old: int, new: int, proof: list[str]) -> None:
    hashes = [tree.leaf_hash(leaf) for leaf in LEAVES[:new]]
    assert _hex(tree.consistency_proof(hashes, old)) == proof
    tree.verify_consistency(
        old,
        new,
        bytes.fromhex(ROOTS[old]),
        bytes.fromhex(ROOTS[new]),
        [bytes.fromhex(h) for h in proof],
    )


# --- exhaustive ---


def test_the_frontier_is_the_tree() -> None:
    frontier = tree.Frontier()
    for size in range(LARGEST + 1):
        assert frontier.size == size
        assert frontier.root() == mth(0, size) == tree.root(MANY[:size])
        if size < LARGEST:
            frontier = frontier.append(MANY[size])


def test_every_inclusion_proof_up_to_64_leaves() -> None:
    for size in range(1, LARGEST + 1):
        for index in range(size):
            proof = tree.inclusion_proof(MANY[:size], index)
            assert list(proof) == path(index, 0, size)
            tree.verify_inclusion(MANY[index], index, size, proof, mth(0, size))


def test_every_consistency_proof_up_to_64_leaves() -> None:
    for new in range(LARGEST + 1):
        for old in range(new + 1):
            proof = tree.consistency_proof(MANY[:new], old)
            assert list(proof) == (subproof(old, 0, new, True) if old else [])
            tree.verify_consistency(old, new, mth(0, old), mth(0, new), proof)


def _spoiled(proof: tuple[bytes, ...]) -> list[list[bytes]]:
    """Every proof one element shorter, longer, changed or with two neighbours swapped."""
    spoiled = [[*proof, bytes(32)], [bytes(32), *proof]]
    for i in range(len(proof)):
        changed = bytes([proof[i][0] ^ 0x80]) + proof[i][1:]
        spoiled.append([*proof[:i], *proof[i + 1 :]])
        spoiled.append([*proof[:i], changed, *proof[i + 1 :]])
        spoiled.append([*proof[:i], proof[i], *proof[i:]])
        if i:
            spoiled.append([*proof[: i - 1], proof[i], proof[i - 1], *proof[i + 1 :]])
    return spoiled


def test_false_inclusion_is_refused() -> None:
    for size in range(1, 18):
        for index in range(size):
            proof = tree.inclusion_proof(MANY[:size], index)
            for other in range(-1, size + 2):
                if other != index:
                    with pytest.raises(VerificationError):
                        tree.verify_inclusion(MANY[index], other, size, proof, mth(0, size))
            for leaf in (MANY[size], mth(0, size) if size > 1 else MANY[1]):
                with pytest.raises(VerificationError):
                    tree.verify_inclusion(leaf, index, size, proof, mth(0, size))
            with pytest.raises(VerificationError):
                tree.verify_inclusion(MANY[index], index, size, proof, mth(0, size + 1))
            for spoiled in _spoiled(proof):
                with pytest.raises(VerificationError):
                    tree.verify_inclusion(MANY[index], index, size, spoiled, mth(0, size))


def test_rewritten_history_is_refused() -> None:
    for new in range(1, 18):
        for old in range(new + 1):
            proof = tree.consistency_proof(MANY[:new], old)
            for spoiled in _spoiled(proof):
                with pytest.raises(VerificationError):
                    tree.verify_consistency(old, new, mth(0, old), mth(0, new), spoiled)
            with pytest.raises(VerificationError):
                tree.verify_consistency(old, new, mth(1, old + 2), mth(0, new), proof)
            if old:
                with pytest.raises(VerificationError):
                    tree.verify_consistency(old, new, mth(0, old), mth(1, new + 1), proof)
            if old < new:
                with pytest.raises(VerificationError):
                    tree.verify_consistency(new, old, mth(0, new), mth(0, old), proof)


def test_no_proof_extends_a_rewritten_log() -> None:
    """For each changed old leaf, the honest proof of the changed log does not fit the old root."""
    for new in range(2, 12):
        for old in range(1, new):
            for place in range(old):
                changed = [*MANY[:new]]
                changed[place] = MANY[-1]
                proof = tree.consistency_proof(changed, old)
                with pytest.raises(VerificationError):
                    tree.verify_consistency(old, new, mth(0, old), tree.root(changed), proof)


def test_consistency_with_an_empty_old_tree() -> None:
    tree.verify_consistency(0, 5, tree.EMPTY_ROOT, mth(0, 5), [])
    tree.verify_consistency(0, 0, tree.EMPTY_ROOT, tree.EMPTY_ROOT, [])
    with pytest.raises(VerificationError):
        tree.verify_consistency(0, 5, mth(0, 1), mth(0, 5), [])
    with pytest.raises(VerificationError):
        tree.verify_consistency(0, 5, tree.EMPTY_ROOT, mth(0, 5), [bytes(32)])
    with pytest.raises(VerificationError):
        tree.verify_consistency(3, 5, mth(0, 3), mth(0, 5), [])
    with pytest.raises(VerificationError):
        tree.verify_consistency(4, 5, mth(0, 4), mth(0, 5), [])


def test_a_leaf_is_never_a_node() -> None:
    left, right = tree.leaf_hash(b"a"), tree.leaf_hash(b"b")
    assert tree.leaf_hash(left + right) != tree.node_hash(left, right)
    assert tree.leaf_hash(b"\x01" + left + right) != tree.node_hash(left, right)


def test_sizes_are_checked() -> None:
    with pytest.raises(VerificationError, match="32 bytes"):
        tree.Frontier().append(b"short")
    for size, peaks in ((1, ()), (0, (bytes(32),)), (3, (bytes(32),)), (-1, (bytes(32),))):
        with pytest.raises(UsageError):
            tree.Frontier(size, peaks)
    for index in (-1, 3):
        with pytest.raises(UsageError):
            tree.inclusion_proof(MANY[:3], index)
    for old in (-1, 4):
        with pytest.raises(UsageError):
            tree.consistency_proof(MANY[:3], old)
    with pytest.raises(VerificationError, match="32 bytes"):
        tree.verify_inclusion(MANY[0], 0, 2, [MANY[1][:31]], mth(0, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(65, 400), st.randoms(use_true_random=False))
def test_larger_trees(size: int, chance: random.Random) -> None:
    hashes = [tree.leaf_hash(i.to_bytes(4, "big")) for i in range(size)]
    root = tree.root(hashes)
    index, old = chance.randrange(size), chance.randrange(1, size)
    tree.verify_inclusion(hashes[index], index, size, tree.inclusion_proof(hashes, index), root)
    proof = tree.consistency_proof(hashes, old)
    tree.verify_consistency(old, size, tree.root(hashes[:old]), root, proof)
    with pytest.raises(VerificationError):
        tree.verify_consistency(old, size, tree.root(hashes[1 : old + 1]), root, proof)


def test_kept_subtrees_change_no_root() -> None:
    grown = tree.Tree()
    frozen = []
    for size in range(1, LARGEST + 1):
        grown.append(MANY[size - 1])
        frozen.append(grown.frozen())
    for size, kept in enumerate(frozen, start=1):
        listed = MANY[:size]
        assert list(kept) == listed
        assert kept[0:3] == listed[0:3]
        assert tree.root(kept) == tree.root(listed)
        for other in range(size):
            assert tree.inclusion_proof(kept, other) == tree.inclusion_proof(listed, other)
        for other in range(size + 1):
            assert tree.consistency_proof(kept, other) == tree.consistency_proof(listed, other)
    assert tree.root(tree.Tree()) == tree.EMPTY_ROOT
    with pytest.raises(VerificationError, match="32 bytes"):
        grown.append(b"short")
