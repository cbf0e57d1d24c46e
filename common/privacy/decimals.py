"""Exact numbers as text: canonical decimal strings, and rounding in a direction that is named.

Source: PRIVACY.md "Event fields" (integers or decimal strings), "Report" (epsilon rounds up).
Rules: one number has one text; no exponent, sign, leading or trailing zero; a value is rounded only where
the name of the function says so, and always in the direction that claims less privacy.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Final

from common.errors import UsageError

_CANONICAL: Final = re.compile(r"(0|[1-9][0-9]{0,19})(\.[0-9]{0,39}[1-9])?")


def fraction_of(text: str) -> Fraction:
    """The rational that a canonical decimal string names, in [0, 10^20). Raises UsageError.

    Guarantee: decimal_text_is_canonical - "1.0", "01", "1e3", "+1", "NaN" and "" are refused.
    """
    if not _CANONICAL.fullmatch(text):
        raise UsageError("privacy.decimal", "a number is not a canonical decimal string in [0, 10^20)")
    return Fraction(text)


def text_of(value: float) -> str:
    """The canonical decimal string of a non-negative int or float, the latter by its shortest repr.

    Raises: UsageError when it is negative, not finite, above 10^20 or finer than 40 decimals.
    """
    # float() first: numpy's doubles have another repr.
    decimal = Decimal(repr(float(value)) if isinstance(value, float) else value)
    text = _trim(format(decimal, "f")) if decimal.is_finite() and decimal >= 0 else str(decimal)
    fraction_of(text)
    return text


def exact(value: float) -> Fraction:
    """The rational that ``text_of`` names: the decimal number that a person wrote, not the nearest double."""
    return fraction_of(text_of(value))


def text_up(value: Fraction, places: int) -> str:
    """``value`` >= 0 as canonical text, rounded up to ``places`` decimals."""
    return _scaled(math.ceil(value * 10**places), places)


def float_up(value: Fraction) -> float:
    """The smallest float64 that is at least ``value``; infinity past the largest."""
    try:
        near = float(value)
    except OverflowError:
        return math.inf
    return near if Fraction(near) >= value else math.nextafter(near, math.inf)


def root_over_down(radicand: int, divisor: int, places: int = 12) -> str:
    """sqrt(radicand) / divisor as canonical text, rounded down exactly.

    Guarantee: z_rounds_down - the text is at most the true value and less than one unit below it.
    """
    return _scaled(math.isqrt(radicand * 10 ** (2 * places)) // divisor, places)


def _scaled(units: int, places: int) -> str:
    whole, rest = divmod(units, 10**places)
    return _trim(f"{whole}.{rest:0{places}d}") if places else str(whole)


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
