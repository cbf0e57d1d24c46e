"""FHIR R4 as a hospital exports it: bulk NDJSON or Bundles, and a cohort, as ``extract``.

Source: HL7 FHIR R4 (Patient, Observation, Condition, Encounter, MedicationRequest); "FHIR Bulk Data Access"
(one resource a line). Rules: fields are read by their names and types, never guessed from rows; a resource
counts for the one patient whom its subject names, as ``Patient/<id>``, an address that ends so, or
``urn:uuid:<id>``; a time is that of the clock which the resource shows; a partial date of birth begins its
month or year, any other partial date is none; a quantity with a comparator ("<5") is absent.

What counts: observations that are final, amended or corrected, each component by itself; conditions not
refuted nor entered in error, at their onset or else when they were recorded; encounters that took place, by
class; prescriptions that were made.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import duckdb

from client.sources.derived import check_derived, codes_of, make_extract
from client.sources.engine import execute, quoted, regular_file
from client.sources.source import DataSource
from common.contract import Contract
from common.errors import ContractError

REMEDY: Final = "Export it again: FHIR R4, one resource a line as .ndjson, or a Bundle as .json."
MAX_LINE_BYTES: Final = 1 << 24

_CODE: Final[dict[str, Any]] = {"coding": [{"system": "VARCHAR", "code": "VARCHAR"}]}
_QUANTITY: Final = {"value": "DOUBLE", "comparator": "VARCHAR", "code": "VARCHAR", "unit": "VARCHAR"}
_REFERENCE: Final = {"reference": "VARCHAR"}
_FIELDS: Final[dict[str, dict[str, Any]]] = {
    "Patient": {"id": "VARCHAR", "gender": "VARCHAR", "birthDate": "VARCHAR"},
    "Observation": {
        "status": "VARCHAR",
        "subject": _REFERENCE,
        "effectiveDateTime": "VARCHAR",
        "effectiveInstant": "VARCHAR",
        "effectivePeriod": {"start": "VARCHAR"},
        "code": _CODE,
        "valueQuantity": _QUANTITY,
        "component": [{"code": _CODE, "valueQuantity": _QUANTITY}],
    },
    "Condition": {
        "verificationStatus": _CODE,
        "subject": _REFERENCE,
        "onsetDateTime": "VARCHAR",
        "onsetPeriod": {"start": "VARCHAR"},
        "recordedDate": "VARCHAR",
        "code": _CODE,
    },
    "Encounter": {
        "status": "VARCHAR",
        "subject": _REFERENCE,
        "period": {"start": "VARCHAR"},
        "class": {"system": "VARCHAR", "code": "VARCHAR"},
    },
    "MedicationRequest": {
        "status": "VARCHAR",
        "doNotPerform": "VARCHAR",
        "subject": _REFERENCE,
        "authoredOn": "VARCHAR",
        "medicationCodeableConcept": _CODE,
    },
}
_NO_QUANTITY: Final = "CAST(NULL AS STRUCT(value DOUBLE, comparator VARCHAR, code VARCHAR, unit VARCHAR))"
# Records of each kind: record, subject, time shown, codings, quantity q.
_RECORDS: Final = {
    "measurement": (
        "Observation",
        """
        WITH final AS (
            SELECT rowid AS row, r,
                coalesce(r.effectiveDateTime, r.effectiveInstant, r.effectivePeriod.start) AS shown
            FROM fhir WHERE r.status IN ('final', 'amended', 'corrected')
        )
        SELECT CAST(row AS VARCHAR) AS record, r.subject.reference AS subject, shown,
            r.code.coding AS codings, r.valueQuantity AS q
        FROM final
        UNION ALL
        SELECT row || '.' || i, r.subject.reference, shown, r.component[i].code.coding,
            r.component[i].valueQuantity
        FROM (SELECT row, r, shown, unnest(range(1, len(r.component) + 1)) AS i FROM final)
        """,
    ),
    "condition": (
        "Condition",
        f"""
        SELECT rowid AS record, r.subject.reference AS subject, r.code.coding AS codings, {_NO_QUANTITY} AS q,
            coalesce(r.onsetDateTime, r.onsetPeriod.start, r.recordedDate) AS shown
        FROM fhir
        WHERE NOT coalesce(list_has_any(
            list_transform(r.verificationStatus.coding, lambda c: c.code), ['refuted', 'entered-in-error']
        ), false)
        """,
    ),
    "visit": (
        "Encounter",
        f"""
        SELECT rowid AS record, r.subject.reference AS subject, [r.class] AS codings, {_NO_QUANTITY} AS q,
            r.period.start AS shown
        FROM fhir WHERE r.status IN ('arrived', 'triaged', 'in-progress', 'onleave', 'finished')
        """,
    ),
    "drug": (
        "MedicationRequest",
        f"""
        SELECT rowid AS record, r.subject.reference AS subject, r.medicationCodeableConcept.coding AS codings,
            {_NO_QUANTITY} AS q, r.authoredOn AS shown
        FROM fhir
        WHERE r.status IN ('active', 'on-hold', 'completed', 'stopped')
            AND r.doNotPerform IS DISTINCT FROM 'true'
        """,
    ),
}
_ID: Final = r"(?:^|/)Patient/([A-Za-z0-9.\-]{1,64})(?:/_history/[A-Za-z0-9.\-]{1,64})?$"
_UUID: Final = r"^urn:uuid:([0-9A-Za-z\-]{1,64})$"
_TYPE: Final = re.compile(r"[A-Z][A-Za-z]+")


def fill(connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract) -> None:
    """Make ``extract``: the patient column, the contract's derived columns and the index date.

    ``source.cohort`` is a CSV with the columns patient and index_date (YYYY-MM-DD), a row for each time that
    a patient is to be looked at.

    Raises: ContractError.
    """
    check_derived(source, contract)
    _stage_cohort(connection, source)
    wanted = {derived.what for derived in contract.derived.values()}
    _read(connection, source, "Patient")
    execute(
        connection,
        f"CREATE TABLE staged_person AS SELECT patient, min(r.gender) AS sex, {_part(1)} AS year, "
        f"{_part(2)} AS month, {_part(3)} AS day "
        f"FROM (SELECT coalesce(r.id, regexp_extract(url, {quoted(_UUID)}, 1)) AS patient, r FROM fhir) "
        "WHERE patient IN (SELECT patient FROM staged_cohort) GROUP BY patient",
        what=source.where,
        remedy=REMEDY,
    )
    for what in sorted(wanted & _RECORDS.keys()):
        _stage(connection, source, contract, what)
    connection.execute("DROP TABLE fhir")
    make_extract(connection, source, contract, REMEDY)


def _part(place: int) -> str:
    """Year, month or day of the date of birth."""
    return f"nullif(split_part(min(r.birthDate), '-', {place}), '')"


def _stage_cohort(connection: duckdb.DuckDBPyConnection, source: DataSource) -> None:
    if not source.cohort:
        problem = f"{source.where}: the policy names no cohort"
        remedy = "Add cohort to this source in policy.toml: a CSV with the columns patient and index_date."
        raise ContractError("source.cohort", problem, remedy=remedy)
    file = regular_file(Path(source.cohort))
    reader = (
        f"read_csv({quoted(str(file))}, columns = {{'patient': 'VARCHAR', 'index_date': 'VARCHAR'}}, "
        "auto_detect = false, header = true, delim = ',', quote = '\"', escape = '\"', strict_mode = true)"
    )
    remedy = "Write it as CSV in UTF-8: patient,index_date first, then a line for each patient and date."
    with file.open("rb") as handle:
        first = handle.readline(200).decode("utf-8-sig", "replace").strip().replace('"', "")
    if first != "patient,index_date":
        problem = f"{file}: its first line must be patient,index_date"
        raise ContractError("source.cohort", problem, remedy=remedy)
    members = f"SELECT DISTINCT trim(patient) AS patient, trim(index_date) AS index_date FROM {reader}"
    execute(connection, f"CREATE TABLE staged_cohort AS {members}", what=str(file), remedy=remedy)


def _stage(connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract, what: str) -> None:
    """Make ``staged_<what>`` of the members' records, a row for each code that the contract names."""
    kind, records = _RECORDS[what]
    _read(connection, source, kind)
    columns = [derived for derived in contract.derived.values() if derived.what == what]
    codes = sorted({code for derived in columns for code in codes_of(derived, source)})
    every = not all(codes_of(derived, source) for derived in columns)
    among = "true" if every else f"concept IN ({', '.join(map(quoted, codes))})"
    patient = (
        f"coalesce(nullif(regexp_extract(subject, {quoted(_ID)}, 1), ''), "
        f"regexp_extract(subject, {quoted(_UUID)}, 1))"
    )
    # Without a code a record still is a visit.
    coded = "unnest(CASE WHEN len(codings) > 0 THEN codings ELSE [NULL] END)"
    query = f"""
        CREATE TABLE staged_{what} AS
        SELECT record, patient, index_date, shown[:10] AS day,
            CASE WHEN length(shown) >= 19 THEN shown[:19] END AS moment, concept, value, unit
        FROM (
            SELECT record, patient, shown, coalesce(coding.system, '') || '|' || coding.code AS concept,
                CASE WHEN q.comparator IS NULL THEN q.value END AS value, coalesce(q.code, q.unit) AS unit
            FROM (SELECT record, {patient} AS patient, shown, {coded} AS coding, q FROM ({records}))
        ) JOIN staged_cohort USING (patient)
        WHERE length(shown) >= 10 AND {among}
    """
    execute(connection, query, what=source.where, remedy=REMEDY)


