"""An arbitrary hub, crashes, failing writes and one hospital whose state is cloned and rolled back.

Five hospitals, t = 1, rho = 1, m = 4. Hospital 5 colludes: it runs the code, but its openings hide nothing.
Hospital 4 may at any time be restarted from any older state, and its clones run beside it. The oracle looks
only at what left: of a round at most one context is ever opened by all its honest hospitals, an unrolled
hospital opens one context a round, and nobody sends two payloads for one context.
"""

from collections import defaultdict
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import RefusedError, VerificationError
from common.secagg.hub import HubRound
from common.secagg.records import Cohort, OpenPlease, Ready
from common.secagg.site import Site
from common.secagg.state import RunState
from tests.common.secagg.federation import NOW, STATE, memory, signing_key

HONEST, ROLLED, COLLUDING = (1, 2, 3), 4, 5
ALL = (*HONEST, ROLLED, COLLUDING)
MODELS = (b"\x01" * 32, b"\x02" * 32)
make = memory(5)


class Schedules(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.federation = make()
        assert self.federation.params.m == 4
        # Several machines of the rolled-back hospital may live at once; of the others, one.
        self.machines: dict[int, list[Site]] = {i: [self.federation.sites[i]] for i in ALL}
        self.readies: dict[int, list[Ready]] = defaultdict(list)
        self.cohorts: list[Cohort] = []
        self.context_round: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        self.payloads: dict[tuple[int, bytes], set[bytes]] = defaultdict(set)
        self.opened: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        self.number = 0

    def ask(self, i: int, which: int, call: Any) -> Any:
        """What a machine answers, or None. A refusal or a failing write leaves its disk as it was."""
        machines = self.machines[i]
        disk = self.federation.disks[i]
        before = list(disk.versions)
        try:
            return call(machines[which % len(machines)])
        except (RefusedError, VerificationError, OSError):
            assert disk.versions == before
            return None
        finally:
            disk.fail = 0

    @rule(
        number=st.integers(1, 5),
        model=st.sampled_from(MODELS),
        who=st.sets(st.sampled_from(ALL)),
        which=st.integers(0, 3),
    )
    def start(self, number: int, model: bytes, who: set[int], which: int) -> None:
        self.begin_round(number, model, who, which)

    @rule(model=st.sampled_from(MODELS), which=st.integers(0, 3))
    def start_next(self, model: bytes, which: int) -> None:
        self.begin_round(min(self.number + 1, 5), model, set(ALL), which)

    def begin_round(self, number: int, model: bytes, who: set[int], which: int) -> None:
        self.number = max(number, self.number)
        setup = self.federation.setup
        assert setup is not None
        hub = HubRound(
            self.federation.params,
            setup,
            round=number,
            state=STATE,
            model_digest=model,
            deadline=1,
            sign=signing_key("hub").sign,
        )
        for i in sorted(who):
            self.ask(i, which, lambda site: site.on_round_start(hub.start))
            ready = self.ask(
                i, which, lambda site, i=i: site.ready(*self.federation.vectors(i, number), model)
            )
            if ready is not None:
                self.readies[number].append(ready)

    @precondition(lambda self: any(len({r.id for r in found}) >= 4 for found in self.readies.values()))
    @rule(data=st.data(), which=st.integers(0, 3), attempt=st.integers(1, 4))
    def offer_cohort(self, data: st.DataObject, which: int, attempt: int) -> None:
        """Any subset of four or five, any of the values of nu seen, to any of them."""
        number = data.draw(
            st.sampled_from([n for n, f in self.readies.items() if len({r.id for r in f}) >= 4])
        )
        by_id: dict[int, list[bytes]] = defaultdict(list)
        for ready in self.readies[number]:
            by_id[ready.id].append(ready.nu)
        ids = sorted(by_id)
        left_out = data.draw(st.sampled_from([0, *ids])) if len(ids) == 5 else 0
        members = tuple(
            (i, data.draw(st.sampled_from(by_id[i])) if len(by_id[i]) > 1 else by_id[i][0])
            for i in ids
            if i != left_out
        )
        self.offer(Cohort(number, attempt, members), set(ids), which)

    @precondition(lambda self: bool(self.cohorts))
    @rule(data=st.data(), which=st.integers(0, 3), who=st.sets(st.sampled_from(ALL)))
    def offer_again(self, data: st.DataObject, which: int, who: set[int]) -> None:
        self.offer(data.draw(st.sampled_from(self.cohorts)), who, which)

    def offer(self, cohort: Cohort, who: set[int], which: int) -> None:
        self.cohorts.append(cohort)
        for i in sorted(who):
            answer = self.ask(i, which, lambda site: (site.on_cohort(cohort), site.payload()))
            if answer is not None:
                header, payload = answer
                self.context_round[header.ctx] = (cohort.round, cohort.ids)
                self.payloads[i, header.ctx].add(payload)

    @precondition(lambda self: bool(self.context_round))
    @rule(data=st.data(), which=st.integers(0, 3), who=st.sets(st.sampled_from(ALL), min_size=1))
    def ask_to_open(self, data: st.DataObject, which: int, who: set[int]) -> None:
        ctx = data.draw(st.sampled_from(list(self.context_round)))
        self.open_with(ctx, who, which)

    @precondition(lambda self: bool(self.context_round))
    @rule(data=st.data(), which=st.integers(0, 3))
    def ask_all_to_open(self, data: st.DataObject, which: int) -> None:
        self.open_with(data.draw(st.sampled_from(list(self.context_round))), set(ALL), which)

    def open_with(self, ctx: bytes, who: set[int], which: int) -> None:
        for i in sorted(who):
            answer = self.ask(i, which, lambda site: site.on_open_please(OpenPlease(ctx)))
            if answer is not None:
                assert answer.ctx == ctx
                self.opened[i, self.context_round[ctx][0]].add(ctx)

    @rule(i=st.sampled_from(ALL))
    def crash(self, i: int) -> None:
        """Restart from the latest durable state; every machine of the hospital dies."""
        self.machines[i] = [self.federation.restart(i)]

    @rule(i=st.sampled_from(ALL), writes=st.integers(1, 2))
    def disk_fails(self, i: int, writes: int) -> None:
        self.federation.disks[i].fail = writes

    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        """One more machine of hospital 4, from any of its states; the ledger was rolled back with it."""
        version = data.draw(st.integers(3, len(self.federation.disks[ROLLED].versions) - 1))
        self.machines[ROLLED].append(self.federation.restart(ROLLED, version, now=NOW))

    @invariant()
    def one_payload_for_a_context(self) -> None:
        assert all(len(found) == 1 for found in self.payloads.values())

    @invariant()
    def one_opening_a_round_of_an_unrolled_hospital(self) -> None:
        assert all(len(found) <= 1 for (i, _), found in self.opened.items() if i != ROLLED)

    @invariant()
    def one_recoverable_context_a_round(self) -> None:
        """The colluder's mask is known to the hub: what counts is whether all others of the cohort opened."""
        recoverable: dict[int, set[bytes]] = defaultdict(set)
        for ctx, (number, ids) in self.context_round.items():
            if all(ctx in self.opened[i, number] for i in ids if i != COLLUDING):
                recoverable[number].add(ctx)
        assert all(len(found) <= 1 for found in recoverable.values())

    @invariant()
    def no_round_seed_survives_its_round(self) -> None:
        for i in HONEST:
            state = RunState.from_bytes(self.federation.disks[i].versions[-1])
            if state.opened is not None:
                assert state.s == b""
                assert state.index == state.round + 1


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_one_opening_per_round() -> None:
    """A hub that lies about dropouts, in both orders: only one of the two sums can be opened."""
    for order in ((0, 1), (1, 0)):
        federation = make()
        hub = federation.round(1)
        federation.ready(hub)
        whole, part = hub.cohort(), hub.cohort(without=(3,))
        contexts = []
        for cohort in (whole, part):
            for i in cohort.ids:
                contexts.append(federation.sites[i].on_cohort(cohort).ctx)
        asked = [OpenPlease(sorted(set(contexts), key=contexts.index)[at]) for at in order]
        opened: dict[bytes, set[int]] = defaultdict(set)
        for request in asked:
            for i in federation.ids:
                try:
                    opened[federation.sites[i].on_open_please(request).ctx].add(i)
                except RefusedError:
                    continue
        first, second = (OpenPlease(ctx).ctx for ctx in sorted(set(contexts), key=contexts.index))
        assert opened[first] == {3}
        assert opened[second] == {1, 2, 4, 5}


def test_one_payload_per_context() -> None:
    """Two agents on one state differ in nu, and so in ctx; after an upload a clone sends the same bytes."""
    federation = make()
    hub = federation.round(1)
    version = len(federation.disks[4].versions) - 2
    twin = federation.restart(4, version)
    original = federation.new_site(4, RunState.from_bytes(federation.disks[4].versions[version]))
    federation.ready(hub, (1, 2, 3, 5))
    nus = {ready.id: ready.nu for ready in hub._ready.values()}
    contexts = set()
    for agent in (twin, original):
        agent.on_round_start(hub.start)
        ready = agent.ready(*federation.vectors(4), hub.start.model_digest)
        members = tuple(sorted({**nus, 4: ready.nu}.items()))
        contexts.add(agent.on_cohort(Cohort(1, 1, members)).ctx)
        again = federation.new_site(4, federation.disks[4].state)
        assert again.payload() == agent.payload()
    assert len(contexts) == 2
    assert twin.payload() != original.payload()
