"""Hospital data: a million rows checked, loaded and trained on from disk, and each further kind of source.

Each figure comes from a process of its own, so that its memory is its own.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from client.sources.extract import load_table
from client.sources.source import DataSource
from client.sources.table import Table
from common.admissible import check
from common.contract import Contract
from common.identity import key_text
from common.study import Manifest, Party, Study
from tests.bench.result import Result
from tests.federation import small_study

ROWS = 1_000_000
FEATURES = 50
ALTERNATIONS = 5
STEPS = 10
TIMEOUT_S = 600
KINDS = ("omop", "fhir", "dicom")
STUDY = small_study(
    ["a", "b", "c"],
    contract={
        "patient": "patient",
        "features": [
            {"kind": "number", "name": f"v{i}", "unit": "1", "minimum": 0.0, "maximum": 1.0}
            for i in range(FEATURES)
        ],
        "label": {"name": "label", "classes": ["0", "1"]},
    },
    model={"kind": "mlp", "hidden": [64, 32]},
    training__steps=STEPS,
    training__sampling="poisson",
    training__sampling_rate=0.01,
    training__patients_public=ROWS,
    training__engine="bookkeeping",
    privacy__noise_multiplier=50.0,
    privacy__grid_step=1e-4,
    privacy__max_patients=2 * ROWS,
    privacy__arithmetic="f32_assumed",
)


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "million.parquet"
        columns = ", ".join(f"random() AS v{i}" for i in range(FEATURES))
        duckdb.sql(
            f"COPY (SELECT 'p' || range AS patient, {columns}, CAST(random() < 0.5 AS INTEGER) AS label "
            f"FROM range({ROWS})) TO '{file}' (FORMAT parquet)"
        )
        checked, loaded, trained = (_apart(part, file) for part in ("checked", "loaded", "trained"))
    results = [
        Result("data.contract check of 10^6 x 50 Parquet", checked["seconds"], "s", 5),
        Result("data.contract check, memory at its highest", checked["mib"], "MiB", 1024),
        Result("data.first batch of 10^6 x 50 Parquet", loaded["seconds"], "s", 2),
        Result("data.first batch, memory at its highest with mapped pages", loaded["mib"], "MiB"),
        Result("data.MLP training from disk over from memory", trained["ratio"], "", at_least=0.8),
        Result("data.MLP training from disk", trained["rows_a_second"], "rows/s"),
    ]
    for kind in KINDS:
        results += importlib.import_module(f"tests.bench.data_{kind}").run()
    return results


def _apart(part: str, file: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.data", part, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _source(file: Path) -> DataSource:
    contract = Contract.model_validate(STUDY["contract"])
    return DataSource(source=f"parquet:{file}", patient="patient", columns=list(contract.columns))


def _mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def checked(file: Path) -> dict[str, Any]:
    """The whole of ``site data check`` but its page."""
    from client.quality import check as quality

    started = time.perf_counter()
    quality(_source(file), Contract.model_validate(STUDY["contract"]))
    return {"seconds": time.perf_counter() - started, "mib": _mib()}


def loaded(file: Path) -> dict[str, Any]:
    """All rows encoded and one batch of patients taken from them."""
    started = time.perf_counter()
    table = _table(file)
    batch = table.x[np.random.default_rng(0).random(len(table.x)) < 0.01]
    if not 5_000 < len(batch) < 15_000:
        raise RuntimeError("the batch has another size than it should")
    return {"seconds": time.perf_counter() - started, "mib": _mib()}


def _table(file: Path) -> Table:
    return load_table(_source(file), Contract.model_validate(STUDY["contract"]), key=bytes(32))


def trained(file: Path) -> dict[str, Any]:
    """Private training on the rows where they lie, and on a copy in memory, by turns."""
    from common.tasks.models import initial_state
    from common.tasks.training import train_local

    table = _table(file)
    if not isinstance(_base(table.x), np.memmap):
        raise RuntimeError("the rows do not lie on disk")
    study = Study.model_validate(STUDY)
    manifest = Manifest(
        schema=1,
        run="00" * 16,
        roster="00" * 32,
        hub=key_text(b"\x09" + bytes(31)),
        coordinator=key_text(b"\x0a" + bytes(31)),
        members=tuple(Party(id=i, name=name) for i, name in enumerate(study.members, 1)),
        study=study,
    )
    places = {"disk": table.x, "memory": np.array(table.x)}
    took = dict.fromkeys(places, 0.0)
    for _ in range(ALTERNATIONS):
        for place, x in places.items():
            gate = check(manifest, None).gate(os.urandom)
            started = time.perf_counter()
            state = initial_state(manifest)
            train_local(state, x, table.y, table.patient_index, study, gate, lambda _done, _steps: None)  # type: ignore[arg-type]
            took[place] += time.perf_counter() - started
    rows = 0.01 * ROWS * STEPS * ALTERNATIONS
    return {"ratio": took["memory"] / took["disk"], "rows_a_second": rows / took["disk"]}


def _base(array: Any) -> Any:
    while not isinstance(array, np.memmap) and array.base is not None:
        array = array.base
    return array


if __name__ == "__main__":
    json.dump(
        {"checked": checked, "loaded": loaded, "trained": trained}[sys.argv[1]](Path(sys.argv[2])), sys.stdout
    )
