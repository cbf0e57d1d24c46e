"""Study SQL: which SELECTs a study may ask hospitals to run, decided on the syntax tree.

Source: PRIVACY.md "Everything upstream is separable by patient"; DuckDB documentation, "json_serialize_sql".
Rules: allow-lists, so that what is not known is refused. Every row of every part belongs to the patient in
its patient column and is made of that patient's rows and public tables alone, by induction: a table of
patients has that column; GROUP BY and PARTITION BY keep patients apart; a join of two such parts is on it.
What depends on an order that rows do not have (row_number, lag, any_value, mode, float sums) is refused, or
is given an order by the values themselves; casts become TRY_CAST, so that no cell makes a query fail.
DISTINCT inside an aggregate stays among one patient's rows and is allowed.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import duckdb

from common.errors import UsageError

Node: TypeAlias = dict[str, Any]

MAX_DEPTH: Final = 50
"""Expressions, joins and subqueries inside each other."""

_ROW_AGGREGATES: Final = frozenset(
    "bool_and bool_or count count_if count_star max median min quantile_cont quantile_disc".split()
)
_ORDERED_AGGREGATES: Final = frozenset(
    "array_agg avg corr covar_pop covar_samp first last list mean regr_slope stddev stddev_pop stddev_samp "
    "string_agg sum var_pop var_samp variance".split()
)
"""What depends on the order of rows, if only in the last bit: ordered by the arguments too."""
_WINDOW_AGGREGATES: Final = frozenset("bool_and bool_or count count_star max min".split())
_RANKS: Final = frozenset("WINDOW_RANK WINDOW_RANK_DENSE WINDOW_PERCENT_RANK WINDOW_CUME_DIST".split())
_BOUNDS: Final = frozenset(
    "UNBOUNDED_PRECEDING UNBOUNDED_FOLLOWING CURRENT_ROW_RANGE EXPR_PRECEDING_RANGE "
    "EXPR_FOLLOWING_RANGE".split()
)
_SCALARS: Final = frozenset(
    "+ - * / // % ** ^ || ~~ !~~ ~~* !~~* ->> abs ceil ceiling concat concat_ws contains date_add date_diff "
    "date_part date_sub date_trunc datediff datesub day dayofweek dayofyear ends_with epoch exp floor "
    "greatest hour if ifnull isfinite isinf isnan isodow least left len length list_contains list_value ln "
    "log log10 log2 lower ltrim make_date minute month nullif position pow power prefix quarter "
    "regexp_extract regexp_full_match regexp_matches regexp_replace replace right round rtrim second sign "
    "split_part sqrt starts_with strftime strpos strptime struct_extract struct_pack substr substring suffix "
    "to_days to_hours to_minutes to_months to_seconds to_weeks to_years trim trunc try_strptime upper week "
    "year".split()
)
_OPERATORS: Final = frozenset(
    "OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL OPERATOR_COALESCE OPERATOR_TRY COMPARE_IN "
    "COMPARE_NOT_IN ARRAY_EXTRACT STRUCT_EXTRACT".split()
)
_TYPES: Final = frozenset(
    "BIGINT BOOLEAN DATE DECIMAL DOUBLE FLOAT INTEGER SMALLINT TIMESTAMP TINYINT VARCHAR".split()
)
_HIDDEN: Final = frozenset({"rowid", "oid", "ctid", "tableoid"})
_PLACE: Final = frozenset({"class", "type", "alias", "query_location", "query_location_length"})
_DEFAULTS: Final = ("", None, False, [], {}, {"map": []}, {"type": "ORDER_MODIFIER", "orders": []})

_REASONS: Final = {
    "SUBQUERY": ("a subquery inside an expression", "Join a subquery on the patient column instead."),
    "STAR": ("* and COLUMNS(...)", "Name the columns."),
    "DISTINCT_MODIFIER": ("DISTINCT", "Group by the patient column and the others instead."),
    "LIMIT_MODIFIER": ("LIMIT and OFFSET", "Leave it out; the contract's rows_per_patient limits rows."),
    "LIMIT_PERCENT_MODIFIER": ("LIMIT", "Leave it out; the contract's rows_per_patient limits rows."),
    "ORDER_MODIFIER": ("ORDER BY of the rows", "Leave it out; the order of rows means nothing here."),
    "SET_OPERATION_NODE": ("UNION, INTERSECT, EXCEPT", "Write one SELECT, with joins."),
    "RECURSIVE_CTE_NODE": ("WITH RECURSIVE", "Leave out the recursion."),
    "TABLE_FUNCTION": ("a function in place of a table", "Read the hospital's tables by name."),
    "EXPRESSION_LIST": ("VALUES", "Put public rows into a table of the contract."),
    "PIVOT": ("PIVOT and UNPIVOT", "Use aggregates with FILTER instead."),
    "SHOW_REF": ("DESCRIBE, SHOW and SUMMARIZE", "Write one SELECT."),
    "EMPTY": ("a SELECT without FROM", "Read the table extract."),
    "LAMBDA": ("a lambda", "Leave it out."),
    "POSITIONAL_REFERENCE": ("a column by its place", "Name the column."),
    "PARAMETER": ("a parameter", "Write the value."),
    "COLLATE": ("COLLATE", "Use lower()."),
}  # fmt: skip
_ORDERLESS: Final = frozenset(
    "row_number lag lead ntile nth_value first_value last_value any_value arbitrary arg_max arg_min max_by "
    "min_by mode".split()
)


@dataclass(frozen=True, slots=True)
class Checked:
    """A query that was let through: its columns in order, and the SQL that may be run, made of its tree."""

    columns: tuple[str, ...]
    sql: str


def check_query(
    sql: str, patient: str, tables: Collection[str] | None, public: Mapping[str, Collection[str]]
) -> tuple[str, ...]:
    """The names of the columns of a study's query; a query that is not separable by patient is refused.

    ``tables``: the hospital's, each with the column ``patient``; None where they are not known, so that any
    name but a public one counts as such a table. ``public``: the columns of each public table.

    Guarantee: accepted_queries_are_separable - without a patient's rows the result is the same, without them.
    Raises: UsageError ``study.contract.query`` with the construct and what to write instead.
    """
    return checked(sql, patient, tables, public).columns


def checked(
    sql: str, patient: str, tables: Collection[str] | None, public: Mapping[str, Collection[str]]
) -> Checked:
    """As ``check_query``, with the SQL to run.

    Guarantee: what_runs_was_checked - that SQL passes the same check and is its own result.
    """
    for name, columns in public.items():
        if folded(patient) in map(folded, columns):
            raise _refusal(f"the public table {name!r} has the patient column", "Rename that column.")
    check = _Check(
        folded(patient),
        None if tables is None else frozenset(map(folded, tables)),
        frozenset(map(folded, public)),
    )
    with duckdb.connect(":memory:") as connection:
        columns, written = _rewritten(connection, sql, check)
        again, twice = _rewritten(connection, written, check)
    if again != columns or twice != written:
        raise _refusal("the query is not read the same way twice", "Write it in a simpler way.")
    return Checked(columns, written)


def folded(name: str) -> str:
    """A name as DuckDB compares it: without regard to the case of ASCII letters."""
    return "".join(c.lower() if c.isascii() else c for c in name)


def _rewritten(
    connection: duckdb.DuckDBPyConnection, sql: str, check: "_Check"
) -> tuple[tuple[str, ...], str]:
    try:
        found = connection.execute("SELECT CAST(json_serialize_sql(?) AS VARCHAR)", [sql]).fetchone()
        tree = json.loads(found[0]) if found else {"error": True}
    except (duckdb.Error, ValueError, RecursionError) as error:
        raise _refusal("the query cannot be read", "Write one SELECT in DuckDB's SQL.") from error
    if tree.get("error"):
        kind = str(tree.get("error_message", ""))[:200]
        raise _refusal(f"the query is not one SELECT: {kind}", "Write one SELECT in DuckDB's SQL.")
    if len(tree["statements"]) != 1:
        raise _refusal("the query is more than one statement", "Write one SELECT.")
    statement = tree["statements"][0]
    _only(statement, "node")
    columns = check.select(statement["node"], {})
    text = json.dumps(tree)
    found = connection.execute("SELECT json_deserialize_sql(CAST(? AS JSON))", [text]).fetchone()
    return columns, str(found[0]) if found else ""


@dataclass
class _Scope:
    """What the names of one SELECT mean. ``keys``: the parts whose patient column is the row's patient."""

    parts: set[str]
    keys: set[str]
    public: set[str]
    grouped: bool = False


