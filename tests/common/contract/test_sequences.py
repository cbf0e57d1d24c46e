"""Time series, events, text and images against loops that do one cell after the other."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.contract import Contract, Derived, Events, Image, Label, Number, Series, Text
from common.contract.sequences import FIRST_CODE, PADDING, UNKNOWN, words_of

HEART = Number(kind="number", name="hr", unit="/min", minimum=0.0, maximum=200.0)
OXYGEN = Number(kind="number", name="spo2", unit="%", minimum=50.0, maximum=100.0, missing=100.0)
SERIES = Series(kind="series", name="vitals", steps=3, step=2.0, start=-6.0, channels=(HEART, OXYGEN))

anything = st.one_of(
    st.none(), st.floats(), st.integers(-10, 400), st.text(max_size=4), st.sampled_from(["I10", "E11", "x"])
)
entries = st.one_of(
    anything, st.fixed_dictionaries({"t": st.one_of(st.none(), st.floats(-9, 9)), "v": anything})
)
cells = st.one_of(anything, st.lists(entries, max_size=6))


def naive_series(cell: Any, feature: Series, channel: Number) -> tuple[list[float], list[float]]:
    values, mask = [None] * feature.steps, [0.0] * feature.steps
    for place, entry in enumerate(cell if isinstance(cell, list) else []):
        time, value = (entry["t"], entry["v"]) if isinstance(entry, dict) else (float(place), entry)
        number = channel.encode([value])[0, 0]
        usable = isinstance(value, int | float) and math.isfinite(value)
        if isinstance(value, str):
            try:
                usable = value.strip().isascii() and "_" not in value and math.isfinite(float(value))
            except ValueError:
                usable = False
        if time is None or not usable:
            continue
        step = math.floor((time - feature.start) / feature.step)
        if 0 <= step < feature.steps:
            values[step], mask[step] = number, 1.0
    absent = channel.encode([None])[0, 0]
    return [absent if value is None else value for value in values], mask


@given(st.lists(st.tuples(cells, cells), max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_series_agrees_with_a_loop(rows: list[tuple[Any, Any]]) -> None:
    encoded = SERIES.encode([row[0] for row in rows], [row[1] for row in rows])
    assert encoded.shape == (len(rows), SERIES.width) == (len(rows), 12)
    assert np.isfinite(encoded).all()
    assert (np.abs(encoded) <= 1).all()
    for row, found in zip(rows, encoded.reshape(-1, 3, 4), strict=True):
        for at, channel in enumerate(SERIES.channels):
            values, mask = naive_series(row[at], SERIES, channel)
            assert found[:, at].tolist() == values
            assert found[:, 2 + at].tolist() == mask


def test_wide_and_long_series_agree() -> None:
    wide = SERIES.model_copy(update={"wide": True, "step": 1.0, "start": 0.0})
    long = SERIES.model_copy(update={"step": 1.0, "start": 0.0})
    assert wide.columns == ("hr_0", "hr_1", "hr_2", "spo2_0", "spo2_1", "spo2_2")
    hr, spo2 = [[60.0, None, 80.0], [None, None, 200.0]], [[99.0, 98.0, None], [None, 70.0, None]]
    columns = [[row[i] for row in channel] for channel in (hr, spo2) for i in range(3)]
    assert wide.encode(*columns).tolist() == long.encode(hr, spo2).tolist()
    arrays = [np.array([np.nan if v is None else v for v in column]) for column in columns]
    assert wide.encode(*arrays).tolist() == long.encode(hr, spo2).tolist()


def test_the_last_value_of_a_step_stays_and_an_absent_one_does_not_replace_it() -> None:
    cell = [{"t": -6.0, "v": 10}, {"t": -5.0, "v": 20}, {"t": -4.5, "v": None}, {"t": -4.0, "v": "40"}]
    assert SERIES.encode([cell], [[]])[0].reshape(3, 4)[:, [0, 2]].tolist() == [[-0.8, 1], [-0.6, 1], [0, 0]]


TOKENS = Events(kind="events", name="dx", codes=("I10", "E11"), length=3, form="tokens")


@given(st.lists(cells, max_size=4))
@settings(max_examples=100, deadline=None)
def test_events_agree_with_a_loop(rows: list[Any]) -> None:
    bag = TOKENS.model_copy(update={"form": "bag"})
    timed = TOKENS.model_copy(update={"horizon": 4.0})
    tokens, bags, both = TOKENS.encode(rows), bag.encode(rows), timed.encode(rows)
    assert (tokens.shape, bags.shape, both.shape) == ((len(rows), 3), (len(rows), 2), (len(rows), 6))
    assert (both[:, 0::2] == tokens).all()
    assert (np.abs(both[:, 1::2]) <= 1).all()
    for cell, found, held in zip(rows, tokens, bags, strict=True):
        codes = [e["v"] if isinstance(e, dict) else e for e in cell] if isinstance(cell, list) else []
        codes = [code.strip() if isinstance(code, str) else code for code in codes]
        numbers = [FIRST_CODE + ["I10", "E11"].index(c) if c in ("I10", "E11") else UNKNOWN for c in codes][
            -3:
        ]
        assert found.tolist() == numbers + [PADDING] * (3 - len(numbers))
        assert held.tolist() == [float("I10" in codes), float("E11" in codes)]


def test_times_of_events_stand_beside_them() -> None:
    timed = TOKENS.model_copy(update={"horizon": 10.0})
    cell = [{"t": -20.0, "v": "I10"}, {"t": -5.0, "v": "E11"}, {"t": math.nan, "v": "Z"}]
    assert timed.encode([cell]).tolist() == [[2.0, -1.0, 3.0, -0.5, 1.0, 0.0]]


def test_text_is_words_of_the_vocabulary() -> None:
    bag = Text(kind="text", name="note", vocabulary=("pain", "chest", "fieber"), length=4)
    cells = ["Chest PAIN, chest pain_pain; ﬁeber", None, 3, ""]
    assert bag.encode(cells).tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    tokens = bag.model_copy(update={"form": "tokens"})
    assert tokens.encode(cells).tolist() == [[3, 2, 3, 2], [0] * 4, [0] * 4, [0] * 4]
    assert tokens.encode(["no pain"]).tolist() == [[UNKNOWN, 2, 0, 0]]


@given(st.text(max_size=20))
def test_words_are_their_own_words(text: str) -> None:
    for word in words_of(text):
        assert words_of(word)[0:1] == (word,) or not word.isascii()


def test_an_image_is_scaled_by_its_public_window() -> None:
    image = Image(kind="image", name="ct", height=1, width_px=4, modality="CT", low=-100.0, high=300.0)
    found = image.encode(np.array([[-1000.0, -100.0, 100.0, 3000.0], [np.nan, np.inf, -np.inf, 0.0]]))
    assert found.tolist() == [[-1.0, -1.0, 0.0, 1.0], [0.0, 0.0, 0.0, -0.5]]
    assert image.encode(["a.dcm", None]).tolist() == [[0.0] * 4] * 2
    assert image.encode(np.zeros((2, 3))).tolist() == [[0.0] * 4] * 2


LABEL = Label(name="y", classes=("no", "yes"))


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (lambda: Derived(what="condition"), "omop"),
        (lambda: Derived(what="age", omop=(1,)), "omop"),
        (lambda: Derived(what="sex", take="count"), "take"),
        (lambda: Derived(what="condition", omop=(1,), take="last"), "take"),
        (lambda: Derived(what="drug", omop=(1,), days=(0, -1)), "days"),
        (lambda: Derived(what="drug", omop=(1, 1)), "omop"),
        (lambda: Number(**(HEART.model_dump() | {"source": Derived(what="sex")})), "source.take"),
        (lambda: Label(name="y", classes=("a", "b"), source=Derived(what="age")), "source.take"),
        (lambda: Series(kind="series", name="s", steps=0, channels=(HEART,)), "steps"),
        (lambda: Series(kind="series", name="s", steps=1, channels=()), "channels"),
        (
            lambda: Series(
                kind="series",
                name="s",
                steps=1,
                channels=(HEART.model_copy(update={"source": Derived(what="age")}),),
            ),
            "channels.0.source",
        ),
        (lambda: Events(kind="events", name="e", codes=("a", "a")), "codes"),
        (lambda: Events(kind="events", name="e", codes=("a",), horizon=0.0), "horizon"),
        (lambda: Text(kind="text", name="t", vocabulary=("Pain",)), "vocabulary.0"),
        (lambda: Text(kind="text", name="t", vocabulary=("two words",)), "vocabulary.0"),
        (
            lambda: Image(kind="image", name="i", height=1, width_px=1, modality="CT", low=1.0, high=1.0),
            "high",
        ),
        (
            lambda: Image(kind="image", name="i", height=513, width_px=1, modality="CT", low=0.0, high=1.0),
            "height",
        ),
        (lambda: Contract(patient="p", features=(SERIES, HEART), label=LABEL), "features.1.name"),
        (
            lambda: Contract(
                patient="p", features=(SERIES, HEART.model_copy(update={"name": "Vitals"})), label=LABEL
            ),
            "features.1.name",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_its_place(build: Any, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build()
    errors = caught.value.errors()
    places = [".".join(map(str, e["loc"])) for e in errors] + [
        str(e.get("ctx", {}).get("field")) for e in errors
    ]
    assert place in places


def test_columns_and_coordinates_are_counted() -> None:
    bag = TOKENS.model_copy(update={"form": "bag", "name": "bag"})
    contract = Contract(patient="p", features=(TOKENS, bag, SERIES), label=LABEL)
    assert contract.columns == ("dx", "bag", "hr", "spo2", "y")
    assert contract.width == 3 + 2 + 12


def test_what_a_policy_must_allow() -> None:
    number = HEART.model_copy(
        update={
            "source": Derived(what="measurement", omop=(7, 8), fhir=("http://loinc.org|8867-4",), take="last")
        }
    )
    age = HEART.model_copy(update={"name": "age", "source": Derived(what="age")})
    visits = HEART.model_copy(update={"name": "visits", "source": Derived(what="visit", take="count")})
    label = Label(
        name="y", classes=("true", "false"), source=Derived(what="condition", omop=(3,), fhir=("s|c",))
    )
    contract = Contract(patient="p", features=(number, age, visits), label=label)
    assert contract.beyond((), "omop") == ["measurement:7", "measurement:8", "age", "visit:*", "condition:3"]
    assert contract.beyond((), "fhir") == [
        "measurement:http://loinc.org|8867-4",
        "age",
        "visit:*",
        "condition:s|c",
    ]
    assert contract.beyond(("measurement:*", "age", "visit:*", "condition:3"), "omop") == []
    assert contract.beyond((), "columns") == ["hr", "age", "visits", "y"]
    plain = contract.model_copy(update={"features": (HEART,)})
    assert plain.beyond(("measurement:*", "condition:3"), "omop") == ["hr"]
