"""PROTOCOL.md beside the code, held against it: each table is the code's, and neither has a row more."""

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from common import messages
from common.messages import Kind
from common.secagg import params, records
from common.secagg.records import Fixed, Integer, ListOf, Record
from tests.test_guarantees import FOLDERS, ROOT, guarantees

PAGE = (ROOT / "common" / "secagg" / "PROTOCOL.md").read_text(encoding="utf-8")
TICKED = re.compile(r"`([^`]+)`")
LABELLING = {"digest": 0, "labelled": 0, "split_labelled": 0, "vectors_digest": 0, "derive": 1}
KIND_OF = {
    "digest": "H",
    "vectors_digest": "H",
    "derive": "KDF",
    "labelled": "frame",
    "split_labelled": "frame",
}
Row = list[str]


def table(page: str, heading: str, first: str) -> list[Row]:
    """The rows under the table whose header begins with ``first``, in the section of that heading."""
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = section.split(f"\n| {first} |", 1)[1].splitlines()[2:]
    rows: list[Row] = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows
    return rows


def ticked(cell: str) -> list[str]:
    return TICKED.findall(cell)


# Records and messages --------------------------------------------------------------------------------


def record_types(base: type[Record] = Record) -> Iterator[type[Record]]:
    for record_type in base.__subclasses__():
        # A slots dataclass is made twice: the class that records.py names is the second one.
        if getattr(records, record_type.__name__) is record_type:
            yield record_type


def written(column: Integer | Fixed | ListOf) -> str:
    """A column as the page writes it."""
    if isinstance(column, Integer):
        return f"u{8 * column.size_bytes}"
    if isinstance(column, Fixed):
        return str(column.size_bytes)
    if isinstance(column.entry, tuple):
        return f"[{', '.join(map(written, column.entry))}]"
    return f"[`{column.entry.__name__}`]"


def records_hold(page: str) -> None:
    said = {ticked(row[1])[0]: row[3] for row in table(page, "Messages", "# | Record")}
    due = {
        record_type.__name__: ", ".join(f"`{name}` {written(column)}" for name, column in record_type.COLUMNS)
        for record_type in record_types()
    }
    assert said == due


def kinds_hold(page: str) -> None:
    def told(record_type: type[Record] | None, many: bool) -> str:
        return "-" if record_type is None else f"{'many ' * many}`{record_type.__name__}`"

    def due(kind: Kind) -> tuple[str, str]:
        if kind is messages.STUDY:
            return "document", "a decision"
        if kind is messages.CONSENT:
            return "-", "a decision"
        return told(kind.request, kind.many_requests), told(kind.reply, kind.many_replies)

    said = {
        ticked(row[0])[0]: tuple(re.sub(r", the .* beside it$", "", cell) for cell in row[1:])
        for row in table(page, "Messages", "Kind")
    }
    assert said == {name: due(kind) for name, kind in messages.KINDS.items()}


# Labels ----------------------------------------------------------------------------------------------


