"""What a hospital refuses by itself, one past each bound."""

import dataclasses
import itertools
import math
from typing import Any

import pytest

from common.errors import RefusedError
from common.privacy.noise import discrete_gaussian
from common.secagg.params import check_params, smallest_cohort
from common.secagg.site import Site
from tests.common.secagg.federation import Counter, Disk, make_params, public, signing_key


def test_cohorts_share_an_honest_member() -> None:
    for n in range(3, 40):
        for t in range(1, n):
            for rho in range(n):
                m = smallest_cohort(n, t, rho)
                assert 2 * m - n - t - rho >= 1
                assert m >= max(3, t + 2)
                assert 3 * m >= 2 * n


def test_cohorts_share_an_honest_member_by_enumeration() -> None:
    for n, t, rho in itertools.product(range(3, 7), range(1, 3), range(2)):
        m = smallest_cohort(n, t, rho)
        cohorts = [set(c) for k in range(m, n + 1) for c in itertools.combinations(range(n), k)]
        for bad in itertools.combinations(range(n), min(n, t + rho)):
            assert all(a & b - set(bad) for a in cohorts for b in cohorts)


def test_the_printed_table_of_the_protocol() -> None:
    found = {n: smallest_cohort(n, max(1, n // 5), 0 if n == 4 else 1) for n in (3, 4, 5, 6, 10, 100)}
    # n = 10 and n = 100 with their default t of 2 and 20; PROTOCOL prints 7 and 67.
    assert found == {3: 3, 4: 3, 5: 4, 6: 5, 10: 7, 100: 67}


def test_the_split_attack_on_six_with_two_colluders_is_refused() -> None:
    check_params(make_params(6, t=2, rho=1, m=5))
    with pytest.raises(RefusedError, match="m must be"):
        check_params(make_params(6, t=2, rho=1, m=4))
    assert smallest_cohort(6, 2, 0) == 5


GOOD = make_params(6, 1)
NOISE = (900, 800)
BOUNDS: list[tuple[dict[str, Any], str]] = [
    ({"man": bytes(31)}, "manifest digest"),
    ({"man": bytes(33)}, "manifest digest"),
    ({"man": bytearray(32)}, "manifest digest"),
    ({"members": (1, 2)}, "3 to 1000"),
    ({"members": tuple(range(1, 1002))}, "3 to 1000"),
    ({"members": (0, 1, 2, 3, 4, 5)}, "1 to 65535"),
    ({"members": (1, 2, 3, 4, 5, 65536)}, "1 to 65535"),
    ({"members": (1, 2, 3, 4, 5, True)}, "1 to 65535"),
    ({"members": (1, 2, 3, 4, 4, 5)}, "ascend"),
    ({"members": (1, 3, 2, 4, 5, 6)}, "ascend"),
    ({"members": (1, 2, 3, 4, 5, 7)}, "roster"),
    ({"keys": {**GOOD.keys, 2: GOOD.keys[3]}}, "differ"),
    ({"keys": {**GOOD.keys, 2: GOOD.hub_key}}, "differ"),
    ({"keys": {**GOOD.keys, 2: bytes(31)}}, "32 bytes"),
    ({"keys": {**GOOD.keys, 2: bytearray(GOOD.keys[2])}}, "32 bytes"),
    ({"hub_key": b""}, "32 bytes"),
    ({"hub_key": bytes(33)}, "32 bytes"),
    ({"me": 7}, "not a member"),
    ({"me": -1}, "not a member"),
    ({"t": 0}, "curious hospital"),
    ({"t": -1}, "curious hospital"),
    ({"t": 1.0}, "curious hospital"),
    ({"rho": -1}, "rho"),
    ({"rho": True}, "rho"),
    ({"m": 4}, "m must be"),
    ({"m": 7}, "m must be"),
    ({"t": 5}, "m must be"),
    ({"attempts": 0}, "attempts"),
    ({"attempts": 4}, "attempts"),
    ({"rounds_max": 0}, "rounds_max"),
    ({"rounds_max": 10_001}, "rounds_max"),
    ({"bits": 8}, "16 or 32"),
    ({"bits": 64}, "16 or 32"),
    ({"rounding": "up"}, "rounding"),
    ({"parameters": 0}, "parameters"),
    ({"parameters": (1 << 28) + 1}, "parameters"),
    ({"scalars": -1}, "scalars"),
    ({"scalars": (1 << 28) + 1}, "scalars"),
    ({"masked": 1}, "masked"),
    ({"rho": 7}, "rho"),
    ({"t": 7}, "curious hospital"),
    ({"step": 0.0}, "step"),
    ({"step": 0}, "step"),
    ({"step": (1 << 53) + 1}, "step"),
    ({"range": 0.0}, "range"),
    ({"state_norm_bound": 0}, "norm"),
    ({"step": math.nan}, "step"),
    ({"step": "1"}, "step"),
    ({"step": 10**400}, "step"),
    ({"range": -1.0}, "range"),
    ({"range": math.inf}, "range"),
    ({"state_norm_bound": math.nan}, "norm"),
    ({"step": 1e-7}, "overflow 32 bits"),
    ({"bits": 16, "step": 0.1}, "overflow 16 bits"),
    ({"scalars": 0, "noise": NOISE[1:]}, "shared noise"),
    ({"scalars": 0, "noise": (*NOISE, 700)}, "shared noise"),
    ({"scalars": 0, "noise": (0, *NOISE[1:])}, "shared noise"),
    ({"scalars": 0, "noise": (900.0, *NOISE[1:])}, "shared noise"),
    ({"scalars": 0, "noise": list(NOISE)}, "shared noise"),
    ({"scalars": 0, "noise": NOISE, "masked": False}, "shared noise"),
    ({"noise": NOISE}, "shared noise"),
    ({"scalars": 0, "noise": ((1 << 52) + 1, *NOISE[1:])}, "shared noise"),
    ({"scalars": 0, "noise": (900, 1 << 22), "bits": 16, "range": 1.0}, "overflow 16 bits"),
    ({"expiry": "2031-01-01"}, "expiry"),
    ({"expiry": "2031-01-01T00:00Z\n"}, "expiry"),
    ({"expiry": None}, "expiry"),
]


def test_shared_noise_needs_a_sampler() -> None:
    params = dataclasses.replace(GOOD, scalars=0, noise=NOISE)
    check_params(params)
    sign = signing_key("site 1").sign
    arguments: dict[str, Any] = {"persist": Disk(), "entropy": Counter("x"), "sign": sign}
    with pytest.raises(RefusedError, match="no sampler"):
        Site(params, **arguments)
    Site(params, sampler=discrete_gaussian, **arguments)
    assert [params.noise_of(size) for size in range(params.m, 7)] == list(NOISE)
    assert GOOD.noise_of(5) == 0


@pytest.mark.parametrize(("change", "match"), BOUNDS)
def test_bounds_are_refused(change: dict[str, Any], match: str) -> None:
    check_params(GOOD)
    params = dataclasses.replace(GOOD, **change)
    with pytest.raises(RefusedError, match=match):
        check_params(params)
    with pytest.raises(RefusedError, match=match):
        Site(params, persist=Disk(), entropy=Counter("x"), sign=signing_key("site 1").sign)


THOUSAND = (*tuple(range(2, 1001)), 65535)


@pytest.mark.parametrize(
    "change",
    [
        {"man": b"\xff" * 32},
        {
            "members": THOUSAND,
            "keys": {i: i.to_bytes(32, "big") for i in THOUSAND},
            "me": 2,
            "m": 1000,
            "range": 1.0,
        },
        {"m": 6},
        {"scalars": 0, "noise": (1, 1)},
        {"scalars": 0, "noise": (1 << 52, 1 << 52)},
        {"rho": 0},
        {"t": 4, "m": 6},
        {"attempts": 1},
        {"attempts": 3},
        {"rounds_max": 1},
        {"rounds_max": 10_000},
        {"bits": 16, "range": 1.0},
        {"rounding": "dither"},
        {"masked": False},
        {"parameters": 1},
        {"parameters": 1 << 28},
        {"scalars": 0},
        {"scalars": 1 << 28},
        {"step": 1},
        {"step": 1 << 53, "range": 1 << 53},
        {"step": math.ulp(0.0), "range": math.ulp(0.0)},
        {"state_norm_bound": 1},
    ],
)
def test_bounds_themselves_are_allowed(change: dict[str, Any]) -> None:
    check_params(dataclasses.replace(GOOD, **change))


def test_t_zero_only_by_the_hospitals_own_policy() -> None:
    params = make_params(3, 1, t=0, rho=0)
    check_params(params, outsiders_only=True)
    with pytest.raises(RefusedError, match="curious"):
        check_params(params)


def test_the_hub_is_not_a_site() -> None:
    check_params(make_params(3))
    with pytest.raises(RefusedError, match="not a member"):
        Site(make_params(3), persist=Disk(), entropy=Counter("x"), sign=signing_key("site 1").sign)


def test_a_key_that_is_not_the_rosters_is_noticed_at_once() -> None:
    disk = Disk()
    site = Site(make_params(3, 1), persist=disk, entropy=Counter("x"), sign=signing_key("another").sign)
    assert public("another") != public("site 1")
    with pytest.raises(Exception, match="not signed by hospital 1"):
        site.announce()
    assert disk.versions == []
