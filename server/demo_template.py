"""A template's demonstration: made-up hospitals with something planted to learn, and how well it was learnt.

Source: ``common.synthetic`` (what is planted). Rules: nobody's rows; hospitals differ in size; the public
test set is made by another seed and belongs to the demo; images are DICOM files, as a hospital has them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.contract import Contract, Image
from common.errors import FailureError
from common.methods import Evaluation, RandomForest
from common.study import Study
from common.synthetic import columns_of
from common.tasks import evaluation, forest
from common.tasks.state import State
from server.demo_data import HospitalRows, Rows

TEST_ROWS: Final = 1000
SMALLEST: Final = 0.4


def split(
    contract: Contract, kind: str, patients: int, hospitals: int, seed: int
) -> tuple[Rows, list[HospitalRows]]:
    """The public test set, and hospitals of ``patients`` rows on average, the last much smaller."""
    strange = kind == "autoencoder"
    sizes = np.linspace(2 - SMALLEST, SMALLEST, hospitals) * patients
    parts = [
        HospitalRows(_table(columns_of(contract, round(size), 1000 * seed + at, anomalies=strange)))
        for at, size in enumerate(sizes, 1)
    ]
    return Rows(_table(columns_of(contract, TEST_ROWS, 1000 * seed, anomalies=strange))), parts


def encoded(contract: Contract, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rows as a model sees them."""
    return contract.encode({name: _cells(values) for name, values in rows.columns.items()})


def source(contract: Contract, rows: HospitalRows, home: Path, data: str) -> str:
    """Write a hospital's rows, and images if there are any; the source as a policy names it."""
    table = home / f"{data}.csv"
    images = [feature for feature in contract.features if isinstance(feature, Image)]
    if not images:
        rows.write_csv(table)
        return f"csv:{table}"
    folder = home / "images"
    folder.mkdir()
    columns = dict(rows.columns)
    for image in images:
        names = [f"{image.name}-{at:05}.dcm" for at in range(len(columns[image.name]))]
        for name, pixels in zip(names, columns[image.name], strict=True):
            _write_dicom(folder / name, image, np.asarray(pixels))
        columns[image.name] = list(names)
    HospitalRows(columns).write_csv(table)
    return f"dicom:{folder}"


def score(study: Study, state: State, test: Rows) -> dict[str, float]:
    """How the last model does on the public test set, exactly; nothing for statistics."""
    model, contract = study.model, study.contract
    if model.kind == "statistics":
        return {}
    x, y = encoded(contract, test)
    if isinstance(model, RandomForest):
        found = forest.read_out(forest.plant(model, contract), state["leaves"].astype(np.float64), 0.0)
        said = found.scores(x)
    else:
        from common.tasks.models.layout import layout
        from common.tasks.models.modules import build, load
        from common.tasks.models.prediction import predict

        tensors = layout(model, contract)
        module = load(build(model, contract), {t.name: state[t.name] for t in tensors})
        said = predict(model, contract, module, x)
    rules = Evaluation()
    counts = evaluation.cells(rules, model, contract, (0, len(study.members)), x, y, said).sum(axis=0)
    read = evaluation.read_out(rules, model, contract, study.members, counts, 0.0)["everybody"]
    shown = {name: round(value.value, 4) for name, value in read.items()}
    return {
        name: value for name, value in shown.items() if not name.startswith("bin ") and " at " not in name
    }


def _table(columns: dict[str, Sequence[object]]) -> dict[str, list[object]]:
    return {name: list(cells) for name, cells in columns.items()}


def _cells(values: Sequence[Any]) -> Any:
    """A column as ``Contract.encode`` takes it: lists read from JSON, pixels stacked."""
    if isinstance(values[0], np.ndarray):
        return np.stack(values)
    lists = any(isinstance(value, str) and value.startswith("[") for value in values)
    return [json.loads(value) for value in values] if lists else values


def _write_dicom(path: Path, image: Image, pixels: NDArray[np.float64]) -> None:
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    except ImportError as error:
        raise FailureError(
            "demo.pydicom", "the demo of images needs pydicom", remedy="pip install 'wardround[dicom]'"
        ) from error
    dataset: Any = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
    dataset.PatientID, dataset.Modality, dataset.BurnedInAnnotation = "synthetic", image.modality, "NO"
    dataset.Rows, dataset.Columns = image.height, image.width_px
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = np.clip(np.rint(pixels), 0, 65535).astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
