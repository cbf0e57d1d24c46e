"""Labels of every kind: one whole number a row, from that row alone."""

from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from common.contract import Amount, Contract, Label, NoLabel, TimeToEvent
from common.contract.labels import AMOUNT_STEPS
from common.errors import UsageError
from common.study import Study
from tests.federation import small_study

BEDS = Amount(kind="number", name="beds", unit="1", minimum=10.0, maximum=50.0)
EXIT = TimeToEvent(
    kind="time_to_event", name="days", unit="d", event="died", codes=("0", "1"), ends=(10.0, 20.0, 40.0)
)
FEATURE = {"kind": "number", "name": "age", "unit": "a", "minimum": 0.0, "maximum": 100.0}


def contract_of(label: dict[str, Any]) -> Contract:
    return Contract.model_validate({"patient": "p", "features": [FEATURE], "label": label})


def test_amounts_are_steps_of_the_range() -> None:
    found = BEDS.labels([10, 30, "50", 1e9, -4, None, "many", float("nan")])
    assert found.tolist() == [0, AMOUNT_STEPS // 2, AMOUNT_STEPS, AMOUNT_STEPS, 0, -1, -1, -1]
    assert BEDS.said(AMOUNT_STEPS) == "1.0000"
    assert BEDS.said(-1) == "none"
    assert BEDS.limit == AMOUNT_STEPS + 1


@given(st.floats(10, 50))
def test_an_amount_reads_back(value: float) -> None:
    back = 10 + 40 * BEDS.labels([value])[0] / AMOUNT_STEPS
    assert abs(back - value) <= 40 / AMOUNT_STEPS


def test_exits_are_intervals_and_events() -> None:
    times = [0, 10, 10.5, 40, 41, 1e9, -1, None, 5, 5]
    events = ["1", "1", "0", "1", "1", "0", "1", "1", "2", None]
    assert EXIT.labels(times, events).tolist() == [1, 1, 2, 5, 4, 4, -1, -1, -1, -1]
    assert EXIT.columns == ("days", "died")
    assert EXIT.said(3) == "1 by 20"
    assert EXIT.said(-1) == "none"


@given(st.floats(0, 100), st.booleans())
def test_an_exit_is_the_first_end_not_before_it(time: float, event: bool) -> None:
    label = int(EXIT.labels([time], ["1" if event else "0"])[0])
    ends = [end for end in EXIT.ends if end >= time]
    assert label == (2 * EXIT.ends.index(ends[0]) + event if ends else 4)


def test_a_contract_without_a_label_reads_features_alone() -> None:
    contract = contract_of({"kind": "none"})
    assert isinstance(contract.label, NoLabel)
    assert contract.columns == ("age",)
    assert contract.encode({"age": [1.0, 2.0]})[1].tolist() == [0, 0]
    assert contract.label.said(0) == "none"


def test_a_contract_reads_both_columns_of_an_exit() -> None:
    contract = contract_of(EXIT.model_dump(mode="json"))
    assert contract.columns == ("age", "days", "died")
    _, y = contract.encode({"age": [1.0], "days": [15.0], "died": ["1"]})
    assert y.tolist() == [3]


def test_classes_keep_the_form_they_had() -> None:
    """Studies from before there were other kinds have the same digest."""
    contract = contract_of({"name": "ill", "classes": ["no", "yes"]})
    assert isinstance(contract.label, Label)
    assert contract.label.model_dump(mode="json") == {"name": "ill", "classes": ["no", "yes"]}
    assert contract_of({"kind": "classes", "name": "ill", "classes": ["no", "yes"]}) == contract


@pytest.mark.parametrize(
    ("label", "path"),
    [
        ({"kind": "guess"}, "contract.label.kind"),
        ({"name": "ill", "classes": ["no"]}, "contract.label.classes"),
        ({"name": "ill"}, "contract.label.classes"),
        (EXIT.model_dump(mode="json") | {"ends": [3.0, 2.0]}, "contract.label.ends"),
        (EXIT.model_dump(mode="json") | {"ends": []}, "contract.label.ends"),
        (EXIT.model_dump(mode="json") | {"codes": ["1"]}, "contract.label.codes"),
        (EXIT.model_dump(mode="json") | {"event": "age"}, "contract.features.0.name"),
        (BEDS.model_dump(mode="json") | {"missing": 20.0}, "contract.label.missing"),
        (BEDS.model_dump(mode="json") | {"present": True}, "contract.label.present"),
        (BEDS.model_dump(mode="json") | {"maximum": 1.0}, "contract.label.maximum"),
        ({"kind": "none", "name": "x"}, "contract.label.name"),
        (["ill"], "contract.label.kind"),
    ],
)
def test_broken_labels_are_refused_by_name(label: Any, path: str) -> None:
    with pytest.raises(UsageError) as caught:
        Study.from_toml(_toml(label))
    assert caught.value.code == f"study.{path}"
    assert caught.value.remedy


def _toml(label: Any) -> str:
    if isinstance(label, dict):
        label = {key: value for key, value in label.items() if value is not None}
    return tomli_w.dumps(small_study(["A", "B", "C"], contract__label=label))


@given(st.permutations(range(6)))
def test_each_label_is_its_rows_alone(order: list[int]) -> None:
    times, events = [1.0, 15, None, 39, 80, 20], ["0", "1", "1", "x", "1", "0"]
    whole = EXIT.labels(times, events)
    again = EXIT.labels([times[i] for i in order], [events[i] for i in order])
    assert np.array_equal(whole[list(order)], again)
