"""What stops a hospital in the middle of a round, and what it does afterwards; what its ledger says of it."""

import hashlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.computation import Computation
from client.participation import Participation
from common import messages
from common.ledger.entries import Charge, Outcome, Pause
from common.messages import KINDS, Kind, Reply
from common.secagg.hub import HubRound, HubSetup
from common.secagg.records import Record
from common.secagg.state import RunState
from common.study import Manifest
from tests.client.federation import ALLOW_WITHOUT_DP, WITHOUT_DP, ComputedHere, Federation, Hub

TIMEOUT_S = 20.0
AT_ONCE_S = 3.0

torch.set_num_threads(1)


def unavailable(kind: Kind) -> tuple[bytes, tuple[bytes, ...]]:
    return messages.encode_reply(Reply(kind, available=False)), ()


def wait_until(condition: Callable[[], object], seconds: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def story(federation: Federation, number: int = 1) -> list[tuple[int, str]]:
    """What a ledger says: (round, "charged") for a charge, (round, reason) for an outcome."""
    rounds: dict[str, int] = {}
    told = []
    for entry in federation.entries(number):
        if isinstance(entry, Charge):
            rounds[entry.event_id] = int(entry.event["round"])
            told.append((rounds[entry.event_id], "charged"))
        elif isinstance(entry, Outcome):
            told.append((rounds[entry.event_id], entry.reason))
            assert (entry.state, entry.ctx is None) in {("released", False), ("charged", True)}
    return told


def closed(site: Participation, man: bytes) -> bool:
    stored = site._run_file.load(man)
    return stored is not None and RunState.from_bytes(stored).closed


def pause(federation: Federation, decision: Any = "paused") -> None:
    guard = federation.guard(1)
    try:
        guard.pause(decision, "a tester: for the test")
    finally:
        guard.close()


@pytest.fixture
def federation(template: Path, tmp_path: Path) -> Federation:
    return Federation(template, tmp_path / "federation", epsilon=20.0)


@pytest.fixture
def opened() -> Iterator[list[Participation]]:
    """Every hospital that a test opens; closed at its end."""
    sites: list[Participation] = []
    yield sites
    for site in sites:
        site.interrupt()
        for run in site._runs.values():
            run.retire()


Open = Callable[..., Hub]


@pytest.fixture
def hub(federation: Federation, opened: list[Participation]) -> Hub:
    """Three hospitals that share keys; they compute in this process."""
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    opened.extend(sites.values())
    return Hub(federation, federation.manifest(training__rounds=20), sites).joined()


def restarted(hub: Hub, number: int, how: str, opened: list[Participation], **arguments: Any) -> None:
    """A new agent on the folder; the old one was closed, or was killed and did nothing more."""
    if how == "closed":
        hub.sites[number].close()
    arguments.setdefault("computation", ComputedHere)
    hub.sites[number] = Participation(hub.federation.sites[number], **arguments)
    opened.append(hub.sites[number])


# -- restarts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_restart_after_every_message(federation: Federation, opened: list[Participation], how: str) -> None:
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    opened.extend(sites.values())
    hub = Hub(federation, federation.manifest(training__rounds=20), sites)

    def twice(kind: Kind, *parts: Record, document: bytes = b"") -> tuple[Record, ...]:
        """Ask hospital 1, restart it, ask again: the same bytes."""
        first = hub.raw(1, kind, *parts, document=document)
        restarted(hub, 1, how, opened)
        assert hub.raw(1, kind, *parts, document=document) == first != unavailable(kind)
        return messages.decode_reply(kind.message_type, first[0]).records

    document = federation.document(hub.manifest)
    twice(messages.STUDY, document=document)
    for number in sites:
        federation.decide(number, hub.manifest)
    hub.offer()
    setup = HubSetup(hub.params)
    for number in sites:
        ask = twice if number == 1 else lambda kind, *parts, n=number: hub.ask(n, kind, *parts).records
        setup.on_announce(number, ask(messages.KEYS)[0])  # type: ignore[arg-type]
    directory = setup.directory()
    for number in sites:
        ask = twice if number == 1 else lambda kind, *parts, n=number: hub.ask(n, kind, *parts).records
        setup.on_pair_seeds(number, ask(messages.DIRECTORY, directory))  # type: ignore[arg-type]
    for number in sites:
        ask = twice if number == 1 else lambda kind, *parts, n=number: hub.ask(n, kind, *parts).records
        setup.on_confirm(number, ask(messages.SEEDS, *setup.seeds_for(number))[0])  # type: ignore[arg-type]
    for number in sites:
        ask = twice if number == 1 else lambda kind, *parts, n=number: hub.ask(n, kind, *parts).records
        ask(messages.CONFIRMS, *setup.confirms_for(number))
    hub.setup = setup.outcome()
    assert len(hub.setup.pairs) == 3

    # After Ready: a dropout of this round, which is neither computed nor charged again.
    round_ = hub.start()
    assert hub.ready(round_) == {1: True, 2: True, 3: True}
    restarted(hub, 1, how, opened)
    assert hub.ready(round_, 1) == {1: False}
    assert hub.upload(round_, round_.cohort()) == {1: False, 2: True, 3: True}
    ends = {"closed": "site_stopped", "killed": "upload_not_made"}

    # After Upload, after Open, after Result: the kept bytes, and a round that is whole.
    round_ = hub.start()
    assert all(hub.ready(round_).values())
    cohort = round_.cohort()
    kept = hub.raw(1, messages.UPLOAD, cohort)
    restarted(hub, 1, how, opened)
    assert hub.raw(1, messages.UPLOAD, cohort) == kept != unavailable(messages.UPLOAD)
    assert all(hub.upload(round_, cohort).values())
    please = round_.open_please()
    twice(messages.OPEN, please)
    # Neither the payload of another cohort nor the round again.
    assert hub.raw(1, messages.UPLOAD, replace(cohort, attempt=2)) == unavailable(messages.UPLOAD)
    assert hub.ready(round_, 1) == {1: False}
    for number in cohort.ids:
        round_.on_open(number, hub.ask(number, messages.OPEN, please).records[0])  # type: ignore[arg-type]
    round_.finish()
    twice(messages.RESULT, round_.result(hub.model_digest))

    hub.whole_round()
    assert story(federation) == [
        (1, "charged"),
        (1, ends[how]),
        (2, "charged"),
        (2, "upload_started"),
        (2, "completed"),
        (3, "charged"),
        (3, "upload_started"),
        (3, "completed"),
    ]


# -- in the middle of a computation or of a wait ------------------------------------------------------------


@dataclass
class Busy:
    """Hospital 1 in the middle of Ready, answering in a thread of its own."""

    hub: Hub
    round_: HubRound
    pid: int = 0
    ahead_s: list[float] = field(default_factory=lambda: [0.0])
    answers: list[tuple[bytes, tuple[bytes, ...]]] = field(default_factory=list)

    @property
    def site(self) -> Participation:
        return self.hub.sites[1]

    def begin(self) -> None:
        number = self.round_.start.round
        self.hub.cosign(number)
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        wait_until(lambda: (number, "charged") in story(self.hub.federation))

    def _ask(self) -> None:
        reply = self.hub.raw(1, messages.READY, self.round_.start, attachment=self.hub.state)
        self.answers.append(reply)

    def ended(self) -> None:
        """It is over at once, without an answer to the round."""
        began = time.monotonic()
        self._thread.join(TIMEOUT_S)
        assert time.monotonic() - began < AT_ONCE_S
        assert self.answers == [unavailable(messages.READY)]
        if self.pid:
            assert not Path(f"/proc/{self.pid}").exists()

    def goes_on(self) -> None:
        time.sleep(0.2)
        assert self._thread.is_alive()
        assert not self.answers
        assert not self.pid or Path(f"/proc/{self.pid}").exists()


@pytest.fixture(params=["computing", "waiting"])
def busy(
    federation: Federation, opened: list[Participation], request: pytest.FixtureRequest
) -> Iterator[Busy]:
    """A worker that is stopped so that it never answers, or the wait for the round's fixed time."""
    computing = request.param == "computing"
    ahead_s = [0.0]
    sites = {
        n: Participation(
            federation.sites[n],
            clock=lambda: time.time() + ahead_s[0],
            computation=Computation if computing and n == 1 else ComputedHere,
        )
        for n in (1, 2, 3)
    }
    opened.extend(sites.values())
    manifest = federation.manifest(training__rounds=20, aggregation__ready_s=0 if computing else 30)
    hub = Hub(federation, manifest, sites).joined()
    found = Busy(hub, hub.start(), ahead_s=ahead_s)
    if computing:
        computation = sites[1]._runs[hub.man].computation
        # A round is charged only for a worker that has started; a newer one ends a worker that has proven itself.
        assert computation.started(TIMEOUT_S)
        process = computation._proven = computation._loaded(threading.Event(), threading.Event())
        found.pid = process.pid
        os.kill(found.pid, signal.SIGSTOP)
    found.begin()
    yield found
    sites[1].interrupt()
    found._thread.join(TIMEOUT_S)


def withdraw(busy: Busy) -> None:
    busy.hub.federation.decide(1, busy.hub.manifest, "denied")
    busy.site.watch()


def forbid(busy: Busy) -> None:
    busy.hub.federation.edit_policy(1, rules={"coordinators": []})
    busy.site.watch()


def pause_it(busy: Busy) -> None:
    pause(busy.hub.federation)
    busy.site.watch()


def expire(busy: Busy) -> None:
    busy.ahead_s[0] = time.mktime((2100, 1, 1, 0, 0, 0, 0, 0, 0)) - time.time()
    busy.site.watch()


def close(busy: Busy) -> None:
    assert busy.hub.ask(1, messages.CLOSE).available


def damage(busy: Busy) -> None:
    busy.site._guard._ledger._connection.execute("DROP TRIGGER no_delete")
    busy.site._guard._ledger._connection.execute("DELETE FROM entries")
    busy.site.watch()


@pytest.mark.parametrize(
    ("action", "reason", "erased"),
    [
        (withdraw, "site_stopped", True),
        (close, "study_aborted", True),
        (expire, "site_stopped", True),
        (pause_it, "site_stopped", False),
        (forbid, "site_stopped", False),
    ],
)
def test_a_computation_and_a_wait_end_at_once(
    busy: Busy, action: Callable[[Busy], None], reason: str, erased: bool
) -> None:
    busy.goes_on()
    action(busy)
    busy.ended()
    assert closed(busy.site, busy.hub.man) is erased
    # What was charged stays charged; nothing of it left; nothing of it can leave any more.
    assert story(busy.hub.federation) == [(1, "charged"), (1, reason)]
    assert busy.hub.raw(1, messages.READY, busy.round_.start, attachment=busy.hub.state) == unavailable(
        messages.READY
    )
    busy.site.watch()
    assert story(busy.hub.federation) == [(1, "charged"), (1, reason)]


def test_a_stopping_agent_ends_at_once_and_answers_nothing_but_close(busy: Busy) -> None:
    hub = busy.hub
    busy.site.interrupt()
    busy.ended()
    for kind in (messages.KEYS, messages.READY, messages.STUDY):
        parts = (busy.round_.start,) if kind is messages.READY else ()
        document = hub.federation.document(hub.manifest) if kind is messages.STUDY else b""
        reply = hub.raw(1, kind, *parts, document=document, attachment=hub.state if parts else b"")
        assert reply == unavailable(kind)
    assert hub.ask(1, messages.CLOSE).available
    assert closed(busy.site, hub.man)


def test_a_ledger_that_cannot_be_read_ends_every_computation(
    busy: Busy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "wardround"):
        damage(busy)
        busy.site.watch()
    busy.ended()
    assert sum("every computation is ended" in r.getMessage() for r in caplog.records) == 1


def test_a_newer_round_ends_the_older(busy: Busy) -> None:
    hub, site = busy.hub, busy.site
    older, started = busy.round_, hub.round_number
    wrong = hub.start()
    forged = replace(wrong.start, deadline=wrong.start.deadline + 1)
    for start in (older.start, forged):
        assert hub.raw(1, messages.READY, start, attachment=hub.state) == unavailable(messages.READY)
    busy.goes_on()
    hub.round_number = started
    newer = Busy(hub, hub.start(), ahead_s=busy.ahead_s)
    newer.begin()
    busy.ended()
    if busy.pid:
        # A fresh worker for the newer round, whose answer is the newer round's.
        newer._thread.join(TIMEOUT_S)
        assert messages.decode_reply(messages.READY.message_type, newer.answers[0][0]).available
    else:
        newer.goes_on()
        site.interrupt()
        newer.ended()
    assert story(hub.federation)[:3] == [(1, "charged"), (1, "upload_not_made"), (2, "charged")]


def test_a_cut_round_gives_nothing(federation: Federation, opened: list[Participation]) -> None:
    """Its vector is ready just when a newer round was accepted: it goes into neither of them."""
    computed: list[threading.Event] = []

    class Late(ComputedHere):
        def compute(self, *arguments: Any, **named: Any) -> Any:
            q = super().compute(*arguments, **named)
            go_on = threading.Event()
            computed.append(go_on)
            assert go_on.wait(TIMEOUT_S)
            return q

    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (2, 3)}
    sites[1] = Participation(federation.sites[1], computation=Late)
    opened.extend(sites.values())
    hub = Hub(federation, federation.manifest(training__rounds=20), dict(sorted(sites.items()))).joined()
    rounds = [Busy(hub, hub.start()) for _ in range(2)]
    for count, busy in enumerate(rounds, start=1):
        busy.begin()
        wait_until(lambda n=count: len(computed) == n)
    for busy, go_on in zip(rounds, computed, strict=True):
        go_on.set()
        busy._thread.join(TIMEOUT_S)
    assert rounds[0].answers == [unavailable(messages.READY)]
    newer = rounds[1].round_
    newer.on_ready(1, messages.decode_reply("train.ready", rounds[1].answers[0][0]).records[0])  # type: ignore[arg-type]
    assert all(hub.ready(newer, 2, 3).values())
    cohort = newer.cohort()
    assert all(hub.upload(newer, cohort).values())
    hub.finish(newer, cohort)


