"""``wardround demo``: a whole federation on this machine, real commands in real processes, on real data.

Source: the Wisconsin breast cancer data of scikit-learn, or heart disease at four real hospitals from UCI's
archive (both CC BY 4.0). Rules: every step is a command of the
product, run as a subprocess; 20 % of the rows are set aside first as a public test set that only the demo
owns, and no hospital's rows are scored outside that hospital; everything started is ended, also on Ctrl-C
or an error; ``--seed`` reaches public randomness only (the split), never noise, masks or coins.
"""

import json
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import tomli_w
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.numpy import load as load_safetensors

from common.console import JsonFlag, Outcome, command
from common.contract import Contract
from common.errors import FailureError, UsageError
from common.privacy.filter import noise_for_filter
from common.study import Study
from common.tasks.models.layout import size, state_layout
from server import demo_template, starters
from server.demo_data import HospitalRows, Rows, accuracy, fit_logistic, split_rows
from server.processes import Processes, free_port

app = typer.Typer(help="A whole federation on this machine.", invoke_without_command=True)

NAMES: Final = (
    "St. Mary",
    "Northgate",
    "Riverside",
    "Holy Cross",
    "Eastfield",
    "Lakeside",
    "Old Mill",
    "Parkway",
)
DELTA: Final = 1e-6
SHARED_W: Final = 20.0
STEP_TIMEOUT_S: Final = 60.0
STUDY_TIMEOUT_S: Final = 300.0
PARALLEL: Final = 2


@dataclass(frozen=True, slots=True)
class Site:
    """One hospital of the demo."""

    name: str
    home: Path
    rows: HospitalRows


@app.callback(invoke_without_command=True)
@command
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new folder; default: a temporary one that is named.")
    ] = None,
    hospitals: Annotated[int, typer.Option(min=3, max=8, help="How many hospitals.")] = 4,
    rounds: Annotated[
        int, typer.Option(min=0, max=200, help="Rounds of training; 0: 10, or the template's.")
    ] = 0,
    epsilon: Annotated[float, typer.Option(min=0.1, max=20.0, help="Each hospital's cap for epsilon.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the split of the public data, nothing else.")] = 0,
    data: Annotated[
        Literal["breast-cancer", "heart-disease"],
        typer.Option(help="Split over made-up hospitals, or of four real ones, fetched from UCI's archive."),
    ] = "breast-cancer",
    source: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="heart-disease: where the four files lie, or are put.", file_okay=False
        ),
    ] = None,
    template: Annotated[
        str, typer.Option(help="A template of 'study new --list', on made-up rows, instead of --data.")
    ] = "",
    as_json: JsonFlag = False,
) -> Outcome:
    """Run a federation from nothing to a trained model and say what it cost each hospital in privacy."""
    folder = _folder(out)
    console = Console(stderr=True, quiet=as_json)
    console.print(f"wardround demo in [bold]{folder}[/bold]")
    started = time.monotonic()
    form = tomllib.loads(starters.text(template) if template else _form(data))
    names: Sequence[str] = NAMES
    if template:
        contract = Contract.model_validate(form["contract"])
        patients = int(form["training"]["patients_public"])
        test, parts = demo_template.split(contract, form["model"]["kind"], patients, hospitals, seed)
    elif data == "heart-disease":
        from server import demo_heart

        found = demo_heart.obtain(source or folder / "data")
        console.print(f"data: {demo_heart.LICENCE}; checksums hold")
        test, parts = demo_heart.split(found, seed)
        names = list(found)
    else:
        test, parts = split_rows(hospitals, seed)
    sites = [Site(names[i], folder / "sites" / f"{i + 1}", rows) for i, rows in enumerate(parts)]
    with Processes(folder / "logs") as processes:
        return _run(processes, folder, console, form, test, sites, rounds, epsilon, started)


def _form(data: str) -> str:
    """The study of a demo on real data."""
    name = f"templates/{data.replace('-', '_')}.toml"
    return files("server").joinpath(name).read_text(encoding="utf-8")


def _folder(out: Path | None) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix="wardround-demo-"))
    if out.exists() and any(out.iterdir()):
        raise UsageError("demo.out", f"{out} is not empty", remedy="Name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def _run(
    processes: Processes,
    folder: Path,
    console: Console,
    form: dict[str, Any],
    test: Rows,
    sites: list[Site],
    rounds: int,
    epsilon: float,
    started: float,
) -> Outcome:
    with console.status("making keys, admitting hospitals"):
        _found(processes, folder, sites, form, epsilon)
    study, toml = _study(form, folder, sites, rounds, epsilon)
    with console.status("starting the hub and the agents"):
        _start(processes, folder, sites)
    submitted = processes.json("study", "submit", str(toml), "--as", str(folder / "hub" / "coordinator"))
    digest = str(submitted["digest"])
    with (
        console.status("each hospital reads the study and approves it"),
        ThreadPoolExecutor(max_workers=PARALLEL) as pool,
    ):
        list(pool.map(lambda site: _approve(processes, site, digest), sites))
    history = _watch(processes, folder, console, digest, study.rounds)
    result = _result(processes, folder, sites, study, test, digest, history)
    with console.status("each hospital hands its evidence to an auditor, who verifies it"):
        result |= _audit(processes, folder, sites, result["study"])
    result["seconds"] = round(time.monotonic() - started, 1)
    return Outcome(_summary(console, result, folder), result)


