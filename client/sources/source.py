"""A hospital's data source as its policy describes it: where the rows are, and what of them studies may see.

Source: DESIGN.md "One program" (hospital-owned settings). Rules: the mapping from a hospital's own column
names, units and codes to a contract's is the hospital's; no secret stands here.
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from common.contract import Form, Strict

Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]


class ColumnMap(Strict):
    """How this hospital writes one column of a contract: its own name, unit, codes and form of dates.

    ``codes``: the hospital's code to the contract's. ``date_format`` as of strptime, for example
    ``%d.%m.%Y``.
    """

    column: Annotated[str, Field(max_length=128)] = ""
    unit: Annotated[str, Field(max_length=64)] = ""
    codes: dict[Text, Text] = Field(default_factory=dict)
    date_format: Annotated[str, Field(max_length=64)] = ""


class DataSource(Strict):
    """A named source, ``kind:where``, and what of it studies may see.

    ``columns`` are all that a study's contract may name beside ``patient``; of coded data (omop, fhir) what
    it may ask for, as ``age``, ``measurement:3004410``, ``condition:*``. ``opt_out``: a file of the ids of
    patients who are left out, one a line. ``table``: the table or view of a database, the index of a DICOM
    folder. ``cohort``: the cohort_definition_id of OMOP, or a CSV of patient and index_date for FHIR.
    ``tables``: further files by name, as ``kind:path``, that a study's query may join, each with the patient
    column.
    """

    source: Annotated[str, Field(pattern=r"^(csv|parquet|ndjson|duckdb|sql|omop|fhir|dicom):.+$")]
    patient: Annotated[str, Field(min_length=1, max_length=128)]
    columns: list[Text] = Field(default_factory=list)
    opt_out: str = ""
    table: Annotated[str, Field(max_length=200)] = ""
    cohort: str = ""
    password_file: str = ""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    encoding: Literal["utf-8", "utf-16", "latin-1"] = "utf-8"
    decimal: Literal[".", ","] = "."
    map: dict[Text, ColumnMap] = Field(default_factory=dict)
    tables: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")],
        Annotated[str, Field(pattern=r"^(csv|parquet|ndjson):.+$")],
    ] = Field(default_factory=dict)

    @property
    def kind(self) -> str:
        """csv, parquet, ndjson, duckdb, sql, omop, fhir or dicom."""
        return self.source.partition(":")[0]

    @property
    def form(self) -> Form:
        """How its policy says what studies may read: by column, or by the codes of OMOP or FHIR."""
        return "omop" if self.kind == "omop" else "fhir" if self.kind == "fhir" else "columns"

    @property
    def where(self) -> str:
        """A path, or the address of a database."""
        return self.source.partition(":")[2]

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(self.where)

    @property
    def on_server(self) -> bool:
        """Whether the rows are read over a connection, so not by the process that computes."""
        return self.kind == "sql" or (self.kind == "omop" and "://" in self.where)

    def copied(self, path: Path) -> "DataSource":
        """The same source once a copy of its rows lies in the Parquet file ``path``."""
        # The copy has the contract's names; what a database of codes gives, its units and codes too.
        kept = {} if self.kind == "omop" else self.map
        renamed = {name: own.model_copy(update={"column": ""}) for name, own in kept.items()}
        return self.model_copy(update={"source": f"parquet:{path}", "map": renamed})

    def recoded(self) -> "DataSource":
        """The same source once its codes are the contract's."""
        plain = {name: own.model_copy(update={"codes": {}}) for name, own in self.map.items()}
        return self.model_copy(update={"map": plain})

    def mapped(self, column: str) -> ColumnMap:
        """How a column of a contract is written here."""
        return self.map.get(column, ColumnMap())
