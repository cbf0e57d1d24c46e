"""Federations that live long and take many faults one after another, and what must hold after each.

``Rig`` is a federation of real processes with a proxy in front of every site; ``Run`` is one study on it.
A point is (who, where, what, n, action), drawn from a seed; after each the next completed round is waited for,
and then the invariants of PROTOCOL and PRIVACY are read off the hub's tables, the sites' ledgers and run
files, and what the proxies saw leave.
"""

import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w
from safetensors.numpy import load as load_tensors

from client.approval import review
from client.guard import Guard
from client.identity import SiteIdentity
from client.state import SiteHome
from common import messages
from common.errors import UnreachableError
from common.ledger.entries import Charge
from common.ledger.store import Ledger
from common.secagg.state import RunState
from server.desk import CoordinatorDesk
from server.home import CoordinatorHome
from server.processes import Processes, Running
from server.store import ENDED, RoundRow, Store, StudyRow
from server.submission import prepare
from tests.faults.proxy import DOWN, UP, Fault, Proxy, Wire
from tests.federation import Federation, small_study

FIRE_S: Final = 25.0
RECOVER_S: Final = 90.0
REJOIN_S: Final = 90.0
BEGIN_S: Final = 90.0
GONE_S: Final = 3.0
HOLD_S: Final = 4.0
QUIET_S: Final = 6.0
TAIL_LINES: Final = 12

STEADY: Final = (
    (DOWN, "request", "query.head"),
    (UP, "reply", "query.head"),
    (DOWN, "request", "query.cosign"),
    (UP, "reply", "query.cosign"),
    (DOWN, "request", "query.cosigned"),
    (UP, "reply", "query.cosigned"),
    (DOWN, "request", "train.ready"),
    (DOWN, "chunk", "train.ready"),
    (UP, "reply", "train.ready"),
    (DOWN, "request", "train.upload"),
    (UP, "reply", "train.upload"),
    (DOWN, "want", "train.upload"),
    (UP, "chunk", "train.upload"),
    (DOWN, "request", "train.open"),
    (UP, "reply", "train.open"),
    (DOWN, "request", "query.result"),
    (UP, "reply", "query.result"),
    (UP, "heartbeat", ""),
    (DOWN, "heartbeat", ""),
)
BEGINNING: Final = tuple(
    kind.message_type
    for kind in (messages.STUDY, messages.KEYS, messages.DIRECTORY, messages.SEEDS, messages.CONFIRMS)
)
# How often each action comes in eighteen points: what costs a restart is rarer than what costs nothing.
ACTIONS: Final = (
    *(
        "kill hub",
        "kill hub",
        "kill agent",
        "kill agent",
        "kill worker",
        "kill all",
        "stop hub",
        "stop agent",
    ),
    *("cut", "cut", "drop", "drop", "delay", "stall", "duplicate", "duplicate", "reorder", "reorder"),
)
AWAY: Final = ("kill agent", "kill worker", "kill all", "stop agent")
GENTLE: Final = ("cut", "drop", "delay", "duplicate", "reorder")


@dataclass(frozen=True)
class Point:
    """One fault: ``nth`` frame of a kind and message type at a site's stream, and what is done then."""

    seed: int
    number: int
    phase: str
    site: int
    direction: str
    kind: str
    message_type: str
    nth: int
    action: str
    seconds: float
    late: bool

    def __str__(self) -> str:
        frame = f"{self.message_type or 'any'}.{self.kind}"
        late = "-late" if self.late else ""
        place = f"site{self.site}-{self.direction}-{frame}-{self.nth}"
        return f"{self.number:03d}-{self.phase}-{place}-{self.action.replace(' ', '_')}{late}"


@dataclass
class Outcome:
    """What became of a point. ``seconds`` from the fault to the next completed round."""

    point: Point
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    recovered: bool = False
    violations: list[str] = field(default_factory=list)


