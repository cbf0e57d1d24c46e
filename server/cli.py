"""``wardround hub …`` and ``wardround study …``: the coordinator's commands.

Source: DESIGN "Three people, one program". Rules: every command has ``--json`` and documented exit codes;
nothing here imports torch; flwr is imported only by ``hub run``.
"""

import json
import sys
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.live import Live

from common import link_pb2
from common.console import JsonFlag, Outcome, command, log_to_stderr
from common.errors import RefusedError, UsageError
from common.identity import fingerprint
from server.display import event_table, study_text
from server.home import CoordinatorHome, HubHome

if TYPE_CHECKING:
    from server.desk import CoordinatorDesk

hub = typer.Typer(help="Make a hub, admit hospitals, run the server.", no_args_is_help=True)
study = typer.Typer(help="Submit, list, show, watch, abort and export studies.", no_args_is_help=True)

HubFolder = Annotated[Path, typer.Option("--home", help="The hub's folder.", file_okay=False)]
CoordinatorFolder = Annotated[
    Path, typer.Option("--as", help="The coordinator's folder, as 'hub init' made it.", file_okay=False)
]
OutFile = Annotated[Path, typer.Option(help="Where to write it.", dir_okay=False)]
Digest = Annotated[str, typer.Argument(help="The study's digest, or its first 6 or more digits.")]


@hub.command()
@command
def init(
    home: HubFolder,
    address: Annotated[str, typer.Option(help="host:port under which sites and coordinators dial the hub.")],
    listen: Annotated[str, typer.Option(help="host:port to listen on; default: the address.")] = "",
    as_json: JsonFlag = False,
) -> Outcome:
    """Make a hub: authority, keys, settings, and the first coordinator's folder."""
    from server.enrolment import create_hub

    made = create_hub(HubHome(home), address=address, listen=listen or address, now=datetime.now(UTC))
    data = {**asdict(made), "coordinator": str(HubHome(home).coordinator)}
    text = (
        f"hub made in {home}\n"
        f"  hub fingerprint     {made.hub_fingerprint}   (each hospital compares it out of band)\n"
        f"  coordinator key     {made.coordinator_key}   (each hospital names it in policy.toml)\n"
        f"  coordinator folder  {HubHome(home).coordinator}"
    )
    return Outcome(text, data)


