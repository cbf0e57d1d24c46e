"""A hundred thousand FHIR observations of ten thousand patients, from NDJSON to the table of training."""

import json
import tempfile
import time
from pathlib import Path

from client.sources.extract import load_table
from tests.bench.result import Result
from tests.client.sources.test_fhir import CONTRACT, GLUCOSE, SYSTOLIC, observation, patient, source

OBSERVATIONS = 100_000
PATIENTS = 10_000


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bulk"
        folder.mkdir()
        with (folder / "Patient.ndjson").open("w") as file:
            file.writelines(json.dumps(patient(f"p{i}")) + "\n" for i in range(PATIENTS))
        with (folder / "Observation.ndjson").open("w") as file:
            for i in range(OBSERVATIONS):
                day = f"2020-{1 + i % 6:02}-{1 + i % 28:02}T08:00:00Z"
                one = observation(f"Patient/p{i % PATIENTS}", day, (GLUCOSE, SYSTOLIC)[i % 2], 50.0 + i % 100)
                file.write(
                    json.dumps(one | {"id": f"o{i}", "note": [{"text": "as exports have it " * 10}]}) + "\n"
                )
        held = source(folder, [(f"p{i}", "2020-06-15") for i in range(PATIENTS)])
        started = time.perf_counter()
        table = load_table(held, CONTRACT, key=bytes(32))
        took = time.perf_counter() - started
        if table.patients != PATIENTS:
            raise RuntimeError("not every patient has a row")
    return [Result("data.FHIR, 10^5 observations to a table", took, "s", 5)]
