"""Every ``Guarantee: name - ...`` in a docstring has a test function ``test_name``."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "client", "server")
MARK = re.compile(r"Guarantee:")
GUARANTEE = re.compile(r"Guarantee:\s+([a-z][a-z0-9_]*)\s+-\s+\S")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Where and what: every docstring of a file, also of nested functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", text


def guarantees() -> list[tuple[str, str]]:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for where, text in docstrings(path):
                found += [(where, name) for name in GUARANTEE.findall(text)]
    return found


def test_functions() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
            # A stateful machine is named where its case is assigned.
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


test_functions.__test__ = False  # type: ignore[attr-defined]


def test_guarantees_are_found() -> None:
    assert len(guarantees()) > 80


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_guarantee_is_well_formed(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for where, text in docstrings(path):
            assert len(MARK.findall(text)) == len(GUARANTEE.findall(text)), f"{where}: name - text"
        # A guarantee outside a docstring would not be looked at.
        whole = path.read_text(encoding="utf-8")
        assert len(MARK.findall(whole)) == sum(len(MARK.findall(text)) for _, text in docstrings(path)), path


def test_every_guarantee_has_a_test() -> None:
    tests = test_functions()
    missing = [f"{where}: test_{name}" for where, name in guarantees() if f"test_{name}" not in tests]
    assert missing == []
