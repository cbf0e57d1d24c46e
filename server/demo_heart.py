"""The demo's other data: heart disease at four real hospitals, fetched from UCI's archive and verified.

Source: UCI Machine Learning Repository id 45 (Janosi, Steinbrunn, Pfisterer, Detrano 1988), CC BY 4.0;
FLamby, arXiv 2210.04620 (Fed-Heart-Disease: columns without slope, ca and thal; cholesterol 0 is absent).
Rules: a file is used only if its bytes are those of the published one; what cannot be fetched is asked for by
name; 20 % of each hospital's patients are set aside first as the demo's public test set.
"""

import csv
import hashlib
import io
from pathlib import Path
from typing import Final

import httpx
import numpy as np

from common.errors import UnreachableError, VerificationError
from server.demo_data import TEST_SHARE, HospitalRows, Rows

LICENCE: Final = "Heart Disease, UCI id 45: Janosi, Steinbrunn, Pfisterer, Detrano (1988), CC BY 4.0"
ADDRESS: Final = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease"
TIMEOUT_S: Final = 20.0
MAX_FILE_BYTES: Final = 1 << 20
COLUMNS: Final = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca",
    "thal", "num",
)  # fmt: skip
USED: Final = COLUMNS[:10]
SITES: Final = {
    "Cleveland": (
        "processed.cleveland.data", "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    ),
    "Budapest": (
        "processed.hungarian.data", "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    ),
    "Zurich and Basel": (
        "processed.switzerland.data", "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
    ),
    "Long Beach": (
        "processed.va.data", "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
    ),
}  # fmt: skip
"""Each hospital's file and its SHA-256."""


def obtain(folder: Path, address: str = ADDRESS) -> dict[str, bytes]:
    """The four files by hospital: those that lie in ``folder``, the others fetched into it.

    Guarantee: only_the_published_bytes_are_used - from the folder and from the network alike.
    Raises: VerificationError for other bytes; UnreachableError saying what to put where.
    """
    found = {}
    for site, (name, digest) in SITES.items():
        path = folder / name
        data = path.read_bytes() if path.is_file() else _fetched(f"{address}/{name}", path)
        if hashlib.sha256(data).hexdigest() != digest:
            place = path if path.is_file() else f"{address}/{name}"
            problem = f"{place} is not the published file: its SHA-256 differs"
            remedy = f"Delete it, and take {name} from {ADDRESS}."
            raise VerificationError("demo.checksum", problem, remedy=remedy)
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        found[site] = data
    return found


def _fetched(url: str, path: Path) -> bytes:
    """What an address serves, at most MAX_FILE_BYTES of it. Raises UnreachableError."""
    problem = ""
    data = bytearray()
    try:
        with httpx.stream("GET", url, timeout=TIMEOUT_S, follow_redirects=False) as answer:
            if answer.status_code != httpx.codes.OK:
                problem = f"{url} answered {answer.status_code}"
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > MAX_FILE_BYTES:
                    problem = f"{url} is larger than the published file"
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = f"{url} cannot be fetched ({type(error).__name__})"
    if problem:
        names = ", ".join(name for name, _ in SITES.values())
        remedy = f"Put {names} into {path.parent} and give --folder {path.parent}."
        raise UnreachableError("demo.download", problem, remedy=remedy)
    return bytes(data)


def split(files: dict[str, bytes], seed: int) -> tuple[Rows, list[HospitalRows]]:
    """The public test set, and the rows of each hospital."""
    generator = np.random.default_rng(seed)
    names = ["patient", *USED, "disease"]
    test: list[list[object]] = []
    parts = []
    for data in files.values():
        rows = [_row(cells) for cells in csv.reader(io.StringIO(data.decode("ascii"))) if cells]
        order = generator.permutation(len(rows))
        held_out = round(TEST_SHARE * len(rows))
        test += [rows[at] for at in order[:held_out]]
        kept = [[f"P{place + 1}", *rows[at]] for place, at in enumerate(order[held_out:])]
        columns: dict[str, list[object]] = {
            name: list(cells) for name, cells in zip(names, zip(*kept, strict=True), strict=True)
        }
        parts.append(HospitalRows(columns))
    tested = {name: list(cells) for name, cells in zip(names[1:], zip(*test, strict=True), strict=True)}
    return Rows(tested), parts


def _row(cells: list[str]) -> list[object]:
    """One patient as a hospital's extract has it: absent values empty, disease 0 or 1."""
    held = dict(zip(COLUMNS, cells, strict=True))
    values = ["" if held[name] == "?" else f"{float(held[name]):g}" for name in USED]
    # Written so by the two hospitals that did not measure it.
    for name in ("chol", "trestbps"):
        if values[USED.index(name)] == "0":
            values[USED.index(name)] = ""
    return [*values, str(int(float(held["num"]) > 0))]
