"""Large models over the link: a 45 MB masked round, the hub's memory, an upload that is cut, a hub that is killed."""

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.desk import CoordinatorDesk
from server.home import CoordinatorHome
from server.processes import Processes, Running
from server.store import Store
from tests.bench.result import Result
from tests.cutting import CuttingProxy
from tests.federation import Federation, small_study

MODEL_45_MB = 11_250_000
MODEL_100_MB = 25_000_000
ROUNDS = 5
TIMEOUT_S = 300.0


def wide_study(names: list[str], parameters: int, **changes: Any) -> dict[str, Any]:
    """A perceptron of about that many parameters; without DP, because nothing is trained here."""
    width = int(parameters**0.5) - 3
    return small_study(
        names,
        model={"kind": "mlp", "hidden": [width, width]},
        privacy={"kind": "without_differential_privacy"},
        aggregation__minimum_hospitals=len(names),
        aggregation__state_norm_bound=1e6,
        aggregation__upload_s=200,
        aggregation__deadline_s=200,
        training__rounds=ROUNDS,
        **changes,
    )


def resident_mb(pid: int, field: str = "VmRSS") -> float:
    """Memory of a process in MB: now (VmRSS) or at its highest (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} for {pid}")


class Stage:
    """A hub process and hospitals that compute nothing, each in a process of its own or all in one."""

    def __init__(self, folder: Path, processes: Processes, hospitals: int, one_process: bool = False) -> None:
        self.federation = Federation(folder, processes, hospitals=hospitals)
        self.one_process = one_process
        self.agents: list[subprocess.Popen[bytes]] = []
        self.hub: Running | None = None

    def start(self, ports: dict[int, int] | None = None) -> None:
        self.hub = self.federation.start_hub()
        time.sleep(1.0)
        self.idle_mb = resident_mb(self.hub.process.pid)
        homes = [self.home(i, (ports or {}).get(i)) for i in range(1, self.federation.hospitals + 1)]
        for group in [homes] if self.one_process else [[home] for home in homes]:
            command = [sys.executable, "-m", "tests.bench.masked_agent", *group]
            self.agents.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

    def home(self, number: int, port: int | None) -> str:
        folder = self.federation.sites[number - 1].folder
        return f"{folder}@{port}" if port else str(folder)

    def run(self, study: dict[str, Any]) -> list[float]:
        """Submit, wait for the end; the moments (monotonic) at which each round was seen to be stored."""
        digest = self.federation.submit(study)
        moments: list[float] = []
        with CoordinatorDesk(CoordinatorHome(Path(self.federation.coordinator))) as desk:
            for event in desk.watch(digest):
                while len(moments) < event.study.round:
                    moments.append(time.monotonic())
        if event.study.status != "done":
            raise RuntimeError(
                f"{event.study.status} {event.study.detail}\n{self.federation.log('hub')[-4000:]}"
            )
        return moments

    def seconds(self) -> list[float]:
        store = Store.open(self.federation.hub_home.database)
        try:
            return [row.seconds for row in store.rounds(store.studies()[-1].digest)]
        finally:
            store.close()

    def end(self) -> None:
        for agent in self.agents:
            agent.terminate()
        for agent in self.agents:
            agent.wait(10)


@contextmanager
def stage(hospitals: int, one_process: bool = False) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as name, Processes(Path(name) / "logs") as processes:
        made = Stage(Path(name), processes, hospitals, one_process)
        try:
            yield made
        finally:
            made.end()


def masked_rounds() -> list[Result]:
    """45 MB down to and up from each hospital, masks, sum, step, checkpoint."""
    results = []
    for hospitals in (3, 30):
        with stage(hospitals, one_process=hospitals > 3) as made:
            made.start()
            moments = made.run(wide_study(made.federation.names, MODEL_45_MB))
            assert made.hub is not None
            grown = resident_mb(made.hub.process.pid, "VmHWM") - made.idle_mb
            between = sorted(b - a for a, b in itertools.pairwise(moments))
            inside = sorted(made.seconds())
        if hospitals == 3:
            results += [
                Result("round.45 MB masked, 3 agents, median of 4", between[len(between) // 2], "s", 1.2),
                Result("round.45 MB masked, 3 agents, without its checkpoint", inside[len(inside) // 2], "s"),
            ]
        results.append(Result(f"hub.memory above idle / model, {hospitals} agents", grown / 45.0, "x", 3.0))
    return results


def cut_upload() -> list[Result]:
    """A 100 MB upload whose connection is cut five times."""
    with stage(3) as made:
        hub_port = int(made.federation.address.rpartition(":")[2])
        cuts = [int(at * 1e6) for at in (9, 27, 48, 70, 95)]
        proxy = CuttingProxy(hub_port, cuts)
        try:
            made.start({1: proxy.port})
            made.run(wide_study(made.federation.names, MODEL_100_MB) | {"training": _one_round(made)})
        finally:
            proxy.close()
        if proxy.cut != len(cuts):
            raise RuntimeError(f"the upload was cut {proxy.cut} times only")
        rounds = made.seconds()
    return [
        Result("upload.100 MB cut five times, sent in all", proxy.sent / 1e6, "MB", 105.0),
        Result("upload.100 MB cut five times, its round", rounds[0], "s"),
    ]


def _one_round(made: Stage) -> dict[str, Any]:
    training: dict[str, Any] = small_study(made.federation.names)["training"]
    return training | {"rounds": 1}


def killed_hub() -> list[Result]:
    """kill -9 of the hub in a round: how long until all agents are back, and what it cost."""
    with stage(3) as made:
        made.start()
        federation = made.federation
        study = small_study(
            federation.names, privacy={"kind": "without_differential_privacy"}, training__rounds=400
        )
        digest = federation.submit(study)
        store = Store.open(federation.hub_home.database)
        wait_for(lambda: len(store.rounds(digest)) >= 50, "no rounds")
        assert made.hub is not None
        made.hub.process.kill()
        made.hub.process.wait(10)
        before = len(store.rounds(digest))
        killed = time.monotonic()
        federation.start_hub()
        listening = time.monotonic()
        with CoordinatorDesk(CoordinatorHome(Path(federation.coordinator))) as desk:
            wait_for(lambda: all(site.online for site in desk.show(digest)[1].sites), "an agent stayed away")
        back = time.monotonic()
        wait_for(lambda: len(store.rounds(digest)) > before, "no round after the restart")
        resumed = time.monotonic()
        wait_for(lambda: store.study(digest).status == "done", "the study did not end")
        lost = sum(bool(row.lost) for row in store.started(digest))
        store.close()
    return [
        Result("hub.restart: process to listening", listening - killed, "s"),
        Result("hub.restart: listening to all agents back", back - listening, "s", 10.0),
        Result("hub.restart: killed to the next completed round", resumed - killed, "s"),
        Result("hub.restart: rounds lost", lost, "rounds", 1),
    ]


def wait_for(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(problem)
        time.sleep(0.02)


def run() -> list[Result]:
    return [*masked_rounds(), *cut_upload(), *killed_hub()]
