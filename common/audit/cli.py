"""``wardround audit …``: what an auditor runs, on files alone.

Source: DESIGN "Three people, one program"; notes/users.md section 3.4. Rules: nothing here opens a connection
or a private key, or imports flwr, or torch but for ``canaries``; what was not verified is said; exit 5 unless
everything is.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from common.audit import proofs
from common.audit.canaries import LABEL, check_canaries, read_manifest
from common.audit.claims import read_facts
from common.audit.evidence import read_evidence
from common.audit.openings import keeps_payloads, recomputed
from common.audit.party import Check, read_entries, studied
from common.audit.payloads import kept_payloads
from common.audit.report import render
from common.audit.sheet import up
from common.audit.trust import Trust, claimed, is_fingerprint, read_trust
from common.audit.verify import Verification, verify
from common.console import JsonFlag, Outcome, command
from common.encoding import base64_text
from common.errors import RefusedError, UsageError
from common.identity import fingerprint
from common.ledger.entries import Approval, Charge, Completed, Consent, Entry, Pause, PolicyChange, Restored
from common.witness import HUB

app = typer.Typer(help="Verify evidence offline, report, see budgets.", no_args_is_help=True)

TABLE_WIDTH = 118
SELF_CONSISTENT = "self-consistent only: the keys come from the evidence itself"
ON_THE_HUBS_WORD = "the hospitals' keys are of a roster that the hub signed: compare each with its hospital"
TRUST_HINT = "Give --trust: what 'wardround hub roster' wrote, or the hub's fingerprint."

_WHAT: Final[Mapping[str, str]] = {
    "opened": "register {register_id:.12}, epsilon {epsilon_t} (t collude), {other} (all do), delta {delta}",
    "policy": "{changed}",
    "approval": "{decision} {study}: ",
    "pause": "{decision}: ",
    "restored": "",
    "override": "{action}, epsilon {epsilon_t} and {other}: {reason}",
    "consent": "{decision} {study}: ",
    "closed": "{study}",
    "opt_outs": "{digest:.12}",
    "charge": "round {round} of {study}",
    "outcome": "{reason}, attempt {attempt}, event {event_id:.12}",
    "membership": "{decision} {id} {name}, {fingerprint}",
    "submission": "study {study}",
    "completed": "round {round} of {study} over {members}",
    "ended": "{status} {study}",
}
"""What ``audit log`` says of an entry, by its type; a person's words follow their decision."""

File = Annotated[Path, typer.Argument(help="Evidence of one party.")]
Files = Annotated[list[Path], typer.Argument(help="Evidence, one file for each party.")]
TrustOption = Annotated[
    str, typer.Option("--trust", help="The hub's roster file, or its key's fingerprint, from elsewhere.")
]


def _verified(files: Sequence[Path], trust: str) -> tuple[Verification, Trust]:
    """The verification of these files, and the keys that it went by."""
    evidences = [read_evidence(path) for path in files]
    believed = read_trust(trust, evidences) if trust else None
    return verify(evidences, believed), believed or claimed(evidences)


def _judged(verdict: str, text: str, data: Mapping[str, Any]) -> Outcome:
    """Exit 5 unless the evidence was verified against keys from elsewhere."""
    code = {"verified": "ok", "failed": "audit.failed"}.get(verdict, "audit.untrusted")
    hint = "" if data.get("trusted", True) else TRUST_HINT
    return Outcome(text, data, hint, 0 if code == "ok" else 5, code)


@app.command("verify")
@command
def verify_command(files: Files, trust: TrustOption = "", as_json: JsonFlag = False) -> Outcome:
    """Check evidence: each ledger, its studies, and what the parties say of each other."""
    found, _ = _verified(files, trust)
    lines = _lines(found.checks)
    if found.missing:
        lines.append(f"no evidence was given of: {', '.join(found.missing)}")
    failed, total = sum(not check.passed for check in found.checks), len(found.checks)
    said = {"failed": f"{failed} of {total} checks do not hold", "verified": f"all {total} checks hold"}
    lines += [ON_THE_HUBS_WORD] if is_fingerprint(trust) else []
    lines.append(said.get(found.verdict, SELF_CONSISTENT))
    return _judged(found.verdict, "\n".join(lines), _data(found, found.checks, missing=found.missing))


def _data(found: Verification, checks: Sequence[Check], **more: object) -> dict[str, Any]:
    passed = all(check.passed for check in checks)
    return {"trusted": found.trusted, "passed": passed, "checks": list(map(asdict, checks)), **more}


def _lines(checks: Sequence[Check]) -> list[str]:
    width, slug = max(len(c.party) for c in checks), max(len(c.name) for c in checks)
    marks = {True: "ok  ", False: "FAIL"}
    return [f"{marks[c.passed]}  {c.party:<{width}}  {c.name:<{slug}}  {c.detail}" for c in checks]