class _Check:
    """Walks a syntax tree; makes casts and the order inside aggregates safe in place."""

    def __init__(self, patient: str, tables: frozenset[str] | None, public: frozenset[str]) -> None:
        self._patient, self._tables, self._public, self._depth = patient, tables, public, 0

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"more than {MAX_DEPTH} things inside each other", "Write it in a simpler way.")
        yield
        self._depth -= 1

    def select(self, node: Node, outer: Mapping[str, bool]) -> tuple[str, ...]:
        """The columns of one SELECT; ``outer``: the parts that WITH has named."""
        if node["type"] != "SELECT_NODE":
            raise _unknown(node["type"])
        for modifier in node["modifiers"]:
            raise _unknown(modifier["type"])
        if node["sample"]:
            raise _refusal("a sample of rows is not allowed", "Leave it out.")
        _only(
            node, "cte_map", "select_list", "from_table", "where_clause", "group_expressions", "group_sets",
            "aggregate_handling", "having", "qualify",
        )  # fmt: skip
        with self._deeper():
            named = dict(outer)
            for entry in node["cte_map"]["map"]:
                name, held = folded(entry["key"]), entry["value"]
                if name in named or name in self._public or name in (self._tables or {"extract"}):
                    raise _refusal(f"WITH gives the name {name!r} twice", "Choose another name.")
                _only(held, "query_node", "materialized")
                self.select(held["query_node"], named)
                named[name] = True
            scope = self._from(node["from_table"], named)
            self._group(node, scope)
            for place in ("where_clause", "having", "qualify"):
                if node[place]:
                    # Neither WHERE nor, without groups, QUALIFY is about more than one row or partition.
                    inner = (
                        scope if place != "where_clause" else _Scope(scope.parts, scope.keys, scope.public)
                    )
                    self._expression(node[place], inner)
            return self._columns(node["select_list"], scope)

    def _group(self, node: Node, scope: _Scope) -> None:
        expressions = node["group_expressions"]
        if node["aggregate_handling"] != "STANDARD_HANDLING":
            raise _refusal("GROUP BY ALL is not allowed", f"Group by {self._patient!r} and name the others.")
        if not expressions:
            if node["having"] or node["group_sets"]:
                raise _refusal("HAVING needs GROUP BY", f"Group by {self._patient!r}.")
            return
        if node["group_sets"] != [list(range(len(expressions)))]:
            raise _refusal("GROUPING SETS, ROLLUP and CUBE are not allowed", "Use one plain GROUP BY.")
        for expression in expressions:
            self._expression(expression, scope)
        if not any(self._is_key(expression, scope) for expression in expressions):
            raise _refusal("GROUP BY must contain the patient column", f"Group by {self._patient!r} too.")
        scope.grouped = True

    def _columns(self, items: list[Node], scope: _Scope) -> tuple[str, ...]:
        names: list[str] = []
        for item in items:
            self._expression(item, scope)
            name = item["alias"] or (item["column_names"][-1] if item["class"] == "COLUMN_REF" else "")
            if not name:
                raise _refusal("a column of the result has no name", "Name it with AS.")
            if (folded(name) == self._patient) != self._is_key(item, scope):
                problem = f"only the patient column itself may be called {self._patient!r}, and must be"
                raise _refusal(problem, "Select it once, by that name.")
            if folded(name) in map(folded, names):
                raise _refusal(f"two columns of the result are called {name!r}", "Rename one.")
            names.append(name)
        if self._patient not in map(folded, names):
            problem = f"a SELECT without the patient column {self._patient!r}"
            raise _refusal(problem, "Select it in each SELECT.")
        return tuple(names)

    def _from(self, node: Node, named: Mapping[str, bool]) -> _Scope:
        """The parts of a FROM; the first is always one of patients."""
        if node.get("sample"):
            raise _refusal("a sample of rows is not allowed", "Leave it out.")
        with self._deeper():
            if node["type"] == "BASE_TABLE":
                return self._table(node, named)
            if node["type"] == "SUBQUERY":
                _only(node, "subquery")
                _only(node["subquery"], "node")
                if not node["alias"]:
                    raise _refusal("a subquery has no name", "Name it with AS.")
                self.select(node["subquery"]["node"], named)
                return _Scope({folded(node["alias"])}, {folded(node["alias"])}, set())
            if node["type"] == "JOIN":
                return self._join(node, named)
            raise _unknown(node["type"])

    def _table(self, node: Node, named: Mapping[str, bool]) -> _Scope:
        _only(node, "table_name", "qualified_name")
        name = folded(node["table_name"])
        if node["qualified_name"] != {"path": [node["table_name"]]}:
            raise _refusal("a table of a schema or database", "Name the table alone.")
        alias = folded(node["alias"]) or name
        if name in self._public and name not in named:
            return _Scope({alias}, set(), {alias})
        plain = name.replace("_", "a").isalnum() and name.isascii()
        if name not in named and not (plain if self._tables is None else name in self._tables):
            raise _refusal(f"there is no table {name!r}", "Use extract or one of the further tables.")
        return _Scope({alias}, {alias}, set())

    def _join(self, node: Node, named: Mapping[str, bool]) -> _Scope:
        _only(
            node, "left", "right", "condition", "join_type", "ref_type", "using_columns", "is_implicit",
            "nearest_count", "nearest_order_type",
        )  # fmt: skip
        left, right = self._from(node["left"], named), self._from(node["right"], named)
        kind, form = node["join_type"], node["ref_type"]
        if form not in ("REGULAR", "CROSS") or kind not in ("INNER", "LEFT", "SEMI", "ANTI"):
            problem = f"{form if form != 'REGULAR' else kind} joins are not allowed"
            raise _refusal(problem, "Use JOIN or LEFT JOIN on the patient column.")
        if left.parts & right.parts:
            raise _refusal("two parts of FROM have the same name", "Name each with AS.")
        if not left.keys:
            raise _refusal("FROM must begin with a table of patients", "Put the public table second.")
        both = _Scope(left.parts | right.parts, left.keys | right.keys, left.public | right.public)
        using = [folded(name) for name in node["using_columns"]]
        terms = _conjunction(node["condition"]) if node["condition"] else []
        for term in terms:
            self._expression(term, both)
        if right.keys and self._patient not in using:
            if not any(self._same_patient(term, left, right) for term in terms):
                problem = "a join of two tables of patients must be on the patient column"
                raise _refusal(problem, f"Join USING ({self._patient}).")
        if self._patient in using and not right.keys:
            raise _refusal("a public table has no patients", "Join it on its own columns.")
        if kind != "INNER":
            # Where there was no match the other side's patient is NULL, which would bring patients together.
            both.keys = left.keys
        return both

    def _same_patient(self, term: Node, left: _Scope, right: _Scope) -> bool:
        if term["type"] != "COMPARE_EQUAL":
            return False
        one, two = term["left"], term["right"]
        return any(
            self._is_key(a, left, qualified=True) and self._is_key(b, right, qualified=True)
            for a, b in ((one, two), (two, one))
        )

    def _is_key(self, node: Node, scope: _Scope, *, qualified: bool = False) -> bool:
        if node["class"] != "COLUMN_REF":
            return False
        names = [folded(name) for name in node["column_names"]]
        # Alone it is that of the first part: DuckDB refuses it where it could mean another one.
        return (names == [self._patient] and not qualified) or (
            len(names) == 2 and names[0] in scope.keys and names[1] == self._patient
        )

    def _expression(self, node: Node, scope: _Scope) -> None:
        with self._deeper():
            found = _VISITS.get(node["class"])
            if found is None:
                raise _unknown(node["class"])
            found(self, node, scope)

    def _all(self, nodes: list[Node], scope: _Scope) -> None:
        for node in nodes:
            self._expression(node, scope)

    def _column(self, node: Node, scope: _Scope) -> None:
        _only(node, "column_names")
        names = [folded(name) for name in node["column_names"]]
        if len(names) > 2 or (len(names) == 2 and names[0] not in scope.parts):
            problem = f"{'.'.join(names)!r} is not a column of this SELECT's own tables"
            raise _refusal(
                problem, "Write column or table.column; a field as struct_extract(column, 'field')."
            )
        if names[-1] in _HIDDEN or names[0] in scope.parts and len(names) == 1:
            raise _refusal(f"{names[-1]!r} cannot be read", "Name a column.")

    def _constant(self, node: Node, scope: _Scope) -> None:
        _only(node, "literal", "value")

    def _operator(self, node: Node, scope: _Scope) -> None:
        _only(node, "children")
        if node["type"] not in _OPERATORS:
            raise _unknown(node["type"])
        self._all(node["children"], scope)

    def _comparison(self, node: Node, scope: _Scope) -> None:
        _only(node, "left", "right")
        self._all([node["left"], node["right"]], scope)

    def _conjoined(self, node: Node, scope: _Scope) -> None:
        _only(node, "children")
        self._all(node["children"], scope)

    def _between(self, node: Node, scope: _Scope) -> None:
        _only(node, "input", "lower", "upper")
        self._all([node["input"], node["lower"], node["upper"]], scope)

    def _case(self, node: Node, scope: _Scope) -> None:
        _only(node, "case_checks", "else_expr")
        for check in node["case_checks"]:
            _only(check, "when_expr", "then_expr")
            self._all([check["when_expr"], check["then_expr"]], scope)
        self._expression(node["else_expr"], scope)

    def _cast(self, node: Node, scope: _Scope) -> None:
        _only(node, "child", "try_cast", "type_expr")
        kind = node["type_expr"]
        _only(kind, "type_name", "children", "qualified_name")
        name = str(kind["type_name"]).upper()
        if name not in _TYPES or kind["qualified_name"] != {"path": [kind["type_name"]]}:
            raise _refusal(f"the type {name} is not allowed", f"Use one of {', '.join(sorted(_TYPES))}.")
        for child in kind["children"]:
            if child["class"] != "CONSTANT":
                raise _unknown(child["class"])
            self._constant(child, scope)
        node["try_cast"] = True
        self._expression(node["child"], scope)

    def _function(self, node: Node, scope: _Scope) -> None:
        _only(
            node, "function_name", "arguments", "filter", "order_bys", "distinct", "is_operator",
            "qualified_name",
        )  # fmt: skip
        name = _function_name(node)
        arguments = _arguments(node, named=name == "struct_pack")
        self._all(arguments, scope)
        if name in _SCALARS:
            if node["filter"] or node["distinct"] or node["order_bys"]["orders"]:
                raise _refusal(f"{name} is not an aggregate", "Leave out FILTER, DISTINCT and ORDER BY.")
            return
        if name not in _ROW_AGGREGATES | _ORDERED_AGGREGATES:
            raise _no_function(name)
        if not scope.grouped:
            raise _refusal(f"{name} over more than one patient", f"Group by {self._patient!r}.")
        orders = node["order_bys"]["orders"]
        for order in orders:
            _only(order, "expression", "null_order")
            self._expression(order["expression"], scope)
        if node["filter"]:
            self._expression(node["filter"], scope)
        if name in ("first", "last") and not orders:
            raise _refusal(f"{name} without an order", f"Write {name}(column ORDER BY another).")
        if name in _ORDERED_AGGREGATES:
            held = [_bare(order["expression"]) for order in orders]
            for argument in arguments:
                if argument["class"] != "CONSTANT" and _bare(argument) not in held:
                    order = {"type": "ORDER_DEFAULT", "null_order": "ORDER_DEFAULT", "expression": argument}
                    orders.append(order)

    def _window(self, node: Node, scope: _Scope) -> None:
        _only(
            node, "function_name", "partitions", "orders", "start", "end", "start_expr", "end_expr",
            "filter_expr", "exclude_clause", "distinct", "qualified_name", "arguments",
        )  # fmt: skip
        name = _function_name(node)
        allowed = node["type"] in _RANKS or (
            node["type"] == "WINDOW_AGGREGATE" and name in _WINDOW_AGGREGATES
        )
        if not allowed:
            raise _no_function(name, " OVER a window")
        if not {node["start"], node["end"]} <= _BOUNDS or node["exclude_clause"] != "NO_OTHER":
            raise _refusal("a window by numbers of rows is not allowed", "Use RANGE, without EXCLUDE.")
        if not any(self._is_key(expression, scope) for expression in node["partitions"]):
            raise _refusal("PARTITION BY must contain the patient column", f"Add {self._patient!r}.")
        self._all(node["partitions"], scope)
        self._all(_arguments(node), scope)
        for order in node["orders"]:
            _only(order, "expression", "null_order")
            self._expression(order["expression"], scope)
        self._all([node[at] for at in ("start_expr", "end_expr", "filter_expr") if node[at]], scope)


