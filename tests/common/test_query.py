"""Which queries of studies are accepted, and the reasons of all others."""

import duckdb
import pytest

from common.errors import UsageError
from common.query import check_query

PUBLIC = {"units": ("code", "factor")}
PRIVATE = {"extract": ("pid", "age", "sex", "x", "rowno", "pat"), "visits": ("PID", "day", "ward", "x")}

ACCEPTED = [
    "SELECT pid, age FROM extract",
    "SELECT e.pid AS PID, e.age AS years FROM extract AS e WHERE e.age > 3 AND (sex = 'f' OR sex IS NULL)",
    "SELECT pid, TRY_CAST(x AS DOUBLE) * 2 + 1 AS y, CASE WHEN age > 60 THEN 1 ELSE 0 END AS old FROM extract",
    "SELECT pid, CAST(x AS DECIMAL(12, 3)) AS y, DATE '2020-01-01' AS d, [x].x AS z FROM extract".replace(
        ", [x].x AS z", ""
    ),
    "SELECT pid, count(*) AS n, max(x) AS x, sum(CAST(x AS BIGINT)) AS s, avg(x::DECIMAL(10,2)) AS a FROM extract GROUP BY pid",
    "SELECT pid, sex, count(*) FILTER (WHERE x > 3) AS n FROM extract GROUP BY pid, sex",
    "SELECT pid, max({'d': day, 'v': x}).v AS latest FROM visits GROUP BY pid",
    "SELECT pid, list({'t': day, 'v': ward} ORDER BY {'t': day, 'v': ward}) AS wards FROM visits GROUP BY pid",
    "SELECT pid, rank() OVER (PARTITION BY pid ORDER BY day DESC) AS r, count(*) OVER (PARTITION BY ward, pid) AS n FROM visits",
    "SELECT e.pid, e.age, v.n FROM extract e LEFT JOIN (SELECT pid, count(*) AS n FROM visits GROUP BY pid) AS v ON e.pid = v.pid",
    "SELECT e.pid, v.ward FROM extract e JOIN visits v ON v.pid = e.pid AND e.age < v.x",
    "SELECT pid, ward FROM extract JOIN visits USING (pid)",
    "SELECT e.pid, u.factor FROM extract e, units u WHERE e.x = u.code",
    "SELECT e.pid, u.factor FROM units u JOIN extract e ON u.code < e.x",
    "SELECT e.pid, u.factor FROM extract e LEFT JOIN units u ON u.code = e.x",
    "WITH v AS (SELECT pid, max(day) AS day FROM visits GROUP BY pid), w AS (SELECT pid, day FROM v) SELECT pid, day FROM w",
    "WITH u AS (SELECT code, max(factor) AS factor FROM units GROUP BY code) SELECT e.pid, u.factor FROM extract e JOIN u ON u.code = e.x",
    "SELECT e.pid, e.r FROM (SELECT pid, rank() OVER (PARTITION BY pid ORDER BY day) AS r FROM visits) AS e WHERE e.r = 1",
    "SELECT pid, regexp_matches(sex, '^f') AS f, date_part('year', TRY_CAST(x AS DATE)) AS y FROM extract",
]

