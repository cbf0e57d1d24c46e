"""Received studies as files: written once, read with the checks they were received with."""

import pytest

from client import studies
from client.studies import StudyFolder
from common.errors import RefusedError, UsageError, VerificationError
from common.run import study_document
from tests.client.federation import Federation


@pytest.fixture
def folder(federation: Federation) -> StudyFolder:
    return StudyFolder(federation.sites[1])


def test_a_study_is_kept_once_as_it_came(federation: Federation, folder: StudyFolder) -> None:
    manifest = federation.manifest()
    document = federation.document(manifest)
    assert folder.digests() == []
    assert folder.add(manifest.digest, document)
    assert not folder.add(manifest.digest, b"something else")
    assert folder.load(manifest.digest) == document
    assert folder.digests() == [manifest.digest.hex()]
    assert folder.read(manifest.digest) == (manifest, federation.roster)
    # Another process sees the same.
    assert StudyFolder(federation.sites[1]).read(manifest.digest)[0] == manifest


def test_a_study_that_never_came_is_refused(folder: StudyFolder) -> None:
    for read in (folder.load, folder.read):
        with pytest.raises(RefusedError) as caught:
            read(bytes(32))
        assert caught.value.code == "studies.unknown"


def test_a_replaced_file_is_refused(federation: Federation, folder: StudyFolder) -> None:
    manifest, other = federation.manifest(), federation.manifest(training__rounds=9)
    folder.add(manifest.digest, federation.document(manifest))
    path = federation.sites[1].study(manifest.digest.hex())
    good = path.read_bytes()
    # Signed by the same coordinator and sent by the same hub, but not what was approved.
    path.write_bytes(federation.document(other))
    with pytest.raises(VerificationError) as caught:
        folder.read(manifest.digest)
    assert caught.value.code == "studies.changed"
    signed = federation.sign(manifest)
    size = len(signed.manifest_bytes)
    start = good.index(signed.manifest_bytes)
    for at in range(start, start + size, 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
        with pytest.raises(VerificationError):
            folder.read(manifest.digest)
    for document in (b"", good[:-1], good + b"\0", signed.manifest_bytes):
        path.write_bytes(document)
        with pytest.raises(VerificationError):
            folder.read(manifest.digest)
    path.write_bytes(study_document(signed, federation.roster))
    assert folder.read(manifest.digest)[0] == manifest


def test_a_prefix_of_six_digits_names_one_study(federation: Federation, folder: StudyFolder) -> None:
    for digest in ("ab" * 32, "abab" * 8 + "cd" * 16, "12" * 32):
        folder.add(bytes.fromhex(digest), b"document")
    assert folder.resolve("121212") == "12" * 32
    assert folder.resolve("12" * 32) == "12" * 32
    assert folder.resolve("abab" * 8 + "c") == "abab" * 8 + "cd" * 16
    for prefix in (
        "",
        "12121",
        "ababab",
        "ffffff",
        "12" * 32 + "1",
        "../studies",
        "*" * 6,
        "121212".upper() + "X",
    ):
        with pytest.raises(UsageError) as caught:
            folder.resolve(prefix)
        assert caught.value.code == "site.digest"


def test_other_files_are_no_studies(federation: Federation, folder: StudyFolder) -> None:
    kept = federation.sites[1].study("0").parent
    for name in ("note.txt", "short.study", "G" * 64 + ".study", "ab" * 32 + ".study.new"):
        (kept / name).write_bytes(b"x")
    assert folder.digests() == []


def test_a_flood_of_studies_is_refused(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "MAX_STUDIES", 3)
    for number in range(3):
        assert folder.add(bytes([number]) * 32, b"document")
    with pytest.raises(RefusedError) as caught:
        folder.add(b"\xff" * 32, b"document")
    assert caught.value.code == "studies.full"
    assert not folder.add(bytes(32), b"document")
    assert len(folder.digests()) == 3
