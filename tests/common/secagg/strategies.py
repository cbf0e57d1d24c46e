"""Arbitrary records: every column of a record type with any value of its width. For tests only."""

from typing import Any

from hypothesis import strategies as st

from common.secagg import records
from common.secagg.records import Fixed, Integer, ListOf, Record

ALL: list[type[Record]] = [
    records.KeyAnnounce,
    records.Directory,
    records.PairSeed,
    records.Confirm,
    records.Tag,
    records.HeadPlease,
    records.Extension,
    records.Head,
    records.Cosign,
    records.Cosigned,
    records.RoundStart,
    records.Ready,
    records.Cohort,
    records.Upload,
    records.OpenPlease,
    records.Open,
    records.Result,
]


def values(column: Integer | Fixed | ListOf) -> st.SearchStrategy[Any]:
    if isinstance(column, Integer):
        return st.integers(0, (1 << 8 * column.size_bytes) - 1)
    if isinstance(column, Fixed):
        return st.integers(0, 255).map(lambda byte: bytes([byte]) * column.size_bytes)
    if not isinstance(column.entry, tuple):
        return st.lists(a_record(column.entry), max_size=2).map(tuple)
    entry = column.entry
    one = values(entry[0]) if len(entry) == 1 else st.tuples(*(values(part) for part in entry))
    return st.lists(one, max_size=3).map(tuple)


def a_record(record_type: type[Record]) -> st.SearchStrategy[Any]:
    return st.tuples(*(values(column) for _, column in record_type.COLUMNS)).map(
        lambda args: record_type(*args)
    )
