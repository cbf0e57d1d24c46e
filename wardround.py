"""The front door: one command table, the names a notebook uses, and a check that nothing is shadowed.

Rules: ``--help`` imports no torch and no flwr; a group is imported only when it is asked for; ``server``,
``client`` and ``common`` must have been loaded from beside this file, so that a folder of that name
elsewhere on the path can never stand in for them.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Final

import click

GROUPS: Final[dict[str, tuple[str, str]]] = {
    "site": (
        "client.cli:app",
        "Hospital IT: join a federation, approve studies, run the agent, see the budget.",
    ),
    "hub": ("server.cli:hub", "Coordinator: make a hub, admit hospitals, run the server."),
    "study": ("server.cli:study", "Coordinator: submit, list, watch, abort and export studies."),
    "audit": ("common.audit.cli:app", "Auditor: verify evidence offline, report, budgets."),
    "demo": ("server.demo:app", "Anyone: a whole federation on this machine, with real processes."),
}
NOTEBOOK_NAMES: Final[dict[str, str]] = {
    "Manifest": "common.study:Manifest",
    "Study": "common.study:Study",
}
PACKAGES: Final = ("server", "client", "common")


def shadowed(beside: Path, search: Any = importlib.util.find_spec) -> list[str]:
    """Names among PACKAGES that would be imported from somewhere else than ``beside``."""
    wrong = []
    for name in PACKAGES:
        spec = search(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != beside:
            wrong.append(name)
    return wrong


def _refuse_shadowing() -> None:
    wrong = shadowed(Path(__file__).resolve().parent)
    if wrong:
        raise ImportError(
            f"wardround: the packages {', '.join(wrong)} would be loaded from another place than wardround "
            "itself; remove the folders of that name from the working directory or from PYTHONPATH"
        )


def _attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class FrontDoor(click.Group):
    """The root command: knows the groups by name, imports one only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The groups, in the order of the table."""
        return list(GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the group that was asked for."""
        if cmd_name not in GROUPS:
            return None
        import typer.main

        return typer.main.get_command(_attribute(GROUPS[cmd_name][0]))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the groups without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in GROUPS.items()])


@click.group(cls=FrontDoor, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wardround")
def cli() -> None:
    """Federated learning across hospitals: masked sums, a privacy ledger the hospital owns, mutual TLS."""


def main() -> None:
    """Run the command line."""
    try:
        _refuse_shadowing()
    except ImportError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    cli()


def __getattr__(name: str) -> Any:
    if name in NOTEBOOK_NAMES:
        _refuse_shadowing()
        return _attribute(NOTEBOOK_NAMES[name])
    raise AttributeError(f"module 'wardround' has no attribute {name!r}")


if __name__ == "__main__":
    main()
