"""Setups and whole masked rounds in memory, against the number of hospitals: CPU, bytes, the hub's memory."""

import functools
import hashlib
import math
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.secagg import records
from common.secagg.hub import HubRound, Setup
from common.secagg.pairing import SetupKeys
from common.secagg.records import Directory, KeyAnnounce, Record
from common.secagg.site import Site
from common.secagg.state import RunState
from tests.bench.result import Result
from tests.common.secagg.federation import MODEL, Federation, matches, signing_key

T = TypeVar("T")
PARAMETERS = 10**4
PAIRED = (10, 100)
STORED = 1000
REPLAYS = 3


class InMemory(Federation):
    """Hospitals that keep their latest state only, as a value."""

    def __init__(self, n: int, **changes: Any) -> None:
        self.states: dict[int, RunState] = {}
        super().__init__(n, **changes)

    def new_site(self, i: int, state: RunState | None = None) -> Site:
        return Site(
            self.site_params(i),
            persist=functools.partial(self.states.__setitem__, i),
            entropy=self.entropy[i],
            sign=signing_key(f"site {i}").sign,
            state=state,
        )

    def pair_as_stored(self) -> Setup:
        """As after a setup, without one: every pair has a key, known to both, that nobody has sealed."""
        man, announced = self.params.man, []
        for i in self.ids:
            mlkem, x25519 = SetupKeys.new(self.entropy[i]).public()
            record = KeyAnnounce(i, man, mlkem, x25519)
            announced.append(records.signed(record, man, signing_key(f"site {i}").sign))
        directory = Directory(tuple(announced))
        dirh = records.directory_digest(man, directory.entries)
        pairs = [(i, j) for i in self.ids for j in self.ids if i < j]
        keys = {pair: hashlib.sha256(b"%d/%d" % pair).digest() for pair in pairs}
        for i in self.ids:
            peers = tuple(j for j in self.ids if j != i)
            held = tuple((j, keys[min(i, j), max(i, j)]) for j in peers)
            self.sites[i] = self.new_site(
                i, RunState(man, i, dirh=dirh, listed=self.ids, keys=held, accepted=peers)
            )
        self.setup = Setup(directory, dirh, frozenset(pairs))
        return self.setup


@dataclass
class Meter:
    """CPU seconds and bytes of the hub and of each hospital."""

    hub_s: float = 0.0
    site_s: dict[int, float] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)

    def site(self, i: int, call: Callable[..., T], *arguments: Any) -> T:
        started = time.thread_time()
        result = call(*arguments)
        self.site_s[i] = self.site_s.get(i, 0.0) + time.thread_time() - started
        return result

    def hub(self, call: Callable[..., T], *arguments: Any) -> T:
        started = time.thread_time()
        result = call(*arguments)
        self.hub_s += time.thread_time() - started
        return result

    def sends(self, i: int, *found: Record) -> None:
        self.sent[i] = self.sent.get(i, 0) + sum(len(records.encode(record)) for record in found)

    def receives(self, i: int, found: Iterable[Record]) -> None:
        self.received[i] = self.received.get(i, 0) + sum(len(records.encode(record)) for record in found)


def measured_setup(federation: Federation) -> Meter:
    """S1 to S4 without faults."""
    meter, hub = Meter(), federation.hub
    for i, site in federation.sites.items():
        announce = meter.site(i, site.announce)
        meter.sends(i, announce)
        meter.hub(hub.on_announce, i, announce)
    directory = meter.hub(hub.directory)
    for i, site in federation.sites.items():
        meter.receives(i, directory.entries)
        seeds = meter.site(i, site.on_directory, directory)
        meter.sends(i, *seeds)
        meter.hub(hub.on_pair_seeds, i, seeds)
    for i, site in federation.sites.items():
        sealed = meter.hub(hub.seeds_for, i)
        meter.receives(i, sealed)
        confirm = meter.site(i, site.on_pair_seeds, sealed)
        meter.sends(i, confirm)
        meter.hub(hub.on_confirm, i, confirm)
    for i, site in federation.sites.items():
        confirms = meter.hub(hub.confirms_for, i)
        meter.receives(i, confirms)
        meter.site(i, site.on_confirms, confirms)
    federation.setup = meter.hub(hub.outcome)
    return meter


@dataclass
class Messages:
    """All that the hospitals sent in one round, as bytes."""

    ready: dict[int, bytes] = field(default_factory=dict)
    uploads: dict[int, bytes] = field(default_factory=dict)
    payloads: dict[int, bytes] = field(default_factory=dict)
    opened: dict[int, bytes] = field(default_factory=dict)


