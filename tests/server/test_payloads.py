"""Kept payloads on disk: those of opened sums stay, everything else goes."""

import threading
import zipfile
from pathlib import Path

import pytest

from common.audit.payloads import kept_payloads
from common.errors import FailureError, RefusedError, UsageError
from common.secagg.codec import CHUNK_BYTES, Layout
from server.payloads import Payloads, erase_payloads, pack_payloads

LAYOUT = Layout(parameters=CHUNK_BYTES // 2, scalars=0, bits=32)
DIGEST = "ab" * 32


def payload(site: int) -> bytes:
    return bytes([site]) * LAYOUT.payload_bytes


def fill(payloads: Payloads, number: int, attempt: int = 1, sites: tuple[int, ...] = (1, 2)) -> None:
    kept = payloads.attempt(number, attempt)
    for site in sites:
        # In any order, and one chunk twice.
        for index, span in reversed([*enumerate(LAYOUT.spans), *list(enumerate(LAYOUT.spans))[:1]]):
            kept.write(site, index, payload(site)[span.start : span.stop])
    kept.seal(sites)
    kept.drop()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_payloads_are_kept_whole(tmp_path: Path) -> None:
    folder = tmp_path / "payloads" / DIGEST
    payloads = Payloads(folder, LAYOUT)
    payloads.check_room(4)
    fill(payloads, 1)
    fill(payloads, 12, attempt=2, sites=(2,))
    assert names(folder) == ["1", "1/1", "1/2", "12", "12/2"]
    assert (folder / "1" / "2").read_bytes() == payload(2)
    assert (folder / "1" / "2").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    out = tmp_path / "payloads.zip"
    assert pack_payloads(folder, DIGEST, out) == 2
    with kept_payloads(out) as read:
        assert read(DIGEST, 1, 1) == payload(1)
        assert read(DIGEST, 12, 2) == payload(2)
    assert all(info.compress_type == zipfile.ZIP_STORED for info in zipfile.ZipFile(out).infolist())
    with pytest.raises(UsageError, match="cannot be written"):
        pack_payloads(folder, DIGEST, out)
    assert erase_payloads(folder) == 2
    assert erase_payloads(folder) == 0
    with pytest.raises(RefusedError, match="no payloads are kept"):
        pack_payloads(folder, DIGEST, tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()


def test_only_opened_payloads_stay(tmp_path: Path) -> None:
    """An abandoned attempt goes at once; what a killed hub left goes when it is back."""
    folder = tmp_path / DIGEST
    payloads = Payloads(folder, LAYOUT)
    payloads.keep_only([])
    first = payloads.attempt(1, 1)
    first.write(1, 0, b"x")
    first.drop()
    assert names(folder) == []
    with pytest.raises(FailureError, match="cannot be kept"):
        first.write(1, 0, b"late")
    for number in (1, 2, 3):
        fill(payloads, number, sites=(1,))
    payloads.attempt(4, 1).write(1, 0, b"x")
    payloads.keep_only([1, 3])
    assert names(folder) == ["1", "1/1", "3", "3/1"]


def test_a_round_without_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = Payloads(tmp_path / DIGEST, LAYOUT)
    needed = 3 * LAYOUT.payload_bytes
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        if free < needed:
            with pytest.raises(FailureError, match=f"take {needed} bytes, and .* has room for {free}"):
                payloads.check_room(3)
        else:
            payloads.check_room(3)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    payloads = Payloads(tmp_path / DIGEST, LAYOUT)
    kept = payloads.attempt(1, 1)
    kept.check()
    full = tmp_path / DIGEST / "1.1.part" / "1"
    full.symlink_to("/dev/full")
    with pytest.raises(FailureError, match="cannot be kept"):
        kept.write(1, 0, b"x")
    # The chunk is counted, and is not asked for again: nothing goes on with this attempt.
    for call in (kept.check, lambda: kept.seal([1])):
        with pytest.raises(FailureError, match="cannot be kept"):
            call()
    with pytest.raises(FailureError, match="cannot be kept"):
        payloads.attempt(1, 1)
    payloads.keep_only([])
    (tmp_path / DIGEST).rmdir()
    (tmp_path / DIGEST).touch()
    for call in (
        lambda: payloads.keep_only([]),
        lambda: payloads.check_room(1),
        lambda: erase_payloads(tmp_path / DIGEST),
    ):
        with pytest.raises(FailureError, match="cannot be kept or removed"):
            call()


def test_payloads_that_are_not_whole_are_not_sealed(tmp_path: Path) -> None:
    payloads = Payloads(tmp_path / DIGEST, LAYOUT)
    first, last = LAYOUT.spans[0], LAYOUT.spans[-1]
    for attempt, spans, sites in ((1, [first], [1]), (2, LAYOUT.spans, [1, 2]), (3, LAYOUT.spans, [2])):
        kept = payloads.attempt(1, attempt)
        for span in spans:
            kept.write(1, LAYOUT.spans.index(span), payload(1)[span.start : span.stop])
        with pytest.raises(FailureError, match="not whole"):
            kept.seal(sites)
    assert last.stop == LAYOUT.payload_bytes


def test_a_write_in_flight_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Payloads(tmp_path / DIGEST, LAYOUT).attempt(1, 1)
    began, go_on, checked = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        with kept.taking():
            began.set()
            go_on.wait(20)

    def check() -> None:
        kept.check()
        checked.set()

    threads = [threading.Thread(target=target) for target in (slow, check)]
    threads[0].start()
    assert began.wait(20)
    threads[1].start()
    assert not checked.wait(0.2)
    go_on.set()
    assert checked.wait(20)
    for thread in threads:
        thread.join(20)
    monkeypatch.setattr("server.payloads._WRITE_S", 0.01)
    with kept.taking(), pytest.raises(FailureError, match="could not be written"):
        kept.check()


def test_erasing_leaves_nothing_of_a_round_that_was_cut(tmp_path: Path) -> None:
    Payloads(tmp_path / DIGEST, LAYOUT).attempt(1, 1).write(1, 0, b"x")
    assert erase_payloads(tmp_path / DIGEST) == 0
    assert not (tmp_path / DIGEST).exists()
