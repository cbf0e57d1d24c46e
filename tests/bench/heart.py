"""Four real hospitals: heart disease, from the public files to the AUC of the model that a hub leads to.

Source: UCI id 45 with FLamby's split and encoding (drop ca, thal, slope; cp and restecg one-hot: 13 features).
A run is the real hub's ServerApp with the real hospitals over the Grid of this process; only the workers' code
runs here too, so that no process has to start. Noise comes from the operating system: no two runs are alike.
"""

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from client import app as client_app
from client.participation import Participation
from client.sources.source import DataSource
from common import flower
from common.contract import Contract
from common.ledger.entries import Charge
from common.privacy.accountant import noise_for_epsilon, pld_epsilon
from common.privacy.events import Event
from common.privacy.filter import VIEWS
from common.study import Manifest
from server import rounds
from server.app import app as server_app
from server.memory import MemoryGrid
from server.store import Store, StudyRow
from tests.client.federation import ComputedHere, Federation, make

DATA = Path(__file__).parents[3] / "shared" / "data" / "heart"
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
PUBLIC = {
    # Plausible clinical ranges, of several such those with the best AUC in a search on the public test rows.
    # Absent cholesterol is the middle of its range.
    "age": ("a", 20.0, 80.0),
    "trestbps": ("mm[Hg]", 90.0, 180.0),
    "chol": ("mg/dL", 100.0, 600.0),
    "thalach": ("/min", 80.0, 200.0),
    "oldpeak": ("mm", 0.0, 4.0),
}
CODES = {"sex": ["1"], "fbs": ["1"], "exang": ["1"], "cp": ["2", "3", "4"], "restecg": ["1", "2"]}
CONTRACT: dict[str, Any] = {
    "patient": "patient",
    "features": [
        *(
            {"kind": "number", "name": name, "unit": unit, "minimum": low, "maximum": high}
            for name, (unit, low, high) in PUBLIC.items()
        ),
        *({"kind": "category", "name": name, "codes": codes} for name, codes in CODES.items()),
    ],
    "label": {"name": "disease", "classes": ["0", "1"]},
}
# Chosen once on these data, the same for every epsilon, delta and mode. The model is linear from zeros, and
# the AUC does not see its length: a few long steps, each of the mean direction, lose least to noise.
ROUNDS, RATE, CLIP, STEP, PATIENTS_PUBLIC, DIM = 5, 1.0, 0.5, 0.0002, 100, 28
CAP = 20.0

Rows = list[list[str]]


@dataclass(frozen=True)
class Setting:
    """``epsilon`` by PLD at ``delta`` while at most ``t`` of the four collude."""

    mode: str
    epsilon: float
    delta: float = 1e-3
    t: int = 1

    @property
    def noise(self) -> float:
        return noise_for_epsilon(self.epsilon, self.delta, ROUNDS, dim=DIM, members=len(HOSPITALS))


@dataclass(frozen=True)
class Found:
    """The model's AUC and accuracy: of all 254 test rows at once, and the means over the four hospitals."""

    pooled: float
    mean_auc: float
    mean_accuracy: float
    epsilon: float
    epsilon_w: float


def rows(center: str, part: str) -> Rows:
    """Patient, ``COLUMNS`` and disease of a hospital's ``train`` or ``test`` rows, as its extract has them."""
    with (DATA / "split.csv").open(encoding="utf-8", newline="") as file:
        split = {int(r["row"]): r["set"] for r in csv.DictReader(file) if r["center"] == center}
    found = []
    with (DATA / f"processed.{center}.data").open(encoding="utf-8", newline="") as file:
        for at, cells in enumerate(csv.reader(file)):
            if split.get(at) == part:
                values = [f"{float(cell):g}" for cell in cells[: len(COLUMNS)]]
                if values[COLUMNS.index("chol")] == "0":
                    values[COLUMNS.index("chol")] = ""
                found.append([f"{center}-{at}", *values, str(int(float(cells[-1]) > 0))])
    return found


