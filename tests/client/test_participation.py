"""What a hospital does with each request of the hub: a whole study in this process, and every refusal."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.participation import Participation
from client.state import RunFile
from common import messages
from common.ledger.entries import Approval, Charge, Opened, Outcome, PolicyChange
from common.messages import KINDS, Reply, Request
from common.run import study_document
from common.secagg import records
from common.secagg.codec import dequantise
from common.secagg.hub import HubRound
from common.secagg.state import RunState
from tests.client.federation import Federation, Hub
from tests.federation import extract_rows

CANARY = "Zq7canary"
CANARY_NUMBER = "61.987654321"
UNAVAILABLE = {
    kind: messages.encode_reply(Reply(kind, available=False)) for kind in (*KINDS.values(),)
}  # fmt: skip
TIMEOUT_S = 30.0


def planted_rows() -> list[tuple[object, ...]]:
    """The first hospital's rows, with values that must never be seen outside of it."""
    return [
        *extract_rows(1),
        (f"{CANARY}p1", "NaN", 25, "yes"),
        (f"{CANARY}p2", CANARY, 25, "no"),
        (f"{CANARY}p3", "1e999", "-inf", CANARY),
        (f"{CANARY}p4", CANARY_NUMBER, CANARY_NUMBER, "yes"),
    ]


