import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.encoding import canonical_json
from common.errors import UsageError
from common.privacy import clipping
from common.privacy.decimals import fraction_of
from common.privacy.events import BETA, Event, settled
from common.privacy.gate import GateParams, PlainParams, plan_event

MakeEvent = Callable[..., Event]
COMMON = {
    "schema",
    "event_id",
    "register_id",
    "manifest_digest",
    "task",
    "round",
    "attempt",
    "kind",
    "unit",
    "adjacency",
    "state",
    "reason",
}
MECHANISM = {
    "mode",
    "sampling",
    "q",
    "steps",
    "dim",
    "C",
    "step",
    "eta",
    "arith",
    "noise",
    "Delta_g",
    "s_g_squared",
    "members",
    "U_size",
    "t",
    "z_t",
    "z_w",
    "beta",
}


@pytest.fixture
def fields(make_event: MakeEvent) -> dict[str, Any]:
    return dict(make_event(rate=0.25, steps=3).to_fields())


def shared(fields: dict[str, Any], cohort: int = 6, t: int = 2) -> dict[str, Any]:
    variance, delta_g = fields["s_g_squared"], fields["Delta_g"]
    return {
        **fields,
        "mode": "shared-noise",
        "members": 8,
        "U_size": cohort,
        "t": t,
        "z_t": clipping.z_threshold(variance, delta_g, max(1, cohort - t)),
        "z_w": clipping.z_worst(variance, delta_g),
    }


def declared(fields: dict[str, Any], **changes: object) -> dict[str, Any]:
    kept = {name: value for name, value in fields.items() if name in COMMON}
    return {**kept, "kind": "declared", "reason": "approved", **changes}


def test_events_survive_the_ledger(fields: dict[str, Any]) -> None:
    plain = plan_event(PlainParams(5, 2), "ab" * 16, "cd" * 32, "training", 1, 1, 4, 1, "ef" * 16)
    for source in (fields, shared(fields), declared(fields), plain.to_fields()):
        event = Event.from_fields(source)
        assert event.to_fields() == source
        again = json.loads(canonical_json(event.to_fields()))
        assert Event.from_fields(again) == event


def test_fields_are_the_declared_ones(fields: dict[str, Any]) -> None:
    assert set(fields) == COMMON | MECHANISM
    assert all(type(value) in (int, str) for value in fields.values())


def test_each_field_is_required_and_typed(fields: dict[str, Any]) -> None:
    defaults = {"schema", "unit", "adjacency", "reason"}
    for name, value in fields.items():
        without = {key: item for key, item in fields.items() if key != name}
        if name not in defaults:
            with pytest.raises(UsageError):
                Event.from_fields(without)
        others: list[object] = [None, True, [value], {"x": value}, 1.5, math.nan, "NaN", "", b"1"]
        others.append(str(value) if isinstance(value, int) else 7)
        for other in others:
            if (name, other) == ("reason", ""):
                continue
            with pytest.raises(UsageError):
                Event.from_fields({**fields, name: other})


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"clip_norm": "1"},
        {"schema_version": 1},
        {"schema": 2},
        {"event_id": "AB" * 16},
        {"event_id": "ab" * 15},
        {"register_id": "ab" * 16 + "\n"},
        {"manifest_digest": "ab" * 16},
        {"task": "Training"},
        {"task": "x" * 65},
        {"round": 0},
        {"round": -1},
        {"round": 2**53},
        {"attempt": -1},
        {"kind": "average"},
        {"unit": "row"},
        {"adjacency": "replace_one"},
        {"state": "free"},
        {"reason": "because of row 17"},
        {"mode": "central"},
        {"sampling": "shuffle"},
        {"sampling": "full"},
        {"q": "0"},
        {"q": "1"},
        {"q": "1.5"},
        {"q": "-0.5"},
        {"q": "0.250"},
        {"q": "2.5e-1"},
        {"steps": 0},
        {"steps": -1},
        {"dim": 0},
        {"dim": 10**6},
        {"C": "0"},
        {"C": "2"},
        {"step": "0"},
        {"step": "0.1"},
        {"eta": "0"},
        {"eta": "0.0011"},
        {"eta": "0.0009"},
        {"arith": "f32_assumed"},
        {"arith": "bf16"},
        {"noise": "none"},
        {"Delta_g": 1},
        {"s_g_squared": 255},
        {"s_g_squared": 2**52 + 1},
        {"s_g_squared": 2**40},
        {"members": 0},
        {"members": 3},
        {"U_size": 0},
        {"U_size": 5},
        {"t": -1},
        {"t": 4},
        {"z_t": "0"},
        {"z_t": "40"},
        {"z_w": "40"},
        {"beta": "0"},
        {"beta": "1"},
        {"beta": BETA[:-1] + "0"},
        {"kind": "declared"},
        {"kind": "no_dp"},
    ],
)
def test_malformed_events_are_refused(fields: dict[str, Any], changes: dict[str, object]) -> None:
    Event.from_fields(fields)
    with pytest.raises(UsageError):
        Event.from_fields({**fields, **changes})


