"""Leaves: closed schemas, one byte form, and what may follow what."""

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.encoding import canonical_json
from common.errors import RefusedError, UsageError, VerificationError
from common.identity import key_text, new_signing_key, public_key
from common.ledger import entries
from common.ledger.entries import (
    Approval,
    Charge,
    Completed,
    Ended,
    Entry,
    Membership,
    Opened,
    Outcome,
    Pause,
    PolicyChange,
    Restored,
    Rules,
    Submission,
    placed,
)
from common.ledger.history import History
from common.privacy.events import Event

ACTOR = key_text(public_key(new_signing_key()))
REGISTER = "0123456789abcdef" * 2
EVENT_ID = "fedcba9876543210" * 2
DIGEST = "0123456789abcdef" * 4
TIME = "2026-03-01T12:30Z"


def opened(register: str = REGISTER) -> Opened:
    return Opened(actor=ACTOR, register_id=register, epsilon_t="3", epsilon_w=None, delta="0.000001")


def charge(event_id: str = EVENT_ID, register: str = REGISTER) -> Charge:
    event = Event(
        event_id=event_id,
        register_id=register,
        manifest_digest=DIGEST,
        task="training",
        round=1,
        attempt=1,
        kind="no_dp",
        state="charged",
    )
    return Charge(actor=ACTOR, event=event.to_fields())


def outcome(event_id: str = EVENT_ID) -> Outcome:
    return Outcome(
        actor=ACTOR, event_id=event_id, state="released", attempt=1, ctx=DIGEST, reason="completed"
    )


def approval() -> Approval:
    return Approval(actor=ACTOR, manifest=DIGEST, decision="approved", reason="Board of 1 March: yes")


def pause(decision: Literal["paused", "resumed"] = "paused") -> Pause:
    return Pause(actor=ACTOR, decision=decision, reason="Dr. Roe: maintenance")


def rules(epsilon: str = "3", coordinators: tuple[str, ...] = (ACTOR,)) -> Rules:
    return Rules(
        epsilon_t=epsilon,
        epsilon_w=None,
        delta="0.000001",
        minimum_hospitals=3,
        max_round_minutes=60,
        without_differential_privacy=False,
        without_masks=False,
        coordinators=coordinators,
    )


def policy(before: Rules | None, after: Rules) -> PolicyChange:
    return PolicyChange(actor=ACTOR, before=before, after=after)


def restored() -> Restored:
    return Restored(actor=ACTOR, reason="Dr. Roe: the disk broke")


def membership(site: int = 3, decision: Literal["admitted", "revoked"] = "admitted") -> Membership:
    mark = "0123-4567-89ab-cdef-0123-4567-89ab-cdef"
    return Membership(actor=ACTOR, id=site, name="St. Mary", fingerprint=mark, decision=decision)


def submission(manifest: str = DIGEST) -> Submission:
    return Submission(actor=ACTOR, manifest=manifest, coordinator=ACTOR)


def completed(step: int = 1, manifest: str = DIGEST, cohort: tuple[int, ...] = (1, 2, 40)) -> Completed:
    return Completed(
        actor=ACTOR, manifest=manifest, round=step + 1, step=step, attempt=1, cohort=cohort,
        ctx=DIGEST, sum_digest=DIGEST, model_digest=DIGEST,
    )  # fmt: skip


def ended(manifest: str = DIGEST) -> Ended:
    return Ended(actor=ACTOR, manifest=manifest, status="done")


OF_A_SITE: list[Entry] = [
    opened(), policy(None, rules()), policy(rules(), rules("2.5", (ACTOR, ACTOR))), approval(), charge(), outcome(),
    pause(), restored(),
]  # fmt: skip
OF_A_HUB: list[Entry] = [membership(), submission(), completed(), ended(), membership(decision="revoked")]
ALL = [placed(entry, seq, TIME) for kinds in (OF_A_SITE, OF_A_HUB) for seq, entry in enumerate(kinds)]


@pytest.mark.parametrize("entry", ALL)
def test_leaves_are_read_exactly(entry: Entry) -> None:
    leaf = entries.encode(entry)
    assert entries.decode(leaf) == entry
    value: dict[str, Any] = json.loads(leaf)
    assert value["schema"] == 1
    assert value["version"]
    wrong: list[Any] = [{**value, "rows": 5}, {**value, "duration_s": 1.5}, [value], None, {}]
    wrong += [{k: v for k, v in value.items() if k != name} for name in value]
    for name in value:
        wrong += [{**value, name: junk} for junk in (None, True, 1.5, [], {}, "", " ", "x" * 1000, -2)]
    wrong = [bad for bad in wrong if bad != value]
    for bad in wrong:
        if bad in ({**value, "ctx": None}, {**value, "before": None}):
            continue  # an outcome without upload and a first policy are right ones
        with pytest.raises(VerificationError):
            entries.decode(canonical_json(bad))
    for data in (
        leaf + b"\n",
        json.dumps(value).encode(),
        leaf.replace(b'"schema":1', b'"schema":true'),
        b"",
    ):
        with pytest.raises(VerificationError):
            entries.decode(data)


