"""OMOP features of a hundred thousand persons from a real PostgreSQL, as a round's first load makes them."""

import shutil
import tempfile
import time
from pathlib import Path

from client.snapshot import local
from client.sources.extract import load_table
from client.sources.source import DataSource
from tests.bench.result import Result
from tests.client.sources import postgres
from tests.client.sources.cdm import TABLES
from tests.client.sources.test_omop import CONTRACT

PERSONS = 100_000
# A person's records: measurements, conditions, drugs, visits.
ROWS = f"""
INSERT INTO cdm.cohort SELECT 17, i, '2020-06-15', '2020-06-15' FROM generate_series(1, {PERSONS}) i;
INSERT INTO cdm.person SELECT i, 8507 + 25 * (i %% 2), 1930 + i %% 70, 1 + i %% 12, 1 + i %% 28 FROM generate_series(1, {PERSONS}) i;
INSERT INTO cdm.measurement SELECT 1 + i %% {PERSONS}, (ARRAY[3004501, 3000963, 3027018])[1 + i %% 3],
    date '2019-06-15' + i %% 500, NULL, 50 + i %% 100, 8840, 'mg/dL' FROM generate_series(1, 10 * {PERSONS}) i;
INSERT INTO cdm.condition_occurrence SELECT 1 + i %% {PERSONS}, (ARRAY[320128, 201826, 1])[1 + i %% 3],
    date '2019-06-15' + i %% 500, NULL FROM generate_series(1, 5 * {PERSONS}) i;
INSERT INTO cdm.drug_exposure SELECT 1 + i %% {PERSONS}, 1503297, date '2020-06-15' + i %% 300, NULL FROM generate_series(1, 3 * {PERSONS}) i;
INSERT INTO cdm.visit_occurrence SELECT 1 + i %% {PERSONS}, 9201, date '2019-06-15' + i %% 500, NULL FROM generate_series(1, 3 * {PERSONS}) i;
"""


def run() -> list[Result]:
    if postgres.installed() is None:
        return []
    folder = Path(tempfile.mkdtemp())
    try:
        with postgres.cluster() as server:
            made = [f"CREATE TABLE cdm.{name} ({columns})" for name, columns in TABLES.items()]
            indexes = [f"CREATE INDEX ON cdm.{name} (person_id)" for name in TABLES if name != "cohort"]
            server.run("CREATE SCHEMA cdm", *made, *filter(str.strip, ROWS.split(";")), *indexes, "ANALYZE",
                       "GRANT USAGE ON SCHEMA cdm TO reader", "GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO reader")  # fmt: skip
            password = server.password_file(folder)
            source = DataSource(
                source=f"omop:{server.address}",
                patient="person",
                cohort="17",
                table="cdm",
                password_file=password,
            )
            started = time.perf_counter()
            with local(source, CONTRACT, folder / "copies") as copy:
                table = load_table(copy, CONTRACT, key=bytes(32))
            took = time.perf_counter() - started
        if table.patients != PERSONS:
            raise RuntimeError("not every person has a row")
    finally:
        shutil.rmtree(folder)
    return [Result("data.OMOP features of 10^5 persons on PostgreSQL", took, "s", 30)]
