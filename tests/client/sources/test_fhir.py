"""FHIR R4 as extract: small hand-written resources, and random ones against a naive reading in Python."""

import gzip
import json
import math
import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.sources.extract import load_table, opened
from client.sources.source import DataSource
from common.contract import Category, Contract, Derived, Events, Label, Number, Series, Window
from common.contract.units import factor
from common.errors import ContractError

LOINC, SNOMED, CLASS = (
    "http://loinc.org",
    "http://snomed.info/sct",
    "http://terminology.hl7.org/CodeSystem/v3-ActCode",
)
GLUCOSE, SYSTOLIC, HTN, DM, METFORMIN = (
    f"{LOINC}|2345-7",
    f"{LOINC}|8480-6",
    f"{SNOMED}|38341003",
    f"{SNOMED}|44054006",
    "rx|6809",
)
SECRET = "Grünwald-4711"
YEAR = (-365, 0)


def derived(what: Any, take: Any, *codes: str, days: tuple[int, int] = YEAR) -> Derived:
    return Derived(what=what, take=take, fhir=codes, days=days)


def number(name: str, unit: str, of: Derived, analyte: Any = "") -> Number:
    return Number(
        kind="number", name=name, unit=unit, minimum=0.0, maximum=1000.0, analyte=analyte, source=of
    )


CONTRACT = Contract(
    patient="person",
    rows_per_patient=3,
    features=(
        number("age", "a", Derived(what="age")),
        number("glucose", "mg/dL", derived("measurement", "last", GLUCOSE), "glucose"),
        number("systolic", "mm[Hg]", derived("measurement", "last", SYSTOLIC)),
        number("measured", "1", derived("measurement", "count", GLUCOSE, SYSTOLIC)),
        number("visits", "1", derived("visit", "count")),
        number("stays", "1", derived("visit", "count", f"{CLASS}|IMP")),
        Category(kind="category", name="sex", codes=("female", "male"), source=Derived(what="sex")),
        Events(kind="events", name="history", codes=(HTN, DM), source=derived("condition", "list", HTN, DM)),
        Series(kind="series", name="lab", steps=2, channels=(number("sugar", "mmol/L", derived("measurement", "list", GLUCOSE), "glucose"),)),
    ),
    label=Label(name="ill", classes=("true", "false"), source=derived("drug", "any", METFORMIN, days=(1, 90))),
)  # fmt: skip


def coding(code: str, *more: str) -> dict[str, Any]:
    return {"coding": [dict(zip(("system", "code"), text.split("|"), strict=True)) for text in (code, *more)]}


def patient(person: str, gender: str | None = "female", born: str | None = "1950-06-16") -> dict[str, Any]:
    return {
        "resourceType": "Patient",
        "id": person,
        "gender": gender,
        "birthDate": born,
        "name": [{"family": SECRET}],
    }


def quantity(value: Any, unit: str = "mg/dL") -> dict[str, Any]:
    return {"value": value, "unit": "shown", "code": unit, "system": "http://unitsofmeasure.org"}


def observation(
    ref: str, at: str | None, code: str = GLUCOSE, value: Any = 100.0, **more: Any
) -> dict[str, Any]:
    return {"resourceType": "Observation", "status": "final", "subject": {"reference": ref}, "code": coding(code),
            "effectiveDateTime": at, "valueQuantity": value if isinstance(value, dict) else quantity(value), **more}  # fmt: skip


def condition(ref: str, at: str | None, code: str = HTN, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Condition",
        "subject": {"reference": ref},
        "code": coding(code),
        "onsetDateTime": at,
        **more,
    }


def encounter(ref: str, at: str | None, kind: str = "AMB", **more: Any) -> dict[str, Any]:
    return {"resourceType": "Encounter", "status": "finished", "subject": {"reference": ref}, "period": {"start": at},
            "class": {"system": CLASS, "code": kind}, **more}  # fmt: skip


def prescription(ref: str, at: str | None, code: str = METFORMIN, **more: Any) -> dict[str, Any]:
    return {"resourceType": "MedicationRequest", "status": "active", "subject": {"reference": ref}, "authoredOn": at,
            "medicationCodeableConcept": coding(code), **more}  # fmt: skip


