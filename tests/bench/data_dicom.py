"""A thousand small CT images, from the folder to the table of training."""

import tempfile
import time
from pathlib import Path

import numpy as np

from client.sources.extract import load_table
from client.sources.source import ColumnMap, DataSource
from common.contract import Contract, Image, Label
from tests.bench.result import Result
from tests.client.sources.test_dicom import write

FILES = 1000
SIZE = 256


def run() -> list[Result]:
    image = Image(kind="image", name="scan", height=64, width_px=64, modality="CT", low=-1000.0, high=1000.0)
    contract = Contract(patient="pid", features=(image,), label=Label(name="ill", classes=("0", "1")))
    with tempfile.TemporaryDirectory() as name:
        folder, index = Path(name) / "images", Path(name) / "index.csv"
        folder.mkdir()
        generator = np.random.default_rng(0)
        for i in range(FILES):
            write(folder / f"{i}.dcm", generator.integers(0, 4096, (SIZE, SIZE), dtype=np.uint16))
        index.write_text("file,pid,ill\n" + "".join(f"{i}.dcm,p{i},{i % 2}\n" for i in range(FILES)))
        source = DataSource(
            source=f"dicom:{folder}", patient="pid", table=str(index), map={"scan": ColumnMap(column="file")}
        )
        started = time.perf_counter()
        table = load_table(source, contract, key=bytes(32))
        took = time.perf_counter() - started
        if not table.x.any(axis=1).all():
            raise RuntimeError("an image was not read")
    return [Result("data.DICOM, 1000 files of 256 x 256, first pass", took, "s", 20)]
