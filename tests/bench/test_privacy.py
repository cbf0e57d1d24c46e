"""The data of the four hospitals as the benchmark reads them, and its arithmetic."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests.bench import heart
from tests.bench.curves import Curve, Panel, drawing

present = pytest.mark.skipif(not heart.DATA.is_dir(), reason="the data of the four hospitals are not here")


@present
def test_rows_are_those_of_the_split() -> None:
    counts = {c: (len(heart.rows(c, "train")), len(heart.rows(c, "test"))) for c in heart.HOSPITALS}
    assert counts == {
        "cleveland": (199, 104),
        "hungarian": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
    }


@present
def test_thirteen_features_in_public_ranges_and_every_label_known() -> None:
    for center in heart.HOSPITALS:
        for part in ("train", "test"):
            x, y = heart.encoded(center, part)
            assert x.shape[1] == 13
            assert np.abs(x).max() <= 1
            assert set(y) <= {0, 1}
    assert set(heart.encoded("switzerland", "train")[1]) == {1}


@present
def test_a_cholesterol_of_zero_is_missing() -> None:
    at = 1 + heart.COLUMNS.index("chol")
    assert {row[at] for row in heart.rows("switzerland", "train")} == {""}
    feature = list(heart.PUBLIC).index("chol")
    assert not heart.encoded("switzerland", "train")[0][:, feature].any()


def test_auc_counts_pairs_and_half_of_the_ties() -> None:
    labels = np.array([1, 1, 0, 0])
    assert heart.auc(np.array([3.0, 1.0, 2.0, 1.0]), labels) == (1 + 1 + 0 + 0.5) / 4


def test_the_drawing_is_well_formed() -> None:
    curves = [Curve("a", [(0.1, 0.8), (1, 0.9)], 0), Curve("b", [(0.1, 0.7)], 1, dashed=True)]
    root = ElementTree.fromstring(drawing([Panel("t", "x", (0.1, 1), curves)]))  # noqa: S314
    assert len(root.findall(".//{*}circle")) == 3