def draw(seed: int, sites: int, steady: int) -> list[Point]:
    """The points of one study's life: one for each message of the setup, ``steady`` of rounds, one a site at
    the end. The same seed gives the same points."""
    chance = random.Random(seed)
    points: list[Point] = []

    def add(phase: str, site: int, frame: tuple[str, str, str], nth: int, action: str) -> None:
        seconds = round(chance.uniform(0.2, 1.0) if action == "delay" else chance.uniform(1.0, 2.0), 1)
        late = action.startswith(("kill", "stop")) and chance.random() < 0.5
        points.append(Point(seed, len(points) + 1, phase, site, *frame, nth, action, seconds, late))

    harsh = chance.sample(["kill hub", "kill agent", "stop hub"], 2)
    beginning = [*harsh, *chance.sample(GENTLE, len(BEGINNING) - len(harsh))]
    chance.shuffle(beginning)
    for message_type, action in zip(BEGINNING, beginning, strict=True):
        frame = chance.choice([(DOWN, "request", message_type), (UP, "reply", message_type)])
        add("begin", chance.randint(1, sites), frame, 1, action)
    frames: list[tuple[str, str, str]] = []
    actions: list[str] = []
    for _ in range(steady):
        frames = frames or chance.sample(STEADY, len(STEADY))
        actions = actions or chance.sample(ACTIONS, len(ACTIONS))
        frame, action = frames.pop(), actions.pop()
        nth = 1 if frame[1] == "heartbeat" else chance.randint(1, 3)
        add("steady", chance.randint(1, sites), frame, nth, action)
    for site, action in enumerate(chance.sample(["kill agent", "cut", "drop", "duplicate"], sites), start=1):
        frame = chance.choice([(DOWN, "request", "query.close"), (UP, "reply", "query.close")])
        add("end", site, frame, 1, action)
    return points