@app.command("recompute")
@command
def recompute_command(
    file: Annotated[Path, typer.Argument(help="Evidence of the hub.")],
    payloads: Annotated[Path, typer.Argument(help="What 'wardround hub payloads' wrote.")],
    trust: TrustOption = "",
    as_json: JsonFlag = False,
) -> Outcome:
    """Compute every sum again from the payloads that the hospitals signed, bit for bit."""
    if is_fingerprint(trust):
        # Whoever holds the hub's key could invent hospitals, and sums of them.
        problem = "a sum rests on the hospitals' keys, and the hub's fingerprint does not vouch for these"
        remedy = "Give the roster file that 'wardround hub roster' wrote, its fingerprints compared."
        raise UsageError("audit.hub-alone", problem, remedy=remedy)
    found, _ = _verified([file], trust)
    hub = next((party for party in found.parties if party.id == HUB), None)
    if hub is None:
        remedy = "Give the file that 'wardround hub evidence' wrote."
        raise UsageError("audit.hub", f"{file} is not the hub's evidence", remedy=remedy)
    checks = list(found.checks)
    if found.passed:
        with Console(stderr=True).status("reading") as progress, kept_payloads(payloads) as kept:
            for check in recomputed(hub, kept):
                checks.append(check)
                progress.update(check.detail)
    verdict = found.verdict if all(check.passed for check in checks) else "failed"
    sums = checks[len(found.checks) :]
    if not sums and verdict != "failed":
        problem = "the hub's evidence has no completed round of a study that keeps payloads"
        remedy = 'Only with audit = "payloads" is a sum computed again.'
        raise RefusedError("audit.no-sums", problem, remedy=remedy)
    shown = sums if found.passed else [check for check in checks if not check.passed]
    others = sum(1 for entry in hub.of(Completed) if not keeps_payloads(hub, entry.manifest))
    bad = "not every sum is right" if sums else "the evidence does not hold: no sum was computed"
    said = {"failed": bad, "verified": f"all {len(sums)} sums with kept payloads are right"}
    lines = _lines(shown)
    if others and found.passed:
        lines.append(f"not computed again, for no payloads are kept: {others} sums")
    lines.append(said.get(verdict, SELF_CONSISTENT))
    return _judged(verdict, "\n".join(lines), _data(found, checks, not_computed=others))


@app.command()
@command
def log(file: File, as_json: JsonFlag = False) -> Outcome:
    """What a ledger says, an entry a line; nothing is verified but that it can be read."""
    evidence = read_evidence(file)
    entries, problem = read_entries(evidence)
    lines = [_line(entry, evidence.name) for entry in entries]
    data = {"party": evidence.name, "entries": [entry.model_dump() for entry in entries], "problem": problem}
    if problem:
        lines.append(f"the ledger cannot be read further: {problem}")
    return Outcome("\n".join(lines), data, "", 5 if problem else 0, "audit.leaves" if problem else "ok")


@app.command()
@command
def prove(
    file: File,
    entry: Annotated[int, typer.Argument(help="The entry's number, as 'audit log' prints it.", min=0)],
    out: Annotated[Path, typer.Option(help="The file to write: NAME.tlog-proof.", dir_okay=False)],
    as_json: JsonFlag = False,
) -> Outcome:
    """Write a proof that one entry is in the ledger, for somebody who is to see no other entry."""
    evidence = read_evidence(file)
    key = proofs.own_key(evidence)
    _write(out, proofs.prove(evidence, entry, key))
    origin = fingerprint(key)
    data = {"file": str(out), "entry": entry, "party": evidence.name, "ledger_key": origin}
    text = f"{out} shows entry {entry} of {evidence.name} to whoever trusts the ledger key {origin}"
    return Outcome(text, data)


@app.command()
@command
def diff(
    old: Annotated[Path, typer.Argument(help="The older evidence of a party.")],
    new: Annotated[Path, typer.Argument(help="The newer evidence of that party.")],
    as_json: JsonFlag = False,
) -> Outcome:
    """What a ledger has added since older evidence of it, and a proof that nothing else changed."""
    before, after = read_evidence(old), read_evidence(new)
    found = proofs.extension(before, after, proofs.own_key(before))
    text = [_line(entry, after.name) for entry in found.entries]
    text.append(f"from {found.old.size} entries to {found.new.size}: nothing that was there has changed")
    old_head, new_head = ({"size": h.size, "root": base64_text(h.root)} for h in (found.old, found.new))
    proof, entries = list(map(base64_text, found.proof)), [entry.model_dump() for entry in found.entries]
    data = {"party": after.name, "old": old_head, "new": new_head, "proof": proof, "entries": entries}
    return Outcome("\n".join(text), data)


