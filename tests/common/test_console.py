"""What commands print and how they end: text or one envelope, errors on standard error, documented codes."""

import io
import json
import logging
import math
import sys

import pytest
import typer
from typer.testing import CliRunner, Result

from common import errors
from common.console import SCHEMA, JsonFlag, Outcome, command, envelope, log_to_stderr
from common.errors import BudgetExhaustedError, WardroundError

KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, WardroundError)]


def invoke(result: Outcome | BaseException | None, *arguments: str) -> Result:
    app = typer.Typer()

    @app.command()
    @command
    def work(as_json: JsonFlag = False) -> Outcome | None:
        """Do the work."""
        if isinstance(result, BaseException):
            raise result
        return result

    return CliRunner().invoke(app, list(arguments))


def test_text_for_people() -> None:
    result = invoke(Outcome("done\n  twice", {"times": 2}))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n  twice\n", "")


def test_one_envelope_for_machines() -> None:
    result = invoke(Outcome("done", {"b": 1, "a": [2.5, None]}, hint="next"), "--json")
    assert result.stdout == (
        '{"code": "ok", "data": {"a": [2.5, null], "b": 1}, "hint": "next", "schema": 1, "status": "ok"}\n'
    )
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_end_with_their_exit_code(kind: type[WardroundError]) -> None:
    error = kind("a.code", "it broke", remedy="mend it", rounds_left=3)
    text = invoke(error)
    assert (text.exit_code, text.stdout) == (kind.exit_code, "")
    assert text.stderr == "error: it broke\n  remedy: mend it  [a.code]\n"
    machine = invoke(error, "--json")
    assert (machine.exit_code, machine.stderr) == (kind.exit_code, text.stderr)
    assert json.loads(machine.stdout) == {
        "schema": SCHEMA,
        "status": "error",
        "code": "a.code",
        "data": {"rounds_left": 3},
        "hint": "mend it",
    }


def test_an_outcome_may_end_with_a_code() -> None:
    exhausted = Outcome(
        "none left", {"left": 0}, exit_code=BudgetExhaustedError.exit_code, code="budget.empty"
    )
    assert invoke(exhausted).exit_code == 4
    assert invoke(exhausted).stdout == "none left\n"
    machine = json.loads(invoke(exhausted, "--json").stdout)
    assert (machine["status"], machine["code"]) == ("error", "budget.empty")


def test_a_command_that_printed_its_own_lines_adds_none() -> None:
    for arguments in ((), ("--json",)):
        result = invoke(None, *arguments)
        assert (result.exit_code, result.stdout) == (0, "")


def test_an_interrupt_is_130() -> None:
    result = invoke(KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_a_defect_is_not_hidden() -> None:
    assert isinstance(invoke(ZeroDivisionError()).exception, ZeroDivisionError)


def test_help_names_the_flag() -> None:
    result = invoke(None, "--help")
    assert "--json" in result.stdout
    assert "Do the work." in result.stdout


def test_the_envelope_is_one_line() -> None:
    line = envelope("ok", "ok", {"text": "two\nlines", "name": "Spital Zürich"}, "")
    assert "\n" not in line
    assert json.loads(line)["data"] == {"text": "two\nlines", "name": "Spital Zürich"}


@pytest.mark.parametrize("verbose", [False, True])
def test_logs_go_to_standard_error(verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        log_to_stderr(verbose)
        logging.getLogger("wardround.test").info("an event")
        logging.getLogger("wardround.test").debug("a detail")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + verbose
    assert lines[0].endswith(" INFO wardround.test: an event")


def test_an_infinite_epsilon_is_text_and_nan_is_a_defect() -> None:
    line = envelope("ok", "ok", {"epsilon": math.inf, "sites": [{"epsilon": math.inf}, {"epsilon": 1.5}]}, "")
    assert json.loads(line, parse_constant=pytest.fail)["data"] == {
        "epsilon": "infinite",
        "sites": [{"epsilon": "infinite"}, {"epsilon": 1.5}],
    }
    with pytest.raises(ValueError, match="JSON"):
        envelope("ok", "ok", {"epsilon": math.nan}, "")