class Rig(Federation):
    """A federation whose sites reach the hub through proxies. A context manager: nothing is left running."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wire = Wire()
        self.proxies: dict[int, Proxy] = {}
        for number, home in enumerate(self.sites, start=1):
            proxy = self.proxies[number] = Proxy(self.hub_home, self.address, home)
            self.wire.serve(proxy)
            settings = home.settings.read_text(encoding="utf-8")
            home.settings.write_text(settings.replace(self.address, proxy.address), encoding="utf-8")
        self.store = Store.open(self.hub_home.database)
        self.hub: Running | None = None
        self.agents: dict[int, Running] = {}
        self.stopped: set[int] = set()
        self.ended: list[int] = []

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process and the proxies. Twice does nothing more."""
        for pid in self.stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.stopped.clear()
        running = [p for p in (*self.agents.values(), self.hub) if p is not None]
        for process in running:
            if process.process.poll() is None:
                process.process.terminate()
        for process in running:
            process.end()
        self.agents, self.hub = {}, None
        if self.proxies:
            self.wire.stop()
            self.store.close()
            self.proxies = {}

    # -- processes -----------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start the hub and every agent that is not running."""
        if self.hub is None or self.hub.process.poll() is not None:
            self.hub = self.start_hub()
        for number in range(1, self.hospitals + 1):
            if number not in self.agents or self.agents[number].process.poll() is not None:
                self.agents[number] = self.start_site(number, once=False)

    def workers(self, number: int) -> list[int]:
        """Process ids of the workers of a running agent."""
        return children(self.agents[number].process.pid) if number in self.agents else []

    def kill_hub(self) -> None:
        """kill -9 of the hub."""
        if self.hub is not None:
            self.hub.process.kill()

    def kill_agent(self, number: int) -> None:
        """kill -9 of an agent; its workers must die with it."""
        self.ended += self.workers(number)
        self.agents[number].process.kill()

    def kill_all(self) -> None:
        """A power cut: kill -9 of everything."""
        self.kill_hub()
        for number in self.agents:
            self.kill_agent(number)

    def kill_worker(self, number: int) -> None:
        """kill -9 of an agent's workers."""
        for pid in self.workers(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, process: Running | None) -> None:
        """SIGSTOP; go_on() or the end of the rig undoes it."""
        if process is not None and process.process.poll() is None:
            self.stopped.add(process.process.pid)
            os.kill(process.process.pid, signal.SIGSTOP)

    def slow(self, pid: int, seconds: float) -> None:
        """Stop a process for a while; go_on() ends it early."""
        with suppress(ProcessLookupError):
            self.stopped.add(pid)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
        self.stopped.discard(pid)

    def go_on(self) -> None:
        """SIGCONT to whatever was stopped."""
        for pid in list(self.stopped):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.stopped.discard(pid)

    # -- studies, as the commands do it --------------------------------------------------------------------

    def submit(self, study: dict[str, Any]) -> str:
        """``study submit``, in this process."""
        path = self.folder / f"{study['name']}.toml"
        path.write_text(tomli_w.dumps(study), encoding="utf-8")
        home, token = CoordinatorHome(self.hub_home.coordinator), os.urandom(16).hex()
        for left in range(20, -1, -1):
            try:
                with CoordinatorDesk(home) as desk:
                    signed = prepare(home, path, desk, token)
                    return str(desk.submit(signed.manifest_bytes, signed.signature).digest)
            except UnreachableError:
                # The hub was killed in the middle: handing the same in again is one study.
                if not left:
                    raise
                time.sleep(0.5)
        raise AssertionError("unreachable")

    def abort(self, digest: str, reason: str) -> None:
        """``study abort``, in this process."""
        with CoordinatorDesk(CoordinatorHome(self.hub_home.coordinator)) as desk:
            desk.abort(digest, reason)

    def approve(self, number: int, digest: str) -> dict[str, Any]:
        """``site approve``, in this process."""
        self.wait_for_offer(number, digest)
        self.decide(number, digest, "approved")
        return {}

    def decide(self, number: int, digest: str, decision: str) -> None:
        """A person's decision, written as the command writes it."""
        home = self.sites[number - 1]
        guard = Guard(home, SiteIdentity.load(home), lambda: datetime.now(UTC))
        try:
            found = review(home, guard, digest)
            guard.decide(found.manifest, found.roster, decision, f"a tester: {decision}")
        finally:
            guard.close()

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for name in ("hub", *(f"site{i + 1}" for i in range(self.hospitals))):
            with suppress(FileNotFoundError):
                lines = self.log(name).splitlines()[-TAIL_LINES:]
                parts.append("\n".join([f"--- {name}", *lines]))
        return "\n".join(parts)


def children(parent: int) -> list[int]:
    """Process ids whose parent is ``parent``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the process ids that still run."""
    left = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                left.append(pid)
    return left


