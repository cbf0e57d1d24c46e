"""One target under coverage-guided fuzzing, in a process that libFuzzer ends: ``python -m tests.fuzz.child``.

Usage: TARGET libFuzzer-arguments... Of the mutations three in four are this project's own, which keep the
outer form (tests/fuzz/mutation.py), and one is libFuzzer's.
"""

import sys
import warnings

import atheris  # type: ignore[import-untyped]

warnings.simplefilter("ignore")
with atheris.instrument_imports(include=["common", "client"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz one target; never returns."""
    target = TARGETS[sys.argv[1]]
    words = tuple(target.seeds())

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        # libFuzzer knows what was compared with what.
        if seed % 4 == 0:
            return bytes(atheris.Mutate(data, largest))
        return target.mutant(data, seed, words)[:largest]

    def once(data: bytes) -> None:
        target.run(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once, custom_mutator=mutate)
    atheris.Fuzz()


main()