# -- a pause -----------------------------------------------------------------------------------------------


def test_a_pause_between_any_two_messages(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    federation, site = hub.federation, hub.sites[1]
    round_ = hub.start()
    hub.ready(round_)
    cohort = round_.cohort()
    pause(federation)
    # At once for requests, with or without the agent's look once a second.
    assert hub.raw(1, messages.UPLOAD, cohort) == unavailable(messages.UPLOAD)
    with caplog.at_level(logging.INFO, "wardround"):
        for _ in range(3):
            site.watch()
    (line,) = [r.getMessage() for r in caplog.records if "paused: every" in r.getMessage()]
    assert "wardround site resume" in line
    for kind in KINDS.values():
        if kind is not messages.CLOSE:
            # Malformed for most kinds: what is asked is not even looked at.
            document = federation.document(hub.manifest) if kind is messages.STUDY else b""
            parts = {messages.READY: (round_.start,), messages.UPLOAD: (cohort,)}.get(kind, ())
            reply = hub.raw(1, kind, *parts, document=document)
            assert reply == unavailable(kind), kind.message_type
    pause(federation, "resumed")
    with caplog.at_level(logging.INFO, "wardround"):
        site.watch()
    assert "this site is resumed" in caplog.text
    # The vectors are gone, as after a restart; the next round works.
    assert hub.raw(1, messages.UPLOAD, cohort) == unavailable(messages.UPLOAD)
    hub.whole_round()
    round_ = hub.start()
    hub.ready(round_)
    cohort = round_.cohort()
    assert all(hub.upload(round_, cohort).values())
    kept = hub.raw(1, messages.UPLOAD, cohort)
    pause(federation)
    site.watch()
    assert hub.raw(1, messages.OPEN, round_.open_please()) == unavailable(messages.OPEN)
    pause(federation, "resumed")
    site.watch()
    # What had left before the pause may still be opened: the same bytes.
    assert hub.raw(1, messages.UPLOAD, cohort) == kept
    hub.finish(round_, cohort)
    done = ["charged", "upload_started", "completed"]
    expected = [(1, "charged"), (1, "site_stopped"), *((n, what) for n in (2, 3) for what in done)]
    assert story(federation) == expected
    assert [e.decision for e in federation.entries(1) if isinstance(e, Pause)] == ["paused", "resumed"] * 2


def test_a_paused_site_that_starts_stays_paused_and_can_be_closed(
    hub: Hub, opened: list[Participation]
) -> None:
    pause(hub.federation)
    restarted(hub, 1, "killed", opened)
    assert hub.raw(1, messages.KEYS) == unavailable(messages.KEYS)
    assert hub.ask(1, messages.CLOSE).available
    assert closed(hub.sites[1], hub.man)


def test_nothing_is_charged_after_a_pause_that_came_between(hub: Hub) -> None:
    """The request was let in before the pause: the ledger itself refuses the charge."""
    guard, decision = hub.sites[1]._guard, hub.sites[1]._guard.decision

    def pause_meanwhile(man: bytes) -> str:
        pause(hub.federation)
        return decision(man)

    guard.decision = pause_meanwhile  # type: ignore[method-assign]
    assert hub.ready(hub.start(), 1) == {1: False}
    assert story(hub.federation) == []


# -- a withdrawal ------------------------------------------------------------------------------------------


def test_a_withdrawn_run_is_erased_without_any_request(hub: Hub, opened: list[Participation]) -> None:
    federation, man = hub.federation, hub.man
    restarted(hub, 1, "killed", opened)
    assert not closed(hub.sites[1], man)
    hub.sites[1].watch()
    assert not closed(hub.sites[1], man)
    federation.decide(1, hub.manifest, "denied")
    hub.sites[1].watch()
    assert closed(hub.sites[1], man)
    assert hub.offer()[1] == "denied"
    # Approving again does not bring back what was erased.
    federation.decide(1, hub.manifest)
    assert hub.offer()[1] == "unavailable"


def test_a_run_withdrawn_while_no_agent_ran_is_erased_at_start(hub: Hub, opened: list[Participation]) -> None:
    hub.sites[1].close()
    hub.federation.decide(1, hub.manifest, "denied")
    restarted(hub, 1, "killed", opened)
    assert closed(hub.sites[1], hub.man)


# -- what the ledger says of a round ----------------------------------------------------------------------


def other_model(hub: Hub) -> None:
    """From here on the hub broadcasts another model, as after a round that was completed."""
    from common.tasks.state import load_state, model_digest, state_bytes

    layout = hub.admitted.layout
    state = load_state(hub.state, layout, 100.0)
    state = {name: tensor + np.float32(0.5) for name, tensor in state.items()}
    hub.state, hub.model_digest = state_bytes(state, layout), model_digest(state, layout)


def up_to(hub: Hub, stage: str) -> None:
    """A round up to a stage at hospital 1."""
    round_ = hub.start()
    if stage == "charged":
        hub.federation.write_extract(1, [("p", 1)])
        assert hub.ready(round_, 1) == {1: False}
        hub.federation.write_extract(1, [("p", 50, 25, "yes"), ("q", 60, 30, "no")])
        return
    hub.ready(round_)
    cohort = round_.cohort()
    if stage == "asked in vain":
        wrong = replace(cohort, members=((1, bytes(32)), *cohort.members[1:]))
        assert hub.raw(1, messages.UPLOAD, wrong) == unavailable(messages.UPLOAD)
    if stage in ("uploaded", "opened", "ended"):
        hub.upload(round_, cohort)
    if stage == "opened":
        assert hub.ask(1, messages.OPEN, round_.open_please()).available
    if stage == "ended":
        hub.finish(round_, cohort)


@pytest.mark.parametrize(
    ("stage", "same_model", "new_model", "closing"),
    [
        ("charged", "upload_not_made", "upload_not_made", "study_aborted"),
        ("ready", "left_out_of_cohort", "left_out_of_cohort", "study_aborted"),
        ("asked in vain", "upload_not_made", "upload_not_made", "study_aborted"),
        ("uploaded", "round_lost", "left_out_of_cohort", "study_aborted"),
        ("opened", "round_lost", "completed", None),
        ("ended", "completed", "completed", "completed"),
    ],
)
def test_the_ledger_says_what_became_of_each_round(
    hub: Hub, stage: str, same_model: str, new_model: str, closing: str | None
) -> None:
    federation = hub.federation
    up_to(hub, stage)
    hub.ready(hub.start(), 1)
    assert [
        said for n, said in story(federation) if n == 1 and said not in ("charged", "upload_started")
    ] == [same_model]
    # The second round of the story is one that was only made ready, or not even that.
    up_to(hub, stage)
    other_model(hub)
    hub.ready(hub.start(), 1)
    assert [said for n, said in story(federation) if n == 3][-1] == new_model
    up_to(hub, stage)
    number = hub.round_number
    assert hub.ask(1, messages.CLOSE).available
    last = [said for n, said in story(federation) if n == number][-1]
    assert last == (closing or "upload_started")
    # One charge a round, and at most one word on how it ended.
    for n in range(1, number + 1):
        said = [what for m, what in story(federation) if m == n]
        assert said.count("charged") == 1
        assert sum(what not in ("charged", "upload_started") for what in said) <= 1


def test_a_result_may_be_overtaken_by_the_closing(hub: Hub) -> None:
    round_ = hub.start()
    hub.ready(round_)
    cohort = round_.cohort()
    hub.upload(round_, cohort)
    please = round_.open_please()
    for number in cohort.ids:
        round_.on_open(number, hub.ask(number, messages.OPEN, please).records[0])  # type: ignore[arg-type]
    round_.finish()
    result = round_.result(hub.model_digest)
    assert hub.ask(1, messages.CLOSE).available
    forged = replace(result, model_digest=bytes(32))
    assert hub.raw(1, messages.RESULT, forged) == unavailable(messages.RESULT)
    assert story(hub.federation)[-1] == (1, "upload_started")
    for _ in range(2):
        assert hub.ask(1, messages.RESULT, result).available
        assert story(hub.federation)[-2:] == [(1, "upload_started"), (1, "completed")]
    assert closed(hub.sites[1], hub.man)


def test_without_dp_a_lost_round_is_computed_again_with_the_same_hospitals(
    template: Path, tmp_path: Path, opened: list[Participation]
) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    opened.extend(sites.values())
    hub = Hub(federation, federation.manifest(privacy=WITHOUT_DP, training__rounds=1), sites).joined()
    up_to(hub, "opened")
    hub.whole_round()
    assert [said for _, said in story(federation)] == [
        "charged", "upload_started", "round_lost", "charged", "upload_started", "completed",
    ]  # fmt: skip


# -- consent -----------------------------------------------------------------------------------------------


def test_a_study_that_cannot_be_paid_is_unavailable_and_said_once(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    federation, site = hub.federation, hub.sites[1]
    assert hub.offer()[1] == "approved"
    federation.edit_policy(1, register={"epsilon_t": 0.01, "epsilon_w": 0.01})
    with caplog.at_level(logging.WARNING, "wardround"):
        assert {hub.offer()[1] for _ in range(3)} == {"unavailable"}
    assert site.exhausted
    assert sum("budget.exhausted" in record.getMessage() for record in caplog.records) == 1
    federation.edit_policy(1, register={"epsilon_t": 20.0, "epsilon_w": 20.0})
    assert hub.offer()[1] == "approved"
    # Another refusal after that is news again.
    caplog.clear()
    federation.edit_policy(1, register={"epsilon_t": 0.01, "epsilon_w": 0.01})
    with caplog.at_level(logging.WARNING, "wardround"):
        hub.offer()
    assert "budget.exhausted" in caplog.text
    federation.decide(1, hub.manifest, "denied")
    assert hub.offer()[1] == "denied"


# -- several threads ----------------------------------------------------------------------------------------


def test_studies_run_side_by_side_and_end_at_any_moment(
    federation: Federation, opened: list[Participation]
) -> None:
    """Three studies in three threads at the same hospitals; one is closed while it is in a round."""
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    opened.extend(sites.values())
    hubs = [
        Hub(federation, federation.manifest(name=f"study {i}", training__rounds=20), sites).joined()
        for i in range(3)
    ]
    problems: list[BaseException] = []

    def rounds(hub: Hub, count: int) -> None:
        try:
            for _ in range(count):
                hub.whole_round()
        except BaseException as error:
            problems.append(error)

    def doomed(hub: Hub) -> None:
        while hub.ready(hub.start(), 1)[1]:
            pass

    threads = [threading.Thread(target=rounds, args=(hub, 4)) for hub in hubs[:2]]
    threads.append(threading.Thread(target=doomed, args=(hubs[2],)))
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    watching = threading.Thread(target=lambda: [site.watch() for site in sites.values() for _ in range(5)])
    watching.start()
    assert hubs[2].ask(1, messages.CLOSE).available
    for thread in (*threads, watching):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert problems == []
    assert closed(sites[1], hubs[2].man)
    events = [entry.event for entry in federation.entries(1) if isinstance(entry, Charge)]
    paid = [(event["manifest_digest"], event["round"]) for event in events]
    assert len(set(paid)) == len(paid)
    for hub in hubs[:2]:
        assert sorted(n for digest, n in paid if digest == hub.man.hex()) == [1, 2, 3, 4]


# -- entropy -----------------------------------------------------------------------------------------------


def stream(seed: str) -> Callable[[int], bytes]:
    """Bytes that are the same for the same seed. For tests only."""
    counter = itertools.count()
    return lambda size: hashlib.shake_256(f"{seed}/{next(counter)}".encode()).digest(size)


def test_the_same_entropy_gives_the_same_bits(
    template: Path, tmp_path: Path, opened: list[Participation]
) -> None:
    """Given to constructors and in no other way: noise of another generator is other noise."""
    manifest: Manifest | None = None
    totals = []
    for run, noise in enumerate(("noise", "noise", "other noise")):
        federation = Federation(template, tmp_path / str(run), epsilon=20.0)
        manifest = manifest or federation.manifest()
        sites = {
            n: Participation(
                federation.sites[n],
                entropy=stream(f"site {n}"),
                computation=partial(ComputedHere, entropy=stream(f"{noise} {n}")),
            )
            for n in (1, 2, 3)
        }
        opened.extend(sites.values())
        hub = Hub(federation, manifest, sites).joined()
        totals.append(np.concatenate([hub.whole_round() for _ in range(2)]))
    assert (totals[0] == totals[1]).all()
    assert (totals[0] != totals[2]).any()


def test_a_dropped_round_leaves_no_vectors(hub: Hub) -> None:
    """A pause forgets the vectors and the seed at once; what was uploaded can still be opened after it."""
    round_ = hub.start()
    assert all(hub.ready(round_).values())
    machine, others = hub.sites[1]._runs[hub.man].site, hub.sites[2]._runs[hub.man].site
    assert machine._vectors is not None
    words = machine._vectors[0]
    assert words.any()
    pause(hub.federation)
    hub.sites[1].watch()
    assert machine._vectors is None
    assert machine._seed == b""
    assert not words.any()
    assert others._vectors is not None


def test_nothing_kept_may_leave_after_a_decision(hub: Hub) -> None:
    """What the agent is told of the replies it keeps, at every moment of a run."""
    site, group = hub.sites[1], hub.man.hex()
    assert site.may_send(group)
    for other in ("", "00" * 32, "not a digest"):
        assert not site.may_send(other)
    pause(hub.federation)
    site.watch()
    assert not site.may_send(group)
    pause(hub.federation, "resumed")
    site.watch()
    assert hub.ask(1, messages.KEYS).available
    assert site.may_send(group)
    assert hub.ask(1, messages.CLOSE).available
    assert not site.may_send(group)
    site.interrupt()
    assert not site.may_send(group)


class Slow(ComputedHere):
    """A worker that is starting until it is told to have started."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ready = threading.Event()

    def started(self, timeout_s: float) -> bool:
        return self.ready.wait(timeout_s) and not self.ended


def test_no_round_is_charged_for_a_worker_that_is_still_starting(
    federation: Federation, opened: list[Participation]
) -> None:
    """Rounds that come and go meanwhile cost nothing; the newest one is computed when the worker is there."""
    made: list[Slow] = []

    def computation(*arguments: Any) -> Slow:
        made.append(Slow(*arguments))
        return made[-1]

    sites = {1: Participation(federation.sites[1], computation=computation)}
    sites |= {n: Participation(federation.sites[n], computation=ComputedHere) for n in (2, 3)}
    opened.extend(sites.values())
    hub = Hub(federation, federation.manifest(training__rounds=20), sites).joined()
    answers: dict[int, Reply] = {}

    def ask(number: int) -> threading.Thread:
        start = hub.start(number).start
        body = messages.encode_request(messages.Request(messages.READY, hub.man, (start,)))

        def run() -> None:
            reply, _ = sites[1].answer(messages.READY.message_type, body, (hub.state,))
            answers[number] = messages.decode_reply(messages.READY.message_type, reply)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [ask(number) for number in (1, 2, 3)]
    time.sleep(0.3)
    assert story(federation) == []
    (starting,) = {id(run.computation): run.computation for run in sites[1]._runs.values()}.values()
    assert isinstance(starting, Slow)
    starting.ready.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert {number: reply.available for number, reply in answers.items()} == {1: False, 2: False, 3: True}
    assert story(federation) == [(3, "charged")]
