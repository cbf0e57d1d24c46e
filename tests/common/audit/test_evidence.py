"""Evidence as one file: what is written is read, and nothing else is."""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import archive
from common.audit.evidence import FACTS, HEAD, HEADS, LEAVES, Evidence, read_evidence
from common.encoding import canonical_json, parse_canonical_json
from common.errors import UsageError, VerificationError
from tests.common.audit.federation import Federation

Files = dict[str, bytes]


def unpacked(data: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(files: Files | list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def shown(ran: Federation) -> Evidence:
    return ran.evidence(1)


def refused(data: bytes) -> None:
    with pytest.raises(VerificationError) as error:
        Evidence.from_bytes(data, "x.zip")
    assert error.value.code in (
        "audit.evidence",
        "encoding.json",
        "encoding.not-canonical",
        "identity.weak-key",
    )
    assert "x.zip" in error.value.problem or error.value.code.startswith("identity")


def test_evidence_is_read_as_written(ran: Federation) -> None:
    for evidence in ran.evidences():
        data = evidence.to_bytes()
        assert Evidence.from_bytes(data, "x") == evidence
        assert evidence.to_bytes() == data
        empty = replace(evidence, heads=b"", leaves=(), studies={})
        assert Evidence.from_bytes(empty.to_bytes(), "x") == empty


def test_evidence_holds_exactly_its_files(ran: Federation, shown: Evidence) -> None:
    files = unpacked(shown.to_bytes())
    assert set(files) == {FACTS, LEAVES, HEAD, HEADS, *(f"studies/{name}.study" for name in shown.studies)}
    assert files[LEAVES].splitlines() == list(shown.leaves)
    assert set(parse_canonical_json(files[FACTS], "")) == {
        *("schema", "party", "name", "time", "version", "hub_key", "roster", "roster_signature"),
    }


STUDY = f"studies/{'a' * 64}.study"

HOSTILE: dict[str, Callable[[Files], Files | list[tuple[str, bytes]]]] = {
    "another file": lambda files: {**files, "notes.txt": b""},
    "a path upwards": lambda files: {**files, "../evil.study": b""},
    "a path upwards to a study": lambda files: {**files, f"studies/../{'a' * 64}.study": b""},
    "an absolute path": lambda files: {**files, "/etc/passwd": b""},
    "a backslash": lambda files: {**files, f"studies\\{'a' * 64}.study": b""},
    "a folder": lambda files: {**files, "studies/": b""},
    "a study of another name": lambda files: {**files, "studies/abc.study": b""},
    "a study in capitals": lambda files: {**files, f"studies/{'A' * 64}.study": b""},
    "a line after the name": lambda files: {**files, STUDY + "\n": b""},
    "the same file twice": lambda files: [*files.items(), (LEAVES, b"")],
    "a study twice": lambda files: [*files.items(), (STUDY, b"1"), (STUDY, b"2")],
    "no ledger": lambda files: {name: data for name, data in files.items() if name != LEAVES},
    "no facts": lambda files: {name: data for name, data in files.items() if name != FACTS},
    "half a line": lambda files: {**files, LEAVES: files[LEAVES][:-1]},
    "a head that is no text": lambda files: {**files, HEAD: b"\xff"},
    "facts that are no table": lambda files: {**files, FACTS: b"[]"},
    "facts that are no JSON": lambda files: {**files, FACTS: b"{"},
    "facts in another order": lambda files: {**files, FACTS: files[FACTS].replace(b":", b": ", 1)},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_evidence_is_refused(shown: Evidence, case: str) -> None:
    files = unpacked(shown.to_bytes())
    assert Evidence.from_bytes(packed(files), "x.zip") == shown
    refused(packed(HOSTILE[case](files)))


FACTS_WRONG: dict[str, dict[str, Any]] = {
    "an unknown field": {"more": 1},
    "another schema": {"schema": 2},
    "a schema that is true": {"schema": True},
    "a party out of range": {"party": 65536},
    "a negative party": {"party": -1},
    "a party that is text": {"party": "1"},
    "a party that is true": {"party": True},
    "a name with a line break": {"name": "St. Mary\nall checks hold"},
    "no name": {"name": ""},
    "a name that is a number": {"name": 1},
    "a time with seconds": {"time": "2026-11-23T08:00:00Z"},
    "a time that is a number": {"time": 1},
    "a version that is a number": {"version": 1},
    "a key that is none": {"hub_key": "ed25519:"},
    "a key that is a list": {"hub_key": []},
    "a roster that is no base64": {"roster": "?"},
    "a roster that is a number": {"roster": 1},
}


@pytest.mark.parametrize("case", FACTS_WRONG)
def test_facts_are_read_strictly(shown: Evidence, case: str) -> None:
    files = unpacked(shown.to_bytes())
    facts = {**parse_canonical_json(files[FACTS], ""), **FACTS_WRONG[case]}
    with pytest.raises(VerificationError):
        Evidence.from_bytes(packed({**files, FACTS: canonical_json(facts)}), "x.zip")
    for name in parse_canonical_json(files[FACTS], ""):
        rest = {key: value for key, value in parse_canonical_json(files[FACTS], "").items() if key != name}
        refused(packed({**files, FACTS: canonical_json(rest)}))


def test_base64_has_one_form(shown: Evidence) -> None:
    """64 bytes end in four spare bits, which the decoder would ignore."""
    files = unpacked(shown.to_bytes())
    facts = parse_canonical_json(files[FACTS], "")
    signature = facts["roster_signature"]
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = last[last.index(signature[-3]) ^ 1]
    facts["roster_signature"] = f"{signature[:-3]}{other}=="
    refused(packed({**files, FACTS: canonical_json(facts)}))


def test_a_zip_bomb_is_not_unpacked(shown: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    files = unpacked(shown.to_bytes())
    size = sum(map(len, files.values()))
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", size + 1000)
    assert Evidence.from_bytes(packed(files), "x.zip") == shown
    bomb = packed({**files, STUDY: bytes(10_000_000)})
    assert len(bomb) < 100_000

    def never(*_: object, **__: object) -> bytes:
        raise AssertionError("unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "read", never)
    refused(bomb)


def test_a_zip_bomb_that_lies_about_its_size_gives_no_more_than_it_says(shown: Evidence) -> None:
    bomb = packed({**unpacked(shown.to_bytes()), STUDY: bytes(10_000_000)})
    # The sizes in the directory and before the data.
    lying = bomb.replace(struct.pack("<I", 10_000_000), struct.pack("<I", 10))
    assert lying != bomb
    refused(lying)


def test_too_many_files_are_refused(shown: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    files = unpacked(shown.to_bytes())
    monkeypatch.setattr(archive, "MAX_FILES", len(files))
    assert Evidence.from_bytes(packed(files), "x.zip") == shown
    refused(packed({**files, STUDY: b""}))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(shown: Evidence, method: int) -> None:
    refused(packed(unpacked(shown.to_bytes()), method))


def test_an_encrypted_file_is_refused(shown: Evidence) -> None:
    data = bytearray(packed(unpacked(shown.to_bytes())))
    place = data.index(b"PK\x01\x02")
    data[place + 8] |= 1
    refused(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_else(ran: Federation, data: st.DataObject) -> None:
    whole = bytearray(ran.evidence(1).to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of the structure is at the end.
        place = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 700, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    try:
        found = Evidence.from_bytes(bytes(whole[:cut]), "x.zip")
    except VerificationError:
        return
    assert isinstance(found, Evidence)


def test_files_that_cannot_be_read(shown: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "St. Mary.zip"
    for wrong in (path, tmp_path):
        with pytest.raises(UsageError, match="cannot be read") as error:
            read_evidence(wrong)
        assert error.value.remedy
    path.write_bytes(b"no zip")
    with pytest.raises(VerificationError, match=r"not a sound zip"):
        read_evidence(path)
    path.write_bytes(shown.to_bytes())
    assert read_evidence(path) == shown
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", path.stat().st_size - 1)
    with pytest.raises(VerificationError, match="larger than any"):
        read_evidence(path)
