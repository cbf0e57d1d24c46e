"""Units of measurement in UCUM's words, and how the commonest laboratory values go from one to another.

Source: UCUM 2.1 (unit texts); molar masses from IUPAC atomic weights 2021; Hoelzel et al., Clin Chem 50
(2004) 166 (HbA1c, NGSP = 0.09148 IFCC + 2.152). Rules: a conversion is a public constant; an unknown one is
none, never a guess.
"""

from typing import Final, Literal, TypeAlias

Analyte: TypeAlias = Literal[
    "", "glucose", "creatinine", "cholesterol", "triglycerides", "urea", "urea_nitrogen", "bilirubin",
    "urate", "calcium", "magnesium", "iron", "hemoglobin", "sodium", "potassium", "chloride", "hba1c",
]  # fmt: skip

_MOLAR_MASS: Final = {  # grams a mole
    "glucose": 180.156, "creatinine": 113.12, "cholesterol": 386.66, "triglycerides": 885.4, "urea": 60.056,
    "urea_nitrogen": 28.014, "bilirubin": 584.67, "urate": 168.112, "calcium": 40.078, "magnesium": 24.305,
    "iron": 55.845, "hemoglobin": 16114.5, "sodium": 22.990, "potassium": 39.098, "chloride": 35.45,
}  # fmt: skip
_CHARGE: Final = {"sodium": 1, "potassium": 1, "chloride": 1, "calcium": 2, "magnesium": 2}

# Each unit as a * value + b of its dimension's first unit.
_DIMENSIONS: Final[dict[str, dict[str, tuple[float, float]]]] = {
    "mass concentration": {
        "g/L": (1, 0), "g/dL": (10, 0), "mg/mL": (1, 0), "mg/dL": (0.01, 0), "mg/L": (1e-3, 0),
        "ug/mL": (1e-3, 0), "ug/dL": (1e-5, 0), "ug/L": (1e-6, 0), "ng/mL": (1e-6, 0),
        "ng/L": (1e-9, 0), "pg/mL": (1e-9, 0),
    },
    "substance concentration": {
        "mol/L": (1, 0), "mmol/L": (1e-3, 0), "umol/L": (1e-6, 0), "nmol/L": (1e-9, 0), "pmol/L": (1e-12, 0),
    },
    "charge concentration": {"eq/L": (1, 0), "meq/L": (1e-3, 0)},
    "mass": {"kg": (1, 0), "g": (1e-3, 0), "mg": (1e-6, 0), "[lb_av]": (0.45359237, 0)},
    "length": {"m": (1, 0), "cm": (0.01, 0), "mm": (1e-3, 0), "[in_i]": (0.0254, 0), "[ft_i]": (0.3048, 0)},
    "temperature": {"Cel": (1, 0), "[degF]": (5 / 9, -160 / 9), "K": (1, -273.15)},
    "pressure": {"kPa": (1, 0), "Pa": (1e-3, 0), "mm[Hg]": (0.133322387415, 0)},
    "time": {"h": (1, 0), "min": (1 / 60, 0), "s": (1 / 3600, 0), "d": (24, 0), "a": (8766, 0)},
    "share": {"1": (1, 0), "%": (0.01, 0)},
}  # fmt: skip
UNITS: Final = (*(unit for units in _DIMENSIONS.values() for unit in units), "mmol/mol")
_HBA1C: Final = {"%": (1.0, 0.0), "mmol/mol": (0.09148, 2.152)}


def factor(analyte: str, unit_from: str, unit_to: str) -> tuple[float, float] | None:
    """(a, b) so that a value v in ``unit_from`` is a v + b in ``unit_to``; None where no conversion is known.

    ``analyte`` is what is measured: masses become amounts of substance through its molar mass.

    Guarantee: conversions_go_both_ways - there and back is the same value, up to rounding.
    """
    if unit_from == unit_to:
        return 1.0, 0.0
    if analyte == "hba1c":
        ends = _HBA1C.get(unit_from), _HBA1C.get(unit_to)
        return None if ends[0] is None or ends[1] is None else _between(ends[0], ends[1])
    first, last = _placed(unit_from), _placed(unit_to)
    if first is None or last is None:
        return None
    if first[0] == last[0]:
        return _between(first[1], last[1])
    here, there = _moles(analyte, *first), _moles(analyte, *last)
    return None if here is None or there is None else (here / there, 0.0)


def _placed(unit: str) -> tuple[str, tuple[float, float]] | None:
    return next(((name, units[unit]) for name, units in _DIMENSIONS.items() if unit in units), None)


def _between(first: tuple[float, float], last: tuple[float, float]) -> tuple[float, float]:
    return first[0] / last[0], (first[1] - last[1]) / last[0]


def _moles(analyte: str, dimension: str, unit: tuple[float, float]) -> float | None:
    """Moles a litre that one of ``unit`` holds."""
    if dimension == "substance concentration":
        return unit[0]
    if dimension == "mass concentration" and analyte in _MOLAR_MASS:
        return unit[0] / _MOLAR_MASS[analyte]
    if dimension == "charge concentration" and analyte in _CHARGE:
        return unit[0] / _CHARGE[analyte]
    return None
