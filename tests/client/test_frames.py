"""The pipe's frames: what was written is read, and nothing else."""

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.frames import MAX_BLOB_BYTES, MAX_HEADER_BYTES, read_frame, write_frame
from common.encoding import canonical_json, u32, u64
from common.errors import FailureError, VerificationError

HEADERS = st.dictionaries(st.text(max_size=5), st.integers(-1000, 1000) | st.text(max_size=5), max_size=4)


def written(*frames: tuple[dict[str, Any], bytes]) -> bytes:
    stream = io.BytesIO()
    for header, blob in frames:
        write_frame(stream, header, blob)
    return stream.getvalue()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(HEADERS, st.binary(max_size=50)), max_size=4))
def test_frames_come_back_in_order(frames: list[tuple[dict[str, Any], bytes]]) -> None:
    stream = io.BytesIO(written(*frames))
    assert [read_frame(stream) for _ in frames] == frames
    assert read_frame(stream) is None


def test_a_frame_cut_anywhere_is_an_error() -> None:
    whole = written(({"op": "compute"}, b"model"))
    for length in range(1, len(whole)):
        with pytest.raises(FailureError) as caught:
            read_frame(io.BytesIO(whole[:length]))
        assert caught.value.code == "worker.frame"


@pytest.mark.parametrize(
    "sizes", [(MAX_HEADER_BYTES + 1, 0), (2, MAX_BLOB_BYTES + 1), (2**32 - 1, 2**64 - 1)]
)
def test_announced_sizes_past_the_limits_are_refused_before_reading(sizes: tuple[int, int]) -> None:
    stream = io.BytesIO(u32(sizes[0]) + u64(sizes[1]) + b"{}" + b"x" * 100)
    with pytest.raises(FailureError):
        read_frame(stream)
    assert stream.tell() == 12


@pytest.mark.parametrize("head", [b"[]", b'"op"', b"7"])
def test_a_header_is_an_object(head: bytes) -> None:
    with pytest.raises(FailureError):
        read_frame(io.BytesIO(u32(len(head)) + u64(0) + head))


@pytest.mark.parametrize("head", [b'{"b":1,"a":2}', b'{"a": 1}', b'{"a":1,"a":1}', b"\xff\xff", b"{"])
def test_a_header_has_one_form(head: bytes) -> None:
    assert canonical_json({"a": 2, "b": 1}) == b'{"a":2,"b":1}'
    with pytest.raises(VerificationError):
        read_frame(io.BytesIO(u32(len(head)) + u64(0) + head))