def test_every_event_field_may_be_charged() -> None:
    """The allow-list is exactly the names under which common.privacy.events writes."""
    names = {field.alias or name for name, field in Event.model_fields.items()}
    assert names == entries.EVENT_FIELDS


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 5},
        {"steps": True},
        {"steps": -1},
        {"steps": 2**53},
        {"q": 0.5},
        {"q": "0.5 "},
        {"q": "line\nbreak"},
        {"q": "x" * 81},
        {"reason": "é"},
        {"members": [1, 2]},
        {"event_id": "short"},
        {"event_id": EVENT_ID.upper()},
        {"register_id": 5},
    ],
)
def test_charges_hold_event_fields_only(change: dict[str, Any]) -> None:
    good = {"event_id": EVENT_ID, "register_id": REGISTER}
    Charge(actor=ACTOR, event=good)
    with pytest.raises(ValidationError):
        Charge(actor=ACTOR, event={**good, **change})
    for missing in good:
        with pytest.raises(ValidationError):
            Charge(actor=ACTOR, event={k: v for k, v in good.items() if k != missing})


def test_a_charged_event_cannot_be_changed_in_memory() -> None:
    fields: dict[str, str | int] = {"event_id": EVENT_ID, "register_id": REGISTER, "steps": 9}
    entry = Charge(actor=ACTOR, event=fields)
    fields["steps"] = 1
    assert entry.event["steps"] == 9
    with pytest.raises(TypeError):
        entry.event["steps"] = 1  # type: ignore[index]
    with pytest.raises(ValidationError):
        entry.seq = 5


@pytest.mark.parametrize(
    "reason", ["", " x", "x ", "a\nb", "a\tb", "a\u202eb", "a\u200bb", "x" * 501, "\ud800"]
)
def test_reasons_are_one_visible_line(reason: str) -> None:
    with pytest.raises(UsageError, match="one line"):
        entries.check_reason(reason)
    with pytest.raises(ValidationError):
        Approval(actor=ACTOR, manifest=DIGEST, decision="denied", reason=reason)
    with pytest.raises(ValidationError):
        Pause(actor=ACTOR, decision="paused", reason=reason)
    for good in ("No.", "Nämnden säger nej", "x" * 500):
        assert entries.check_reason(good) == good


@pytest.mark.parametrize(
    "number", ["3.0", "03", "1e-6", "-1", "+1", ".5", "5.", "NaN", "inf", "", "3 ", "3\n"]
)
def test_caps_are_canonical_decimals(number: str) -> None:
    with pytest.raises(ValidationError):
        Opened(actor=ACTOR, register_id=REGISTER, epsilon_t=number, epsilon_w=None, delta="0.000001")
    with pytest.raises(ValidationError):
        Opened(actor=ACTOR, register_id=REGISTER, epsilon_t="3", epsilon_w=None, delta=number)


@pytest.mark.parametrize(
    "time", ["2026-02-30T10:00Z", "2026-03-01T24:00Z", "2026-03-01 10:00Z", "2026-03-01T10:00"]
)
def test_times_exist(time: str) -> None:
    leaf = entries.encode(ALL[0]).replace(TIME.encode(), time.encode())
    with pytest.raises(VerificationError, match="time"):
        entries.decode(leaf)


def test_utc_minute() -> None:
    late = datetime(2026, 3, 1, 23, 59, 59, 999_999, tzinfo=timezone(-timedelta(hours=5)))
    assert entries.utc_minute(late) == "2026-03-02T04:59Z"
    assert entries.utc_minute(datetime(2026, 3, 1, 12, 30, tzinfo=UTC)) == TIME
    with pytest.raises(UsageError, match="time zone"):
        entries.utc_minute(datetime(2026, 3, 1, 12, 30))


def test_unplaced_entries_are_no_leaves() -> None:
    for entry in (
        opened(),
        opened().model_copy(update={"seq": 0}),
        opened().model_copy(update={"time": TIME}),
    ):
        with pytest.raises(UsageError, match="number and time"):
            entries.encode(entry)
    value = json.loads(entries.encode(ALL[0]))
    for change in ({"seq": -1}, {"time": ""}):
        with pytest.raises(VerificationError):
            entries.decode(canonical_json({**value, **change}))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_time_never_goes_backwards(minutes: list[int]) -> None:
    history = History()
    start = datetime(2026, 3, 1, tzinfo=UTC)
    for seq, minute in enumerate(minutes):
        entry = placed(approval(), seq, entries.utc_minute(start + timedelta(minutes=minute)))
        if seq and minute < max(minutes[:seq]):
            with pytest.raises(RefusedError, match="clock") as caught:
                history.check(entry)
            assert "clock" in caught.value.remedy
            return
        history.check(entry)
        history.add(entry)


