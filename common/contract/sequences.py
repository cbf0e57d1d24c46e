"""The columns of many values a row: time series, coded events, words, images.

Source: PRIVACY.md "Everything upstream is separable by patient" (vocabularies, grids and windows are public);
Lipton et al., arXiv 1606.04130 (missing values of a series with a mask beside them); Unicode TR15 (NFKC).
Rules: a fixed shape; what does not fit is cut off, what is missing is zero; each row's numbers depend on that
row alone.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.contract.cells import Values, entries_of, number_of, numbers_of, text_of
from common.contract.features import Derived, Gives, Number, Single
from common.contract.fields import DIFFERENT, LISTED, Code, Column, Finite, Strict, broken

PADDING: Final = 0
UNKNOWN: Final = 1
FIRST_CODE: Final = 2
"""Numbers of tokens: where nothing is, what the vocabulary lacks, and the vocabulary's first entry."""

_WORD: Final = re.compile(r"[^\W_]+")


class Series(Strict):
    """Measurements over time on a public grid: each step has the channels' values, then 1 for each measured.

    A channel is a column of lists, or with ``wide`` the columns ``<channel>_0`` ... ``<channel>_<steps -
    1>``. Entry i of a plain list belongs to step i; an entry with a time t to floor((t - start) / step), the
    last one in a step stays.
    """

    kind: Literal["series"]
    name: Column
    steps: Annotated[int, Field(ge=1, le=4096)]
    step: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    start: Finite = 0.0
    wide: bool = False
    channels: Annotated[tuple[Number, ...], LISTED, Field(min_length=1, max_length=256)]

    @model_validator(mode="after")
    def _channels_are_listed(self) -> Self:
        for at, channel in enumerate(self.channels):
            derived = channel.source
            if channel.present:
                raise broken(f"channels.{at}.present", "must be left out: a series has it for each step")
            if derived is not None and (self.wide or derived.gives != "numbers"):
                raise broken(
                    f"channels.{at}.source", "must take a list of measurements, and wide be left out"
                )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``encode`` takes, in order."""
        names = [channel.name for channel in self.channels]
        return (
            tuple(f"{name}_{i}" for name in names for i in range(self.steps)) if self.wide else tuple(names)
        )

    @property
    def derived(self) -> dict[str, Derived]:
        """What gives each column where data are coded."""
        return {name: source for channel in self.channels for name, source in channel.derived.items()}

    @property
    def width(self) -> int:
        """Coordinates of this feature: steps times twice the channels."""
        return 2 * self.steps * len(self.channels)

    def encode(self, *values: Values) -> NDArray[np.float64]:
        """float64 [n, steps * 2 * channels], row-major, in [-1, 1]."""
        blocks = []
        for at, channel in enumerate(self.channels):
            if self.wide:
                raw = np.stack([numbers_of(v) for v in values[at * self.steps :][: self.steps]], axis=1)
            else:
                raw = np.full((len(values[at]), self.steps), np.nan)
                for row, cell in enumerate(values[at]):
                    self._place(raw[row], cell)
            blocks.append((channel.scaled(raw), np.isfinite(raw).astype(np.float64)))
        stacked = [block for block, _ in blocks] + [mask for _, mask in blocks]
        return np.stack(stacked, axis=2).reshape(len(stacked[0]), self.width)

    def _place(self, row: NDArray[np.float64], cell: object) -> None:
        for time, value in entries_of(cell):
            place = np.floor((time - self.start) / self.step)
            if 0 <= place < self.steps and np.isfinite(number := number_of(value)):
                row[int(place)] = number


class Events(Single):
    """Codes over time: a ``bag`` (1 for each code that occurs) or ``tokens`` (the last ``length`` in order).

    A token is 0 where nothing is, 1 for a code outside of ``codes``, else 2 and its place there. With
    ``horizon`` its time over the horizon, in [-1, 1], stands beside each token.
    """

    gives: ClassVar[tuple[Gives, ...]] = ("codes",)
    kind: Literal["events"]
    codes: Annotated[tuple[Code, ...], LISTED, Field(min_length=1, max_length=50_000), DIFFERENT]
    length: Annotated[int, Field(ge=1, le=8192)] = 128
    form: Literal["bag", "tokens"] = "bag"
    horizon: Annotated[float, Field(gt=0, le=1e9)] | None = None

    @property
    def width(self) -> int:
        """Coordinates of this feature: the codes of a bag, or the length, twice with times."""
        return len(self.codes) if self.form == "bag" else self.length * (1 if self.horizon is None else 2)

    def encode(self, *values: Values) -> NDArray[np.float64]:
        """float64 [n, width]; tokens are whole numbers, everything else is in [-1, 1]."""
        first = -self.length if self.form == "tokens" else None
        found = [[(at, text_of(value) or "") for at, value in entries_of(cell)][first:] for cell in values[0]]
        tokens = _encoded([[code for _, code in row] for row in found], self.codes, self.form, self.length)
        if self.form == "bag" or self.horizon is None:
            return tokens
        times = np.zeros_like(tokens)
        for at, row in enumerate(found):
            times[at, : len(row)] = np.nan_to_num(
                [time / self.horizon for time, _ in row], posinf=1.0, neginf=-1.0
            )
        return np.stack([tokens, np.clip(times, -1.0, 1.0)], axis=2).reshape(len(tokens), self.width)


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text: NFKC, case folded, runs of letters and digits."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())))


class Text(Single):
    """Free text by a public vocabulary of words: a ``bag``.

    Or ``tokens`` (the first ``length``) as in Events.
    """

    gives: ClassVar[tuple[Gives, ...]] = ()
    kind: Literal["text"]
    vocabulary: Annotated[tuple[Code, ...], LISTED, Field(min_length=1, max_length=50_000), DIFFERENT]
    length: Annotated[int, Field(ge=1, le=8192)] = 256
    form: Literal["bag", "tokens"] = "bag"

    @model_validator(mode="after")
    def _vocabulary_is_words(self) -> Self:
        for at, word in enumerate(self.vocabulary):
            if words_of(word) != (word,):
                raise broken(f"vocabulary.{at}", "must be one word of letters and digits in lower case")
        return self

    @property
    def width(self) -> int:
        """Coordinates of this feature: the words of a bag, or the length."""
        return len(self.vocabulary) if self.form == "bag" else self.length

    def encode(self, *values: Values) -> NDArray[np.float64]:
        """float64 [n, width]: 0 and 1, or whole numbers."""
        found = [words_of(cell) if isinstance(cell, str) else () for cell in values[0]]
        cut = [row[: self.length] if self.form == "tokens" else row for row in found]
        return _encoded(cut, self.vocabulary, self.form, self.length)


class Image(Single):
    """A grey image of ``height`` times ``width_px``; stored values from ``low`` to ``high`` become [-1, 1].

    The column names the file, below the folder of the hospital's source; values are those after the
    modality's rescale, in Hounsfield units for CT.
    """

    gives: ClassVar[tuple[Gives, ...]] = ()
    kind: Literal["image"]
    height: Annotated[int, Field(ge=1, le=512)]
    width_px: Annotated[int, Field(ge=1, le=512)]
    modality: Literal["CT", "MR", "CR", "DX", "MG", "US", "OT"]
    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _window_holds(self) -> Self:
        if not self.low < self.high:
            raise broken("high", "must be above low")
        return self

    @property
    def width(self) -> int:
        """Coordinates of this feature: its pixels."""
        return self.height * self.width_px

    def encode(self, *values: Values) -> NDArray[np.float64]:
        """float64 [n, height * width_px] in [-1, 1] from float64 of that shape.

        What is no such array is zero.
        """
        pixels = values[0]
        if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (self.width,):
            return np.zeros((len(pixels), self.width))
        scaled = 2.0 * (np.clip(pixels, self.low, self.high) - self.low) / (self.high - self.low) - 1.0
        return np.where(np.isfinite(pixels), np.clip(scaled, -1.0, 1.0), 0.0)


def _encoded(
    found: Sequence[Sequence[str]], codes: Sequence[str], form: str, length: int
) -> NDArray[np.float64]:
    position = {code: at for at, code in enumerate(codes)}
    rows = np.zeros((len(found), len(codes) if form == "bag" else length), dtype=np.float64)
    for at, row in enumerate(found):
        if form == "bag":
            rows[at, [position[code] for code in row if code in position]] = 1.0
        else:
            rows[at, : len(row)] = [
                position[code] + FIRST_CODE if code in position else UNKNOWN for code in row
            ]
    return rows
