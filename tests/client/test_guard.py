"""The last word before any computation: every rule refused, and the charge under one lock."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.guard import Guard
from common.admissible import check
from common.errors import (
    BudgetExhaustedError,
    RefusedError,
    UsageError,
    VerificationError,
    WardroundError,
)
from common.identity import key_text, new_signing_key, public_key
from common.ledger.entries import Approval, Charge, Closed, Opened, Outcome, Pause, PolicyChange
from common.privacy.filter import odometer
from common.roster import Member, Roster, SignedRoster
from common.study import WITHOUT_MASKS, Manifest
from tests.client.federation import ALLOW_WITHOUT_DP, WITHOUT_DP, Federation

CTX = bytes(range(32))


@pytest.fixture
def guard(federation: Federation) -> Iterator[Guard]:
    opened = federation.guard(1)
    yield opened
    opened.close()


def refused(action: Callable[[], object], error: type[WardroundError], code: str) -> None:
    with pytest.raises(error) as caught:
        action()
    assert caught.value.code == code


# -- the register --------------------------------------------------------------------------------------------


def test_the_register_is_opened_once(federation: Federation) -> None:
    for _ in range(2):
        guard = federation.guard(1)
        assert (guard.budget().epsilon_t, guard.budget().charges) == (0.0, 0)
        guard.close()
    opened, policy = federation.entries(1)
    assert isinstance(opened, Opened)
    assert isinstance(policy, PolicyChange)
    assert (opened.register_id, opened.epsilon_t, opened.epsilon_w) == (guard.register_id, "3", "3")


def test_many_first_guards_at_once_open_one_register(federation: Federation) -> None:
    barrier, problems = threading.Barrier(6), list[BaseException]()

    def first() -> None:
        barrier.wait()
        try:
            federation.guard(1).close()
        except WardroundError as error:
            problems.append(error)

    threads = [threading.Thread(target=first) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert [type(entry) for entry in federation.entries(1)] == [Opened, PolicyChange]


def test_policy_changes_are_recorded(federation: Federation) -> None:
    """At every start and before every charge; what was before stands beside what is now."""
    guard = federation.guard(1)
    manifest = federation.manifest(training__rounds=20)
    admitted = check(manifest, None)
    guard.charge(manifest, admitted, 1)
    federation.edit_policy(1, register={"epsilon_t": 2.5}, rules={"minimum_hospitals": 4})
    guard.charge(manifest, admitted, 2)
    guard.charge(manifest, admitted, 3)
    guard.close()
    federation.edit_policy(1, rules={"coordinators": []})
    federation.guard(1).close()
    federation.guard(1).close()
    kinds = [type(entry) for entry in federation.entries(1)]
    assert kinds == [Opened, PolicyChange, Charge, PolicyChange, Charge, Charge, PolicyChange]
    changes = [entry for entry in federation.entries(1) if isinstance(entry, PolicyChange)]
    assert [change.before for change in changes] == [None, changes[0].after, changes[1].after]
    assert [change.after.epsilon_t for change in changes] == ["3", "2.5", "2.5"]
    assert [change.after.minimum_hospitals for change in changes] == [3, 4, 4]
    assert [change.after.coordinators for change in changes] == [*[(federation.coordinator,)] * 2, ()]


@pytest.mark.parametrize("what", ["denial", "policy"])
def test_what_is_decided_just_before_the_charge_counts(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between the checks of a round and the ledger's lock: an auditor would find the charge unapproved."""
    manifest = federation.manifest()
    federation.decide(1, manifest)
    guard = federation.guard(1)
    append_if = guard._ledger.append_if

    def decided_first(decide: Any) -> int:
        if "PolicyChange" not in str(decide.__annotations__["return"]):
            if what == "denial":
                federation.decide(1, manifest, "denied")
            else:
                federation.edit_policy(1, register={"epsilon_t": 2.0})
                federation.guard(1).close()
        return append_if(decide)

    monkeypatch.setattr(guard._ledger, "append_if", decided_first)
    refused(lambda: guard.charge(manifest, check(manifest, None), 1), RefusedError, "guard.decided")
    guard.close()
    assert not any(isinstance(entry, Charge) for entry in federation.entries(1))


