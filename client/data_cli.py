"""``wardround site data check|preview``: what a hospital sees of its own data before it approves a study.

Source: DESIGN.md "Three people, one program". Rules: everything stays on this machine; no study is decided
and nothing is charged here; exit 7 where an error stands in the way of an approval.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from client.identity import load_policy
from client.quality import check
from client.quality_page import render
from client.snapshot import local
from client.sources.extract import opened
from client.sources.source import DataSource
from client.state import SiteHome, write_durable
from client.studies import StudyFolder
from common.console import JsonFlag, Outcome, command
from common.contract import Category, Contract, Events, Text
from common.errors import ContractError, UsageError

app = typer.Typer(help="Check and preview this hospital's data for a study.", no_args_is_help=True)
PREVIEW_ROWS = 3
PREVIEW_COORDINATES = 60

SiteFolder = Annotated[Path, typer.Option("--home", help="The site's folder.", file_okay=False)]
Study = Annotated[
    str, typer.Argument(help="A received study's digest, or a TOML file of a study or contract.")
]
Source = Annotated[
    str, typer.Option("--data", help="The source in policy.toml; default: the one that it names.")
]


@app.command("check")
@command
def check_(
    study: Study,
    home: SiteFolder,
    data: Source = "",
    page: Annotated[
        Path | None, typer.Option(help="Also write the findings as an HTML page.", dir_okay=False)
    ] = None,
    as_json: JsonFlag = False,
) -> Outcome:
    """Count what is wrong with a source for a study: conformance, completeness, plausibility."""
    with _chosen(study, home, data) as (source, contract, name):
        # What is read may be a copy; what is named is the hospital's own source.
        report = check(source, contract)
    report.where = name
    if page is not None:
        write_durable(page, render(report, study).encode(), 0o600)
    lines = [f"{name}: {report.rows} rows, {report.patients} patients with a usable row"]
    lines += [f"{finding}  [{name}]" for finding in report.findings]
    lines += [
        "the contract holds" if not report.errors else f"{len(report.errors)} errors: it cannot be approved"
    ]
    lines += [f"page written to {page}; it counts records, so keep it here"] if page is not None else []
    found = {
        "source": name, "rows": report.rows, "patients": report.patients,
        "findings": [
            asdict(finding) for finding in report.findings
        ],
    }  # fmt: skip
    failed = bool(report.errors)
    return Outcome(
        "\n".join(lines), found, exit_code=ContractError.exit_code if failed else 0,
        code="contract.quality" if failed else "ok",
    )  # fmt: skip


@app.command()
@command
def preview(study: Study, home: SiteFolder, data: Source = "", as_json: JsonFlag = False) -> Outcome:
    """Show what a model would see of the first three rows: numbers, without ids."""
    with _chosen(study, home, data) as (source, contract, name), opened(source, contract) as extract:
        _, columns = next(extract.batches(), (0, {}))
    if not columns:
        raise ContractError("contract.rows", f"{name} has no rows", remedy="Export it again.")
    x, y = contract.encode(columns)
    places = coordinates(contract)
    shown = min(len(places), PREVIEW_COORDINATES)
    lines = [f"{name}, as the model sees the first {len(x[:PREVIEW_ROWS])} rows"]
    for at in range(shown):
        lines.append(f"  {places[at]:<40} " + "  ".join(f"{value:>8.4f}" for value in x[:PREVIEW_ROWS, at]))
    if shown < len(places):
        lines.append(f"  and {len(places) - shown} more numbers a row")
    classes = [contract.label.said(int(label)) for label in y[:PREVIEW_ROWS]]
    lines.append(f"  {contract.label.name:<40} " + "  ".join(f"{text:>8}" for text in classes))
    rows = np.round(x[:PREVIEW_ROWS], 6).tolist()
    return Outcome("\n".join(lines), {"coordinates": places, "rows": rows, "classes": classes})


def coordinates(contract: Contract) -> list[str]:
    """A name for each number of an encoded row."""
    names: list[str] = []
    for feature in contract.features:
        if feature.width == 1:
            names.append(feature.name)
        elif isinstance(feature, Category) or (isinstance(feature, Events | Text) and feature.form == "bag"):
            codes = feature.vocabulary if isinstance(feature, Text) else feature.codes
            names += [f"{feature.name} = {code}" for code in codes]
        else:
            names += [f"{feature.name} [{at}]" for at in range(feature.width)]
    return names


@contextmanager
def _chosen(study: str, home: Path, data: str) -> Iterator[tuple[DataSource, Contract, str]]:
    """The source, as a file or folder, the contract, and what the source is called."""
    site = SiteHome(home)
    policy = load_policy(site)
    named = data
    if Path(study).suffix == ".toml":
        try:
            contract = Contract.from_toml(Path(study).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{study} cannot be read as text"
            raise UsageError(
                "study.file", problem, remedy="Name a study's TOML file, or a digest."
            ) from error
    else:
        folder = StudyFolder(site)
        manifest, _ = folder.read(bytes.fromhex(folder.resolve(study)))
        contract, named = manifest.study.contract, data or manifest.study.data
    if not named and len(policy.data) == 1:
        named = next(iter(policy.data))
    if not named:
        remedy = f"Give --data with one of {', '.join(policy.data) or 'none'}."
        raise UsageError("site.data", "policy.toml names several sources, or none", remedy=remedy)
    source = policy.source(named)
    if source.patient != contract.patient:
        problem = (
            f"[data.{named}] has the patient column {source.patient!r}, the contract {contract.patient!r}"
        )
        raise ContractError(
            "contract.patient", problem, remedy="Ask the coordinator for a study on that column."
        )
    with local(source, contract, site.copies) as copy:
        yield copy, contract, f"[data.{named}] {source.source}"