REFUSED = {
    # Not one SELECT.
    "": "exactly one SELECT",
    "SELECT 1; SELECT 2": "exactly one SELECT",
    "DROP TABLE extract": "exactly one SELECT",
    "INSERT INTO extract VALUES (1)": "exactly one SELECT",
    "COPY extract TO 'a.csv'": "exactly one SELECT",
    "PRAGMA database_list": "exactly one SELECT",
    "SELECT pid FROM extract UNION SELECT pid FROM visits": "UNION",
    "WITH RECURSIVE r AS (SELECT pid, 1 AS n FROM extract UNION ALL SELECT pid, n + 1 FROM r) SELECT pid, n FROM r": "recursion",
    "VALUES (1)": "FROM takes",
    "FROM extract": "*",
    "SELECT 1 AS pid": "FROM takes",
    "SELECT code FROM units": "must read a table of the hospital",
    # Rows have no order, and none is left out.
    "SELECT pid FROM extract LIMIT 5": "LIMIT",
    "SELECT pid FROM extract LIMIT 5%": "LIMIT",
    "SELECT pid FROM extract OFFSET 5": "LIMIT",
    "SELECT pid FROM extract ORDER BY age": "ORDER",
    "SELECT DISTINCT pid FROM extract": "DISTINCT",
    "SELECT DISTINCT ON (sex) pid FROM extract": "DISTINCT",
    "SELECT pid FROM extract USING SAMPLE 10": "SAMPLE",
    "SELECT pid FROM extract TABLESAMPLE 10%": "SAMPLE",
    "SELECT pid, rowid FROM extract": "rowid",
    "SELECT pid, e.rowid AS r FROM extract e": "rowid",
    "SELECT pid, #1 AS p FROM extract": "POSITIONAL_REFERENCE",
    "SELECT pid FROM extract QUALIFY rank() OVER (PARTITION BY pid ORDER BY x) = 1": "QUALIFY",
    "SELECT pid, count(*) AS n FROM extract GROUP BY pid HAVING count(*) > 1": "HAVING",
    # The patient column.
    "SELECT age FROM extract": "hand on",
    "SELECT age AS pid FROM extract": "may be called",
    "SELECT pid AS p, age FROM extract": "hand on",
    "SELECT lower(pid) AS pid FROM extract": "may be called",
    "SELECT e.age AS pid, e.pid AS q FROM extract e": "may be called",
    "SELECT pid, pid FROM extract": "one name",
    "SELECT pid, age, sex AS AGE FROM extract": "one name",
    "SELECT a.pid FROM extract AS a(age, pid)": "new names",
    "SELECT * FROM extract": "*",
    "SELECT e.* FROM extract e": "*",
    "SELECT COLUMNS('p.*') FROM extract": "*",
    "SELECT pid, age + 1 FROM extract": "needs a name",
    "WITH v AS (SELECT age AS pid FROM extract) SELECT pid FROM v": "may be called",
    "WITH v AS (SELECT count(*) AS n FROM extract) SELECT e.pid, v.n FROM extract e, v": "needs GROUP BY",
    "SELECT s.pid FROM (SELECT x AS s FROM extract) t": "hand on",
    "SELECT pat.pid FROM extract": "may be called",
    "SELECT e.pat.pid FROM extract e": "not a column of a table",
    # Groups and windows.
    "SELECT count(*) AS pid FROM extract": "may be called",
    "SELECT pid, max(age) AS a FROM extract": "needs GROUP BY",
    "SELECT sex, count(*) AS n FROM extract GROUP BY sex": "GROUP BY must contain",
    "SELECT max(pid) AS pid, sex FROM extract GROUP BY sex": "GROUP BY must contain",
    "SELECT pid, count(*) AS n FROM extract GROUP BY ALL": "GROUP BY ALL",
    "SELECT pid, count(*) AS n FROM extract GROUP BY 1": "columns by their names",
    "SELECT pid, count(*) AS n FROM extract GROUP BY ROLLUP (pid, sex)": "ROLLUP",
    "SELECT pid, count(*) AS n FROM extract GROUP BY GROUPING SETS ((pid), ())": "GROUPING SETS",
    "SELECT pid, count(*) AS n FROM extract GROUP BY CUBE (pid)": "CUBE",
    "SELECT pid, lower(pid) AS l FROM extract GROUP BY pid, lower(pid)": "columns by their names",
    "SELECT pid, count(*) OVER () AS n FROM extract": "PARTITION BY must contain",
    "SELECT pid, rank() OVER (ORDER BY age) AS r FROM extract": "PARTITION BY must contain",
    "SELECT pid, rank() OVER (PARTITION BY sex ORDER BY age) AS r FROM extract": "PARTITION BY must contain",
    "SELECT pid, row_number() OVER (PARTITION BY pid ORDER BY x) AS r FROM extract": "by chance",
    "SELECT pid, lag(x) OVER (PARTITION BY pid ORDER BY x) AS r FROM extract": "by chance",
    "SELECT pid, first_value(x) OVER (PARTITION BY pid ORDER BY x) AS r FROM extract": "by chance",
    "SELECT pid, ntile(3) OVER (PARTITION BY pid ORDER BY x) AS r FROM extract": "by chance",
    "SELECT pid, max(x) OVER (PARTITION BY pid ORDER BY x ROWS 1 PRECEDING) AS r FROM extract": "frame",
    "SELECT pid, 1 + rank() OVER (PARTITION BY pid ORDER BY x) AS r FROM extract": "a window is not allowed",
    "SELECT pid, rank() OVER (PARTITION BY pid ORDER BY x + 1) AS r FROM extract": "columns by their names",
    # What depends on the order of rows.
    "SELECT pid, first(x) AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid, any_value(x) AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid, arg_max(x, age) AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid, mode(x) AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid, list(x) AS x FROM extract GROUP BY pid": "ORDER BY the same",
    "SELECT pid, list(x ORDER BY age) AS x FROM extract GROUP BY pid": "ORDER BY the same",
    "SELECT pid, max(x ORDER BY x) AS x FROM extract GROUP BY pid": "ORDER BY the same",
    "SELECT pid, string_agg(x, ',') AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid, sum(x) AS x FROM extract GROUP BY pid": "CAST to a whole number",
    "SELECT pid, avg(TRY_CAST(x AS DOUBLE)) AS x FROM extract GROUP BY pid": "CAST to a whole number",
    "SELECT pid, sum(CAST(x AS DECIMAL(38, 2))) AS x FROM extract GROUP BY pid": "18 digits",
    "SELECT pid, count(DISTINCT x) AS x FROM extract GROUP BY pid": "DISTINCT",
    "SELECT pid, approx_count_distinct(x) AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid, 2 * max(x) AS x FROM extract GROUP BY pid": "compute in an outer SELECT",
    "SELECT pid FROM extract WHERE max(age) > 3": "stand alone",
    # Joins.
    "SELECT e.pid FROM extract e, visits v": "joined on the patient",
    "SELECT e.pid FROM extract e CROSS JOIN visits v": "joined on the patient",
    "SELECT e.pid FROM extract e JOIN visits v ON e.age = v.x": "joined on the patient",
    "SELECT e.pid FROM extract e JOIN visits v ON e.pid = v.pid OR e.age = 3": "joined on the patient",
    "SELECT e.pid FROM extract e JOIN visits v ON e.pid <= v.pid": "joined on the patient",
    "SELECT e.pid FROM extract e JOIN visits v ON e.pid = e.pid": "joined on the patient",
    "SELECT e.pid FROM extract e JOIN visits v ON e.pid = v.pid || ''": "joined on the patient",
    "SELECT e.pid FROM extract e JOIN visits v ON NOT e.pid = v.pid": "joined on the patient",
    "SELECT v.pid FROM extract e LEFT JOIN visits v ON e.pid = v.pid": "may be called",
    "SELECT v.pid, count(*) AS n FROM extract e LEFT JOIN visits v ON e.pid = v.pid GROUP BY v.pid": "GROUP BY must contain",
    "SELECT e.pid, w.x FROM extract e LEFT JOIN visits v ON e.pid = v.pid JOIN visits w ON v.pid = w.pid": "joined on the patient",
    "SELECT v.pid FROM extract e RIGHT JOIN visits v ON e.pid = v.pid": "INNER or LEFT",
    "SELECT e.pid FROM extract e FULL JOIN visits v ON e.pid = v.pid": "INNER or LEFT",
    "SELECT e.pid FROM extract e SEMI JOIN visits v ON e.age = v.x": "INNER or LEFT",
    "SELECT e.pid FROM extract e ANTI JOIN visits v ON e.pid = v.pid": "INNER or LEFT",
    "SELECT e.pid FROM extract e NATURAL JOIN visits v": "INNER or LEFT",
    "SELECT e.pid FROM extract e POSITIONAL JOIN visits v": "INNER or LEFT",
    "SELECT e.pid FROM extract e ASOF JOIN visits v ON e.pid = v.pid AND e.age >= v.x": "INNER or LEFT",
    "SELECT u.code AS c, e.pid FROM units u LEFT JOIN extract e ON u.code = e.x": "left side of a LEFT JOIN",
    "SELECT pid FROM extract JOIN visits USING (x)": "USING takes",
    "SELECT pid FROM extract JOIN visits USING (pid, x)": "USING takes",
    "SELECT e.pid FROM extract e JOIN extract e ON e.pid = e.pid": "name of its own",
    "SELECT e.pid FROM extract e, LATERAL (SELECT v.pid FROM visits v WHERE v.x = e.x) AS l": "",
    # Subqueries in expressions.
    "SELECT pid FROM extract WHERE x > (SELECT avg(x) FROM extract)": "subquery",
    "SELECT pid FROM extract e WHERE EXISTS (SELECT 1 FROM visits v WHERE v.pid = e.pid)": "subquery",
    "SELECT pid FROM extract WHERE pid IN (SELECT pid FROM visits)": "subquery",
    "SELECT pid, (SELECT count(*) FROM extract) AS n FROM extract": "subquery",
    "SELECT pid, ARRAY(SELECT x FROM visits) AS n FROM extract": "subquery",
    # Chance, clocks, files, the system.
    "SELECT pid, random() AS r FROM extract": "not among those allowed",
    "SELECT pid, uuid() AS r FROM extract": "not among those allowed",
    "SELECT pid, now() AS r FROM extract": "not among those allowed",
    "SELECT pid, current_date AS r FROM extract": "current_date",
    "SELECT pid, current_timestamp AS r FROM extract": "current_timestamp",
    "SELECT pid, age(TRY_CAST(x AS TIMESTAMP)) AS r FROM extract": "not among those allowed",
    "SELECT pid, current_user AS r FROM extract": "current_user",
    "SELECT pid, getenv('HOME') AS r FROM extract": "not among those allowed",
    "SELECT pid, nextval('s') AS r FROM extract": "not among those allowed",
    "SELECT pid, current_setting('threads') AS r FROM extract": "not among those allowed",
    "SELECT pid, version() AS r FROM extract": "not among those allowed",
    "SELECT pid, hash(x) AS r FROM extract": "not among those allowed",
    "SELECT pid, error('x') AS r FROM extract": "not among those allowed",
    "SELECT pid, main.lower(x) AS r FROM extract": "",
    "SELECT pid FROM read_csv('/etc/passwd')": "FROM takes",
    "SELECT e.pid FROM extract e, read_text('/etc/passwd') AS f": "FROM takes",
    "SELECT e.pid FROM extract e, range(1000000000000) AS r": "FROM takes",
    "SELECT e.pid FROM extract e, unnest([1, 2]) AS r": "FROM takes",
    "SELECT pid, unnest([1, 2]) AS r FROM extract": "not among those allowed",
    "SELECT pid FROM 'file.csv'": "no table",
    "SELECT pid FROM other.extract": "without a schema",
    "SELECT pid FROM duckdb_tables": "no table",
    "SELECT pid FROM information_schema.tables": "without a schema",
    "SELECT pid, repeat('x', 1000000000) AS r FROM extract": "not among those allowed",
    "SELECT pid, list_transform([x], lambda z: z + 1) AS r FROM extract": "not among those allowed",
    "SELECT pid, regexp_matches(sex, x) AS r FROM extract": "constant",
    "SELECT pid, x COLLATE nocase AS r FROM extract": "COLLATE",
    "SELECT pid, $1 AS r FROM extract": "plain SELECT",
    "SELECT pid, CAST(x AS JSON) AS r FROM extract": "type",
    "SELECT pid, CAST(x AS INTEGER[]) AS r FROM extract": "",
    "SELECT pid, CAST(x AS VARCHAR(3)) AS r FROM extract": "sizes",
    "PIVOT extract ON sex USING count(*)": "",
    "SELECT pid FROM (PIVOT extract ON sex USING count(*)) AS p": "",
    "SELECT pid, absent FROM extract": "no column",
    "SELECT pid FROM absent": "no table",
    "SELECT pid FROM " + "(SELECT pid FROM " * 70 + "extract" + ") AS s" * 70: "",
    "SELECT pid, " + "(" * 300 + "x" + ")" * 300 + " + 1 AS y FROM extract" + " -- " + "x" * 3: None,
    "SELECT pid, " + " + ".join(["x"] * 5000) + " AS y FROM extract": "",
}  # fmt: skip


