"""One named tensor of a study's state.

Source: PROTOCOL "Bytes". Rules: name, shape and dtype are in the layout's digest; where it starts is not,
for the state before round 1 has a digest of its own.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Tensor:
    """Native torch name, shape, and the dtype in which it is stored.

    It starts uniform in [-``half``, ``half``], or at ``constant`` where half is 0. ``counts``: it holds sums
    over patients and no weights, so that the bound on a model's norm says nothing about it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "float64"] = "float32"
    half: float = 0.0
    constant: float = 0.0
    counts: bool = False

    @property
    def size(self) -> int:
        """Number of elements, at least 1."""
        count = 1
        for axis in self.shape:
            count *= axis
        return count
