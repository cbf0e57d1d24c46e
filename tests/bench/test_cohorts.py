"""The arithmetic of the benchmark, and that its stored pairs are those of a setup."""

import xml.etree.ElementTree as ElementTree

import pytest

from tests.bench.cohorts import InMemory, Meter, exponent, measured_round, measured_setup, played
from tests.bench.plot import log_log


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_the_exponent_is_the_one_of_a_power_law(power: float) -> None:
    sizes = (10, 100, 1000)
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_the_exponent_is_the_least_squares_slope() -> None:
    # By hand, for logarithms 0, 1, 2 and 0, 2, 2 of some base: covariance 2, variance 2.
    assert exponent((1, 10, 100), (1, 100, 100)) == pytest.approx(1.0)


def test_rounds_of_stored_pairs_and_of_a_setup_are_both_whole() -> None:
    """Both are checked against the plain sums where they are played."""
    paired, stored = InMemory(4, parameters=50), InMemory(4, parameters=50)
    meter = measured_setup(paired)
    stored.pair_as_stored()
    assert set(meter.site_s) == set(meter.sent) == set(meter.received) == {1, 2, 3, 4}
    assert played(stored, Meter()).payloads.keys() == {1, 2, 3, 4}
    found = measured_round(paired)
    assert found.hospitals == 4
    assert 0 < found.kept_bytes <= found.peak_bytes
    assert found.hub_s > 0
    assert found.hospital_s > 0


def test_the_drawing_is_xml_with_a_point_a_value() -> None:
    drawing = ElementTree.fromstring(  # noqa: S314 - our own
        log_log((10, 100, 1000), [("a", (1.0, 20.0, 300.0)), ("b", (5.0, 6.0, 7.0))], "n")
    )
    circles = [node for node in drawing.iter() if node.tag.endswith("circle")]
    assert len(circles) == 6
    assert len({node.get("cx") for node in circles}) == 3
    assert all(0 <= float(node.get("cy", "-1")) <= 230 for node in circles)
