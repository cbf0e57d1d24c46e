"""Seeded faults on two long-lived federations: killed, stopped, cut, delayed, duplicated, reordered.

Each point is one test; the points of one federation are taken in their order, because a federation lives on
from one to the next. When one is beyond repair, the points after it say so at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.messages import KINDS
from tests.faults.driver import ACTIONS, STEADY, Life, Point, draw
from tests.faults.proxy import Upload

SEED = 3
POINTS = 18
PLAIN = draw(SEED, 3, POINTS)
PRIVATE = draw(SEED + 1, 4, POINTS)

pytestmark = pytest.mark.slow


@contextmanager
def living(folder: Path, points: list[Point], *, plain: bool, rounds: int) -> Iterator[Life]:
    life = Life(folder, points, plain=plain, rounds=rounds)
    try:
        yield life
    finally:
        life.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    with living(tmp_path_factory.mktemp("plain"), PLAIN, plain=True, rounds=60) as life:
        yield life


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    with living(tmp_path_factory.mktemp("private"), PRIVATE, plain=False, rounds=600) as life:
        yield life


def test_the_points_cover_every_message_and_every_fault() -> None:
    points = [*PLAIN, *PRIVATE]
    assert len(points) >= 40
    # A consent is asked for when a model is exported, after the study's life: tests/server/test_service.py.
    assert {point.message_type for point in points} == {*KINDS, ""} - {"query.consent"}
    assert {point.action for point in points} == set(ACTIONS)
    in_rounds = {(p.direction, p.kind, p.message_type) for p in points if p.phase == "steady"}
    assert in_rounds == set(STEADY)
    assert draw(SEED, 3, POINTS) == PLAIN


@pytest.mark.parametrize("point", PLAIN, ids=str)
def test_a_fault_changes_no_bit(plain: Life, point: Point) -> None:
    outcome = plain.take(point)
    assert not outcome.violations, plain.why(outcome)


def test_a_broken_invariant_is_noticed(plain: Life) -> None:
    run = plain.run
    assert run is not None
    assert run.reference is not None
    assert run.violations() == []
    digest, seen = run.digest, plain.rig.proxies[1].seen
    row = run.completed()[-1]
    other = b"another context"

    def noticed(text: str) -> bool:
        return any(text in violation for violation in run.violations())

    seen.payloads[row.context].add(other)
    assert noticed("two payloads were announced")
    seen.payloads[row.context].discard(other)
    seen.contexts[other] = Upload(digest, row.number, 2)
    seen.opened[other].add(other)
    assert noticed(f"two contexts of round {row.number} were opened")
    assert noticed("opened that was never uploaded")
    del seen.opened[other]
    seen.sent.add((digest, 9_999))
    assert noticed("round 9999 was uploaded and never charged")
    seen.sent.discard((digest, 9_999))
    kept = seen.opened.pop(row.context)
    assert noticed("completed without its opening")
    seen.opened[row.context] = kept
    assert run.violations() == []
    run.reference = [other, *run.reference[1:]]
    assert noticed("the model after step 1 is not that of an uninterrupted run")
    plain.close()


@pytest.mark.parametrize("point", PRIVATE, ids=str)
def test_a_fault_costs_a_round_at_the_most(private: Life, point: Point) -> None:
    outcome = private.take(point)
    assert not outcome.violations, private.why(outcome)
