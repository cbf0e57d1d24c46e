"""The rounds of one hospital against a hub that repeats, splits and lies."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RefusedError, VerificationError, WardroundError
from common.secagg import keys, masks, records
from common.secagg.hub import HubRound
from common.secagg.records import Cohort, OpenPlease, Record, Result, RoundStart
from tests.common.secagg.federation import MODEL, Counter, Federation, matches, memory, signing_key
from tests.common.secagg.reference import hash_of, kdf, masked
from tests.common.secagg.strategies import ALL, a_record

FOUR, FIVE = memory(4), memory(5)
HIGHEST = b"\xff" * 32


def hub_signed(record: RoundStart | Result, federation: Federation) -> Any:
    return records.signed(record, federation.params.man, signing_key("hub").sign)


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


# Sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("n", range(3, 11))
def test_sums_are_exact(n: int, bits: int) -> None:
    federation = Federation(
        n, bits=bits, range=1000.0 if bits == 16 else 5e7, parameters=7, scalars=1 + n % 3
    )
    federation.pair()
    for number in (1, 2, 5):
        sums = federation.whole_round(number)
        assert sums.cohort == federation.ids
        assert matches(federation, sums, number)
        assert sums.digest == hash_of(
            "sum",
            b"".join((v % (1 << bits)).to_bytes(bits // 8, "little") for v in sums.parameters.tolist()),
            b"".join((v % (1 << 64)).to_bytes(8, "little") for v in sums.scalars.tolist()),
        )


def test_sums_are_exact_at_the_bounds_of_the_codec() -> None:
    federation = FOUR()
    hub = federation.round()
    bound = int(federation.params.range / federation.params.step) + 1
    scalar = ((1 << 63) - 1) // 4
    for i, sign in zip(federation.ids, (1, -1, -1, -1), strict=True):
        q = np.full(5, sign * bound, dtype=np.int64), np.full(2, sign * scalar, dtype=np.int64)
        hub.on_ready(i, federation.sites[i].ready(*q, MODEL))
    federation.upload(hub, hub.cohort())
    federation.open(hub)
    assert set(hub.finish().parameters.tolist()) == {-2 * bound}
    assert set(hub.finish().scalars.tolist()) == {-2 * scalar}


def test_an_upload_is_the_one_of_the_reference() -> None:
    federation = FOUR()
    hub = federation.round(2)
    nus = {i: ready.nu for i, ready in federation.ready(hub).items()}
    cohort = hub.cohort()
    site, state = federation.sites[3], federation.disks[3]
    header = site.on_cohort(cohort)
    kept = state.state
    flat = [part for i in (1, 2, 3, 4) for part in (i.to_bytes(2, "little"), nus[i])]
    man, dirh = federation.params.man, hub.start.dirh
    ctx = hash_of("ctx", man, dirh, b"\x02\0\0\0", b"\x01", MODEL, b"\x04\0", *flat)
    params, scalars = (vector.tolist() for vector in federation.vectors(3, 2))
    q_digest = hash_of(
        "q",
        b"".join((v % 2**32).to_bytes(4, "little") for v in params),
        b"".join((v % 2**64).to_bytes(8, "little") for v in scalars),
    )
    assert nus[3] == kdf(kept.s, "ready", man, b"\x02\0\0\0", b"\x03\0", q_digest)
    b = kdf(kept.s, "self", ctx)
    held = dict(kept.keys)
    expected = masked(params, 4, b, held, 3, [1, 2, 3, 4], b"params", ctx)
    expected += masked(scalars, 8, b, held, 3, [1, 2, 3, 4], b"scalars", ctx)
    assert site.payload() == expected
    assert header.ctx == ctx
    assert header.commit == kdf(b, "commit", ctx, b"\x03\0")
    assert header.payload_digest == hash_of("payload", *header.chunk_digests)
    # Round 2 without round 1: K_0 was advanced twice.
    first = dict(federation.disks[3].state.keys)
    assert all(len(key) == 32 for key in first.values())
    federation.upload(hub, cohort, (1, 2, 4))
    federation.send_payload(hub, 3, header)
    federation.open(hub)
    assert matches(federation, hub.finish(), 2)


def test_the_ratchet_advances_once_a_round_and_catches_up() -> None:
    federation = FOUR()
    zero = dict(federation.disks[1].state.keys)
    federation.round(3)
    assert dict(federation.disks[1].state.keys) == {i: keys.ratchet(key, 3) for i, key in zero.items()}
    assert federation.disks[1].state.index == 3
    assert keys.ratchet(zero[2], 3) == kdf(kdf(kdf(zero[2], "ratchet"), "ratchet"), "ratchet")


# Rounds ----------------------------------------------------------------------------------------------


def test_rounds_strictly_increase() -> None:
    federation = FOUR()
    start = federation.round(2).start
    earlier = hub_signed(dataclasses.replace(start, round=1), federation)
    zero = hub_signed(dataclasses.replace(start, round=0), federation)
    other_model = hub_signed(dataclasses.replace(start, model_digest=bytes(32)), federation)
    for _ in range(2):
        for again in (start, earlier, zero, other_model):
            refuses(federation, 1, partial(federation.sites[1].on_round_start, again), "once")
        federation.restart(1)
    beyond = hub_signed(dataclasses.replace(start, round=6), federation)
    refuses(federation, 1, lambda: federation.sites[1].on_round_start(beyond), "no such round")


def test_false_starts_are_refused() -> None:
    federation = FOUR()
    start = federation.round(1, start_at=()).start
    cases = [
        (dataclasses.replace(start, sig=bytes(64)), "not signed by the hub"),
        (dataclasses.replace(start, model_digest=bytes(32)), "not signed by the hub"),
        (dataclasses.replace(start, state=bytes(32)), "not signed by the hub"),
        (dataclasses.replace(start, deadline=1), "not signed by the hub"),
        (records.signed(start, federation.params.man, signing_key("site 2").sign), "not signed by the hub"),
        (hub_signed(dataclasses.replace(start, man=bytes(32)), federation), "another run"),
        (hub_signed(dataclasses.replace(start, man=HIGHEST), federation), "another run"),
        (hub_signed(dataclasses.replace(start, dirh=bytes(32)), federation), "another run or directory"),
        (hub_signed(dataclasses.replace(start, dirh=HIGHEST), federation), "another run or directory"),
    ]
    for false, match in cases:
        refuses(federation, 1, partial(federation.sites[1].on_round_start, false), match)
    federation.sites[1].on_round_start(start)


def test_a_round_before_the_setup_or_with_too_few_pairs_is_refused() -> None:
    federation = Federation(4)
    start = FOUR().round(1, start_at=()).start
    refuses(federation, 1, lambda: federation.sites[1].on_round_start(start), "another run")
    for i, site in federation.sites.items():
        federation.hub.on_announce(i, site.announce())
    directory = federation.hub.directory()
    for i, site in federation.sites.items():
        federation.hub.on_pair_seeds(i, site.on_directory(directory))
    for i, site in federation.sites.items():
        federation.hub.on_confirm(i, site.on_pair_seeds(federation.hub.seeds_for(i)))
    federation.sites[1].on_confirms(federation.hub.confirms_for(1)[:1])
    federation.setup = federation.hub.outcome()
    start = federation.round(1, start_at=()).start
    refuses(federation, 1, lambda: federation.sites[1].on_round_start(start), "shares keys with 1 others")
    federation.sites[1].on_confirms(federation.hub.confirms_for(1)[:2])
    federation.sites[1].on_round_start(start)
    # A pair that was never accepted is forgotten with the setup.
    assert set(dict(federation.disks[1].state.keys)) == federation.sites[1].accepted
    assert len(federation.sites[1].accepted) == 2


def test_a_round_is_computed_once() -> None:
    federation = FOUR()
    site, q = federation.sites[1], federation.vectors(1)
    refuses(federation, 1, lambda: site.ready(*q, MODEL), "no open round")
    hub = federation.round(1)
    site.ready(*q, MODEL)
    refuses(federation, 1, lambda: site.ready(*q, MODEL), "no open round")
    federation.sites[2].ready(*federation.vectors(2), MODEL)
    again = federation.restart(2)
    refuses(federation, 2, lambda: again.ready(*q, MODEL), "restart is a dropout")
    assert hub.start.round == again.round == 1


def test_vectors_of_another_model_shape_or_size_are_refused() -> None:
    federation = FOUR()
    federation.round(1)
    site, (params, scalars) = federation.sites[1], federation.vectors(1)
    bound = int(federation.params.range / federation.params.step) + 1
    too_large = params.copy()
    too_large[2] = -bound - 1
    huge = scalars.copy()
    huge[0] = ((1 << 63) - 1) // 4 + 1
    for arguments, match in (
        ((params, scalars, bytes(32)), "another model"),
        ((params[:4], scalars, MODEL), "5 64-bit"),
        ((params, scalars[:1], MODEL), "2 64-bit"),
        ((params.astype(np.int32), scalars, MODEL), "64-bit integers"),
        ((params.astype(np.float64), scalars, MODEL), "64-bit integers"),
        ((too_large, scalars, MODEL), "past the bound"),
        ((params, huge, MODEL), "past the bound"),
    ):
        refuses(federation, 1, partial(site.ready, *arguments), match)
    site.ready(params, scalars, MODEL)


def test_a_scalar_is_bounded_so_that_the_sum_of_all_members_fits() -> None:
    federation = memory(7)()
    federation.round(1)
    site, (params, _) = federation.sites[1], federation.vectors(1)
    # Divisible by 7, so that neither one less nor one more will do.
    bound = ((1 << 63) - 1) // 7
    for value in (bound + 1, -bound - 1):
        scalars = np.array([0, value], dtype=np.int64)
        refuses(federation, 1, partial(site.ready, params, scalars, MODEL), "past the bound")
    site.ready(params, np.array([bound, -bound], dtype=np.int64), MODEL)


# Cohorts and attempts --------------------------------------------------------------------------------


def test_a_bad_cohort_is_refused() -> None:
    federation = FIVE()
    hub = federation.round(1)
    federation.ready(hub)
    good = hub.cohort()
    members = good.members
    nus = dict(members)
    site = federation.sites[2]
    cases: list[tuple[Cohort, str]] = [
        (dataclasses.replace(good, round=2), "no such round"),
        (dataclasses.replace(good, round=0), "no such round"),
        (dataclasses.replace(good, attempt=0), "attempts increase"),
        (dataclasses.replace(good, attempt=4), "attempts increase"),
        (dataclasses.replace(good, members=()), "at least 4"),
        (dataclasses.replace(good, members=(members[1],)), "at least 4"),
        (dataclasses.replace(good, members=members[:2]), "at least 4"),
        (dataclasses.replace(good, members=members[:3]), "at least 4"),
        (dataclasses.replace(good, members=(members[1],) * 5), "ascending"),
        (dataclasses.replace(good, members=(*members, members[4])), "ascending"),
        (dataclasses.replace(good, members=(*members[:2], *members[1:])), "ascending"),
        (dataclasses.replace(good, members=members[::-1]), "ascending"),
        (dataclasses.replace(good, members=(members[0], *members[2:])), "not in the cohort"),
        (dataclasses.replace(good, members=(*members, (9, bytes(32)))), "accepted pair"),
        (dataclasses.replace(good, members=(*members[:4], (9, bytes(32)))), "accepted pair"),
        (dataclasses.replace(good, members=(members[0], (2, bytes(32)), *members[2:])), "another vector"),
        (dataclasses.replace(good, members=(members[0], (2, nus[1]), *members[2:])), "another vector"),
    ]
    for bad, match in cases:
        refuses(federation, 2, partial(site.on_cohort, bad), match)
    assert site.on_cohort(good).ctx == hub.accumulator.ctx


def test_there_is_no_cohort_before_the_first_round() -> None:
    federation = FOUR()
    hub = federation.round(1, start_at=(2, 3, 4))
    federation.ready(hub, (2, 3, 4))
    zero = dataclasses.replace(hub.cohort(), round=0)
    refuses(federation, 1, lambda: federation.sites[1].on_cohort(zero), "no such round")


def test_a_cohort_with_a_peer_without_an_accepted_pair_is_refused() -> None:
    federation = Federation(4)
    for i, site in federation.sites.items():
        federation.hub.on_announce(i, site.announce())
    for i, site in federation.sites.items():
        federation.hub.on_pair_seeds(i, site.on_directory(federation.hub.directory()))
    for i, site in federation.sites.items():
        federation.hub.on_confirm(i, site.on_pair_seeds(federation.hub.seeds_for(i)))
    for i, site in federation.sites.items():
        # Hospital 1 holds a key with 4 and never hears 4's tag.
        site.on_confirms([c for c in federation.hub.confirms_for(i) if (i, c.id) != (1, 4)])
    federation.setup = federation.hub.outcome()
    hub = federation.round(1)
    federation.ready(hub)
    cohort = hub.cohort()
    assert cohort.ids == (1, 2, 3, 4)
    refuses(federation, 1, lambda: federation.sites[1].on_cohort(cohort), "without an accepted pair")
    federation.upload(hub, hub.cohort(without=(4,)))
    federation.open(hub)
    assert matches(federation, hub.finish())


def test_another_hospitals_nu_makes_another_context() -> None:
    """A hub that shows hospitals different values of nu gets masks that never cancel, and no second try."""
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    good = hub.cohort()
    split = dataclasses.replace(good, members=((1, bytes(32)), *good.members[1:]))
    contexts = {i: federation.sites[i].on_cohort(split if i == 2 else good).ctx for i in federation.ids}
    assert len(set(contexts.values())) == 2
    refuses(federation, 2, lambda: federation.sites[2].on_cohort(good), "attempts increase")
    assert not federation.sites[2].opened


def test_attempts_strictly_increase() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    members = hub.cohort().members
    site = federation.sites[1]

    def cohort(attempt: int, without: int = 0) -> Cohort:
        return Cohort(1, attempt, tuple(pair for pair in members if pair[0] != without))

    first = site.on_cohort(cohort(1))
    assert site.on_cohort(cohort(1)) == first
    refuses(federation, 1, lambda: site.on_cohort(cohort(1, 4)), "attempts increase")
    third = site.on_cohort(cohort(3, 4))
    assert third.ctx != first.ctx
    for attempt, without in ((1, 0), (2, 0), (2, 3), (3, 0), (4, 0)):
        refuses(federation, 1, lambda a=attempt, w=without: site.on_cohort(cohort(a, w)), "attempts increase")  # type: ignore[misc]
    assert site.on_cohort(cohort(3, 4)) == third
    assert (site.attempt, site.cohort) == (3, (1, 2, 3))


@pytest.mark.parametrize("dropped", [1, 2, 3, 4])
def test_a_dropout_before_upload_is_masked_away_by_a_new_attempt(dropped: int) -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    first = hub.cohort()
    for i in federation.ids:
        if i != dropped:
            federation.send_payload(hub, i, federation.sites[i].on_cohort(first))
    assert hub.missing_uploads() == (dropped,)
    with pytest.raises(RefusedError, match="have not uploaded"):
        hub.open_please()
    second = hub.cohort(without=hub.missing_uploads())
    federation.upload(hub, second)
    federation.open(hub)
    assert hub.finish().cohort == tuple(i for i in federation.ids if i != dropped)
    assert matches(federation, hub.finish())


def test_a_dropout_before_ready_leaves_it_out() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub, (1, 3, 4))
    assert hub.missing_ready() == (2,)
    federation.upload(hub, hub.cohort())
    federation.open(hub)
    assert matches(federation, hub.finish())
    # The one that missed the round takes part in the next.
    assert matches(federation, federation.whole_round(2), 2)


def test_two_attempts_of_one_vector_share_no_mask() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    cohort = hub.cohort()
    site = federation.sites[1]
    payloads = []
    for attempt in (1, 2, 3):
        site.on_cohort(dataclasses.replace(cohort, attempt=attempt))
        payloads.append(np.frombuffer(site.payload()[:24], dtype="<u4"))
    for a, b in itertools.combinations(payloads, 2):
        assert (a != b).all()


def test_dropouts_in_recovery_cost_an_attempt_each() -> None:
    """Of six, one is gone before Ready, one before the first upload, one more while the others mask again."""
    federation = memory(6, t=1, rho=0, m=4, attempts=3)()
    hub = federation.round(1)
    federation.ready(hub, (1, 2, 3, 4, 5))
    federation.upload(hub, hub.cohort(), (1, 2, 3, 4))
    assert hub.missing_uploads() == (5,)
    federation.upload(hub, hub.cohort(without=(5,)), (1, 3, 4))
    assert hub.missing_uploads() == (2,)
    with pytest.raises(RefusedError, match="have not uploaded"):
        hub.open_please()
    # One more than n - m allows: without 2 there is no cohort, and nothing has been opened.
    with pytest.raises(RefusedError, match="3 hospitals can be summed"):
        hub.cohort(without=(5, 2))
    assert not any(site.opened for site in federation.sites.values())
    # 2 is back in time for the last attempt.
    federation.upload(hub, hub.cohort(without=(5,)))
    federation.open(hub)
    assert hub.finish().cohort == (1, 2, 3, 4)
    assert matches(federation, hub.finish())
    assert matches(federation, federation.whole_round(2), 2)


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_a_dropout_before_its_opening_loses_the_round_and_no_other(left: int) -> None:
    """Gone after its upload, before R4 or instead of R5: the same to the others, who have opened in vain."""
    federation = FOUR()
    hub, _ = uploaded(federation)
    late = hub.open_please()
    federation.open(hub, [i for i in federation.ids if i != left])
    assert hub.missing_openings() == (left,)
    with pytest.raises(RefusedError, match="have not opened"):
        hub.finish()
    assert matches(federation, federation.whole_round(2), 2)
    for i in federation.ids:
        refuses(federation, i, lambda i=i: federation.sites[i].on_open_please(late), "latest upload")  # type: ignore[misc]


def test_split_views_of_the_cohort_open_one_sum_at_the_most() -> None:
    """Each hospital is told one of three cohorts of one attempt, in all 81 ways; then asked to open all."""
    federation = FOUR()
    hub = federation.round(1)
    readies = federation.ready(hub)
    views = [
        Cohort(1, 1, tuple((i, readies[i].nu) for i in ids)) for ids in ((1, 2, 3, 4), (1, 2, 3), (1, 2, 4))
    ]
    context = partial(records.context, federation.params.man, hub.start.dirh, MODEL)
    before = {i: federation.disks[i].state for i in federation.ids}
    vectors = {i: (federation.sites[i]._vectors, federation.sites[i]._seed) for i in federation.ids}
    whole = 0
    for told in itertools.product(range(3), repeat=4):
        opened: dict[bytes, set[int]] = {context(view): set() for view in views}
        for i, view in zip(federation.ids, told, strict=True):
            site = federation.sites[i] = federation.new_site(i, before[i])
            site._vectors, site._seed = vectors[i]
            if i not in views[view].ids:
                refuses(federation, i, partial(site.on_cohort, views[view]), "not in the cohort")
                continue
            site.on_cohort(views[view])
            # Opening wipes them, and they are needed again.
            site._vectors = None
            for ctx in opened:
                try:
                    opened[site.on_open_please(OpenPlease(ctx)).ctx].add(i)
                except RefusedError:
                    continue
        full = [view for view in views if opened[context(view)] == set(view.ids)]
        assert len(full) == any(all(told[i - 1] == at for i in view.ids) for at, view in enumerate(views))
        whole += len(full)
    # Everybody was told the first; or all of a smaller one were, and the fourth anything.
    assert whole == 1 + 3 + 3


# Opening ---------------------------------------------------------------------------------------------


def test_only_the_latest_upload_opens() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    site = federation.sites[1]
    refuses(federation, 1, lambda: site.on_open_please(OpenPlease(bytes(32))), "latest upload")
    cohort = hub.cohort()
    first = site.on_cohort(cohort)
    refuses(federation, 1, lambda: site.on_open_please(OpenPlease(bytes(32))), "latest upload")
    second = site.on_cohort(hub.cohort(without=(4,)))
    refuses(federation, 1, lambda: site.on_open_please(OpenPlease(first.ctx)), "latest upload")
    assert site.on_open_please(OpenPlease(second.ctx)).ctx == second.ctx
    refuses(federation, 1, lambda: site.on_open_please(OpenPlease(first.ctx)), "latest upload")


@pytest.mark.parametrize("restarted", [False, True])
def test_nothing_uploads_after_opening(restarted: bool) -> None:
    federation = FOUR()
    hub, cohort = uploaded(federation)
    payload = federation.sites[1].payload()
    header = federation.sites[1].on_cohort(cohort)
    request = hub.open_please()
    opened = federation.sites[1].on_open_please(request)
    site = federation.restart(1) if restarted else federation.sites[1]
    before = list(federation.disks[1].versions)
    assert site.on_open_please(request) == opened
    assert site.on_cohort(cohort) == header
    assert site.payload() == payload
    assert federation.disks[1].versions == before
    for attempt in (1, 2, 3):
        other = dataclasses.replace(cohort, attempt=attempt, members=cohort.members[:3])
        refuses(federation, 1, partial(site.on_cohort, other), "has been opened")


def test_opening_erases_the_round() -> None:
    federation = FOUR()
    hub = federation.round(1)
    drawn = federation.entropy[1]
    federation.ready(hub)
    seed = type(drawn)(drawn.name)
    seed.calls = drawn.calls - 1
    s = seed(32)
    federation.upload(hub, hub.cohort())
    disk = federation.disks[1]
    during = disk.state
    assert during.s == s
    round_keys = [key for _, key in during.keys]
    federation.open(hub)
    after = disk.versions[-1]
    assert s not in after
    assert not any(key in after for key in round_keys)
    assert dict(disk.state.keys) == {i: keys.ratchet(key, 1) for i, key in during.keys}
    site = federation.sites[1]
    assert s not in vars(site).values()
    assert site._vectors is None
    assert not any(s in version for version in disk.versions[:-2])


def test_the_vectors_are_never_stored() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    q = [vector.astype("<u4" if vector.size == 5 else "<u8").tobytes() for vector in federation.vectors(1)]
    federation.upload(hub, hub.cohort())
    federation.open(hub)
    assert not any(part in version for part in q for version in federation.disks[1].versions)


def test_the_vectors_in_memory_are_wiped() -> None:
    federation = FOUR()
    hub = federation.round(1)
    federation.ready(hub)
    held = federation.sites[1]._vectors
    assert held is not None
    assert held[0].any()
    federation.upload(hub, hub.cohort())
    federation.open(hub)
    assert not held[0].any()
    assert not held[1].any()


def test_earlier_rounds_are_erased() -> None:
    federation = FOUR()
    hub, _ = uploaded(federation, 1)
    federation.open(hub, (1, 2))
    late = hub.open_please()
    secrets: dict[int, list[bytes]] = {}
    for i in (1, 3):
        state = federation.disks[i].state
        assert state.header is not None
        b = state.opened.b if state.opened else keys.self_seed(state.s, state.header.ctx)
        secrets[i] = [b, state.payload[:16]]
        if state.opened is None:
            secrets[i] += [state.s, *(key for _, key in state.keys)]
    assert [len(values) for values in secrets.values()] == [2, 6]
    federation.round(2)
    for i, values in secrets.items():
        now = federation.disks[i].versions[-1]
        assert not any(value in now for value in values)
        # A lost round stays lost: its late opening is refused.
        refuses(federation, i, lambda i=i: federation.sites[i].on_open_please(late), "latest upload")  # type: ignore[misc]
        refuses(federation, i, lambda i=i: federation.sites[i].payload(), "no upload")  # type: ignore[misc]


def test_what_a_lost_round_left_in_memory_is_wiped_when_the_next_begins() -> None:
    federation = FOUR()
    federation.ready(federation.round(1))
    held = federation.sites[1]._vectors
    assert held is not None
    assert matches(federation, federation.whole_round(2), 2)
    assert not any(words.any() for words in held)


def test_results_are_checked() -> None:
    federation = FOUR()
    hub, _ = uploaded(federation)
    result = Result(hub.accumulator.ctx, bytes(32), bytes(32))
    refuses(
        federation,
        1,
        lambda: federation.sites[1].on_result(hub_signed(result, federation)),
        "than the one opened",
    )
    federation.open(hub)
    good = hub.result(MODEL)
    federation.sites[1].on_result(good)
    refuses(
        federation,
        1,
        lambda: federation.sites[1].on_result(dataclasses.replace(good, sig=bytes(64))),
        "not signed",
    )
    for ctx in (bytes(32), HIGHEST):
        other = hub_signed(dataclasses.replace(good, ctx=ctx), federation)
        refuses(federation, 1, partial(federation.sites[1].on_result, other), "than the one opened")


def test_split_views_of_the_model_never_meet_in_one_context() -> None:
    """Hospital 4 is given another model: no cohort makes its masks and those of the others cancel."""
    federation = FOUR()
    hub = federation.round(1, start_at=(1, 2, 3))
    federation.ready(hub, (1, 2, 3))
    other = b"\x09" * 32
    split = federation.round(1, start_at=(4,), model=other)
    lone = federation.sites[4].ready(*federation.vectors(4), other)
    with pytest.raises(RefusedError, match="another round or model"):
        hub.on_ready(4, lone)
    assert split.start.model_digest == other
    members = tuple(sorted([(i, hub._ready[i].nu) for i in (1, 2, 3)] + [(4, lone.nu)]))
    contexts = {i: federation.sites[i].on_cohort(Cohort(1, 1, members)).ctx for i in federation.ids}
    assert contexts[1] == contexts[2] == contexts[3] != contexts[4]


def test_two_runs_of_the_same_hospitals_share_no_key_and_take_no_message() -> None:
    """A newer study beside an older one, of which a round is still unopened."""
    older = Federation(4, "older", man=bytes(32))
    newer = Federation(4, "newer", man=b"\x01" * 32)
    for federation in (older, newer):
        federation.pair()
    hub, cohort = uploaded(older)
    new_hub, new_cohort = uploaded(newer)
    for i in older.ids:
        mine, others = older.disks[i].state, newer.disks[i].state
        assert not {key for _, key in mine.keys} & {key for _, key in others.keys}
        assert mine.s != others.s
        for call in (
            partial(newer.sites[i].on_directory, older.hub.directory()),
            partial(newer.sites[i].on_pair_seeds, older.hub.seeds_for(i)),
            partial(newer.sites[i].on_round_start, hub.start),
            partial(newer.sites[i].on_cohort, cohort),
            partial(newer.sites[i].on_open_please, OpenPlease(hub.accumulator.ctx)),
        ):
            refuses(newer, i, call, ".")
    newer.open(new_hub)
    assert matches(newer, new_hub.finish())
    assert new_cohort.ids == cohort.ids
    # The late opening of the older run gives the sum that was asked for, and nothing of the newer one.
    older.open(hub)
    assert matches(older, hub.finish())
    b = {hub.accumulator.openings[i].b for i in older.ids}
    assert not b & {new_hub.accumulator.openings[i].b for i in newer.ids}


@pytest.mark.parametrize("same_vector", [True, False])
def test_a_clone_with_the_same_randomness_uses_no_mask_twice(same_vector: bool) -> None:
    """A copy of a whole machine, its generator included: the same bytes, or another context with other masks."""
    federation = FOUR()
    hub = federation.round(1, start_at=(2, 3, 4))
    readies = federation.ready(hub, (2, 3, 4))
    state, (params, scalars) = federation.disks[1].state, federation.vectors(1)
    found = []
    for change in (0, 0 if same_vector else 1):
        federation.entropy[1] = Counter("cloned")
        site = federation.new_site(1, state)
        site.on_round_start(hub.start)
        nu = site.ready(params + change, scalars, MODEL).nu
        members = tuple(sorted([(1, nu), *((i, ready.nu) for i, ready in readies.items())]))
        header = site.on_cohort(Cohort(1, 1, members))
        found.append((nu, header, np.frombuffer(site.payload()[:24], dtype="<u4")))
    (nu, header, words), (other_nu, other, other_words) = found
    assert federation.entropy[1].calls == 1
    assert (nu == other_nu) == (header == other) == (header.ctx == other.ctx) == same_vector
    # What a hub would learn from one mask on two vectors: their difference.
    assert ((other_words - words) == 0).all() == same_vector
    assert same_vector or (other_words - words != 1).all()


def test_every_keystream_of_a_run_has_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five hospitals, three rounds, of which the second has three attempts: who applies which key, and how."""
    applied: list[tuple[tuple[bytes, ...], tuple[bytes, ...]]] = []
    apply_keystreams = masks.apply_keystreams

    def note(words: Any, added: Any, subtracted: Any = ()) -> None:
        applied.append((tuple(added), tuple(subtracted)))
        apply_keystreams(words, added, subtracted)

    monkeypatch.setattr(masks, "apply_keystreams", note)
    federation = FIVE()
    seeds: list[tuple[bytes, bytes]] = []
    attempts = 0
    for number in (1, 2, 4):
        hub = federation.round(number)
        federation.ready(hub)
        for _ in range(3 if number == 2 else 1):
            federation.upload(hub, hub.cohort())
            attempts += 1
            seeds += [(federation.disks[i].state.s, hub.accumulator.ctx) for i in federation.ids]
        federation.open(hub)
        hub.finish()
    # A hospital adds its self-mask first; the hub only subtracts.
    own = [added[0] for added, _ in applied if added]
    pair_added = [key for added, _ in applied for key in added[1:]]
    pair_subtracted = [key for added, subtracted in applied if added for key in subtracted]
    taken_off = [key for added, subtracted in applied if not added for key in subtracted]
    assert len(own) == attempts * 5 * 2
    assert len(pair_added) == attempts * 10 * 2
    # Each pair mask is added by one and subtracted by the other, once; what comes off was put on.
    assert sorted(pair_added) == sorted(pair_subtracted)
    assert set(taken_off) < set(own)
    noise = [
        keys.noise_key(s, ctx, vector, block)
        for s, ctx in seeds
        for vector in keys.VECTORS
        for block in range(3)
    ]
    every = [*own, *pair_added, *noise]
    assert len(set(every)) == len(every) == attempts * (5 * 2 + 10 * 2 + 5 * 2 * 3)


