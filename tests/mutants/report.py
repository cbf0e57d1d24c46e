"""tests/MUTANTS.md: the table of the last campaign of each module and its survivors, each with its explanation.

An explanation belongs to a module, a definition in it, the line and what it became; it outlives campaigns.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

REPORT = Path(__file__).parents[1] / "MUTANTS.md"
UNEXPLAINED = "**unexplained**"
TABLE = "## Table\n\n| module | source | mutants | run | killed | explained | unexplained | incompetent | score |\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n"
SURVIVORS = "## Survivors"
_ROW = re.compile(
    r"^\| `([^`]+\.py)` \| ([0-9a-f]{8}) \|" + r" (\d+) \|" * 3 + r" \d+ \| \d+ \| (\d+) \|", re.MULTILINE
)
_SURVIVOR = re.compile(r"^- `([^`]*)`: `([^`]*)` became `([^`]*)`: (.+)$", re.MULTILINE)


class Change(NamedTuple):
    """What a mutant is: the definition it is in, its line, and what the line became (empty: removed)."""

    definition: str
    old: str
    new: str


@dataclass(frozen=True)
class Campaign:
    """One module: its digest, how many mutants it has, how many were run, and what became of those."""

    source: str
    """The first 8 hex digits of the SHA-256 of the module."""
    mutants: int
    run: int
    killed: int
    incompetent: int
    survivors: Mapping[Change, str]
    """Each with its explanation."""

    def row(self, module: str) -> str:
        """As the table has it."""
        unexplained = list(self.survivors.values()).count(UNEXPLAINED)
        survived = self.run - self.killed - self.incompetent
        judged = self.killed + unexplained
        score = f"{100 * self.killed / judged:.1f} %" if judged else "-"
        cells = (
            self.source,
            self.mutants,
            self.run,
            self.killed,
            survived - unexplained,
            unexplained,
            self.incompetent,
        )
        return f"| `{module}` | " + " | ".join(map(str, cells)) + f" | {score} |\n"


def definitions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of every definition, decorators included, outer ones first."""

    def walk(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            inner = path
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = (*path, child.name)
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                yield ".".join(inner), first, child.end_lineno or first
            yield from walk(child, inner)

    yield "module", 1, source.count("\n") + 1
    yield from walk(ast.parse(source), ())


def is_current(change: Change, source: str) -> bool:
    """Whether the definition still holds the line (or the lines, where a call has several)."""
    lines = [line.strip() for line in source.splitlines()]
    return any(
        name == change.definition and f" {change.old} " in f" {' '.join(lines[first - 1 : last])} "
        for name, first, last in definitions(source)
    )


def read(text: str) -> dict[str, Campaign]:
    """The campaigns of a report by module."""
    found = {}
    survivors = text.partition(SURVIVORS)[2]
    for row in _ROW.finditer(text.partition(SURVIVORS)[0]):
        section = survivors.partition(f"### {row[1]}\n")[2].partition("\n### ")[0]
        listed = {Change(*match.groups()[:3]): match[4] for match in _SURVIVOR.finditer(section)}
        mutants, run, killed, incompetent = (int(number) for number in row.groups()[2:])
        found[row[1]] = Campaign(row[2], mutants, run, killed, incompetent, listed)
    return found


def explained(campaign: Campaign, before: Campaign | None) -> Campaign:
    """The campaign with the explanations that an earlier one has for the same survivors."""
    known = before.survivors if before else {}
    return replace(campaign, survivors={c: known.get(c, UNEXPLAINED) for c in campaign.survivors})


def write(text: str, campaigns: Mapping[str, Campaign]) -> str:
    """The report ``text`` with another table and other survivors; what stands above the table is kept."""
    parts = [text.partition(TABLE)[0], TABLE]
    parts += [campaigns[module].row(module) for module in sorted(campaigns)]
    parts.append(f"\n{SURVIVORS}\n")
    for module in sorted(campaigns):
        if campaigns[module].survivors:
            parts.append(f"\n### {module}\n\n")
            for change, why in sorted(campaigns[module].survivors.items()):
                parts.append(f"- `{change.definition}`: `{change.old}` became `{change.new}`: {why}\n")
    return "".join(parts)
