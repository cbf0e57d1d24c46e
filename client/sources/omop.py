"""An OMOP common data model: the members of one cohort and what a contract derives for each, as ``extract``.

Source: OMOP CDM 5.4 (tables cohort, person, measurement, condition_occurrence, drug_exposure,
visit_occurrence); the SQL is in ``sql/``, in words that PostgreSQL and DuckDB share. Rules:
one row a member and index date; each column depends on that patient's records alone; only what the contract
names of the cohort is read; a value whose unit is not known is absent. A concept counts as itself: its
descendants are those that the contract lists.
"""

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Final

import duckdb
import sqlalchemy as sa

from client.sources import databases
from client.sources.derived import check_derived, make_extract
from client.sources.engine import execute, identifier, quoted, regular_file
from client.sources.source import DataSource
from common.contract import Contract
from common.errors import ContractError

REMEDY: Final = "Check that the tables are those of OMOP CDM 5.4, and that they can be read."
_TABLES: Final = {
    "condition": ("condition_occurrence", "condition_start_date", "condition_concept_id"),
    "drug": ("drug_exposure", "drug_exposure_start_date", "drug_concept_id"),
    "measurement": ("measurement", "measurement_date", "measurement_concept_id"),
    "visit": ("visit_occurrence", "visit_start_date", "visit_concept_id"),
}
"""Each kind of record: its table, and the columns of its date and concept."""

_MEASURED: Final = {
    "value": "e.value_as_number",
    "unit_concept": "e.unit_concept_id",
    "unit": "e.unit_source_value",
}
NONE: Final = -1
"""A concept that no record has."""

# Concepts of the unit vocabulary as UCUM writes them; one that is not here is known by its source text only.
_UNITS: Final = {
    8840: "mg/dL", 8753: "mmol/L", 8554: "%", 8713: "g/dL", 8636: "g/L", 8751: "mg/L", 8859: "ug/mL",
    8837: "ug/dL", 8748: "ug/L", 8842: "ng/mL", 8845: "pg/mL", 8749: "umol/L", 8736: "nmol/L", 9557: "meq/L",
    9529: "kg", 8504: "g", 9546: "m", 8582: "cm", 586323: "Cel", 9289: "[degF]", 8876: "mm[Hg]", 8505: "h",
    8550: "min", 8555: "s", 8511: "wk",
}  # fmt: skip
_CASES: Final = " ".join(f"WHEN '{concept}' THEN {quoted(unit)}" for concept, unit in _UNITS.items())


def fill(connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract) -> None:
    """Make ``extract``: the patient column, the contract's derived columns and the index date.

    Raises: ContractError; FailureError when a database cannot be reached or drops.
    """
    if not (source.cohort.isascii() and source.cohort.isdigit()):
        problem = f"{source.where}: the policy names no cohort by its number"
        remedy = "Add cohort to this source in policy.toml: the cohort_definition_id of the table cohort."
        raise ContractError("source.cohort", problem, remedy=remedy)
    check_derived(source, contract)
    domains = sorted({derived.what for derived in contract.derived.values()} & _TABLES.keys())
    tables = {"cohort": "cohort", "person": "person"} | {domain: _TABLES[domain][0] for domain in domains}
    queries = {name: _query(name, source, contract) for name in tables}
    if source.on_server:
        databases.read(
            source, lambda opened: _from_server(connection, source, queries, tables.values(), opened)
        )
    elif source.path.is_dir():
        _from_folder(connection, source, queries, tables.values())
    else:
        _from_file(connection, source, queries)
    for domain in domains:
        # A row is a record; its unit by the vocabulary where that has one.
        query = (
            f"CREATE OR REPLACE TABLE staged_{domain} AS "
            "SELECT rowid AS record, * EXCLUDE (unit_concept, unit), "
            f"CASE unit_concept {_CASES} ELSE unit END AS unit FROM staged_{domain}"
        )
        execute(connection, query, what=source.where, remedy=REMEDY)
    make_extract(connection, source, contract, REMEDY)


def _query(name: str, source: DataSource, contract: Contract) -> str:
    """The SQL that reads one table: digits and the contract's integers are all that is put into it."""
    if name not in _TABLES:
        return _sql(name).format(cohort=int(source.cohort))
    table, date, concept = _TABLES[name]
    wanted = [derived for derived in contract.derived.values() if derived.what == name]
    concepts = sorted({NONE, *(concept for derived in wanted for concept in derived.omop)})
    measured = _MEASURED if name == "measurement" else dict.fromkeys(_MEASURED, "NULL")
    return _sql("records").format(
        cohort=int(source.cohort),
        table=table,
        date=date,
        concept=concept,
        every=int(not all(derived.omop for derived in wanted)),
        concepts=", ".join(map(str, concepts)),
        first=min((derived.days[0] for derived in wanted), default=0),
        last=max((derived.days[1] for derived in wanted), default=0),
        **measured,
    )


def _from_server(
    connection: duckdb.DuckDBPyConnection,
    source: DataSource,
    queries: Mapping[str, str],
    tables: Iterable[str],
    opened: sa.Connection,
) -> None:
    if opened.dialect.name != "postgresql":
        remedy = "Offer OMOP data in PostgreSQL, a DuckDB file or a folder of Parquet files."
        raise ContractError(
            "source.address", f"{source.where}: no OMOP data can be read there", remedy=remedy
        )
    if source.table:
        opened.execute(sa.text(f"SET search_path = {', '.join(map(identifier, source.table.split(',')))}"))
    databases.check_account(opened, source.where, tables)
    for name, query in queries.items():
        databases.copy(opened, sa.text(query), connection, f"staged_{name}", what=f"{source.where}: {name}")


def _from_folder(
    connection: duckdb.DuckDBPyConnection,
    source: DataSource,
    queries: Mapping[str, str],
    tables: Iterable[str],
) -> None:
    for table in tables:
        file = regular_file(source.path / f"{table}.parquet")
        made = f"CREATE VIEW {table} AS FROM read_parquet({quoted(str(file))}, hive_partitioning = false)"
        execute(connection, made, what=str(file), remedy=REMEDY)
    _stage(connection, source, queries)
    for table in tables:
        connection.execute(f"DROP VIEW {table}")


def _from_file(connection: duckdb.DuckDBPyConnection, source: DataSource, queries: Mapping[str, str]) -> None:
    held = f"ATTACH {quoted(str(source.path.resolve()))} AS held (READ_ONLY)"
    execute(connection, held, what=source.where, remedy=REMEDY)
    places = ",".join(f"held.{identifier(name)}" for name in (source.table or "main").split(","))
    execute(connection, f"SET search_path = {quoted(places)}", what=source.where, remedy=REMEDY)
    _stage(connection, source, queries)
    connection.execute("USE memory.main; DETACH held")


def _stage(connection: duckdb.DuckDBPyConnection, source: DataSource, queries: Mapping[str, str]) -> None:
    for name, query in queries.items():
        made = f"CREATE TABLE memory.main.staged_{name} AS {query}"
        execute(connection, made, what=f"{source.where}: {name}", remedy=REMEDY)


def _sql(name: str) -> str:
    return resources.files("client.sources").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