def within(seconds: float, condition: Callable[[], Any], period_s: float = 0.03) -> bool:
    """Whether a condition holds before the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(period_s)
    return True


class Run:
    """One study on a rig: begun under faults, taken through points, ended.

    ``reference`` are the model digests of an uninterrupted run by step, where the study is deterministic.
    """

    def __init__(self, rig: Rig, study: dict[str, Any], reference: Sequence[bytes] | None = None) -> None:
        self.rig = rig
        self.study = study
        self.reference = reference
        self.digest = ""
        self.away: set[int] = set()
        self.broken = ""
        self.outcomes: dict[Point, Outcome] = {}
        self._faults: dict[Point, Fault] = {}
        self._seen_at: dict[Point, int] = {}

    # -- looking -------------------------------------------------------------------------------------------

    def row(self) -> StudyRow:
        """The study as the hub stores it."""
        return self.rig.store.study(self.digest)

    def completed(self) -> Sequence[RoundRow]:
        """The completed rounds."""
        return self.rig.store.rounds(self.digest)

    def lost(self) -> list[str]:
        """Why each round was lost that has been lost so far."""
        return [row.lost for row in self.rig.store.started(self.digest) if row.lost]

    def ended(self) -> bool:
        """Whether the hub says that the study has ended."""
        return self.row().status in ENDED

    def why(self, problem: str) -> str:
        """A failure's text: what, the study's status, the last lines of all logs."""
        row = self.row() if self.digest else None
        status = f"{row.status} ({row.detail or 'no detail'}), step {row.round}" if row else "not submitted"
        return f"{problem}\nstudy {self.digest[:12]}: {status}\n{self.rig.tails()}"

    # -- running -------------------------------------------------------------------------------------------

    def begin(self, points: Sequence[Point] = ()) -> None:
        """Submit and approve, with the faults of the setup armed before."""
        rig = self.rig
        rig.up()
        for point in points:
            self._faults[point] = self._arm(point)
        # The hub or an agent may be down because of a fault: whoever waits puts it up again.
        helper = _Reviver(self, points)
        with helper, self.flowing():
            self.digest = rig.submit(self.study)
            rig.approve_all(self.digest)
            if not within(BEGIN_S, lambda: self.completed() or self.ended(), 0.1):
                self.broken = "the study never completed a round"
        for point in points:
            self.outcomes[point] = helper.outcome(point)

    def _arm(self, point: Point) -> Fault:
        rig = self.rig
        then: Callable[[], None] = lambda: None  # noqa: E731
        action = point.action
        if action.startswith(("kill", "stop")):
            act = {
                "kill hub": rig.kill_hub,
                "kill agent": lambda: rig.kill_agent(point.site),
                "kill worker": lambda: rig.kill_worker(point.site),
                "kill all": rig.kill_all,
                "stop hub": lambda: rig.stop(rig.hub),
                "stop agent": lambda: rig.stop(rig.agents[point.site]),
            }[action]
            then, action = act, "call"
        fault = Fault(
            point.direction,
            point.kind,
            point.message_type,
            point.nth,
            action,
            point.seconds,
            point.late,
            then,
        )
        return rig.proxies[point.site].arm(fault)

    def undo(self, point: Point, fault: Fault) -> None:
        """Put up again what the fault took down."""
        if point.action.startswith("stop"):
            time.sleep(max(0.0, fault.fired_at + point.seconds - time.monotonic()))
            self.rig.go_on()
        elif point.action in ("kill hub", "kill agent", "kill all"):
            agents = self.rig.agents
            dead = [] if point.action == "kill hub" else list(agents.values())
            dead = [agents[point.site]] if point.action == "kill agent" else dead
            for process in (
                *dead,
                *([self.rig.hub] if point.action != "kill agent" and self.rig.hub else []),
            ):
                process.process.wait(10)
            self.rig.up()
        if point.action in AWAY:
            self.away |= set(self.rig.proxies) if point.action == "kill all" else {point.site}

    def take(self, point: Point) -> Outcome:
        """Do one point of the steady phase: arm, wait for it, put up again, wait for the next round, check."""
        outcome = self.outcomes[point] = Outcome(point)
        if self.away and (point.action in AWAY or point.site in self.away):
            outcome.violations += self.rejoin()
        with self.flowing():
            lost = len(self.lost())
            fault = self._arm(point)
            if point.kind == "heartbeat":
                # A link is idle, and beats, only while the hub waits for other hospitals.
                self._hold(QUIET_S, {*self.rig.proxies} - {point.site})
                fault.fired.wait(QUIET_S)
                self._hold(0.0, self.rig.proxies)
            if not fault.fired.wait(FIRE_S):
                self.rig.proxies[point.site].disarm()
                outcome.violations.append("its frame never came")
                return outcome
            before = len(self.completed())
            self.undo(point, fault)
            outcome.recovered = within(RECOVER_S, lambda: len(self.completed()) > before or self.ended())
            outcome.seconds = time.monotonic() - fault.fired_at
        outcome.lost = self.lost()[lost:]
        if self.row().status in ENDED and self.row().status != "done":
            outcome.recovered = False
        if not outcome.recovered:
            self.broken = f"no round was completed after {point}"
            outcome.violations.append("no further round was completed")
        outcome.violations += self.violations()
        return outcome

    def rejoin(self) -> list[str]:
        """Wait until every site that was down is in a cohort again; who is not."""
        with self.flowing():
            after = len(self.completed())
            missing = set(self.away)

            def back() -> bool:
                for row in self.completed()[after:]:
                    missing.difference_update(json.loads(row.cohort))
                return not missing or self.ended()

            within(REJOIN_S, back, 0.1)
        self.away.clear()
        return [
            f"site {site} was in no cohort for {REJOIN_S:.0f} s after it came back"
            for site in sorted(missing)
        ]

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Rounds go on inside; outside, the proxies hold the start of the next one back (for a bounded time)."""
        self._hold(0.0, self.rig.proxies)
        try:
            yield
        finally:
            self._hold(HOLD_S, self.rig.proxies)

    def _hold(self, seconds: float, sites: Iterable[int]) -> None:
        for site in sites:
            self.rig.proxies[site].hold(seconds)

    def finish(self, points: Sequence[Point] = (), abort: str = "") -> None:
        """Let the study end, or abort it, with the faults of its end armed before; wait for the end."""
        rig = self.rig
        for point in points:
            self._faults[point] = self._arm(point)
        helper = _Reviver(self, points)
        with helper, self.flowing():
            for proxy in rig.proxies.values():
                proxy.pace_s = 0.0
            if abort:
                rig.abort(self.digest, abort)
            if not within(RECOVER_S, self.ended, 0.1):
                self.broken = "the study never ended"
            for point in points:
                self._faults[point].fired.wait(15)
        for point in points:
            self.outcomes[point] = helper.outcome(point)

    # -- invariants ----------------------------------------------------------------------------------------

    def violations(self) -> list[str]:
        """Everything that does not hold now."""
        found: list[str] = []
        rows, started = self.completed(), self.rig.store.started(self.digest)
        if [row.step for row in rows] != list(range(1, len(rows) + 1)):
            found.append("the completed rounds are not numbered without gaps")
        if [row.number for row in rows] != sorted({row.number for row in rows}):
            found.append("a round number was completed twice or out of order")
        if [row.number for row in started] != list(range(1, len(started) + 1)):
            found.append("a round number was left out")
        least = self.study["aggregation"].get("minimum_hospitals", 3)
        for row in rows:
            if len(json.loads(row.cohort)) < least:
                found.append(f"round {row.number} was summed over fewer than {least} hospitals")
        if self.reference is not None:
            wrong = [
                row.step
                for row, digest in zip(rows, self.reference, strict=False)
                if row.model_digest != digest
            ]
            if wrong:
                found.append(f"the model after step {wrong[0]} is not that of an uninterrupted run")
        elif rows:
            model = load_tensors(self.rig.store.state(self.digest))
            if not all(np.isfinite(tensor).all() for tensor in model.values()):
                found.append("the model is not finite")
        for number in self.rig.proxies:
            found += [f"site {number}: {problem}" for problem in self._site_violations(number, rows)]
        if not within(GONE_S, lambda: not alive(self.rig.ended)):
            found.append("workers outlived their agent")
        self.rig.ended.clear()
        return found

    def _site_violations(self, number: int, rows: Sequence[RoundRow]) -> list[str]:
        seen, found = self.rig.proxies[number].seen, []
        found += [f"unreadable: {problem}" for problem in seen.unreadable]
        with Ledger.open(self.rig.sites[number - 1].ledger) as ledger:
            ledger.verify()
            charges = Counter(
                (str(entry.event["manifest_digest"]), entry.event["round"])
                for entry in ledger.entries()
                if isinstance(entry, Charge)
            )
        if twice := [key for key, count in charges.items() if count > 1]:
            found.append(f"round {twice[0][1]} was charged twice")
        spent = set(seen.sent) | {
            (self.digest, row.number) for row in rows if number in json.loads(row.cohort)
        }
        if unpaid := sorted(spent - set(charges)):
            found.append(f"round {unpaid[0][1]} was uploaded and never charged")
        if any(len(payloads) > 1 for payloads in seen.payloads.values()):
            found.append("two payloads were announced for one context")
        if any(len(chunks) > 1 for chunks in seen.chunks.values()):
            found.append("two payloads were sent for one context")
        if any(len(seeds) > 1 for seeds in seen.opened.values()):
            found.append("one context was opened with two seeds")
        opened = Counter(
            (seen.contexts[ctx].man, seen.contexts[ctx].round) for ctx in seen.opened if ctx in seen.contexts
        )
        if several := [key for key, count in opened.items() if count > 1]:
            found.append(f"two contexts of round {several[0][1]} were opened")
        if any(ctx not in seen.payloads for ctx in seen.opened):
            found.append("a context was opened that was never uploaded")
        for row in rows:
            if number in json.loads(row.cohort) and row.context not in seen.opened:
                found.append(f"round {row.number} was completed without its opening")
        return found

    def end_violations(self) -> list[str]:
        """What must not be there once the study has ended and everybody has been told."""
        rig, found = self.rig, self.violations()
        rig.up()
        if not self.ended():
            found.append("the study has not ended")
        open_runs = {n: self.open_run(n) for n in rig.proxies}
        if not within(15.0, lambda: not any(self.open_run(n) for n in rig.proxies), 0.1):
            open_runs = {n: self.open_run(n) for n in rig.proxies}
            found.append(
                f"the run is not erased at sites {[n for n, is_open in open_runs.items() if is_open]}"
            )
        if not within(GONE_S, lambda: not any(rig.workers(n) for n in rig.proxies)):
            found.append(f"workers run on at sites {[n for n in rig.proxies if rig.workers(n)]}")
        for number, proxy in rig.proxies.items():
            raw = rig.sites[number - 1].runs.read_bytes()
            if any(seed in raw for seeds in proxy.seen.opened.values() for seed in seeds):
                found.append(f"site {number}: an opening is still in the run file")
        return found

    def open_run(self, number: int) -> bool:
        """Whether a site's run file still holds this study's secrets."""
        home: SiteHome = self.rig.sites[number - 1]
        connection = sqlite3.connect(f"file:{home.runs}?mode=ro", uri=True, timeout=5.0)
        try:
            rows = connection.execute("SELECT man, state FROM runs").fetchall()
        finally:
            connection.close()
        return any(
            not RunState.from_bytes(bytes(state)).closed
            for man, state in rows
            if bytes(man).hex() == self.digest
        )


