"""Encoding rows by public ranges, and the contracts that are refused."""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.contract import UNUSABLE, Category, Contract, Label, Number, text_of
from common.errors import ContractError

CONTRACT = Contract(
    patient="id",
    features=(
        Number(kind="number", name="age", unit="a", minimum=0.0, maximum=100.0),
        Number(kind="number", name="crp", unit="mg/l", minimum=0.1, maximum=1000.0, transform="log"),
        Number(kind="number", name="chol", unit="mg/dl", minimum=100.0, maximum=300.0, missing=150.0),
        Category(kind="category", name="sex", codes=("f", "m", "x")),
        Category(kind="category", name="pain", codes=("1", "2", "4")),
    ),
    label=Label(name="died", classes=("no", "yes")),
)
NAMES = CONTRACT.columns

cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.decimals(),
    st.text(max_size=8),
    st.sampled_from(
        ["12", "1e3", " 7.5\t", ".5", "5.", "+3", "-0", "f", "m", "1", "2.0", "yes", "no", "1_000"]
    ),
    st.floats(allow_nan=False).map(repr),
)
rows = st.lists(st.tuples(*[cells] * len(NAMES)), max_size=6)


def encode(table: list[tuple[Any, ...]]) -> tuple[np.ndarray, np.ndarray]:
    return CONTRACT.encode({name: [row[i] for row in table] for i, name in enumerate(NAMES)})


def one(**cell: object) -> list[float]:
    """The encoding of one row; absent unless said otherwise."""
    row = dict.fromkeys(NAMES) | cell
    return CONTRACT.encode({name: [value] for name, value in row.items()})[0][0].tolist()


def bits(table: list[tuple[Any, ...]]) -> list[bytes]:
    x, y = encode(table)
    return [x[i].tobytes() + y[i].tobytes() for i in range(len(table))]


@given(rows, rows)
@settings(max_examples=80, deadline=None)
def test_each_row_is_encoded_alone(first: list[tuple[Any, ...]], second: list[tuple[Any, ...]]) -> None:
    alone = [bits([row])[0] for row in first + second]
    assert bits(first + second) == alone
    assert bits(second + first) == alone[len(first) :] + alone[: len(first)]
    assert bits(second) == alone[len(first) :]


def test_rows_of_a_long_float_column_are_encoded_alone() -> None:
    values = np.random.default_rng(1).uniform(0.05, 1100, size=1031)
    feature = CONTRACT.features[1]
    together = feature.encode(values)[:, 0]
    assert [feature.encode(values[i : i + 1])[0, 0] for i in range(len(values))] == together.tolist()
    assert feature.encode(values[::2])[:, 0].tolist() == together[::2].tolist()


@given(rows)
@settings(max_examples=80, deadline=None)
def test_encoding_is_total(table: list[tuple[Any, ...]]) -> None:
    x, y = encode(table)
    assert x.shape == (len(table), CONTRACT.width)
    assert x.dtype == np.float64
    assert y.dtype == np.int64
    assert np.isfinite(x).all()
    assert (np.abs(x) <= 1).all()
    assert set(y.tolist()) <= {UNUSABLE, 0, 1}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.floats(-2e6, 4e6))
@settings(max_examples=80, deadline=None)
def test_linear_scaling_agrees_with_the_formula(low: float, span: float, value: float) -> None:
    high = low + span
    assume(low < high)
    feature = Number(kind="number", name="v", unit="1", minimum=low, maximum=high)
    inside = min(max(value, low), high)
    expected = 2 * (inside - low) / (high - low) - 1
    assert feature.encode([value])[0, 0] == pytest.approx(expected, abs=1e-9)
    assert feature.encode([low, high])[:, 0].tolist() == [-1, 1]


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6), st.floats(-1, 1e13))
@settings(max_examples=80, deadline=None)
def test_log_scaling_agrees_with_the_formula(low: float, factor: float, value: float) -> None:
    feature = Number(kind="number", name="v", unit="1", minimum=low, maximum=low * factor, transform="log")
    inside = min(max(value, low), low * factor)
    expected = 2 * math.log(inside / low) / math.log(factor) - 1
    assert feature.encode([value])[0, 0] == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.floats(), max_size=20))
@settings(max_examples=50, deadline=None)
def test_float_arrays_and_objects_agree(values: list[float]) -> None:
    for feature in CONTRACT.features[:3]:
        assert feature.encode(np.array(values)).tobytes() == feature.encode(values).tobytes()


@pytest.mark.parametrize("absent", [None, "", "  ", "NA", "?", "12,5", "1_000", "0x10", "٣", "nan", math.nan])
def test_unparsable_numbers_are_the_public_constant(absent: object) -> None:
    assert one(age=absent, chol=absent)[:3] == [0.0, 0.0, -0.5]


