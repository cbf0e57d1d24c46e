"""The demo's split: a public test set first, then hospitals of unlike size and mix; the seed decides it."""

import csv
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import FailureError
from server.demo_data import CLASSES, HospitalRows, Rows, accuracy, fit_logistic, shares, split_rows

PATIENTS = 569


def keys(rows: Rows) -> Counter[tuple[object, ...]]:
    """Rows as a multiset, without the patient column."""
    columns = [values for name, values in rows.columns.items() if name != "patient"]
    return Counter(zip(*columns, strict=True))


@pytest.mark.parametrize("hospitals", [3, 4, 8])
def test_every_row_belongs_to_one_party(hospitals: int) -> None:
    test, parts = split_rows(hospitals, 0)
    patients = [patient for part in parts for patient in part.columns["patient"]]
    assert len(set(patients)) == len(patients) == PATIENTS - len(test.columns["diagnosis"])
    whole = sum((keys(part) for part in parts), keys(test))
    assert sum(whole.values()) == PATIENTS
    assert Counter(row[-1] for row in whole.elements()) == {"malignant": 212, "benign": 357}
    # The test set holds a fifth of each class and no patient column.
    assert Counter(test.columns["diagnosis"]) == {"malignant": 42, "benign": 71}
    assert "patient" not in test.columns


def test_hospitals_differ_in_size_and_mix() -> None:
    _, parts = split_rows(4, 0)
    sizes = [len(part.columns["diagnosis"]) for part in parts]
    assert sizes[0] > sizes[2] > 0
    mixes = [part.columns["diagnosis"].count("malignant") / len(part.columns["diagnosis"]) for part in parts]
    assert min(mixes[0], mixes[2]) > max(mixes[1], mixes[3])
    assert all(0 < mix < 1 for mix in mixes)


def test_the_seed_decides_the_split_and_nothing_else() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    first, again, other = split_rows(4, 7), split_rows(4, 7), split_rows(4, 8)
    assert first == again
    assert first != other
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@given(st.integers(3, 40))
@settings(max_examples=20, deadline=None)
def test_shares_sum_to_one(hospitals: int) -> None:
    for share in shares(hospitals):
        assert share.shape == (hospitals,)
        assert share.sum() == pytest.approx(1)
        assert (share > 0).all()


def test_an_extract_is_a_csv_with_a_header(tmp_path: Path) -> None:
    rows = HospitalRows({"patient": ["P1", "P2"], "x": [0.1, 2.5], "diagnosis": list(CLASSES)})
    rows.write_csv(tmp_path / "extract.csv")
    with (tmp_path / "extract.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["patient", "x", "diagnosis"],
            ["P1", "0.1", "malignant"],
            ["P2", "2.5", "benign"],
        ]


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(FailureError, match="scikit-learn") as caught:
        split_rows(3, 0)
    assert "pip install" in caught.value.remedy


def test_the_reference_model_scores_as_scikit_learn_does() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 3))
    y = (x @ [1.0, -2.0, 0.5] + 0.3 * generator.normal(size=200) > 0).astype(np.int64)
    weight, bias = fit_logistic(x, y)
    assert weight.shape == (2, 3)
    assert bias.shape == (2,)
    expected = LogisticRegression(C=10.0, max_iter=2000).fit(x, y).score(x, y)
    assert accuracy(weight, bias, x, y) == pytest.approx(expected, abs=1e-4)
    assert accuracy(-weight, -bias, x, y) == pytest.approx(1 - expected, abs=1e-4)
