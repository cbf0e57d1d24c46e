"""What must hold of a decoder for every input: one error base, one form, and what it accepts comes back the same."""

from collections.abc import Callable
from typing import Any

from common.errors import WardroundError

Run = Callable[[bytes], bool]
"""One execution: whether the input was accepted. Raises BrokenError, or whatever the decoder should not raise."""


class BrokenError(Exception):
    """An input for which something does not hold that must."""


def require(holds: bool, problem: str) -> None:
    """Raise BrokenError unless it holds."""
    if not holds:
        raise BrokenError(problem)


def exact(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Run:
    """A decoder that reads exactly the bytes which ``encode`` makes."""

    def run(data: bytes) -> bool:
        try:
            value = decode(data)
        except WardroundError:
            return False
        require(encode(value) == data, f"accepted, but {encode(value)!r} is its form")
        return True

    return run


def stable(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Run:
    """A decoder of a form in which one value has several texts: what is read, written and read is the same."""

    def run(data: bytes) -> bool:
        try:
            value = decode(data)
        except WardroundError:
            return False
        require(decode(encode(value)) == value, f"accepted {value!r}, but it does not come back")
        return True

    return run
