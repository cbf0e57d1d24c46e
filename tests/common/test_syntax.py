"""DuckDB's syntax tree: what is read comes back, and what is not one SELECT does not."""

import pytest

from common.errors import UsageError
from common.syntax import MAX_NODES, bare, conjuncts_of, fold, parsed, type_name, written


def test_a_query_is_written_as_it_was_read() -> None:
    sql = "SELECT pid, (x + 1) AS y FROM visits WHERE (x > 3)"
    assert written(parsed(sql)) == sql
    assert bare(parsed(written(parsed(sql)))) == bare(parsed(sql))


@pytest.mark.parametrize(
    "sql", ["", "SELECT", "SELECT 1; SELECT 2", "DROP TABLE t", "SELECT $1", "\0", "SELECT '"]
)
def test_what_is_not_one_select_is_refused(sql: str) -> None:
    with pytest.raises(UsageError):
        parsed(sql)


def test_large_and_deep_queries_are_refused() -> None:
    with pytest.raises(UsageError):
        parsed("SELECT " + ", ".join(["x"] * MAX_NODES) + " FROM t")
    with pytest.raises(UsageError):
        parsed("SELECT " + "f(" * 900 + "x" + ")" * 900 + " FROM t")


def test_names_are_folded_as_duckdb_does() -> None:
    assert fold("PiD") == "pid"
    # The sign for kelvin is no letter k.
    assert fold("\u212a") == "\u212a"
    assert fold("Ä") == "Ä"


def test_conjuncts_are_taken_apart() -> None:
    node = parsed("SELECT x FROM t WHERE a AND (b AND c) AND (d OR e)")["statements"][0]["node"][
        "where_clause"
    ]
    assert len(list(conjuncts_of(node))) == 4


def test_types_are_listed() -> None:
    def cast(to: str) -> str:
        return type_name(
            parsed(f"SELECT CAST(x AS {to}) AS y FROM t")["statements"][0]["node"]["select_list"][0][
                "type_expr"
            ]
        )

    assert [cast(to) for to in ("double", "DECIMAL(18, 2)", "Date")] == ["DOUBLE", "DECIMAL", "DATE"]
    for to in ("JSON", "INTEGER[]", "DECIMAL(19, 0)", "HUGEINT", "STRUCT(a INTEGER)", "s.t"):
        with pytest.raises(UsageError):
            cast(to)
