"""Every kept input and a short seeded campaign, under the oracles of ``make fuzz``; and the oracles themselves."""

import dataclasses
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import VerificationError
from common.secagg.hub import HubSetup
from common.secagg.records import Open
from common.secagg.site import Site
from common.secagg.sums import Accumulator
from common.witness import Witness
from tests.fuzz import corpus, machines
from tests.fuzz.oracles import BrokenError, exact, stable
from tests.fuzz.targets import TARGETS, Target

# The library warns of what it will refuse one day; what is refused today is under test.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

SIZE = 1 << 17
MIB = 1 << 20
TIME_S = 5.0
MEMORY_MIB = 32
each = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@each
def test_real_objects_are_accepted(target: Target) -> None:
    """Else everything below would hold of a decoder that refuses all."""
    seeds = list(target.seeds())
    accepted = [target.run(seed) for seed in seeds]
    # A machine refuses some of the genuine messages: those of another moment.
    assert any(accepted) if target.run.__module__ == machines.__name__ else seeds and all(accepted)


@each
def test_kept_inputs_break_nothing(target: Target) -> None:
    for data in corpus.read(target.name):
        target.run(data)


def test_the_corpus_is_small_and_of_these_targets() -> None:
    files = list(corpus.FOLDER.iterdir())
    assert {path.stem for path in files} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in files) < MIB


@each
def test_mutants_break_nothing(target: Target) -> None:
    seeds = [*target.seeds(), *corpus.read(target.name)]
    words = tuple(seeds)

    @settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(seeds) - 1), st.integers(0, 1 << 32))
    def fuzz(which: int, seed: int) -> None:
        target.run(target.mutant(seeds[which], seed, words))

    fuzz()


def bombs() -> dict[str, bytes]:
    """Inputs that are cheap to send."""
    return {
        "nothing": b"",
        "zeros": bytes(SIZE),
        "a long part": (1 << 63).to_bytes(8, "little") * 1000,
        "empty parts behind a label": (20).to_bytes(8, "little") + b"wardround/v1/request" + bytes(SIZE),
        "brackets": b"[" * SIZE,
        "braces": b'{"a":' * (SIZE // 5),
        "digits": b"9" * SIZE,
        "a number": b'{"a":1e999999999}',
        "a string": b'"' + b"\\u0041" * (SIZE // 6) + b'"',
        # tomllib takes memory as the square of this; such files are their reader's own.
        "TOML tables": b"a." * 2000 + b"a = 1",
        "lines": b"\n" * SIZE,
        "PEM": b"-----BEGIN CERTIFICATE-----\n" + b"A" * SIZE + b"\n-----END CERTIFICATE-----\n",
        "a zip's end": b"PK\x05\x06" + b"\xff" * 18,
    }


@each
def test_no_small_input_takes_long_or_much(target: Target) -> None:
    list(target.seeds())
    for name, data in bombs().items():
        tracemalloc.start()
        began = time.monotonic()
        try:
            target.run(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert time.monotonic() - began < TIME_S, name
        assert peak < MEMORY_MIB * MIB, name


def test_mutants_are_reproducible_and_many_are_accepted() -> None:
    """The mutator keeps the outer form: else nothing behind the first check would be reached."""
    for name in (
        "record-Head",
        "request",
        "manifest",
        "study-document",
        "admission-request",
        "evidence",
        "backup",
    ):
        target = TARGETS[name]
        seeds = tuple(target.seeds())
        mutants = [target.mutant(seeds[0], seed, seeds) for seed in range(60)]
        assert mutants == [target.mutant(seeds[0], seed, seeds) for seed in range(60)]
        assert len(set(mutants)) > 30
        assert sum(map(target.run, mutants)) >= 3, name


# -- the oracles --------------------------------------------------------------------------------------------


def test_a_decoder_of_two_forms_is_found() -> None:
    run = exact(lambda data: data.strip(), bytes)
    assert run(b"a")
    with pytest.raises(BrokenError, match="is its form"):
        run(b" a")
    with pytest.raises(BrokenError, match="come back"):
        stable(lambda data: data[1:], bytes)(b"ab")


def test_another_error_is_not_swallowed() -> None:
    def decode(data: bytes) -> bytes:
        if data:
            raise KeyError("field")
        raise VerificationError("a.b", "refused")

    for make in (exact, stable):
        assert not make(decode, bytes)(b"")
        with pytest.raises(KeyError):
            make(decode, bytes)(b"x")


def finds(target: str, attempts: int = 400) -> None:
    found = TARGETS[target]
    seeds = tuple(found.seeds())
    mutants = [found.mutant(seeds[seed % len(seeds)], seed, seeds) for seed in range(attempts)]
    with pytest.raises(BrokenError):
        list(map(found.run, [*seeds, *mutants]))


def opens_anything(site: Any, request: Any) -> Open:
    return Open(1, request.ctx, bytes(32))


def forgets_then_refuses(self: Any, cohort: Any) -> None:
    self._state = dataclasses.replace(self._state, accepted=())
    raise VerificationError("a.b", "refused")


def adds_twice(self: Any, sender: int, index: int, chunk: bytes) -> None:
    header = self._headers.get(sender)
    if header is None or index >= len(self._spans):
        raise VerificationError("a.b", "refused")
    self._params_sum[0] += 1


def keeps_the_last_seed(self: Any, sender: int, seeds: Any) -> None:
    self._seeds |= {(seed.i, seed.j): seed for seed in seeds}


@pytest.mark.parametrize(
    ("target", "owner", "method", "broken"),
    [
        ("site-in-a-round", Site, "on_open_please", opens_anything),
        ("site-in-a-round", Site, "on_cohort", forgets_then_refuses),
        ("site-joining", Site, "on_pair_seeds", forgets_then_refuses),
        ("hub-round", Accumulator, "add_chunk", adds_twice),
        ("hub-setup", HubSetup, "on_pair_seeds", keeps_the_last_seed),
        ("witness", Witness, "_relation", lambda self, head: "extends"),
    ],
)
def test_a_broken_machine_is_found(
    monkeypatch: pytest.MonkeyPatch, target: str, owner: type, method: str, broken: Callable[..., Any]
) -> None:
    machines.world(), machines._remembered()
    monkeypatch.setattr(owner, method, broken)
    finds(target)