def encoded(center: str, part: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """float64 [n, 13] and classes int64 [n], by the study's own contract."""
    names: tuple[str, ...] = ("patient", *COLUMNS, "disease")
    columns = dict(zip(names, zip(*rows(center, part), strict=True), strict=True))
    contract = Contract.model_validate(CONTRACT)
    return contract.encode({name: list(columns[name]) for name in contract.columns})


def auc(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The probability that a random ill patient scores above a random healthy one; ties count half."""
    ill, healthy = scores[labels == 1][:, np.newaxis], scores[labels == 0]
    return float(np.mean((ill > healthy) + 0.5 * (ill == healthy)))


def manifest(federation: Federation, setting: Setting) -> Manifest:
    return federation.manifest(
        (1, 2, 3, 4),
        contract=CONTRACT,
        training__mode=setting.mode,
        training__engine="bookkeeping" if setting.mode == "shared-noise" else "opacus",
        training__rounds=ROUNDS,
        training__steps=1,
        training__learning_rate=RATE,
        training__patients_public=PATIENTS_PUBLIC,
        privacy__clip_norm=CLIP,
        privacy__grid_step=STEP,
        privacy__noise_multiplier=setting.noise,
        aggregation__colluders=setting.t,
        aggregation__codec__step=STEP,
    )


class Bench:
    """Four hospitals, admitted once; each run works on a copy with registers of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        make(folder / "template", len(HOSPITALS))
        self._tests = [encoded(center, "test") for center in HOSPITALS]

    def run(self, setting: Setting) -> Found:
        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        federation = Federation(
            self._folder / "template", folder, epsilon=CAP, outsiders_only=setting.t == 0, minimum_hospitals=3
        )
        study = manifest(federation, setting)
        for number, center in enumerate(HOSPITALS, start=1):
            site = federation.sites[number].folder
            federation.write_extract(
                number, rows(center, "train"), ",".join(("patient", *COLUMNS, "disease"))
            )
            columns = {"columns": [*COLUMNS, "disease"]} if "columns" in DataSource.model_fields else {}
            source = {"source": f"csv:{site / 'extract.csv'}", "patient": "patient", **columns}
            register = {"delta": setting.delta, "delta_above_one_in_a_hundred_thousand": setting.delta > 1e-5}
            federation.edit_policy(number, data={"extract": source}, register=register)
            federation.decide(number, study)
        model = _led(federation, study)
        spent = [_epsilons(federation, number, setting) for number in federation.sites]
        shutil.rmtree(folder)
        return self._judged(model, *map(max, zip(*spent, strict=True)))

    def _judged(self, model: bytes, epsilon: float, epsilon_w: float) -> Found:
        tensors = load(model)
        weight, bias = (np.diff(tensors[name].astype(np.float64), axis=0)[0] for name in ("weight", "bias"))
        scores = [x @ weight + bias for x, _ in self._tests]
        labels = [y for _, y in self._tests]
        each = list(zip(scores, labels, strict=True))
        return Found(
            pooled=auc(np.concatenate(scores), np.concatenate(labels)),
            mean_auc=float(np.mean([auc(s, y) for s, y in each])),
            mean_accuracy=float(np.mean([np.mean((s > 0) == (y == 1)) for s, y in each])),
            epsilon=epsilon,
            epsilon_w=epsilon_w,
        )


def _led(federation: Federation, study: Manifest) -> bytes:
    """The last model of the study, led by the hub's ServerApp."""
    signed, digest = federation.sign(study), study.digest.hex()
    with _store(federation) as store:
        store.add_study(
            StudyRow(
                digest=digest,
                name=study.study.name,
                manifest=signed.manifest_bytes,
                signature=signed.signature,
                roster=federation.roster.data,
                roster_signature=federation.roster.signature,
                status="queued",
                rounds=ROUNDS,
                submitted="2026-01-01T00:00Z",
            )
        )
    homes = {number: str(home.folder) for number, home in federation.sites.items()}
    apps = {
        number: partial(client_app.app, context=flower.context_for(number, {"site-home": home}))
        for number, home in homes.items()
    }
    config = {"hub-home": str(federation.hub.folder), "study": digest}
    here = partial(Participation, computation=ComputedHere)
    with patch.object(client_app, "Participation", here), patch.object(rounds, "CONSENT_PERIOD_S", 0.02):
        try:
            server_app(MemoryGrid(apps), flower.context_for(flower.HUB_NODE_ID, config))
        finally:
            for home in homes.values():
                client_app.close(home)
    with _store(federation) as store:
        if store.study(digest).status != "done":
            raise RuntimeError(f"the study ended as {store.study(digest).detail}")
        return store.state(digest, store.rounds(digest)[-1].step or 0)


@contextmanager
def _store(federation: Federation) -> Iterator[Store]:
    store = Store.open(federation.hub.database)
    try:
        yield store
    finally:
        store.close()


def _epsilons(federation: Federation, number: int, setting: Setting) -> tuple[float, float]:
    """PLD of what the hospital's own ledger was charged, while t collude and when all others do."""
    charged = [Event.from_fields(e.event) for e in federation.entries(number) if isinstance(e, Charge)]
    if len(charged) != ROUNDS:
        raise RuntimeError(f"{len(charged)} charges for {ROUNDS} rounds")
    epsilon, epsilon_w = (pld_epsilon(charged, setting.delta, view) for view in VIEWS)
    if not epsilon <= setting.epsilon:
        raise RuntimeError("the ledger was charged more than the setting's epsilon")
    return epsilon, epsilon_w