def _found(
    processes: Processes, folder: Path, sites: list[Site], form: dict[str, Any], epsilon: float
) -> None:
    """Make the hub and the hospitals and admit each; policies name the coordinator, the data and the cap."""
    port, data = free_port(), str(form["data"])
    contract = Contract.model_validate(form["contract"])
    shared = form["training"]["mode"] == "shared-noise"
    hub = processes.json("hub", "init", "--home", str(folder / "hub"), "--address", f"127.0.0.1:{port}")

    def make(site: Site) -> None:
        site.home.parent.mkdir(parents=True, exist_ok=True)
        processes.json(
            "site", "init", "--home", str(site.home), "--name", site.name, "--hub", f"127.0.0.1:{port}"
        )
        where = demo_template.source(contract, site.rows, site.home, data)
        policy_path = site.home / "policy.toml"
        policy = tomllib.loads(policy_path.read_text(encoding="utf-8"))
        # Of a shared noise little is left if all others collude; the demo's hospitals do not.
        policy["register"] |= {
            "epsilon_t": epsilon, "epsilon_w": SHARED_W if shared else epsilon, "delta": DELTA
        }  # fmt: skip
        policy["rules"]["coordinators"] = [hub["coordinator_key"]]
        columns = [name for name in site.rows.columns if name != "patient"]
        source = {"source": where, "patient": "patient", "columns": columns}
        if where.startswith("dicom:"):
            source["table"] = str(site.home / f"{data}.csv")
        policy["data"] = {data: source}
        policy_path.write_text(tomli_w.dumps(policy), encoding="utf-8")

    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        list(pool.map(make, sites))
    for site in sites:
        processes.json(
            "hub", "admit", "--home", str(folder / "hub"), str(site.home / "request.json"),
            "--out", str(site.home / "admission.json"),
        )  # fmt: skip


def _study(
    template: dict[str, Any], folder: Path, sites: list[Site], rounds: int, epsilon: float
) -> tuple[Study, Path]:
    """The template with this demo's members, rounds, and the least noise whose whole study fits the cap."""
    template |= {"members": [site.name for site in sites], "consents": []}
    template["aggregation"]["audit"] = "payloads"
    template["training"]["rounds"] = rounds or template["training"]["rounds"]
    patients = sum(len(site.rows.columns["patient"]) for site in sites)
    template["training"]["patients_public"] = max(1, patients // len(sites))
    study = Study.from_toml(tomli_w.dumps(template))
    template["privacy"]["noise_multiplier"] = noise_for_filter(
        epsilon,
        DELTA,
        study.rounds * study.training.steps,
        study.rounds,
        dim=size(state_layout(study)),
        members=len(sites),
    )
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(template), encoding="utf-8")
    return Study.from_toml(path.read_text(encoding="utf-8")), path


def _start(processes: Processes, folder: Path, sites: list[Site]) -> None:
    hub = processes.start("hub", "hub", "run", "--home", str(folder / "hub"), "--json")
    hub.wait_for_line("listening", STEP_TIMEOUT_S)
    for site in sites:
        processes.start(f"site-{site.home.name}", "site", "run", "--home", str(site.home), "--once")


def _approve(processes: Processes, site: Site, digest: str) -> None:
    def arrived() -> bool:
        pending = processes.json("site", "requests", "--home", str(site.home))
        return any(entry["digest"] == digest for entry in pending["studies"])

    _until(arrived, f"the study did not reach {site.name}")
    processes.json(
        "site",
        "approve",
        digest,
        "--home",
        str(site.home),
        "--yes",
        "--fingerprints-compared",
        "--by",
        "demo",
    )


