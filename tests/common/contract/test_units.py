"""Conversions between units: known pairs, both ways, and what is unknown."""

import math

import pytest

from common.contract.units import _DIMENSIONS, _MOLAR_MASS, factor

# Pairs as laboratories print them, with the digits that they print.
KNOWN = [
    ("glucose", 100, "mg/dL", 5.551, "mmol/L"),
    ("creatinine", 1.0, "mg/dL", 88.40, "umol/L"),
    ("cholesterol", 200, "mg/dL", 5.172, "mmol/L"),
    ("triglycerides", 150, "mg/dL", 1.694, "mmol/L"),
    ("urea_nitrogen", 14, "mg/dL", 4.997, "mmol/L"),
    ("urea", 30, "mg/dL", 4.995, "mmol/L"),
    ("bilirubin", 1.0, "mg/dL", 17.10, "umol/L"),
    ("urate", 6.0, "mg/dL", 356.9, "umol/L"),
    ("calcium", 10.0, "mg/dL", 2.495, "mmol/L"),
    ("calcium", 5.0, "meq/L", 2.5, "mmol/L"),
    ("magnesium", 2.0, "mg/dL", 0.8229, "mmol/L"),
    ("hemoglobin", 15.0, "g/dL", 9.308, "mmol/L"),
    ("potassium", 4.0, "meq/L", 4.0, "mmol/L"),
    ("hba1c", 6.5, "%", 47.53, "mmol/mol"),
    ("", 98.6, "[degF]", 37.0, "Cel"),
    ("", 310.15, "K", 37.0, "Cel"),
    ("", 120, "mm[Hg]", 16.00, "kPa"),
    ("", 150, "[lb_av]", 68.04, "kg"),
    ("", 70, "[in_i]", 177.8, "cm"),
    ("", 4.2, "g/dL", 42, "g/L"),
    ("", 50, "%", 0.5, "1"),
]


@pytest.mark.parametrize(("analyte", "value", "unit", "expected", "into"), KNOWN)
def test_known_values_are_converted(
    analyte: str, value: float, unit: str, expected: float, into: str
) -> None:
    change = factor(analyte, unit, into)
    assert change is not None
    assert value * change[0] + change[1] == pytest.approx(expected, rel=3e-4)


def test_conversions_go_both_ways() -> None:
    units = [unit for dimension in _DIMENSIONS.values() for unit in dimension] + ["mmol/mol"]
    pairs = 0
    for analyte in ("", "hba1c", *_MOLAR_MASS):
        for first in units:
            for last in units:
                there, back = factor(analyte, first, last), factor(analyte, last, first)
                assert (there is None) == (back is None)
                if there is not None and back is not None:
                    pairs += 1
                    assert math.isclose(back[0] * (there[0] * 41.5 + there[1]) + back[1], 41.5, rel_tol=1e-9)
    assert pairs > 500


@pytest.mark.parametrize(
    ("analyte", "unit", "into"),
    [
        ("", "mg/dL", "mmol/L"),
        ("glucose", "mg/dL", "mmHg"),
        ("glucose", "kg", "mmol/L"),
        ("glucose", "meq/L", "mmol/L"),
        ("hba1c", "%", "1"),
        ("", "mg/dl", "mg/dL"),
        ("", "", "mg/dL"),
    ],
)
def test_an_unknown_conversion_is_none(analyte: str, unit: str, into: str) -> None:
    assert factor(analyte, unit, into) is None


def test_the_same_unit_is_the_same_value() -> None:
    assert factor("", "a unit of our own", "a unit of our own") == (1.0, 0.0)
