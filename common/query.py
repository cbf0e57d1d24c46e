"""Which SQL of a study may run on a hospital's tables: one SELECT that treats each patient alone.

Source: PRIVACY.md "Everything upstream is separable by patient"; DuckDB documentation, "Json_serialize_sql".
Rules: an allow-list over DuckDB's own syntax tree, of clauses, fields, functions and types; what is not
listed is refused with the reason. The rows that a SELECT makes of a patient follow from that patient's rows
and public tables alone: so it is for every SELECT inside it.

What makes that so. Every private table, subquery or CTE has the patient column, by that name, and hands it
on unchanged; private tables are joined on it, by INNER or LEFT; groups and windows contain it. Nothing
depends on the order of rows: no LIMIT, no row number, no list that is not sorted by its own entries, no sum
of floating numbers. Nothing can fail on a value, for a failure would be a release: each expression runs
inside TRY, which is why an aggregate or a window function stands alone in its place; compute with it in an
outer SELECT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import UsageError
from common.syntax import (
    AGGREGATES,
    CODE,
    COMPARISONS,
    EXACT,
    FUNCTION,
    JOIN,
    MAX_DEPTH,
    NO_COLUMN,
    OPERATORS,
    REMEDY,
    SCALARS,
    SELECT,
    WINDOW,
    WINDOWS,
    Node,
    arguments_of,
    bare,
    conjuncts_of,
    fold,
    function_name,
    name_of,
    only,
    parsed,
    refuse,
    type_name,
    written,
)


@dataclass(frozen=True)
class Relation:
    """What stands in a FROM: its columns in lower case, None where the hospital's are not known.

    ``private``: its rows are patients', and its patient column is each row's patient. ``nullable``: as the
    right side of a LEFT JOIN, so that its patient column is not every row's.
    """

    columns: frozenset[str] | None
    private: bool
    nullable: bool = False


@dataclass
class Scope:
    """The relations of one FROM by their names in lower case; ``merged``: USING has joined the patient."""

    relations: dict[str, Relation] = field(default_factory=dict)
    merged: bool = False


def check_query(
    sql: str,
    patient: str,
    public: Mapping[str, Sequence[str]],
    private: Mapping[str, Sequence[str]] | None = None,
) -> tuple[tuple[str, ...], str]:
    """Check a study's query; the names of the columns that it makes, and the query as it is to be run.

    ``public`` tables and their columns; ``private`` those of the hospital, None where they are not known:
    then every other table is one, with the patient column and any further ones.

    Guarantee: queries_are_separable - without a patient's rows the result is the same, without theirs.
    Guarantee: no_value_fails_a_query - what cannot be computed is NULL.
    Raises: UsageError with the reason.
    """
    root = parsed(sql)
    try:
        node = root["statements"][0]["node"]
        columns, relation = _Checker(fold(patient), public, private).select(node, {}, 0)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(CODE, "contract.query: it has a form that is not known", remedy=REMEDY) from error
    if not relation.private:
        refuse("it must read a table of the hospital")
    return columns, written(root)


@dataclass
class _Checker:
    patient: str
    public: Mapping[str, Sequence[str]]
    private: Mapping[str, Sequence[str]] | None

    # -- SELECT --------------------------------------------------------------------------------------------

    def select(self, node: Node, ctes: dict[str, Relation], depth: int) -> tuple[tuple[str, ...], Relation]:
        """The columns that a SELECT makes, and what it is; its expressions are put inside TRY."""
        if depth > MAX_DEPTH:
            refuse("its subqueries are too deep inside one another")
        if node.get("type") != "SELECT_NODE":
            refuse("UNION, INTERSECT, EXCEPT, VALUES and recursion are not allowed")
        for modifier in node.get("modifiers", []):
            kind = str(modifier.get("type", "")).removesuffix("_MODIFIER")
            refuse(f"{kind} is not allowed: rows have no order, and none is left out")
        for clause, name in (("qualify", "QUALIFY"), ("having", "HAVING"), ("sample", "SAMPLE")):
            if clause in node:
                refuse(f"{name} is not allowed; filter in the WHERE of an outer SELECT")
        only(node, SELECT, "SELECT")
        if node["aggregate_handling"] != "STANDARD_HANDLING":
            refuse("GROUP BY ALL is not allowed: name the columns")
        ctes = dict(ctes)
        for cte in node.get("cte_map", {}).get("map", []):
            only(cte, {"key", "value"}, "WITH")
            only(cte["value"], {"materialized", "query_node"}, "WITH")
            ctes[fold(cte["key"])] = self.select(cte["value"]["query_node"], ctes, depth + 1)[1]
        scope = Scope()
        self.table(node.get("from_table", {}), scope, ctes, depth)
        if "where_clause" in node:
            node["where_clause"] = self.scalar(node["where_clause"], scope)
        private = any(relation.private for relation in scope.relations.values())
        grouped = self.groups(node, scope, private)
        columns: list[str] = []
        for place, item in enumerate(node["select_list"]):
            columns.append(name_of(item))
            is_patient = self.is_patient(item, scope)
            if private and fold(columns[-1]) == self.patient and not is_patient:
                refuse(f"only the patient column may be called {self.patient!r}")
            if not is_patient:
                made = self.item(item, scope, grouped, private)
                made["alias"] = columns[-1]
                node["select_list"][place] = made
        names = [fold(name) for name in columns]
        if len(set(names)) != len(names):
            refuse("two of its columns have one name")
        if private and self.patient not in names:
            refuse(f"every SELECT from a table of patients must hand on the column {self.patient!r}")
        if not private and self.patient in names:
            refuse(f"a public table must have no column {self.patient!r}")
        return tuple(columns), Relation(frozenset(names), private)

    def groups(self, node: Node, scope: Scope, private: bool) -> bool:
        """Check GROUP BY; whether there is one."""
        groups = node.get("group_expressions", [])
        sets = node.get("group_sets", [])
        if sets not in ([], [list(range(len(groups)))]):
            refuse("GROUPING SETS, ROLLUP and CUBE are not allowed")
        for group in groups:
            if group.get("class") != "COLUMN_REF":
                refuse("GROUP BY takes columns by their names; compute others in an inner SELECT")
            self.column(group, scope)
        if groups and private and not any(self.is_patient(group, scope) for group in groups):
            refuse(f"GROUP BY must contain the patient column {self.patient!r}")
        return bool(groups)

    def table(self, node: Node, scope: Scope, ctes: dict[str, Relation], depth: int) -> None:
        """Add what a FROM names to its scope."""
        kind = node.get("type")
        if kind == "JOIN":
            self.join(node, scope, ctes, depth)
            return
        if "sample" in node or "column_name_alias" in node:
            refuse("SAMPLE and new names for a table's columns are not allowed")
        if kind == "SUBQUERY":
            only(node, {"type", "alias", "subquery"}, "FROM")
            only(node["subquery"], {"node"}, "FROM")
            name, relation = node.get("alias", ""), self.select(node["subquery"]["node"], ctes, depth + 1)[1]
        elif kind == "BASE_TABLE":
            if node["qualified_name"] != {"path": [node["table_name"]]}:
                refuse("a table is named by one name, without a schema")
            only(node, {"type", "alias", "table_name", "qualified_name"}, "FROM")
            name = node.get("alias", node["table_name"])
            relation = self.named(node["table_name"], ctes)
        else:
            refuse("FROM takes tables and subqueries; functions, VALUES and PIVOT are not allowed")
        if not name or fold(name) in scope.relations:
            refuse("each table in a FROM needs a name of its own")
        scope.relations[fold(name)] = relation

    def named(self, name: str, ctes: dict[str, Relation]) -> Relation:
        """The table of a name."""
        key = fold(name)
        if key in ctes:
            return ctes[key]
        if key in self.public:
            columns = frozenset(map(fold, self.public[key]))
            if self.patient in columns:
                refuse(f"a public table must have no column {self.patient!r}")
            return Relation(columns, private=False)
        if self.private is None:
            return Relation(None, private=True)
        if key not in self.private:
            refuse(f"this hospital offers no table {name!r}")
        return Relation(frozenset(map(fold, self.private[key])), private=True)

    def join(self, node: Node, scope: Scope, ctes: dict[str, Relation], depth: int) -> None:
        """Check a join: private tables on the patient, public ones on anything."""
        only(node, JOIN, "JOIN")
        plain = node["ref_type"] in ("REGULAR", "CROSS") and node["join_type"] in ("INNER", "LEFT")
        if not plain:
            refuse("joins are INNER or LEFT; NATURAL, ASOF, POSITIONAL, SEMI, RIGHT, FULL are not allowed")
        left, right = Scope(), Scope()
        self.table(node["left"], left, ctes, depth)
        self.table(node["right"], right, ctes, depth)
        if left.relations.keys() & right.relations.keys():
            refuse("each table in a FROM needs a name of its own")
        private = [any(relation.private for relation in side.relations.values()) for side in (left, right)]
        if private == [False, True] and node["join_type"] == "LEFT":
            refuse("a public table may not be the left side of a LEFT JOIN with patients")
        outer = node["join_type"] == "LEFT"
        scope.relations |= left.relations
        scope.relations |= {
            name: Relation(relation.columns, relation.private, relation.nullable or outer)
            for name, relation in right.relations.items()
        }
        using = [fold(name) for name in node.get("using_columns", [])]
        on_patient = self.patient in using
        inner = Scope(left.relations | right.relations)
        conjuncts = list(conjuncts_of(node["condition"])) if "condition" in node else []
        for at, conjunct in enumerate(conjuncts):
            if self.equates(conjunct, left, right):
                on_patient = True
            else:
                conjuncts[at] = self.scalar(conjunct, inner)
        if conjuncts:
            both = {"class": "CONJUNCTION", "type": "CONJUNCTION_AND", "children": conjuncts}
            node["condition"] = both if len(conjuncts) > 1 else conjuncts[0]
        if using and using != [self.patient]:
            refuse("USING takes the patient column alone; join on others with ON")
        if all(private) and not on_patient:
            refuse(f"tables of patients must be joined on the patient column {self.patient!r}")
        if using and not all(private):
            refuse("USING joins two tables of patients")
        scope.merged = bool(using) or left.merged

    def equates(self, node: Node, left: Scope, right: Scope) -> bool:
        """Whether a condition says that the patients of both sides are the same."""
        if node.get("type") != "COMPARE_EQUAL":
            return False
        first, second = node.get("left", {}), node.get("right", {})
        return any(
            self.is_patient(a, left, qualified=True) and self.is_patient(b, right, qualified=True)
            for a, b in ((first, second), (second, first))
        )

    # -- expressions -----------------------------------------------------------------------------------------

    def is_patient(self, node: Node, scope: Scope, *, qualified: bool = False) -> bool:
        """Whether an expression is the patient column of every row of a scope."""
        if node.get("class") != "COLUMN_REF" or fold(node["column_names"][-1]) != self.patient:
            return False
        if fold(node.get("alias", self.patient)) != self.patient:
            return False
        if len(node["column_names"]) == 2 and fold(node["column_names"][0]) not in scope.relations:
            return False
        self.column(node, scope)
        if len(node["column_names"]) == 2:
            relation = scope.relations[fold(node["column_names"][0])]
            return relation.private and not relation.nullable
        if qualified:
            return False
        held = [relation for relation in scope.relations.values() if relation.private]
        # Without a table's name it is the one of a USING, the left side's, or else the only one.
        return scope.merged or (len(held) == 1 and not held[0].nullable)

    def column(self, node: Node, scope: Scope) -> None:
        """Check that a name is that of a column in scope."""
        only(node, {"class", "type", "alias", "column_names"}, "a column")
        names = [fold(name) for name in node["column_names"]]
        if len(names) > 2 or (len(names) == 2 and names[0] not in scope.relations):
            refuse(f"{'.'.join(node['column_names'])!r} is not a column of a table in FROM")
        if names[-1] in NO_COLUMN:
            refuse(f"{node['column_names'][-1]!r} is not allowed: it is a place, a time or a person")
        among = [scope.relations[names[0]]] if len(names) == 2 else list(scope.relations.values())
        if all(relation.columns is not None and names[-1] not in relation.columns for relation in among):
            refuse(f"there is no column {'.'.join(node['column_names'])!r}")

    def item(self, node: Node, scope: Scope, grouped: bool, private: bool) -> Node:
        """Check an item of a SELECT list; it, inside TRY."""
        inner = node
        while inner.get("type") == "STRUCT_EXTRACT":
            only(inner, {"class", "type", "alias", "children"}, "a field of a struct")
            inner = inner["children"][0]
        name = str(inner.get("function_name", ""))
        if inner.get("class") == "WINDOW":
            self.window(inner, scope, private)
            return node
        if inner.get("class") == "FUNCTION" and name in AGGREGATES:
            if private and not grouped:
                refuse(f"an aggregate needs GROUP BY with the patient column {self.patient!r}")
            self.aggregate(inner, scope)
            return node
        if grouped and node.get("class") != "COLUMN_REF":
            refuse("with GROUP BY a SELECT takes grouped columns and aggregates; compute in an outer SELECT")
        return self.scalar(node, scope)

    def scalar(self, node: Node, scope: Scope) -> Node:
        """Check an expression without aggregates; it, inside TRY."""
        self.expression(node, scope)
        if node["class"] in ("COLUMN_REF", "CONSTANT") or node["type"] == "OPERATOR_TRY":
            return node
        return {"class": "OPERATOR", "type": "OPERATOR_TRY", "children": [node]}

    def expression(self, node: Node, scope: Scope) -> None:
        """Check an expression and all that is in it."""
        kind, type_ = node.get("class"), node.get("type")
        if kind == "COLUMN_REF":
            self.column(node, scope)
        elif kind == "CONSTANT" and type_ == "VALUE_CONSTANT":
            only(node, {"class", "type", "alias", "literal"}, "a constant")
        elif kind == "COMPARISON" and type_ in COMPARISONS:
            only(node, {"class", "type", "alias", "left", "right"}, "a comparison")
            self.all([node["left"], node["right"]], scope)
        elif kind == "CONJUNCTION":
            only(node, {"class", "type", "alias", "children"}, "AND, OR")
            self.all(node["children"], scope)
        elif kind == "BETWEEN":
            only(node, {"class", "type", "alias", "input", "lower", "upper"}, "BETWEEN")
            self.all([node["input"], node["lower"], node["upper"]], scope)
        elif kind == "CASE":
            only(node, {"class", "type", "alias", "case_checks", "else_expr"}, "CASE")
            for check in node["case_checks"]:
                only(check, {"when_expr", "then_expr"}, "CASE")
                self.all(list(check.values()), scope)
            self.all([node["else_expr"]] if "else_expr" in node else [], scope)
        elif kind == "CAST":
            only(node, {"class", "type", "alias", "child", "try_cast", "type_expr"}, "CAST")
            type_name(node["type_expr"])
            self.all([node["child"]], scope)
        elif kind == "OPERATOR" and type_ in OPERATORS:
            only(node, {"class", "type", "alias", "children"}, "an operator")
            self.all(node["children"], scope)
        elif kind == "FUNCTION":
            self.function(node, scope)
        else:
            names = {
                "SUBQUERY": "a subquery in an expression",
                "STAR": "*",
                "LAMBDA": "a lambda",
                "WINDOW": "a window",
            }
            refuse(f"{names.get(str(kind), str(kind))} is not allowed there")

    def all(self, nodes: list[Node], scope: Scope) -> None:
        """Check each of these expressions."""
        for node in nodes:
            self.expression(node, scope)

    def function(self, node: Node, scope: Scope) -> None:
        """Check a call of a scalar function."""
        name = function_name(node, FUNCTION)
        if name in AGGREGATES:
            refuse(f"{name} must stand alone in the SELECT list; compute with it in an outer SELECT")
        if name not in SCALARS:
            refuse(f"the function {name!r} is not among those allowed")
        if node["distinct"] or "filter" in node or node["order_bys"].get("orders"):
            refuse(f"{name} takes no DISTINCT, FILTER or ORDER BY")
        self.all(arguments_of(node), scope)
        # A pattern from the data could be malformed, or grow beyond bounds.
        if name.startswith("regexp_") and any(a.get("class") != "CONSTANT" for a in arguments_of(node)[1:]):
            refuse(f"the pattern of {name} must be a constant")

    def aggregate(self, node: Node, scope: Scope) -> None:
        """Check an aggregate of a group; what it takes is put inside TRY."""
        name = function_name(node, FUNCTION)
        if node["distinct"] or node["export_state"]:
            refuse("DISTINCT is not allowed; group in an inner SELECT")
        self.exact(name, arguments_of(node))
        orders = [order["expression"] for order in node["order_bys"].get("orders", [])]
        if (name == "list") != bool(orders) or (orders and bare(orders[0]) != bare(arguments_of(node)[0])):
            refuse("list takes ORDER BY the same expression that it lists, others take none")
        for order in node["order_bys"].get("orders", []):
            order["expression"] = self.scalar(order["expression"], scope)
        for argument in node.get("arguments", []):
            argument["expression"] = self.scalar(argument["expression"], scope)
        if "filter" in node:
            node["filter"] = self.scalar(node["filter"], scope)

    def window(self, node: Node, scope: Scope, private: bool) -> None:
        """Check a window function; what it takes is put inside TRY."""
        name = function_name(node, WINDOW)
        if name not in WINDOWS:
            refuse(f"{name} is not allowed over a window: which of equal rows comes first is by chance")
        if private and not any(self.is_patient(part, scope) for part in node.get("partitions", [])):
            refuse(f"PARTITION BY must contain the patient column {self.patient!r}")
        whole = node["end"] in ("CURRENT_ROW_RANGE", "UNBOUNDED_FOLLOWING")
        framed = "start_expr" in node or "end_expr" in node or node["start"] != "UNBOUNDED_PRECEDING"
        if framed or not whole or node["exclude_clause"] != "NO_OTHER":
            refuse("a window has no frame of its own")
        if node["ignore_nulls"] or node["distinct"]:
            refuse("a window function takes no DISTINCT and no IGNORE NULLS")
        self.exact(name, arguments_of(node))
        for part in [*node.get("partitions", []), *(order["expression"] for order in node.get("orders", []))]:
            if part.get("class") != "COLUMN_REF":
                refuse(
                    "PARTITION BY and ORDER BY take columns by their names; compute others in an inner SELECT"
                )
            self.column(part, scope)
        for argument in node.get("arguments", []):
            argument["expression"] = self.scalar(argument["expression"], scope)

    def exact(self, name: str, arguments: list[Node]) -> None:
        """Check that a sum does not depend on the order of what it adds."""
        if len(arguments) > 1:
            refuse(f"{name} takes one argument")
        if name in ("sum", "avg"):
            added = arguments[0] if arguments else {}
            while added.get("type") == "OPERATOR_TRY":
                added = added["children"][0]
            to = added.get("type_expr", {})
            if type_name(to) not in EXACT:
                problem = (
                    "must be a CAST to a whole number or DECIMAL: floating sums depend on the order of rows"
                )
                refuse(f"what {name} adds {problem}")
