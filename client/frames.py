"""The pipe between the supervisor and a process with rows: one JSON header and one block of bytes a frame.

Rules: headers are RFC 8785 JSON with a closed set of keys; nothing is pickled; a frame past its limit or cut
short is an error; results that leave the worker are the integers of a Release and nothing else.
"""

import os
from typing import IO, Any, Final

from common.encoding import canonical_json, parse_canonical_json, u32, u64
from common.errors import FailureError

MAX_HEADER_BYTES: Final = 1 << 20
MAX_BLOB_BYTES: Final = 1 << 32
PASSED_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "WARDROUND_THREADS")


def passed_environment() -> dict[str, str]:
    """The environment of such a process: nothing but what it needs."""
    return {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}


def write_frame(stream: IO[bytes], header: dict[str, Any], blob: bytes = b"") -> None:
    """Write one frame and flush it."""
    head = canonical_json(header)
    stream.write(u32(len(head)) + u64(len(blob)) + head)
    stream.write(blob)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read one frame, or None at a clean end. Raises FailureError; VerificationError for another header."""
    sizes = stream.read(12)
    if not sizes:
        return None
    header_size, blob_size = int.from_bytes(sizes[:4], "little"), int.from_bytes(sizes[4:], "little")
    if len(sizes) != 12 or header_size > MAX_HEADER_BYTES or blob_size > MAX_BLOB_BYTES:
        raise FailureError("worker.frame", "a frame between supervisor and worker is malformed")
    head = stream.read(header_size)
    blob = stream.read(blob_size)
    if len(head) != header_size or len(blob) != blob_size:
        raise FailureError(
            "worker.frame", "the other end of the worker's pipe ended in the middle of a frame"
        )
    header = parse_canonical_json(head, "a worker's header")
    if not isinstance(header, dict):
        raise FailureError("worker.frame", "a worker's header must be an object")
    return header, blob
