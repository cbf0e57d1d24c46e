from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from common.privacy import decimals


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.0",
        "01",
        "00",
        ".5",
        "5.",
        "1e3",
        "+1",
        "-1",
        "-0",
        "NaN",
        "inf",
        " 1",
        "1 ",
        "1\n",
        "1_0",
        "1,5",
        "٣",
    ],
)
def test_decimal_text_is_canonical(text: str) -> None:
    with pytest.raises(UsageError):
        decimals.fraction_of(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**12), st.integers(0, 30))
def test_one_number_has_one_text(units: int, places: int) -> None:
    value = Fraction(units, 10**places)
    text = decimals.text_up(value, places)
    assert decimals.fraction_of(text) == value
    assert decimals.text_up(value, places + 3) == text


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-20, 1e15))
def test_a_float_keeps_its_value(value: float) -> None:
    assert float(decimals.fraction_of(decimals.text_of(value))) == value
    assert decimals.text_of(np.float64(value)) == decimals.text_of(value)
    assert float(decimals.exact(value)) == value


@pytest.mark.parametrize("value", [nan, inf, -1.0, 1e20, 1e-41])
def test_numbers_without_text_are_refused(value: float) -> None:
    with pytest.raises(UsageError):
        decimals.text_of(value)


@settings(max_examples=200, deadline=None)
@given(st.fractions(0, 10**6))
def test_rounding_goes_where_its_name_says(value: Fraction) -> None:
    unit = Fraction(1, 10**6)
    assert value <= decimals.fraction_of(decimals.text_up(value, 6)) < value + unit
    up = decimals.float_up(value)
    assert Fraction(up) >= value > Fraction(np.nextafter(up, -inf))


def test_float_up_past_the_largest_is_infinite() -> None:
    assert decimals.float_up(Fraction(10**400)) == inf


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**60), st.integers(1, 10**7))
def test_z_rounds_down(radicand: int, divisor: int) -> None:
    value = decimals.fraction_of(decimals.root_over_down(radicand, divisor))
    above = value + Fraction(1, 10**12)
    assert (value * divisor) ** 2 <= radicand < (above * divisor) ** 2
