"""One error base for the whole program, with the exit codes that the command line documents.

Rules: every error names the thing, the rule it broke and the remedy; an error never carries a value
taken from a patient record. ``diagnostics()`` is for people, ``fields`` for machines.
"""

from typing import ClassVar


class WardroundError(Exception):
    """Base of every error that wardround raises on purpose.

    ``code`` is a stable dotted slug (``"study.codec.overflow"``), ``problem`` one sentence naming the
    thing and the rule, ``remedy`` one sentence saying what to do. ``fields`` holds data-independent
    facts for machines.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, problem: str, *, remedy: str = "", **fields: str | int | float) -> None:
        super().__init__(f"{problem} [{code}]")
        self.code = code
        self.problem = problem
        self.remedy = remedy
        self.fields = fields

    def diagnostics(self) -> str:
        """Text for people: the problem, then the remedy on a line of its own."""
        return f"{self.problem}\n  remedy: {self.remedy}" if self.remedy else self.problem


class FailureError(WardroundError):
    """The command could not do its work (exit 1)."""


class UsageError(WardroundError):
    """The command, a flag, a settings file or a manifest is malformed (exit 2)."""

    exit_code = 2


class RefusedError(WardroundError):
    """Policy, approval or a protocol rule forbids it (exit 3)."""

    exit_code = 3


class BudgetExhaustedError(WardroundError):
    """The register's privacy budget does not admit the event (exit 4)."""

    exit_code = 4


class VerificationError(WardroundError):
    """A signature, digest, proof or certificate does not verify (exit 5)."""

    exit_code = 5


class UnreachableError(WardroundError):
    """The other side did not answer; trying again may help (exit 6)."""

    exit_code = 6


class ContractError(WardroundError):
    """The hospital's data does not meet the data contract (exit 7)."""

    exit_code = 7
