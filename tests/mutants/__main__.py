"""``make mutants``: change the secure sum one word at a time and see a test fail; writes tests/MUTANTS.md.

Usage: python -m tests.mutants [MODULE...] [--sample N] [--seed N] [--fresh]. A mutant is a changed source file,
so all of it happens in a copy of the work tree; only the report and ``.mutants``, from which an interrupted
campaign goes on, are written here. Exit code 1 while a survivor is unexplained.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

from tests.mutants import report
from tests.mutants.mutations import Mutant, mutants
from tests.mutants.report import Campaign

ROOT = Path(__file__).parents[2]
SESSION = ROOT / ".mutants"
SUITE = ("tests/common/secagg", "tests/common/test_messages.py")
TIMEOUT_S = 90
MEMORY_BYTES = 8 << 30
# What these tests import from elsewhere: loaded once, and every mutant is a fork of this process.
PRELOADED = ("numpy", "cryptography.hazmat.primitives.hpke", "cryptography.x509", "hypothesis.stateful")
PYTEST = ("-x", "-p", "no:cacheprovider", "-p", "no:anyio", "-W", "ignore::pytest.PytestAssertRewriteWarning")
MIRRORS = {"common/secagg/transcript.py": "tests/common/secagg/test_round_transcript.py"}
KILLED, TIMED_OUT, SURVIVED, INCOMPETENT = "killed", "timed out", "survived", "incompetent"


def modules() -> list[str]:
    """What is mutated."""
    return [*sorted(f"common/secagg/{path.name}" for path in (ROOT / "common/secagg").glob("[!_]*.py")), "common/messages.py"]  # fmt: skip


def mirror(module: str) -> str:
    """The tests of one module, which are asked before all the others."""
    folder, _, name = module.rpartition("/")
    return MIRRORS.get(module, f"tests/{folder}/test_{name}")


def _copy(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _tests(folder: Path, names: tuple[str, ...]) -> None:
    """In a process of its own: exit with pytest's verdict on the copy."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("common", "tests")]:
        del sys.modules[name]
    sys.dont_write_bytecode = False
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # One failing example is enough: it is not made smaller.
    hypothesis.settings.register_profile(
        "mutants",
        max_examples=20,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        report_multiple_bugs=False,
    )
    hypothesis.settings.load_profile("mutants")
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    os._exit(int(pytest.main([*PYTEST, *names])))


def verdict(folder: Path, names: tuple[str, ...], limit_s: float = TIMEOUT_S) -> str:
    """Whether the tests notice."""
    process = multiprocessing.get_context("fork").Process(target=_tests, args=(folder, names))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
        return TIMED_OUT
    if process.exitcode == pytest.ExitCode.OK:
        return SURVIVED
    # Interrupted: what the tests make at import fails. Negative: the process crashed.
    noticed = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED, *range(-64, 0))
    return KILLED if process.exitcode in noticed else INCOMPETENT


def judged(folder: Path, module: str, mutant: Mutant, limit_s: float) -> str:
    """What became of one mutant: killed by the mirroring tests in their time, else by any of the suite."""
    path = folder / module
    source = path.read_text(encoding="utf-8")
    try:
        _replace(path, mutant.apply(source))
        first = verdict(folder, (mirror(module),), limit_s)
        return first if first != SURVIVED else verdict(folder, (*SUITE, f"--ignore={mirror(module)}"))
    finally:
        _replace(path, source)


def _replace(path: Path, source: str) -> None:
    # The bytecode of a file of the same size and second would pass for that of the new one.
    path.write_text(source, encoding="utf-8")
    for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        cached.unlink()


def _digest(folder: Path, names: tuple[str, ...]) -> str:
    state = hashlib.sha256()
    for name in names:
        for path in sorted((folder / name).glob("*.py") if (folder / name).is_dir() else [folder / name]):
            state.update(path.read_bytes())
    return state.hexdigest()


def campaign(folder: Path, module: str, sample: int, seed: int, before: Campaign | None) -> Campaign:
    """Every mutant of one module, or a seeded sample; those judged before are not judged again.

    A survivor is, when the tests have changed since and nobody has explained it; any, when the module has changed.
    """
    settled = {c for c, why in before.survivors.items() if why != report.UNEXPLAINED} if before else set()
    source = (folder / module).read_text(encoding="utf-8")
    found = mutants(source)
    chosen = found if not 0 < sample < len(found) else random.Random(seed).sample(found, sample)
    of_module, of_tests = _digest(folder, (module,)), _digest(folder, SUITE)
    file = SESSION / (module.replace("/", ".") + "." + of_module[:16] + ".json")
    known: dict[str, list[str]] = json.loads(file.read_text()) if file.exists() else {}
    survivors: dict[report.Change, str] = {}
    counts: Counter[str] = Counter()
    began = time.monotonic()
    if verdict(folder, (mirror(module),)) != SURVIVED:
        raise SystemExit(f"{mirror(module)} fails before anything is changed")
    limit_s = min(TIMEOUT_S, 10 + 5 * (time.monotonic() - began))
    for number, mutant in enumerate(chosen, 1):
        key = f"{mutant.operator} {mutant.occurrence}"
        outcome, tests = known.get(key, ["", ""])
        survived = outcome == SURVIVED and (tests == of_tests or mutant.change in settled)
        if outcome not in (KILLED, TIMED_OUT) and not survived:
            outcome = judged(folder, module, mutant, limit_s)
            known[key] = [outcome, of_tests]
            file.write_text(json.dumps(known, indent=0))
        counts[outcome] += 1
        if outcome == SURVIVED:
            survivors[mutant.change] = report.UNEXPLAINED
        print(
            f"\r{module} {number}/{len(chosen)} {dict(counts)} {time.monotonic() - began:.0f} s ",
            end="",
            flush=True,
        )
    print()
    return Campaign(
        of_module[:8],
        len(found),
        len(chosen),
        counts[KILLED] + counts[TIMED_OUT],
        counts[INCOMPETENT],
        survivors,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Mutation testing of the secure sum."
    )
    parser.add_argument("modules", nargs="*", help="such as common/secagg/site.py; without any, all")
    parser.add_argument("--sample", type=int, default=0, help="at most so many mutants of a module")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--fresh", action="store_true", help="judge every mutant anew")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(SESSION, ignore_errors=True)
    SESSION.mkdir(exist_ok=True)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):
        folder = Path(name)
        _copy(folder)
        if verdict(folder, SUITE) != SURVIVED:
            print("the tests fail before anything is changed", file=sys.stderr)
            return 2
        for module in arguments.modules or modules():
            text = report.REPORT.read_text(encoding="utf-8")
            campaigns = report.read(text)
            done = campaign(folder, module, arguments.sample, arguments.seed, campaigns.get(module))
            campaigns[module] = report.explained(done, campaigns.get(module))
            report.REPORT.write_text(report.write(text, campaigns), encoding="utf-8")
    remaining = report.read(report.REPORT.read_text(encoding="utf-8")).values()
    return int(any(report.UNEXPLAINED in campaign.survivors.values() for campaign in remaining))


if __name__ == "__main__":
    sys.exit(main())