def _write(out: Path, text: str) -> None:
    try:
        with out.open("x", encoding="utf-8", newline="\n") as written:
            written.write(text)
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror}"
        raise RefusedError("audit.out", problem, remedy="Name a new file.") from error


def _line(entry: Entry, owner: str) -> str:
    who, what = owner, _what(entry)
    if isinstance(entry, Approval | Pause | Restored | Consent):
        person, separator, words = entry.reason.partition(": ")
        who, what = (person, f"{what}{words}") if separator else (owner, f"{what}{entry.reason}")
    return f"{entry.seq:>6}  {entry.time}  {entry.type:<10}  {who}  {what}"


def _what(entry: Entry) -> str:
    said: dict[str, Any] = {"study": studied(entry)[:12], **entry.model_dump()}
    if isinstance(entry, PolicyChange):
        before = {} if entry.before is None else entry.before.model_dump()
        after = entry.after.model_dump()
        changed = [name for name in after if not before or after[name] != before[name]]
        said["changed"] = ", ".join(f"{name} {_words(after[name])}" for name in changed)
    elif isinstance(entry, Charge):
        said["round"] = entry.event.get("round")
    other = said.get("epsilon_w") or "none"
    return _WHAT[entry.type].format(**said, other=other, members=_words(said.get("cohort")))


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@app.command()
@command
def report(
    files: Files,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.", dir_okay=False)],
    trust: TrustOption = "",
    as_json: JsonFlag = False,
) -> Outcome:
    """Write what the evidence says about privacy into one HTML file; it says first whether it verifies."""
    facts = read_facts(*_verified(files, trust))
    _write(out, render(facts))
    text = f"{out}: {facts.verdict}; studies: {len(facts.studies)}, exceptions: {len(facts.notices)}"
    return _judged(facts.verdict, text, {"report": str(out), **asdict(facts)})


@app.command()
@command
def budgets(files: Files, trust: TrustOption = "", as_json: JsonFlag = False) -> Outcome:
    """What each hospital's register has spent of its caps, and how many more rounds it could pay."""
    facts = read_facts(*_verified(files, trust))
    views = ("epsilon_t / cap", "epsilon_w / cap")
    table = Table("hospital", "register", *views, "delta", "charges", "more rounds")
    for found in facts.registers:
        spent = [f"{up(a.spent)} / {'none' if a.cap is None else format(a.cap, 'g')}" for a in found.accounts]
        more = "" if found.more_rounds is None else f"{found.more_rounds} like {found.like}"
        table.add_row(found.hospital, found.register_id[:12], *spent, found.delta, str(found.charges), more)
    shown = io.StringIO()
    Console(file=shown, width=TABLE_WIDTH).print(table)
    missing = f"; no evidence was given of {', '.join(facts.missing)}" if facts.missing else ""
    text = f"{shown.getvalue()}{facts.verdict}{missing}"
    registers = [asdict(found) for found in facts.registers]
    data = {"registers": registers, "verdict": facts.verdict, "missing": facts.missing}
    return _judged(facts.verdict, text, data)


@app.command("canaries")
@command
def canaries_command(
    study: Annotated[Path, typer.Argument(help="A study's TOML file, or studies/*.study out of evidence.")],
    delta: Annotated[float, typer.Option(help="Delta of both bounds on epsilon.")] = 1e-6,
    seed: Annotated[int, typer.Option(help="Makes the synthetic rows; noise and coins never.", min=0)] = 0,
    as_json: JsonFlag = False,
) -> Outcome:
    """Run a study's code once on synthetic patients: does it keep what it states of privacy?"""
    found = check_canaries(read_manifest(study), delta, seed, os.urandom)
    flags = found["flags"]
    upper, beyond = found["upper"], "" if found["upper"] < found["largest"] else ", more than they can deny"
    lines = {
        "epsilon": f"at least {found['lower']:.4f} by {found['canaries']} canaries, "
        f"at most {up(upper)} by the accountant{beyond}",
        "sums": f"within {found['sum_error']:.1g} clip norms of those computed patient by patient",
        "noise": f"{found['noise_ratio']:.4f} times the stated variance, over {found['noise_count']} numbers",
    }
    text = [f"{'FAIL' if name in flags else 'ok  '}  {name:<7}  {said}" for name, said in lines.items()]
    text.append(f"{LABEL}: {found['rounds']} of {found['planned_rounds']} rounds, delta {delta:g}")
    return Outcome("\n".join(text), found, "", 5 if flags else 0, "audit.canaries" if flags else "ok")