@hub.command()
@command
def admit(
    home: HubFolder,
    request: Annotated[Path, typer.Argument(help="request.json from the hospital.", dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Where to write the admission to send back.", dir_okay=False)],
    as_json: JsonFlag = False,
) -> Outcome:
    """Sign a hospital's request and put it on the roster. Compare its fingerprints out of band first."""
    from server.enrolment import admit_site

    try:
        received = request.read_bytes()
    except OSError as error:
        remedy = "Give the hospital's request.json."
        raise UsageError("hub.request", f"{request} cannot be read", remedy=remedy) from error
    admission = admit_site(HubHome(home), received, now=datetime.now(UTC))
    _write(out, admission.to_bytes())
    member = admission.member()
    text = (
        f"{member.name} admitted as site {member.id}; send {out} back to the hospital\n"
        f"  fingerprint  {member.fingerprint}   (the hospital reads it out; compare before sending)"
    )
    data = {"id": member.id, "name": member.name, "fingerprint": member.fingerprint, "admission": str(out)}
    return Outcome(text, data)


@hub.command()
@command
def revoke(
    home: HubFolder,
    name: Annotated[str, typer.Argument(help="The hospital's name, as it was admitted.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
    as_json: JsonFlag = False,
) -> Outcome:
    """End a hospital's admission for good; a running hub cuts its stream within a second."""
    from common.ledger.entries import utc_minute
    from server.store import Store

    with closing(Store.open(_made(home).database)) as store:
        row = store.revoke_site(name, utc_minute(datetime.now(UTC)), reason)
    return Outcome(f"{row.name}: admission revoked", {"id": row.id, "name": row.name, "revoked": row.revoked})


@hub.command()
@command
def roster(home: HubFolder, out: OutFile, as_json: JsonFlag = False) -> Outcome:
    """Write the roster that an auditor verifies evidence against; compare its fingerprints out of band."""
    from server.evidence import trust

    trusted = trust(_made(home))
    _write(out, trusted.to_bytes())
    prints = {member.name: member.fingerprint for member in trusted.roster.members}
    data = {"roster": str(out), "hub_fingerprint": fingerprint(trusted.hub_key), "fingerprints": prints}
    lines = [f"roster written to {out}", f"  {data['hub_fingerprint']}  the hub"]
    return Outcome("\n".join([*lines, *(f"  {text}  {name}" for name, text in prints.items())]), data)


@hub.command()
@command
def evidence(home: HubFolder, out: OutFile, as_json: JsonFlag = False) -> Outcome:
    """Write the hub's evidence for an auditor: its ledger, its studies, the heads it has seen."""
    from server.evidence import collect

    found = collect(_made(home), datetime.now(UTC))
    _write(out, found.to_bytes())
    data = {"evidence": str(out), "entries": len(found.leaves), "studies": len(found.studies)}
    return Outcome(f"evidence written to {out}: {len(found.leaves)} ledger entries", data)


@hub.command()
@command
def payloads(
    digest: Digest,
    home: HubFolder,
    out: Annotated[Path | None, typer.Option(help="Where to write them, for the auditor.")] = None,
    erase: Annotated[
        bool, typer.Option("--erase", help="The audit has ended: remove them for good.")
    ] = False,
    as_json: JsonFlag = False,
) -> Outcome:
    """Hand over, or erase, the masked payloads that a study with audit = "payloads" keeps."""
    from server.desk import named
    from server.payloads import erase_payloads, pack_payloads
    from server.store import ENDED, Store

    if (out is None) != erase:
        raise UsageError("hub.payloads", "give either --out or --erase", remedy="See --help.")
    place = _made(home)
    with closing(Store.open(place.database)) as store:
        found = named(digest, [row.digest for row in store.studies()])
        status = store.study(found).status
    if out is not None:
        rounds = pack_payloads(place.payloads / found, found, out)
        data = {"study": found, "rounds": rounds, "out": str(out)}
        return Outcome(f"payloads of {rounds} rounds written to {out}", data)
    if status not in ENDED:
        problem = f"the study is {status}: it still adds to them"
        raise RefusedError("hub.payloads-in-use", problem, remedy="Wait for its end, or abort it.")
    rounds = erase_payloads(place.payloads / found)
    text = f"payloads of {rounds} rounds erased: their sums cannot be computed again"
    return Outcome(text, {"study": found, "rounds": rounds})


@hub.command()
@command
def run(home: HubFolder, as_json: JsonFlag = False) -> Outcome | None:
    """Run the server until it is stopped. Prints one line when it listens."""
    from server.service import Hub

    log_to_stderr()
    service = Hub(HubHome(home))
    port = service.start()
    ready = {"listening": service.listen, "port": port}
    print(json.dumps(ready) if as_json else f"listening on {service.listen} (port {port})", flush=True)  # noqa: T201
    service.serve_until_signal()
    return None


@study.command()
@command
def submit(
    manifest: Annotated[Path, typer.Argument(help="The study's TOML file.", dir_okay=False)],
    as_: CoordinatorFolder,
    token: Annotated[
        str, typer.Option(help="32 hex digits; the same token and file give the same study.")
    ] = "",
    as_json: JsonFlag = False,
) -> Outcome:
    """Check, sign and submit a study."""
    from server.submission import prepare

    with _desk(as_) as desk:
        signed = prepare(CoordinatorHome(as_), manifest, desk, token)
        info = desk.submit(signed.manifest_bytes, signed.signature)
    text = f"study {info.name!r} submitted\n  digest  {info.digest}\n  status  {info.status}"
    return Outcome(text, _plain(info))


@study.command(name="list")
@command
def list_(as_: CoordinatorFolder, as_json: JsonFlag = False) -> Outcome:
    """List all studies of the hub."""
    with _desk(as_) as desk:
        studies = desk.studies()
    lines = [f"{s.digest[:12]}  {s.status:<22} {s.round:>4}/{s.rounds:<4} {s.name}" for s in studies]
    return Outcome("\n".join(lines) or "no studies", {"studies": list(map(_plain, studies))})


@study.command()
@command
def show(digest: Digest, as_: CoordinatorFolder, as_json: JsonFlag = False) -> Outcome:
    """Show a study: what hospitals were asked to approve, who takes part, and what became of each round."""
    with _desk(as_) as desk:
        manifest, detail = desk.show(desk.resolve(digest))
    rounds = [
        {**_plain(r), "step": r.step or None, "cohort": list(r.cohort), "seconds": round(r.seconds, 4)}
        for r in detail.rounds
    ]
    shown = {"history": rounds, "manifest": json.loads(detail.manifest.data)}
    return Outcome(study_text(manifest, detail), {**_study_and_sites(detail), **shown})


@study.command()
@command
def watch(digest: Digest, as_: CoordinatorFolder, as_json: JsonFlag = False) -> Outcome | None:
    """Follow a study until it ends; with --json one line an event. Exit 1 unless it is done."""
    with _desk(as_) as desk:
        events = desk.watch(desk.resolve(digest))
        event = None
        if as_json:
            for event in events:
                said = {"cohort": list(event.cohort), "seconds": round(event.seconds, 4)}
                print(json.dumps({**_study_and_sites(event), **said}, sort_keys=True), flush=True)  # noqa: T201
        else:
            with Live(console=Console(file=sys.stdout), refresh_per_second=8) as live:
                for event in events:
                    live.update(event_table(event))
    if event is None or event.study.status != "done":
        raise typer.Exit(1)
    return None


@study.command()
@command
def abort(
    digest: Digest,
    as_: CoordinatorFolder,
    reason: Annotated[str, typer.Option(help="Why; it is logged.")],
    as_json: JsonFlag = False,
) -> Outcome:
    """End a study for good."""
    with _desk(as_) as desk:
        info = desk.abort(desk.resolve(digest), reason)
    return Outcome(f"study {info.name!r}: {info.status}", _plain(info))


@study.command()
@command
def new(
    template: Annotated[str, typer.Option(help="A template's name; see --list.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="Show the templates.")] = False,
    member: Annotated[list[str] | None, typer.Option(help="A hospital's name; once for each.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write; it must not exist yet.")] = Path("study.toml"),
    as_json: JsonFlag = False,
) -> Outcome:
    """Write a study file to start from."""
    from server import starters

    if list_ or not template:
        said = {name: starters.summary(name) for name in starters.names()}
        return Outcome("\n".join(f"{name:<24} {text}" for name, text in said.items()), {"templates": said})
    text = starters.filled(template, member or ())
    if out.exists():
        raise UsageError("output.file", f"{out} exists already", remedy="Name a new file.")
    _write(out, text.encode())
    missing = "" if member else "; name its members before you submit it"
    return Outcome(f"{out}: from template {template}{missing}", {"out": str(out), "template": template})


@study.command()
@command
def export(
    digest: Digest,
    as_: CoordinatorFolder,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.", dir_okay=False)],
    round_: Annotated[int, typer.Option("--round", min=0, help="A completed round; 0 is the last.")] = 0,
    as_json: JsonFlag = False,
) -> Outcome:
    """Write the model of a completed round as safetensors, beside it its manifest, results and card.

    A forest is written as JSON too, and a kernel model's public directions.
    """
    from server.exports import documents

    with _desk(as_) as desk:
        full = desk.resolve(digest)
        state, (manifest, detail) = desk.export(full, round_), desk.show(full)
    done = [len(row.cohort) for row in detail.rounds if row.step]
    cohort = done[-1] if done else len(manifest.members)
    written = {"state": out}
    for suffix, data in documents(manifest, state, cohort).items():
        written[suffix] = out.with_suffix(f".{suffix}")
        _write(written[suffix], data)
    _write(out, state)
    names = {key: str(path) for key, path in written.items()}
    said = ", ".join(path.name for key, path in written.items() if key != "state")
    return Outcome(
        f"{out}: {len(state)} bytes; beside it {said}", {"out": str(out), "bytes": len(state), **names}
    )


@study.command()
@command
def results(digest: Digest, as_: CoordinatorFolder, as_json: JsonFlag = False) -> Outcome:
    """Show what a study's last state says: evaluation or statistics, with the noise's intervals."""
    from server.exports import shown

    with _desk(as_) as desk:
        full = desk.resolve(digest)
        state, (manifest, detail) = desk.export(full, 0), desk.show(full)
    done = [len(row.cohort) for row in detail.rounds if row.step]
    cohort = done[-1] if done else len(manifest.members)
    text, data = shown(manifest, state, cohort)
    return Outcome(text, data)


@study.command()
@command
def synth(
    study_file: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A study's TOML file, or a contract's.", dir_okay=False)
    ],
    out: Annotated[
        Path, typer.Option(help="The .csv, .parquet or .ndjson file to write; it must not exist yet.")
    ],
    rows: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many rows.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same rows.")] = 0,
    as_json: JsonFlag = False,
) -> Outcome:
    """Write made-up rows that fit a study's contract, marked as such, to try it out."""
    from common.contract import Contract
    from common.synthetic import write

    try:
        text = study_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{study_file} cannot be read as text"
        raise UsageError("study.file", problem, remedy="Name a study's TOML file.") from error
    write(Contract.from_toml(text), rows, seed, out)
    data = {"out": str(out), "rows": rows, "seed": seed, "synthetic": True}
    return Outcome(f"{out}: {rows} synthetic rows, nobody's; seed {seed}", data)


def _write(out: Path, data: bytes) -> None:
    try:
        out.write_bytes(data)
    except OSError as error:
        remedy = "Name a file in a folder that exists, then run the same command again."
        problem = f"{out} cannot be written: {error.strerror}"
        raise UsageError("output.file", problem, remedy=remedy) from error


def _made(home: Path) -> HubHome:
    """The folder of a hub that 'hub init' has made. Raises UsageError."""
    HubHome(home).load_settings()
    return HubHome(home)


def _desk(folder: Path) -> "CoordinatorDesk":
    from server.desk import CoordinatorDesk

    return CoordinatorDesk(CoordinatorHome(folder))


def _plain(message: Message) -> dict[str, Any]:
    """A message's fields by name, as ``--json`` prints them."""
    return {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}


def _study_and_sites(said: link_pb2.StudyEvent | link_pb2.StudyDetail) -> dict[str, Any]:
    return {**_plain(said.study), "sites": list(map(_plain, said.sites))}
