"""The kinds of field that documents of this project are made of: frozen, strict, printable.

Source: RFC 8259 and RFC 8785 (a float must read back as itself). Rules: no value of another JSON type, no
unknown field, no NaN or infinity; what a person approves looks like what it is.
"""

import re
from typing import Annotated, Final, NoReturn, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from common.errors import UsageError

STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
LARGEST: Final = 1e15
"""Bound of every float in a manifest: below 2^53, so that its RFC 8785 form reads back as itself."""

# Pydantic names the branch of a union between the field that holds it and what is below.
_BRANCH: Final = re.compile(r"(\b(?:features\.[0-9]+|privacy|model|server|label))\.(?:\w+)(?=\.|$)")


def broken(field: str, rule: str) -> PydanticCustomError:
    """A broken rule between fields, told at ``field`` (dotted, below the model that checks it)."""
    return PydanticCustomError("rule", "{rule}", {"field": field, "rule": rule})


def refuse(root: str, error: ValidationError) -> NoReturn:
    """Raise the first broken rule as a UsageError with code ``<root>.<path>``."""
    first = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx", {})
    path = _BRANCH.sub(r"\1", ".".join(map(str, first["loc"])))
    rule = first["msg"].removeprefix("Value error, ").removesuffix(" after validation")
    if first["type"] == "rule":
        path += f".{context['field']}"
    elif first["type"].startswith("union_tag"):
        path += f".{context['discriminator']}".replace("'", "")
        rule = (
            f"must be one of {context['expected_tags']}" if "expected_tags" in context else "field required"
        )
    path = path.strip(".") or root
    for wording in ("Input should", "Value should", "String should", "Tuple should"):
        rule = rule.replace(wording, "must")
    raise UsageError(
        f"{root}.{path}",
        f"{path}: {rule[:1].lower()}{rule[1:]}",
        remedy="Correct this field; unknown keys are errors.",
        path=path,
    ) from error


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
