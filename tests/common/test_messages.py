"""Requests and replies: only the bytes that the encoder makes are read."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages
from common.encoding import labelled
from common.errors import VerificationError
from common.messages import KINDS, Kind, Reply, Request
from common.secagg import records
from common.secagg.records import Record
from tests.common.secagg.strategies import ALL, a_record

DECIDED = (messages.STUDY, messages.CONSENT)
digests = st.binary(min_size=32, max_size=32)


def zero(column: records.Integer | records.Fixed | records.ListOf) -> Any:
    if isinstance(column, records.ListOf):
        return ()
    return 0 if isinstance(column, records.Integer) else bytes(column.size_bytes)


EXAMPLES = {record: record(*(zero(column) for _, column in record.COLUMNS)) for record in ALL}


def some(record: type[Record] | None, many: bool) -> st.SearchStrategy[tuple[Record, ...]]:
    if record is None:
        return st.just(())
    return st.lists(a_record(record), min_size=0 if many else 1, max_size=3 if many else 1).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.sampled_from(list(KINDS.values())))
    document = draw(st.binary(min_size=1, max_size=50)) if kind is messages.STUDY else b""
    return Request(kind, draw(digests), draw(some(kind.request, kind.many_requests)), document)


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    kind = draw(st.sampled_from(list(KINDS.values())))
    if draw(st.booleans()):
        return Reply(kind, available=False)
    decision = draw(st.sampled_from(messages.DECISIONS)) if kind in DECIDED else ""
    return Reply(kind, True, draw(some(kind.reply, kind.many_replies)), decision)


def mutations(data: bytes, draw: st.DrawFn) -> bytes:
    """The bytes with one of them changed, one less, or one more."""
    at = draw(st.integers(0, len(data) - 1))
    changed = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    return draw(
        st.sampled_from([changed, data[:at] + data[at + 1 :], data[:at] + b"\0" + data[at:], data + b"\0"])
    )


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_decoding_is_exact(data: st.DataObject) -> None:
    request = data.draw(requests())
    body = messages.encode_request(request)
    kind = request.kind.message_type
    assert messages.decode_request(kind, body) == request
    for other in KINDS:
        if other != kind:
            with pytest.raises(VerificationError):
                messages.decode_request(other, body)
    altered = mutations(body, data.draw)
    try:
        read = messages.decode_request(kind, altered)
    except VerificationError:
        return
    # Other bytes may be another request, but never another form of the same.
    assert altered == messages.encode_request(read)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_decoding_replies_is_exact(data: st.DataObject) -> None:
    reply = data.draw(replies())
    body = messages.encode_reply(reply)
    kind = reply.kind.message_type
    assert messages.decode_reply(kind, body) == reply
    for other in KINDS:
        if other != kind:
            with pytest.raises(VerificationError):
                messages.decode_reply(other, body)
    altered = mutations(body, data.draw)
    try:
        read = messages.decode_reply(kind, altered)
    except VerificationError:
        return
    assert altered == messages.encode_reply(read)


@given(st.sampled_from(list(KINDS)), st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(kind: str, body: bytes) -> None:
    for decode in (messages.decode_request, messages.decode_reply):
        with pytest.raises(VerificationError):
            decode(kind, body)


@pytest.mark.parametrize("kind", ["", "query.nothing", "train", "QUERY.STUDY"])
def test_an_unknown_kind_is_refused(kind: str) -> None:
    for decode in (
        messages.kind_of,
        lambda k: messages.decode_request(k, b""),
        lambda k: messages.decode_reply(k, b""),
    ):
        with pytest.raises(VerificationError, match="is not a kind of message"):
            decode(kind)


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_unavailable_says_nothing_else(kind: Kind) -> None:
    body = messages.encode_reply(Reply(kind, available=False))
    # Records and a decision that the caller left in are not sent.
    filled = Reply(kind, False, (records.OpenPlease(bytes(32)),), "denied")
    assert messages.encode_reply(filled) == body == labelled("reply/" + kind.message_type, b"unavailable")
    with pytest.raises(VerificationError):
        messages.decode_reply(kind.message_type, labelled("reply/" + kind.message_type, b"unavailable", b""))


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_counts_of_records_are_those_of_the_table(kind: Kind) -> None:
    cohort = records.encode(records.OpenPlease(bytes(32)))
    for what, record, many in (
        ("request", kind.request, kind.many_requests),
        ("reply", kind.reply, kind.many_replies),
    ):
        document = b"x" if kind is messages.STUDY else b""
        decision = b"received" if kind in DECIDED else b""
        head = (bytes(32), document) if what == "request" else (b"ok", decision)
        decode: Any = messages.decode_request if what == "request" else messages.decode_reply
        allowed = 0 if record is None else messages.MAX_RECORDS if many else 1
        required = 1 if record is not None and not many else 0
        for count in {required - 1, allowed + 1} - {-1}:
            body = labelled(f"{what}/{kind.message_type}", *head, *[cohort] * count)
            with pytest.raises(VerificationError, match=f"holds {count} records"):
                decode(kind.message_type, body)
        for count in {required, allowed}:
            good = [EXAMPLES[record]] * count if record else []
            body = labelled(f"{what}/{kind.message_type}", *head, *map(records.encode, good))
            assert decode(kind.message_type, body).records == tuple(good)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_request_names_its_manifest(size: int) -> None:
    with pytest.raises(VerificationError, match="manifest digest"):
        messages.decode_request("query.keys", labelled("request/query.keys", bytes(size), b""))
    with pytest.raises(VerificationError, match="manifest digest"):
        messages.decode_request("query.keys", labelled("request/query.keys", bytes(32)))


def test_a_document_belongs_to_the_offer_alone() -> None:
    for kind, document in (("query.keys", b"x"), ("query.study", b"")):
        with pytest.raises(VerificationError, match="document"):
            messages.decode_request(kind, labelled("request/" + kind, bytes(32), document))


@pytest.mark.parametrize("decision", [b"", b"APPROVED", b"maybe", b"\xff", b"approved "])
def test_a_decision_is_one_of_three_words(decision: bytes) -> None:
    with pytest.raises(VerificationError, match="no such decision"):
        messages.decode_reply("query.study", labelled("reply/query.study", b"ok", decision))
    with pytest.raises(VerificationError):
        messages.decode_reply("query.close", labelled("reply/query.close", b"ok", b"approved"))


def test_a_reply_is_available_with_a_decision_unless_it_says_otherwise() -> None:
    reply = Reply(messages.KEYS, records=(EXAMPLES[records.KeyAnnounce],))
    assert messages.decode_reply("query.keys", messages.encode_reply(reply)) == reply
    for parts in ((), (b"ok",), (b"",), (b"fine", b"")):
        with pytest.raises(VerificationError, match="'ok' or 'unavailable'"):
            messages.decode_reply("query.close", labelled("reply/query.close", *parts))


def test_the_run_of_a_request_is_read_or_empty() -> None:
    man = bytes(range(32))
    body = messages.encode_request(Request(messages.KEYS, man))
    assert messages.run_of("query.keys", body) == man.hex()
    for kind, other in (
        ("query.close", body),
        ("query.nothing", body),
        ("query.keys", b""),
        ("query.keys", body[:-1]),
        ("query.keys", labelled("request/query.keys")),
        ("query.keys", labelled("request/query.keys", man[:-1], b"")),
        ("query.keys", labelled("request/query.keys", man + b"\0", b"")),
    ):
        assert messages.run_of(kind, other) == ""
