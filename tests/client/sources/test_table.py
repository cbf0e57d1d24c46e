"""Rows grouped by patient: what is chosen depends on the patient's own rows and the site's key alone."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.sources.table import Part, Table, in_holdout, patient_id
from common.contract import Contract, Label, Number
from common.encoding import derive
from tests.tables import table_of

KEY = b"\x05" * 32
Row = tuple[object, float, str]

patients = st.sampled_from(["p1", "p2", " p3 ", "P3", "ü", None, "", "NA", "nan"])
row_lists = st.lists(
    st.tuples(patients, st.integers(0, 4).map(float), st.sampled_from(["no", "yes", "?"])), max_size=24
)


def contract(cap: int = 2, holdout: float = 0.0) -> Contract:
    return Contract(
        patient="id",
        rows_per_patient=cap,
        holdout=holdout,
        features=(Number(kind="number", name="age", unit="a", minimum=0.0, maximum=4.0),),
        label=Label(name="y", classes=("no", "yes")),
    )


def build(rows: list[Row], rules: Contract, part: Part = "train", key: bytes = KEY) -> Table:
    x, y = rules.encode({"age": [row[1] for row in rows], "y": [row[2] for row in rows]})
    return table_of([row[0] for row in rows], x, y, rules, key=key, part=part)


def content(table: Table) -> dict[str, list[tuple[Any, ...]]]:
    """Each patient's rows in order."""
    found: dict[str, list[tuple[Any, ...]]] = {patient: [] for patient in table.ids}
    for x, y, index in zip(table.x, table.y, table.patient_index, strict=True):
        found[table.ids[index]].append((*x.tolist(), int(y)))
    return found


@given(row_lists, st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from(["train", "holdout"]))
@settings(max_examples=80, deadline=None)
def test_tables_are_separable_by_patient(rows: list[Row], cap: int, holdout: float, part: Part) -> None:
    rules = contract(cap, holdout)
    whole = content(build(rows, rules, part))
    for removed in {patient_id(row[0]) for row in rows}:
        left = [row for row in rows if patient_id(row[0]) != removed]
        expected = {patient: kept for patient, kept in whole.items() if patient != removed}
        assert content(build(left, rules, part)) == expected


@given(row_lists, st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_file_order_changes_nothing(rows: list[Row], cap: int, generator: random.Random) -> None:
    rules = contract(cap, 0.3)
    first = build(rows, rules)
    shuffled = list(rows)
    generator.shuffle(shuffled)
    second = build(shuffled, rules)
    assert first.ids == second.ids
    for name in ("x", "y", "patient_index"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


crowded = st.lists(
    st.tuples(
        st.sampled_from(["p1", "p2"]), st.integers(0, 4).map(float), st.sampled_from(["no", "yes", "?"])
    ),
    min_size=12,
    max_size=24,
)


@given(row_lists | crowded, st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_row_cap_holds(rows: list[Row], cap: int) -> None:
    usable: dict[str, list[tuple[float, int]]] = {}
    for cell, age, label in rows:
        patient = patient_id(cell)
        if patient is not None and label != "?":
            usable.setdefault(patient, []).append((age / 2 - 1, int(label == "yes")))
    table = build(rows, contract(cap))
    kept = content(table)
    assert table.ids == sorted(usable)
    assert table.patients == len(usable)
    for patient, mine in usable.items():
        assert len(kept[patient]) == min(cap, len(mine))
        ranked = sorted(
            mine,
            key=lambda row: derive(
                KEY,
                "row-rank",
                patient.encode(),
                np.array(row[:1]).astype("<f8").tobytes(),
                row[1].to_bytes(8, "little"),
            ),
        )
        assert kept[patient] == ranked[:cap]
    assert (np.diff(table.patient_index) >= 0).all()


def test_another_key_keeps_other_rows() -> None:
    rows: list[Row] = [("p", float(age), "no") for age in range(5)]
    found = {build(rows, contract(1), key=bytes([k]) * 32).x[0, 0] for k in range(60)}
    # Five rows, each kept with probability 1/5: one of them is missing with probability below 1e-5.
    assert len(found) == 5


def test_parts_cover_all_patients_once() -> None:
    rows: list[Row] = [(f"p{i}", 1.0, "no") for i in range(400)]
    rules = contract(1, 0.25)
    train, held = build(rows, rules).ids, build(rows, rules, "holdout").ids
    assert sorted(train + held) == sorted(f"p{i}" for i in range(400))
    # Binomial(400, 1/4): the key is fixed, so this neither flickers nor holds for a constant.
    assert 60 < len(held) < 140
    assert build(rows, contract(1), "holdout").patients == 0
    assert build(rows, contract(1)).patients == 400


@given(st.text(min_size=1, max_size=8), st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=80, deadline=None)
def test_the_split_is_a_function_of_the_patient(patient: str, first: float, second: float) -> None:
    low, high = sorted((first, second))
    position = int.from_bytes(derive(KEY, "holdout", patient.encode())[:8], "little") / 2**64
    assert not in_holdout(KEY, patient, 0.0)
    # A larger share only adds patients to those held out.
    assert in_holdout(KEY, patient, high) >= in_holdout(KEY, patient, low)
    if abs(position - high) > 1e-12:
        assert in_holdout(KEY, patient, high) == (position < high)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("p", "p"),
        (" p\t", "p"),
        ("0", "0"),
        ("n a", "n a"),
        ("None1", "None1"),
        ("1e5", "1e5"),
        ("1.5E", "1.5E"),
    ]
    + [
        (cell, None)
        for cell in (
            None,
            "",
            "  ",
            "NA",
            " nan ",
            "NULL",
            "None",
            "?",
            "-",
            "n/a",
            "1.23457E+15",
            "1e+20",
            7,
            1.5,
        )
    ],
)
def test_rows_without_a_patient_id_are_told_apart(cell: object, expected: str | None) -> None:
    assert patient_id(cell) == expected


def test_no_rows_give_an_empty_table() -> None:
    for rows in ([], [(None, 1.0, "no")], [("p", 1.0, "?")]):
        table = build(rows, contract())
        assert table.x.shape == (0, 1)
        assert table.y.shape == table.patient_index.shape == (0,)
        assert table.patient_index.dtype == table.y.dtype == np.int64
        assert table.patients == 0


def test_tables_print_no_record() -> None:
    table = build([("secret-patient", 3.0, "yes")] * 2, contract())
    for text in (repr(table), str(table), f"{table}", f"{[table]}"):
        assert "secret" not in text
        assert "1" not in text.replace("width=1", "")
        assert "2" not in text


def test_arrays_are_read_only() -> None:
    table = build([("p", 3.0, "yes")], contract())
    for array in (table.x, table.y, table.patient_index):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
