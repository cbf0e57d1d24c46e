"""The reliability plot: one point a bin that holds somebody, names escaped."""

import xml.etree.ElementTree as ET

import pytest

from client.reliability import drawn
from common.errors import RefusedError

SPACE = "{http://www.w3.org/2000/svg}"


def test_a_plot_has_a_point_a_known_bin() -> None:
    found = drawn(
        {"global": {"bin 0": 0.1, "bin 1": None, "bin 2": 0.9, "auroc": 0.8}, "<local>": {"bin 0": 0.5}}
    )
    root = ET.fromstring(found)  # noqa: S314 - our own text
    titles = [title.text for title in root.iter(f"{SPACE}title")]
    assert titles == [
        "global: said 0.17, came true 0.10",
        "global: said 0.83, came true 0.90",
        "<local>: said 0.50, came true 0.50",
    ]
    assert len(list(root.iter(f"{SPACE}polyline"))) == 2
    assert "<script" not in found


def test_a_model_without_bins_has_no_plot() -> None:
    with pytest.raises(RefusedError) as caught:
        drawn({"global": {"rmse": 0.1}})
    assert caught.value.code == "benefit.plot"