@pytest.mark.parametrize("absent", [math.inf, -math.inf, "inf", "1e999", 10**400, Decimal("sNaN"), [1], {}])
def test_non_finite_numbers_are_the_public_constant(absent: object) -> None:
    assert one(age=absent, chol=absent)[:3] == [0.0, 0.0, -0.5]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(50, 0.0), ("50", 0.0), (" 5e1\n", 0.0), (Decimal(25), -0.5), (-7, -1.0), ("1e300", 1.0), (True, -0.98)],
)
def test_numbers_are_read_and_clamped(value: object, expected: float) -> None:
    assert one(age=value)[0] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", [1, 0, 0]),
        (" 4 ", [0, 0, 1]),
        (2, [0, 1, 0]),
        (2.0, [0, 1, 0]),
        (np.float64(2), [0, 1, 0]),
        (Decimal("2.00"), [0, 1, 0]),
        (True, [0, 0, 0]),
        ("2.0", [0, 0, 0]),
        (2.5, [0, 0, 0]),
        (None, [0, 0, 0]),
        ("", [0, 0, 0]),
        ("3", [0, 0, 0]),
    ],
)
def test_categories_are_one_hot(value: object, expected: list[int]) -> None:
    assert one(pain=value)[6:] == expected


def test_every_code_has_its_own_coordinate() -> None:
    feature = CONTRACT.features[3]
    assert feature.encode(["f", "m", "x"]).tolist() == np.eye(3).tolist()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (False, "false"),
        (-0.0, "0"),
        (1e300, None),
        (0.5, "0.5"),
        (" a b ", "a b"),
        (b"a", None),
    ],
)
def test_text_of_a_cell(value: object, text: str | None) -> None:
    assert text_of(value) == text


def test_labels_are_positions_and_unknown_ones_unusable() -> None:
    columns = {name: [None] * 5 for name in NAMES} | {"died": ["yes", "no", "Yes", None, " no "]}
    assert CONTRACT.encode(columns)[1].tolist() == [1, 0, UNUSABLE, UNUSABLE, 0]


def test_columns_and_width() -> None:
    assert NAMES == ("age", "crp", "chol", "sex", "pain", "died")
    assert CONTRACT.width == 9
    assert sum(feature.width for feature in CONTRACT.features) == 9


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ContractError, match="'chol'") as caught:
        CONTRACT.encode({name: [] for name in NAMES if name != "chol"})
    assert caught.value.code == "contract.column"
    assert caught.value.remedy


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ContractError) as caught:
        CONTRACT.encode({name: [None] for name in NAMES} | {"age": [1, 2]})
    assert caught.value.code == "contract.length"


NUMBER = {"kind": "number", "name": "a", "unit": "1", "minimum": 0.0, "maximum": 1.0}
CATEGORY = {"kind": "category", "name": "b", "codes": ["x", "y"]}
LABEL = {"name": "l", "classes": ["0", "1"]}
WHOLE: dict[str, Any] = {"patient": "p", "features": [NUMBER, CATEGORY], "label": LABEL}


def edited(**change: Any) -> Callable[[], Contract]:
    return lambda: Contract.model_validate(WHOLE | change)


def number(**change: Any) -> Callable[[], Contract]:
    return edited(features=[NUMBER | change])


def category(**change: Any) -> Callable[[], Contract]:
    return edited(features=[CATEGORY | change])


REFUSED: dict[str, Callable[[], Contract]] = {
    "minimum above maximum": number(minimum=2.0),
    "minimum equals maximum": number(minimum=1.0),
    "range without width": number(minimum=1e15 - 0.01, maximum=1e15 - 0.01),
    "log without width": number(minimum=1e15 - 0.125, maximum=1e15, transform="log"),
    "log of zero": number(transform="log"),
    "log of a negative": number(minimum=-1.0, transform="log"),
    "missing below": number(missing=-0.1),
    "missing above": number(missing=1.1),
    "NaN": number(minimum=math.nan),
    "infinity": number(maximum=math.inf),
    "too large": number(maximum=1e16),
    "unknown key": number(mean=0.5),
    "unknown transform": number(transform="zscore"),
    "unknown kind": number(kind="text"),
    "no kind": edited(features=[{key: value for key, value in NUMBER.items() if key != "kind"}]),
    "text for a number": number(minimum="0"),
    "boolean for a number": number(minimum=False),
    "empty name": number(name=""),
    "blank around a name": number(name=" a"),
    "line break in a name": number(name="a\nb"),
    "direction mark in a name": number(name="a‮b"),
    "no features": edited(features=[]),
    "same name twice": edited(features=[NUMBER, NUMBER]),
    "same name in another case": edited(features=[NUMBER, NUMBER | {"name": "A"}]),
    "feature named as patient": edited(patient="a"),
    "feature named as label": edited(label=LABEL | {"name": "b"}),
    "label named as patient": edited(label=LABEL | {"name": "P"}),
    "same code twice": category(codes=["x", "x"]),
    "no codes": category(codes=[]),
    "empty code": category(codes=["x", ""]),
    "code with blanks": category(codes=["x", "y "]),
    "codes are numbers": category(codes=[1, 2]),
    "one class": edited(label=LABEL | {"classes": ["1"]}),
    "same class twice": edited(label=LABEL | {"classes": ["1", "1"]}),
    "no rows": edited(rows_per_patient=0),
    "too many rows": edited(rows_per_patient=1001),
    "fraction of a row": edited(rows_per_patient=1.0),
    "negative holdout": edited(holdout=-0.1),
    "holdout above a half": edited(holdout=0.51),
    "holdout NaN": edited(holdout=math.nan),
    "unknown column key": edited(weights="w"),
}


def test_the_edited_contract_is_valid_without_edits() -> None:
    assert edited()().width == 3


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED.keys())
def test_malformed_contracts_are_refused(build: Callable[[], Contract]) -> None:
    with pytest.raises(ValidationError):
        build()
