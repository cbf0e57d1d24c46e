"""A federation in a folder for end-to-end tests and benchmarks: real commands, real processes, real files.

Setup that is not under test (keys, admission) is done by the same functions that the commands call; the hub,
the agents and every decision are processes of the real command line.
"""

import json
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from safetensors.numpy import load

from client.identity import create_site
from client.state import SiteHome
from server.enrolment import admit_site, create_hub
from server.home import HubHome
from server.processes import Processes, Running, free_port

NAMES = ("St. Mary", "Northgate", "Riverside", "Holy Cross", "Eastfield")
TIMEOUT_S = 60.0


def small_study(members: list[str], **changes: Any) -> dict[str, Any]:
    """A study of two public-range features; ``changes`` are dotted paths with ``__`` for the dot."""
    study: dict[str, Any] = {
        "name": "small",
        "purpose": "A small study for tests.",
        "legal_basis": "synthetic data",
        "contact": "tests",
        "expires": "2099-12-31T23:59Z",
        "members": members,
        "consents": [],
        "data": "extract",
        "model": {"kind": "logistic_regression"},
        "training": {
            "mode": "local",
            "rounds": 3,
            "steps": 1,
            "learning_rate": 1.0,
            "sampling": "full",
            "sampling_rate": 1.0,
            "patients_public": 20,
            "engine": "opacus",
            "server": {"strategy": "fedavg"},
        },
        "privacy": {
            "kind": "dp",
            "clip_norm": 1.0,
            "grid_step": 0.001,
            "noise_multiplier": 8.0,
            "max_patients": 1000,
            "arithmetic": "f64_bounded",
        },
        "aggregation": {
            "upload_s": 20,
            "deadline_s": 40,
            "state_norm_bound": 100.0,
            "codec": {"bits": 32, "step": 0.00001, "range": 100.0, "rounding": "nearest"},
        },
        "contract": {
            "patient": "patient",
            "features": [
                {"kind": "number", "name": "age", "unit": "a", "minimum": 0.0, "maximum": 100.0},
                {"kind": "number", "name": "bmi", "unit": "kg/m2", "minimum": 10.0, "maximum": 50.0},
            ],
            "label": {"name": "readmitted", "classes": ["no", "yes"]},
        },
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = study
        for parent in parents:
            inner = inner[parent]
        if value is None:
            inner.pop(last)
        else:
            inner[last] = value
    return study


def source_of(path: Path) -> dict[str, Any]:
    """What a policy says of an extract for the small study."""
    return {"source": f"csv:{path}", "patient": "patient", "columns": ["age", "bmi", "readmitted"]}


def contribution(
    site: int, state: bytes = b"", rows: list[tuple[str, float, float, str]] | None = None
) -> NDArray[np.float64]:
    """Minus the sum of a hospital's gradients in the small study, each clipped to 1: weights, then biases.

    ``state`` is a model file, zeros without one; ``rows`` are the hospital's without them.
    """
    tensors = load(state) if state else {"weight": np.zeros((2, 2)), "bias": np.zeros(2)}
    weight, bias = tensors["weight"].astype(float), tensors["bias"].astype(float)
    total = np.zeros(6)
    for _, age, bmi, readmitted in extract_rows(site) if rows is None else rows:
        x = np.clip([2 * age / 100 - 1, 2 * (bmi - 10) / 40 - 1], -1, 1)
        logits = weight @ x + bias
        shares = np.exp(logits - logits.max())
        error = shares / shares.sum() - np.eye(2)[["no", "yes"].index(readmitted)]
        gradient = np.concatenate([np.outer(error, x).ravel(), error])
        total -= gradient * min(1.0, 1.0 / np.linalg.norm(gradient))
    return total


def extract_rows(site: int, patients: int = 20) -> list[tuple[str, float, float, str]]:
    """Rows of one hospital: (patient, age, bmi, readmitted), the same for the same site."""
    generator = np.random.default_rng(site)
    rows = []
    for index in range(patients):
        age, bmi = generator.uniform(20, 90), generator.uniform(18, 42)
        rows.append((f"s{site}p{index}", round(age, 3), round(bmi, 3), "yes" if age + bmi > 85 else "no"))
    return rows


@dataclass
class Federation:
    """Hub and sites under ``folder``; ``processes`` ends what it starts."""

    folder: Path
    processes: Processes
    hospitals: int = 3
    epsilon: float = 3.0
    rules: dict[str, Any] = field(default_factory=dict)
    patients: int = 20

    def __post_init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        now = datetime.now(UTC)
        self.hub_home = HubHome(self.folder / "hub")
        made = create_hub(self.hub_home, address=self.address, listen=self.address, now=now)
        more = (f"Hospital {number}" for number in range(len(NAMES) + 1, self.hospitals + 1))
        self.names = [*NAMES, *more][: self.hospitals]
        self.sites = [SiteHome(self.folder / f"site{i + 1}") for i in range(self.hospitals)]
        for number, (home, name) in enumerate(zip(self.sites, self.names, strict=True), start=1):
            request = create_site(home, name=name, hub=self.address)
            admission = admit_site(self.hub_home, request.to_bytes(), now=now)
            home.admission.write_bytes(admission.to_bytes())
            self.write_extract(number)
            self.edit_policy(
                number,
                register={"epsilon_t": self.epsilon, "epsilon_w": self.epsilon},
                rules={"coordinators": [made.coordinator_key], **self.rules},
                data={"extract": source_of(home.folder / "extract.csv")},
            )
        self.coordinator = str(self.hub_home.coordinator)

    def write_extract(self, number: int) -> None:
        """Write a site's extract."""
        lines = ["patient,age,bmi,readmitted"]
        lines += [",".join(map(str, row)) for row in extract_rows(number, self.patients)]
        (self.sites[number - 1].folder / "extract.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def edit_policy(self, number: int, **tables: dict[str, Any]) -> None:
        """Change tables of a site's policy.toml as a person would."""
        path = self.sites[number - 1].policy
        policy = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, values in tables.items():
            policy.setdefault(name, {}).update(values)
        path.write_text(tomli_w.dumps(policy), encoding="utf-8")

    def start_hub(self) -> Running:
        """``hub run``, listening."""
        hub = self.processes.start("hub", "hub", "run", "--home", str(self.hub_home.folder), "--json")
        hub.wait_for_line("listening", TIMEOUT_S)
        return hub

    def start_site(self, number: int, *, once: bool = True) -> Running:
        """``site run`` of one site."""
        options = ["--once"] if once else []
        home = str(self.sites[number - 1].folder)
        return self.processes.start(f"site{number}", "site", "run", "--home", home, *options)

    def start(self) -> list[Running]:
        """The hub and all agents."""
        self.start_hub()
        return [self.start_site(number) for number in range(1, self.hospitals + 1)]

    def submit(self, study: dict[str, Any]) -> str:
        """``study submit``; the digest."""
        path = self.folder / f"{study['name']}.toml"
        path.write_text(tomli_w.dumps(study), encoding="utf-8")
        return str(self.processes.json("study", "submit", str(path), "--as", self.coordinator)["digest"])

    def wait_for_offer(self, number: int, digest: str) -> None:
        """Wait until a site has received a study."""
        path = self.sites[number - 1].study(digest)
        self.wait(path.exists, f"site {number} never received the study")

    def wait(self, condition: Any, problem: str, timeout_s: float = TIMEOUT_S) -> None:
        """Poll a condition; bounded."""
        import time

        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, problem
            time.sleep(0.05)

    def approve(self, number: int, digest: str) -> dict[str, Any]:
        """``site approve`` by a person who says yes."""
        self.wait_for_offer(number, digest)
        home = str(self.sites[number - 1].folder)
        return self.processes.json(
            "site", "approve", digest, "--home", home, "--yes", "--fingerprints-compared", "--by", "a tester"
        )

    def approve_all(self, digest: str) -> None:
        """Every site approves."""
        for number in range(1, self.hospitals + 1):
            self.approve(number, digest)

    def watch(self, digest: str, timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """``study watch --json`` to the end: its events."""
        watcher = self.processes.start("watch", "study", "watch", digest, "--as", self.coordinator, "--json")
        return [json.loads(line) for line in watcher.lines(timeout_s)]

    def log(self, name: str) -> str:
        """The standard error of a process so far."""
        return (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8")

    def budget(self, number: int) -> dict[str, Any]:
        """``site budget``."""
        return self.processes.json("site", "budget", "--home", str(self.sites[number - 1].folder))