def test_a_smaller_or_larger_claim_than_the_noise_gives_is_refused(fields: dict[str, Any]) -> None:
    Event.from_fields(shared(fields))
    for name, value in (("z_t", fields["z_t"]), ("z_w", shared(fields)["z_t"]), ("t", 1), ("U_size", 7)):
        with pytest.raises(UsageError):
            Event.from_fields({**shared(fields), name: value})


def test_shared_noise_needs_two_honest_shares(fields: dict[str, Any]) -> None:
    Event.from_fields(shared(fields, cohort=3, t=1))
    for cohort, t in ((3, 2), (3, 3)):
        with pytest.raises(UsageError, match="U_size"):
            Event.from_fields(shared(fields, cohort, t))


def test_no_mechanism_where_there_is_none(fields: dict[str, Any]) -> None:
    event = Event.from_fields(declared(fields))
    with pytest.raises(UsageError):
        _ = event.mechanism
    for name in MECHANISM:
        with pytest.raises(UsageError):
            Event.from_fields(declared(fields, **{name: fields[name]}))


def test_a_problem_never_carries_the_value(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Event.from_fields({**fields, "task": "Secret-4711", "event_id": "Secret-4711"})
    assert "Secret" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        Event.from_fields({**fields, "q": "Secret-4711"})
    assert "Secret" not in str(caught.value)


def test_states_change_and_nothing_else(make_event: MakeEvent) -> None:
    event = make_event()
    released = event.with_state("released", "retry")
    assert (released.state, released.reason) == ("released", "retry")
    assert released.with_state("charged") == event
    with pytest.raises(UsageError):
        event.with_state("free")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        event.state = "reserved"  # type: ignore[misc]


SHARED = GateParams(
    1.0, 0.0005, 31, 0.7, "full", 1.0, 1, 1000, "f64_bounded", mode="shared-noise", minimum=7, clamp=50.0
)


def planned(members: int = 10, t: int = 2, params: GateParams = SHARED) -> Event:
    return plan_event(params, "ab" * 16, "cd" * 32, "training", 1, 1, members, t, "ef" * 16)


@settings(max_examples=60, deadline=None)
@given(
    z=st.floats(0.05, 50.0),
    t=st.integers(1, 5),
    sizes=st.lists(st.integers(7, 10), min_size=1, max_size=3),
    members=st.integers(10, 13),
)
def test_a_round_is_settled_at_its_least_noise(z: float, t: int, sizes: list[int], members: int) -> None:
    params = replace(SHARED, noise_multiplier=z)
    event = planned(members, t, params)
    uploads = [(size, params.variance(size - t)) for size in sizes]
    found = settled(event, uploads)
    naive = [
        (
            math.sqrt((u - t) * variance - 4) / event.mechanism.delta_g,
            math.sqrt(variance - 4) / event.mechanism.delta_g,
        )
        for u, variance in uploads
    ]
    assert found.u_size == max(sizes)
    for view, least in enumerate(map(min, zip(*naive, strict=True))):
        z = float(found.mechanism.z("w" if view else "t"))
        assert z * (1 - 1e-12) <= least <= z * 1.005
    assert settled(found, uploads) == found == settled(event, [*uploads, *reversed(uploads)])
    # What was charged before the cohort was known is never less than what it is settled at.
    assert event.mechanism.z_t <= found.mechanism.z_t
    assert event.mechanism.z_w <= found.mechanism.z_w


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("z", [0.05, 0.7, 30.0])
def test_a_charge_covers_every_cohort(z: float, t: int) -> None:
    params = replace(SHARED, noise_multiplier=z)
    charge = planned(12, t, params).mechanism
    for u in range(7, 13):
        variance = params.variance(u - t)
        assert charge.z_t <= fraction_of(clipping.z_threshold(variance, charge.delta_g, u - t))
        assert charge.z_w <= fraction_of(clipping.z_worst(variance, charge.delta_g))
    assert float(charge.z_t) >= z * 0.995
    assert charge.u_size == charge.members == 12


def test_local_rounds_and_rounds_without_upload_are_not_settled(make_event: MakeEvent) -> None:
    local = make_event()
    assert settled(local, [(3, 900)]) is local
    assert settled(planned(), []) == planned()