def played(federation: Federation, meter: Meter) -> Messages:
    """One round with every hospital."""
    hub, sent = federation.round(1, start_at=()), Messages()
    for i, site in federation.sites.items():
        meter.site(i, site.on_round_start, hub.start)
        ready = meter.site(i, site.ready, *federation.vectors(i), MODEL)
        sent.ready[i] = records.encode(ready)
        hub.on_ready(i, ready)
    cohort = hub.cohort()
    for i, site in federation.sites.items():
        sent.uploads[i] = records.encode(meter.site(i, site.on_cohort, cohort))
        sent.payloads[i] = site.payload()
        federation.send_payload(hub, i, site.on_cohort(cohort))
    request = hub.open_please()
    for i, site in federation.sites.items():
        opening = meter.site(i, site.on_open_please, request)
        sent.opened[i] = records.encode(opening)
        hub.on_open(i, opening)
    result = hub.result(MODEL)
    for i, site in federation.sites.items():
        meter.site(i, site.on_result, result)
    if not matches(federation, hub.finish()):
        raise RuntimeError("the sum of a round is wrong")
    return sent


def replayed(federation: Federation, sent: Messages) -> HubRound:
    """The same round at the hub alone, from the bytes that it receives."""
    hub = federation.round(1, start_at=())
    for i, data in sent.ready.items():
        hub.on_ready(i, records.decode(records.Ready, data))
    hub.cohort()
    for i, data in sent.uploads.items():
        hub.on_upload(i, records.decode(records.Upload, data))
        for index, span in enumerate(federation.params.layout.spans):
            hub.on_chunk(i, index, sent.payloads[i][span.start : span.stop])
    hub.open_please()
    for i, data in sent.opened.items():
        hub.on_open(i, records.decode(records.Open, data))
    hub.transcript(hub.result(MODEL))
    return hub


@dataclass(frozen=True)
class Round:
    """One whole round: CPU of the hub, CPU of a hospital (mean), the hub's memory above one model."""

    hospitals: int
    hub_s: float
    hospital_s: float
    kept_bytes: float
    peak_bytes: float


def measured_round(federation: Federation) -> Round:
    meter = Meter()
    sent = played(federation, meter)
    model_bytes = federation.params.layout.payload_bytes
    replays = [Meter() for _ in range(REPLAYS)]
    for replay in replays:
        replay.hub(replayed, federation, sent)
    tracemalloc.start()
    try:
        hub = replayed(federation, sent)
        kept, peak = tracemalloc.get_traced_memory()
        del hub
    finally:
        tracemalloc.stop()
    return Round(
        len(federation.ids),
        min(replay.hub_s for replay in replays),
        statistics.mean(meter.site_s.values()),
        kept - model_bytes,
        peak - model_bytes,
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The e of the least-squares fit values = c sizes^e on logarithms."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope


def setups(federations: Iterable[Federation]) -> Iterator[Result]:
    """S1 to S4: the figures of the hospital that has most of each."""
    for federation in federations:
        meter, n = measured_setup(federation), len(federation.ids)
        targets = (0.1, 75.0, 250.0) if n == 100 else (None, None, None)
        yield Result(f"setup.{n} hospitals, CPU of each", max(meter.site_s.values()), "s", targets[0])
        yield Result(f"setup.{n} hospitals, sent by each", max(meter.sent.values()) / 1024, "KiB", targets[1])
        received = max(meter.received.values()) / 1024
        yield Result(f"setup.{n} hospitals, received by each", received, "KiB", targets[2])
        yield Result(f"setup.{n} hospitals, CPU of the hub", meter.hub_s, "s")


def run() -> tuple[list[Result], list[Round]]:
    """Setups at 10 and 100 hospitals, rounds at 10, 100 and 1000 and how they grow."""
    paired = [InMemory(n, parameters=PARAMETERS) for n in PAIRED]
    results = list(setups(paired))
    stored = InMemory(STORED, parameters=PARAMETERS)
    stored.pair_as_stored()
    rounds = [measured_round(federation) for federation in (*paired, stored)]
    sizes = [r.hospitals for r in rounds]
    for name, unit, values in series(rounds):
        results += [
            Result(f"round.{n} hospitals, {name}", v, unit) for n, v in zip(sizes, values, strict=True)
        ]
        results.append(Result(f"round.{name}: exponent of n", exponent(sizes, values), ""))
    return results, rounds


def series(rounds: Sequence[Round]) -> list[tuple[str, str, list[float]]]:
    """What is shown against the number of hospitals: name, unit, a value a round."""
    return [
        ("CPU of the hub", "ms", [r.hub_s * 1e3 for r in rounds]),
        ("CPU of a hospital", "ms", [r.hospital_s * 1e3 for r in rounds]),
        ("hub memory, kept", "MiB", [r.kept_bytes / 2**20 for r in rounds]),
        ("hub memory, peak", "MiB", [r.peak_bytes / 2**20 for r in rounds]),
    ]
