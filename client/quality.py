"""What is wrong with a hospital's data for one contract, for the hospital alone, before anything is computed.

Source: Kahn et al., eGEMs 4 (2016) 1244 (conformance, completeness, plausibility). Rules: counts and rules,
never a value of a record; everything is counted by the database, no row is looped over; nothing of this ever
leaves the hospital; what an error says is what approval refuses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from client.sources.engine import identifier, quoted
from client.sources.extract import Extract, opened
from client.sources.source import DataSource
from common.contract import (
    Amount,
    AnyLabel,
    Category,
    Contract,
    Events,
    Feature,
    Image,
    NoLabel,
    Number,
    Series,
    Text,
    TimeToEvent,
)
from common.contract.units import UNITS, factor
from common.errors import ContractError

Kind: TypeAlias = Literal["conformance", "completeness", "plausibility"]
BINS: Final = 12
MANY: Final = 0.01
"""The share of a column's values that may lie outside its public range: further ones are clamped."""

_COMMA: Final = r"^\s*[+-]?[0-9]+(\.[0-9]{3})*,[0-9]+\s*$"
_SHOWN: Final = 40
_MAP: Final = "Map the right column in policy.toml, unless this hospital has none."


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that ``count`` cells or rows of a column break; ``error``: no person may approve with it."""

    kind: Kind
    error: bool
    column: str
    rule: str
    count: int
    remedy: str

    def __str__(self) -> str:
        place = f"column {self.column!r}: " if self.column else ""
        return f"{'error' if self.error else 'note'}  {place}{self.rule}: {self.count}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Summary:
    """A column: ``absent`` of its cells are empty; ``bars`` what the others are, with their counts."""

    name: str
    says: str
    absent: int
    bars: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class Report:
    """All that was found. ``patients`` are those with a usable row."""

    where: str
    rows: int
    patients: int
    findings: list[Finding] = field(default_factory=list)
    columns: list[Summary] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings with which no person may approve."""
        return [finding for finding in self.findings if finding.error]

    def refuse(self) -> None:
        """Raise ContractError with the first error, if there is one."""
        errors = self.errors
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            first = errors[0]
            place = f"column {first.column!r}: " if first.column else ""
            problem = f"{self.where}: {place}{first.rule}: {first.count}{more}"
            raise ContractError("contract.quality", problem, remedy=first.remedy)


def check(source: DataSource, contract: Contract) -> Report:
    """Count what is wrong with a source for a contract.

    Guarantee: reports_hold_no_value - only names, rules, public ranges and codes, and counts.
    Raises: ContractError when it cannot be read, or a column is missing; FailureError.
    """
    with opened(source, contract) as extract:
        numbers = extract.run(
            "SELECT count(*), count(*) FILTER (WHERE p IS NULL), "
            "count(*) FILTER (WHERE p IS NOT NULL AND NOT i), "
            "count(DISTINCT CASE WHEN i AND u THEN p END) FROM "
            f"(SELECT {extract.patient} AS p, {extract.inside} AS i, {extract.usable} AS u FROM extract)"
        ).fetchall()[0]
        rows, nameless, outside, patients = map(int, numbers)
        report = Report(source.where, rows, patients)
        report.findings += _of_rows(extract, rows, nameless, outside, patients)
        if rows:
            for feature in contract.features:
                _add(report, extract, feature)
            _add_label(report, extract, contract.label)
    report.findings.sort(key=lambda finding: not finding.error)
    return report


def _of_rows(extract: Extract, rows: int, nameless: int, outside: int, patients: int) -> Iterator[Finding]:
    contract = extract.contract
    if not rows:
        yield Finding("completeness", True, "", "it has no rows", 0, "Export it again.")
        return
    if not patients:
        rule = "no row has a patient, a known label and a date inside the window"
        yield Finding(
            "completeness", True, "", rule, rows, "Check the patient column, the label and the window."
        )
    if nameless:
        rule, remedy = "rows that name no one patient are left out", "Give each row its patient's id."
        yield Finding("completeness", False, contract.patient, rule, nameless, remedy)
    if outside and contract.window is not None:
        window = contract.window
        rule = f"rows outside {window.first} to {window.last} are left out"
        yield Finding("plausibility", False, window.column, rule, outside, "None is needed if that is meant.")
    yield from _of_dates(extract)
    most = contract.rows_per_patient
    named = f"SELECT {extract.patient} AS p FROM extract"
    counted = f"SELECT count(*) AS n FROM ({named}) WHERE p IS NOT NULL GROUP BY p"
    many = extract.run(f"SELECT count(*) FROM ({counted}) WHERE n > {most}").fetchall()[0][0]
    if many:
        rule = f"patients with more than {most} rows; which stay is drawn by this site's secret"
        remedy = "None is needed if that is meant."
        yield Finding("conformance", False, contract.patient, rule, many, remedy)
    every = ", ".join(identifier(name) for name in extract.types if name != extract.row)
    twice = extract.run(f"SELECT count(*) - count(DISTINCT hash({every})) FROM extract").fetchall()[0][0]
    if twice:
        remedy = "Leave out repeated rows of an export."
        yield Finding("plausibility", False, "", "rows that occur more than once", twice, remedy)


