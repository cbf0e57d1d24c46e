"""The link: a 10 KB round trip with three agent processes, and a full secure round of a tiny study."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import flower
from server.grid import GrpcGrid
from server.link import Link
from server.processes import Processes
from server.store import Store
from tests.bench import large
from tests.bench.result import Result
from tests.conftest import Pki
from tests.federation import Federation, small_study

AGENTS = 3
ROUND_TRIPS = 300
WARM_UP = 20
BODY = os.urandom(10_000)
STUDY_ROUNDS = 60


@contextmanager
def _echo_federation() -> Iterator[GrpcGrid]:
    pki = Pki()
    server = pki.server()
    link = Link(
        "127.0.0.1:0",
        key_pem=server.key_pem,
        certificate_pem=server.certificate_pem,
        authority_pem=server.authority_pem,
        admit=lambda _peer: None,
    )
    link.start()
    agents = []
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "authority.pem").write_bytes(server.authority_pem)
            for i in range(1, AGENTS + 1):
                credentials = pki.client(i, f"Site {i}")
                (folder / f"{i}.key").write_bytes(credentials.key_pem)
                (folder / f"{i}.pem").write_bytes(credentials.certificate_pem)
                command = [
                    sys.executable,
                    "-m",
                    "tests.bench.echo_agent",
                    name,
                    f"127.0.0.1:{link.port}",
                    str(i),
                ]
                agents.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            deadline = time.monotonic() + 30
            while len(link.online()) < AGENTS and time.monotonic() < deadline:
                time.sleep(0.05)
            yield GrpcGrid(link)
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(10)
        link.stop()


def _round_trip(grid: GrpcGrid) -> float:
    messages = [flower.instruction(i, "query.keys", BODY, ttl_s=60) for i in range(1, AGENTS + 1)]
    started = time.perf_counter()
    replies = list(grid.send_and_receive(messages, timeout=10))
    seconds = time.perf_counter() - started
    if [flower.body_of(reply) for reply in replies] != [BODY] * AGENTS:
        raise RuntimeError("an echo came back changed")
    return seconds


def link_round_trip() -> list[Result]:
    with _echo_federation() as grid:
        seconds = [_round_trip(grid) for _ in range(WARM_UP + ROUND_TRIPS)][WARM_UP:]
    return [
        Result("link.round-trip 10 KB, 3 agents, median", statistics.median(seconds) * 1e3, "ms", 10),
        Result("link.round-trip 10 KB, 3 agents, p95", sorted(seconds)[int(0.95 * len(seconds))] * 1e3, "ms"),
    ]


def secure_round() -> list[Result]:
    """All of a round: charge, one step on twenty patients, masks, upload, opening, checkpoint."""
    with tempfile.TemporaryDirectory() as name, Processes(Path(name) / "logs") as processes:
        federation = Federation(Path(name), processes, hospitals=AGENTS, epsilon=8.0)
        federation.start()
        digest = federation.submit(
            small_study(federation.names, training__rounds=STUDY_ROUNDS, privacy__noise_multiplier=20.0)
        )
        federation.approve_all(digest)
        federation.watch(digest)
        store = Store.open(federation.hub_home.database)
        rounds = [row.seconds for row in store.rounds(digest)]
        store.close()
        if len(rounds) != STUDY_ROUNDS:
            raise RuntimeError(federation.log("hub"))
    warm = rounds[5:]
    return [
        Result("round.full secure no-op, 3 agents, median", statistics.median(warm) * 1e3, "ms", 100),
        Result("round.full secure no-op, 3 agents, p95", sorted(warm)[int(0.95 * len(warm))] * 1e3, "ms"),
        Result("round.first (worker start included)", rounds[0] * 1e3, "ms"),
    ]


def run() -> list[Result]:
    return [*link_round_trip(), *secure_round(), *large.run()]
