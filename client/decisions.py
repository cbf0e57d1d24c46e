"""``wardround site requests|show|diff|approve|deny|withdraw|consent``: what a person reads, and decides.

Source: DESIGN "A round, end to end", step 2; PRIVACY "What else may cross the wire". Rules: everything works
without the hub, which learns of a decision when it asks; approving binds one manifest digest and needs a yes
from a person; a person may read, and deny, what the policy refuses; a decision is signed into the ledger
once, with who took it and why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from client.approval import approved_last, changes, offered, review, summary
from client.egress import leaving
from client.egress import text as listed
from client.guard import Guard
from client.identity import SiteIdentity
from client.state import SiteHome
from client.studies import StudyFolder
from common.admissible import check
from common.console import JsonFlag, Outcome, command
from common.errors import RefusedError, UsageError
from common.roster import Roster
from common.run import run_params
from common.study import Manifest

app = typer.Typer()

SiteFolder = Annotated[Path, typer.Option("--home", help="The site's folder.", file_okay=False)]
By = Annotated[str, typer.Option(help="Who decides; written into the ledger with the reason.")]
Reason = Annotated[str, typer.Option(help="Why; it is written into the ledger.")]
Why = Annotated[str, typer.Option("--reason", help="Why; it is written into the ledger.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")]
Digest = Annotated[str, typer.Argument(help="The study's digest, or its first 6 or more digits.")]
Compared = Annotated[
    bool,
    typer.Option("--fingerprints-compared", help="With --yes: new fingerprints were compared by telephone."),
]


@contextmanager
def opened(home: Path) -> Iterator[tuple[SiteHome, Guard]]:
    """A site's folder and its guard, closed at the end."""
    site = SiteHome(home)
    guard = Guard(site, SiteIdentity.load(site), lambda: datetime.now(UTC))
    try:
        yield site, guard
    finally:
        guard.close()


def words(by: str, reason: str) -> str:
    """Who, and why, as the ledger keeps it. Raises UsageError when nobody is named."""
    who = by or os.environ.get("USER", "")
    if not who:
        raise UsageError("site.by", "a decision names the person who takes it", remedy="Give --by NAME.")
    return f"{who}: {reason}"


@app.command()
@command
def requests(home: SiteFolder, as_json: JsonFlag = False) -> Outcome:
    """List the studies that have arrived, and what was decided of each."""
    studies: list[dict[str, Any]] = []
    with opened(home) as (site, guard):
        for digest in StudyFolder(site).digests():
            manifest, _ = StudyFolder(site).read(bytes.fromhex(digest))
            decision = guard.decision(bytes.fromhex(digest)) or "received"
            studies.append({"digest": digest, "name": manifest.study.name, "decision": decision})
    lines = [f"{entry['digest'][:12]}  {entry['decision']:<9} {entry['name']}" for entry in studies]
    return Outcome("\n".join(lines) or "no studies received", {"studies": studies})


@app.command()
@command
def show(
    digest: Digest,
    home: SiteFolder,
    egress: Annotated[
        bool, typer.Option("--egress", help="Every message that would leave, its fields and its size.")
    ] = False,
    as_json: JsonFlag = False,
) -> Outcome:
    """Show what a study asks for, what it would cost, and whether the policy allows it."""
    with opened(home) as (site, guard):
        full = StudyFolder(site).resolve(digest)
        manifest, roster = offered(site, guard, full)
        if egress:
            admitted = check(manifest, None)
            found_messages = leaving(run_params(manifest, admitted, roster, SiteIdentity.load(site).id))
            shown = "\n".join([*summary(manifest), "", listed(found_messages)])
            return Outcome(shown, {"digest": full, "messages": [asdict(one) for one in found_messages]})
        decision = guard.decision(manifest.digest) or "received"
        try:
            found = review(site, guard, full)
        except (RefusedError, UsageError) as error:
            lines = [*summary(manifest), f"decision     {decision}", f"refused      {error.problem}"]
            data = {"digest": full, "name": manifest.study.name, "decision": decision, "refused": error.code}
            return Outcome("\n".join(lines), data)
        text = f"{found.text()}\ndecision     {decision}"
        return Outcome(text, {**found.data(), "decision": decision, "refused": None})


