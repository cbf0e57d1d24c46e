"""Merkle tree over ledger leaves: roots, an incremental frontier, inclusion and consistency proofs.

Source: RFC 6962 section 2.1 (hashing, proofs), RFC 9162 sections 2.1.3.2 and 2.1.4.2 (verification).
Rules: SHA-256; a leaf is hashed behind 0x00 and a node behind 0x01, so neither can stand for the other;
the tree of n leaves splits at the largest power of two below n; verifiers trust nothing but the roots
they were given and use every element of a proof.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.errors import UsageError, VerificationError

HASH_SIZE_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """Hash of a leaf's bytes, 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node over its two children, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """A tree of ``size`` leaves, kept as the roots of its perfect subtrees, largest first.

    Appending costs O(log n) hashes and no leaf; ``peaks`` has one hash for each 1 bit of ``size``.

    Guarantee: the_frontier_is_the_tree - after any appends, root() equals root() of all leaf hashes.
    Raises: UsageError on construction when peaks and size do not belong together.
    """

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.peaks) != self.size.bit_count():
            raise UsageError("ledger.frontier", "a frontier has one peak for each 1 bit of its size")

    def append(self, hashed_leaf: bytes) -> "Frontier":
        """The tree with one more leaf, given by its leaf hash (32 bytes)."""
        _check_hash(hashed_leaf, "leaf hash")
        peaks, node, size = list(self.peaks), hashed_leaf, self.size
        while size & 1:
            node = node_hash(peaks.pop(), node)
            size >>= 1
        return Frontier(self.size + 1, (*peaks, node))

    def root(self) -> bytes:
        """Root of the tree, 32 bytes; SHA-256 of nothing when it is empty."""
        if not self.peaks:
            return EMPTY_ROOT
        node = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            node = node_hash(peak, node)
        return node


class Tree(Sequence[bytes]):
    """The leaf hashes of a growing tree, with the roots of its perfect subtrees: proofs cost O(log^2 n).

    Guarantee: kept_subtrees_change_no_root - nor any proof, however the tree has grown.
    """

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = [[]]
        self._size = 0

    def append(self, hashed_leaf: bytes) -> None:
        """One more leaf, given by its leaf hash (32 bytes)."""
        _check_hash(hashed_leaf, "leaf hash")
        self._levels[0].append(hashed_leaf)
        self._size += 1
        for level, nodes in enumerate(self._levels):
            if len(nodes) % 2:
                return
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(node_hash(*nodes[-2:]))

    def frozen(self) -> "Tree":
        """The tree of the leaves so far, whatever is appended to this one."""
        copy = Tree()
        copy._levels, copy._size = self._levels, self._size
        return copy

    def subtree(self, start: int, end: int) -> bytes:
        """Root over the leaves ``start`` to ``end`` - 1, where RFC 6962 splits the tree."""
        level = (end - start - 1).bit_length()
        if end - start == 1 << level:
            return self._levels[level][start >> level]
        middle = start + (1 << level - 1)
        return node_hash(self.subtree(start, middle), self.subtree(middle, end))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        leaves = self._levels[0]
        return leaves[: self._size][index] if isinstance(index, slice) else leaves[range(self._size)[index]]


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Root over the leaf hashes in order, 32 bytes."""
    if isinstance(leaf_hashes, Tree) and leaf_hashes:
        return leaf_hashes.subtree(0, len(leaf_hashes))
    frontier = Frontier()
    for hashed_leaf in leaf_hashes:
        frontier = frontier.append(hashed_leaf)
    return frontier.root()