class _Reviver:
    """While a study begins or ends under several faults: puts up again what each takes down, in a thread."""

    def __init__(self, run: Run, points: Sequence[Point]) -> None:
        self._run = run
        self._points = list(points)
        self._over = threading.Event()
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._watch, name="revive", daemon=True)
        self._before = 0

    def __enter__(self) -> "_Reviver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _watch(self) -> None:
        waiting = list(self._points)
        while waiting and not self._over.is_set():
            for point in list(waiting):
                fault = self._run._faults[point]
                if fault.fired.is_set():
                    waiting.remove(point)
                    try:
                        self._run.undo(point, fault)
                    except Exception as error:
                        self._problems.append(f"{point}: could not be undone: {error}")
            time.sleep(0.02)

    def outcome(self, point: Point) -> Outcome:
        """What became of a point whose study began or ended meanwhile."""
        fault = self._run._faults[point]
        outcome = Outcome(point, violations=list(self._problems))
        if not fault.fired.is_set():
            outcome.violations.append("its frame never came")
        else:
            outcome.seconds = time.monotonic() - fault.fired_at
        outcome.recovered = not self._run.broken
        if self._run.broken:
            outcome.violations.append(self._run.broken)
        return outcome


class Life:
    """One rig from its first study to its last, and the points it goes through.

    ``plain`` is without differential privacy, with three hospitals of which all are needed: what is summed must
    be what an uninterrupted run sums. Otherwise four hospitals, of which three are enough.
    """

    references: dict[int, list[bytes]] = {}  # noqa: RUF012 - what every uninterrupted run gives, once a process

    def __init__(self, folder: Path, points: Sequence[Point], *, plain: bool, rounds: int) -> None:
        self._processes = Processes(folder / "logs")
        rules = {"allow_studies_without_differential_privacy": True} if plain else {}
        self.rig = Rig(folder, self._processes, hospitals=3 if plain else 4, epsilon=20.0, rules=rules)
        self.points = points
        self._plain, self._rounds = plain, rounds
        self.run: Run | None = None
        self.stuck = ""
        self._finished = False
        self._end_problems: list[str] = []

    def close(self) -> None:
        """Leave nothing running."""
        self.rig.close()
        self._processes.__exit__(None, None, None)

    def _new_run(self, name: str) -> Run:
        names = self.rig.names
        study = faulty_study(names, name, plain=self._plain, rounds=self._rounds)
        return Run(self.rig, study, self.references.get(self._rounds) if self._plain else None)

    def begin(self) -> None:
        """Start the processes, learn the reference if it is not known, begin the study under its faults."""
        self.rig.up()
        if self._plain and self._rounds not in self.references:
            calm = self._new_run("uninterrupted")
            calm.begin()
            calm.finish()
            if calm.row().status != "done":
                raise AssertionError(calm.why("the uninterrupted study did not end well"))
            digests = [row.model_digest for row in calm.completed()]
            if len(set(digests)) != self._rounds:
                raise AssertionError("the models of the uninterrupted study do not all differ")
            self.references[self._rounds] = digests
        for proxy in self.rig.proxies.values():
            proxy.pace_s = 0.05
        self.run = self._new_run("faults")
        self.run.begin([point for point in self.points if point.phase == "begin"])
        self.stuck = self.run.broken

    def take(self, point: Point) -> Outcome:
        """What becomes of one point, in the order of ``points``."""
        if self.run is None:
            self.begin()
        run, problems = self.run, list[str]()
        if run is None or (self.stuck and point.phase != "begin"):
            raise AssertionError(f"not tried, for the federation is beyond repair: {self.stuck}")
        if point.phase == "begin":
            outcome = run.outcomes[point]
            outcome.violations += run.violations()
        elif point.phase == "steady":
            if run.ended() and run.row().status == "done":
                problems = run.end_violations()
                run = self.run = self._new_run("more faults")
                run.begin()
            outcome = run.take(point)
            outcome.violations += problems
            self.stuck = run.broken
        else:
            if not self._finished:
                self._finished = True
                ends = [p for p in self.points if p.phase == "end"]
                problems = run.rejoin() if run.away else []
                run.finish(ends, abort="" if self._plain else "enough faults")
                self._end_problems = problems + run.end_violations()
            outcome = run.outcomes[point]
            outcome.violations += self._end_problems
        return outcome

    def why(self, outcome: Outcome) -> str:
        """A failed point as a text."""
        text = f"seed {outcome.point.seed}, point {outcome.point}: " + "; ".join(outcome.violations)
        return self.run.why(text) if self.run else text


def faulty_study(names: list[str], name: str, *, plain: bool, rounds: int) -> dict[str, Any]:
    """A study that can take many faults: short times, many spare rounds."""
    times = {"deadline_s": 45, "upload_s": 8, "straggler_s": 1, "quorum_s": 120, "rounds_max": rounds + 300}
    changes: dict[str, Any] = {f"aggregation__{key}": value for key, value in times.items()}
    changes |= {"name": name, "training__rounds": rounds}
    if plain:
        # A strategy that remembers: what a resumed hub forgot of it would change the next model.
        changes |= {"privacy": {"kind": "without_differential_privacy"}, "training__learning_rate": 0.5}
        changes |= {"training__server": {"strategy": "fedadam", "learning_rate": 0.02}}
    else:
        # So much noise costs next to nothing, and so small a step keeps the model from walking off with it.
        changes |= {"privacy__noise_multiplier": 200.0, "training__learning_rate": 0.001}
        changes |= {"aggregation__rollbacks": 0}
    return small_study(names, **changes)
