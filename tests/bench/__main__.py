"""``make bench``: run the benchmarks named, print a table, write bench.json."""

import importlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.result import Result

ALL = ("link", "demo", "ledger", "secagg", "privacy", "data", "methods")


def main(names: list[str]) -> int:
    results: list[Result] = []
    for name in names or ALL:
        if name not in ALL:
            print(f"there is no benchmark {name!r}; there are {', '.join(ALL)}", file=sys.stderr)
            return 2
        results += importlib.import_module(f"tests.bench.{name}").run()
    table = Table("name", "value", "unit", "target", "reached", title="benchmarks")
    for result in results:
        table.add_row(*result.row)
    Console().print(table)
    Path("bench.json").write_text(
        json.dumps([r.as_dict() for r in results], indent=1) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