def _read(connection: duckdb.DuckDBPyConnection, source: DataSource, kind: str) -> None:
    """Make ``fhir`` of all resources of a kind: ``r`` its fields, ``url`` its address in a Bundle."""
    fields = {"resourceType": "VARCHAR", **_FIELDS[kind]}
    shape = quoted(json.dumps(fields))
    made = f"CREATE OR REPLACE TABLE fhir AS SELECT json_transform('{{}}', {shape}) AS r, '' AS url LIMIT 0"
    execute(connection, made, what=source.where, remedy=REMEDY)
    for file in _files(source.path, kind):
        path = quoted(str(file))
        if file.suffix == ".json":
            size = max(MAX_LINE_BYTES, file.stat().st_size + 1)
            entries = quoted(json.dumps([{"fullUrl": "VARCHAR", "resource": fields}]))
            read = f"read_json_objects({path}, format = 'unstructured', maximum_object_size = {size})"
            each = f"SELECT unnest(json_transform(json -> 'entry', {entries})) AS e FROM {read}"
            query = f"SELECT e.resource AS r, e.fullUrl AS url FROM ({each})"
        else:
            query = (
                f"SELECT json_transform(json, {shape}) AS r, NULL AS url "
                f"FROM read_ndjson_objects({path}, maximum_object_size = {MAX_LINE_BYTES})"
            )
        insert = f"INSERT INTO fhir FROM ({query}) WHERE coalesce(r.resourceType, '') IN ('', {quoted(kind)})"
        execute(connection, insert, what=str(file), remedy=REMEDY)
        nameless = "SELECT count(*) FROM fhir WHERE coalesce(r.resourceType, '') = ''"
        if (connection.execute(nameless).fetchone() or (0,))[0]:
            problem = f"{file} holds something that is no FHIR resource: without a resourceType"
            raise ContractError("source.malformed", problem, remedy=REMEDY)