def _of_dates(extract: Extract) -> Iterator[Finding]:
    """Dates of the window that are none, or are written in several ways."""
    window = extract.contract.window
    if window is None:
        return
    present = extract.present(window.column)
    day = extract.day(window.column)
    broken = f"SELECT count(*) FROM extract WHERE {present} AND {day} IS NULL"
    count = extract.run(broken).fetchall()[0][0]
    if count:
        shapes = extract.run(
            f"SELECT count(DISTINCT regexp_replace({extract.text(window.column)}, '[0-9]+', '9', 'g')) "
            f"FROM extract WHERE {present}"
        ).fetchall()[0][0]
        ways = f", dates are written in {shapes} ways" if shapes > 1 else ""
        remedy = "Write all dates as YYYY-MM-DD, or name their one form as date_format in policy.toml."
        yield Finding("conformance", True, window.column, f"cells that are no date{ways}", count, remedy)


def _add(report: Report, extract: Extract, feature: Feature) -> None:
    """Add what one feature's columns show."""
    if isinstance(feature, Number):
        _add_number(report, extract, feature.name, feature)
    elif isinstance(feature, Category):
        _add_codes(report, extract, feature.name, feature.codes)
    elif isinstance(feature, Series) and feature.wide:
        for name in feature.columns:
            channel = next(c for c in feature.channels if name.startswith(f"{c.name}_"))
            _add_number(report, extract, name, channel)
    elif isinstance(feature, Image):
        _add_images(report, extract, feature)
    else:
        for name in feature.columns:
            _add_list(report, extract, feature, name)


def _add_number(report: Report, extract: Extract, name: str, number: Number) -> None:
    low, high = number.minimum, number.maximum
    place = f"least({BINS - 1}, CAST(floor({BINS} * (n - {low!r}) / {high - low!r}) AS INTEGER))"
    comma = f"regexp_matches(CAST(t AS VARCHAR), {quoted(_COMMA)})"
    inside = f"n BETWEEN {low!r} AND {high!r}"
    found = extract.run(
        "SELECT count(*) FILTER (WHERE NOT h), count(*) FILTER (WHERE h AND n IS NULL), "
        f"count(*) FILTER (WHERE CASE WHEN h AND n IS NULL THEN {comma} END), "
        "count(*) FILTER (WHERE NOT isfinite(n)), count(*) FILTER (WHERE n < 0 AND isfinite(n)), "
        f"count(*) FILTER (WHERE isfinite(n) AND NOT {inside}), count(*) FILTER (WHERE isfinite(n)), "
        f"histogram(CASE WHEN {inside} THEN {place} END) "
        f"FROM (SELECT {extract.number(name, number)} AS n, {identifier(name)} AS t, "
        f"{extract.present(name)} AS h FROM extract)"
    ).fetchall()[0]
    absent, unread, commas, infinite, negative, outside, known = map(int, found[:7])
    bars = dict(found[7] or {})
    edges = [low + (high - low) * at / BINS for at in range(BINS)]
    report.columns.append(
        Summary(name, f"{number.unit}, {low:g} to {high:g}", absent,
                tuple((f"{edge:.4g}", int(bars.get(at, 0))) for at, edge in enumerate(edges)))
    )  # fmt: skip

    def add(kind: Kind, error: bool, rule: str, count: int, remedy: str) -> None:
        if count:
            report.findings.append(Finding(kind, error, name, rule, count, remedy))

    remedy = 'Write decimal = "," in policy.toml, or export with points.'
    add("conformance", True, "numbers with a decimal comma", commas, remedy)
    remedy = "Correct them, or leave them empty where the value is absent."
    add("conformance", True, "cells that are no number", unread - commas, remedy)
    remedy = "Leave a cell empty where the value is absent."
    add("conformance", True, "NaN or infinite values", infinite, remedy)
    if low >= 0:
        add("plausibility", True, "values below zero", negative, "Correct them: the contract knows none.")
        outside -= negative
    many, remedy = outside > MANY * known, "They are clamped to it."
    if many:
        unit = _likely_unit(extract, name, number)
        remedy = (
            f"They look like {unit}: map the column's unit in policy.toml." if unit else "Check the unit."
        )
    rule = f"values outside the public range {low:g} to {high:g} {number.unit}"
    add("plausibility", many, rule, outside, remedy)
    if absent == report.rows:
        add("completeness", False, "no value at all: the same for every row", absent, _MAP)


