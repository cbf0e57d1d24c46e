"""The state of a run: strict bytes, no secrets in print, no impossible state."""

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import labelled, split_labelled
from common.errors import VerificationError
from common.secagg.records import Open
from common.secagg.state import RunState
from tests.common.secagg.federation import Federation, memory


def all_states() -> list[bytes]:
    """Every state that hospital 2 made durable in a setup and two rounds, and its end."""
    federation = Federation(4, rounds_max=2)
    federation.pair()
    federation.whole_round(1)
    federation.whole_round(2)
    assert federation.sites[2].closed
    return federation.disks[2].versions


STATES = all_states()


def test_ids_have_two_bytes() -> None:
    members = (2, 255, 256, 300, 65535)
    state = dataclasses.replace(
        RunState.from_bytes(STATES[1]),
        listed=members,
        keys=tuple((peer, bytes(32)) for peer in members[1:]),
        accepted=members[2:],
    )
    assert RunState.from_bytes(state.to_bytes()) == state


def test_every_step_of_a_run_was_made_durable() -> None:
    # announce, directory, seeds, confirms; accepted, uploaded, opened, twice; closed.
    assert len(STATES) == 4 + 2 * 3 + 1
    assert len(set(STATES)) == len(STATES)


@pytest.mark.parametrize("number", range(len(STATES)))
def test_a_state_comes_back_as_it_was(number: int) -> None:
    state = RunState.from_bytes(STATES[number])
    assert state.to_bytes() == STATES[number]
    assert RunState.from_bytes(state.to_bytes()) == state


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STATES), st.data())
def test_run_state_is_read_strictly(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    damage = draw.draw(st.sampled_from(["flip", "cut", "extend"]))
    if damage == "flip":
        other = data[:at] + bytes([data[at] ^ draw.draw(st.integers(1, 255))]) + data[at + 1 :]
    else:
        other = data[:at] if damage == "cut" else data + bytes(draw.draw(st.integers(1, 20)))
    try:
        read = RunState.from_bytes(other)
    except VerificationError:
        return
    assert damage == "flip"
    assert read.to_bytes() == other


IMPOSSIBLE: list[tuple[int, dict[str, Any]]] = [
    (0, {"man": bytes(31)}),
    (1, {"listed": ()}),
    (1, {"dirh": b""}),
    (1, {"keys": ((9, bytes(32)),)}),
    (1, {"keys": ((2, bytes(32)),)}),
    (3, {"accepted": (1, 2)}),
    (3, {"accepted": (4, 1)}),
    (3, {"keys": ()}),
    (4, {"model_digest": b""}),
    (4, {"round": 0}),
    (4, {"index": 0}),
    (4, {"index": 2}),
    (4, {"s": bytes(32)}),
    (4, {"attempt": 1}),
    (5, {"s": b""}),
    (5, {"payload": b""}),
    (5, {"header": None}),
    (5, {"cohort": ()}),
    (5, {"attempt": 0}),
    (5, {"index": 2}),
    (6, {"s": bytes(32)}),
    (6, {"index": 1}),
    (6, {"opened": None}),
    (6, {"opened": Open(2, bytes(32), bytes(32))}),
    (6, {"header": None}),
    (10, {"dirh": bytes(32), "listed": (1, 2, 3)}),
    (10, {"s": bytes(32)}),
    (9, {"closed": True}),
    (1, {"man": bytes(33)}),
    (1, {"dirh": bytes(31)}),
    (1, {"dirh": bytes(33)}),
    (0, {"dirh": bytes(32)}),
    (0, {"index": 1}),
    (0, {"closed": True}),
    (1, {"model_digest": bytes(32)}),
    (3, {"keys": ((3, bytes(32)), (1, bytes(32))), "accepted": ()}),
    (3, {"keys": ((1, bytes(32)), (1, bytes(32))), "accepted": ()}),
    (3, {"accepted": (1, 1)}),
    (4, {"model_digest": bytes(31)}),
    (4, {"model_digest": bytes(33)}),
    (5, {"s": bytes(31)}),
    (5, {"s": bytes(33)}),
    (6, {"opened": Open(2, b"\xff" * 32, bytes(32))}),
    (5, {"round": 0, "model_digest": b"", "index": 0}),
]
UPLOAD: list[tuple[str, Any]] = [("header", None), ("payload", b""), ("cohort", ()), ("attempt", 0)]
IMPOSSIBLE += [(5, dict(lost)) for count in (1, 2, 3) for lost in itertools.combinations(UPLOAD, count)]


@pytest.mark.parametrize(("number", "change"), IMPOSSIBLE)
def test_a_state_that_the_protocol_cannot_be_in_is_refused(number: int, change: dict[str, Any]) -> None:
    state = dataclasses.replace(RunState.from_bytes(STATES[number]), **change)
    with pytest.raises(VerificationError, match="damaged"):
        RunState.from_bytes(state.to_bytes())


@pytest.mark.parametrize("number", range(len(STATES)))
def test_every_part_of_a_state_has_its_width(number: int) -> None:
    parts = split_labelled("runstate/1", STATES[number], "run state")
    names = [field.name for field in dataclasses.fields(RunState)]
    assert len(parts) == len(names)
    for at, part in enumerate(parts):
        if names[at] == "payload" and part:
            # Its width is that of the run, which a state does not know: noticed at restart.
            continue
        for other in (part + b"\0", part + b"\1", part[:-1]) if part else (b"\1",):
            with pytest.raises(VerificationError):
                RunState.from_bytes(labelled("runstate/1", *parts[:at], other, *parts[at + 1 :]))
    for others in (parts[:-1], (*parts, b"")):
        with pytest.raises(VerificationError, match="parts"):
            RunState.from_bytes(labelled("runstate/1", *others))


def test_a_damaged_payload_is_noticed_at_restart() -> None:
    federation = memory(3)()
    hub = federation.round()
    federation.ready(hub)
    federation.upload(hub, hub.cohort())
    disk = federation.disks[1]
    state = RunState.from_bytes(disk.versions[-1])
    disk.versions.append(
        dataclasses.replace(state, payload=bytes([state.payload[0] ^ 1]) + state.payload[1:]).to_bytes()
    )
    with pytest.raises(VerificationError, match="payload is damaged"):
        federation.restart(1)


def test_nothing_secret_is_printed_or_pickled() -> None:
    for data in STATES:
        state = RunState.from_bytes(data)
        assert repr(state) == (
            f"RunState(me=2, round={state.round}, attempt={state.attempt}, closed={state.closed})"
        )
        for copying in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                copying(state)
