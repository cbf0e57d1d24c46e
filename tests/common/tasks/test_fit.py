"""Models that cannot read a contract are refused with the field, the rule and what to do."""

from typing import Any

import pytest

from common.admissible import check
from common.errors import UsageError
from common.tasks.fit import fit, places, reads
from tests.common.tasks.kinds import (
    AMOUNT,
    CLASSES,
    CODES,
    EVENTS,
    IMAGE,
    KINDS,
    NOTE,
    NOTHING,
    NUMBERS,
    PRESENT,
    SEX,
    VITALS,
    manifest_of,
    study_of,
)

MISFITS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], str, str]] = {
    "a regression by an SVM": ({"kind": "linear_svm"}, NUMBERS, AMOUNT, "contract.label.kind", "'classes'"),
    "a label for skip-gram": ({"kind": "skip_gram", "width": 4}, [NOTE], CLASSES, "contract.label.kind", "'none'"),
    "Cox on classes": ({"kind": "cox"}, NUMBERS, CLASSES, "contract.label.kind", "'time_to_event'"),
    "a forest of amounts": (
        {"kind": "random_forest", "trees": 3, "depth": 2, "seed": 1}, NUMBERS, AMOUNT, "contract.label.kind", "'classes'",
    ),
    "tokens as amounts": ({"kind": "mlp", "hidden": [3]}, [NOTE], CLASSES, "contract.features", "'note' gives tokens"),
    "no image": ({"kind": "cnn", "channels": [2]}, NUMBERS, CLASSES, "contract.features", "one feature of an image"),
    "two series": (
        {"kind": "recurrent", "hidden": 2}, [VITALS, VITALS | {"name": "more", "channels": [NUMBERS[2]]}], CLASSES,
        "contract.features", "one feature of a series, 2|not 2",
    ),
    "a small image": (
        {"kind": "cnn", "channels": [1, 1, 1, 1]}, [IMAGE], CLASSES, "contract.features", "'scan' must be at least 16",
    ),
    "times for skip-gram": ({"kind": "skip_gram", "width": 4}, [EVENTS], NOTHING, "contract.features", "without horizon"),
    "more than terms": ({"kind": "skip_gram", "width": 4}, [NOTE, SEX], NOTHING, "contract.features", "one feature"),
    "no such source": (
        {"kind": "sequence_to_sequence", "source": "notes", "target": "codes", "hidden": 2}, [NOTE, CODES], NOTHING,
        "model.source", "'notes' must be a feature of tokens",
    ),
    "a timed target": (
        {"kind": "sequence_to_sequence", "source": "note", "target": "dx", "hidden": 2}, [NOTE, EVENTS], NOTHING,
        "model.target", "'dx' must be a feature of tokens",
    ),
    "more than source and target": (
        {"kind": "sequence_to_sequence", "source": "note", "target": "codes", "hidden": 2}, [NOTE, CODES, SEX], NOTHING,
        "contract.features", "the source and the target",
    ),
    "numbers that may be absent": (
        {"kind": "statistics", "numbers": ["a"]}, NUMBERS, NOTHING, "model.numbers.0", "present = true",
    ),
    "the mean of a logarithm": (
        {"kind": "statistics", "numbers": ["a"]}, [PRESENT[0] | {"minimum": 0.5, "transform": "log"}], NOTHING,
        "model.numbers.0", "must be linear",
    ),
    "categories that are numbers": (
        {"kind": "statistics", "categories": ["a"]}, PRESENT, NOTHING, "model.categories", "category feature",
    ),
    "an unknown cross": (
        {"kind": "statistics", "crossed": [["sex", "ward"]]}, [SEX], NOTHING, "model.crossed", "'ward'",
    ),
    "one number twice": (
        {"kind": "statistics", "numbers": ["a", "a"]}, PRESENT, NOTHING, "model.numbers", "differ",
    ),
    "unknown groups": (
        {"kind": "statistics", "categories": ["sex"], "by": "ward"}, [SEX], NOTHING, "model.by", "'ward'",
    ),
    "nothing to count": ({"kind": "statistics"}, PRESENT, NOTHING, "model.numbers", "something to count"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_misfits_are_refused_by_name(what: str) -> None:
    model, features, label, path, said = MISFITS[what]
    contract = {"patient": "patient", "features": features, "label": label}
    study = study_of("mlp", model=model, contract=contract, training__rounds=1)
    with pytest.raises(UsageError, match=said) as caught:
        check(manifest_of(study), None)
    assert caught.value.code == f"study.{path}"
    assert caught.value.remedy


@pytest.mark.parametrize("mode", ["local", "shared-noise"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_admitted(name: str, mode: str) -> None:
    study = study_of(name, mode)
    fit(study.model, study.contract)
    admitted = check(manifest_of(study), None)
    assert admitted.dim == sum(tensor.size for tensor in admitted.layout)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training__rounds", 2),
        ("training__learning_rate", 0.5),
        ("training__server", {"strategy": "fedadam"}),
        ("privacy__clip_norm", 2.0),
        ("aggregation__codec__range", 2000.0),
    ],
)
def test_counts_are_one_uncut_sum(field: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        check(manifest_of(study_of("forest", **{field: value})), None)
    assert caught.value.code.startswith("study." + field.replace("__", "."))


@pytest.mark.parametrize("name", ["linear", "svm", "cox", "kernel"])
def test_a_bound_on_arithmetic_is_claimed_for_what_it_is_derived_for(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(manifest_of(study_of(name, privacy__arithmetic="f64_bounded")), None)
    assert caught.value.code == "study.privacy.arithmetic"


def test_a_model_reads_its_own_feature_and_the_rest() -> None:
    study = study_of("lstm")
    own = reads(study.model, study.contract)
    assert own.main is not None
    assert (own.main.name, own.start, own.stop, own.rest, own.rest_width) == ("vitals", 2, 18, ((0, 2),), 2)
    assert places(study.contract) == {"sex": (0, 2), "vitals": (2, 18)}
