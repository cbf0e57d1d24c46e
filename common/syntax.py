"""DuckDB's syntax tree of a query: read, written again, and the parts of it that a study's query may have.

Source: DuckDB documentation, "Json_serialize_sql". Rules: lists of what is allowed; what is not listed is
refused, by name, so that what DuckDB learns tomorrow is refused too.
"""

import json
from collections.abc import Iterator
from typing import Any, Final, NoReturn, TypeAlias

from common.errors import UsageError

CODE: Final = "study.contract.query"
REMEDY: Final = "Change the query; its rules are in the docstring of common/query.py."
MAX_NODES: Final = 20_000
MAX_DEPTH: Final = 60

Node: TypeAlias = dict[str, Any]

# DuckDB takes these for functions where no column has the name; rowid is a place.
NO_COLUMN: Final = frozenset({
    "rowid", "current_date", "current_time", "current_timestamp", "localtime", "localtimestamp",
    "today", "now", "current_user", "session_user", "user", "current_role", "current_catalog",
    "current_schema", "current_database", "filename", "file_row_number", "file_index",
})  # fmt: skip
SCALARS: Final = frozenset({
    "+", "-", "*", "/", "//", "%", "||", "~~", "!~~", "~~*", "!~~*", "abs", "ceil", "ceiling",
    "floor", "round", "trunc", "sign", "sqrt", "exp", "ln", "log10", "log2", "pow", "power",
    "greatest", "least", "isnan", "isfinite", "lower", "upper", "trim", "ltrim", "rtrim", "length",
    "substring", "substr", "left", "right", "replace", "contains", "starts_with", "prefix",
    "suffix", "split_part", "concat", "regexp_matches", "regexp_full_match", "regexp_extract",
    "nullif", "ifnull", "if", "date_part", "date_diff", "datediff", "date_trunc", "year", "month",
    "day", "hour", "epoch", "make_date", "try_strptime", "to_days", "to_hours", "to_minutes",
    "struct_pack", "struct_extract",
})  # fmt: skip
AGGREGATES: Final = frozenset(
    {"count", "count_star", "min", "max", "sum", "avg", "bool_and", "bool_or", "list"}
)
WINDOWS: Final = frozenset({"rank", "dense_rank", "count", "count_star", "min", "max", "sum", "avg"})
EXACT: Final = frozenset(
    {"TINYINT", "SMALLINT", "INTEGER", "INT", "BIGINT", "DECIMAL", "NUMERIC", "BOOLEAN", "BOOL"}
)
_TYPES: Final = EXACT | {
    "DOUBLE",
    "FLOAT",
    "REAL",
    "VARCHAR",
    "TEXT",
    "STRING",
    "DATE",
    "TIMESTAMP",
    "DATETIME",
}
OPERATORS: Final = frozenset({
    "OPERATOR_COALESCE", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_NOT", "COMPARE_IN",
    "COMPARE_NOT_IN", "STRUCT_EXTRACT", "OPERATOR_TRY",
})  # fmt: skip
COMPARISONS: Final = frozenset({
    "COMPARE_EQUAL", "COMPARE_NOTEQUAL", "COMPARE_LESSTHAN", "COMPARE_GREATERTHAN",
    "COMPARE_LESSTHANOREQUALTO", "COMPARE_GREATERTHANOREQUALTO", "COMPARE_DISTINCT_FROM",
    "COMPARE_NOT_DISTINCT_FROM",
})  # fmt: skip

# The fields of a node that may be there; each is looked at below, but for those named here as inert.
_INERT: Final = frozenset({"query_location", "query_location_length"})
SELECT: Final = frozenset({
    "type", "cte_map", "select_list", "from_table", "where_clause", "group_expressions",
    "group_sets", "aggregate_handling",
})  # fmt: skip
JOIN: Final = frozenset({
    "type", "left", "right", "condition", "join_type", "ref_type", "using_columns", "delim_flipped",
    "is_implicit", "nearest_count", "nearest_order_type", "nearest_approx",
})  # fmt: skip
FUNCTION: Final = frozenset({
    "class", "type", "alias", "function_name", "qualified_name", "arguments", "order_bys",
    "distinct", "filter", "is_operator", "export_state",
})  # fmt: skip
WINDOW: Final = frozenset({
    "class", "type", "alias", "function_name", "qualified_name", "arguments", "partitions",
    "orders", "start", "end", "exclude_clause", "ignore_nulls", "has_ignore_nulls", "distinct", "start_expr",
    "end_expr",
})  # fmt: skip


