"""Two extracts that differ in one patient, through the whole path of a hospital: file, table, split, clipping, grid."""

import csv
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.worker import Worker
from common.admissible import check
from common.privacy.gate import GateParams
from common.study import Manifest
from common.tasks.state import state_bytes
from tests.client.federation import Federation

Row = tuple[str, object, object, str]
KEY = "5a" * 32
CELLS = st.one_of(
    st.floats(0, 100),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "n/a", "1e999", "-1", "61,5", "0x10"]),
)
# Few patients of many rows and many of few, in any order in the file.
ROWS = st.lists(
    st.tuples(
        st.sampled_from([f"p{n}" for n in range(7)]), CELLS, CELLS, st.sampled_from(["no", "yes", "?"])
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def studies(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """The small study with shared noise, whose release is Q itself, for models with and without eta."""
    federation = Federation(template, tmp_path_factory.mktemp("neighbours"))
    changes: dict[str, Any] = {
        "training__mode": "shared-noise",
        "training__engine": "bookkeeping",
        "aggregation__codec__step": 0.001,
        "contract__rows_per_patient": 3,
        "contract__holdout": 0.25,
    }
    mlp: dict[str, Any] = {
        "model": {"kind": "mlp", "hidden": [3], "activation": "tanh"},
        "privacy__arithmetic": "f32_assumed",
    }
    return {
        "f64_bounded": federation.manifest(**changes),
        "f32_assumed": federation.manifest(**changes | mlp),
    }


def released(manifest: Manifest, rows: list[Row], state: bytes) -> NDArray[np.int64]:
    """Q of one round on a file with these rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "extract.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("patient", "age", "bmi", "readmitted"), *rows])
        worker = Worker()
        source = {"source": f"csv:{path}", "patient": "patient"}
        worker.prepare({"source": source, "split_key": KEY}, manifest.to_bytes())
        return np.frombuffer(worker.compute(state), "<i8")


@pytest.mark.parametrize("arithmetic", ["f64_bounded", "f32_assumed"])
@given(
    rows=ROWS,
    leaves=st.sampled_from([f"p{n}" for n in range(7)]),
    seed=st.integers(0, 10**6),
    far=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neighbours_through_file_split_clip_and_grid(
    studies: dict[str, Manifest], arithmetic: str, rows: list[Row], leaves: str, seed: int, far: bool
) -> None:
    manifest = studies[arithmetic]
    admitted = check(manifest, None)
    assert isinstance(admitted.params, GateParams)
    random = np.random.default_rng(seed)
    size = 8.0 if far else 0.5
    state = state_bytes(
        {t.name: random.normal(0, size, t.shape).astype(np.float32) for t in admitted.layout}, admitted.layout
    )
    whole = released(manifest, rows, state)
    without = released(manifest, [row for row in rows if row[0] != leaves], state)
    apart = math.isqrt(sum(int(a - b) ** 2 for a, b in zip(whole, without, strict=True)) * 10**6) / 1000
    assert apart <= admitted.params.delta_g
    # The clip alone: what the roundings of the grid may add is the root of d at the most.
    assert apart <= 1000 * (1 + 1e-3) + math.sqrt(admitted.dim)


def test_a_patient_who_is_clipped_moves_it_by_nearly_the_clip(studies: dict[str, Manifest]) -> None:
    """Else the bound above would hold for nothing."""
    manifest = studies["f64_bounded"]
    admitted = check(manifest, None)
    state = state_bytes({t.name: np.full(t.shape, 0.1, np.float32) for t in admitted.layout}, admitted.layout)
    several: list[Row] = [("p1", 99, 49, "yes")] * 3
    for patient in range(1, 40):
        rows = [(f"q{patient}", *row[1:]) for row in several]
        moved = released(manifest, rows, state)
        if moved.any():
            break
    assert 980 <= np.linalg.norm(moved) <= admitted.params.delta_g  # type: ignore[union-attr]
