"""Zip files of a closed list of names; what hostile ones do is in the tests of evidence and backups."""

import re

import pytest

from common import archive
from common.archive import pack, unpack
from common.errors import RefusedError, VerificationError

NAMES = re.compile(r"[a-z]+\.bin")


def test_a_packed_file_is_read_as_written() -> None:
    files = {"facts": b"1", "a.bin": bytes(1000), "b.bin": b""}
    assert unpack(pack(files), {"facts"}, NAMES) == files
    assert pack(files) == pack(dict(files))
    with pytest.raises(VerificationError, match="exactly the files"):
        unpack(pack({"a.bin": b""}), {"facts"}, NAMES)


def test_nothing_is_packed_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 10)
    monkeypatch.setattr(archive, "MAX_FILES", 2)
    assert unpack(pack({"a.bin": bytes(5), "b.bin": bytes(5)}), set(), NAMES)
    for wrong in ({"a.bin": bytes(11)}, {"a.bin": b"", "b.bin": b"", "c.bin": b""}):
        with pytest.raises(RefusedError, match="more than is read"):
            pack(wrong)
