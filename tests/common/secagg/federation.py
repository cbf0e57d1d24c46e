"""A small federation in one process, with a disk a hospital and randomness from a counter. For tests only."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from common.privacy.noise import discrete_gaussian
from common.secagg.hub import HubRound, HubSetup, Setup
from common.secagg.params import HUB, RunParams, smallest_cohort
from common.secagg.records import Cohort, Ready, Upload, state_digest
from common.secagg.site import Site
from common.secagg.state import RunState
from common.secagg.sums import Sums

MODEL = hashlib.sha256(b"model").digest()
STATE = state_digest(b"state")
NOW = "2030-01-01T00:00Z"


class Counter:
    """Reproducible bytes that never repeat within one counter."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0

    def __call__(self, size: int) -> bytes:
        self.calls += 1
        return hashlib.shake_256(f"{self.name}/{self.calls}".encode()).digest(size)


@dataclass
class Disk:
    """What one hospital has made durable, every version of it; ``fail`` makes the next writes raise."""

    versions: list[bytes] = field(default_factory=list)
    fail: int = 0

    def __call__(self, state: RunState) -> None:
        if self.fail:
            self.fail -= 1
            raise OSError("disk full")
        self.versions.append(state.to_bytes())

    @property
    def state(self) -> RunState:
        return RunState.from_bytes(self.versions[-1])


@lru_cache
def signing_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(name: str) -> bytes:
    return signing_key(name).public_key().public_bytes_raw()


