"""Which mutants there are of a module: cosmic-ray's operators, less those that say nothing, plus two of its own."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from parso.python.tree import Keyword

from tests.mutants.report import Change, definitions

# Of the eleven others that an operator may become, the ones nearest to it: + is -, never >> too.
NEAREST = {
    "Add": ("Sub",), "Sub": ("Add",), "Mul": ("FloorDiv", "Add"), "Div": ("Mul",), "FloorDiv": ("Mul",),
    "Mod": ("FloorDiv",), "Pow": ("Mul",), "RShift": ("LShift",), "LShift": ("RShift",),
    "BitOr": ("BitAnd", "BitXor"), "BitAnd": ("BitOr",), "BitXor": ("BitOr",),
    "Eq": ("NotEq", "LtE", "GtE"), "NotEq": ("Eq", "Lt", "Gt"), "Lt": ("LtE", "NotEq", "GtE"),
    "LtE": ("Lt", "Eq", "Gt"), "Gt": ("GtE", "NotEq", "LtE"), "GtE": ("Gt", "Eq", "Lt"),
    "Is": ("IsNot",), "IsNot": ("Is",), "Delete": ("USub", "Not"),
}  # fmt: skip
_REPLACEMENT = re.compile(r"core/Replace(?:Binary|Comparison|Unary)Operator_([A-Za-z]+)_([A-Za-z]+)")
_REFUSALS = re.compile(r"(_require|_wrong|_malformed|check_signature)$")

Point = tuple[int, int]


class RemoveCall(Operator):
    """A call that stands alone as a statement is not made: the check that was forgotten."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Point, Point]]:
        """The statements that are calls."""
        if (
            node.type == "simple_stmt"
            and node.children[0].type == "atom_expr"
            and node.children[0].children[-1].type == "trailer"
            and node.children[0].children[-1].children[0] == "("
        ):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """``pass`` in its place."""
        call = node.children[0]
        node.children[0] = Keyword("pass", call.start_pos, call.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """None: tests/mutants/test_mutants.py has them."""
        return ()


class SwapMembership(Operator):
    """``in`` becomes ``not in`` and the other way round."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Point, Point]]:
        """The comparisons of membership."""
        if node.type == "comparison":
            for operator in node.children[1::2]:
                if operator.get_code().split() in (["in"], ["not", "in"]):
                    yield operator.start_pos, operator.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """The other of the two."""
        places = [at for at, child in enumerate(node.children) if child.get_code().split()[-1:] == ["in"]]
        at = [place for place in places if place % 2][index]
        other = " not in" if node.children[at].get_code().split() == ["in"] else " in"
        node.children[at] = get_ast(other)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """None: tests/mutants/test_mutants.py has them."""
        return ()


OWN: dict[str, type[Operator]] = {"RemoveCall": RemoveCall, "SwapMembership": SwapMembership}


@dataclass(frozen=True)
class Mutant:
    """One change of a module."""

    operator: str
    occurrence: int
    change: Change

    def apply(self, source: str) -> str:
        """The module changed. Raises ValueError when it has no such place."""
        changed = mutate_code(source, _operator(self.operator), self.occurrence)
        if changed is None:
            raise ValueError(f"there is no place {self.occurrence} for {self.operator}")
        return str(changed)


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module that says something."""
    tree, silent, names = get_ast(source), list(_silent(source)), list(definitions(source))
    found = []
    for operator in [name for name in operator_names() if _is_wanted(name)] + list(OWN):
        places = [
            (start, end)
            for node in ast_nodes(tree)
            for start, end in _operator(operator).mutation_positions(node)
        ]
        for occurrence, (start, end) in enumerate(places):
            if any(first <= start and end <= last for first, last in silent):
                continue
            changed = Mutant(operator, occurrence, Change("", "", "")).apply(source)
            try:
                ast.parse(changed)
            except SyntaxError:
                continue
            innermost = [name for name, first, last in names if first <= start[0] <= last][-1]
            found.append(Mutant(operator, occurrence, Change(innermost, *_lines(source, changed))))
    return found


def _operator(name: str) -> Operator:
    kind: type[Operator] = OWN[name] if name in OWN else get_operator(name)
    return kind()


def _is_wanted(name: str) -> bool:
    if get_operator(name).arguments():
        return False
    replaced = _REPLACEMENT.fullmatch(name)
    return replaced is None or replaced[2] in NEAREST.get(replaced[1], ())


def _lines(old: str, new: str) -> tuple[str, str]:
    """The lines that differ, of both, each on one line."""
    before, after = old.splitlines(), new.splitlines()
    first = _same(before, after)
    last = _same(before[first:][::-1], after[first:][::-1])
    taken, given = before[first : len(before) - last], after[first : len(after) - last]
    return " ".join(map(str.strip, taken)).strip(), " ".join(map(str.strip, given)).strip()


def _same(some: list[str], others: list[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))


def _silent(source: str) -> Iterator[tuple[Point, Point]]:
    """Where a mutant says nothing: unions of types, ``slots=``, the text of errors and who is named in it."""
    for node in ast.walk(ast.parse(source)):
        quiet: list[ast.AST] = []
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            quiet = [part for part in ast.walk(node.annotation) if isinstance(part, ast.BinOp)]
        elif isinstance(node, ast.FunctionDef) and node.returns:
            quiet = [node.returns]
        elif isinstance(node, ast.keyword) and node.arg == "slots":
            quiet = [node.value]
        elif isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and _REFUSALS.search(ast.unparse(node.func))
        ) or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "problem"):  # fmt: skip
            quiet = [part for part in ast.walk(node) if isinstance(part, ast.JoinedStr)]
        for part in quiet:
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)  # type: ignore[attr-defined]
