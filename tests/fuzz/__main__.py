"""``make fuzz``: every target for some seconds, one after another; prints and writes a table, keeps new inputs.

Usage: python -m tests.fuzz [TARGET...] [--seconds N] [--seed N]. Exit code 1 when an input broke something;
that input is then in tests/vectors/fuzz as a regression, and its traceback is printed.
"""

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS, Target

TABLE = Path(__file__).with_name("TABLE.md")
HEADINGS = ("target", "executions", "edges", "s", "new inputs", "peak MiB", "failures")
EXECUTION_S = 5
MEMORY_MIB = 1024


@dataclass(frozen=True)
class Campaign:
    """What became of one target."""

    target: str
    executions: int
    edges: int
    seconds: float
    new: int
    peak_mib: int
    failures: int

    def row(self) -> tuple[str, ...]:
        """As the table has it."""
        numbers = (self.executions, self.edges, round(self.seconds), self.new, self.peak_mib, self.failures)
        return (self.target, *(f"{number:,}".replace(",", " ") for number in numbers))


def _child(target: Target, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.child", target.name, *arguments], capture_output=True, check=False
    )
    return done.stderr.decode("utf-8", errors="replace") + done.stdout.decode("utf-8", errors="replace")


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def campaign(target: Target, seconds: int, seed: int) -> Campaign:
    """Fuzz one target, keep what it found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, broken = folder / "found", folder / "broken"
        found.mkdir()
        broken.mkdir()
        known = {*target.seeds(), *corpus.read(target.name)}
        for number, data in enumerate(sorted(known)):
            (found / f"seed-{number}").write_bytes(data)
        began = time.monotonic()
        said = _child(
            target, f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={target.largest}", "-len_control=0",
            f"-timeout={EXECUTION_S}", f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={broken}/",
            "-print_final_stats=1", str(found),
        )  # fmt: skip
        taken = time.monotonic() - began
        kept = {path.read_bytes() for path in found.iterdir()}
        failures = sorted(broken.iterdir())
        for path in failures:
            corpus.add_regression(target.name, path.read_bytes())
        corpus.keep(target.name, kept - set(target.seeds()))
        executions = _number(r"stat::number_of_executed_units:\s*(\d+)", said)
        if failures or not executions:
            print(said[-3000:], file=sys.stderr, flush=True)
        return Campaign(
            target.name,
            executions,
            _number(r"cov: (\d+)", said),
            taken,
            len(kept - known),
            _number(r"stat::peak_rss_mb:\s*(\d+)", said),
            len(failures) or int(not executions),
        )


def _versions() -> str:
    names = ("atheris", "cryptography", "pydantic", "rfc8785", "protobuf")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()}, {found}"


def _write(rows: dict[str, tuple[str, ...]], seconds: int) -> None:
    """Write the table: these rows, and the last known ones of the other targets."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    known = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")
    ]
    rows = {row[0]: row for row in known if row[0] in TARGETS} | rows
    total = sum(int(row[1].replace(" ", "")) for row in rows.values())
    text = [
        "# Fuzzing",
        "",
        f"Written by `make fuzz` (`python -m tests.fuzz`), on one core: {total} executions. A row is the last",
        f"campaign of its target, the newest of {seconds} seconds. *edges* are branches of this project's own Python",
        "code that were reached; *new inputs* reached something that no kept input had; *failures* are inputs for",
        f"which an oracle (`tests/fuzz/targets.py`) did not hold, or which took {EXECUTION_S} s or {MEMORY_MIB} MiB. The seconds",
        f"hold the start of a process. {_versions()}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|" + "---:|" * (len(HEADINGS) - 1),
        *("| " + " | ".join(rows[name]) + " |" for name in TARGETS if name in rows),
    ]
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> int:
    """Run the campaigns, print the table, write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="names; all when none is given")
    parser.add_argument("--seconds", type=int, default=8, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    done = list[Campaign]()
    for name in options.targets or TARGETS:
        one = campaign(TARGETS[name], options.seconds, options.seed)
        done.append(one)
        print(" ".join(one.row()), flush=True)
    table = Table(*HEADINGS, title="fuzz")
    for one in done:
        table.add_row(*one.row())
    Console().print(table)
    _write({one.target: one.row() for one in done}, options.seconds)
    return int(any(one.failures for one in done))


if __name__ == "__main__":
    sys.exit(main())
