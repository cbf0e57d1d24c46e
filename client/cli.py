"""``wardround site …``: what a hospital's IT department runs.

Source: DESIGN "Three people, one program". Rules: every command has ``--json`` and documented exit codes;
nothing here imports torch; flwr is imported only by ``site run``; approving needs a yes from a person.
"""

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from client import data_cli, decisions, model_cli, overrides
from client.backup import Closing, check_empty, pack, read_backup
from client.decisions import By, Reason, SiteFolder, Yes, opened, words
from client.evidence import collect
from client.identity import create_site
from client.settings import SiteSettings, load
from client.state import SiteHome, write_durable
from common.console import JsonFlag, Outcome, command, log_to_stderr
from common.errors import UsageError

app = typer.Typer(
    help="Join a federation, approve studies, run the agent, see the budget.", no_args_is_help=True
)

app.add_typer(decisions.app)
app.add_typer(model_cli.app)
app.add_typer(overrides.app, name="override")
app.add_typer(data_cli.app, name="data")
app.command("officer")(overrides.officer)

Out = Annotated[Path, typer.Option(help="The file to write; it must not exist yet.", dir_okay=False)]


def _now() -> datetime:
    return datetime.now(UTC)


@app.command()
@command
def init(
    home: SiteFolder,
    name: Annotated[str, typer.Option(help="The hospital's name, as others will see it.")],
    hub: Annotated[str, typer.Option(help="host:port of the hub, from the coordinator.")],
    as_json: JsonFlag = False,
) -> Outcome:
    """Make this site's keys, settings and deny-by-default policy, and a request for admission."""
    site = SiteHome(home)
    request = create_site(site, name=name, hub=hub)
    data = {"request": str(site.request), "policy": str(site.policy), "fingerprint": request.fingerprint}
    text = (
        f"site made in {home}; the private keys stay there\n"
        f"  1. send {site.request} to the coordinator and read this fingerprint out by telephone:\n"
        f"       {request.fingerprint}\n"
        f"  2. put the admission that comes back at {site.admission}\n"
        f"  3. edit {site.policy}: data source, coordinators, budget\n"
        f"  4. wardround site run --home {home}"
    )
    return Outcome(text, data)


@app.command()
@command
def pause(home: SiteFolder, by: By = "", reason: Reason = "", as_json: JsonFlag = False) -> Outcome:
    """Take part in nothing until resumed: a running agent ends its computations within a second."""
    return _pause(home, "paused", by, reason)


@app.command()
@command
def resume(home: SiteFolder, by: By = "", reason: Reason = "", as_json: JsonFlag = False) -> Outcome:
    """End a pause: the agent takes part again in what is approved."""
    return _pause(home, "resumed", by, reason)


def _pause(home: Path, decision: Literal["paused", "resumed"], by: str, reason: str) -> Outcome:
    with opened(home) as (_, guard):
        guard.pause(decision, words(by, reason or decision))
    return Outcome(f"{decision}: the site in {home}", {"paused": decision == "paused"})


