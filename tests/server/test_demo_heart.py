"""The heart disease data: fetched from a server on this machine, verified, and split over four hospitals."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from common.contract import Contract
from common.errors import UnreachableError, VerificationError
from server import demo_heart
from server.demo_heart import SITES, USED, obtain, split

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "heart"
ROW = "63.0,1.0,1.0,145.0,0,?,2.0,150.0,0.0,-2.3,3.0,0.0,6.0,{}\n"
FILES = {site: "".join(ROW.format(i % 5) for i in range(10 + len(site))).encode() for site in SITES}
NAMES = {name: site for site, (name, _) in SITES.items()}


class Archive(BaseHTTPRequestHandler):
    """Serves what a test tells it to; ``asked`` are the paths that were asked for."""

    served: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    status: ClassVar[int] = 200
    cut: ClassVar[bool] = False

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        self.asked.append(name)
        body = self.served.get(name, b"")
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body) + 100 * self.cut))
        if self.status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An archive of small files, and their checksums as if they were published."""
    sites = {site: (name, hashlib.sha256(FILES[site]).hexdigest()) for site, (name, _) in SITES.items()}
    monkeypatch.setattr(demo_heart, "SITES", sites)
    Archive.served = {name: FILES[site] for site, (name, _) in sites.items()}
    Archive.asked, Archive.status, Archive.cut = [], 200, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/heart-disease"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_files_are_fetched_once_and_kept(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert obtain(folder, address) == FILES
    assert sorted(Archive.asked) == sorted(NAMES)
    assert obtain(folder, address) == FILES
    assert len(Archive.asked) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == Archive.served


def test_only_the_published_bytes_are_used(address: str, tmp_path: Path) -> None:
    name = next(iter(NAMES))
    Archive.served[name] += b" "
    with pytest.raises(VerificationError) as caught:
        obtain(tmp_path, address)
    assert (caught.value.code, name in caught.value.problem, caught.value.exit_code) == (
        "demo.checksum",
        True,
        5,
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).write_text("something else")
    with pytest.raises(VerificationError) as caught:
        obtain(tmp_path, address)
    assert str(tmp_path / name) in caught.value.problem
    assert (tmp_path / name).read_text() == "something else"


@pytest.mark.parametrize("fault", ["404", "302", "cut", "large", "gone"])
def test_what_cannot_be_fetched_is_asked_for_by_name(address: str, tmp_path: Path, fault: str) -> None:
    if fault in ("404", "302"):
        Archive.status = int(fault)
    elif fault == "cut":
        Archive.cut = True
    elif fault == "large":
        Archive.served[next(iter(NAMES))] = bytes(demo_heart.MAX_FILE_BYTES + 1)
    else:
        address = "http://127.0.0.1:1/heart-disease"
    with pytest.raises(UnreachableError) as caught:
        obtain(tmp_path, address)
    error = caught.value
    assert (error.code, error.exit_code) == ("demo.download", 6)
    assert all(name in (error.remedy or "") for name in NAMES)
    assert str(tmp_path) in (error.remedy or "")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_split_by_hospital(address: str, tmp_path: Path) -> None:
    files = obtain(tmp_path, address)
    test, parts = split(files, 0)
    sizes = [10 + len(site) for site in files]
    held_out = [round(0.2 * size) for size in sizes]
    assert [len(part.columns["patient"]) for part in parts] == [
        s - h for s, h in zip(sizes, held_out, strict=True)
    ]
    assert len(test.columns["disease"]) == sum(held_out)
    assert list(parts[0].columns) == ["patient", *USED, "disease"]
    assert parts[0].columns["chol"][0] == parts[0].columns["fbs"][0] == ""
    assert parts[0].columns["oldpeak"][0] == "-2.3"
    assert {str(cell) for part in parts for cell in part.columns["disease"]} == {"0", "1"}
    again = split(files, 0)
    assert again[0] == test
    assert again[1] == parts


def test_the_published_files_hold_where_they_are_present() -> None:
    if not PUBLISHED.exists():
        pytest.skip("the heart data is not here")
    files = obtain(PUBLISHED, "http://127.0.0.1:1/never-asked")
    test, parts = split(files, 0)
    sizes = [len(part.columns["patient"]) for part in parts]
    assert sizes == [303 - 61, 294 - 59, 123 - 25, 200 - 40]
    text = (Path(demo_heart.__file__).parent / "templates" / "heart_disease.toml").read_text()
    contract = Contract.from_toml(text)
    x, y = contract.encode(test.columns)
    assert x.shape == (185, contract.width)
    assert (y >= 0).all()
