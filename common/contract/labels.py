"""What a model learns of a row: a class, an amount, when something happened, or nothing.

Source: PRIVACY.md "Everything upstream is separable by patient"; Tutz and Schmid, "Modeling Discrete
Time-to-Event Data", ch. 3 (intervals of a grid). Rules: classes, ranges and the grid are public; a label is
one whole number a row, -1 where it cannot be used, and depends on that row alone.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, model_validator

from common.contract.cells import UNUSABLE, Values, numbers_of, positions_of
from common.contract.features import Derived, Gives, Number, Single
from common.contract.fields import DIFFERENT, LISTED, PRINTABLE, Code, Column, Strict, broken

AMOUNT_STEPS: Final = 1 << 29
"""Steps of an amount in [0, 1]: exact in float32 arithmetic up to its own rounding."""


class Label(Single):
    """The column that a model learns: its classes, in the order of the model's outputs."""

    gives: ClassVar[tuple[Gives, ...]] = ("code",)
    # Stated by its absence: studies written before there were other kinds keep their digests.
    kind: Annotated[Literal["classes"], Field(exclude_if=lambda _value: True)] = "classes"
    classes: Annotated[tuple[Code, ...], LISTED, Field(min_length=2, max_length=1000), DIFFERENT]

    @property
    def limit(self) -> int:
        """Usable labels are below this."""
        return len(self.classes)

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for a row."""
        return len(self.classes)

    def labels(self, *values: Values) -> NDArray[np.int64]:
        """int64 [n], the place among the classes, -1 for none."""
        return positions_of(values[0], self.classes)

    def said(self, label: int) -> str:
        """A label in words."""
        return self.classes[label] if label >= 0 else "none"


class Amount(Number):
    """A number to be predicted, scaled by its public range; a row without it cannot be used.

    A label y stands for 2 y / 2^29 - 1 after scaling.
    """

    gives: ClassVar[tuple[Gives, ...]] = ("number",)

    @property
    def limit(self) -> int:
        """Usable labels are below this."""
        return AMOUNT_STEPS + 1

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for a row."""
        return 1

    @model_validator(mode="after")
    def _is_no_feature(self) -> Self:
        if self.missing is not None or self.present:
            raise broken("missing" if self.missing is not None else "present", "must be left out of a label")
        return self

    def labels(self, *values: Values) -> NDArray[np.int64]:
        """int64 [n], steps of the range from its minimum, -1 for none."""
        raw = numbers_of(values[0])
        steps = np.floor((self.scaled(raw) + 1.0) / 2.0 * AMOUNT_STEPS + 0.5).astype(np.int64)
        return np.where(np.isnan(raw), UNUSABLE, steps)

    def unscaled(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scaled values of any shape in the contract's unit."""
        low, high = self._bounds
        values = low + (np.clip(scaled, -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        return np.exp(values) if self.transform == "log" else values

    def said(self, label: int) -> str:
        """A label in words: the scaled amount."""
        return f"{2 * label / AMOUNT_STEPS - 1:.4f}" if label >= 0 else "none"


class TimeToEvent(Strict):
    """How long until an event, in the intervals of a public grid that end at ``ends``, the last included.

    ``name`` is the column of the time from the start, in ``unit``; ``event`` that of the event, whose two
    ``codes`` say that it was censored and that it happened. A label is twice the interval, plus 1 for an
    event. Whoever is followed past the last interval is censored in it.
    """

    kind: Literal["time_to_event"]
    name: Column
    unit: Annotated[str, Field(max_length=64), PRINTABLE]
    event: Column
    codes: Annotated[tuple[Code, ...], LISTED, Field(min_length=2, max_length=2), DIFFERENT]
    ends: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e9)], ...], LISTED, Field(min_length=1, max_length=500)
    ]

    @model_validator(mode="after")
    def _ends_ascend(self) -> Self:
        if sorted(set(self.ends)) != list(self.ends):
            raise broken("ends", "must ascend")
        return self

    @property
    def limit(self) -> int:
        """Usable labels are below this."""
        return 2 * len(self.ends)

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for a row: the hazard of each interval."""
        return len(self.ends)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``labels`` takes, in order."""
        return (self.name, self.event)

    @property
    def derived(self) -> dict[str, Derived]:
        """Coded data give no times to an event yet: an extract or a query does."""
        return {}

    def labels(self, *values: Values) -> NDArray[np.int64]:
        """int64 [n], twice the interval and 1 for an event, -1 where time or event is none."""
        times, events = numbers_of(values[0]), positions_of(values[1], self.codes)
        known = (times >= 0) & (events != UNUSABLE)
        intervals = np.searchsorted(self.ends, np.where(known, times, 0.0), side="left")
        beyond = intervals == len(self.ends)
        found = 2 * np.where(beyond, len(self.ends) - 1, intervals) + np.where(beyond, 0, events)
        return np.where(known, found, UNUSABLE).astype(np.int64)

    def said(self, label: int) -> str:
        """A label in words."""
        return f"{self.codes[label % 2]} by {self.ends[label // 2]:g}" if label >= 0 else "none"


class NoLabel(Strict):
    """A study that learns from the features alone."""

    kind: Literal["none"]
    name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[dict[str, Derived]] = {}
    limit: ClassVar[int] = 1
    outputs: ClassVar[int] = 0

    def said(self, _label: int) -> str:
        """Nothing."""
        return "none"


def _kind(value: object) -> object:
    if isinstance(value, Mapping):
        return value.get("kind", "classes")
    return getattr(value, "kind", None)


AnyLabel: TypeAlias = Label | Amount | TimeToEvent | NoLabel
LabelField: TypeAlias = Annotated[
    Annotated[Label, Tag("classes")]
    | Annotated[Amount, Tag("number")]
    | Annotated[TimeToEvent, Tag("time_to_event")]
    | Annotated[NoLabel, Tag("none")],
    Discriminator(
        _kind,
        custom_error_type="rule",
        custom_error_message="{rule}",
        custom_error_context={
            "field": "kind",
            "rule": "must be one of 'classes', 'number', 'time_to_event', 'none'",
        },
    ),
]


def labels_of(label: Any, columns: Mapping[str, Values], rows: int) -> NDArray[np.int64]:
    """int64 [rows]: the labels of the rows, 0 where a study has none to learn."""
    if isinstance(label, NoLabel):
        return np.zeros(rows, dtype=np.int64)
    found: NDArray[np.int64] = label.labels(*(columns[name] for name in label.columns))
    return found
