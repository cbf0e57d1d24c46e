"""``wardround site override …`` and ``site officer``: what two people sign to raise a cap or to reopen.

Source: PRIVACY "Registers, budget, filter". Rules: an officer needs a key and the file, no site; what is
signed is printed; the ledger decides what stands (common.ledger.overrides), when it is applied here and again
whenever it is audited.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from client.guard import Guard
from client.identity import SiteIdentity
from client.state import SiteHome, write_durable
from common.console import JsonFlag, Outcome, command
from common.errors import UsageError
from common.identity import key_text, load_signing_key, new_signing_key, public_key, save_signing_key
from common.ledger.entries import Entry, Override
from common.ledger.overrides import Proposal, check_override, standing
from common.ledger.store import Ledger
from common.ledger.tree import root
from common.privacy.decimals import text_of

app = typer.Typer(
    help="Raise a cap, or reopen a register that a restore closed: signed by two.", no_args_is_help=True
)

_Site = Annotated[Path, typer.Option("--home", help="The site's folder.", file_okay=False)]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="What 'override propose' wrote.", dir_okay=False)]


def propose(ledger: Ledger, epsilon_t: float | None, epsilon_w: float | None, reason: str) -> Proposal:
    """A proposal on the ledger as it stands: to raise caps to these, or without any to reopen the register.

    Raises: UsageError for a cap or a reason that cannot stand in a ledger.
    """
    now, head = standing(ledger.entries()), ledger.head()
    caps = {"epsilon_t": now.epsilon_t, "epsilon_w": now.epsilon_w or now.epsilon_t}
    given = {"epsilon_t": epsilon_t, "epsilon_w": epsilon_w}
    caps |= {name: text_of(value) for name, value in given.items() if value is not None}
    action = "reopen" if epsilon_t is epsilon_w is None else "raise_caps"
    stated = {"action": action, "register_id": now.register_id, "size": head.size, "root": head.root.hex()}
    try:
        return Proposal.model_validate({"schema": 1, **stated, **caps, "reason": reason})
    except ValueError as error:
        problem = "a cap or the reason cannot stand in a ledger"
        remedy = "Give caps above 0 and up to 20, and one line of 1 to 500 characters."
        raise UsageError("override.words", problem, remedy=remedy) from error


def read(path: Path) -> Proposal:
    """What stands in a proposal's file. Raises UsageError, VerificationError."""
    try:
        return Proposal.from_bytes(path.read_bytes())
    except OSError as error:
        raise UsageError("override.file", f"{path} cannot be read: {error.strerror}") from error


def _save(path: Path, proposal: Proposal, text: str) -> Outcome:
    try:
        write_durable(path, proposal.to_bytes())
    except OSError as error:
        raise UsageError("override.file", f"{path} cannot be written: {error.strerror}") from error
    return Outcome(f"{describe(proposal)}\n{text}", proposal.model_dump(by_alias=True))


def describe(proposal: Proposal) -> str:
    """What officers read before they sign."""
    what = "reopens the register that a restore closed"
    if proposal.action == "raise_caps":
        what = "raises the caps for the whole history"
    return (
        f"override     {what}\n"
        f"register     {proposal.register_id}, ledger of {proposal.size} entries\n"
        f"caps then    epsilon_t {proposal.epsilon_t}, epsilon_w {proposal.epsilon_w}\n"
        f"reason       {proposal.reason}\n"
        f"signed by    {', '.join(proposal.signatures) or 'nobody yet'}"
    )


@command
def officer(
    out: Annotated[Path, typer.Option(help="The key file to make; keep it away from the site.")],
    as_json: JsonFlag = False,
) -> Outcome:
    """Make an officer's key. Two officers, named in the policy, can sign an override."""
    key = new_signing_key()
    save_signing_key(out, key)
    named = key_text(public_key(key))
    text = f"{named}\n  the private key is in {out}; name the key above under rules.officers in policy.toml"
    return Outcome(text, {"key": named, "file": str(out)})


@app.command("propose")
@command
def propose_command(
    home: _Site,
    reason: Annotated[str, typer.Option(help="Why; every report says so.")],
    out: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)],
    raise_caps: Annotated[bool, typer.Option("--raise-caps", help="Raise the caps to those given.")] = False,
    reopen: Annotated[bool, typer.Option("--reopen", help="Reopen a restored register.")] = False,
    epsilon_t: Annotated[float | None, typer.Option(help="The new cap, up to 20.")] = None,
    epsilon_w: Annotated[float | None, typer.Option(help="The new cap, up to 20.")] = None,
    as_json: JsonFlag = False,
) -> Outcome:
    """Write what two officers are to sign, on the ledger as it stands now."""
    capped = epsilon_t is not None or epsilon_w is not None
    if raise_caps == reopen or capped != raise_caps:
        problem = "an override either raises a cap or reopens the register"
        remedy = "Give --raise-caps with --epsilon-t or --epsilon-w, or --reopen alone."
        raise UsageError("override.action", problem, remedy=remedy)
    if out.exists():
        raise UsageError("output.file", f"{out} exists already", remedy="Choose a new name.")
    with _ledger(home) as (ledger, _):
        proposal = propose(ledger, epsilon_t, epsilon_w, reason)
    return _save(out, proposal, f"written to {out}; two officers sign it: wardround site override sign {out}")


@app.command("sign")
@command
def sign_command(
    file: _File,
    key: Annotated[Path, typer.Option(help="The officer's key file.", dir_okay=False)],
    as_json: JsonFlag = False,
) -> Outcome:
    """Sign an override as an officer; needs no site."""
    signed = read(file).signed(load_signing_key(key))
    return _save(file, signed, f"signed; with two signatures: wardround site override apply {file}")


@app.command("apply")
@command
def apply_command(home: _Site, file: _File, as_json: JsonFlag = False) -> Outcome:
    """Write an override with two signatures into the ledger; it acts at once."""
    proposal = read(file)
    with _ledger(home) as (ledger, actor):
        entry, hashes = proposal.entry(actor), ledger.leaf_hashes()

        def decide(entries: Sequence[Entry]) -> Override:
            check_override(entry, entries, root(hashes[: entry.size]))
            return entry

        seq = ledger.append_if(decide)
    text = f"{describe(proposal)}\nin force: ledger entry {seq}, which every report states first"
    return Outcome(text, {"entry": seq, **proposal.model_dump(by_alias=True)})


@contextmanager
def _ledger(home: Path) -> Iterator[tuple[Ledger, str]]:
    """The site's ledger, in which the policy stands as it is now, and the key that writes it."""
    site = SiteHome(home)
    identity = SiteIdentity.load(site)
    Guard(site, identity, lambda: datetime.now(UTC)).close()
    with Ledger.open(site.ledger, identity.ledger_key) as ledger:
        yield ledger, key_text(public_key(identity.ledger_key))
