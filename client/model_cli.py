"""``wardround site predict|benefit``: use a study's model at this hospital, and see what taking part gains.

Source: DESIGN.md "Three people, one program"; PRIVACY.md (what a site computes for itself is no release).
Rules: rows are read by a process of its own without network or keys; results are files of this site alone;
how the model does here is shown only after the study's last release, for until then it could tell what the
next one will hold.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from client.decisions import opened
from client.frames import passed_environment, read_frame, write_frame
from client.identity import load_policy
from client.reliability import drawn
from client.snapshot import local
from client.sources.source import DataSource
from client.state import SiteHome, write_durable
from client.studies import StudyFolder
from common.console import JsonFlag, Outcome, command
from common.errors import FailureError, RefusedError, UsageError
from common.identity import read_secret
from common.ledger.entries import Approval, Closed
from common.ledger.store import Ledger
from common.study import Manifest

app = typer.Typer(help="Use a study's model at this hospital.")

TIMEOUT_S: Final = 1800.0
_KINDS: Final = {".csv": "csv", ".parquet": "parquet", ".ndjson": "ndjson"}
_SHOWN: Final = ("auroc", "brier", "accuracy", "balanced accuracy", "macro f1", "rmse", "r2", "c-index")

SiteFolder = Annotated[Path, typer.Option("--home", help="The site's folder.", file_okay=False)]
Digest = Annotated[str, typer.Argument(help="A received study's digest, or its first digits.")]
ModelFile = Annotated[Path, typer.Option("--model", help="The exported .safetensors file.", dir_okay=False)]


@app.command()
@command
def predict(
    study: Digest,
    home: SiteFolder,
    model: ModelFile,
    rows: Annotated[Path, typer.Option("--in", help="A .csv, .parquet or .ndjson file.", dir_okay=False)],
    out: Annotated[Path, typer.Option("--out", help="The CSV file to write.", dir_okay=False)],
    as_json: JsonFlag = False,
) -> Outcome:
    """Apply a study's model to rows of this hospital, in the contract's columns; no label is needed."""
    site = SiteHome(home)
    manifest = _manifest(site, study)
    if manifest.study.model.kind in ("statistics", "skip_gram"):
        problem = f"a study of kind {manifest.study.model.kind} says nothing of single rows"
        raise RefusedError("predict.kind", problem, remedy="Read its results instead.")
    if rows.suffix not in _KINDS:
        remedy = f"Name a file that ends in {', '.join(_KINDS)}."
        raise UsageError("predict.in", f"{rows.name} has no suffix known here", remedy=remedy)
    policy = load_policy(site)
    own = policy.source(manifest.study.data)
    where = {"source": f"{_KINDS[rows.suffix]}:{rows.resolve()}", "table": "", "tables": {}}
    # Of images the file is the index, below the policy's own folder.
    source = own.model_copy(update={"table": str(rows.resolve())} if own.kind == "dicom" else where)
    _, found = _asked({"op": "predict"}, source, manifest, _state(model))
    write_durable(out, found, 0o600)
    count = found.count(b"\n") - 1
    return Outcome(f"{out}: {count} rows", {"out": str(out), "rows": count})


@app.command()
@command
def benefit(
    study: Digest,
    home: SiteFolder,
    model: ModelFile,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the reliability plot, as SVG.", dir_okay=False)
    ] = None,
    as_json: JsonFlag = False,
) -> Outcome:
    """Compare local-only, global and fine-tuned model on this hospital's own held-out patients."""
    site = SiteHome(home)
    manifest = _manifest(site, study)
    if manifest.study.counts or not manifest.study.contract.holdout:
        problem = "this study keeps no patients out of training, or trains nothing"
        raise RefusedError("benefit.holdout", problem, remedy="Nothing can be compared here.")
    _check_over(site, manifest)
    with opened(home) as (_, guard):
        key = guard.split_key(read_secret(site.split_secret), manifest.digest)
        source = guard.source(manifest)
    with local(source, manifest.study.contract, site.copies) as copy:
        header = {"op": "benefit", "split_key": key.hex()}
        reply, _ = _asked(header, copy, manifest, _state(model))
    found = reply["found"]
    if not found["models"]:
        raise RefusedError("benefit.nobody", "no patient is held out here", remedy="Nothing can be compared.")
    if out is not None:
        write_durable(out, drawn({k: v["everybody"] for k, v in found["models"].items()}).encode(), 0o600)
    return Outcome("\n".join(_lines(found["models"])), found)


def _lines(models: Mapping[str, Any]) -> list[str]:
    lines = []
    for group in next(iter(models.values())):
        lines.append(group)
        for name, groups in models.items():
            values = {key: groups[group].get(key) for key in _SHOWN}
            said = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if value is not None)
            lines.append(f"  {name:<12} {said}")
    return lines


def _manifest(site: SiteHome, study: str) -> Manifest:
    folder = StudyFolder(site)
    return folder.read(bytes.fromhex(folder.resolve(study)))[0]


def _state(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "Ask the coordinator for the exported model."
        raise UsageError("model.file", f"{path} cannot be read", remedy=remedy) from error


def _check_over(site: SiteHome, manifest: Manifest) -> None:
    """Refuse unless the study is closed here. Raises RefusedError."""
    name = manifest.digest.hex()
    with Ledger.open(site.ledger) as ledger:
        said = [e for e in ledger.entries() if isinstance(e, Approval | Closed) and e.manifest == name]
    if not said or not isinstance(said[-1], Closed):
        problem = "the study is not over here: its next release would follow"
        raise RefusedError("benefit.running", problem, remedy="Wait for its end, or withdraw from it.")


def _asked(
    header: dict[str, Any], source: DataSource, manifest: Manifest, state: bytes
) -> tuple[dict[str, Any], bytes]:
    """Let a scorer answer one question. Raises what it says, or FailureError."""
    data = manifest.to_bytes()
    whole = header | {"source": json.loads(source.model_dump_json()), "manifest": len(data)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "client.scorer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=passed_environment(),
        cwd="/",
    )
    overrun = threading.Timer(TIMEOUT_S, process.kill)
    overrun.start()
    try:
        if process.stdin is None or process.stdout is None:
            raise FailureError("scorer.pipe", "the scorer has no pipe")
        write_frame(process.stdin, whole, data + state)
        frame = read_frame(process.stdout)
    except OSError:
        frame = None
    finally:
        overrun.cancel()
        process.kill()
        process.wait(TIMEOUT_S)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    if frame is None:
        raise FailureError("scorer.died", "the scorer ended without an answer", remedy="Try it again.")
    reply, found = frame
    if reply.get("status") != "ok":
        code, problem = str(reply.get("code")), str(reply.get("problem"))
        raise FailureError(code, problem, remedy=str(reply.get("remedy") or ""))
    return reply, found
