"""The kinds of field that documents of this project are made of: frozen, strict, printable.

Source: RFC 8259 and RFC 8785 (a float must read back as itself). Rules: no value of another JSON type, no
unknown field, no NaN or infinity; what a person approves looks like what it is.
"""

from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
LARGEST: Final = 1e15
"""Bound of every float in a manifest: below 2^53, so that its RFC 8785 form reads back as itself."""


def broken(field: str, rule: str) -> PydanticCustomError:
    """A broken rule between fields, told at ``field`` (dotted, below the model that checks it)."""
    return PydanticCustomError("rule", "{rule}", {"field": field, "rule": rule})


def _as_tuple(value: object) -> object:
    # TOML and JSON know lists only; strict validation wants the tuple that a frozen model holds.
    return tuple(value) if isinstance(value, list) else value


def _printable(value: str) -> str:
    # What a person approves must look like what it is: no control or direction characters, no stray blanks.
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be printable text on one line without blanks around it")
    return value


def _different(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must differ from each other")
    return values


LISTED: Final = BeforeValidator(_as_tuple)
DIFFERENT: Final = AfterValidator(_different)
PRINTABLE: Final = AfterValidator(_printable)
Column: TypeAlias = Annotated[str, Field(min_length=1, max_length=128), PRINTABLE]
Code: TypeAlias = Annotated[str, Field(min_length=1, max_length=64), PRINTABLE]
Line: TypeAlias = Annotated[str, Field(max_length=2000), PRINTABLE]
Finite: TypeAlias = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class Strict(BaseModel):
    """A frozen document: unknown fields, values of another JSON type, NaN and infinity are refused."""

    model_config = STRICT