@app.command()
@command
def run(
    home: SiteFolder,
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="End when the studies that ran here have ended; 4 if the budget stopped one."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> Outcome:
    """Run the agent: dial out to the hub and take part in approved studies until stopped."""
    log_to_stderr()
    site = SiteHome(home)
    load(site.settings, SiteSettings)
    with site.locked():
        return _run_agent(site, once)


def _run_agent(site: SiteHome, once: bool) -> Outcome:
    from client import app as flower_app
    from client.agent import Agent
    from common import flower

    folder = str(site.folder.resolve())
    hospital = flower_app.participation(folder)
    identity = hospital.identity
    context = flower.context_for(identity.id, {"site-home": folder})

    async def serve() -> None:
        agent = Agent(
            identity.address,
            site_id=identity.id,
            key_pem=identity.tls_key_pem,
            certificate_pem=identity.certificate_pem,
            authority_pem=identity.authority_pem,
            answer=lambda message: flower_app.app(message, context),
            watch=hospital.watch,
            interrupt=hospital.interrupt,
            may_send=hospital.may_send,
            finished=lambda: once and hospital.closed > 0 and hospital.open_runs == 0,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, agent.stop)
        await agent.run()

    try:
        asyncio.run(serve())
    finally:
        flower_app.close(folder)
    if once and hospital.exhausted:
        return Outcome(
            "stopped: the privacy budget is exhausted",
            {"exhausted": True},
            exit_code=4,
            code="budget.exhausted",
        )
    return Outcome("agent ended", {"exhausted": hospital.exhausted})


@app.command()
@command
def budget(home: SiteFolder, as_json: JsonFlag = False) -> Outcome:
    """What all studies together have spent of this register's privacy budget."""
    with opened(home) as (_, guard):
        spent = guard.budget()
    cap = spent.cap
    data = {
        "register": guard.register_id,
        "epsilon_t": spent.epsilon_t,
        "cap_t": cap.epsilon_t,
        "epsilon_w": spent.epsilon_w,
        "cap_w": cap.epsilon_w,
        "delta": cap.delta,
        "charges": spent.charges,
        "reserved": [{"study": name, "rounds": rounds} for name, rounds in spent.reserved],
        "more_rounds": spent.more_rounds,
        "like": spent.like,
        "closed": spent.closed,
        "reopened": spent.reopened,
    }
    lines = [
        f"register {guard.register_id}: {spent.charges} charges, delta {cap.delta:g}; odometer:",
        f"  at most t collude        epsilon {spent.epsilon_t:.4f} of {cap.epsilon_t:g}",
        f"  all other hospitals do   epsilon {spent.epsilon_w:.4f} of {cap.epsilon_w:g}",
        *(f"  reserved                 {rounds} rounds of {name}" for name, rounds in spent.reserved),
    ]
    if spent.closed:
        lines.insert(0, "CLOSED: this site was restored from a backup")
    elif spent.reopened:
        lines.insert(0, "REOPENED BY OVERRIDE: what was spent after the backup is unknown, not counted here")
    if spent.like:
        after = " after the reserved ones" if spent.reserved else ""
        lines.append(f"  {spent.more_rounds} more rounds like those of {spent.like}{after}, by the filter")
    return Outcome("\n".join(lines), data)


@app.command()
@command
def evidence(home: SiteFolder, out: Out, as_json: JsonFlag = False) -> Outcome:
    """Write the ledger and the studies that it names into one file, for an auditor."""
    site = SiteHome(home)
    load(site.settings, SiteSettings)
    found = collect(site, _now())
    # Open to others: there is nothing in it that an auditor, or the other hospitals, may not read.
    _write(out, found.to_bytes(), 0o644)
    text = (
        f"evidence written to {out}: {len(found.leaves)} ledger entries, {len(found.studies)} studies\n"
        "  anyone can check it: wardround audit verify"
    )
    return Outcome(text, {"evidence": str(out), "entries": len(found.leaves), "studies": len(found.studies)})


@app.command()
@command
def backup(home: SiteFolder, out: Out, as_json: JsonFlag = False) -> Outcome:
    """Write keys, settings, ledger and studies into one file; also while the agent runs."""
    found = pack(SiteHome(home), _now())
    _write(out, found.to_bytes(), 0o600)
    text = (
        f"backup written to {out}: {len(found.files)} files, {found.head.size} ledger entries\n"
        "  it holds this site's private keys: keep it as you would keep them, apart from this machine\n"
        "  a site restored from it can show and prove its past, but its budget is closed"
    )
    return Outcome(text, {"backup": str(out), "files": len(found.files), "entries": found.head.size})


@app.command()
@command
def restore(
    backup_file: Annotated[Path, typer.Argument(metavar="BACKUP", help="What 'site backup' wrote.")],
    home: SiteFolder,
    by: By = "",
    reason: Reason = "",
    yes: Yes = False,
    as_json: JsonFlag = False,
) -> Outcome:
    """Make a lost site's folder again, closed: what the backup lacks may have been spent."""
    site, why = SiteHome(home), words(by, reason or "restored")
    check_empty(site)
    found, now = read_backup(backup_file), _now()
    closing = found.plan(now)
    text = (
        f"{found.name}, backed up at {found.time} with {found.head.size} ledger entries\n{_closed(closing)}"
    )
    if not yes and (as_json or not typer.confirm(f"{text}\n\nRestore it into {home}?")):
        raise UsageError("site.not-confirmed", "nothing was written", remedy="Answer yes, or give --yes.")
    closing = found.restore(site, why, now)
    data = {"name": found.name, "time": found.time, "entries": found.head.size, "reserved": closing.rounds}
    shown = text + "\n\n" if yes else ""
    return Outcome(f"{shown}restored: the site in {home}, closed", {**data, "charged": closing.charged})


def _closed(closing: Closing) -> str:
    """What a restore means, in words for the person who decides on it."""
    counts = (f"{count} of study {digest[:12]}" for digest, count in closing.rounds.items())
    rounds = ", ".join(counts) or "none"
    charged = "are charged now" if closing.charged else "cannot be charged: the site was paused or closed"
    return (
        f"  rounds that may have been computed since then and {charged}: {rounds}\n"
        "  its register is closed: this site takes part in no round any more, unless two officers reopen it\n"
        "  by 'wardround site override', which then stands first in every report\n"
        "  budget, evidence and what was approved stay readable; never run the old folder beside this one"
    )


def _write(out: Path, data: bytes, mode: int) -> None:
    """Write a file that is kept: never over another one. Raises UsageError."""
    remedy = "Choose a new name in a folder where this account may write."
    if out.exists():
        raise UsageError("output.file", f"{out} exists already", remedy=remedy)
    try:
        write_durable(out, data, mode)
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror}"
        raise UsageError("output.file", problem, remedy=remedy) from error
