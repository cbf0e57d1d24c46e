"""``make faults``: hundreds of seeded faults on one federation after another; prints and writes a table.

Usage: python -m tests.faults [--seed N] [--lives N] [--points N]. A life is one federation with its setup, its
rounds and its end; lives without differential privacy alternate with lives with it. Exit code 1 when anything
that must hold did not.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.driver import Life, Outcome, Point, draw

TABLE = Path(__file__).with_name("TABLE.md")
HEADINGS = ("fault", "points", "recovered", "rounds lost", "median s", "worst s", "violations")
PLAIN_ROUNDS_PER_POINT = 5


def live(seed: int, steady: int, *, plain: bool) -> tuple[list[Outcome], list[Point]]:
    """One life; its outcomes, and the points that were not reached because it was beyond repair."""
    points = draw(seed, 3 if plain else 4, steady)
    rounds = PLAIN_ROUNDS_PER_POINT * 16 if plain else 600
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder), points, plain=plain, rounds=rounds)
        try:
            for point in points:
                if life.stuck and point.phase != "begin":
                    break
                outcome = life.take(point)
                outcomes.append(outcome)
                lost = "".join(f", lost: {why}" for why in outcome.lost)
                said = "; ".join(outcome.violations) or f"next round after {outcome.seconds:.2f} s{lost}"
                print(f"seed {seed} {point}: {said}", flush=True)
                if outcome.violations:
                    print(life.why(outcome), file=sys.stderr, flush=True)
        finally:
            life.close()
    return outcomes, points[len(outcomes) :]


def rows(outcomes: list[Outcome]) -> list[tuple[str, ...]]:
    """The table's rows: one a kind of fault, then all. Times are of points in the middle of a study."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.point.action].append(outcome)
    table: list[tuple[str, ...]] = []
    for name, group in [*sorted(groups.items()), ("all", outcomes)]:
        seconds = [o.seconds for o in group if o.recovered and o.point.phase == "steady"]
        table.append(
            (
                name,
                str(len(group)),
                str(sum(o.recovered for o in group)),
                str(sum(len(o.lost) for o in group)),
                f"{statistics.median(seconds):.2f}" if seconds else "-",
                f"{max(seconds):.2f}" if seconds else "-",
                str(sum(len(o.violations) for o in group)),
            )
        )
    return table


def main() -> int:
    """Run the lives, print the table, write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=100, help="seed of the first life; each next has one more"
    )
    parser.add_argument("--lives", type=int, default=8, help="federations, one after another")
    parser.add_argument("--points", type=int, default=32, help="faults in the middle of each study")
    options = parser.parse_args()
    began = time.monotonic()
    outcomes: list[Outcome] = []
    missed: list[Point] = []
    for life in range(options.lives):
        done, left = live(options.seed + life, options.points, plain=life % 2 == 0)
        outcomes += done
        missed += left
    found = rows(outcomes)
    table = Table(*HEADINGS, title="faults")
    for row in found:
        table.add_row(*row)
    Console().print(table)
    command = (
        f"python -m tests.faults --seed {options.seed} --lives {options.lives} --points {options.points}"
    )
    lines = [
        "# Faults",
        "",
        f"Written by `make faults` (`{command}`) in {time.monotonic() - began:.0f} s. A point is one fault at a",
        "seeded frame of one site's stream; *s* is the time from the fault to the next completed round, for faults",
        "in the middle of a study (a stopped process is stopped for 1 to 2 s, a killed one is started again at",
        "once, and a new worker takes seconds to import torch).",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|" + "---:|" * (len(HEADINGS) - 1),
        *("| " + " | ".join(row) + " |" for row in found),
        "",
        f"Points not reached because a federation was beyond repair: {len(missed)}.",
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed or any(outcome.violations for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
