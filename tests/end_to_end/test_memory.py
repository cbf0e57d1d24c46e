"""Whole studies with the real apps and workers over the Grid in this process.

Without differential privacy and with nearest rounding they give the same bits as on the link, and with words
of 16 bits the same as with 32; with dither, what the grid allows.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from client import app as client_app
from client.participation import Participation
from common import flower
from server import rounds
from server.app import app as server_app
from server.memory import MemoryGrid
from server.processes import Processes
from server.store import Store, StudyRow
from tests.client import federation as in_process
from tests.federation import Federation, contribution, small_study
from tests.noise import FALSE_ALARM, chi_squared

WITHOUT_DP: dict[str, Any] = {"kind": "without_differential_privacy"}
ALLOWED = {"allow_studies_without_differential_privacy": True}
STUDY: dict[str, Any] = {
    "privacy": WITHOUT_DP,
    "training__rounds": 3,
    "training__steps": 2,
    "training__server": {"strategy": "fedadam", "learning_rate": 0.05},
}


def models(database: Path, digest: str) -> list[bytes]:
    store = Store.open(database)
    try:
        assert store.study(digest).status == "done", store.study(digest).detail
        return [store.state(digest, row.step or 0) for row in store.rounds(digest)]
    finally:
        store.close()


def on_the_link(folder: Path) -> list[bytes]:
    with Processes(folder / "logs") as processes:
        federation = Federation(folder, processes, rules=ALLOWED)
        federation.start()
        digest = federation.submit(small_study(federation.names, **STUDY))
        federation.approve_all(digest)
        federation.watch(digest)
        return models(federation.hub_home.database, digest)


@dataclass
class Study:
    """A study over a MemoryGrid: ``payloads`` are those that left the hospitals."""

    folder: Path
    payloads: list[bytes] = field(default_factory=list)

    def models(self, **changes: Any) -> list[bytes]:
        return in_memory(self.folder, self.payloads, **changes)


def in_memory(folder: Path, payloads: list[bytes], **changes: Any) -> list[bytes]:
    """The models of all rounds of the study with these changes."""
    in_process.make(folder / "template", 3)
    federation = in_process.Federation(folder / "template", folder / "run", epsilon=20.0, **ALLOWED)
    manifest = federation.manifest(**{**STUDY, **changes})
    signed, digest = federation.sign(manifest), manifest.digest.hex()
    store = Store.open(federation.hub.database)
    store.add_study(
        StudyRow(
            digest=digest,
            name=manifest.study.name,
            manifest=signed.manifest_bytes,
            signature=signed.signature,
            roster=federation.roster.data,
            roster_signature=federation.roster.signature,
            status="queued",
            rounds=manifest.study.training.rounds,
            submitted="2026-01-01T00:00Z",
        )
    )
    store.close()
    folders = {number: str(home.folder) for number, home in federation.sites.items()}

    def answer(message: flower.Message, context: flower.Context) -> flower.Message:
        reply = client_app.app(message, context)
        payloads.extend(filter(None, [b"".join(flower.attachment_of(reply))]))
        return reply

    apps = {}
    for number, home in folders.items():
        federation.decide(number, manifest)
        apps[number] = partial(answer, context=flower.context_for(number, {"site-home": home}))
    try:
        config = {"hub-home": str(federation.hub.folder), "study": digest}
        server_app(MemoryGrid(apps), flower.context_for(flower.HUB_NODE_ID, config))
    finally:
        for home in folders.values():
            client_app.close(home)
    return models(federation.hub.database, digest)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "CONSENT_PERIOD_S", 0.02)


def test_the_same_apps_give_the_same_bits_in_memory_and_on_the_link(tmp_path: Path) -> None:
    found = Study(tmp_path / "memory").models()
    assert len(set(found)) == 3
    assert found == on_the_link(tmp_path / "link")


COARSE: dict[str, Any] = {
    "training__server": {"strategy": "fedavg"},
    "training__rounds": 2,
    "aggregation__codec__step": 0.01,
    "aggregation__codec__range": 50.0,
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' code runs in this process: three of them take seconds to start."""
    computed_here = partial(Participation, computation=in_process.ComputedHere)
    monkeypatch.setattr(client_app, "Participation", computed_here)