def parsed(sql: str) -> Node:
    """DuckDB's syntax tree of the one statement in ``sql``."""
    # Imported here: whoever checks a study without a query needs no database.
    import duckdb

    with duckdb.connect(":memory:") as connection:
        try:
            query = "SELECT json_serialize_sql(?::VARCHAR, skip_null := true, skip_empty := true)"
            found = connection.execute(query, [sql]).fetchone()
            root: Node = json.loads(str((found or ("{}",))[0]))
        except (duckdb.Error, ValueError, RecursionError):
            root = {"error": True}
    if root.get("error") or len(root.get("statements", [])) != 1:
        refuse("it must be exactly one SELECT that DuckDB can read")
    if set(root["statements"][0]) != {"node"}:
        refuse("it must be a plain SELECT")
    if not _is_small(root):
        refuse("it is too large, or too deep inside one another")
    return root


def _is_small(root: Node) -> bool:
    left: list[tuple[Any, int]] = [(root, 0)]
    nodes = 0
    while left:
        node, depth = left.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > 4 * MAX_DEPTH:
            return False
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        left += [(child, depth + 1) for child in inner if isinstance(child, dict | list)]
    return True


def written(root: Node) -> str:
    """The query of a tree."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        found = connection.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(root)]).fetchone()
    return str((found or ("",))[0])


def type_name(node: Node) -> str:
    """The name of a type that may be cast to."""
    name = str(node.get("type_name", "")).upper()
    known = node.get("qualified_name") == {"path": [node.get("type_name")]}
    if not node:
        return ""
    only(node, {"class", "type", "type_name", "qualified_name", "children"}, "a type")
    if name not in _TYPES or not known:
        refuse(f"the type {name!r} is not among those allowed")
    sizes = [child.get("literal", {}).get("text", "") for child in node.get("children", [])]
    # Sums of more digits could overflow, which is a failure that depends on values.
    if sizes and not (name in ("DECIMAL", "NUMERIC") and sizes[0].isdigit() and int(sizes[0]) <= 18):
        refuse("only DECIMAL takes sizes, and at most 18 digits")
    return name


def function_name(node: Node, fields: frozenset[str]) -> str:
    """The name of a function that is called by one name alone."""
    only(node, fields, "a function")
    if node["qualified_name"] != {"path": [node["function_name"]]}:
        refuse("a function is named by one name, without a schema")
    return str(node["function_name"])


def arguments_of(node: Node) -> list[Node]:
    """What a function is called with."""
    for argument in node.get("arguments", []):
        only(argument, {"name", "expression"}, "an argument")
    return [argument["expression"] for argument in node.get("arguments", [])]


def fold(name: str) -> str:
    """A name as DuckDB compares it: ASCII letters without case."""
    return "".join(c.lower() if c.isascii() else c for c in name)


def conjuncts_of(node: Node) -> Iterator[Node]:
    """What AND joins."""
    if node.get("type") == "CONJUNCTION_AND":
        for child in node["children"]:
            yield from conjuncts_of(child)
    else:
        yield node


def name_of(node: Node) -> str:
    """The name of a column that a SELECT makes."""
    if "alias" in node:
        return str(node["alias"])
    if node.get("class") == "COLUMN_REF":
        return str(node["column_names"][-1])
    if node.get("class") == "STAR":
        refuse("* is not allowed: name the columns")
    return refuse("each column that is computed needs a name: write AS")


def bare(node: Any) -> Any:
    """A tree without places and names, to compare two of them."""
    if isinstance(node, dict):
        return {key: bare(value) for key, value in node.items() if key not in _INERT and key != "alias"}
    return [bare(value) for value in node] if isinstance(node, list) else node


def only(node: Node, fields: frozenset[str] | set[str], what: str) -> None:
    """Refuse a node that has other fields than these; ``what`` it is."""
    unknown = node.keys() - fields - _INERT
    if unknown:
        refuse(f"{what} with {min(unknown)} is not allowed")


def refuse(reason: str) -> NoReturn:
    """Refuse a query with the reason."""
    raise UsageError(CODE, f"contract.query: {reason}", remedy=REMEDY, path="contract.query")
