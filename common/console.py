"""What every command prints and how it ends: text for people, one JSON envelope for machines, exit codes.

Source: DESIGN "Three people, one program". Rules: with ``--json`` standard output holds the envelope (or
JSON lines) and nothing else; errors carry a stable code and a remedy; NO_COLOR is honoured by rich.
"""

import functools
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, ParamSpec

import typer

from common.errors import WardroundError

SCHEMA: Final = 1
INTERRUPTED: Final = 130
P = ParamSpec("P")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON envelope instead of text.")]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command gives back: ``text`` for people, ``data`` for machines, an exit code."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""
    exit_code: int = 0
    code: str = "ok"


def _finite(value: Any) -> Any:
    """JSON has no infinity: an epsilon without bound is the text "infinite"."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return "infinite" if isinstance(value, float) and value == math.inf else value


def envelope(status: str, code: str, data: Mapping[str, Any], hint: str) -> str:
    """The one-line JSON envelope of every command; an infinite number is the text "infinite"."""
    document = {"schema": SCHEMA, "status": status, "code": code, "data": _finite(data), "hint": hint}
    return json.dumps(document, sort_keys=True, allow_nan=False)


def command(function: Callable[P, Outcome | None]) -> Callable[P, None]:
    """Turn a function that returns an Outcome or raises WardroundError into a command.

    The function must take ``as_json``. None means that it has printed its own lines.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json", False))
        try:
            outcome = function(*args, **kwargs)
        except WardroundError as error:
            if as_json:
                print(envelope("error", error.code, dict(error.fields), error.remedy))  # noqa: T201
            print(f"error: {error.diagnostics()}  [{error.code}]", file=sys.stderr)  # noqa: T201
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)  # noqa: T201
            raise typer.Exit(INTERRUPTED) from None
        if outcome is None:
            return
        if as_json:
            status = "ok" if outcome.exit_code == 0 else "error"
            print(envelope(status, outcome.code, outcome.data, outcome.hint))  # noqa: T201
        else:
            print(outcome.text)  # noqa: T201
        if outcome.exit_code:
            raise typer.Exit(outcome.exit_code)

    return run


def log_to_stderr(verbose: bool = False) -> None:
    """One line an event on standard error. Records' values never reach a log call."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
