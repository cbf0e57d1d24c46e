"""Whether a model can read a contract, and which coordinates of a row it reads as what.

Source: DESIGN.md "One contract, many sources". Rules: decided from the manifest alone, the same at hub and
hospital; a model that does not fit is refused with the field that says why and what to do about it.
"""

from dataclasses import dataclass
from typing import Final

from common.contract import Category, Contract, Events, Feature, Image, Number, Series, Text
from common.errors import UsageError
from common.methods import Cnn, Model, ResNet18, SequenceToSequence, Statistics

REMEDY: Final = "Change the study and submit it again; its digest changes with it."

_SUPERVISED: Final = ("classes", "number", "time_to_event")
_LABELS: Final[dict[str, tuple[str, ...]]] = {
    "logistic_regression": ("classes", "number"),
    "linear_svm": ("classes",),
    "kernel_svm": ("classes",),
    "mlp": _SUPERVISED,
    "cnn": _SUPERVISED,
    "resnet18": _SUPERVISED,
    "recurrent": _SUPERVISED,
    "transformer": _SUPERVISED,
    "autoencoder": ("none", "classes"),
    "skip_gram": ("none",),
    "sequence_to_sequence": ("none",),
    "cox": ("time_to_event",),
    "random_forest": ("classes",),
    "statistics": ("none", "classes", "time_to_event"),
}
_READS: Final = {
    "cnn": "an image",
    "resnet18": "an image",
    "recurrent": "a series",
    "transformer": "tokens",
    "skip_gram": "tokens",
}
SMALLEST_IMAGE: Final = 8


@dataclass(frozen=True, slots=True)
class Reads:
    """Which coordinates a model reads: of its own kind (``main``, [start, stop)), and the plain ``rest``.

    ``times``: whether each token has its time beside it.
    """

    main: Feature | None
    start: int
    stop: int
    rest: tuple[tuple[int, int], ...]
    times: bool = False

    @property
    def rest_width(self) -> int:
        """How many plain coordinates there are."""
        return sum(stop - start for start, stop in self.rest)


def places(contract: Contract) -> dict[str, tuple[int, int]]:
    """Where each feature's coordinates start and stop in an encoded row, by name."""
    found: dict[str, tuple[int, int]] = {}
    start = 0
    for feature in contract.features:
        found[feature.name] = start, start + feature.width
        start += feature.width
    return found


def reads(model: Model, contract: Contract) -> Reads:
    """What a model that ``fit`` accepts reads of an encoded row."""
    kind = _READS.get(model.kind)
    where = places(contract)
    own = [feature for feature in contract.features if kind and _sort(feature) == kind]
    main = own[0] if own else None
    start, stop = where[main.name] if main else (0, 0)
    rest = tuple(where[feature.name] for feature in contract.features if feature is not main)
    return Reads(main, start, stop, rest, isinstance(main, Events) and main.horizon is not None)


def fit(model: Model, contract: Contract) -> None:
    """Refuse a model that cannot read the contract.

    Guarantee: misfits_are_refused_by_name - with the field, the rule and what to do.
    Raises: UsageError with code ``study.<path>``.
    """
    allowed = _LABELS[model.kind]
    if contract.label.kind not in allowed:
        known = " or ".join(repr(name) for name in allowed)
        raise misfit("contract.label.kind", f"must be {known} for {model.kind}")
    if isinstance(model, Statistics):
        _fit_statistics(model, contract)
        return
    if isinstance(model, SequenceToSequence):
        _fit_sequences(model, contract)
        return
    kind = _READS.get(model.kind)
    own = [feature for feature in contract.features if kind and _sort(feature) == kind]
    if kind and len(own) != 1:
        rule = f"must have exactly one feature of {kind} for {model.kind}, not {len(own)}"
        raise misfit("contract.features", rule)
    if model.kind == "skip_gram" and (
        len(contract.features) != 1 or (isinstance(own[0], Events) and own[0].horizon is not None)
    ):
        raise misfit("contract.features", "must be one feature of tokens without horizon for skip_gram")
    for feature in contract.features:
        if feature not in own and _sort(feature) == "tokens":
            # Tokens are names, not amounts: only an embedding can read them.
            rule = f"{feature.name!r} gives tokens, which {model.kind} cannot read"
            raise misfit("contract.features", rule, 'Use form = "bag" for it.')
    if isinstance(model, Cnn | ResNet18) and isinstance(own[0], Image):
        halvings = len(model.channels) if isinstance(model, Cnn) else 3
        smallest = max(SMALLEST_IMAGE, 2**halvings)
        if min(own[0].height, own[0].width_px) < smallest:
            rule = f"the image {own[0].name!r} must be at least {smallest} pixels high and wide"
            raise misfit("contract.features", f"{rule} for {model.kind}")


def misfit(path: str, rule: str, remedy: str = "") -> UsageError:
    """What is wrong with a study, told at one of its fields."""
    return UsageError(f"study.{path}", f"{path}: {rule}", remedy=remedy or REMEDY, path=path)


def _sort(feature: Feature) -> str:
    if isinstance(feature, Events | Text) and feature.form == "tokens":
        return "tokens"
    if isinstance(feature, Image):
        return "an image"
    return "a series" if isinstance(feature, Series) else "numbers"


def _fit_sequences(model: SequenceToSequence, contract: Contract) -> None:
    named = {feature.name: feature for feature in contract.features}
    for field, name in (("source", model.source), ("target", model.target)):
        feature = named.get(name)
        timed = isinstance(feature, Events) and feature.horizon is not None
        if feature is None or _sort(feature) != "tokens" or timed:
            raise misfit(f"model.{field}", f"{name!r} must be a feature of tokens without horizon")
    if len(named) != 2:
        raise misfit("contract.features", "must be the source and the target, no others")


def _fit_statistics(model: Statistics, contract: Contract) -> None:
    named = {feature.name: feature for feature in contract.features}
    for at, name in enumerate(model.numbers):
        feature = named.get(name)
        if not (isinstance(feature, Number) and feature.present):
            rule = f"{name!r} must be a number feature with present = true"
            raise misfit(f"model.numbers.{at}", rule, "Else an absent value would count as one.")
        if feature.transform != "linear":
            rule = f"{name!r} must be linear, else its mean would be that of a logarithm"
            raise misfit(f"model.numbers.{at}", rule)
    crossed = [name for pair in model.crossed for name in pair]
    for field, names in (("categories", model.categories), ("crossed", crossed)):
        for name in names:
            if not isinstance(named.get(name), Category):
                raise misfit(f"model.{field}", f"{name!r} must be a category feature")
    for field, listed in (
        ("numbers", model.numbers), ("categories", model.categories), ("crossed", model.crossed)
    ):  # fmt: skip
        if len(set(listed)) != len(listed):
            raise misfit(f"model.{field}", "must differ from each other")
    label = contract.label
    if (
        model.by
        and not isinstance(named.get(model.by), Category)
        and not (label.kind == "classes" and label.name == model.by)
    ):
        raise misfit("model.by", f"{model.by!r} must be a category feature, or the label with its classes")
    if not (model.numbers or model.categories or model.crossed or label.kind == "time_to_event"):
        raise misfit("model.numbers", "must name something to count, or categories, or crossed")