def _files(folder: Path, kind: str) -> Iterator[Path]:
    """The files that may hold resources of a kind, in the order of their names.

    One that is named for another kind of resource, as bulk exports name theirs, is left out.
    """
    found = 0
    for path in sorted(folder.iterdir() if folder.is_dir() else [folder]):
        suffixes = "".join(path.suffixes[-2:])
        if not suffixes.endswith((".ndjson", ".ndjson.gz", ".json")):
            continue
        found += 1
        named = _TYPE.findall(path.name) if not path.name.endswith(".json") else []
        if not named or kind in named or not _known(named):
            yield regular_file(path)
    if not found:
        problem = f"{folder} holds no .ndjson, .ndjson.gz or .json file"
        raise ContractError("source.unreadable", problem, remedy=REMEDY)


def _known(names: Iterable[str]) -> bool:
    return any(name in _FIELDS or name in _OTHERS for name in names)


_OTHERS: Final = frozenset(
    ["AllergyIntolerance", "CarePlan", "CareTeam", "Claim", "Device", "DiagnosticReport", "DocumentReference",
     "ExplanationOfBenefit", "Goal", "ImagingStudy", "Immunization", "Location", "Medication",
     "MedicationAdministration", "MedicationStatement", "Organization", "Practitioner", "PractitionerRole",
     "Procedure", "Provenance", "ServiceRequest", "Specimen"]
)  # fmt: skip
"""Resources that are not read: files named for them are left out."""