def text_of(node: ast.expr, names: dict[str, ast.expr], where: str) -> str:
    """A label as the page writes it: what follows a constant beginning is NAME."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names, where) + "NAME"
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        return f"{node.values[0].value}NAME"
    if isinstance(node, ast.Name) and node.id in names:
        return text_of(names[node.id], names, where)
    raise AssertionError(f"{where}: the label {ast.unparse(node)} is not a constant")


def uses(source: str, where: str) -> Iterator[tuple[str, str]]:
    """(label, kind) of every call in a module that takes a label."""
    tree = ast.parse(source)
    names: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value:
            names[target.id] = node.value
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # A large vector is hashed without a copy: its label and first parts, then the rest.
    hashed = [argument for call in calls if called(call) == "sha256" for argument in call.args]
    for call in calls:
        # A hash's own digest() is a method too, and takes nothing.
        if (name := called(call)) in LABELLING and call.args:
            label = text_of(call.args[LABELLING[name]], names, where)
            yield label, "H" if call in hashed else KIND_OF[name]


def called(call: ast.Call) -> str:
    return str(getattr(call.func, "id", getattr(call.func, "attr", "")))


@lru_cache
def all_uses() -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            # These two define the functions: their labels are arguments.
            if path != ROOT / "common" / "encoding.py":
                found |= set(uses(path.read_text(encoding="utf-8"), str(path)))
    return found


def labels_hold(page: str) -> None:
    rows = [
        ("" if row[0] == "(empty)" else ticked(row[0])[0], row[1]) for row in table(page, "Labels", "Label")
    ]
    assert len(set(rows)) == len(rows)
    assert set(rows) == all_uses()


# Constants and rules ---------------------------------------------------------------------------------


def constants_hold(page: str) -> None:
    for place, value, *_ in table(page, "Bytes", "Constant"):
        module, _, name = ticked(place)[0].rpartition(".")
        found: Any = getattr(importlib.import_module(module), name)
        told = " ".join(found) if isinstance(found, tuple) else str(found).removesuffix(".0")
        assert value.strip("`") == told, place
    listed = {ticked(row[0])[0] for row in table(page, "Bytes", "Constant")}
    assert {f"common.secagg.{module}.{name}" for module, name in public_numbers()} <= listed


def public_numbers() -> Iterator[tuple[str, str]]:
    """The public constants of records, codec and params that are numbers."""
    for module in ("records", "codec", "params"):
        found = importlib.import_module(f"common.secagg.{module}")
        for name, value in vars(found).items():
            if (
                name.isupper()
                and type(value) is int
                and f"\n{name}: Final" in Path(str(found.__file__)).read_text()
            ):
                yield module, name


def rules_hold(page: str) -> None:
    """The codes of the rules, in the order in which they are asked first."""
    tree = ast.parse(Path(params.__file__).read_text(encoding="utf-8"))
    rules = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_rules")
    yielded = [node.value for node in ast.walk(rules) if isinstance(node, ast.Yield)]
    yielded.sort(key=lambda value: value.lineno if value else 0)
    codes = [ast.literal_eval(value.elts[1]) for value in yielded if isinstance(value, ast.Tuple)]
    assert len(codes) == len(yielded) > 15
    assert [ticked(row[0])[0] for row in table(page, "Roster, manifest, run", "Code")] == list(
        dict.fromkeys(codes)
    )


# Invariants and tests --------------------------------------------------------------------------------


def names_of_tests(path: str) -> set[str]:
    """Test functions, and stateful machines, which are named where their case is assigned."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name.lower().startswith("test")}


def check_test(name: str) -> None:
    path, _, function = name.partition("::")
    assert (ROOT / path).is_file(), name
    assert function in names_of_tests(path), name


@lru_cache
def places_of_guarantees() -> dict[str, set[str]]:
    """The modules that give each Guarantee."""
    places: dict[str, set[str]] = {}
    for where, name in guarantees():
        places.setdefault(name, set()).add(where.split(":")[0])
    return places


def invariants_hold(page: str) -> None:
    places = places_of_guarantees()
    for heading, letter, count in (("Hospital invariants", "I", 14), ("Hub invariants", "C", 7)):
        rows = table(page, heading, "# | Invariant")
        assert [row[0] for row in rows] == [f"{letter}{number}" for number in range(1, count + 1)]
        for number, text, modules, held in rows:
            assert len(text) > 40, number
            assert all((ROOT / module).is_file() for module in ticked(modules)), number
            assert ticked(held), number
            for name in ticked(held):
                if "::" in name:
                    check_test(name)
                else:
                    assert places.get(name, set()) & set(ticked(modules)), f"{number}: {name}"
    named = set(ticked(page))
    secagg = {
        name for name, found in places.items() if any(place.startswith("common/secagg/") for place in found)
    }
    assert secagg - named == set()


def items_hold(page: str) -> None:
    for heading in ("The design's list", "What the project asked for"):
        rows = table(page.replace("### ", "## "), heading, "Item")
        assert len({row[0] for row in rows}) == len(rows)
        for item, held in rows:
            assert ticked(held), item
            for name in ticked(held):
                check_test(name)


HELD: dict[str, Callable[[str], None]] = {
    "records": records_hold,
    "kinds": kinds_hold,
    "labels": labels_hold,
    "constants": constants_hold,
    "rules": rules_hold,
    "invariants": invariants_hold,
    "tests": items_hold,
}


@pytest.mark.parametrize("what", HELD)
def test_the_page_is_the_codes(what: str) -> None:
    HELD[what](PAGE)


def without(start: str) -> Callable[[str], str]:
    """The page without the one line that begins so."""
    return lambda page: re.sub(rf"(?m)^{re.escape(start)}.*\n", "", page, count=1)


