"""Inputs that are kept: one file a target under tests/vectors/fuzz, one input a line in base64.

Rules: a line that begins with ``!`` is a regression, an input that once broke something, and is never
dropped; the others are the shortest of those that reached something new in the last campaign.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "vectors" / "fuzz"
REGRESSION = "!"
MAX_INPUTS = 40
MAX_TARGET_BYTES = 12_000


def _file(target: str) -> Path:
    return FOLDER / f"{target}.txt"


def _lines(target: str) -> list[str]:
    return _file(target).read_text(encoding="ascii").split() if _file(target).exists() else []


def read(target: str) -> list[bytes]:
    """All kept inputs of a target."""
    return [base64.b64decode(line.removeprefix(REGRESSION)) for line in _lines(target)]


def keep(target: str, inputs: Iterable[bytes]) -> int:
    """Keep the regressions, and of ``inputs`` as many of the shortest as fit. How many inputs there are now."""
    lines = [line for line in _lines(target) if line.startswith(REGRESSION)]
    known, left = {line.removeprefix(REGRESSION) for line in lines}, MAX_TARGET_BYTES
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        line = base64.b64encode(data).decode("ascii")
        if line in known or len(lines) >= MAX_INPUTS or len(line) > left:
            continue
        left -= len(line)
        lines.append(line)
    _write(target, lines)
    return len(lines)


def add_regression(target: str, data: bytes) -> None:
    """Keep an input that broke something."""
    line = REGRESSION + base64.b64encode(data).decode("ascii")
    _write(target, [line, *(known for known in _lines(target) if known not in (line, line[1:]))])


def _write(target: str, lines: list[str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    _file(target).write_text("".join(line + "\n" for line in lines), encoding="ascii")
