"""A hospital's data source as its policy describes it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from client.sources.source import DataSource


def made(source: str, **more: object) -> DataSource:
    return DataSource.model_validate({"source": source, "patient": "pid", **more})


def test_a_source_is_a_kind_and_where() -> None:
    source = made("csv:/srv/a:b.csv")
    assert (source.kind, source.where, source.path) == ("csv", "/srv/a:b.csv", Path("/srv/a:b.csv"))
    assert [made(f"{kind}:/x").form for kind in ("omop", "fhir", "sql", "dicom")] == [
        "omop",
        "fhir",
        "columns",
        "columns",
    ]


def test_databases_on_servers_are_read_by_another_process() -> None:
    servers = ("sql:postgresql://h/d", "sql:sqlite:////srv/a.db", "omop:postgresql://h/d")
    here = (
        "omop:/srv/cdm",
        "omop:/srv/cdm.duckdb",
        "duckdb:/srv/a.duckdb",
        "csv:/srv/a.csv",
        "fhir:/srv/bulk",
    )
    assert [made(text).on_server for text in servers] == [True] * 3
    assert [made(text).on_server for text in here] == [False] * 5


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "xlsx:/a"},
        {"source": "csv:"},
        {"source": "/a.csv"},
        {"delimiter": ""},
        {"delimiter": ";;"},
        {"encoding": "cp1252"},
        {"decimal": "'"},
        {"tables": {"Visits": "csv:/v.csv"}},
        {"tables": {"visits": "sql:postgresql://h/d"}},
        {"password": "secret"},
        {"map": {"age": {"units": "a"}}},
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        made(**{"source": "csv:/a.csv", **changes})  # type: ignore[arg-type]


def test_a_copy_keeps_what_its_rows_still_need(tmp_path: Path) -> None:
    mapping = {"hb": {"column": "HB", "unit": "g/L", "codes": {"a": "b"}, "date_format": "%d.%m.%Y"}}
    copy = made("sql:postgresql://h/d", map=mapping, table="t").copied(tmp_path / "c.parquet")
    assert (copy.kind, copy.path, copy.on_server) == ("parquet", tmp_path / "c.parquet", False)
    own = copy.mapped("hb")
    assert (own.column, own.unit, own.codes, own.date_format) == ("", "g/L", {"a": "b"}, "%d.%m.%Y")
    assert made("omop:postgresql://h/d", map=mapping).copied(tmp_path / "c.parquet").map == {}
    assert copy.mapped("age") == made("csv:/a").mapped("age")
