"""The error base: one exit code a kind, text for people, fields for machines."""

import pytest

from common import errors
from common.errors import WardroundError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, WardroundError) and kind is not WardroundError
]


def test_exit_codes_are_those_of_the_command_line() -> None:
    assert {kind.__name__: kind.exit_code for kind in KINDS} == {
        "FailureError": 1,
        "UsageError": 2,
        "RefusedError": 3,
        "BudgetExhaustedError": 4,
        "VerificationError": 5,
        "UnreachableError": 6,
        "ContractError": 7,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_what_and_what_to_do(kind: type[WardroundError]) -> None:
    error = kind("a.code", "the thing broke its rule", remedy="mend it", limit=3)
    assert str(error) == "the thing broke its rule [a.code]"
    assert error.diagnostics() == "the thing broke its rule\n  remedy: mend it"
    assert error.fields == {"limit": 3}
    assert (error.code, error.problem, error.remedy) == ("a.code", "the thing broke its rule", "mend it")
    assert kind("a.code", "broken").diagnostics() == "broken"


def test_one_handler_catches_all() -> None:
    for kind in KINDS:
        with pytest.raises(WardroundError):
            raise kind("a.b", "c")