def _likely_unit(extract: Extract, name: str, number: Number) -> str:
    """Another unit in which nearly all values would lie inside the range, if there is just one."""
    shown, fitting = extract.number(name, number), []
    for unit in UNITS:
        change = factor(number.analyte, unit, number.unit)
        if change is None or change == (1.0, 0.0):
            continue
        within = f"{change[0]!r} * n + {change[1]!r} BETWEEN {number.minimum!r} AND {number.maximum!r}"
        share = extract.run(
            f"SELECT avg(CAST({within} AS INTEGER)) FROM (SELECT {shown} AS n FROM extract) WHERE isfinite(n)"
        ).fetchall()[0][0]
        if share is not None and share >= 1 - MANY:
            fitting.append(unit)
    return fitting[0] if len(fitting) == 1 else ""


def _add_codes(report: Report, extract: Extract, name: str, codes: tuple[str, ...]) -> dict[int, int]:
    """Add how often each code occurs; the counts by place, -1 for unknown ones."""
    present = extract.present(name)
    found = extract.run(
        f"SELECT {extract.code(name, codes)} AS c, count(*) FILTER (WHERE {present}), "
        f"count(*) FILTER (WHERE NOT {present}) FROM extract GROUP BY c"
    ).fetchall()
    counts = {int(place): int(count) for place, count, _ in found}
    absent = sum(int(count) for _, _, count in found)
    bars = [(code, counts.get(at, 0)) for at, code in enumerate(codes[:_SHOWN])]
    report.columns.append(Summary(name, f"{len(codes)} codes", absent, tuple(bars)))
    unknown, known = counts.get(-1, 0), sum(counts.values())
    if unknown:
        rule = "codes that the contract does not know"
        remedy = "Map them in policy.toml, or ask the coordinator to add them; they count as none."
        error = unknown > MANY * known
        report.findings.append(Finding("conformance", error, name, rule, unknown, remedy))
    return counts


def _add_label(report: Report, extract: Extract, label: AnyLabel) -> None:
    if isinstance(label, NoLabel):
        return
    if isinstance(label, Amount):
        _add_number(report, extract, label.name, label)
        return
    if isinstance(label, TimeToEvent):
        # Whoever is followed past the grid is no mistake.
        time = Number(kind="number", name=label.name, unit=label.unit, minimum=0.0, maximum=1e9)
        _add_number(report, extract, label.name, time)
    name, codes = (
        (label.event, label.codes) if isinstance(label, TimeToEvent) else (label.name, label.classes)
    )
    counts = _add_codes(report, extract, name, codes)
    there = [place for place in range(len(codes)) if counts.get(place)]
    absent = len(codes) - len(there)
    if len(there) < 2:
        rule, remedy = "fewer than two classes occur; classes that do", "Check the label's column and codes."
        report.findings.append(Finding("plausibility", True, name, rule, len(there), remedy))
    elif absent:
        rule, remedy = "classes that do not occur", "None is needed if that is so."
        report.findings.append(Finding("plausibility", False, name, rule, absent, remedy))


def _add_list(report: Report, extract: Extract, feature: Series | Events | Text, name: str) -> None:
    present = extract.present(name)
    readable = "true" if isinstance(feature, Text) else f"({extract.list_of(name, feature)}) IS NOT NULL"
    absent, broken = extract.run(
        f"SELECT count(*) FILTER (WHERE NOT {present}), "
        f"count(*) FILTER (WHERE {present} AND NOT {readable}) FROM extract"
    ).fetchall()[0]
    says = {"series": "a series", "events": "events", "text": "words"}[feature.kind]
    report.columns.append(Summary(name, says, absent, ()))
    if broken:
        remedy = "Write a list of values, or of objects with t and v."
        report.findings.append(Finding("conformance", True, name, "cells that are no list", broken, remedy))
    if absent == report.rows:
        rule = "no value at all: the same for every row"
        report.findings.append(Finding("completeness", False, name, rule, absent, _MAP))


def _add_images(report: Report, extract: Extract, image: Image) -> None:
    """Read every image once: in a round one that cannot be read is a constant."""
    from client.sources.dicom import pixels

    names = extract.run(f"SELECT DISTINCT {extract.text(image.name)} FROM extract").fetchall()
    refused: dict[tuple[str, str], list[str]] = {}
    for (name,) in names:
        try:
            pixels(extract.source.path, str(name or ""), image)
        except ContractError as error:
            refused.setdefault((error.code, error.remedy or ""), []).append(error.problem)
    absent = sum(name is None for (name,) in names)
    report.columns.append(
        Summary(image.name, f"{image.modality}, {image.height} x {image.width_px}", absent, ())
    )
    for (code, remedy), problems in sorted(refused.items()):
        rule = f"files that are refused ({code}), such as {min(problems)}"
        report.findings.append(Finding("conformance", True, image.name, rule, len(problems), remedy))