@pytest.mark.parametrize("sql", ACCEPTED)
def test_queries_that_treat_each_patient_alone_are_accepted(sql: str) -> None:
    known = check_query(sql, "pid", PUBLIC, PRIVATE)
    # Also at the hub, which knows of no hospital's columns.
    assert check_query(sql, "pid", PUBLIC) == known
    columns, made = known
    assert "pid" in [name.casefold() for name in columns]
    # What is to be run passes again, and is the same again.
    assert check_query(made, "pid", PUBLIC, PRIVATE) == known


@pytest.mark.parametrize(("sql", "reason"), list(REFUSED.items()), ids=lambda text: str(text)[:60])
def test_all_others_are_refused_with_the_reason(sql: str, reason: str | None) -> None:
    if reason is None:
        check_query(sql, "pid", PUBLIC, PRIVATE)
        return
    with pytest.raises(UsageError) as caught:
        check_query(sql, "pid", PUBLIC, PRIVATE)
    error = caught.value
    assert error.code == "study.contract.query"
    assert reason in error.problem, error.problem
    assert error.remedy


def test_names_are_compared_without_case_as_duckdb_does() -> None:
    assert check_query('SELECT "PID", AGE FROM EXTRACT', "Pid", PUBLIC, PRIVATE)[0] == ("PID", "AGE")
    with pytest.raises(UsageError):
        check_query("SELECT age AS PiD FROM extract", "pid", PUBLIC, PRIVATE)


