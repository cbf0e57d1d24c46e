"""What a contract derives of coded records, whatever the standard that they came in: ``extract`` by member.

Source: PRIVACY.md "Everything upstream is separable by patient". Rules: one row a member and index date; each
column depends on that patient's records alone; a value whose unit is not known is absent, as is a record
without a whole date.

``staged_cohort`` has the columns patient and index_date; ``staged_person`` patient, sex, year, month, day;
``staged_<what>`` record, patient, index_date, day, moment, concept, value, unit: all of them text. A record
with several codes has a row for each.
"""

from typing import Final

import duckdb

from client.sources.engine import execute, identifier, quoted
from client.sources.source import DataSource
from common.contract import Contract, Derived, Number, Series
from common.contract.units import factor
from common.errors import ContractError

INDEX_DATE: Final = "index_date"
"""Column of the index date, for a contract's window, unless the contract has one of that name."""

_AGE: Final = """(
    SELECT CAST(year(i) - year(b) - CAST((month(i), day(i)) < (month(b), day(b)) AS INTEGER) AS INTEGER)
    FROM (SELECT TRY_CAST(c.index_date AS DATE) AS i, TRY(make_date(
        CAST(p.year AS BIGINT), coalesce(CAST(p.month AS BIGINT), 1), coalesce(CAST(p.day AS BIGINT), 1)
    )) AS b)
)"""
_NOTHING: Final = {"any": "false", "count": "0", "list": "[]"}
_EVENTS: Final = """
    SELECT record, patient, index_date, concept, value, unit, date_diff('day', i, d) AS offset_days,
        CASE WHEN CAST(m AS DATE) = d THEN (epoch_us(m) - epoch_us(i)) / 86400e6 ELSE offset_days END AS t
    FROM (
        SELECT record, patient, index_date, concept, TRY_CAST(index_date AS DATE) AS i,
            TRY_CAST(day AS DATE) AS d, TRY_CAST(moment AS TIMESTAMP) AS m, nullif(trim(unit), '') AS unit,
            CASE WHEN isfinite(TRY_CAST(value AS DOUBLE)) THEN CAST(value AS DOUBLE) END AS value
        FROM staged_{what}
    )
    WHERE isfinite(i) AND isfinite(d)
"""


def codes_of(derived: Derived, source: DataSource) -> tuple[str, ...]:
    """The codes that count for a column, as the records of this source write them."""
    return tuple(map(str, derived.omop)) if source.form == "omop" else derived.fhir


def check_derived(source: DataSource, contract: Contract) -> None:
    """Check that every column can be made from codes of this source's standard. Raises ContractError."""
    for name in contract.columns:
        derived = contract.derived.get(name)
        # Any visit counts where no class is named, unless it is named in another standard's codes.
        whole = derived is not None and (
            derived.what in ("age", "sex") or (derived.what == "visit" and not (derived.omop or derived.fhir))
        )
        if derived is None or not (whole or codes_of(derived, source)):
            problem = f"the contract does not say which {source.form.upper()} codes give column {name!r}"
            remedy = "Ask the coordinator to name them, or offer the study an extract."
            raise ContractError("source.column", problem, remedy=remedy)


def make_extract(
    connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract, remedy: str
) -> None:
    """From the staged tables, which are dropped, to ``extract``.

    Guarantee: members_are_separable - without a patient's records the other rows are the same.
    Raises: ContractError.
    """
    found: dict[str, str] = {}
    joins = "LEFT JOIN staged_person p USING (patient)"
    domains = sorted({derived.what for derived in contract.derived.values()} - {"age", "sex"})
    for domain in domains:
        table = f"grouped_{domain}"
        events = f"CREATE TABLE events AS {_EVENTS.format(what=domain)}"
        execute(connection, events, what=source.where, remedy=remedy)
        connection.execute(f"DROP TABLE staged_{domain}")
        columns = [name for name, derived in contract.derived.items() if derived.what == domain]
        chosen = [f"{_cell(connection, source, contract, name)} AS {identifier(name)}" for name in columns]
        grouped = f"SELECT patient, index_date, {', '.join(chosen)} FROM events GROUP BY patient, index_date"
        execute(connection, f"CREATE TABLE {table} AS {grouped}", what=source.where, remedy=remedy)
        connection.execute("DROP TABLE events")
        joins += f" LEFT JOIN {table} {domain} USING (patient, index_date)"
        found |= {name: f"{domain}.{identifier(name)}" for name in columns}
    cells = [f"c.patient AS {identifier(contract.patient)}"]
    for name, derived in contract.derived.items():
        held = {"age": _AGE, "sex": "p.sex"}.get(derived.what) or found[name]
        if derived.what not in ("age", "sex") and derived.take != "last":
            held = f"coalesce({held}, {_NOTHING[derived.take]})"
        cells.append(f"{held} AS {identifier(name)}")
    if INDEX_DATE not in {name.casefold() for name in (contract.patient, *contract.columns)}:
        cells.append(f"TRY_CAST(c.index_date AS DATE) AS {INDEX_DATE}")
    query = f"CREATE TABLE extract AS SELECT {', '.join(cells)} FROM staged_cohort c {joins}"
    execute(connection, query, what=source.where, remedy=remedy)
    for table in ("staged_cohort", "staged_person", *(f"grouped_{domain}" for domain in domains)):
        connection.execute(f"DROP TABLE {table}")


def _cell(connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract, name: str) -> str:
    """The aggregate over a member's ``events`` that gives a column."""
    derived = contract.derived[name]
    among = f"offset_days BETWEEN {derived.days[0]} AND {derived.days[1]}"
    if codes := codes_of(derived, source):
        among += f" AND concept IN ({', '.join(map(quoted, codes))})"
    if derived.take == "any":
        return f"count(*) FILTER (WHERE {among}) > 0"
    if derived.take == "count":
        return f"CAST(count(DISTINCT record) FILTER (WHERE {among}) AS INTEGER)"
    value = "concept" if derived.what != "measurement" else _converted(connection, source, contract, name)
    pair, among = f"{{'t': t, 'v': {value}}}", f"{among} AND ({value}) IS NOT NULL"
    if derived.take == "last":
        return f"struct_extract(max({pair}) FILTER (WHERE {among}), 'v')"
    return f"list({pair} ORDER BY t, {value}) FILTER (WHERE {among})"


def _converted(
    connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract, name: str
) -> str:
    """A measurement's value in the contract's unit, NULL where its own is not known."""
    channels = (c for f in contract.features for c in (f.channels if isinstance(f, Series) else (f,)))
    number = next(c for c in channels if isinstance(c, Number) and c.name == name)
    cases = []
    for (unit,) in connection.execute("SELECT DISTINCT unit FROM events").fetchall():
        # What bears no unit is in the one that the hospital says it writes this column in.
        change = factor(number.analyte, unit or source.mapped(name).unit, number.unit)
        if change is not None:
            cases.append(f"WHEN {quoted(unit or '')} THEN value * {change[0]!r} + {change[1]!r}")
    return f"CASE coalesce(unit, '') {' '.join(cases)} END" if cases else "CAST(NULL AS DOUBLE)"
