"""A small OMOP common data model for tests: rows in memory, as PostgreSQL, a DuckDB file or Parquet files."""

from pathlib import Path
from typing import Any, Final

import duckdb

Row = tuple[Any, ...]
Cdm = dict[str, list[Row]]

TABLES: Final = {
    "cohort": "cohort_definition_id integer, subject_id bigint, cohort_start_date date, cohort_end_date date",
    "person": "person_id bigint, gender_concept_id integer, year_of_birth integer, month_of_birth integer, "
    "day_of_birth integer",
    "measurement": "person_id bigint, measurement_concept_id integer, measurement_date date, "
    "measurement_datetime timestamp, value_as_number numeric, unit_concept_id integer, unit_source_value varchar(50)",
    "condition_occurrence": "person_id bigint, condition_concept_id integer, condition_start_date date, "
    "condition_start_datetime timestamp",
    "drug_exposure": "person_id bigint, drug_concept_id integer, drug_exposure_start_date date, "
    "drug_exposure_start_datetime timestamp",
    "visit_occurrence": "person_id bigint, visit_concept_id integer, visit_start_date date, visit_start_datetime timestamp",
}


def statements(cdm: Cdm, schema: str = "") -> list[str]:
    """SQL that makes the tables and their rows."""
    made = []
    for table, columns in TABLES.items():
        made.append(f"CREATE TABLE {schema}{table} ({columns})")
        rows = ", ".join(f"({', '.join(map(_literal, row))})" for row in cdm.get(table, []))
        if rows:
            made.append(f"INSERT INTO {schema}{table} VALUES {rows}")
    return made


def duckdb_file(path: Path, cdm: Cdm) -> Path:
    with duckdb.connect(str(path)) as connection:
        for statement in statements(cdm):
            connection.execute(statement)
    return path


def parquet_folder(path: Path, cdm: Cdm) -> Path:
    path.mkdir()
    with duckdb.connect(":memory:") as connection:
        for statement in statements(cdm):
            connection.execute(statement)
        for table in TABLES:
            connection.execute(f"COPY {table} TO '{path}/{table}.parquet' (FORMAT parquet)")
    return path


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


def event(person: int, concept: int, day: str, time: str | None = None, *more: Any) -> Row:
    """A row of a table of events."""
    return (person, concept, day, None if time is None else f"{day} {time}", *more)


def cohort(*members: tuple[int, str], number: int = 17) -> list[Row]:
    return [(number, person, day, day) for person, day in members]


def without(cdm: Cdm, person: int) -> Cdm:
    """The same data without one person's rows."""
    place = {"cohort": 1}
    return {table: [row for row in rows if row[place.get(table, 0)] != person] for table, rows in cdm.items()}