def numbers(model: bytes) -> NDArray[np.float64]:
    return np.concatenate([value.ravel().astype(np.float64) for _, value in sorted(load(model).items())])


@pytest.mark.usefixtures("here")
def test_words_of_16_bits_give_the_bits_of_32(tmp_path: Path) -> None:
    wide, narrow = Study(tmp_path / "wide"), Study(tmp_path / "narrow")
    found = wide.models(**COARSE)
    assert narrow.models(**COARSE, aggregation__codec__bits=16) == found
    assert len(set(found)) == 2
    # 6 parameters and a 1, and the 1 of the scalars.
    assert [len(payload) for payload in wide.payloads] == [7 * 4 + 8] * 6
    assert [len(payload) for payload in narrow.payloads] == [7 * 2 + 8] * 6


@pytest.mark.usefixtures("here")
def test_16_bits_with_differential_privacy(tmp_path: Path) -> None:
    study = Study(tmp_path)
    private = {
        "kind": "dp",
        "clip_norm": 1.0,
        "grid_step": 0.001,
        "noise_multiplier": 8.0,
        "max_patients": 1000,
    }
    found = study.models(**COARSE, privacy=private, aggregation__codec__bits=16)
    assert len(set(found)) == 2
    assert [len(payload) for payload in study.payloads] == [7 * 2 + 8] * 6


def test_dither_moves_each_number_by_less_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest and the highest dither that a hospital can draw round every number down and up."""
    one = {**COARSE, "training__rounds": 1}

    def found(name: str, byte: bytes, **changes: Any) -> NDArray[np.float64]:
        computation = partial(in_process.ComputedHere, entropy=lambda size: byte * size)
        monkeypatch.setattr(client_app, "Participation", partial(Participation, computation=computation))
        return numbers(Study(tmp_path / name).models(**{**one, **changes})[0])

    exact = found("exact", b"", aggregation__codec__step=1e-6)
    dither = {"aggregation__codec__rounding": "dither"}
    low, high = found("low", b"\x00", **dither), found("high", b"\xff", **dither)
    assert (low < exact + 1e-6).all()
    assert (exact - 1e-6 < high).all()
    # Three hospitals' numbers of six parameters: none of them lies on the grid.
    assert np.allclose(high - low, 0.01, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("here")
def test_shared_noise_is_gradient_descent_with_one_noise(tmp_path: Path) -> None:
    # So many that the noise of one share is missed once in two hundred thousand runs; with 12, once in sixty.
    rounds, rate, public, step, z = 24, 2.0, 20, 0.001, 8.0
    found = Study(tmp_path).models(
        privacy={
            "kind": "dp",
            "clip_norm": 1.0,
            "grid_step": step,
            "noise_multiplier": z,
            "max_patients": 1000,
        },
        training__mode="shared-noise",
        training__engine="bookkeeping",
        training__steps=1,
        training__rounds=rounds,
        training__learning_rate=rate,
        training__average_last=4,
        training__server={"strategy": "fedavg"},
        aggregation__codec__step=step,
    )
    iterates = [np.zeros(6), *map(in_order, found)]
    # The model after the last round is the mean of the last four iterates, its own among them.
    iterates[-1] = 4 * iterates[-1] - sum(iterates[-4:-1])
    noise = []
    for before, after, model in zip(iterates[:-1], iterates[1:], [b"", *found[:-1]], strict=True):
        total = sum(contribution(site, model) for site in (1, 2, 3))
        noise.append((after - before) * 3 * public / rate - total)
    share = (z * 1000 * step) ** 2 / 2
    assert chi_squared(np.concatenate(noise), 3 * share) > FALSE_ALARM
    # As if one hospital alone had added its share.
    assert chi_squared(np.concatenate(noise), share) < FALSE_ALARM


def in_order(model: bytes) -> NDArray[np.float64]:
    """Weights, then biases."""
    tensors = load(model)
    return np.concatenate([tensors[name].ravel().astype(np.float64) for name in ("weight", "bias")])