def put(old: str, new: str) -> Callable[[str], str]:
    return lambda page: page.replace(old, new, 1)


def twice(start: str, name: str, other: str) -> Callable[[str], str]:
    """The page with one more row: the line that begins so, again under another name."""
    return lambda page: re.sub(
        rf"(?m)^{re.escape(start)}.*\n", lambda row: row[0] + row[0].replace(name, other), page, count=1
    )


CHANGED: list[tuple[str, Callable[[str], str]]] = [
    ("records", without("| R5 |")),
    ("records", twice("| R4 |", "OpenPlease", "ClosePlease")),
    ("records", put("`sum_digest` 32", "`sum_digest` 16")),
    ("records", put("`nu` 32, `sig` 64", "`sig` 64, `nu` 32")),
    ("records", put("`round` u32, `attempt` u8", "`round` u32, `attempt` u16")),
    ("records", put("`since` [u64]", "`since` u64")),
    ("records", put("`remembered` [u16, u64]", "`remembered` [u64, u16]")),
    ("kinds", without("| `query.close`")),
    ("kinds", twice("| `query.close`", "close", "reopen")),
    ("kinds", put("| `train.open` | `OpenPlease` | `Open` |", "| `train.open` | `OpenPlease` | - |")),
    ("kinds", put("| `query.cosign` | many `Head` |", "| `query.cosign` | `Head` |")),
    ("labels", without("| `selfmask` |")),
    ("labels", twice("| `selfmask` |", "selfmask", "groupmask")),
    ("labels", put("| `ctx` | H |", "| `ctx` | KDF |")),
    ("labels", without("| (empty) |")),
    ("constants", without("| `common.secagg.params.MAX_WORDS`")),
    ("constants", put("| 1048576 |", "| 1048577 |")),
    ("constants", put("| params scalars |", "| scalars params |")),
    ("rules", without("| `overflow` |")),
    ("rules", twice("| `overflow` |", "overflow", "underflow")),
    ("invariants", without("| I9 |")),
    ("invariants", twice("| C7 |", "C7", "C8")),
    ("invariants", put("`opening_erases_the_round`", "`opening_erases_everything`")),
    ("invariants", put("| `client/state.py`, `common", "| `common")),
    ("invariants", put("(`the_first_seed_is_final`)", "")),
    ("invariants", put("test_the_vectors_are_never_stored", "test_the_vectors_are_always_stored")),
    ("tests", put("test_state.py::test_replaced", "test_state.py::test_misplaced")),
    ("tests", put("`tests/common/secagg/test_masks.py::test_masked_words_are_uniform`", "-")),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change"), CHANGED, ids=range(len(CHANGED)))
def test_a_changed_page_is_noticed(what: str, change: Callable[[str], str]) -> None:
    changed = change(PAGE)
    assert changed != PAGE
    HELD[what](PAGE)
    with pytest.raises(AssertionError):
        HELD[what](changed)


def test_a_new_label_in_the_code_is_noticed() -> None:
    source = 'def f(key: bytes) -> bytes:\n    return derive(key, "late", b"")\n'
    assert set(uses(source, "there")) == {("late", "KDF")}
    assert not set(uses(source, "there")) & all_uses()
    kept = '_LABEL: Final = "kept/1"\nx = labelled(_LABEL, b"")\ny = encoding.digest("a/" + name, b"")\n'
    assert set(uses(kept, "there")) == {("kept/1", "frame"), ("a/NAME", "H")}
    assert set(uses("hashlib.sha256().digest()", "there")) == set()
    with pytest.raises(AssertionError, match="not a constant"):
        list(uses("derive(key, label)", "there"))


def test_only_the_encoding_makes_the_prefix() -> None:
    """A label cannot come past the functions that the list of labels is read from."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if path != ROOT / "common" / "encoding.py":
                assert '"wardround/v1' not in source, path
                # vectors_digest hashes large vectors without a copy, under a label it is given.
                allowed = path == ROOT / "common" / "secagg" / "keys.py"
                assert allowed or not re.search(r"\bPREFIX\b(?!:)", source.replace("ORIGIN_PREFIX", "")), path


def test_the_page_says_what_it_is() -> None:
    text = " ".join(PAGE.split())
    for words in ("No outside review yet", "Pre-release", "does not stop", "Assumptions."):
        assert words in text
    assert max(len(line) for line in PAGE.splitlines() if not line.startswith("|")) <= 120
