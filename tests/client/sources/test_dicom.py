"""DICOM files, written by pydicom as scanners write them: what becomes of their pixels, and which are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from client.sources import dicom
from client.sources.dicom import pixels
from client.sources.extract import load_table
from client.sources.source import DataSource
from common.contract import Category, Contract, Image, Label, Number
from common.errors import ContractError

CT, SECONDARY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
SECRET = "Grünwald^Zora"
SCAN = Image(kind="image", name="scan", height=2, width_px=3, modality="CT", low=-1000.0, high=1000.0)
CONTRACT = Contract(patient="pid", features=(SCAN,), label=Label(name="ill", classes=("0", "1")))
STORED = np.array([[0, 24, 1024], [2024, 4000, 1524]], dtype=np.uint16)


def write(
    path: Path, stored: NDArray[Any] = STORED, *, syntax: str = ExplicitVRLittleEndian, **headers: Any
) -> Path:
    """A CT image with a patient's name; ``headers`` change it, None takes one away."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = headers.pop("SOPClassUID", CT)
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.Modality = SECRET, "p1", "CT"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, int(stored.dtype == np.int16)
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.PixelData = stored.tobytes()
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    for name, value in headers.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    if syntax == JPEG2000Lossless:
        data = path.read_bytes().replace(
            ExplicitVRLittleEndian.encode() + b"\0", JPEG2000Lossless.encode()[:20]
        )
        path.write_bytes(data)
    return path


def values(folder: Path, name: str = "a.dcm", image: Image = SCAN) -> list[list[float]]:
    found: list[list[float]] = pixels(folder, name, image).reshape(image.height, image.width_px).tolist()
    return found


def refusal(folder: Path, name: str = "a.dcm", image: Image = SCAN) -> str:
    with pytest.raises(ContractError) as caught:
        pixels(folder, name, image)
    error = caught.value
    assert repr(name) in error.problem or error.code == "source.unreadable"
    assert error.remedy
    assert error.__context__ is None
    assert "Zora" not in str(error) + repr(vars(error))
    return error.code


def test_stored_values_become_the_modality_s(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm")
    assert values(tmp_path) == [[-1024, -1000, 0], [1000, 2976, 500]]
    write(tmp_path / "a.dcm", STORED.astype(np.int16) - 50, RescaleSlope="2.5", RescaleIntercept=None)
    assert values(tmp_path) == [[-125, -65, 2435], [4935, 9875, 3685]]
    write(tmp_path / "a.dcm", syntax=RLELossless)
    assert values(tmp_path) == [[-1024, -1000, 0], [1000, 2976, 500]]


def test_higher_is_brighter_everywhere(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    assert values(tmp_path) == [[1024, 1000, 0], [-1000, -2976, -500]]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(-100, 100))
@settings(max_examples=60, deadline=None)
def test_resampling_keeps_a_flat_image_flat_and_stays_between(
    h: int, w: int, rows: int, columns: int, value: int
) -> None:
    flat = dicom._weights(rows, h) @ np.full((rows, columns), float(value)) @ dicom._weights(columns, w).T
    np.testing.assert_allclose(flat, value, atol=1e-9)
    ramp = np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)
    made = dicom._weights(rows, h) @ ramp @ dicom._weights(columns, w).T
    assert made.shape == (h, w)
    assert ramp.min() - 1e-9 <= made.min() <= made.max() <= ramp.max() + 1e-9
    if (h, w) == (rows, columns):
        np.testing.assert_array_equal(made, ramp)


def test_a_smaller_image_is_an_average_of_areas() -> None:
    checkers = np.indices((8, 8)).sum(axis=0) % 2 * 100.0
    half = dicom._weights(8, 4) @ checkers @ dicom._weights(8, 4).T
    np.testing.assert_allclose(half[1:-1, 1:-1], 50.0)


