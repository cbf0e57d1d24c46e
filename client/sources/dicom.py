"""Grey images in DICOM files below one folder: which rows there are, and the pixels of each as numbers.

Source: DICOM PS3.3 C.7.6.3 (pixel data), C.11.1 (modality LUT: rescale), C.7.6.1.1.1 (burned-in annotation).
Rules: a file is named below its folder, no link is followed; pixels that may show a name are refused; what
is wrong with a file is said with its name alone, for headers name patients. One frame of one sample a pixel
is read; colour and several frames are refused. Bigger or smaller images are resampled with a triangle filter
over the area that a pixel covers.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
from numpy.typing import NDArray

from client.sources import files
from client.sources.engine import identifier, regular_file
from client.sources.source import DataSource
from common.contract import Contract, Image
from common.errors import ContractError

try:
    import pydicom
    from pydicom.datadict import tag_for_keyword
except ImportError as error:
    raise ContractError(
        "source.extra", "DICOM cannot be read here: pydicom is missing",
        remedy="Install wardround with its extra 'dicom'.",
    ) from error  # fmt: skip

MAX_FILE_BYTES: Final = 1 << 28
MAX_PIXELS: Final = 1 << 25
PATIENT: Final = "PatientID"

_MAY_SHOW_NAMES: Final = frozenset({"US", "OT", "SC"})
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"
_REMEDY: Final = "Leave the file out of the index, or export it again."


def fill(connection: duckdb.DuckDBPyConnection, source: DataSource, contract: Contract) -> None:
    """Make ``extract``, in which an image's column holds the name of its file below the folder.

    ``source.table`` is an index: a CSV with the contract's columns. Without one every file is a row: its
    patient is PatientID, and each further column is a header's keyword (``PatientSex``), as a map may say.

    Raises: ContractError.
    """
    window = () if contract.window is None else (contract.window.column,)
    wanted = list(dict.fromkeys((contract.patient, *contract.columns, *window)))
    if source.table:
        index = source.model_copy(update={"source": f"csv:{source.table}"})
        files.fill(connection, index, wanted, copied=True)
        return
    images = {feature.name for feature in contract.features if isinstance(feature, Image)}
    keywords = {}
    for name in wanted:
        own = source.mapped(name).column or (PATIENT if name == contract.patient else name)
        if name not in images and tag_for_keyword(own) is None:
            problem = (
                f"{source.path}: {own!r} is no keyword of a DICOM header, so no column {name!r} can be made"
            )
            remedy = "Map it to a keyword in policy.toml, or write an index as CSV and name it as table."
            raise ContractError("source.column", problem, remedy=remedy)
        keywords[name] = own
    rows = list(_headers(source.path, wanted, images, keywords))
    columns = ", ".join(f"{identifier(name)} VARCHAR" for name in wanted)
    connection.execute(f"CREATE TABLE extract ({columns})")
    if rows:
        connection.executemany(f"INSERT INTO extract VALUES ({', '.join('?' * len(wanted))})", rows)


def _headers(
    folder: Path, wanted: list[str], images: set[str], keywords: dict[str, str]
) -> Iterator[list[str | None]]:
    """A row for each DICOM file below a folder, in the order of their names; other files are left out."""
    tags = [keyword for name, keyword in keywords.items() if name not in images]
    for path in sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names):
        dataset = _read(folder, str(path.relative_to(folder)), headers=tags) if _is_dicom(path) else None
        if dataset is not None:
            yield [
                str(path.relative_to(folder)) if name in images else _cell(dataset, keywords[name])
                for name in wanted
            ]


def _is_dicom(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _cell(dataset: pydicom.Dataset, keyword: str) -> str | None:
    value = dataset.get(keyword)
    text = "" if value is None else str(value)
    # An age is written 045Y: whole years, or absent.
    if keyword == "PatientAge":
        return str(int(text[:-1])) if text[:-1].isdigit() and text.endswith("Y") else None
    return text or None


def pixels(folder: Path, name: str, image: Image) -> NDArray[np.float64]:
    """The pixels of one file as float64 [height * width_px], in the modality's units, row by row.

    MONOCHROME1 is turned about the contract's window, so that higher is brighter everywhere.

    Guarantee: images_that_may_show_a_name_are_refused - said to be burnt in, or nothing said where that is
    usual.
    Guarantee: files_outside_the_folder_are_out_of_reach - by name, by "..", by a link.
    Guarantee: image_errors_hold_no_value - nothing of a header but the name of the file.
    Raises: ContractError with one code a rule.
    """
    dataset = _read(folder, name)
    modality = str(dataset.get("Modality", ""))
    said, kind = str(dataset.get("BurnedInAnnotation", "")), str(dataset.get("SOPClassUID", ""))
    doubtful = modality in _MAY_SHOW_NAMES or kind.startswith(_SECONDARY_CAPTURE)
    if said == "YES" or (said != "NO" and doubtful):
        problem = "its pixels may show a name: BurnedInAnnotation is not NO"
        raise _refusal(
            "source.image.burnt-in", name, problem, "Clean the images, and have that said in their headers."
        )
    if modality != image.modality:
        raise _refusal("source.image.modality", name, f"it is not {image.modality}, which the contract needs")
    if str(dataset.get("PhotometricInterpretation", "")) not in ("MONOCHROME1", "MONOCHROME2"):
        raise _refusal("source.image.colour", name, "it is not a grey image with pixels")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise _refusal("source.image.frames", name, "it has several frames")
    if not 0 < int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) <= MAX_PIXELS:
        raise _refusal("source.image.size", name, f"it has no pixels, or more than {MAX_PIXELS}")
    slope = _number(dataset, "RescaleSlope", 1.0, name)
    intercept = _number(dataset, "RescaleIntercept", 0.0, name)
    with np.errstate(over="ignore", invalid="ignore"):
        values = slope * _decoded(dataset, name) + intercept
    if not np.isfinite(values).all():
        raise _refusal("source.image.values", name, "its pixels are not all finite")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = image.low + image.high - values
    height, width = values.shape
    return (_weights(height, image.height) @ values @ _weights(width, image.width_px).T).ravel()


def _read(folder: Path, name: str, headers: list[str] | None = None) -> pydicom.Dataset:
    """A file's dataset; only ``headers`` of it where these are given."""
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise _refusal("source.image.path", name, "it is not the name of a file below the folder")
    if path.resolve() != folder.resolve() / name:
        raise _refusal("source.image.path", name, "it is a link, or lies below one")
    if regular_file(path).stat().st_size > MAX_FILE_BYTES:
        raise _refusal("source.image.size", name, f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            # Headers bend the rules everywhere, and the warnings quote them.
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path, stop_before_pixels=headers is not None, specific_tags=headers)
    except Exception:
        failed = _refusal("source.image.format", name, "it is no DICOM file, or a broken one")
    # Raised outside of the handler: the library's words may quote a header.
    raise failed


def _decoded(dataset: pydicom.Dataset, name: str) -> NDArray[np.float64]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = np.asarray(dataset.pixel_array, dtype=np.float64)
        if found.shape == (dataset.Rows, dataset.Columns):
            return found
    except Exception:
        found = np.zeros(0)
    problem = "it has no pixels that can be decoded here"
    raise _refusal("source.image.pixels", name, problem, "Export it without compression.")


def _number(dataset: pydicom.Dataset, keyword: str, default: float, name: str) -> float:
    try:
        value = dataset.get(keyword)
        return default if value is None else float(value)
    except (TypeError, ValueError):
        found = _refusal("source.image.values", name, f"its {keyword} is no number")
    raise found


def _refusal(code: str, name: str, problem: str, remedy: str = _REMEDY) -> ContractError:
    return ContractError(code, f"{name!r}: {problem}", remedy=remedy)


def _weights(size: int, wanted: int) -> NDArray[np.float64]:
    """What each of ``size`` places gives to each of ``wanted``: float64 [wanted, size], rows sum to 1."""
    scale = size / wanted
    centres = (np.arange(wanted) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, np.newaxis] - np.arange(size)) / max(scale, 1.0)
    weights = np.clip(1.0 - distance, 0.0, None)
    made: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return made