@app.command()
@command
def diff(
    digest: Digest,
    home: SiteFolder,
    earlier: Annotated[str, typer.Argument(help="The other one; without it, that approved here last.")] = "",
    as_json: JsonFlag = False,
) -> Outcome:
    """Show every field in which a study differs from an earlier one, and which hospitals or keys do."""
    with opened(home) as (site, guard):
        folder = StudyFolder(site)
        new = offered(site, guard, folder.resolve(digest))
        if earlier:
            old: tuple[Manifest, Roster] | None = offered(site, guard, folder.resolve(earlier))
        else:
            old = approved_last(site, guard, new[0])
        if old is None:
            remedy = "Name the study to compare with: see 'wardround site requests'."
            raise UsageError("site.diff", "no other version was approved here", remedy=remedy)
        found = list(changes(*old, *new))
    data = [{"path": change.path, "old": change.old, "new": change.new} for change in found]
    return Outcome("\n".join(map(str, found)) or "no changes", {"changes": data})


@app.command()
@command
def approve(
    digest: Digest,
    home: SiteFolder,
    reason: Reason = "approved",
    by: By = "",
    yes: Yes = False,
    compared: Compared = False,
    as_json: JsonFlag = False,
) -> Outcome:
    """Read a study, checked against policy, extract and budget, and take part in just this version of it."""
    with opened(home) as (site, guard):
        full = StudyFolder(site).resolve(digest)
        manifest, roster = offered(site, guard, full)
        _check_news(guard.decision(manifest.digest), "approved")
        found = review(site, guard, full)
        found.check_approvable()
        if yes and found.new_fingerprints and not compared:
            raise RefusedError(
                "site.fingerprints",
                f"nobody has compared the fingerprints of {', '.join(found.new_fingerprints)}",
                remedy="Compare them by telephone, then add --fingerprints-compared, or leave out --yes.",
            )
        _ask(f"{found.text()}\n\nApprove it?", yes, as_json)
        guard.decide(manifest, roster, "approved", words(by, reason))
        shown = found.text() + "\n\n" if yes else ""
        return Outcome(f"{shown}approved: {full}", {**found.data(), "decision": "approved"})


@app.command()
@command
def deny(
    digest: Digest, home: SiteFolder, reason: Why, by: By = "", yes: Yes = False, as_json: JsonFlag = False
) -> Outcome:
    """Take no part in a study; the coordinator learns that, and not why."""
    return _deny(digest, home, words(by, reason), yes, as_json, approved=False)


@app.command()
@command
def withdraw(
    digest: Digest, home: SiteFolder, reason: Why, by: By = "", yes: Yes = False, as_json: JsonFlag = False
) -> Outcome:
    """Leave a study that was approved: its run here ends at once; what was released stays released."""
    return _deny(digest, home, words(by, reason), yes, as_json, approved=True)


@app.command()
@command
def consent(
    digest: Digest,
    home: SiteFolder,
    by: By = "",
    reason: Reason = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take the consent back.")] = False,
    as_json: JsonFlag = False,
) -> Outcome:
    """Consent to a study's model leaving the hub, after reading it or its report."""
    decision: Literal["given", "withdrawn"] = "withdrawn" if withdraw else "given"
    with opened(home) as (site, guard):
        full = StudyFolder(site).resolve(digest)
        guard.consent(bytes.fromhex(full), decision, words(by, reason or f"consent {decision}"))
    return Outcome(f"consent {decision}: {full}", {"digest": full, "consent": decision})


def _deny(digest: str, home: Path, why: str, yes: bool, as_json: bool, *, approved: bool) -> Outcome:
    with opened(home) as (site, guard):
        full = StudyFolder(site).resolve(digest)
        # Also what the policy would refuse anyway, so that the coordinator learns of it.
        manifest, roster = offered(site, guard, full)
        said = guard.decision(manifest.digest)
        _check_news(said, "denied")
        if approved != (said == "approved"):
            problem = "the study is approved here" if said else "the study was never approved here"
            remedy = "Use 'wardround site withdraw'." if said else "Use 'wardround site deny'."
            raise RefusedError("site.decision", problem, remedy=remedy)
        verb = "Withdraw from" if approved else "Deny"
        _ask("\n".join([*summary(manifest), "", f"{verb} it?"]), yes, as_json)
        guard.decide(manifest, roster, "denied", why)
    said_now = "withdrawn from" if approved else "denied"
    return Outcome(f"{said_now}: {full}", {"digest": full, "name": manifest.study.name, "decision": "denied"})


def _check_news(said: str, decision: str) -> None:
    if said == decision:
        problem = f"the study is {said} here already"
        raise RefusedError("site.decided", problem, remedy="There is nothing to be done.")


def _ask(question: str, yes: bool, as_json: bool) -> None:
    if not yes and (as_json or not typer.confirm(question)):
        raise UsageError("site.not-confirmed", "nothing was decided", remedy="Answer yes, or give --yes.")
