"""A tiny study of each kind of model, and rows that fit it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.contract import Category, Contract, Events, Number, Series, Text
from common.identity import key_text
from common.study import Manifest, Party, Study
from tests.federation import small_study

NUMBERS = [
    {"kind": "number", "name": n, "unit": "1", "minimum": 0.0, "maximum": 1.0} for n in ("a", "b", "c")
]
PRESENT = [feature | {"present": True} for feature in NUMBERS]
SEX = {"kind": "category", "name": "sex", "codes": ["f", "m"]}
IMAGE = {
    "kind": "image", "name": "scan", "height": 9, "width_px": 8, "modality": "OT", "low": 0.0, "high": 1.0,
}  # fmt: skip
VITALS = {"kind": "series", "name": "vitals", "steps": 4, "channels": NUMBERS[:2]}
EVENTS = {
    "kind": "events",
    "name": "dx",
    "codes": ["A", "B", "C"],
    "length": 5,
    "form": "tokens",
    "horizon": 9.0,
}
NOTE = {
    "kind": "text",
    "name": "note",
    "vocabulary": ["pain", "fever", "cough"],
    "length": 6,
    "form": "tokens",
}
CODES = {"kind": "events", "name": "codes", "codes": ["X", "Y"], "length": 3, "form": "tokens"}
CLASSES = {"name": "ill", "classes": ["no", "maybe", "yes"]}
AMOUNT = {"kind": "number", "name": "beds", "unit": "1", "minimum": 0.0, "maximum": 50.0}
EXIT = {
    "kind": "time_to_event", "name": "days", "unit": "d", "event": "died", "codes": ["0", "1"],
    "ends": [10.0, 20.0, 40.0],
}  # fmt: skip
NOTHING = {"kind": "none"}

KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "logistic": ({"kind": "logistic_regression"}, [*NUMBERS, SEX], CLASSES),
    "linear": ({"kind": "logistic_regression"}, NUMBERS, AMOUNT),
    "svm": ({"kind": "linear_svm"}, NUMBERS, CLASSES),
    "kernel": ({"kind": "kernel_svm", "random_features": 7, "bandwidth": 1.0, "seed": 3}, NUMBERS, CLASSES),
    "mlp": ({"kind": "mlp", "hidden": [4]}, NUMBERS, CLASSES),
    "survival": ({"kind": "mlp", "hidden": [4], "activation": "tanh"}, NUMBERS, EXIT),
    "cnn": ({"kind": "cnn", "channels": [2, 3]}, [IMAGE, SEX], CLASSES),
    "resnet": ({"kind": "resnet18", "width": 8, "groups": 4}, [IMAGE], CLASSES),
    "rnn": ({"kind": "recurrent", "cell": "rnn", "hidden": 3}, [VITALS], CLASSES),
    "gru": ({"kind": "recurrent", "cell": "gru", "hidden": 3}, [VITALS, SEX], AMOUNT),
    "lstm": ({"kind": "recurrent", "cell": "lstm", "hidden": 3}, [SEX, VITALS], CLASSES),
    "autoencoder": ({"kind": "autoencoder", "hidden": [3], "code": 2}, NUMBERS, NOTHING),
    "skip_gram": ({"kind": "skip_gram", "width": 4}, [NOTE], NOTHING),
    "translator": (
        {"kind": "sequence_to_sequence", "source": "note", "target": "codes", "hidden": 4},
        [NOTE, CODES],
        NOTHING,
    ),
    "transformer": (
        {"kind": "transformer", "width": 4, "heads": 2, "layers": 2, "feedforward": 6},
        [EVENTS, SEX],
        CLASSES,
    ),
    "cox": ({"kind": "cox"}, NUMBERS, EXIT),
    "forest": ({"kind": "random_forest", "trees": 5, "depth": 2, "seed": 1}, [*NUMBERS, SEX], CLASSES),
    "statistics": (
        {
            "kind": "statistics", "numbers": ["a", "b"], "bins": 8, "correlations": True,
            "categories": ["sex"], "crossed": [["sex", "site"]], "by": "sex",
        },
        [*PRESENT, SEX, {"kind": "category", "name": "site", "codes": ["1", "2", "3"]}],
        EXIT,
    ),
}  # fmt: skip
COUNTING = ("forest", "statistics")
TRAINED = [name for name in KINDS if name not in COUNTING]


def study_of(name: str, mode: str = "local", *, dp: bool = True, rows: int = 3, **changes: Any) -> Study:
    """The tiny study of a kind; ``mode`` local or shared-noise."""
    model, features, label = KINDS[name]
    counting = name in COUNTING
    exact = counting or name == "logistic"
    given: dict[str, Any] = {
        "model": model,
        "contract": {"patient": "patient", "features": features, "label": label, "rows_per_patient": rows},
        "training__mode": mode,
        "training__engine": None,
        "training__rounds": 1 if counting else 2,
        "privacy__clip_norm": 50.0 if counting else 1.0,
        "privacy__grid_step": 1e-5 if name == "resnet" else 1e-4,
        "privacy__arithmetic": "f64_bounded" if exact else "f32_assumed",
        "aggregation__codec__step": 1e-5 if name == "resnet" else 1e-4,
    }
    if not dp:
        given = {key: value for key, value in given.items() if not key.startswith("privacy__")}
        given["privacy"] = {"kind": "without_differential_privacy"}
    if counting:
        given["aggregation__codec__range"] = 20_000.0
    return Study.model_validate(small_study(["A", "B", "C"], **(given | changes)))


def manifest_of(study: Study) -> Manifest:
    """A manifest of a study, of made-up keys."""
    return Manifest(
        schema=1,
        run="ab" * 16,
        roster="cd" * 32,
        hub=key_text(b"\x09" + bytes(31)),
        coordinator=key_text(b"\x0a" + bytes(31)),
        members=tuple(Party(id=i, name=name) for i, name in enumerate(study.members, 1)),
        study=study,
    )


def encoded(contract: Contract, n: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rows as ``Contract.encode`` gives them: x [n, width] and usable labels [n]."""
    rng = np.random.default_rng(seed)
    blocks = []
    for feature in contract.features:
        if isinstance(feature, Category):
            places = rng.integers(0, feature.width + 1, n)
            blocks.append(np.eye(feature.width + 1)[places][:, : feature.width])
        elif isinstance(feature, Number) and feature.present:
            there = rng.integers(0, 2, n).astype(float)
            blocks.append(np.stack([rng.uniform(-1, 1, n) * there, there], axis=1))
        elif isinstance(feature, Events | Text) and feature.form == "tokens":
            blocks.append(_tokens(feature, n, rng))
        elif isinstance(feature, Series):
            values = rng.uniform(-1, 1, (n, feature.width))
            values.reshape(n, feature.steps, 2 * len(feature.channels))[:, :, len(feature.channels) :] = 1.0
            blocks.append(values)
        else:
            blocks.append(rng.uniform(-1, 1, (n, feature.width)))
    return np.concatenate(blocks, axis=1), rng.integers(0, contract.label.limit, n)


def _tokens(feature: Events | Text, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    terms = len(feature.vocabulary if isinstance(feature, Text) else feature.codes)
    tokens = rng.integers(1, 2 + terms, (n, feature.length)).astype(float)
    # Ragged: from none at all to full.
    tokens[np.arange(feature.length) >= rng.integers(0, feature.length + 1, n)[:, None]] = 0.0
    if feature.width == feature.length:
        return tokens
    times = np.where(tokens > 0, rng.uniform(-1, 1, tokens.shape), 0.0)
    return np.stack([tokens, times], axis=2).reshape(n, feature.width)