RESOURCES: list[dict[str, Any]] = [
    patient("p1"),
    patient("p2", "male", "1980"),
    observation("Patient/p1", "2020-06-01T08:00:00+02:00"),
    observation("https://h.example/fhir/Patient/p1/_history/2", "2020-06-01T20:00:00Z", value=quantity(6, "mmol/L")),
    observation("Patient/p1", "2020-06-02", value={"value": 5, "comparator": "<", "code": "mg/dL"}),
    observation("Patient/p1", "2020-06-03", value=quantity(7, "furlong")),
    observation("Patient/p1", "2020-06-04", status="entered-in-error"),
    observation("Patient/p1", "2020-06", value=999),
    observation("Patient/p1", "2020-06-16", value=999),
    observation("Group/p1", "2020-06-15", value=999),
    observation("Patient/p1", "2020-06-10", f"{LOINC}|85354-9", valueQuantity=None,
                component=[{"code": coding(SYSTOLIC), "valueQuantity": quantity(140, "mm[Hg]")},
                           {"code": coding(f"{LOINC}|8462-4"), "valueQuantity": quantity(90, "mm[Hg]")}]),
    condition("urn:uuid:p1", "2020-06-15"),
    condition("Patient/p1", None, recordedDate="2020-01-01T10:00:00Z", code=DM),
    condition("Patient/p1", "2020-02-01", verificationStatus=coding("s|refuted")),
    condition("Patient/p2", "2019-06-14"),
    encounter("Patient/p1", "2020-01-01", "IMP"),
    encounter("Patient/p1", "2020-02-01"),
    encounter("Patient/p1", "2020-03-01", status="cancelled"),
    prescription("Patient/p1", "2020-07-01"),
    prescription("Patient/p2", "2020-07-01", doNotPerform=True),
]  # fmt: skip
COHORT = [("p1", "2020-06-15"), ("p2", "2020-06-15"), ("p2", "2020-06-15"), ("p9", "2020-06-15")]