FUZZED = FOUR()
_hub, _ = uploaded(FUZZED)


@settings(max_examples=120, deadline=None)
@given(st.one_of([a_record(record_type) for record_type in ALL]))
def test_fuzzed_messages_never_crash_and_never_open(record: Record) -> None:
    site, disk = FUZZED.sites[1], FUZZED.disks[1]
    before = list(disk.versions)
    methods: dict[type[Record], Callable[[Any], object]] = {
        records.Directory: site.on_directory,
        records.PairSeed: lambda r: site.on_pair_seeds([r]),
        records.Tag: lambda r: site.on_confirms([r]),
        records.RoundStart: site.on_round_start,
        records.Cohort: site.on_cohort,
        records.OpenPlease: site.on_open_please,
        records.Result: site.on_result,
    }
    hub: dict[type[Record], Callable[[Any], object]] = {
        records.KeyAnnounce: lambda r: FUZZED.hub.on_announce(1, r),
        records.PairSeed: lambda r: FUZZED.hub.on_pair_seeds(1, [r]),
        records.Confirm: lambda r: FUZZED.hub.on_confirm(1, r),
        records.Ready: lambda r: _hub.on_ready(1, r),
        records.Upload: lambda r: _hub.on_upload(1, r),
        records.Open: lambda r: _hub.on_open(1, r),
    }
    for table in (methods, hub):
        method = table.get(type(record))
        if isinstance(record, records.Tag) and record.id in site.accepted:
            # No signature tells that it is false, and after the setup it changes nothing.
            assert site.on_confirms([record]) == site.accepted == {2, 3, 4}
        elif method is not None:
            with pytest.raises((RefusedError, VerificationError)):
                method(record)
    assert disk.versions == before
    assert not site.opened