def test_images_that_may_show_a_name_are_refused(tmp_path: Path) -> None:
    ultrasound = SCAN.model_copy(update={"modality": "US"})
    write(tmp_path / "a.dcm", BurnedInAnnotation="YES")
    assert refusal(tmp_path) == "source.image.burnt-in"
    write(tmp_path / "a.dcm", Modality="US")
    assert refusal(tmp_path, image=ultrasound) == "source.image.burnt-in"
    write(tmp_path / "a.dcm", SOPClassUID=SECONDARY)
    assert refusal(tmp_path) == "source.image.burnt-in"
    for headers, image in (({"Modality": "US"}, ultrasound), ({"SOPClassUID": SECONDARY}, SCAN)):
        write(tmp_path / "a.dcm", BurnedInAnnotation="NO", **headers)
        assert len(values(tmp_path, image=image)) == 2


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Modality": "MR"}, "source.image.modality"),
        ({"PixelData": None}, "source.image.pixels"),
        ({"PixelData": b"\0\0"}, "source.image.pixels"),
        ({"PhotometricInterpretation": "RGB"}, "source.image.colour"),
        ({"PhotometricInterpretation": None}, "source.image.colour"),
        ({"NumberOfFrames": "2"}, "source.image.frames"),
        ({"Rows": 0}, "source.image.size"),
        ({"Rows": 65535, "Columns": 65535}, "source.image.size"),
        ({"RescaleSlope": "1e308"}, "source.image.values"),
        ({"syntax": JPEG2000Lossless}, "source.image.pixels"),
    ],
)
def test_what_is_no_image_of_the_contract_is_refused(
    tmp_path: Path, headers: dict[str, Any], code: str
) -> None:
    write(tmp_path / "a.dcm", np.full((2, 3), 60000, dtype=np.uint16), **headers)
    assert refusal(tmp_path) == code


@pytest.mark.parametrize(
    "data",
    [b"", b"DICM", bytes(128) + b"DICM", bytes(128) + b"DICM" + SECRET.encode() * 40, b"\x89PNG" * 100],
)
def test_broken_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.dcm").write_bytes(data)
    assert refusal(tmp_path).startswith("source.image.")


def test_image_errors_hold_no_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    whole = path.read_bytes()
    for cut in range(132, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        refusal(tmp_path)


def test_files_outside_the_folder_are_out_of_reach(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    outside = write(tmp_path / "a.dcm")
    write(folder / "sub" / "b.dcm")
    (folder / "link.dcm").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    for name in ("../a.dcm", "sub/../../a.dcm", str(outside), "link.dcm", "linked/a.dcm", ""):
        assert refusal(folder, name) == "source.image.path"
    assert refusal(folder, "absent.dcm") == "source.unreadable"
    assert len(values(folder, "sub/b.dcm")) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom, "MAX_FILE_BYTES", 10)
        assert refusal(folder, "sub/b.dcm") == "source.image.size"


def test_an_index_names_the_files(tmp_path: Path) -> None:
    folder, index = tmp_path / "images", tmp_path / "index.csv"
    folder.mkdir()
    write(folder / "a.dcm")
    write(folder / "b.dcm", BurnedInAnnotation="YES")
    index.write_text("file,pid,ill,further\na.dcm,p1,1,x\nb.dcm,p2,0,x\n../a.dcm,p3,0,x\n,p4,1,x\n")
    source = DataSource(
        source=f"dicom:{folder}", patient="pid", table=str(index), map={"scan": {"column": "file"}}
    )  # type: ignore[dict-item]
    table = load_table(source, CONTRACT, key=bytes(32))
    # In a round a file that is refused is a constant.
    assert table.ids == ["p1", "p2", "p3", "p4"]
    np.testing.assert_allclose(table.x, [[-1, -1, 0, 1, 1, 0.5], [0] * 6, [0] * 6, [0] * 6])


def test_headers_give_rows_where_there_is_no_index(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    write(folder / "a.dcm", PatientSex="F", PatientAge="045Y", BodyPartExamined="CHEST")
    write(folder / "b" / "c.dcm", PatientID="p2", PatientAge="011M", BodyPartExamined="HEAD")
    (folder / "DICOMDIR.txt").write_text("not an image")
    (folder / "link.dcm").symlink_to(folder / "a.dcm")
    contract = Contract(
        patient="pid",
        features=(
            SCAN,
            Number(kind="number", name="age", unit="a", minimum=0.0, maximum=90.0),
            Category(kind="category", name="PatientSex", codes=("F", "M")),
        ),
        label=Label(name="part", classes=("CHEST", "HEAD")),
    )
    mapping: Any = {"age": {"column": "PatientAge"}, "part": {"column": "BodyPartExamined"}}
    source = DataSource(source=f"dicom:{folder}", patient="pid", map=mapping)
    table = load_table(source, contract, key=bytes(32))
    assert (table.ids, table.y.tolist()) == (["p1", "p2"], [0, 1])
    np.testing.assert_allclose(table.x[:, 6:], [[0, 1, 0], [0, 0, 0]])
    with pytest.raises(ContractError) as caught:
        load_table(source.model_copy(update={"map": {}}), contract, key=bytes(32))
    assert (caught.value.code, "'age'" in caught.value.problem) == ("source.column", True)
