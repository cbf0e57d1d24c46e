"""Records: one strict byte form each, and signatures over every column."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import labelled, split_labelled
from common.errors import VerificationError
from common.secagg import records
from common.secagg.records import Fixed, Integer, Record, decode, encode
from tests.common.secagg.federation import public, signing_key
from tests.common.secagg.reference import hash_of
from tests.common.secagg.strategies import ALL, a_record, values

MAN = bytes(range(32))


any_record = st.one_of([a_record(record_type) for record_type in ALL])


@settings(max_examples=150, deadline=None)
@given(any_record, st.data())
def test_encoding_is_canonical(record: Record, data: st.DataObject) -> None:
    encoded = encode(record)
    assert decode(type(record), encoded) == record
    damage = data.draw(st.sampled_from(["flip", "cut", "extend", "insert"]))
    at = data.draw(st.integers(0, len(encoded) - 1))
    if damage == "flip":
        other = encoded[:at] + bytes([encoded[at] ^ data.draw(st.integers(1, 255))]) + encoded[at + 1 :]
    elif damage == "cut":
        other = encoded[:at]
    elif damage == "extend":
        other = encoded + bytes(data.draw(st.integers(1, 9)))
    else:
        other = encoded[:at] + b"\x00" + encoded[at:]
    try:
        read = decode(type(record), other)
    except VerificationError:
        return
    # What is read from other bytes is another record, whose only bytes these are.
    assert read != record or other == encoded
    assert encode(read) == other


@pytest.mark.parametrize("record_type", ALL)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_every_part_has_its_width(record_type: type[Record], data: st.DataObject) -> None:
    """A shorter number is the same number: it must not be read all the same."""
    label = "record/" + record_type.__name__
    parts = split_labelled(label, encode(data.draw(a_record(record_type))), "record")
    for at, part in enumerate(parts):
        for other in (part[:-1], part + b"\0"):
            with pytest.raises(VerificationError):
                decode(record_type, labelled(label, *parts[:at], other, *parts[at + 1 :]))


@pytest.mark.parametrize("record_type", ALL)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_another_type_is_refused(record_type: type[Record], data: st.DataObject) -> None:
    encoded = encode(data.draw(a_record(record_type)))
    for other in ALL:
        if other is not record_type:
            with pytest.raises(VerificationError, match="label"):
                decode(other, encoded)


@settings(max_examples=150, deadline=None)
@given(any_record, st.data())
def test_records_are_strict(record: Record, data: st.DataObject) -> None:
    name, column = data.draw(st.sampled_from(record.COLUMNS))
    if isinstance(column, Integer):
        wrong: list[Any] = [-1, 1 << 8 * column.size_bytes, True, 1.0, "1", None, b"\x01"]
    elif isinstance(column, Fixed):
        wrong = [
            b"",
            bytes(column.size_bytes - 1),
            bytes(column.size_bytes + 1),
            bytearray(column.size_bytes),
            "",
        ]
    else:
        wrong = [None, [], (None,), ((),), (b"",), ((1, 2, 3),), ((-1, bytes(32)),), ((1, bytes(31)),)]
    for value in wrong:
        with pytest.raises(VerificationError, match=f"{type(record).__name__}.{name}|KeyAnnounce"):
            dataclasses.replace(record, **{name: value})  # type: ignore[type-var]


def test_a_list_has_fewer_than_65536_entries() -> None:
    longest = records.Upload(1, MAN, MAN, MAN, (MAN,) * 65535)
    assert decode(records.Upload, encode(longest)) == longest
    with pytest.raises(VerificationError, match="65536"):
        records.Upload(1, MAN, MAN, MAN, (MAN,) * 65536)


SIGNED: list[type[Record]] = [record_type for record_type in ALL if record_type.COLUMNS[-1][0] == "sig"]


@pytest.mark.parametrize("record_type", SIGNED)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_signature_covers_every_column(record_type: type[Record], data: st.DataObject) -> None:
    record = records.signed(data.draw(a_record(record_type)), MAN, signing_key("a").sign)
    records.check_signature(record, MAN, public("a"), "a")
    for name, column in record_type.COLUMNS:
        present = getattr(record, name)
        other = data.draw(values(column).filter(present.__ne__))
        changed = dataclasses.replace(record, **{name: other})
        with pytest.raises(VerificationError, match="not signed by a"):
            records.check_signature(changed, MAN, public("a"), "a")
    for man, key in ((bytes(32), public("a")), (MAN, public("b")), (MAN, bytes(31)), (MAN, b"\xff" * 32)):
        with pytest.raises(VerificationError, match="not signed"):
            records.check_signature(record, man, key, "a")


def test_a_record_without_a_signature_does_not_verify() -> None:
    with pytest.raises(VerificationError, match="not signed"):
        records.check_signature(records.OpenPlease(MAN), MAN, public("a"), "a")


def test_signatures_of_two_kinds_never_cover_the_same_bytes() -> None:
    result = records.Result(MAN, bytes(32), MAN)
    opened = records.Open(1, MAN, bytes(32))
    assert records.signed_bytes(result, MAN) == labelled("sig/Result", MAN, MAN, bytes(32), MAN)
    assert records.signed_bytes(opened, MAN) == labelled("sig/Open", MAN, b"\x01\x00", MAN, bytes(32))


def test_the_digests_are_those_of_the_protocol() -> None:
    entries = tuple(
        records.KeyAnnounce(i, MAN, bytes([i % 256]) * 1184, bytes([i % 7]) * 32) for i in (1, 2, 700)
    )
    expected = [MAN, b"\x03\x00"]
    for entry in entries:
        expected += [entry.id.to_bytes(2, "little"), entry.mlkem, entry.x25519]
    assert records.directory_digest(MAN, entries) == hash_of("dir", *expected)
    cohort = records.Cohort(7, 2, ((1, b"\x05" * 32), (700, b"\x06" * 32)))
    assert records.context(MAN, b"d" * 32, b"w" * 32, cohort) == hash_of(
        "ctx",
        MAN,
        b"d" * 32,
        b"\x07\x00\x00\x00",
        b"\x02",
        b"w" * 32,
        b"\x02\x00",
        b"\x01\x00",
        b"\x05" * 32,
        b"\xbc\x02",
        b"\x06" * 32,
    )
    assert records.payload_digest((MAN, bytes(32))) == hash_of("payload", MAN, bytes(32))
    assert records.state_digest(b"state") == hash_of("state", b"state")


def test_an_opening_is_not_printed() -> None:
    secret = b"\xabsecret-seed-of-the-self-mask-32\xcd"[:32].ljust(32, b"x")
    assert "secret" not in repr(records.Open(1, MAN, secret))
