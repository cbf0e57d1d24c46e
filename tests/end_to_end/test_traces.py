"""What a hub can see of a hospital's messages, and what a thief finds in its folder: whole hospitals, real files.

The workers' code runs in this process, and the hub's side is its machines.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from client.participation import Participation
from common import messages
from common.secagg import keys
from common.secagg.state import RunState
from common.tasks.state import model_digest, state_bytes
from tests.client.federation import ComputedHere, Federation, Hub, make
from tests.federation import extract_rows

Rows: TypeAlias = list[tuple[object, ...]]
Trace: TypeAlias = list[tuple[int, str, int, bool, tuple[int, ...]]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make(folder, 3)
    return folder


@contextmanager
def joined(
    template: Path, folder: Path, rows: Sequence[Sequence[object]] | None = None, **changes: Any
) -> Iterator[Hub]:
    """A study of three hospitals that share keys; the first has these rows."""
    federation = Federation(template, folder, epsilon=20.0)
    if rows is not None:
        federation.write_extract(1, rows)
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in federation.sites}
    try:
        yield Hub(federation, federation.manifest(training__rounds=20, **changes), sites).joined()
    finally:
        for site in sites.values():
            site.close()


# Traces ----------------------------------------------------------------------------------------------


BASE: Rows = [tuple(row) for row in extract_rows(1)]
NEIGHBOURS: dict[str, Rows] = {
    "as it is": BASE,
    "one patient more": [*BASE, ("new", 50.0, 25.0, "yes")],
    "one patient without numbers": [*BASE, ("new", "", "nan", "yes")],
    "one patient past every range": [*BASE, ("new", 1e300, -1e300, "no")],
    "one patient of no known class": [*BASE, ("new", 50.0, 25.0, "perhaps")],
}


def crafted(hub: Hub, change: Callable[[NDArray[np.float32]], Any]) -> tuple[bytes, bytes]:
    """A model with every tensor changed, as the hub would send it, and its digest."""
    state = {
        tensor.name: np.ascontiguousarray(change(np.zeros(tensor.shape, dtype=np.float32)), dtype=np.float32)
        for tensor in hub.admitted.layout
    }
    if all(np.isfinite(value).all() for value in state.values()):
        return state_bytes(state, hub.admitted.layout), model_digest(state, hub.admitted.layout)
    return save(state), bytes(32)


def first_is(value: float) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def change(zeros: NDArray[np.float32]) -> NDArray[np.float32]:
        zeros.flat[0] = value
        return zeros

    return change


STATES: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "zeros": lambda zeros: zeros,
    "certain of one class": first_is(70.0),
    "tiny": lambda zeros: zeros + np.float32(1e-45),
    "past the norm": first_is(1000.0),
    "not a number": first_is(np.nan),
}


def round_with(hub: Hub, state: bytes, digest: bytes) -> Trace:
    """The trace of one round on a state: who answered what kind with how many bytes, and whether it did."""
    hub.state, hub.model_digest = state, digest
    hub.frames.clear()
    round_ = hub.start()
    answers = hub.ready(round_)
    if all(answers.values()):
        cohort = round_.cohort()
        assert all(hub.upload(round_, cohort).values())
        hub.finish(round_, cohort)
    return [
        (number, kind, len(reply), messages.decode_reply(kind, reply).available, tuple(map(len, payload)))
        for number, kind, reply, payload in hub.frames
    ]


def test_crafted_states_on_data_one_patient_apart_give_identical_traces(
    template: Path, tmp_path: Path
) -> None:
    traces: dict[str, list[Trace]] = {}
    for name, rows in NEIGHBOURS.items():
        with joined(template, tmp_path / name.replace(" ", "-"), rows) as hub:
            traces[name] = [round_with(hub, *crafted(hub, change)) for change in STATES.values()]
    usual = traces["as it is"]
    assert [name for name, trace in traces.items() if trace != usual] == []
    # Three of the states are computed on, by all; the others are refused by all before rows are touched.
    taken = [{kind for _, kind, _, available, _ in trace if available} for trace in usual]
    assert ["train.open" in kinds for kinds in taken] == [True] * 3 + [False] * 2
    refused = [[row for row in trace if row[1] == "train.ready" and not row[3]] for trace in usual]
    assert [len(rows) for rows in refused] == [0] * 3 + [3] * 2
    assert len({row[2] for rows in refused for row in rows}) == 1


def test_a_trace_that_depends_on_a_patient_is_noticed(template: Path, tmp_path: Path) -> None:
    """One patient past max_patients is a dropout: approval refuses such an extract, and reports say so."""
    traces = []
    for name in ("as it is", "one patient more"):
        folder = tmp_path / name.replace(" ", "-")
        with joined(template, folder, NEIGHBOURS[name], privacy__max_patients=len(BASE)) as hub:
            traces.append(round_with(hub, *crafted(hub, STATES["zeros"])))
    assert traces[0] != traces[1]


# Secrets on disk -------------------------------------------------------------------------------------


def found_in(folder: Path, secrets: dict[str, bytes]) -> list[str]:
    """Which of the secrets stand anywhere in the files of a folder."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(contents) > 5
    return [name for name, secret in secrets.items() if any(secret in content for content in contents)]


def stored(hub: Hub, number: int) -> RunState:
    data = hub.sites[number]._run_file.load(hub.man)
    assert data is not None
    return RunState.from_bytes(data)


def secrets_of(state: RunState) -> dict[str, bytes]:
    """What a hospital holds between its upload and its opening, by name and round."""
    assert state.header is not None
    named = {f"K of {state.index} with {peer}": key for peer, key in state.keys}
    return {
        **named,
        f"s of {state.round}": state.s,
        f"b of {state.round}": keys.self_seed(state.s, state.header.ctx),
        f"payload of {state.round}": state.payload[:24],
    }


def test_no_secret_older_than_the_current_round_is_on_disk(template: Path, tmp_path: Path) -> None:
    """After every step of three rounds, of which the second is lost; searched in every file of the folder."""
    with joined(template, tmp_path) as hub:
        older: dict[int, dict[str, bytes]] = {n: {} for n in hub.sites}
        folders = {n: home.folder for n, home in hub.federation.sites.items()}
        for number in (1, 2, 3):
            round_ = hub.start()
            assert all(hub.ready(round_).values())
            for n, secrets in older.items():
                assert found_in(folders[n], secrets) == []
            cohort = round_.cohort()
            assert all(hub.upload(round_, cohort).values())
            present = {n: secrets_of(stored(hub, n)) for n in hub.sites}
            for n, secrets in present.items():
                # What is looked for can be found: all but b, which is derived.
                assert found_in(folders[n], secrets) == [name for name in secrets if not name.startswith("b")]
            if number != 2:
                hub.finish(round_, cohort)
                for n, secrets in present.items():
                    # Of an opened round b and the payload may be sent again until the next begins.
                    assert found_in(folders[n], secrets) == [f"b of {number}", f"payload of {number}"]
            for n, secrets in present.items():
                older[n] |= secrets
        assert all(len(secrets) == 3 * 5 for secrets in older.values())
        hub.end()
        for n, secrets in older.items():
            assert found_in(folders[n], secrets) == []