def make_params(n: int = 3, me: int = HUB, **changes: Any) -> RunParams:
    members = tuple(range(1, n + 1))
    t = changes.pop("t", max(1, n // 5))
    rho = changes.pop("rho", 0 if n == 4 else 1)
    values: dict[str, Any] = {
        "man": hashlib.sha256(b"manifest").digest(),
        "parameters": 5,
        "scalars": 2,
        "bits": 32,
        "step": 0.5,
        "range": 1000.0,
        "rounding": "nearest",
        "masked": True,
        "members": members,
        "keys": {i: public(f"site {i}") for i in members},
        "hub_key": public("hub"),
        "t": t,
        "m": smallest_cohort(n, t, rho),
        "rho": rho,
        "attempts": 3,
        "rounds_max": 5,
        "state_norm_bound": 100.0,
        "expiry": "2031-01-01T00:00Z",
    }
    return RunParams(me=me, **values | changes)


class Federation:
    """n hospitals and a hub. ``sites[i]`` is the machine of hospital i, ``disks[i]`` its disk."""

    def __init__(self, n: int = 3, name: str = "test", **changes: Any) -> None:
        self.params = make_params(n, **changes)
        self.ids = self.params.members
        self.entropy = {i: Counter(f"{name}/{i}") for i in self.ids}
        self.disks = {i: Disk() for i in self.ids}
        self.sites = {i: self.new_site(i) for i in self.ids}
        self.hub = HubSetup(self.params)
        self.setup: Setup | None = None

    def site_params(self, i: int) -> RunParams:
        return replace(self.params, me=i)

    def new_site(self, i: int, state: RunState | None = None) -> Site:
        return Site(
            self.site_params(i),
            persist=self.disks[i],
            entropy=self.entropy[i],
            sign=signing_key(f"site {i}").sign,
            state=state,
            sampler=discrete_gaussian,
        )

    def restart(
        self,
        i: int,
        version: int = -1,
        *,
        now: str = NOW,
        charged_round: int = 0,
        released: tuple[int, bytes] = (0, b""),
    ) -> Site:
        """The machine of hospital i again, from what its disk holds (or held)."""
        self.sites[i] = Site.restore(
            self.site_params(i),
            RunState.from_bytes(self.disks[i].versions[version]),
            now=now,
            charged_round=charged_round,
            released=released,
            persist=self.disks[i],
            entropy=self.entropy[i],
            sign=signing_key(f"site {i}").sign,
            sampler=discrete_gaussian,
        )
        return self.sites[i]

    def pair(self) -> Setup:
        """The whole setup, without faults."""
        for i, site in self.sites.items():
            self.hub.on_announce(i, site.announce())
        directory = self.hub.directory()
        for i, site in self.sites.items():
            self.hub.on_pair_seeds(i, site.on_directory(directory))
        for i, site in self.sites.items():
            self.hub.on_confirm(i, site.on_pair_seeds(self.hub.seeds_for(i)))
        for i, site in self.sites.items():
            site.on_confirms(self.hub.confirms_for(i))
        self.setup = self.hub.outcome()
        return self.setup

    def round(
        self, number: int = 1, *, start_at: Sequence[int] | None = None, model: bytes = MODEL
    ) -> HubRound:
        """A round, accepted by the hospitals ``start_at`` (all)."""
        assert self.setup is not None
        hub = HubRound(
            self.params,
            self.setup,
            round=number,
            state=STATE,
            model_digest=model,
            deadline=1_900_000_000,
            sign=signing_key("hub").sign,
        )
        for i in self.ids if start_at is None else start_at:
            self.sites[i].on_round_start(hub.start)
        return hub

    def vectors(self, i: int, number: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The vectors of hospital i, different for each hospital and round."""
        rng = np.random.Generator(np.random.PCG64([i, number]))
        bound = int(self.params.range / self.params.step)
        return (
            rng.integers(-bound, bound + 1, self.params.parameters, dtype=np.int64),
            rng.integers(-(2**40), 2**40, self.params.scalars, dtype=np.int64),
        )

    def ready(self, hub: HubRound, ids: Sequence[int] | None = None) -> dict[int, Ready]:
        found = {}
        for i in self.ids if ids is None else ids:
            found[i] = self.sites[i].ready(*self.vectors(i, hub.start.round), hub.start.model_digest)
            hub.on_ready(i, found[i])
        return found

    def send_payload(self, hub: HubRound, i: int, header: Upload) -> None:
        hub.on_upload(i, header)
        payload = self.sites[i].payload()
        for index, span in enumerate(self.params.layout.spans):
            hub.on_chunk(i, index, payload[span.start : span.stop])

    def upload(self, hub: HubRound, cohort: Cohort, ids: Sequence[int] | None = None) -> None:
        for i in cohort.ids if ids is None else ids:
            self.send_payload(hub, i, self.sites[i].on_cohort(cohort))

    def open(self, hub: HubRound, ids: Sequence[int] | None = None) -> None:
        request = hub.open_please()
        for i in hub.accumulator.ids if ids is None else ids:
            hub.on_open(i, self.sites[i].on_open_please(request))

    def whole_round(self, number: int = 1) -> Sums:
        hub = self.round(number)
        self.ready(hub)
        self.upload(hub, hub.cohort())
        self.open(hub)
        sums = hub.finish()
        result = hub.result(MODEL)
        for site in self.sites.values():
            site.on_result(result)
        return sums

    def expected(self, ids: Sequence[int], number: int = 1) -> tuple[list[int], list[int]]:
        """The plain sums over ``ids``, in Python integers."""
        vectors = [self.vectors(i, number) for i in ids]
        return tuple(
            [sum(map(int, column)) for column in zip(*part, strict=True)]
            for part in zip(*vectors, strict=True)
        )  # type: ignore[return-value]


def matches(federation: Federation, sums: Sums, number: int = 1) -> bool:
    expected = federation.expected(sums.cohort, number)
    return (sums.parameters.tolist(), sums.scalars.tolist()) == expected


def memory(n: int = 3, **changes: Any) -> Callable[[], Federation]:
    """A factory of federations that have finished setup; the setup itself is done once."""
    first = Federation(n, **changes)
    first.pair()
    versions = {i: list(disk.versions) for i, disk in first.disks.items()}

    def make() -> Federation:
        federation = Federation(n, name="copy", **changes)
        federation.setup = first.setup
        for i in federation.ids:
            federation.disks[i].versions[:] = versions[i]
            federation.restart(i)
        return federation

    return make