@settings(max_examples=80)
@given(st.data())
def test_history_is_checked(data: st.DataObject) -> None:
    """Random entries over two registers and three events, against sets kept by hand."""
    registers = [f"{i:032x}" for i in range(2)]
    ids = [f"{i:032x}" for i in range(3)]
    history, open_registers, charged, size = History(), set[str](), set[str](), 0
    paused, known = False, None
    policies = [rules(epsilon) for epsilon in ("1", "2")]
    for _ in range(data.draw(st.integers(1, 12))):
        register, event = data.draw(st.sampled_from(registers)), data.draw(st.sampled_from(ids))
        entry, allowed = data.draw(
            st.sampled_from(
                [
                    (opened(register), register not in open_registers),
                    (
                        charge(event, register),
                        not paused and register in open_registers and event not in charged,
                    ),
                    (outcome(event), event in charged),
                    (approval(), True),
                    (pause(), not paused),
                    (pause("resumed"), paused),
                ]
            )
        )
        if data.draw(st.booleans()):
            before, after = (
                data.draw(st.sampled_from([None, *policies])),
                data.draw(st.sampled_from(policies)),
            )
            entry, allowed = policy(before, after), before == known and after != known
        elif size and data.draw(st.integers(0, 3)) == 0:
            entry, allowed = data.draw(st.sampled_from(OF_A_HUB)), False
        right = data.draw(st.sampled_from([size, size, size, size + 1, size - 1]))
        entry = placed(entry, right, TIME) if right >= 0 else entry
        if right != size or not allowed:
            with pytest.raises(RefusedError):
                history.check(entry)
            continue
        history.check(entry)
        history.add(entry)
        size += 1
        if isinstance(entry, Opened):
            open_registers.add(register)
        elif isinstance(entry, Charge):
            charged.add(event)
        elif isinstance(entry, Pause):
            paused = not paused
        elif isinstance(entry, PolicyChange):
            known = entry.after


@settings(max_examples=150)
@given(st.data())
def test_a_hubs_history_is_checked(data: st.DataObject) -> None:
    """Random entries over two hospitals and two studies, against a record kept by hand."""
    history, size = History(), 0
    members: dict[int, str] = {}
    steps: dict[str, int] = {}
    over: set[str] = set()
    for _ in range(data.draw(st.integers(1, 14))):
        site, study = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([DIGEST, "0" * 64]))
        step = data.draw(st.integers(1, 3))
        going_on = study in steps and study not in over
        entry, allowed = data.draw(
            st.sampled_from(
                [
                    (membership(site), site not in members),
                    (membership(site, "revoked"), members.get(site) == "admitted"),
                    (submission(study), study not in steps),
                    (completed(step, study), going_on and step == steps[study] + 1),
                    (ended(study), going_on),
                    (pause(), not size),
                ]
            )
        )
        if isinstance(entry, Pause):
            if size:
                with pytest.raises(RefusedError, match="hub"):
                    history.check(placed(entry, size, TIME))
            continue
        if not allowed:
            with pytest.raises(RefusedError):
                history.check(placed(entry, size, TIME))
            continue
        history.check(placed(entry, size, TIME))
        history.add(placed(entry, size, TIME))
        size += 1
        if isinstance(entry, Membership):
            members[site] = entry.decision
        elif isinstance(entry, Submission):
            steps[study] = 0
        elif isinstance(entry, Completed):
            steps[study] = step
        else:
            over.add(study)


def test_nothing_is_charged_after_a_restore() -> None:
    history = History()
    for seq, entry in enumerate([opened(), charge(), restored(), approval(), outcome()]):
        history.check(placed(entry, seq, TIME))
        history.add(placed(entry, seq, TIME))
    with pytest.raises(RefusedError, match="restored from a backup"):
        history.check(placed(charge("0" * 32), 5, TIME))


@pytest.mark.parametrize("cohort", [(), (1, 2), (1, 3, 2), (1, 1, 2), (0, 1, 2), (1, 2, 65536)])
def test_cohorts_are_three_hospitals_or_more_in_order(cohort: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        completed(cohort=cohort)


def test_nothing_is_charged_while_paused() -> None:
    history = History()
    story: list[tuple[Entry, str]] = [
        (opened(), ""),
        (pause("resumed"), "ledger.pause"),
        (pause(), ""),
        (pause(), "ledger.pause"),
        (charge(), "ledger.paused"),
        (approval(), ""),
        (pause("resumed"), ""),
        (charge(), ""),
        (pause(), ""),
        # What was charged before may be told during the pause.
        (outcome(), ""),
    ]
    seq = 0
    for entry, refusal in story:
        entry = placed(entry, seq, TIME)
        if refusal:
            with pytest.raises(RefusedError) as caught:
                history.check(entry)
            assert caught.value.code == refusal
            continue
        history.check(entry)
        history.add(entry)
        seq += 1


def test_events_of_a_register() -> None:
    other = "f" * 32
    listed = [
        opened(),
        opened(other),
        charge("1" * 32),
        charge("2" * 32, other),
        charge("3" * 32),
        outcome("1" * 32),
    ]
    assert [event["event_id"] for event in entries.events(listed, REGISTER)] == ["1" * 32, "3" * 32]
    assert entries.events(listed, "e" * 32) == []
    # What privacy wrote is what privacy reads.
    assert Event.from_fields(entries.events(listed, other)[0]).event_id == "2" * 32