class Heard(logging.Handler):
    """Every line that the hospitals log, as it would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def heard() -> Iterator[Heard]:
    handler, root = Heard(), logging.getLogger("wardround")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def running(template: Path, tmp_path_factory: pytest.TempPathFactory, heard: Heard) -> Iterator[Hub]:
    """Three hospitals and their workers in a study with differential privacy, ready for rounds."""
    federation = Federation(template, tmp_path_factory.mktemp("running"), epsilon=20.0)
    federation.write_extract(1, planted_rows())
    manifest = federation.manifest(training__rounds=20)
    sites = {number: Participation(federation.sites[number]) for number in (1, 2, 3)}
    hub = Hub(federation, manifest, sites)
    try:
        assert set(hub.offer().values()) == {"received"}
        for number in sites:
            federation.decide(number, manifest)
        # Approved now: each begins to start its worker, side by side.
        assert set(hub.offer().values()) == {"approved"}
        assert len(hub.join().pairs) == 3
        yield hub
    finally:
        for site in sites.values():
            site.close()


def charges(federation: Federation, number: int) -> list[int]:
    return [int(e.event["round"]) for e in federation.entries(number) if isinstance(e, Charge)]


def worker_of(site: Participation, man: bytes) -> int:
    process = site._runs[man].computation._process
    assert process is not None
    return process.pid


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


# -- a study that runs -----------------------------------------------------------------------------------


def test_rounds_with_differential_privacy(running: Hub) -> None:
    before = [running.federation.entries(number) for number in (1, 2, 3)]
    totals = [running.whole_round() for _ in range(2)]
    for number in (1, 2, 3):
        new = running.federation.entries(number)[len(before[number - 1]) :]
        assert [type(entry) for entry in new] == [Charge, Outcome, Outcome] * 2
        outcomes = [entry for entry in new if isinstance(entry, Outcome)]
        assert [entry.reason for entry in outcomes] == ["upload_started", "completed"] * 2
        assert {entry.state for entry in outcomes} == {"released"}
        assert outcomes[0].ctx == outcomes[1].ctx != outcomes[2].ctx
    # The sum is the three hospitals' steps with the noise of each: not zero, and never the same again.
    assert totals[0].shape == (running.admitted.dim,)
    assert (totals[0] != totals[1]).any()
    privacy, training = running.manifest.study.privacy, running.manifest.study.training
    sigma = privacy.noise_multiplier * privacy.clip_norm * 1.05  # type: ignore[union-attr]
    bound = (3 * 24 + 12 * 3**0.5 * sigma) * training.learning_rate / training.patients_public
    for total in totals:
        assert 0 < np.abs(dequantise(total, running.params.step)).max() < bound


def test_payloads_are_masked_and_each_is_sent_once(running: Hub) -> None:
    mark = len(running.frames)
    total = running.whole_round()
    sent = {n: b"".join(p) for n, kind, _, p in running.frames[mark:] if kind == messages.UPLOAD.message_type}
    assert set(sent) == {1, 2, 3}
    words = {n: np.frombuffer(data[: 4 * running.params.parameters], "<u4") for n, data in sent.items()}
    for vector in words.values():
        # One hospital's own vector is below the codec's range; a masked word is anywhere in 2^32.
        assert (np.minimum(vector, -vector.astype(np.int64) % 2**32) > 1e8).any()
        assert (vector.astype(np.int64) != total.astype(np.int64) % 2**32).any()
    carrying = {kind for _, kind, _, payload in running.frames if payload}
    assert carrying == {messages.UPLOAD.message_type}


def test_the_same_cohort_asked_again_gives_the_same_bytes_and_one_ledger_line(running: Hub) -> None:
    round_ = running.start()
    running.ready(round_)
    cohort = round_.cohort()
    first = running.raw(1, messages.UPLOAD, cohort)
    before = running.federation.entries(1)
    assert running.raw(1, messages.UPLOAD, cohort) == first
    assert running.federation.entries(1) == before
    running.upload(round_, cohort)
    please = round_.open_please()
    opened = running.raw(1, messages.OPEN, please)
    assert running.raw(1, messages.OPEN, please) == opened
    running.finish(round_, cohort)


def test_a_second_attempt_is_one_charge_and_two_ledger_lines(running: Hub) -> None:
    before = len(running.federation.entries(1))
    round_ = running.start()
    running.ready(round_)
    running.upload(round_, round_.cohort())
    second = round_.cohort()
    running.upload(round_, second)
    running.finish(round_, second)
    new = running.federation.entries(1)[before:]
    assert [type(entry) for entry in new] == [Charge, Outcome, Outcome, Outcome]
    outcomes = [(entry.attempt, entry.reason) for entry in new if isinstance(entry, Outcome)]
    assert outcomes == [(1, "upload_started"), (2, "upload_started"), (2, "completed")]


def test_a_killed_worker_ends_its_round_only(running: Hub) -> None:
    site, man = running.sites[1], running.man
    running.whole_round()
    pid = worker_of(site, man)
    round_ = running.start()
    # Stopped first, so that it is killed in the middle of this round's computation.
    os.kill(pid, signal.SIGSTOP)
    answers: dict[int, bool] = {}
    thread = threading.Thread(target=lambda: answers.update(running.ready(round_, 1)))
    thread.start()
    wait_until(lambda: charges(running.federation, 1)[-1:] == [round_.start.round])
    os.kill(pid, signal.SIGKILL)
    thread.join(TIMEOUT_S)
    assert answers == {1: False}
    assert running.ready(round_, 2, 3) == {2: True, 3: True}
    # Charged before it was computed, and the charge stays.
    spent = charges(running.federation, 1)
    assert spent.count(round_.start.round) == 1
    # Asking again computes nothing: the round is over here.
    assert running.ready(round_, 1) == {1: False}
    assert charges(running.federation, 1) == spent
    running.whole_round()
    assert worker_of(site, man) != pid


def test_a_restart_between_ready_and_upload_is_a_dropout(running: Hub) -> None:
    round_ = running.start()
    assert running.ready(round_) == {1: True, 2: True, 3: True}
    spent = charges(running.federation, 2)
    running.sites[2].close()
    running.sites[2] = Participation(running.federation.sites[2])
    cohort = round_.cohort()
    assert running.upload(round_, cohort) == {1: True, 2: False, 3: True}
    # The round is never computed twice, and nothing of it left.
    assert running.ready(round_, 2) == {2: False}
    assert charges(running.federation, 2) == spent
    last = running.federation.entries(2)[-1]
    assert isinstance(last, Outcome)
    assert (last.state, last.ctx, last.reason) == ("charged", None, "site_stopped")
    # It takes part again in the next one.
    running.whole_round()
    assert charges(running.federation, 2)[-1] == running.round_number


def test_a_restart_after_the_upload_sends_the_kept_bytes(running: Hub) -> None:
    round_ = running.start()
    running.ready(round_)
    cohort = round_.cohort()
    kept = running.raw(3, messages.UPLOAD, cohort)
    running.sites[3].close()
    running.sites[3] = Participation(running.federation.sites[3])
    assert running.raw(3, messages.UPLOAD, cohort) == kept
    running.upload(round_, cohort)
    running.finish(round_, cohort)


def test_a_run_file_put_back_within_its_round_opens_nothing(running: Hub) -> None:
    """The ledger has the later attempt: of the earlier one nothing is opened any more."""
    round_ = running.start()
    running.ready(round_)
    first = round_.cohort()
    assert running.upload(round_, first)[2]
    site, man = running.sites[2], running.man
    earlier = site._run_file.load(man)
    assert earlier is not None
    second = round_.cohort()
    assert running.upload(round_, second)[2]
    later = site._run_file.load(man)
    assert later is not None
    attempt, ctx = site._guard.last_released(man)
    assert (attempt, ctx) == (2, round_.accumulator.ctx)
    for stored, is_open in ((earlier, False), (later, True)):
        running.sites[2].close()
        running.sites[2] = Participation(running.federation.sites[2])
        running.sites[2]._run_file.save(man, stored)
        context = RunState.from_bytes(stored).header
        assert context is not None
        reply, _ = running.raw(2, messages.OPEN, records.OpenPlease(context.ctx))
        assert (reply != UNAVAILABLE[messages.OPEN]) == is_open
    running.finish(round_, second)


def test_what_the_policy_forbids_meanwhile_does_not_leave(running: Hub) -> None:
    round_ = running.start()
    running.ready(round_)
    cohort = round_.cohort()
    policy = running.federation.sites[2].policy
    before = policy.read_text(encoding="utf-8")
    running.federation.edit_policy(2, rules={"coordinators": []})
    try:
        assert running.upload(round_, cohort) == {1: True, 2: False, 3: True}
    finally:
        policy.write_text(before, encoding="utf-8")
    last = running.federation.entries(2)[-1]
    assert not isinstance(last, Outcome) or last.reason != "upload_started"


def test_a_replayed_or_older_round_charges_nothing(running: Hub) -> None:
    running.whole_round()
    spent = charges(running.federation, 1)
    done = running.round_number
    for number in (done, done - 1):
        round_ = running.start(number)
        assert running.ready(round_, 1) == {1: False}
    running.round_number = done
    assert charges(running.federation, 1) == spent


@pytest.mark.parametrize("what", ["state", "model", "deadline", "signature", "attachment", "directory"])
def test_a_bad_round_start_charges_nothing(running: Hub, what: str) -> None:
    spent = charges(running.federation, 1)
    changes: dict[str, Any] = {
        "state": {"state": bytes(32)},
        "model": {"model_digest": bytes(32)},
        "deadline": {"deadline": int(time.time()) - 1},
    }.get(what, {})
    number = running.round_number
    round_: HubRound = running.start(**changes)
    running.round_number = number
    start, attachment = round_.start, running.state
    if what == "signature":
        start = replace(start, deadline=start.deadline + 1)
    elif what == "directory":
        unsigned = replace(start, dirh=bytes(32))
        start = records.signed(unsigned, running.man, running.federation.hub_key.sign)
    elif what == "attachment":
        attachment = running.state[:-1] + b"\1"
    reply, payload = running.raw(1, messages.READY, start, attachment=attachment)
    assert (reply, payload) == (UNAVAILABLE[messages.READY], ())
    assert charges(running.federation, 1) == spent


def test_a_worker_that_outlives_the_deadline_is_ended(running: Hub) -> None:
    running.whole_round()
    pid = worker_of(running.sites[1], running.man)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    round_ = running.start(deadline=int(time.time()) + 2)
    assert running.ready(round_, 1) == {1: False}
    assert time.monotonic() - began < 10
    assert charges(running.federation, 1)[-1] == round_.start.round


def test_no_planted_value_is_in_a_reply_a_log_line_or_a_ledger(running: Hub, heard: Heard) -> None:
    if not any(payload for *_, payload in running.frames):
        running.whole_round()
    assert any("charged" in line for line in heard.lines)
    sent = b"".join(reply + b"".join(payload) for _, _, reply, payload in running.frames)
    written = "\n".join(heard.lines)
    ledger = "\n".join(repr(entry) for entry in running.federation.entries(1))
    for word in (CANARY, CANARY_NUMBER, "987654321"):
        assert word.encode() not in sent
        assert word not in written
        assert word not in ledger
    # Nor a patient's id, nor how many there are.
    assert b"s1p3" not in sent
    assert "s1p3" not in written


# -- every refusal ---------------------------------------------------------------------------------------


@pytest.fixture
def offered(federation: Federation) -> Iterator[Hub]:
    """Hospital 1 alone, offered a study; no worker is started unless it approves and is offered it again."""
    site = Participation(federation.sites[1])
    hub = Hub(federation, federation.manifest(), {1: site})
    yield hub
    hub.sites[1].close()


def approved(hub: Hub) -> None:
    hub.federation.decide(1, hub.manifest)


def reopened(hub: Hub, **arguments: Any) -> Participation:
    hub.sites[1].close()
    hub.sites[1] = Participation(hub.federation.sites[1], **arguments)
    return hub.sites[1]


def test_a_study_waits_for_a_person(offered: Hub) -> None:
    assert offered.offer() == {1: "received"}
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    assert offered.sites[1].open_runs == 0
    offered.federation.decide(1, offered.manifest, "denied")
    assert offered.offer() == {1: "denied"}
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    approved(offered)
    assert offered.ask(1, messages.KEYS).available
    assert not any(isinstance(entry, Charge) for entry in offered.federation.entries(1))


def test_a_decision_acts_at_once(offered: Hub) -> None:
    approved(offered)
    assert offered.ask(1, messages.KEYS).available
    offered.federation.decide(1, offered.manifest, "denied")
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    assert offered.offer() == {1: "denied"}


def test_an_offered_study_must_verify(offered: Hub) -> None:
    federation, manifest = offered.federation, offered.manifest
    signed = federation.sign(manifest)
    broken = [
        study_document(replace(signed, signature=bytes(64)), federation.roster),
        study_document(signed, replace(federation.roster, signature=bytes(64))),
        study_document(replace(signed, manifest_bytes=signed.manifest_bytes + b" "), federation.roster),
        study_document(federation.sign(federation.manifest()), federation.roster),
        b"garbage",
    ]
    for document in broken:
        reply, _ = offered.raw(1, messages.STUDY, document=document)
        assert reply == UNAVAILABLE[messages.STUDY]
    assert not list(federation.sites[1].study("0").parent.iterdir())


def test_a_study_changed_on_disk_after_approval_is_refused(offered: Hub) -> None:
    federation, manifest = offered.federation, offered.manifest
    approved(offered)
    path = federation.sites[1].study(manifest.digest.hex())
    good = path.read_bytes()
    # Every hundredth byte, and another study that the coordinator signed as well.
    for at in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS], at
    path.write_bytes(federation.document(federation.manifest(training__rounds=9)))
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    path.write_bytes(good)
    assert offered.ask(1, messages.KEYS).available


def test_an_expired_run_is_erased(offered: Hub) -> None:
    federation = offered.federation
    offered.manifest = federation.manifest(expires="2031-05-01T12:00Z")
    hub = Hub(federation, offered.manifest, offered.sites)
    approved(hub)
    moment = datetime(2031, 5, 1, 12, 0, tzinfo=UTC).timestamp()
    now = [moment - 60]
    site = reopened(hub, clock=lambda: now[0])
    assert hub.ask(1, messages.KEYS).available
    stored = site._run_file.load(hub.man)
    assert stored is not None
    assert RunState.from_bytes(stored).setup is not None
    # At the first request after it, the agent running on.
    now[0] = moment
    assert hub.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    assert RunState.from_bytes(site._run_file.load(hub.man) or b"").closed
    # At start, without any request.
    site._run_file.save(hub.man, stored)
    site = reopened(hub, clock=lambda: moment)
    assert RunState.from_bytes(site._run_file.load(hub.man) or b"").closed
    # It stays closed when the clock is set back.
    reopened(hub, clock=lambda: moment - 60)
    assert hub.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]


def test_setup_keys_are_erased_in_time(offered: Hub) -> None:
    federation = offered.federation
    hub = Hub(federation, federation.manifest(aggregation__quorum_s=60), offered.sites)
    approved(hub)
    now = [datetime(2031, 5, 1, 12, 0, tzinfo=UTC).timestamp()]
    site = reopened(hub, clock=lambda: now[0])
    assert hub.ask(1, messages.KEYS).available
    for seconds, kept in ((239, True), (1, False)):
        now[0] += seconds
        site.watch()
        state = RunState.from_bytes(site._run_file.load(hub.man) or b"")
        assert (state.setup is not None) == kept
        assert not state.closed
    # The announcement stays: another one for this manifest there never is.
    assert hub.ask(1, messages.KEYS).records == (state.announce,)


def test_closing_erases_the_run(offered: Hub) -> None:
    approved(offered)
    secrets = []
    for restart in (False, True):
        offered = Hub(offered.federation, offered.federation.manifest(), offered.sites)
        approved(offered)
        assert offered.ask(1, messages.KEYS).available
        stored = offered.sites[1]._run_file.load(offered.man)
        setup = RunState.from_bytes(stored or b"").setup
        assert setup is not None
        secrets.append(setup.mlkem_seed)
        site = reopened(offered) if restart else offered.sites[1]
        closed = site.closed
        assert offered.ask(1, messages.CLOSE).available
        assert (site.closed, site.open_runs) == (closed + 1, 0)
        assert RunState.from_bytes(site._run_file.load(offered.man) or b"").closed
        # Closed is for good; closing again says nothing new.
        assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    on_disk = offered.federation.sites[1].runs.read_bytes()
    assert not any(secret in on_disk for secret in secrets)


def test_closing_a_study_that_never_ran_here_writes_nothing(offered: Hub) -> None:
    assert offered.ask(1, messages.CLOSE).available
    assert (offered.sites[1].closed, offered.sites[1]._run_file.runs()) == (0, ())


def test_a_lost_run_file_closes_the_charged_run(offered: Hub) -> None:
    approved(offered)
    assert offered.ask(1, messages.KEYS).available
    guard = offered.sites[1]._guard
    guard.charge(offered.manifest, offered.admitted, 1)
    offered.sites[1].close()
    offered.federation.sites[1].runs.unlink()
    reopened(offered)
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    assert charges(offered.federation, 1) == [1]


def test_a_rolled_back_run_file_closes_the_run(offered: Hub) -> None:
    approved(offered)
    assert offered.ask(1, messages.KEYS).available
    site = offered.sites[1]
    old = site._run_file.load(offered.man)
    assert old is not None
    site._guard.charge(offered.manifest, offered.admitted, 1)
    # The ledger says round 1 was charged; the run file is from before round 1 was accepted.
    site = reopened(offered)
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]
    state = RunState.from_bytes(site._run_file.load(offered.man) or b"")
    assert (state.closed, state.setup) == (True, None)
    reopened(offered)
    assert offered.raw(1, messages.KEYS)[0] == UNAVAILABLE[messages.KEYS]


def unapproved(hub: Hub) -> None:
    hub.federation.receive(1, hub.manifest)


def denied(hub: Hub) -> None:
    hub.federation.decide(1, hub.manifest, "denied")


def no_such_study(hub: Hub) -> None:
    """Nothing was received."""


def foreign_coordinator(hub: Hub) -> None:
    approved(hub)
    hub.federation.edit_policy(1, rules={"coordinators": []})


def broken_policy(hub: Hub) -> None:
    approved(hub)
    hub.federation.sites[1].policy.write_text("[register", encoding="utf-8")


def no_policy(hub: Hub) -> None:
    approved(hub)
    hub.federation.sites[1].policy.unlink()


def no_source(hub: Hub) -> None:
    approved(hub)
    hub.federation.edit_policy(1, data={"other": {"source": "csv:/x", "patient": "patient"}})
    path = hub.federation.sites[1].policy
    path.write_text(path.read_text().replace("data.extract", "data.renamed"), encoding="utf-8")


def unpinned(hub: Hub) -> None:
    approved(hub)
    hub.federation.sites[1].pins.unlink()


def changed_pin(hub: Hub) -> None:
    approved(hub)
    path = hub.federation.sites[1].pins
    path.write_text(path.read_text().replace("0", "1").replace("a", "b"), encoding="utf-8")


def damaged_pins(hub: Hub) -> None:
    approved(hub)
    hub.federation.sites[1].pins.write_text("[]", encoding="utf-8")


def damaged_run_state(hub: Hub) -> None:
    approved(hub)
    run_file = RunFile(hub.federation.sites[1].runs)
    run_file.save(hub.man, b"garbage")
    run_file.close()


def tampered_ledger(hub: Hub) -> None:
    approved(hub)
    hub.sites[1]._guard._ledger._connection.execute("DROP TRIGGER no_delete")
    hub.sites[1]._guard._ledger._connection.execute("DELETE FROM entries")


def unforeseen(hub: Hub) -> None:
    approved(hub)

    def fail(_man: bytes) -> str:
        raise ValueError(f"a row says {CANARY_NUMBER}")

    hub.sites[1]._guard.decision = fail  # type: ignore[method-assign]


CAUSES = [
    unapproved, denied, no_such_study, foreign_coordinator, broken_policy, no_policy, no_source, unpinned,
    changed_pin, damaged_pins, damaged_run_state, tampered_ledger, unforeseen,
]  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_unavailable(
    offered: Hub, cause: Callable[[Hub], None], caplog: pytest.LogCaptureFixture
) -> None:
    cause(offered)
    with caplog.at_level(logging.INFO, "wardround"):
        reply, payload = offered.raw(1, messages.KEYS)
    assert (reply, payload) == (UNAVAILABLE[messages.KEYS], ())
    # The hospital's own log has one line with the cause; an unforeseen one is named by its type alone.
    (line,) = [record.getMessage() for record in caplog.records]
    assert "query.keys: unavailable: " in line
    assert CANARY_NUMBER not in line
    if cause is unforeseen:
        assert line.endswith("internal ValueError")


def test_malformed_requests_are_unavailable_for_every_kind(offered: Hub) -> None:
    approved(offered)
    wrong = records.OpenPlease(bytes(32))
    for kind in KINDS.values():
        bodies = [b"", b"\xff" * 40]
        if kind.request is not records.OpenPlease:
            bodies.append(messages.encode_request(Request(kind, offered.man, (wrong,), b"")))
        for body in bodies:
            reply, payload = offered.sites[1].answer(kind.message_type, body, ())
            assert (reply, payload) == (UNAVAILABLE[kind], ()), kind.message_type


def test_over_budget_is_refused_before_computing(offered: Hub) -> None:
    approved(offered)
    offered.federation.edit_policy(1, register={"epsilon_t": 0.01, "epsilon_w": 0.01})
    before = offered.federation.entries(1)
    start = records.signed(
        records.RoundStart(
            offered.man,
            bytes(32),
            1,
            records.state_digest(offered.state),
            offered.model_digest,
            int(time.time()) + 60,
        ),
        offered.man,
        offered.federation.hub_key.sign,
    )
    assert not offered.sites[1].exhausted
    reply, _ = offered.raw(1, messages.READY, start, attachment=offered.state)
    assert reply == UNAVAILABLE[messages.READY]
    assert offered.sites[1].exhausted
    assert offered.sites[1]._runs[offered.man].computation._process is None
    assert offered.federation.entries(1) == before
    assert [type(entry) for entry in before] == [Opened, PolicyChange, Approval]


def test_consent_is_asked_of_whoever_approved_whatever_the_study_does(federation: Federation) -> None:
    """No run, worker or budget is touched: it is a person's word, and the hub asks after the end."""
    manifest = federation.manifest()
    participation = Participation(federation.sites[1])
    hub = Hub(federation, manifest, {1: participation})
    try:
        assert hub.ask(1, messages.CONSENT).decision == "received"
        federation.decide(1, manifest)
        assert hub.ask(1, messages.CONSENT).decision == "approved"
        guard = federation.guard(1)
        guard.consent(manifest.digest, "given", "A. Person: fine")
        assert hub.ask(1, messages.CONSENT).decision == "consented"
        hub.end()
        assert hub.ask(1, messages.CONSENT).decision == "consented"
        guard.consent(manifest.digest, "withdrawn", "A. Person: after all not")
        assert hub.ask(1, messages.CONSENT).decision == "approved"
        guard.pause("paused", "A. Person: maintenance")
        assert not hub.ask(1, messages.CONSENT).available
        guard.close()
        assert participation.open_runs == 0
    finally:
        participation.close()