def inclusion_proof(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Audit path of leaf ``index`` (0 to n-1) in the tree of all n leaf hashes, nearest sibling first.

    Raises: UsageError when there is no such leaf.
    """
    if not 0 <= index < len(leaf_hashes):
        raise UsageError("ledger.proof-index", f"the tree of {len(leaf_hashes)} leaves has no leaf {index}")
    proof, _, _ = _descend(leaf_hashes, index, lambda start, end: end - start == 1)
    return tuple(reversed(proof))


def verify_inclusion(
    hashed_leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes
) -> None:
    """Check that the leaf is number ``index`` in the tree of ``size`` leaves with that root (RFC 9162).

    Guarantee: false_inclusion_is_refused - another leaf, index, size, path or root does not verify.
    Raises: VerificationError.
    """
    if not 0 <= index < size:
        raise VerificationError("ledger.inclusion", f"a tree of {size} leaves has no leaf {index}")
    for element in (hashed_leaf, expected_root, *proof):
        _check_hash(element, "hash in an inclusion proof")
    node = hashed_leaf
    for sibling, is_left in _path(index, size - 1, proof, "inclusion"):
        node = node_hash(sibling, node) if is_left else node_hash(node, sibling)
    if node != expected_root:
        raise VerificationError("ledger.inclusion", f"leaf {index} is not proven to be in the tree")


def consistency_proof(leaf_hashes: Sequence[bytes], old_size: int) -> tuple[bytes, ...]:
    """Proof that the tree of the first ``old_size`` leaf hashes is a prefix of the tree of all of them.

    Empty when the sizes are equal or the old tree was empty.

    Raises: UsageError when the old tree was larger.
    """
    if not 0 <= old_size <= len(leaf_hashes):
        raise UsageError("ledger.proof-size", f"a tree of {len(leaf_hashes)} leaves never had {old_size}")
    if old_size in (0, len(leaf_hashes)):
        return ()
    proof, start, end = _descend(leaf_hashes, old_size - 1, lambda _, end: end == old_size)
    # The verifier knows the old root: it is left out when the old tree is one whole subtree.
    if start:
        proof.append(_subtree(leaf_hashes, start, end))
    return tuple(reversed(proof))


def verify_consistency(
    old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree of ``new_size`` leaves only appended to the tree of ``old_size`` (RFC 9162).

    Guarantee: rewritten_history_is_refused - a changed, dropped or reordered old leaf does not verify.
    Raises: VerificationError.
    """
    if not 0 <= old_size <= new_size:
        problem = f"a tree cannot shrink from {old_size} to {new_size} leaves"
        raise VerificationError("ledger.consistency", problem)
    for element in (old_root, new_root, *proof):
        _check_hash(element, "hash in a consistency proof")
    if old_size in (0, new_size):
        expected = new_root if old_size else EMPTY_ROOT
        if proof or old_root != expected:
            raise VerificationError("ledger.consistency", "two roots of trees of one size differ")
        return
    path = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    if not path:
        raise VerificationError("ledger.consistency", "the consistency proof is empty")
    position, last = old_size - 1, new_size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old_node = new_node = path[0]
    for sibling, is_left in _path(position, last, path[1:], "consistency"):
        if is_left:
            old_node = node_hash(sibling, old_node)
        new_node = node_hash(sibling, new_node) if is_left else node_hash(new_node, sibling)
    if old_node != old_root or new_node != new_root:
        raise VerificationError("ledger.consistency", "the newer tree does not extend the older one")


def _path(position: int, last: int, proof: Sequence[bytes], kind: str) -> Iterator[tuple[bytes, bool]]:
    """Each sibling on the way from a node to the root, and whether it stands on the left.

    ``position`` is the node's and ``last`` the last node's at its height. All of ``proof`` must be used.
    """
    for sibling in proof:
        if last == 0:
            raise VerificationError(f"ledger.{kind}", f"the {kind} proof is too long")
        is_left = position & 1 == 1 or position == last
        yield sibling, is_left
        # A right edge that is not a right child has no sibling at this height: climb to where it has.
        while is_left and not position & 1 and position:
            position, last = position >> 1, last >> 1
        position, last = position >> 1, last >> 1
    if last != 0:
        raise VerificationError(f"ledger.{kind}", f"the {kind} proof is too short")


def _descend(
    leaf_hashes: Sequence[bytes], index: int, arrived: Callable[[int, int], bool]
) -> tuple[list[bytes], int, int]:
    """The roots beside the way down to leaf ``index``, outermost first, and the subtree where it ends."""
    siblings: list[bytes] = []
    start, end = 0, len(leaf_hashes)
    while not arrived(start, end):
        middle = start + (1 << ((end - start - 1).bit_length() - 1))
        if index < middle:
            siblings.append(_subtree(leaf_hashes, middle, end))
            end = middle
        else:
            siblings.append(_subtree(leaf_hashes, start, middle))
            start = middle
    return siblings, start, end


def _subtree(leaf_hashes: Sequence[bytes], start: int, end: int) -> bytes:
    return leaf_hashes.subtree(start, end) if isinstance(leaf_hashes, Tree) else root(leaf_hashes[start:end])


def _check_hash(value: bytes, what: str) -> None:
    if len(value) != HASH_SIZE_BYTES:
        raise VerificationError("ledger.hash-size", f"the {what} must have {HASH_SIZE_BYTES} bytes")