def write(folder: Path, resources: list[dict[str, Any]], cohort: list[tuple[str, str]]) -> DataSource:
    """A bulk export, a file a kind, and the cohort beside its folder."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for kind in {resource["resourceType"] for resource in resources} | {"Patient"}:
        lines = [json.dumps(resource) + "\n" for resource in resources if resource["resourceType"] == kind]
        (folder / f"{kind}.000.ndjson").write_text("".join(lines))
    return source(folder, cohort)


def source(folder: Path, cohort: list[tuple[str, str]]) -> DataSource:
    file = folder.parent / "cohort.csv"
    file.write_text("patient,index_date\n" + "".join(f"{person},{day}\n" for person, day in cohort))
    return DataSource(source=f"fhir:{folder}", patient="person", cohort=str(file))


def rows(of: DataSource, contract: Contract = CONTRACT) -> dict[tuple[str, date], dict[str, Any]]:
    with opened(of, contract) as found:
        cursor = found.run("SELECT * FROM extract")
        columns = [str(column[0]) for column in cursor.description or []]
        made = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    keys = {(row.pop("person"), row.pop("index_date")): row for row in made}
    assert len(keys) == len(made)
    return keys


def test_a_cohort_is_read_with_what_the_contract_derives(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "bulk", RESOURCES, COHORT))
    day = date(2020, 6, 15)
    assert found.keys() == {("p1", day), ("p2", day), ("p9", day)}
    first = found["p1", day]
    assert (first["age"], first["sex"], first["ill"], first["visits"], first["stays"]) == (
        69,
        "female",
        True,
        2,
        1,
    )
    # The last with a unit that is known, by the clock that it shows.
    assert first["glucose"] == pytest.approx(108.0936)
    assert first["systolic"] == 140
    assert first["measured"] == 5
    assert first["history"] == [{"t": pytest.approx(-165.5833, abs=1e-3), "v": DM}, {"t": 0.0, "v": HTN}]
    assert [entry["t"] for entry in first["sugar"]] == [
        pytest.approx(-13.6667, abs=1e-3),
        pytest.approx(-13.1667, abs=1e-3),
    ]
    assert found["p2", day] | {"age": 0} == {
        "age": 0, "sex": "male", "glucose": None, "systolic": None, "measured": 0, "visits": 0, "stays": 0,
        "history": [], "sugar": [], "ill": False,
    }  # fmt: skip
    assert (found["p2", day]["age"], found["p9", day]["age"], found["p9", day]["sex"]) == (40, None, None)


def bundle(resources: list[dict[str, Any]]) -> str:
    entries = [{"fullUrl": f"urn:uuid:{r.get('id', i)}", "resource": r} for i, r in enumerate(resources)]
    return json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}, indent=1)


def test_bundles_and_compressed_files_say_the_same(tmp_path: Path) -> None:
    expected = rows(write(tmp_path / "bulk", RESOURCES, COHORT))
    folder = tmp_path / "bundles"
    folder.mkdir()
    (folder / "a.json").write_text(bundle(RESOURCES[:7]))
    (folder / "b.json").write_text(bundle(RESOURCES[7:]))
    (folder / "notes.txt").write_text("not FHIR")
    assert rows(source(folder, COHORT)) == expected
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    text = "".join(json.dumps(resource) + "\n" for resource in RESOURCES)
    (mixed / "1.ndjson.gz").write_bytes(gzip.compress(text.encode()))
    (mixed / "Procedure.ndjson").write_text("not read at all\n")
    assert rows(source(mixed, COHORT)) == expected
    # A patient without an id is named by the entry's address.
    nameless = [{name: value for name, value in patient("p1").items() if name != "id"}]
    for path in folder.iterdir():
        path.unlink()
    entry = {"fullUrl": "urn:uuid:p1", "resource": nameless[0]}
    (folder / "a.json").write_text(json.dumps({"resourceType": "Bundle", "entry": [entry]}))
    assert rows(source(folder, COHORT[:1]))["p1", date(2020, 6, 15)]["age"] == 69


def test_rows_become_a_table(tmp_path: Path) -> None:
    windowed = CONTRACT.model_copy(
        update={"window": Window(column="index_date", first="2020-01-01", last="2020-12-31")}
    )
    made = write(tmp_path / "bulk", RESOURCES, [*COHORT, ("p1", "2021-06-15")])
    table = load_table(made, windowed, key=bytes(32))
    assert table.ids == ["p1", "p2", "p9"]
    assert table.y.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "body", "place"),
    [
        (
            "Observation.ndjson",
            '{"resourceType": "Observation"}\n{"resourceType": "Obs',
            "Observation.ndjson",
        ),
        ("Observation.ndjson", '{"status": "final"}\n', "Observation.ndjson"),
        ("Observation.ndjson", f'"{SECRET}"\n', "Observation.ndjson"),
        ("a.json", f'{{"resourceType": "Bundle", "entry": [{{"resource": "{SECRET}"}}]}}', "a.json"),
        ("a.json", f'{{"{SECRET}": ', "a.json"),
        ("Patient.ndjson.gz", "not compressed", "Patient.ndjson.gz"),
    ],
)
def test_malformed_files_are_named_without_a_value(tmp_path: Path, name: str, body: str, place: str) -> None:
    made = write(tmp_path / "bulk", RESOURCES, COHORT)
    (tmp_path / "bulk" / name).write_text(body)
    with pytest.raises(ContractError) as caught:
        rows(made)
    assert caught.value.code == "source.malformed"
    assert place in caught.value.problem
    assert SECRET not in str(caught.value) + repr(vars(caught.value))
    assert caught.value.__context__ is None


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    made = write(tmp_path / "bulk", RESOURCES, COHORT)
    plain = CONTRACT.model_copy(
        update={"features": (Number(kind="number", name="bmi", unit="1", minimum=0.0, maximum=1.0),)}
    )
    cohort = Path(made.cohort)
    (tmp_path / "empty").mkdir()
    for of, contract, code in (
        (made.model_copy(update={"cohort": ""}), CONTRACT, "source.cohort"),
        (made.model_copy(update={"cohort": str(tmp_path / "absent.csv")}), CONTRACT, "source.unreadable"),
        (made.model_copy(update={"source": f"fhir:{tmp_path}/empty"}), CONTRACT, "source.unreadable"),
        (made.model_copy(update={"source": f"fhir:{tmp_path}/absent"}), CONTRACT, "source.unreadable"),
        (made, plain, "source.column"),
    ):
        with pytest.raises(ContractError) as caught:
            rows(of, contract)
        assert caught.value.code == code
        assert caught.value.remedy
    for text in ("p1,2020-06-15\n", "", "patient;index_date\n"):
        cohort.write_text(text)
        with pytest.raises(ContractError) as caught:
            rows(made)
        assert caught.value.code == "source.cohort"


PEOPLE = st.sampled_from(["p1", "p2"])
REFERENCES = st.builds(
    lambda form, person: form.format(person),
    st.sampled_from(["Patient/{}", "urn:uuid:{}", "http://x/Patient/{}", "{}"]),
    PEOPLE,
)
DAYS = st.sampled_from(
    ["2019-06-15", "2019-06-16", "2020-06-15", "2020-06-15T08:30:00Z", "2020-06-16", "2020-06", None, "soon"]
)
VALUES = st.builds(
    quantity, st.sampled_from([5, 90.5, None, "x"]), st.sampled_from(["mg/dL", "mmol/L", "stone"])
)
RANDOM = st.lists(
    st.one_of(
        st.builds(patient, PEOPLE, st.sampled_from(["male", "female", None]), st.sampled_from(["1950-06-16", "1980", None, "x"])),
        st.builds(observation, REFERENCES, DAYS, st.sampled_from([GLUCOSE, SYSTOLIC, "a|b"]), VALUES),
        st.builds(condition, REFERENCES, DAYS, st.sampled_from([HTN, DM, "a|b"])),
        st.builds(encounter, REFERENCES, DAYS, st.sampled_from(["IMP", "AMB"])),
        st.builds(prescription, REFERENCES, st.sampled_from(["2020-06-15", "2020-06-16", "2020-09-14"])),
    ),
    max_size=12,
)  # fmt: skip
COHORTS = st.lists(st.tuples(PEOPLE, st.sampled_from(["2020-06-15", "2020-06-14"])), min_size=1, max_size=3)


def naive(
    resources: list[dict[str, Any]], cohort: list[tuple[str, str]]
) -> dict[tuple[str, date], dict[str, Any]]:
    """Member by member, resource by resource."""
    found = {}
    for person, day in cohort:
        index = datetime.fromisoformat(day)
        mine = [r for r in resources if _subject(r) == person]
        own = [r for r in resources if r["resourceType"] == "Patient" and r["id"] == person]
        made: dict[str, Any] = {}
        for name, of in CONTRACT.derived.items():
            if of.what == "sex":
                made[name] = min((r["gender"] for r in own if r["gender"]), default=None)
            elif of.what == "age":
                made[name] = _age(min((r["birthDate"] for r in own if r["birthDate"]), default=None), index)
            else:
                made[name] = _taken(name, of, mine, index)
        found[person, index.date()] = made
    return found


def _subject(resource: dict[str, Any]) -> str | None:
    match = re.fullmatch(
        r"(?:.*/)?Patient/(p.)|urn:uuid:(p.)", resource.get("subject", {}).get("reference", "")
    )
    return (match[1] or match[2]) if match else None


def _age(born: str | None, index: datetime) -> int | None:
    parts = re.fullmatch(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?", born or "")
    if not parts:
        return None
    return index.year - int(parts[1]) - ((index.month, index.day) < (int(parts[2] or 1), int(parts[3] or 1)))


def _taken(name: str, of: Derived, resources: list[dict[str, Any]], index: datetime) -> Any:
    kinds = {
        "measurement": "Observation",
        "condition": "Condition",
        "visit": "Encounter",
        "drug": "MedicationRequest",
    }
    records = []
    for r in (r for r in resources if r["resourceType"] == kinds[of.what]):
        at = {"Observation": r.get("effectiveDateTime"), "Condition": r.get("onsetDateTime"),
              "Encounter": r.get("period", {}).get("start"), "MedicationRequest": r.get("authoredOn")}[kinds[of.what]]  # fmt: skip
        try:
            moment = datetime.fromisoformat((at or "").removesuffix("Z"))
        except ValueError:
            continue
        (code,) = (
            [r["class"]]
            if of.what == "visit"
            else (r.get("code") or r["medicationCodeableConcept"])["coding"]
        )
        text = f"{code['system']}|{code['code']}"
        if of.days[0] <= (moment.date() - index.date()).days <= of.days[1] and (
            not of.fhir or text in of.fhir
        ):
            t = (moment - index).total_seconds() / 86400
            records.append((t, _measured(name, r) if of.what == "measurement" else text))
    known = sorted((t, v) for t, v in records if v is not None)
    if of.take in ("any", "count"):
        return len(records) if of.take == "count" else bool(records)
    return [{"t": t, "v": v} for t, v in known] if of.take == "list" else known[-1][1] if known else None


def _measured(name: str, resource: dict[str, Any]) -> float | None:
    channels = {c.name: c for f in CONTRACT.features for c in (f.channels if isinstance(f, Series) else (f,))}
    of, q = channels[name], resource["valueQuantity"]
    assert isinstance(of, Number)
    change = factor(of.analyte, q["code"], of.unit)
    known = isinstance(q["value"], int | float) and change is not None
    return q["value"] * change[0] + change[1] if known and change else None


def close(first: Any, second: Any) -> bool:
    if isinstance(first, list):
        return len(first) == len(second) and all(close(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[name], second[name]) for name in first)
    if isinstance(first, float):
        return second is not None and math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-9)
    return bool(first == second)


@given(RANDOM, COHORTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_features_agree_with_a_naive_reading(
    tmp_path: Path, resources: list[dict[str, Any]], cohort: list[tuple[str, str]]
) -> None:
    found, expected = rows(write(tmp_path / "bulk", resources, cohort)), naive(resources, cohort)
    assert found.keys() == expected.keys()
    for key in expected:
        assert close(expected[key], found[key]), (key, expected[key], found[key])


@given(RANDOM, COHORTS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_members_are_separable(
    tmp_path: Path, resources: list[dict[str, Any]], cohort: list[tuple[str, str]]
) -> None:
    whole = rows(write(tmp_path / "bulk", resources, cohort))
    others = [r for r in resources if "p1" not in (_subject(r), r.get("id"))]
    left = rows(write(tmp_path / "bulk", others, [row for row in cohort if row[0] != "p1"]))
    assert left == {key: row for key, row in whole.items() if key[0] != "p1"}
