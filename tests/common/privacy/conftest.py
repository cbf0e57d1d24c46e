"""Deterministic entropy and a valid event, for these tests only."""

from collections.abc import Callable

import numpy as np
import pytest

from common.privacy.events import Event
from common.privacy.gate import GateParams, plan_event

Entropy = Callable[[int], bytes]


@pytest.fixture
def entropy() -> Callable[[int], Entropy]:
    """seed -> a reproducible source of bytes."""
    return lambda seed: np.random.Generator(np.random.PCG64(seed)).bytes


@pytest.fixture
def make_event() -> Callable[..., Event]:
    """An event of kind sum, with gate parameters and ids changed at will."""
    made = iter(range(10**9))

    def make(
        *,
        z: float = 4.0,
        dim: int = 31,
        steps: int = 1,
        rate: float = 1.0,
        register: str = "ab" * 16,
        event_id: str | None = None,
        members: int = 4,
    ) -> Event:
        params = GateParams(
            clip_norm=1.0,
            grid_step=0.0005,
            dim=dim,
            noise_multiplier=z,
            sampling="full" if rate == 1.0 else "poisson",
            rate=rate,
            steps=steps,
            max_patients=1000,
            arithmetic="f64_bounded",
        )
        name = event_id or f"{next(made):032x}"
        return plan_event(params, register, b"\x07" * 32, "training", 1, 1, members, 1, name)

    return make