def test_a_public_table_has_no_patients() -> None:
    with pytest.raises(UsageError) as caught:
        check_query("SELECT e.pid FROM extract e, u", "pid", {"u": ("PID", "x")})
    assert "public table" in caught.value.problem
    with pytest.raises(UsageError) as caught:
        check_query("WITH w AS (SELECT code AS pid FROM units) SELECT e.pid FROM extract e, w", "pid", PUBLIC)
    assert "public table" in caught.value.problem


def test_every_expression_runs_inside_try() -> None:
    sql = "SELECT e.pid, e.x + 1 AS y FROM extract e JOIN visits v ON e.pid = v.pid AND e.x < v.x WHERE e.age / 2 > 1"
    _, made = check_query(sql, "pid", PUBLIC, PRIVATE)
    for part in ("TRY((e.x + 1))", "TRY((e.x < v.x))", "TRY(((e.age / 2) > 1))"):
        assert part in made
    assert "TRY((e.pid = v.pid))" not in made


def test_a_struct_does_not_stand_for_a_table() -> None:
    """Nor an alias for a column: whose rows they are is the patient column of the table, whatever else has that name."""
    with duckdb.connect(":memory:") as connection:
        rows = (
            "SELECT 'p1' AS pid, {'pid': 'other'} AS s, 1 AS died UNION ALL SELECT 'p2', {'pid': 'other'}, 2"
        )
        connection.execute(f"CREATE TABLE extract AS {rows}")
        connection.execute(
            "CREATE TABLE visits AS SELECT 'p1' AS pid, 'A' AS ward, {'pid': 'other', 'ward': 'z'} AS e"
        )
        for sql, expected in (
            ("SELECT s.pid, s.died FROM extract AS s", [("p1", 1), ("p2", 2)]),
            (
                "SELECT s.pid, s.died FROM (SELECT pid, {'pid': 'q'} AS s, died FROM extract) AS s",
                [("p1", 1), ("p2", 2)],
            ),
            ("SELECT e.pid, e.ward FROM visits AS e", [("p1", "A")]),
            (
                "SELECT pid, count(*) AS n FROM extract a LEFT JOIN visits b USING (pid) GROUP BY pid",
                [("p1", 1), ("p2", 1)],
            ),
            (
                "SELECT pid, a.died FROM extract a LEFT JOIN (visits b JOIN visits c USING (pid)) USING (pid)",
                [("p1", 1), ("p2", 2)],
            ),
        ):
            _, made = check_query(
                sql, "pid", {}, {"extract": ("pid", "s", "died"), "visits": ("pid", "ward", "e")}
            )
            assert sorted(connection.execute(made).fetchall()) == expected, sql
