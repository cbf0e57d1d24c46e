"""A hub that is killed at any point goes on where it was: compared, bit for bit, with one that never died."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.secagg import records
from server import rounds
from server.rounds import StudyRun
from server.store import Store
from tests.server.hospitals import WITHOUT_DP, Founded, Hospital, Room, found
from tests.server.test_rounds import QUICK, SHORT

ROUNDS = 3
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"learning_rate": 0.5, "momentum": 0.9},
    "fedadam": {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001},
    "fedyogi": {"learning_rate": 0.05, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001},
    "fedadagrad": {"learning_rate": 0.1, "tau": 0.001},
}


class Killed(BaseException):
    """The hub process is gone: nothing in it runs any more."""


def update_of(site: int, _round: int, state: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """A function of the model alone, so that a round that was lost gives the same again."""
    flat = np.concatenate([value.ravel() for value in state.values()]).astype(np.float64)
    return np.sin(np.arange(1, flat.size + 1) * site) - 0.25 * flat


class Scene:
    """A hub's folder and hospitals that outlive every hub."""

    def __init__(self, folder: Path, strategy: str) -> None:
        self.founded: Founded = found(folder, 3)
        self.hospitals = [Hospital(self.founded, site, update_of) for site in self.founded.admissions]
        server = {"strategy": strategy, **STRATEGIES[strategy]}
        changes = {**SHORT, "privacy": WITHOUT_DP, "training__rounds": ROUNDS, "training__server": server}
        self.signed = self.founded.sign_study(**changes)
        store = Store.open(self.founded.home.database)
        self.digest = self.founded.store_study(store, self.signed)
        store.close()
        self.sent = 0

    def run(self, kill: Callable[[str, int], bool] = lambda _what, _count: False) -> bool:
        """One life of the hub; false when it was killed. ``kill`` sees each message and each write, counted."""
        store = Store.open(self.founded.home.database)
        room = Room(self.hospitals)

        def point(what: str) -> None:
            self.sent += 1
            if kill(what, self.sent):
                raise Killed

        room.before = lambda _site, kind: point(kind)
        for name in ("keep_setup", "start_round", "complete_round"):
            setattr(store, name, self._killable(getattr(store, name), name, point))
        try:
            StudyRun(self.founded.home, store, room, self.digest).run()
        except Killed:
            return False
        finally:
            store.close()
        return True

    @staticmethod
    def _killable(real: Callable[..., Any], name: str, point: Callable[[str], None]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            point(f"before {name}")
            result = real(*arguments)
            point(f"after {name}")
            return result

        return write

    def outcome(self) -> tuple[str, list[bytes], list[list[int]]]:
        """Status, the model after every completed round, the cohorts."""
        store = Store.open(self.founded.home.database)
        try:
            steps = store.rounds(self.digest)
            models = [store.state(self.digest, row.step) for row in steps if row.step]
            return store.study(self.digest).status, models, [json.loads(row.cohort) for row in steps]
        finally:
            store.close()

    def numbers(self) -> list[tuple[int, int | None]]:
        store = Store.open(self.founded.home.database)
        try:
            return [(row.number, row.step) for row in store.started(self.digest)]
        finally:
            store.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in QUICK.items():
        monkeypatch.setattr(rounds, name, seconds)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, strategy: str) -> None:
    """Every message and every write of a whole study is a point at which the hub dies."""
    (tmp_path / "whole").mkdir()
    whole = Scene(tmp_path / "whole", strategy)
    assert whole.run()
    expected = whole.outcome()
    assert expected[0] == "done"
    assert len(expected[1]) == ROUNDS
    assert len(set(expected[1])) == ROUNDS
    # All points for the plain strategy; for those with a state of their own, the rounds.
    points = range(1, whole.sent + 1) if strategy == "fedavg" else range(20, whole.sent + 1, 3)
    for at in points:
        (tmp_path / str(at)).mkdir()
        scene = Scene(tmp_path / str(at), strategy)
        assert not scene.run(lambda _what, count, at=at: count == at)
        assert scene.run()
        assert scene.outcome() == expected, f"killed at point {at}"
        # A killed hub costs at most the round in flight.
        assert len(scene.numbers()) <= ROUNDS + 1


def test_a_hub_that_dies_again_and_again_still_ends_the_study(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = Scene(tmp_path / "whole", "fedadam")
    assert whole.run()
    (tmp_path / "killed").mkdir()
    scene = Scene(tmp_path / "killed", "fedadam")
    lives = 1
    # Once in the setup, and once in each round at another place.
    for kind, times in (("query.seeds", 2), ("train.ready", 1), ("train.upload", 3), ("train.open", 2)):
        seen = {"count": 0}

        def kill(what: str, _count: int, kind: str = kind, times: int = times, seen: Any = seen) -> bool:
            seen["count"] += what == kind
            return bool(what == kind and seen["count"] == times)

        assert not scene.run(kill)
        lives += 1
    assert scene.run()
    assert scene.outcome() == whole.outcome()
    # Numbers strictly increase, and each round that was in flight when the hub died gave nothing.
    assert scene.numbers() == [(1, None), (2, None), (3, None), (4, 1), (5, 2), (6, 3)]
    assert lives == 5


def test_a_round_number_is_used_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "fedavg")
    starts: list[int] = []
    for hospital in scene.hospitals:
        real = hospital._ready

        def ready(start: records.RoundStart, state: bytes, real: Any = real) -> records.Ready:
            starts.append(start.round)
            return real(start, state)

        hospital._ready = ready  # type: ignore[method-assign]
    for _ in range(2):
        assert not scene.run(lambda what, _count: what == "after start_round")
    assert not scene.run(lambda what, _count: what == "train.upload")
    assert scene.run()
    # Two numbers were spent before anything left, the third on a round that was cut.
    assert sorted(set(starts)) == [3, 4, 5, 6]
    assert [numbers for numbers, step in scene.numbers() if step] == [4, 5, 6]
