"""A hospital that crashes, fails to write, ends, expires or is rolled back; and what is left in print."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from common.errors import RefusedError, VerificationError, WardroundError
from common.secagg.hub import HubRound
from common.secagg.records import (
    Cohort,
    KeyAnnounce,
    Open,
    OpenPlease,
    PairSeed,
    Record,
    Result,
    Upload,
    payload_digest,
)
from common.secagg.site import Site
from common.secagg.state import RunState
from tests.common.secagg.federation import MODEL, NOW, Counter, Disk, Federation, matches, memory

FOUR = memory(4)


def refuses(federation: Federation, i: int, call: Callable[[], object], match: str) -> None:
    before = list(federation.disks[i].versions)
    with pytest.raises(WardroundError, match=match):
        call()
    assert federation.disks[i].versions == before


def uploaded(federation: Federation, number: int = 1) -> tuple[HubRound, Cohort]:
    hub = federation.round(number)
    federation.ready(hub)
    cohort = hub.cohort()
    federation.upload(hub, cohort)
    return hub, cohort


def test_after_a_restart_the_kept_bytes_are_sent_and_nothing_else() -> None:
    federation = FOUR()
    hub, cohort = uploaded(federation)
    header, payload = federation.sites[1].on_cohort(cohort), federation.sites[1].payload()
    site = federation.restart(1)
    assert site.on_cohort(cohort) == header
    assert site.payload() == payload
    second = dataclasses.replace(cohort, attempt=2, members=cohort.members[:3])
    refuses(federation, 1, lambda: site.on_cohort(second), "dropped out")
    federation.open(hub)
    assert matches(federation, hub.finish())


def test_a_restart_before_the_upload_is_a_dropout() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    site = federation.restart(1)
    refuses(federation, 1, lambda: site.on_cohort(hub.cohort()), "dropped out")
    federation.upload(hub, hub.cohort(without=(1,)))
    federation.open(hub)
    assert matches(federation, hub.finish())
    assert matches(federation, federation.whole_round(2), 2)


@pytest.mark.parametrize("step", ["start", "cohort", "second", "open"])
def test_a_failing_write_changes_nothing_and_can_be_tried_again(step: str) -> None:
    federation = FOUR()
    hub = federation.round(1, start_at=(2, 3, 4))
    site, disk = federation.sites[1], federation.disks[1]

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        if name == step:
            disk.fail = 2
            before = (list(disk.versions), site.round, site.attempt, site.opened)
            for _ in range(2):
                with pytest.raises(OSError, match="disk full"):
                    call()
            assert (list(disk.versions), site.round, site.attempt, site.opened) == before
        return call()

    attempt("start", lambda: site.on_round_start(hub.start))
    federation.ready(hub)
    first, cohort = hub.cohort(), hub.cohort()
    attempt("cohort", lambda: site.on_cohort(first))
    attempt("second", lambda: site.on_cohort(cohort))
    federation.upload(hub, cohort)
    request = hub.open_please()
    attempt("open", lambda: site.on_open_please(request))
    federation.open(hub)
    assert matches(federation, hub.finish())


class CrashedError(Exception):
    """The process died after its write was durable and before anything left."""


@pytest.mark.parametrize("crash", ["accepted", "first upload", "second upload", "opened"])
def test_a_crash_right_after_each_write_loses_no_more_than_the_round(crash: str) -> None:
    federation = FOUR()
    disk = federation.disks[1]
    writes = iter(["accepted", "first upload", "second upload", "opened"])

    def dying(state: RunState) -> None:
        disk(state)
        if next(writes, "") == crash:
            raise CrashedError

    federation.sites[1]._persist = dying
    contexts: set[bytes] = set()

    def ask(call: Callable[[Site], Any]) -> Any:
        """What hospital 1 answers; after a crash the hub asks the restarted one again. None: refused."""
        try:
            return call(federation.sites[1])
        except CrashedError:
            federation.restart(1)
            return ask(call)
        except RefusedError:
            return None

    hub = federation.round(1, start_at=(2, 3, 4))
    ask(lambda site: site.on_round_start(hub.start))
    federation.ready(hub, (2, 3, 4))
    ready = ask(lambda site: site.ready(*federation.vectors(1), MODEL))
    assert (ready is None) == (crash == "accepted")
    if ready is not None:
        hub.on_ready(1, ready)
    for _ in range(2):
        cohort = hub.cohort()
        header = ask(lambda site: site.on_cohort(cohort)) if 1 in cohort.ids else None  # noqa: B023
        if header is not None:
            contexts.add(header.ctx)
            federation.send_payload(hub, 1, header)
        federation.upload(hub, cohort, (2, 3, 4))
    if hub.missing_uploads():
        # Only the bytes of the first upload were kept, so the restarted hospital drops out of the round.
        assert crash == "first upload"
        federation.upload(hub, hub.cohort(without=(1,)))
    request = hub.open_please()
    opened = ask(lambda site: site.on_open_please(request))
    assert (opened is None) == (crash in ("accepted", "first upload"))
    for i in hub.accumulator.ids:
        hub.on_open(i, opened if i == 1 else federation.sites[i].on_open_please(request))
    assert matches(federation, hub.finish())
    assert hub.finish().cohort == ((1, 2, 3, 4) if opened else (2, 3, 4))
    for ctx in contexts - {request.ctx}:
        assert ask(lambda site, ctx=ctx: site.on_open_please(OpenPlease(ctx))) is None or opened is None  # type: ignore[misc]
    assert matches(federation, federation.whole_round(2), 2)


@dataclasses.dataclass
class Killing:
    """A disk under which the process dies at one write: before it is durable, or right after."""

    disk: Disk
    at: int
    after: bool
    count: int = 0

    def __call__(self, state: RunState) -> None:
        self.count += 1
        if self.count != self.at or self.after:
            self.disk(state)
        if self.count == self.at:
            raise CrashedError


class Life:
    """A run of four hospitals through setup and three rounds, the second with two attempts.

    Hospital 1 may be killed at a write; it is started again and asked again. ``rounds`` are those in which it
    was summed, ``left`` the records that left it.
    """

    def __init__(self, at: int = 0, after: bool = False) -> None:
        self.federation = Federation(4, rounds_max=3)
        self.disk = Killing(self.federation.disks[1], at, after)
        self.federation.sites[1]._persist = self.disk
        self.rounds: list[int] = []
        self.left: list[Record] = []
        self.charged = 0

    def ask(self, i: int, call: Callable[[Site], Any]) -> Any:
        """What a hospital answers, however often it dies; None: it refuses."""
        for _ in range(2):
            try:
                answer = call(self.federation.sites[i])
            except CrashedError:
                if self.federation.disks[1].versions:
                    self.federation.restart(1, charged_round=self.charged)
                else:
                    self.federation.sites[1] = self.federation.new_site(1)
                continue
            except RefusedError:
                return None
            if i == 1:
                self.left += [answer] if isinstance(answer, Record) else answer or ()
            return answer
        raise AssertionError("it died twice")

    def set_up(self) -> None:
        federation, hub = self.federation, self.federation.hub
        for i in federation.ids:
            hub.on_announce(i, self.ask(i, lambda site: site.announce()))
        for i in federation.ids:
            hub.on_pair_seeds(i, self.ask(i, lambda site: site.on_directory(hub.directory())))
        for i in federation.ids:
            hub.on_confirm(i, self.ask(i, lambda site, i=i: site.on_pair_seeds(hub.seeds_for(i))))
        for i in federation.ids:
            self.ask(i, lambda site, i=i: tuple(site.on_confirms(hub.confirms_for(i))) and ())
        federation.setup = hub.outcome()
        assert len(federation.setup.pairs) == 6

    def round(self, number: int) -> None:
        federation = self.federation
        hub = federation.round(number, start_at=())
        for i in federation.ids:
            self.ask(i, lambda site: site.on_round_start(hub.start))
            if i == 1 and federation.sites[1].round == number:
                self.charged = number
            ready = self.ask(i, lambda site, i=i: site.ready(*federation.vectors(i, number), MODEL))
            if ready is not None:
                hub.on_ready(i, ready)
        for _ in range(2 if number == 2 else 1):
            cohort = hub.cohort()
            self.upload(hub, cohort)
        if hub.missing_uploads():
            self.upload(hub, hub.cohort(without=hub.missing_uploads()))
        request = hub.open_please()
        for i in hub.accumulator.ids:
            hub.on_open(i, self.ask(i, lambda site: site.on_open_please(request)))
        sums = hub.finish()
        assert matches(federation, sums, number)
        if 1 in sums.cohort:
            self.rounds.append(number)
            state = federation.disks[1].state
            assert state.closed or (state.s, state.index) == (b"", number + 1)
        for i in sums.cohort:
            self.ask(i, lambda site: site.on_result(hub.result(MODEL)))

    def upload(self, hub: HubRound, cohort: Cohort) -> None:
        for i in cohort.ids:
            header = self.ask(i, lambda site: site.on_cohort(cohort))
            if header is not None:
                self.federation.send_payload(hub, i, header)


def lived(at: int = 0, after: bool = False) -> Life:
    life = Life(at, after)
    life.set_up()
    for number in (1, 2, 3):
        life.round(number)
    return life


WRITES = (
    *("announced", "directory", "confirmed", "accepted"),
    *("round 1", "upload 1", "opened 1"),
    *("round 2", "first upload 2", "second upload 2", "opened 2"),
    *("round 3", "upload 3", "opened 3", "closed"),
)


def test_the_writes_of_a_run_are_these() -> None:
    life = lived()
    assert life.disk.count == len(life.federation.disks[1].versions) == len(WRITES)
    assert life.rounds == [1, 2, 3]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", WRITES)
def test_a_crash_between_any_two_writes_costs_one_round_at_the_most(write: str, after: bool) -> None:
    life = lived(WRITES.index(write) + 1, after)
    # The vectors of a round are gone with the process: from its acceptance to the one durable upload.
    lost = {
        ("round 1", True): 1,
        ("upload 1", False): 1,
        ("round 2", True): 2,
        ("first upload 2", False): 2,
        ("first upload 2", True): 2,
        ("second upload 2", False): 2,
        ("round 3", True): 3,
        ("upload 3", False): 3,
    }.get((write, after))
    assert life.rounds == [number for number in (1, 2, 3) if number != lost]
    # What left it: one announcement, one seed a pair, one payload a context, one opening a round.
    announced = {record for record in life.left if isinstance(record, KeyAnnounce)}
    seeds = {record for record in life.left if isinstance(record, PairSeed)}
    uploads = {record for record in life.left if isinstance(record, Upload)}
    opened = [record.ctx for record in life.left if isinstance(record, Open)]
    assert len(announced) == 1
    assert {(seed.i, seed.j) for seed in seeds} == {(1, 2), (1, 4)}
    assert len(seeds) == 2
    assert len({header.ctx for header in uploads}) == len(uploads)
    assert len(opened) == len(set(opened)) == len(life.rounds)
    for version in life.federation.disks[1].versions:
        assert RunState.from_bytes(version).to_bytes() == version


def test_the_last_round_closes_the_run() -> None:
    federation = memory(4, rounds_max=2)()
    federation.whole_round(1)
    assert not federation.sites[1].closed
    federation.whole_round(2)
    assert all(site.closed for site in federation.sites.values())


def test_a_closed_run_holds_no_secret() -> None:
    for when in range(3):
        federation = FOUR()
        hub = federation.round(1)
        federation.ready(hub)
        cohort = hub.cohort()
        site, disk = federation.sites[1], federation.disks[1]
        if when:
            site.on_cohort(cohort)
        state = disk.state
        secrets = [key for _, key in state.keys] + ([state.s, state.payload] if when else [])
        assert len(secrets) >= 3
        disk.fail = 1 if when == 2 else 0
        if when == 2:
            with pytest.raises(OSError, match="disk full"):
                site.close()
            assert site.closed
        site.close()
        assert not any(secret in disk.versions[-1] for secret in secrets)
        assert disk.state.round == 1
        for machine in (site, federation.restart(1)):
            assert machine.closed
            assert machine._seed == b""
            assert machine._vectors is None
            for call in every_call(machine, federation, hub, cohort):
                with pytest.raises(RefusedError):
                    call()


def every_call(
    site: Site, federation: Federation, hub: HubRound, cohort: Cohort
) -> list[Callable[[], object]]:
    """Everything that a hub or an agent can ask of a machine, but for closing it."""
    return [
        site.announce,
        site.payload,
        site.end_setup,
        lambda: site.on_directory(federation.hub.directory()),
        lambda: site.on_pair_seeds(()),
        lambda: site.on_confirms(()),
        lambda: site.on_round_start(hub.start),
        lambda: site.ready(*federation.vectors(1), MODEL),
        lambda: site.on_cohort(cohort),
        lambda: site.on_open_please(OpenPlease(hub.accumulator.ctx)),
        lambda: site.on_result(Result(bytes(32), bytes(32), bytes(32))),
    ]


def test_an_expired_run_is_closed() -> None:
    federation = FOUR()
    site = federation.sites[1]
    assert not site.expire("2030-12-31T23:59Z")
    assert site.expire("2031-01-01T00:00Z")
    assert federation.disks[1].state.closed
    assert not federation.restart(2, now="2030-12-31T23:59Z").closed
    assert federation.restart(2, now="2040-01-01T00:00Z").closed
    assert federation.restart(2, now=NOW).closed
    for wrong in ("", "2030-12-31", "tomorrow", "2030-12-31T23:59"):
        with pytest.raises(RefusedError, match="YYYY"):
            federation.sites[3].expire(wrong)


def test_a_rolled_back_run_file_is_closed() -> None:
    federation = FOUR()
    federation.whole_round(1)
    federation.whole_round(2)
    versions = list(federation.disks[1].versions)
    rounds = [RunState.from_bytes(version).round for version in versions]
    assert rounds == [0] * 4 + [1] * 3 + [2] * 3
    for version, number in enumerate(rounds):
        federation.disks[1].versions[:] = versions
        site = federation.restart(1, version, charged_round=2)
        assert site.closed == (number < 2)
        # Closed for good: the next start finds it closed as well.
        if site.closed:
            assert federation.restart(1, charged_round=0).closed


def test_a_run_file_behind_a_recorded_upload_is_closed() -> None:
    """Also within one round: of two attempts that left, only the latest can be opened, whatever was put back."""
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    first = federation.sites[1].on_cohort(hub.cohort())
    second = federation.sites[1].on_cohort(hub.cohort(without=(4,)))
    versions = list(federation.disks[1].versions)
    attempts = [RunState.from_bytes(version).attempt for version in versions]
    assert attempts[-3:] == [0, 1, 2]
    ledgers = {(0, b""): 0, (1, first.ctx): 1, (2, second.ctx): 2, (1, second.ctx): 2, (2, first.ctx): 3}
    for released, least in ledgers.items():
        for attempt in (0, 1, 2):
            federation.disks[1].versions[:] = versions
            site = federation.restart(1, attempt - 3, charged_round=1, released=released)
            # A state ahead of the ledger is one that was killed before it was recorded.
            assert site.closed == (attempt < least), (released, attempt)
            if not site.closed and attempt:
                header = (first, second)[attempt - 1]
                assert site.on_open_please(OpenPlease(header.ctx)).ctx == header.ctx
    # What is recorded of another round says nothing of this one.
    federation.disks[1].versions[:] = versions
    assert not federation.restart(1, -2, charged_round=0, released=(2, second.ctx)).closed


def test_a_state_of_another_run_or_hospital_is_refused() -> None:
    federation = FOUR()
    state = federation.disks[1].state
    with pytest.raises(RefusedError, match="another run"):
        federation.new_site(2, state)
    with pytest.raises(RefusedError, match="another run"):
        federation.new_site(1, dataclasses.replace(state, man=bytes(32)))
    with pytest.raises(RefusedError, match="another run"):
        federation.new_site(1, dataclasses.replace(state, man=b"\xff" * 32))
    with pytest.raises(RefusedError, match="another run"):
        federation.new_site(1, federation.disks[2].state)


def test_a_kept_upload_that_does_not_fit_its_header_is_refused() -> None:
    federation = FOUR()
    uploaded(federation)
    state = federation.disks[1].state
    header = state.header
    assert header is not None
    for digest in (bytes(32), b"\xff" * 32):
        others = (digest,) * len(header.chunk_digests)
        for wrong in (
            dataclasses.replace(header, payload_digest=digest),
            dataclasses.replace(header, chunk_digests=others),
            dataclasses.replace(header, chunk_digests=others, payload_digest=payload_digest(others)),
        ):
            with pytest.raises(VerificationError, match="payload is damaged"):
                federation.new_site(1, dataclasses.replace(state, header=wrong))
    federation.new_site(1, state)


def test_the_policy_of_t_0_is_asked_again_at_a_restart() -> None:
    params = dataclasses.replace(FOUR().site_params(1), t=0)
    state = RunState(params.man, 1)
    arguments: dict[str, Any] = {
        "now": NOW,
        "charged_round": 0,
        "released": (0, b""),
        "persist": Disk(),
        "entropy": Counter("t"),
        "sign": bytes,
    }
    with pytest.raises(RefusedError, match="t must be at least 1"):
        Site.restore(params, state, **arguments)
    assert not Site.restore(params, state, **arguments, outsiders_only=True).closed


@pytest.mark.parametrize("ended", ["dropped out", "opened"])
def test_a_round_that_is_over_here_is_not_computed_again(ended: str) -> None:
    federation = FOUR()
    hub, _ = uploaded(federation)
    site = federation.sites[1]
    held = site._vectors
    assert held is not None
    if ended == "opened":
        federation.open(hub)
    else:
        site.drop_out()
    assert not any(words.any() for words in held)
    refuses(federation, 1, lambda: site.ready(*federation.vectors(1), MODEL), "no open round")


def test_nothing_secret_is_printed_or_pickled() -> None:
    federation = FOUR()
    uploaded(federation)
    site = federation.sites[1]
    assert repr(site) == "Site(RunState(me=1, round=1, attempt=1, closed=False))"
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(site)


def test_a_signature_that_fails_leaves_no_ready_behind() -> None:
    federation = FOUR()
    federation.round(1)
    site = federation.sites[1]
    right = site._sign
    site._sign = lambda data: bytes(64)
    refuses(federation, 1, lambda: site.ready(*federation.vectors(1), MODEL), "not signed")
    assert site._vectors is None
    site._sign = right
    site.ready(*federation.vectors(1), MODEL)


def test_broken_randomness_stops_the_round() -> None:
    federation = FOUR()
    federation.round(1)
    site = federation.sites[1]
    site._entropy = lambda size: bytes(size)
    with pytest.raises(VerificationError, match="randomness"):
        site.ready(*federation.vectors(1), MODEL)


def test_a_damaged_vector_is_noticed_before_masking() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    held = federation.sites[1]._vectors
    assert held is not None
    held[0][0] ^= 1
    cohort = hub.cohort()
    refuses(federation, 1, lambda: federation.sites[1].on_cohort(cohort), "another vector")
