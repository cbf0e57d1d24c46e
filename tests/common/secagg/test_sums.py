"""One context's sum: each chunk once, tampering refused, false openings refused, recomputable."""

import dataclasses
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import digest
from common.errors import FailureError, RefusedError, VerificationError, WardroundError
from common.secagg import keys, records
from common.secagg.codec import CHUNK_BYTES, Words
from common.secagg.hub import HubRound
from common.secagg.masks import apply_keystreams, remove_self_masks
from common.secagg.records import Cohort, Open, Upload
from common.secagg.sums import Accumulator, Sums, recompute
from tests.common.secagg.federation import Federation, matches, memory, signing_key

FOUR = memory(4)
# Four chunks: three of the parameters and one of the scalars.
LONG = memory(3, parameters=2 * CHUNK_BYTES // 4 + 7)


def masked(federation: Federation) -> tuple[HubRound, Cohort, dict[int, Upload], dict[int, list[bytes]]]:
    """A round whose uploads are made and not yet sent: headers and chunks by hospital."""
    hub = federation.round(1)
    federation.ready(hub)
    cohort = hub.cohort()
    headers, chunks = {}, {}
    for i in cohort.ids:
        headers[i] = federation.sites[i].on_cohort(cohort)
        payload = federation.sites[i].payload()
        chunks[i] = [payload[span.start : span.stop] for span in federation.params.layout.spans]
    return hub, cohort, headers, chunks


def test_each_chunk_counts_once() -> None:
    """From several threads, in any order, each chunk sent three times."""
    federation = LONG()
    hub, _, headers, chunks = masked(federation)
    for i, header in headers.items():
        hub.on_upload(i, header)
        hub.on_upload(i, header)
    work = [(i, index) for i in headers for index in range(4)] * 3
    random.Random(7).shuffle(work)
    failures: list[BaseException] = []

    def send(part: list[tuple[int, int]]) -> None:
        try:
            for i, index in part:
                hub.on_chunk(i, index, chunks[i][index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(work[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hub.missing_uploads() == ()
    federation.open(hub)
    sums = hub.finish()
    vectors = [federation.vectors(i) for i in federation.ids]
    assert (sums.parameters == sum(v[0] for v in vectors)).all()
    assert (sums.scalars == sum(v[1] for v in vectors)).all()


def test_an_interrupted_upload_resumes_at_the_missing_chunks() -> None:
    federation = LONG()
    hub, _, headers, chunks = masked(federation)
    with pytest.raises(RefusedError, match="no header"):
        hub.missing_chunks(1)
    with pytest.raises(RefusedError, match="no header"):
        hub.on_chunk(1, 0, chunks[1][0])
    hub.on_upload(1, headers[1])
    hub.on_chunk(1, 2, chunks[1][2])
    hub.on_chunk(1, 0, chunks[1][0])
    assert hub.missing_chunks(1) == (1, 3)
    assert hub.missing_uploads() == (1, 2, 3)
    hub.on_upload(1, headers[1])
    assert hub.missing_chunks(1) == (1, 3)
    for index in hub.missing_chunks(1):
        hub.on_chunk(1, index, chunks[1][index])
    assert hub.missing_uploads() == (2, 3)


def test_a_tampered_chunk_is_refused() -> None:
    federation = LONG()
    hub, _, headers, chunks = masked(federation)
    for i, header in headers.items():
        hub.on_upload(i, header)
    good = chunks[1]
    flipped = bytes([good[0][0] ^ 1]) + good[0][1:]
    cases: list[tuple[int, bytes, str]] = [
        (0, flipped, "altered"),
        (0, good[1], "altered"),
        (1, good[0], "altered"),
        (0, chunks[2][0], "altered"),
        (0, good[0][:-1], "bytes"),
        (0, good[0] + b"\x00", "bytes"),
        (0, b"", "bytes"),
        (3, good[2], "bytes"),
        (2, good[3], "bytes"),
        (-1, good[3], "0 to 3"),
        (4, good[3], "0 to 3"),
        (5, good[3], "0 to 3"),
        (True, good[1], "0 to 3"),
    ]
    for index, data, match in cases:
        with pytest.raises(VerificationError, match=match):
            hub.on_chunk(1, index, data)
    for i in headers:
        for index, chunk in enumerate(chunks[i]):
            hub.on_chunk(i, index, chunk)
            if i == 2:
                # What was refused before is refused after as well, and changes nothing.
                with pytest.raises(VerificationError):
                    hub.on_chunk(1, 0, flipped)
    federation.open(hub)
    vectors = [federation.vectors(i) for i in federation.ids]
    assert (hub.finish().parameters == sum(v[0] for v in vectors)).all()


def resigned(header: Upload, federation: Federation, i: int, **changes: object) -> Upload:
    record = dataclasses.replace(header, **changes)  # type: ignore[arg-type]
    return records.signed(record, federation.params.man, signing_key(f"site {i}").sign)


def test_false_headers_are_refused() -> None:
    federation = FOUR()
    hub, _, headers, _ = masked(federation)
    good = headers[1]
    fewer, more = good.chunk_digests[:1], (*good.chunk_digests, bytes(32))
    cases: list[tuple[int, Upload, str]] = [
        (2, good, "another context or name"),
        (1, headers[2], "another context or name"),
        (9, good, "another context or name"),
        (1, resigned(good, federation, 1, ctx=bytes(32)), "another context or name"),
        (1, resigned(good, federation, 1, ctx=b"\xff" * 32), "another context or name"),
        (1, dataclasses.replace(good, commit=bytes(32)), "not signed"),
        (1, resigned(good, federation, 2), "not signed"),
        (1, resigned(good, federation, 1, payload_digest=bytes(32)), "payload digest"),
        (1, resigned(good, federation, 1, chunk_digests=good.chunk_digests[::-1]), "payload digest"),
        (
            1,
            resigned(good, federation, 1, chunk_digests=fewer, payload_digest=records.payload_digest(fewer)),
            "2 chunks",
        ),
        (
            1,
            resigned(good, federation, 1, chunk_digests=more, payload_digest=records.payload_digest(more)),
            "2 chunks",
        ),
    ]
    for sender, header, match in cases:
        with pytest.raises(WardroundError, match=match):
            hub.on_upload(sender, header)
    assert dict(hub.accumulator.headers) == {}
    hub.on_upload(1, good)
    swapped = good.chunk_digests[::-1]
    second = resigned(
        good, federation, 1, chunk_digests=swapped, payload_digest=records.payload_digest(swapped)
    )
    with pytest.raises(RefusedError, match="two payloads"):
        hub.on_upload(1, second)
    assert dict(hub.accumulator.headers) == {1: good}


def sent(federation: Federation) -> tuple[HubRound, dict[int, Upload]]:
    hub, _, headers, chunks = masked(federation)
    for i, header in headers.items():
        hub.on_upload(i, header)
        for index, chunk in enumerate(chunks[i]):
            hub.on_chunk(i, index, chunk)
    return hub, headers


def test_a_wrong_opening_is_refused() -> None:
    federation = FOUR()
    hub, _, headers, chunks = masked(federation)
    opening = Open(1, headers[1].ctx, bytes(32))
    with pytest.raises(RefusedError, match="all of its cohort"):
        hub.accumulator.open(1, opening)
    with pytest.raises(RefusedError, match="no opening"):
        hub.on_open(1, opening)
    for i, header in headers.items():
        hub.on_upload(i, header)
        for index, chunk in enumerate(chunks[i]):
            hub.on_chunk(i, index, chunk)
    request = hub.open_please()
    good = {i: federation.sites[i].on_open_please(request) for i in federation.ids}
    man = federation.params.man
    false_b = records.signed(dataclasses.replace(good[1], b=b"\x01" * 32), man, signing_key("site 1").sign)
    for sender, record, match in (
        (2, good[1], "another context or name"),
        (1, good[2], "another context or name"),
        (9, good[1], "all of its cohort"),
        (1, dataclasses.replace(good[1], ctx=bytes(32)), "another context or name"),
        (1, dataclasses.replace(good[1], ctx=b"\xff" * 32), "another context or name"),
        (1, dataclasses.replace(good[1], b=bytes(32)), "not signed"),
        (1, false_b, "another seed than it committed to"),
    ):
        with pytest.raises(WardroundError, match=match):
            hub.on_open(sender, record)
    assert hub.missing_openings() == (1, 2, 3, 4)
    with pytest.raises(RefusedError, match="have not opened"):
        hub.finish()
    for i, record in good.items():
        hub.on_open(i, record)
        hub.on_open(i, record)
    assert matches(federation, hub.finish())
    assert dict(hub.accumulator.openings) == good


def test_a_void_sum_is_refused() -> None:
    """A hospital that garbles its payload under its own signature: no sum, and nobody is named."""
    for parts in ((0,), (1,), (0, 1)):
        federation = FOUR()
        hub, _, headers, chunks = masked(federation)
        garbled = list(chunks[1])
        for part in parts:
            garbled[part] = garbled[part][:-1] + bytes([garbled[part][-1] ^ 1])
        digests = tuple(digest("chunk", chunk) for chunk in garbled)
        false = resigned(
            headers[1], federation, 1, chunk_digests=digests, payload_digest=records.payload_digest(digests)
        )
        for i in federation.ids:
            hub.on_upload(i, false if i == 1 else headers[i])
            for index, chunk in enumerate(garbled if i == 1 else chunks[i]):
                hub.on_chunk(i, index, chunk)
        federation.open(hub)
        with pytest.raises(FailureError, match="void"):
            hub.finish()
        with pytest.raises(FailureError, match="void"):
            hub.result(bytes(32))


def test_the_self_masks_come_off_once() -> None:
    """At the first of several calls at the same time; every one gives the same sum."""
    federation = LONG()
    hub, _ = sent(federation)
    federation.open(hub)
    accumulator, start = hub.accumulator, threading.Barrier(4)
    found: list[Sums] = []

    def finish() -> None:
        start.wait(10)
        found.append(accumulator.finish())

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {sums.digest for sums in found} == {accumulator.finish().digest}
    vectors = [federation.vectors(i) for i in federation.ids]
    assert (found[0].parameters == sum(v[0] for v in vectors)).all()
    assert (found[0].scalars == sum(v[1] for v in vectors)).all()


def test_a_removal_that_fails_halfway_leaves_a_void_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the last words are those of a sum: the words before them are not."""
    federation = FOUR()
    hub, _ = sent(federation)
    federation.open(hub)

    def half(params: Words, scalars: Words, seeds: list[bytes], ctx: bytes) -> None:
        assert len(seeds) == 4
        params[-1] = scalars[-1] = 4
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("common.secagg.sums.remove_self_masks", half)
        with pytest.raises(MemoryError):
            hub.finish()
    for _ in range(2):
        with pytest.raises(FailureError, match="void"):
            hub.finish()


def test_nothing_is_known_before_the_last_opening() -> None:
    federation = FOUR()
    hub, headers = sent(federation)
    federation.open(hub, (1, 2, 3))
    expected = federation.expected(federation.ids)[0]
    ctx = headers[1].ctx
    plain, scalars = hub.accumulator._params_sum.copy(), hub.accumulator._scalars_sum.copy()
    remove_self_masks(plain, scalars, [hub.accumulator.openings[i].b for i in (1, 2, 3)], ctx)
    # What is left then is exactly the self-mask of hospital 4, on every word.
    assert (plain[:-1] != [v % 2**32 for v in expected]).all()
    remove_self_masks(plain, scalars, [keys.self_seed(federation.disks[4].state.s, ctx)], ctx)
    assert plain.tolist() == [*(v % 2**32 for v in expected), 4]


def test_all_but_two_together_with_the_hub_learn_the_sum_of_the_two() -> None:
    """The colluders 3 and 4 give the hub their keys: on 1 and 2 stays the one mask that only they share."""
    federation = FOUR()
    _, cohort, headers, _ = masked(federation)
    ctx = headers[1].ctx
    states = {i: federation.disks[i].state for i in federation.ids}
    left = {}
    for i in (1, 2):
        words = np.frombuffer(federation.sites[i].payload()[:24], dtype="<u4").copy()
        known = [keys.mask_key(dict(states[c].keys)[i], "params", ctx) for c in (3, 4)]
        b = keys.self_seed(states[i].s, ctx)
        apply_keystreams(words, [], [*known, keys.self_mask_key(b, "params", ctx)])
        left[i] = words
    shared = keys.mask_key(dict(states[1].keys)[2], "params", ctx)
    both = left[1] + left[2]
    assert both.tolist() == [*(v % 2**32 for v in federation.expected((1, 2))[0]), 2]
    for i, sign in ((1, [shared]), (2, [])):
        plain = left[i].copy()
        assert (plain[:-1] != [v % 2**32 for v in federation.vectors(i)[0].tolist()]).all()
        apply_keystreams(plain, [] if i == 1 else [shared], sign)
        assert plain.tolist() == [*(v % 2**32 for v in federation.vectors(i)[0].tolist()), 1]
    assert cohort.ids == federation.ids


def test_an_auditor_recomputes_the_sum() -> None:
    federation = FOUR()
    hub, headers = sent(federation)
    federation.open(hub)
    cohort = Cohort(1, 1, tuple((i, hub._ready[i].nu) for i in federation.ids))
    openings, ctx = dict(hub.accumulator.openings), hub.accumulator.ctx
    payloads = {i: federation.sites[i].payload() for i in federation.ids}

    def again(
        headers: dict[int, Upload] = headers,
        payloads: dict[int, bytes] = payloads,
        openings: dict[int, Open] = openings,
    ) -> Sums:
        return recompute(federation.params, cohort, ctx, headers, openings, payloads.__getitem__)

    sums = again()
    assert sums.digest == hub.finish().digest == hub.result(bytes(32)).sum_digest
    assert matches(federation, sums)
    header, payload, opening = headers[2], payloads[2], openings[2]
    false: list[tuple[Callable[[], object], str]] = [
        (lambda: again({i: h for i, h in headers.items() if i != 2}), "all of its cohort"),
        (lambda: again(openings={i: o for i, o in openings.items() if i != 2}), "have not opened"),
        (lambda: again(payloads={**payloads, 2: payload[:-1]}), "another length"),
        (lambda: again(payloads={**payloads, 2: payload + b"\x00"}), "another length"),
        (lambda: again(payloads={**payloads, 2: b"\x00" * len(payload)}), "altered"),
        (lambda: again({**headers, 2: dataclasses.replace(header, commit=bytes(32))}), "not signed"),
        (lambda: again(openings={**openings, 2: dataclasses.replace(opening, b=bytes(32))}), "not signed"),
        (lambda: again({**headers, 2: headers[3]}), "another context or name"),
        (lambda: again({**headers, 9: headers[3]}, {**payloads, 9: payload}), "another context or name"),
    ]
    for wrong, match in false:
        with pytest.raises(WardroundError, match=match):
            wrong()


class Held(bytes):
    """A payload that knows how many of its kind there are."""

    alive = most = 0

    def __init__(self, _data: bytes) -> None:
        Held.alive += 1
        Held.most = max(Held.most, Held.alive)

    def __del__(self) -> None:
        Held.alive -= 1


def test_an_auditor_holds_one_payload_at_a_time() -> None:
    asked: list[int] = []

    def payload(member: int) -> bytes:
        asked.append(member)
        return Held(b"".join(EXAMPLE_CHUNKS[member]))

    sums = recompute(EXAMPLE.params, *EXAMPLE_ATTEMPT, EXAMPLE_HEADERS, EXAMPLE_OPENINGS, payload)
    assert matches(EXAMPLE, sums)
    assert asked == [1, 2, 3, 4]
    assert (Held.alive, Held.most) == (0, 1)


@settings(max_examples=40, deadline=None)
@given(st.permutations([(i, index) for i in (1, 2, 3, 4) for index in (0, 1)]))
def test_the_order_of_arrival_does_not_matter(order: list[tuple[int, int]]) -> None:
    accumulator = Accumulator(EXAMPLE.params, *EXAMPLE_ATTEMPT)
    for i, header in EXAMPLE_HEADERS.items():
        accumulator.add_header(i, header)
    for i, index in order:
        assert accumulator.missing_uploads()
        accumulator.add_chunk(i, index, EXAMPLE_CHUNKS[i][index])
    for i, opening in EXAMPLE_OPENINGS.items():
        accumulator.open(i, opening)
    assert matches(EXAMPLE, accumulator.finish())


EXAMPLE = FOUR()
_hub, _cohort, EXAMPLE_HEADERS, EXAMPLE_CHUNKS = masked(EXAMPLE)
EXAMPLE_ATTEMPT = (_cohort, _hub.accumulator.ctx)
EXAMPLE_OPENINGS = {
    i: EXAMPLE.sites[i].on_open_please(records.OpenPlease(_hub.accumulator.ctx)) for i in EXAMPLE.ids
}


def test_an_abandoned_attempt_keeps_nothing() -> None:
    federation = FOUR()
    hub, cohort, headers, chunks = masked(federation)
    hub.on_upload(1, headers[1])
    first = hub.accumulator
    second = hub.cohort()
    assert hub.accumulator is not first
    assert second == dataclasses.replace(cohort, attempt=2)
    calls: list[Callable[[], object]] = [
        lambda: hub.on_upload(1, headers[1]),
        lambda: hub.on_chunk(1, 0, chunks[1][0]),
        lambda: hub.missing_chunks(1),
    ]
    for call in calls:
        with pytest.raises(RefusedError):
            call()