def test_another_register_id_is_refused(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    federation.edit_policy(1, register={"id": "0" * 32})
    # The guard that is open, for every kind of study, and one that is opened now.
    refused(lambda: guard.charge(manifest, admitted, 1), RefusedError, "guard.register")
    refused(lambda: guard.check_budget(manifest, admitted, 1), RefusedError, "guard.register")
    plain = federation.manifest(privacy=WITHOUT_DP)
    refused(lambda: guard.charge(plain, check(plain, None), 1), RefusedError, "guard.register")
    refused(lambda: guard.check_budget(plain, check(plain, None), 1), RefusedError, "guard.register")
    refused(lambda: federation.guard(1), RefusedError, "guard.register")
    assert [type(entry) for entry in federation.entries(1)] == [Opened, PolicyChange]


@pytest.mark.parametrize(
    "register", [{"epsilon_t": 3.1}, {"epsilon_w": 3.000001}, {"delta": 1e-5}, {"delta": 1e-7}]
)
def test_a_raised_cap_is_refused(federation: Federation, guard: Guard, register: dict[str, float]) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    guard.check_budget(manifest, admitted, 1)
    federation.edit_policy(1, register=register)
    refused(lambda: guard.charge(manifest, admitted, 1), RefusedError, "guard.cap-raised")
    refused(guard.budget, RefusedError, "guard.cap-raised")
    assert [type(entry) for entry in federation.entries(1)] == [Opened, PolicyChange, PolicyChange]


def test_a_lowered_cap_acts_at_once_and_may_go_back_up_to_the_first(
    federation: Federation, guard: Guard
) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    guard.charge(manifest, admitted, 1)
    federation.edit_policy(1, register={"epsilon_t": 0.5, "epsilon_w": 0.5})
    refused(lambda: guard.charge(manifest, admitted, 2), BudgetExhaustedError, "budget.exhausted")
    federation.edit_policy(1, register={"epsilon_t": 3.0, "epsilon_w": 3.0})
    guard.charge(manifest, admitted, 2)


def test_a_lost_ledger_closes_the_site(federation: Federation) -> None:
    federation.guard(1).close()
    federation.sites[1].ledger.unlink()
    refused(lambda: federation.guard(1), RefusedError, "ledger.missing")


# -- the budget ----------------------------------------------------------------------------------------------


def test_over_budget_is_refused_and_nothing_is_appended(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest(training__rounds=500)
    admitted = check(manifest, None)
    rounds = guard.rounds_left(manifest, admitted)
    assert 2 <= rounds < 100
    guard.check_budget(manifest, admitted, 1, rounds)
    with pytest.raises(BudgetExhaustedError) as caught:
        guard.check_budget(manifest, admitted, 1, rounds + 1)
    assert caught.value.fields == {"rounds_left": rounds}
    for number in range(1, rounds + 1):
        guard.charge(manifest, admitted, number)
        assert guard.rounds_left(manifest, admitted) == rounds - number
    before = federation.entries(1)
    refused(lambda: guard.charge(manifest, admitted, rounds + 1), BudgetExhaustedError, "budget.exhausted")
    refused(
        lambda: guard.check_budget(manifest, admitted, rounds + 1), BudgetExhaustedError, "budget.exhausted"
    )
    assert federation.entries(1) == before
    spent = guard.budget()
    assert spent.charges == rounds
    assert 0 < spent.epsilon_t <= spent.cap.epsilon_t


def test_nothing_is_charged_over_the_cap(federation: Federation) -> None:
    manifest = federation.manifest(training__rounds=500)
    admitted = check(manifest, None)
    first = federation.guard(1)
    affordable = first.rounds_left(manifest, admitted)
    guards = [first, *(federation.guard(1) for _ in range(3))]
    barrier, outcomes = threading.Barrier(len(guards)), list[str]()

    def spend(index: int, guard: Guard) -> None:
        barrier.wait()
        # Round numbers of their own: only the cap stands between them.
        for number in range(affordable + 2):
            try:
                guard.charge(manifest, admitted, 1 + index + number * len(guards))
                outcomes.append("charged")
            except BudgetExhaustedError:
                outcomes.append("refused")

    threads = [threading.Thread(target=spend, args=item) for item in enumerate(guards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("charged") == affordable
    assert outcomes.count("refused") == len(guards) * (affordable + 2) - affordable
    charges = [entry for entry in federation.entries(1) if isinstance(entry, Charge)]
    assert len(charges) == affordable
    # Every guard sees the one total, and it is what the filter says of the ledger.
    assert {guard.budget().epsilon_t for guard in guards} == {guards[0].budget().epsilon_t}
    assert guards[0].budget().epsilon_t <= 3.0
    for guard in guards:
        guard.close()


def test_two_studies_share_one_budget(federation: Federation, guard: Guard) -> None:
    one, other = federation.manifest(), federation.manifest(name="other")
    admitted = {m.digest: check(m, None) for m in (one, other)}
    before = guard.rounds_left(one, admitted[one.digest])
    guard.charge(other, admitted[other.digest], 1)
    assert guard.rounds_left(one, admitted[one.digest]) == before - 1
    assert (guard.last_charged_round(one.digest), guard.last_charged_round(other.digest)) == (0, 1)


def test_a_round_is_charged_once(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    event = guard.charge(manifest, admitted, 4)
    second = federation.guard(1)
    for again in (guard, second):
        refused(lambda g=again: g.charge(manifest, admitted, 4), RefusedError, "guard.round-charged")
    assert guard.last_charged_round(manifest.digest) == second.last_charged_round(manifest.digest) == 4
    second.close()
    (charge,) = [entry for entry in federation.entries(1) if isinstance(entry, Charge)]
    assert dict(charge.event) == event.to_fields()
    assert guard.budget().epsilon_t == odometer([event], 1e-6, "t")


def test_planned_events_never_share_an_id(federation: Federation, guard: Guard) -> None:
    admitted = check(federation.manifest(), None)
    assert len({guard.plan(admitted, 1).event_id for _ in range(50)}) == 50


def test_an_upload_is_recorded_once_an_attempt_and_needs_a_charge(
    federation: Federation, guard: Guard
) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    refused(lambda: guard.released(manifest.digest, 1, 1, CTX), RefusedError, "guard.not-charged")
    event = guard.charge(manifest, admitted, 1)
    refused(lambda: guard.released(manifest.digest, 2, 1, CTX), RefusedError, "guard.not-charged")
    for attempt in (1, 1, 2):
        guard.released(manifest.digest, 1, attempt, CTX)
    outcomes = [entry for entry in federation.entries(1) if isinstance(entry, Outcome)]
    assert [(o.event_id, o.attempt, o.state, o.ctx) for o in outcomes] == [
        (event.event_id, attempt, "released", CTX.hex()) for attempt in (1, 2)
    ]
    # A release gives nothing back.
    assert guard.budget().charges == 1


def test_what_became_of_a_round_is_said_once(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    assert guard.settle(manifest.digest, "site_stopped") == 0
    guard.charge(manifest, admitted, 1)
    assert guard.settle(manifest.digest, "site_stopped") == 1
    assert guard.settle(manifest.digest, "round_lost") == 0
    guard.charge(manifest, admitted, 2)
    for attempt in (1, 2):
        guard.released(manifest.digest, 2, attempt, bytes([attempt]) * 32)
    # The result is of the last upload, or of none.
    refused(lambda: guard.settle(manifest.digest, "completed", b"\1" * 32), RefusedError, "guard.context")
    assert guard.settle(manifest.digest, "completed", b"\2" * 32) == 2
    assert guard.settle(manifest.digest, "completed", b"\2" * 32) == 0
    # Nothing is given back, and another study's rounds are its own.
    assert guard.budget().charges == 2
    other = federation.manifest(name="other")
    guard.charge(other, check(other, None), 1)
    assert guard.settle(manifest.digest, "round_lost") == 0
    outcomes = [e for e in federation.entries(1) if isinstance(e, Outcome)]
    assert [(o.reason, o.state, o.attempt, o.ctx and o.ctx[:2]) for o in outcomes] == [
        ("site_stopped", "charged", 1, None),
        ("upload_started", "released", 1, "01"),
        ("upload_started", "released", 2, "02"),
        ("completed", "released", 2, "02"),
    ]


def test_a_paused_site_charges_nothing_and_says_who_paused_it(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest()
    admitted = check(manifest, None)
    other = federation.guard(1)
    assert not guard.paused
    refused(lambda: guard.pause("paused", "two\nlines"), UsageError, "ledger.reason")
    other.pause("paused", "Dr. Roe: maintenance")
    assert guard.paused
    refused(lambda: guard.charge(manifest, admitted, 1), RefusedError, "ledger.paused")
    refused(lambda: guard.pause("paused", "again"), RefusedError, "ledger.pause")
    guard.pause("resumed", "Dr. Roe: done")
    assert not other.paused
    refused(lambda: other.pause("resumed", "again"), RefusedError, "ledger.pause")
    guard.charge(manifest, admitted, 1)
    other.close()
    said = [(e.decision, e.reason) for e in federation.entries(1) if isinstance(e, Pause)]
    assert said == [("paused", "Dr. Roe: maintenance"), ("resumed", "Dr. Roe: done")]


def test_one_guard_serves_several_threads(federation: Federation, guard: Guard) -> None:
    """Studies charged and asked about side by side: every charge is counted once by the guard."""
    federation.edit_policy(1, register={"epsilon_t": 3.0, "epsilon_w": 3.0})
    studies = [federation.manifest(name=f"study {i}", training__rounds=20) for i in range(4)]
    barrier, problems = threading.Barrier(len(studies)), list[BaseException]()

    def spend(manifest: Manifest) -> None:
        admitted = check(manifest, None)
        barrier.wait()
        try:
            for number in (1, 2, 3):
                guard.charge(manifest, admitted, number)
                guard.released(manifest.digest, number, 1, CTX)
                assert guard.last_charged_round(manifest.digest) == number
                guard.budget()
                guard.settle(manifest.digest, "completed", CTX)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=spend, args=(manifest,)) for manifest in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert guard.budget().charges == sum(isinstance(e, Charge) for e in federation.entries(1)) == 12
    # A thread that read the ledger before the others wrote to it comes last.
    guard._charges.settled(guard._ledger.entries()[:3])
    fresh = federation.guard(1)
    assert fresh.budget() == guard.budget()
    fresh.close()


def test_a_study_without_dp_ends_the_register_for_all_later_ones(template: Path, tmp_path: Path) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    guard = federation.guard(1)
    plain, private = federation.manifest(privacy=WITHOUT_DP), federation.manifest()
    guard.check_budget(plain, check(plain, None), 1, 3)
    guard.charge(plain, check(plain, None), 1)
    assert guard.budget().epsilon_t == guard.budget().epsilon_w == float("inf")
    refused(lambda: guard.charge(private, check(private, None), 1), BudgetExhaustedError, "budget.exhausted")
    assert guard.rounds_left(private, check(private, None)) == 0
    guard.close()


def test_a_clock_set_back_charges_nothing(federation: Federation) -> None:
    federation.guard(1).close()
    guard = federation.guard(1, datetime.now(UTC) - timedelta(hours=1))
    manifest = federation.manifest()
    refused(lambda: guard.charge(manifest, check(manifest, None), 1), RefusedError, "ledger.clock")
    guard.close()
    assert [type(entry) for entry in federation.entries(1)] == [Opened, PolicyChange]


# -- what may run --------------------------------------------------------------------------------------------


def test_the_small_study_may_run(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest()
    assert guard.check_runnable(manifest).manifest_digest == manifest.digest
    assert guard.check_offer(manifest, federation.roster) == federation.verified_roster


@pytest.mark.parametrize(
    ("tables", "changes", "code"),
    [
        ({"rules": {"coordinators": []}}, {}, "policy.coordinator"),
        ({"rules": {"minimum_hospitals": 4}}, {}, "policy.minimum-hospitals"),
        ({"rules": {"max_round_minutes": 1}}, {"aggregation__deadline_s": 61}, "policy.round-time"),
        ({}, {"privacy": WITHOUT_DP}, "policy.no-dp"),
        ({}, {"aggregation__masks": WITHOUT_MASKS}, "policy.no-masks"),
        ({}, {"data": "another"}, "policy.data"),
    ],
)
def test_each_rule_of_the_policy_is_kept_from_the_moment_it_is_written(
    federation: Federation, guard: Guard, tables: dict[str, Any], changes: dict[str, Any], code: str
) -> None:
    manifest = federation.manifest(**changes)
    if tables:
        guard.check_runnable(manifest)
        federation.edit_policy(1, **tables)
    refused(lambda: guard.check_runnable(manifest), RefusedError, code)


def test_a_coordinator_that_the_policy_does_not_name_is_refused(federation: Federation, guard: Guard) -> None:
    key = new_signing_key()
    fields = federation.manifest().model_dump(mode="json", by_alias=True)
    foreign = Manifest.model_validate({**fields, "coordinator": key_text(public_key(key))})
    assert federation.sign(foreign, key).verify() == foreign
    refused(lambda: guard.check_runnable(foreign), RefusedError, "policy.coordinator")


def test_without_masks_only_where_the_policy_says_so(federation: Federation, guard: Guard) -> None:
    """And the ledger says that it did."""
    manifest = federation.manifest(aggregation__masks=WITHOUT_MASKS)
    federation.edit_policy(1, rules={"allow_studies_whose_every_update_the_hub_sees": True})
    guard.check_runnable(manifest)
    guard.charge(manifest, check(manifest, None), 1)
    changes = [entry for entry in federation.entries(1) if isinstance(entry, PolicyChange)]
    assert [entry.after.without_masks for entry in changes] == [False, True]


def test_without_dp_every_member_is_in_every_round(template: Path, tmp_path: Path) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    guard = federation.guard(1)
    guard.check_runnable(federation.manifest((1, 2, 3), privacy=WITHOUT_DP))
    smaller = federation.manifest((1, 2, 3, 4), privacy=WITHOUT_DP)
    assert smaller.study.aggregation.minimum_hospitals == 3
    refused(lambda: guard.check_runnable(smaller), RefusedError, "guard.no-dp-cohort")
    guard.check_runnable(
        federation.manifest((1, 2, 3, 4), privacy=WITHOUT_DP, aggregation__minimum_hospitals=4)
    )
    guard.close()


def test_an_expired_study_is_refused_from_its_minute_on(federation: Federation) -> None:
    manifest = federation.manifest(expires="2031-05-01T12:00Z")
    moment = datetime(2031, 5, 1, 12, 0, tzinfo=UTC)
    for now, expired in ((moment - timedelta(seconds=1), False), (moment, True)):
        guard = federation.guard(1, now)
        if expired:
            refused(lambda g=guard: g.check_runnable(manifest), UsageError, "study.expires")
        else:
            guard.check_runnable(manifest)
        guard.close()


# -- who is in it --------------------------------------------------------------------------------------------


def offer_with(federation: Federation, roster: Roster) -> tuple[Manifest, SignedRoster]:
    """The small study for a roster that the hub really signed."""
    fields = federation.manifest().model_dump(mode="json", by_alias=True)
    manifest = Manifest.model_validate({**fields, "roster": roster.digest.hex()})
    return manifest, SignedRoster.create(roster, federation.hub_key)


def with_keys(member: Member, *, protocol: bool = False, ledger: bool = False) -> Member:
    return Member(
        member.id,
        member.name,
        public_key(new_signing_key()) if protocol else member.protocol_key,
        public_key(new_signing_key()) if ledger else member.ledger_key,
    )


@pytest.mark.parametrize("which", ["protocol", "ledger"])
def test_a_roster_with_other_own_keys_is_refused(federation: Federation, guard: Guard, which: str) -> None:
    members = federation.verified_roster.members
    forged = Roster((with_keys(members[0], **{which: True}), *members[1:]))
    refused(lambda: guard.check_offer(*offer_with(federation, forged)), VerificationError, "guard.own-keys")


def test_offers_of_another_hub_or_roster_are_refused(federation: Federation, guard: Guard) -> None:
    manifest, members = federation.manifest(), federation.verified_roster.members
    other_hub = new_signing_key()
    fields = manifest.model_dump(mode="json", by_alias=True)
    foreign = Manifest.model_validate({**fields, "hub": key_text(public_key(other_hub))})
    refused(lambda: guard.check_offer(foreign, federation.roster), VerificationError, "guard.hub")
    fewer = SignedRoster.create(Roster(members[:3]), federation.hub_key)
    refused(lambda: guard.check_offer(manifest, fewer), VerificationError, "guard.roster")
    forged = SignedRoster.create(federation.verified_roster, other_hub)
    with pytest.raises(VerificationError):
        guard.check_offer(manifest, forged)


def test_a_study_without_this_hospital_is_refused(federation: Federation, guard: Guard) -> None:
    others = federation.manifest((2, 3, 4))
    refused(lambda: guard.check_offer(others, federation.roster), VerificationError, "guard.member")
    # The own name under another's number is not this hospital either.
    parties = [{"id": 1, "name": federation.name(2)}, {"id": 2, "name": federation.name(1)}]
    fields = federation.manifest().model_dump(mode="json", by_alias=True)
    swapped = Manifest.model_validate({**fields, "members": [*parties, fields["members"][2]]})
    refused(lambda: guard.check_offer(swapped, federation.roster), VerificationError, "guard.member")


def test_members_are_pinned_by_approval_and_checked_ever_after(federation: Federation, guard: Guard) -> None:
    manifest, roster = federation.manifest(), federation.verified_roster
    refused(lambda: guard.check_pins(manifest, roster), RefusedError, "roster.unpinned")
    expected = {roster.member(n).name: roster.member(n).fingerprint for n in (2, 3)}
    assert guard.unpinned(manifest, roster) == expected
    guard.decide(manifest, roster, "approved", "compared by telephone")
    guard.check_pins(manifest, roster)
    assert guard.unpinned(manifest, roster) == {}
    # A later roster gives hospital 2 other keys: nobody here accepts it by approving again.
    changed = Roster((roster.members[0], with_keys(roster.members[1], protocol=True), *roster.members[2:]))
    later, _ = offer_with(federation, changed)
    refused(lambda: guard.check_pins(later, changed), VerificationError, "roster.pin-changed")
    refused(
        lambda: guard.decide(later, changed, "approved", "again"), VerificationError, "roster.pin-changed"
    )
    assert guard.decision(later.digest) == ""


def test_denying_pins_nobody(federation: Federation, guard: Guard) -> None:
    manifest, roster = federation.manifest(), federation.verified_roster
    guard.decide(manifest, roster, "denied", "no")
    assert not federation.sites[1].pins.exists()


# -- decisions -----------------------------------------------------------------------------------------------


def test_the_latest_decision_counts_also_for_another_guard(federation: Federation, guard: Guard) -> None:
    manifest, roster = federation.manifest(), federation.verified_roster
    other = federation.guard(1)
    assert guard.decision(manifest.digest) == ""
    for decision in ("approved", "denied", "approved"):
        other.decide(manifest, roster, decision, "a reason")
        assert guard.decision(manifest.digest) == decision
    other.close()
    written = [entry for entry in federation.entries(1) if isinstance(entry, Approval)]
    assert [(entry.decision, entry.reason) for entry in written] == [
        ("approved", "a reason"),
        ("denied", "a reason"),
        ("approved", "a reason"),
    ]


def every_changed_field(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from every_changed_field(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from every_changed_field(inner, (*path, index))
    else:
        yield path


def altered(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    digits = {"0": "1"}
    return str(value)[:-1] + digits.get(str(value)[-1:], "0")


def test_any_changed_field_is_another_study_that_nobody_approved(
    federation: Federation, guard: Guard
) -> None:
    manifest = federation.manifest()
    guard.decide(manifest, federation.verified_roster, "approved", "read")
    fields = manifest.model_dump(mode="json", by_alias=True)
    digests, refused_as_malformed = set(), 0
    paths = list(every_changed_field(fields))
    for path in paths:
        copy = manifest.model_dump(mode="json", by_alias=True)
        inner: Any = copy
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = altered(inner[path[-1]])
        try:
            changed = Manifest.model_validate(copy)
        except ValueError:
            refused_as_malformed += 1
            continue
        assert guard.decision(changed.digest) == "", path
        digests.add(changed.digest)
    assert len(digests) >= 20
    assert manifest.digest not in digests
    assert len(digests) + refused_as_malformed == len(paths)
    assert guard.decision(manifest.digest) == "approved"


@pytest.mark.parametrize("reason", ["", " ", "two\nlines", "x" * 501, "\u202etxet"])
def test_a_reason_is_one_visible_line(federation: Federation, guard: Guard, reason: str) -> None:
    manifest, roster = federation.manifest(), federation.verified_roster
    refused(lambda: guard.decide(manifest, roster, "approved", reason), UsageError, "ledger.reason")
    assert guard.decision(manifest.digest) == ""
    assert not federation.sites[1].pins.exists()


def test_split_keys_belong_to_one_site_register_and_study(federation: Federation, guard: Guard) -> None:
    secret, man = bytes(range(32)), bytes(32)
    key = guard.split_key(secret, man)
    other = federation.guard(2)
    assert len({key, guard.split_key(secret, b"\1" * 32), guard.split_key(bytes(32), man),
                other.split_key(secret, man)}) == 4  # fmt: skip
    assert guard.split_key(secret, man) == key
    other.close()


def test_no_more_rounds_are_charged_than_were_approved(federation: Federation, guard: Guard) -> None:
    """As many as were planned and, for rounds that are lost, up to the manifest's maximum."""
    manifest = federation.manifest(training__rounds=2, aggregation__rounds_max=3)
    admitted = check(manifest, None)
    for number in (1, 7, 8):
        guard.charge(manifest, admitted, number)
    before = federation.entries(1)
    refused(lambda: guard.charge(manifest, admitted, 9), RefusedError, "guard.rounds-spent")
    assert federation.entries(1) == before


def test_a_study_on_another_patient_column_is_refused(federation: Federation, guard: Guard) -> None:
    guard.check_runnable(federation.manifest())
    visits = federation.manifest(contract__patient="visit")
    refused(lambda: guard.check_runnable(visits), RefusedError, "policy.patient")


def test_a_restored_ledger_is_refused(federation: Federation) -> None:
    home = federation.sites[1]
    guard = federation.guard(1)
    guard.close()
    kept = {path: path.read_bytes() for path in home.folder.glob("ledger.db*")}
    guard = federation.guard(1)
    manifest = federation.manifest()
    guard.charge(manifest, check(manifest, None), 1)
    guard.close()
    for path in home.folder.glob("ledger.db*"):
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    refused(lambda: federation.guard(1), RefusedError, "guard.ledger-behind")


def test_without_dp_a_register_keeps_to_one_set_of_hospitals(federation: Federation, guard: Guard) -> None:
    federation.edit_policy(1, rules={"allow_studies_without_differential_privacy": True})
    first = federation.manifest(privacy=WITHOUT_DP)
    federation.receive(1, first)
    guard.charge(first, check(first, None), 1)
    same = federation.manifest(name="again", privacy=WITHOUT_DP)
    guard.charge(same, check(same, None), 1)
    federation.receive(1, same)
    # A lost round is computed again, with the same hospitals and under a new number.
    guard.charge(first, check(first, None), 2)
    other = federation.manifest((1, 2, 3, 4), name="other", privacy=WITHOUT_DP)
    refused(lambda: guard.charge(other, check(other, None), 1), RefusedError, "guard.no-dp-members")
    refused(lambda: guard.check_budget(other, check(other, None), 1), RefusedError, "guard.no-dp-members")
    # Without the document of the first study nobody can say who was in it: refused as well.
    federation.sites[1].study(first.digest.hex()).unlink()
    refused(lambda: guard.charge(same, check(same, None), 2), RefusedError, "studies.unknown")


# -- what earlier studies have reserved --------------------------------------------------------------------


def rounds_of(federation: Federation, name: str, rounds: int, most: int) -> Manifest:
    study = federation.manifest(name=name, training__rounds=rounds, aggregation__rounds_max=most)
    federation.decide(1, study)
    return study


def test_an_earlier_study_is_never_starved(federation: Federation, guard: Guard) -> None:
    """Two guards and two studies at once: the later one gets what the earlier one has not reserved."""
    whole = guard.rounds_left(federation.manifest(), check(federation.manifest(), None))
    first = rounds_of(federation, "first", whole - 5, whole)
    later = rounds_of(federation, "later", 5, 20)
    other, admitted = federation.guard(1), {m.digest: check(m, None) for m in (first, later)}
    assert guard.rounds_left(first, admitted[first.digest]) == whole
    assert other.rounds_left(later, admitted[later.digest]) == 5
    barrier, charged = threading.Barrier(2), {first.digest: 0, later.digest: 0}

    def spend_all(by: Guard, study: Manifest, rounds: int) -> None:
        barrier.wait()
        for number in range(1, rounds + 1):
            try:
                by.check_budget(study, admitted[study.digest], number)
                by.charge(study, admitted[study.digest], number)
            except BudgetExhaustedError:
                return
            charged[study.digest] += 1

    threads = [
        threading.Thread(target=spend_all, args=(guard, first, whole - 5)),
        threading.Thread(target=spend_all, args=(other, later, 20)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert charged == {first.digest: whole - 5, later.digest: 5}
    refused(lambda: other.charge(later, admitted[later.digest], 6), BudgetExhaustedError, "budget.exhausted")
    other.close()


def test_reservations_end_with_their_study(federation: Federation, guard: Guard) -> None:
    soon = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%MZ")
    first, next_ = rounds_of(federation, "first", 4, 6), federation.manifest(name="next")
    expires = federation.manifest(name="soon over", training__rounds=2, expires=soon)
    federation.decide(1, expires)
    admitted = {m.digest: check(m, None) for m in (first, next_, expires)}
    whole = guard.rounds_left(first, admitted[first.digest])
    assert dict(guard.budget().reserved) == {"first": 4, "soon over": 2}
    assert guard.rounds_left(next_, admitted[next_.digest]) == whole - 6
    assert guard.budget().more_rounds == whole - 6
    guard.charge(first, admitted[first.digest], 1)
    guard.released(first.digest, 1, 1, CTX)
    assert dict(guard.budget().reserved)["first"] == 3
    # Lost: computed again from the same reservation, until rounds_max.
    guard.settle(first.digest, "round_lost")
    assert dict(guard.budget().reserved)["first"] == 4
    for number in (2, 3, 4):
        guard.charge(first, admitted[first.digest], number)
        guard.settle(first.digest, "upload_not_made")
    assert dict(guard.budget().reserved)["first"] == 2
    late = federation.guard(1, datetime.now(UTC) + timedelta(minutes=6))
    assert dict(late.budget().reserved) == {"first": 2}
    late.close()
    # A later approval gives up the place; a denial and an end give up all.
    federation.decide(1, first)
    assert [name for name, _ in guard.budget().reserved] == ["soon over", "first"]
    guard.closed(first.digest)
    guard.closed(first.digest)
    federation.decide(1, expires, "denied")
    assert guard.budget().reserved == ()
    assert guard.rounds_left(next_, admitted[next_.digest]) == whole - 4
    assert [type(entry) for entry in federation.entries(1)].count(Closed) == 1


def test_a_lowered_cap_acts_at_once_on_what_is_reserved(federation: Federation, guard: Guard) -> None:
    first, later = rounds_of(federation, "first", 4, 6), rounds_of(federation, "later", 4, 6)
    admitted = {m.digest: check(m, None) for m in (first, later)}
    guard.check_budget(later, admitted[later.digest], 1)
    guard.charge(first, admitted[first.digest], 1)
    federation.edit_policy(1, register=dict.fromkeys(("epsilon_t", "epsilon_w"), 1.0))
    guard.check_budget(first, admitted[first.digest], 2)
    refused(
        lambda: guard.check_budget(later, admitted[later.digest], 1), BudgetExhaustedError, "budget.exhausted"
    )
    refused(lambda: guard.charge(later, admitted[later.digest], 1), BudgetExhaustedError, "budget.exhausted")
    guard.charge(first, admitted[first.digest], 2)


# -- release consent ---------------------------------------------------------------------------------------


def test_consent_is_of_a_study_that_was_approved_here(federation: Federation, guard: Guard) -> None:
    manifest, man = (study := federation.manifest()), study.digest
    refused(lambda: guard.consent(man, "given", "A. Person: fine"), RefusedError, "guard.consent")
    federation.decide(1, manifest)
    refused(lambda: guard.consent(man, "withdrawn", "A. Person: no"), RefusedError, "guard.consent")
    refused(lambda: guard.consent(man, "given", "two\nlines"), UsageError, "ledger.reason")
    assert not guard.consented(man)
    guard.consent(man, "given", "A. Person: fine")
    assert guard.consented(man)
    refused(lambda: guard.consent(man, "given", "A. Person: fine"), RefusedError, "guard.consent")
    guard.consent(man, "withdrawn", "A. Person: after all not")
    assert not guard.consented(man)
    guard.consent(man, "given", "A. Person: fine")
    federation.decide(1, manifest, "denied")
    assert not guard.consented(man)
