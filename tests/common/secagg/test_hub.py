"""The hub's round: who is summed, when it may open, and whose messages it takes."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RefusedError, VerificationError, WardroundError
from common.secagg import records
from common.secagg.hub import HubRound, HubSetup, Setup
from tests.common.secagg.federation import MODEL, STATE, matches, memory, signing_key

FOUR, FIVE = memory(4), memory(5)
SIX = memory(6)


@settings(max_examples=150, deadline=None)
@given(st.sets(st.sampled_from(list(itertools.combinations(range(1, 7), 2)))), st.sets(st.integers(1, 8)))
def test_cohorts_are_fully_paired(pairs: set[tuple[int, int]], ids: set[int]) -> None:
    setup = SIX().setup
    assert setup is not None
    found = Setup(setup.directory, setup.dirh, frozenset(pairs)).cohort_among(ids)
    assert list(found) == sorted(set(found))
    assert set(found) <= ids & set(range(1, 7))
    assert all(pair in pairs for pair in itertools.combinations(found, 2))
    assert bool(found) == bool(ids & set(range(1, 7)))
    for other in ids & set(range(1, 7)) - set(found):
        assert not all((min(i, other), max(i, other)) in pairs for i in found)


def test_one_missing_pair_costs_one_hospital() -> None:
    setup = FIVE().setup
    assert setup is not None
    for pair in setup.pairs:
        found = dataclasses.replace(setup, pairs=setup.pairs - {pair}).cohort_among(range(1, 6))
        assert found == tuple(i for i in range(1, 6) if i != pair[1])


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        # 1 has one pair only: taken first, it would keep all the others out.
        ([(1, 2), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)], (2, 3, 4, 5)),
        # 6 leaves before 2 and 4 do, and then fits 1 and 3; once with a pair to 5 besides, who has left too.
        ([(1, 3), (1, 4), (1, 6), (2, 3), (2, 4), (3, 6)], (1, 3, 6)),
        ([(1, 3), (1, 4), (1, 6), (2, 3), (2, 4), (3, 6), (5, 6)], (1, 3, 6)),
    ],
)
def test_who_leaves_first_and_who_comes_back(pairs: list[tuple[int, int]], found: tuple[int, ...]) -> None:
    setup = SIX().setup
    assert setup is not None
    assert Setup(setup.directory, setup.dirh, frozenset(pairs)).cohort_among(range(1, 7)) == found


def test_a_hub_leaves_the_policy_of_t_0_to_the_hospitals() -> None:
    federation = FOUR()
    params = dataclasses.replace(federation.params, t=0)
    assert HubSetup(params).missing_announces() == (1, 2, 3, 4)
    setup = federation.setup
    assert setup is not None
    arguments: dict[str, Any] = {"round": 1, "state": STATE, "model_digest": MODEL, "deadline": 1}
    hub = HubRound(params, setup, **arguments, sign=signing_key("hub").sign)
    assert hub.start.round == 1
    small = dataclasses.replace(params, m=2)
    for make in (
        lambda: HubSetup(small),
        lambda: HubRound(small, setup, **arguments, sign=signing_key("hub").sign),
    ):
        with pytest.raises(RefusedError, match="m must be from 3"):
            make()


def test_only_its_own_ready_of_this_round_is_taken() -> None:
    federation = FOUR()
    hub = federation.round(1)
    good = federation.sites[1].ready(*federation.vectors(1), MODEL)
    man = federation.params.man

    def signed(i: int = 1, **changes: object) -> records.Ready:
        record = dataclasses.replace(good, **changes)  # type: ignore[arg-type]
        return records.signed(record, man, signing_key(f"site {i}").sign)

    for sender, record, match in (
        (2, good, "in the name of 1"),
        (9, signed(9, id=9), "not a member"),
        (1, dataclasses.replace(good, nu=bytes(32)), "not signed"),
        (1, signed(2), "not signed"),
        (1, signed(round=2), "another round or model"),
        (1, signed(model_digest=bytes(32)), "another round or model"),
        (1, signed(man=bytes(32)), "another round or model"),
    ):
        with pytest.raises(WardroundError, match=match):
            hub.on_ready(sender, record)
    assert hub.ready_ids() == ()
    hub.on_ready(1, good)
    hub.on_ready(1, good)
    with pytest.raises(RefusedError, match="another vector before"):
        hub.on_ready(1, signed(nu=bytes(32)))
    assert hub.ready_ids() == (1,)
    assert hub.missing_ready() == (2, 3, 4)


def test_a_cohort_needs_m_hospitals() -> None:
    federation = FOUR()
    hub = federation.round(1)
    with pytest.raises(RefusedError, match="no cohort yet"):
        hub.missing_uploads()
    federation.ready(hub, (1, 2))
    with pytest.raises(RefusedError, match="2 hospitals can be summed"):
        hub.cohort()
    federation.ready(hub, (3,))
    assert hub.cohort().ids == (1, 2, 3)
    with pytest.raises(RefusedError, match="2 hospitals can be summed"):
        hub.cohort(without=(1,))


def test_attempts_end_and_no_attempt_follows_an_opening() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    assert [hub.cohort().attempt for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RefusedError, match="used up"):
        hub.cohort()
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    federation.upload(hub, hub.cohort())
    hub.open_please()
    with pytest.raises(RefusedError, match="has been opened"):
        hub.cohort()
    federation.open(hub)
    assert matches(federation, hub.finish())


def test_the_hub_starts_only_rounds_of_the_run_and_with_its_own_key() -> None:
    federation = FOUR()
    setup = federation.setup
    assert setup is not None
    for number in (0, 6):
        with pytest.raises(RefusedError, match="rounds 1 to 5"):
            HubRound(
                federation.params,
                setup,
                round=number,
                state=STATE,
                model_digest=MODEL,
                deadline=1,
                sign=signing_key("hub").sign,
            )
    with pytest.raises(VerificationError, match="not signed by the hub"):
        HubRound(
            federation.params,
            setup,
            round=1,
            state=STATE,
            model_digest=MODEL,
            deadline=1,
            sign=signing_key("site 1").sign,
        )


def test_results_are_signed_and_name_the_sum() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    federation.upload(hub, hub.cohort())
    with pytest.raises(RefusedError, match="have not opened"):
        hub.result(MODEL)
    federation.open(hub)
    result = hub.result(bytes(32))
    records.check_signature(result, federation.params.man, federation.params.hub_key, "the hub")
    assert (result.ctx, result.sum_digest, result.model_digest) == (
        hub.accumulator.ctx,
        hub.finish().digest,
        bytes(32),
    )