_VISITS: Final = {
    "COLUMN_REF": _Check._column, "CONSTANT": _Check._constant, "OPERATOR": _Check._operator,
    "COMPARISON": _Check._comparison, "CONJUNCTION": _Check._conjoined, "BETWEEN": _Check._between,
    "CASE": _Check._case, "CAST": _Check._cast, "FUNCTION": _Check._function, "WINDOW": _Check._window,
}  # fmt: skip


def _only(node: Node, *known: str) -> None:
    """Refuse a node with anything said in a field that is not looked at."""
    for name, value in node.items():
        if name not in known and name not in _PLACE and value not in _DEFAULTS:
            raise _refusal(f"{name.replace('_', ' ')} is not allowed", "Leave it out.")


def _function_name(node: Node) -> str:
    name = str(node["function_name"]).lower()
    if node["qualified_name"] != {"path": [node["function_name"]]}:
        raise _refusal(f"{name}: a function of a schema", "Name the function alone.")
    return name


def _arguments(node: Node, *, named: bool = False) -> list[Node]:
    for argument in node["arguments"]:
        _only(argument, "expression", *(["name"] if named else []))
    return [argument["expression"] for argument in node["arguments"]]


def _conjunction(node: Node) -> list[Node]:
    if node["type"] != "CONJUNCTION_AND":
        return [node]
    return [term for child in node["children"] for term in _conjunction(child)]


def _bare(value: Any) -> Any:
    """A node without places in the text."""
    if isinstance(value, dict):
        return {name: _bare(held) for name, held in value.items() if not name.startswith("query_location")}
    return [_bare(held) for held in value] if isinstance(value, list) else value


def _no_function(name: str, where: str = "") -> UsageError:
    if name in _ORDERLESS:
        remedy = "Use last(column ORDER BY another) in a group, or rank(), which keeps ties."
        return _refusal(f"{name} depends on an order that equal rows do not have", remedy)
    return _refusal(f"the function {name}{where} is not allowed", "Use another one.")


def _unknown(kind: str) -> UsageError:
    what, remedy = _REASONS.get(kind, (kind.replace("_", " ").lower(), "Leave it out."))
    return _refusal(f"{what} cannot be kept to one patient's rows", remedy)


def _refusal(problem: str, remedy: str) -> UsageError:
    return UsageError("study.contract.query", f"contract.query: {problem}", remedy=remedy)