def _until(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise FailureError("demo.timeout", problem, remedy="Read the logs folder.")
        time.sleep(0.3)


def _watch(
    processes: Processes, folder: Path, console: Console, digest: str, rounds: int
) -> list[dict[str, Any]]:
    """Follow the study; one metrics line a completed round."""
    watcher = processes.start(
        "watch", "study", "watch", digest, "--as", str(folder / "hub" / "coordinator"), "--json"
    )
    history: list[dict[str, Any]] = []
    columns = (
        TextColumn("[bold]round"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    last: dict[str, Any] = {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("waiting", total=rounds)
        for line in watcher.lines(STUDY_TIMEOUT_S):
            last = json.loads(line)
            if last["round"] and (not history or history[-1]["round"] != last["round"]):
                history.append({key: last[key] for key in ("round", "cohort", "seconds")})
            progress.update(
                bar,
                completed=last["round"],
                description=f"{last['status']}, {len(last['cohort'])} hospitals in the last round",
            )
    if last.get("status") != "done":
        raise FailureError(
            "demo.study",
            f"the study ended as {last.get('status', 'unknown')!r}: {last.get('detail', '')}",
            remedy=f"Read the logs in {folder / 'logs'}.",
        )
    return history


def _result(
    processes: Processes,
    folder: Path,
    sites: list[Site],
    study: Study,
    test: Rows,
    digest: str,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Score on the public test set; local and pooled references are plain logistic regressions."""
    from server.desk import CoordinatorDesk
    from server.home import CoordinatorHome

    processes.json(
        "study", "export", digest, "--as", str(folder / "hub" / "coordinator"),
        "--out", str(folder / "model.safetensors"),
    )  # fmt: skip
    model = load_safetensors((folder / "model.safetensors").read_bytes())
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        budgets = list(
            pool.map(lambda site: processes.json("site", "budget", "--home", str(site.home)), sites)
        )
    result: dict[str, Any] = {
        "out": str(folder),
        "study": digest,
        "sites": [
            {"name": s.name, "epsilon": b["epsilon_t"], "cap": b["cap_t"]}
            for s, b in zip(sites, budgets, strict=True)
        ],
        "rounds": len(history),
    }
    if study.model.kind != "logistic_regression" or study.evaluation is not None:
        result["test"] = demo_template.score(study, model, test)
        result["results"] = processes.json(
            "study", "results", digest, "--as", str(folder / "hub" / "coordinator")
        )
        return result
    x_test, y_test = study.contract.encode(test.columns)
    with CoordinatorDesk(CoordinatorHome(folder / "hub" / "coordinator")) as desk:
        for entry in history:
            then = load_safetensors(desk.export(digest, entry["round"]))
            entry["accuracy"] = accuracy(then["weight"], then["bias"], x_test, y_test)
    encoded = [study.contract.encode(site.rows.columns) for site in sites]
    local = [accuracy(*fit_logistic(x, y), x_test, y_test) for x, y in encoded]
    pooled = fit_logistic(np.concatenate([x for x, _ in encoded]), np.concatenate([y for _, y in encoded]))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for entry in history:
            file.write(json.dumps(entry, sort_keys=True) + "\n")
    return result | {
        "accuracy": accuracy(model["weight"], model["bias"], x_test, y_test),
        "local_accuracy": dict(zip((s.name for s in sites), local, strict=True)),
        "pooled_accuracy": accuracy(*pooled, x_test, y_test),
    }


def _audit(processes: Processes, folder: Path, sites: list[Site], digest: str) -> dict[str, Any]:
    """Everybody's evidence, verified against the hub's roster, the report over it, and every sum again."""
    trust, report, payloads = (folder / name for name in ("roster.json", "report.html", "payloads.zip"))
    (folder / "evidence").mkdir()
    hub = ("--home", str(folder / "hub"), "--out")
    processes.json("hub", "roster", *hub, str(trust))
    processes.json("hub", "evidence", *hub, str(folder / "evidence" / "hub.zip"))
    files = [str(folder / "evidence" / f"{site.name.replace(' ', '-')}.zip") for site in sites]

    def show(site: Site, file: str) -> None:
        processes.json("site", "evidence", "--home", str(site.home), "--out", file)

    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        list(pool.map(show, sites, files))
    files.insert(0, str(folder / "evidence" / "hub.zip"))
    checked = processes.json("audit", "verify", *files, "--trust", str(trust))
    processes.json("audit", "report", *files, "--trust", str(trust), "--out", str(report))
    processes.json("hub", "payloads", digest, *hub, str(payloads))
    again = processes.json("audit", "recompute", files[0], str(payloads), "--trust", str(trust))
    sums = sum(check["name"] == "sum" for check in again["checks"])
    return {
        "trust": str(trust),
        "evidence": files,
        "report": str(report),
        "checks": len(checked["checks"]),
        "sums": sums,
    }


def _summary(console: Console, result: dict[str, Any], folder: Path) -> str:
    if "test" in result:
        for name, value in result["test"].items():
            console.print(f"on the public test set  {name:<24} {value:.4f}")
        for site in result["sites"]:
            console.print(f"{site['name']:<24} epsilon {site['epsilon']:.3f} of {site['cap']:.1f}")
        return _files(result, folder)
    table = Table(title="Accuracy on the public test set, and what it cost in privacy")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("its ε in the private training / cap", justify="right")
    table.add_row("all hospitals together, private", f"[bold]{result['accuracy']:.3f}[/bold]", "")
    for site in result["sites"]:
        own = result["local_accuracy"][site["name"]]
        table.add_row(
            f"{site['name']} alone, without privacy: stays at home",
            f"{own:.3f}",
            f"{site['epsilon']:.3f} / {site['cap']:.1f}",
        )
    table.add_row("reference: all rows pooled, without privacy", f"{result['pooled_accuracy']:.3f}", "")
    console.print(table)
    return _files(result, folder)


def _files(result: dict[str, Any], folder: Path) -> str:
    return (
        f"model    {folder / 'model.safetensors'}, its card and manifest beside it\n"
        f"evidence {folder / 'evidence'}: {result['checks']} checks hold\n"
        f"payloads {folder / 'payloads.zip'}: {result['sums']} sums computed again, bit for bit\n"
        f"report   {folder / 'report.html'}\n"
        f"seconds  {result['seconds']}"
    )
