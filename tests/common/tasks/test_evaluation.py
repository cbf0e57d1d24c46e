"""Evaluation in the sum: counts of held-out patients alone, whole in the model's release, read back exactly."""

from typing import Any

import numpy as np
import pytest

from common.admissible import check
from common.errors import RefusedError, UsageError
from common.methods import Evaluation
from common.privacy.gate import PlainGate, PlainParams
from common.study import Study
from common.tasks import evaluation, metrics
from common.tasks.estimates import estimates
from common.tasks.holdout import Counting, HeldOut
from common.tasks.models import initial_state
from common.tasks.models.layout import EVALUATION, layout, size, state_layout
from common.tasks.models.modules import build, load
from common.tasks.models.prediction import predict
from common.tasks.training import contribute, train_local
from server.strategy import ServerStep
from tests.common.tasks.kinds import KINDS, TRAINED, encoded, manifest_of, study_of

SUBGROUPS = {"logistic": ("sex",), "cnn": ("sex",), "transformer": ("sex",)}


def evaluated(name: str, mode: str = "local", *, dp: bool = True, **changes: Any) -> Study:
    _, features, label = KINDS[name]
    contract = {
        "patient": "patient",
        "features": features,
        "label": label,
        "rows_per_patient": 2,
        "holdout": 0.3,
    }
    rules = {"subgroups": list(SUBGROUPS.get(name, ())), "per_hospital": dp}
    return study_of(name, mode, dp=dp, **({"contract": contract, "evaluation": rules} | changes))


def held_of(study: Study, patients: int = 6, seed: int = 8) -> HeldOut:
    index = np.repeat(np.arange(patients), 2)
    x, y = encoded(study.contract, len(index), seed)
    return HeldOut(x, y, index, patients, 1)


def state_of(study: Study, seed: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    return {t.name: rng.normal(0, 0.5, t.shape).astype(np.float32) for t in state_layout(study)}


def rules_of(study: Study) -> Evaluation:
    assert study.evaluation is not None
    return study.evaluation


@pytest.mark.parametrize("name", TRAINED)
def test_no_row_exceeds_the_bound(name: str) -> None:
    study = evaluated(name)
    rules = rules_of(study)
    x, y = encoded(study.contract, 30)
    module = load(build(study.model, study.contract), state_of(study))
    said = predict(study.model, study.contract, module, x)
    for predicted in (said, np.full_like(said, np.nan), np.full_like(said, 1e300), -said):
        found = evaluation.cells(rules, study.model, study.contract, (2, 3), x, y, predicted)
        assert found.shape == (30, evaluation.length(rules, study.model, study.contract, 3))
        limit = evaluation.bound(rules, study.model, study.contract) / study.contract.rows_per_patient
        assert np.linalg.norm(found, axis=1).max() <= limit * (1 + 1e-9)


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation_is_separable_by_patient(name: str) -> None:
    study = evaluated(name)
    held, state = held_of(study), state_of(study)
    whole = Counting(study, rules_of(study), held, state)
    one_by_one = [whole.total(np.arange(6) == patient) for patient in range(6)]
    for patient in range(6):
        here = held.patients == patient
        alone = HeldOut(held.x[here], held.y[here], np.zeros(2, dtype=np.int64), 1, 1)
        found = Counting(study, rules_of(study), alone, state).total(np.ones(1, dtype=np.bool_))
        assert np.array_equal(found, one_by_one[patient])
        assert np.linalg.norm(found) <= study.privacy.clip_norm  # type: ignore[union-attr]
    assert whole.total(np.ones(6, dtype=np.bool_)) == pytest.approx(np.sum(one_by_one, axis=0))
    nobody = HeldOut(held.x[:0], held.y[:0], held.patients[:0], 0, 1)
    assert not Counting(study, rules_of(study), nobody, state).total(np.zeros(0, dtype=np.bool_)).any()


@pytest.mark.parametrize("name", ["logistic", "lstm", "cox", "autoencoder", "translator", "linear", "mlp"])
def test_a_round_gives_back_the_counts(name: str) -> None:
    """Through the site and the hub, without noise: what is in the state is the sum over hospitals."""
    study = evaluated(name, dp=False)
    manifest = manifest_of(study)
    step, state = ServerStep(manifest), dict(initial_state(manifest))
    assert not state[EVALUATION].any()
    rules, dim = rules_of(study), size(state_layout(study))
    for turn in range(study.rounds):
        expected = np.zeros(state[EVALUATION].size)
        total = np.zeros(dim)
        for site in range(3):
            held = held_of(study, seed=site)
            held = HeldOut(held.x, held.y, held.patients, held.count, site)
            x, y = encoded(study.contract, 8, 50 + site)
            gate = PlainGate(PlainParams(dim=dim, steps=1))
            total += train_local(state, x, y, np.arange(8), study, gate, lambda _a, _b: None, held, site)
            expected += Counting(study, rules, held, state).total(np.ones(held.count, dtype=np.bool_))
        before = {key: value for key, value in state.items() if key != EVALUATION}
        state = step.advance(state, np.rint(total / 1e-9).astype(np.int64), 1e-9, 3)
        assert state[EVALUATION] == pytest.approx(expected, abs=1e-4)
        moved = any(not np.array_equal(before[key], state[key]) for key in before)
        assert moved == (turn < study.training.rounds)
    again = ServerStep(manifest)
    again.restore(step.to_bytes())
    assert again.advances == study.rounds


def test_rounds_after_training_are_averaged() -> None:
    study = evaluated("logistic", "shared-noise")
    study = study.model_copy(update={"evaluation": rules_of(study).model_copy(update={"rounds": 3})})
    step, state = ServerStep(manifest_of(study)), dict(initial_state(manifest_of(study)))
    d = size(layout(study.model, study.contract))
    scale = evaluation.scale(study)
    for turn in range(study.rounds):
        total = np.zeros(d + state[EVALUATION].size, dtype=np.int64)
        total[d:] = 1000 * (turn + 1)
        state = step.advance(state, total, 1e-3, 3)
    # Two rounds of training, then 3, 4 and 5 of evaluation.
    assert state[EVALUATION] == pytest.approx(np.full(state[EVALUATION].size, 4.0 / scale), rel=1e-6)


def test_what_is_read_out_is_the_pooled_metric() -> None:
    study = evaluated("mlp", contract={
        "patient": "patient", "features": [*KINDS["logistic"][1]], "holdout": 0.3,
        "label": {"name": "ill", "classes": ["no", "yes"]},
    }, evaluation={"subgroups": ["sex"], "per_hospital": True})  # fmt: skip
    rules = rules_of(study)
    x, y = encoded(study.contract, 300)
    said = np.random.default_rng(0).dirichlet([1, 1], 300)
    counts = sum(
        evaluation.cells(rules, study.model, study.contract, (site, 3), x[part], y[part], said[part]).sum(
            axis=0
        )
        for site, part in enumerate((slice(0, 100), slice(100, 150), slice(150, 300)))
    )
    found = evaluation.read_out(rules, study.model, study.contract, study.members, np.asarray(counts), 0.0)
    bins = np.clip(np.floor(said[:, 1] * 20), 0, 19).astype(int)
    for name, here in (
        ("everybody", np.ones(300, bool)),
        ("sex = f", x[:, 3] == 1),
        ("sex = m", x[:, 4] == 1),
    ):
        table = np.zeros((2, 20))
        np.add.at(table, (y[here], bins[here]), 1.0)
        for key, value in metrics.binary(table).items():
            assert found[name][key].value == pytest.approx(value, nan_ok=True)
    wrong = said.argmax(axis=1) != y
    assert found["hospitals"]["B"].value == pytest.approx(wrong[100:150].mean())
    rates = [wrong[:100].mean(), wrong[100:150].mean(), wrong[150:].mean()]
    assert found["hospitals"]["widest gap"].value == pytest.approx(max(rates) - min(rates))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("mode", ["local", "shared-noise"])
def test_studies_with_an_evaluation_are_admitted(name: str, mode: str) -> None:
    study = evaluated(name, mode)
    admitted = check(manifest_of(study), None)
    assert admitted.dim == size(state_layout(study))
    assert study.rounds == study.training.rounds + 1
    found = evaluation.read_out(
        rules_of(study), study.model, study.contract, study.members,
        np.zeros(admitted.layout[-1].size), 3.0,
    )  # fmt: skip
    assert "everybody" in found


def test_an_evaluation_needs_its_held_out_patients() -> None:
    study = evaluated("logistic", "shared-noise")
    x, y = encoded(study.contract, 4)
    admitted = check(manifest_of(study), None)
    with pytest.raises(RefusedError, match="held-out"):
        contribute(state_of(study), x, y, np.arange(4), study, admitted.shared_gate(lambda n: bytes(n)))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"contract__holdout": 0.0}, "evaluation"),
        ({"evaluation": {"subgroups": ["age"]}}, "evaluation.subgroups.0"),
        ({"evaluation": {"bins": 7}}, "evaluation.bins"),
        ({"evaluation": {"rounds": 0}}, "evaluation.rounds"),
        ({"aggregation__rounds_max": 3}, "aggregation.rounds_max"),
    ],
)
def test_broken_evaluations_are_refused_by_name(changes: dict[str, Any], path: str) -> None:
    from tests.federation import small_study

    whole = {"contract__holdout": 0.2, "evaluation": {}} | changes
    with pytest.raises(UsageError) as caught:
        Study.from_toml(_toml(small_study(["A", "B", "C"], **whole)))
    assert caught.value.code == f"study.{path}"


def test_no_hospital_is_named_without_privacy_and_counts_are_no_model() -> None:
    for name, dp in (("logistic", False), ("forest", True)):
        with pytest.raises(ValueError, match=r"per_hospital|evaluation"):
            study_of(name, dp=dp, contract__holdout=0.2, evaluation={"per_hospital": True})


def _toml(value: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(value)


def test_intervals_hold_the_held_out_value() -> None:
    """Of metrics of noisy counts: in about 95 of 100 sums, and without a drift to one side."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 2000)
    scores = 1 / (1 + np.exp(-(rng.normal(0, 1, 2000) + 1.5 * y - 0.7)))
    exact = np.zeros((2, 20))
    np.add.at(exact, (y, np.floor(scores * 20).astype(int)), 1.0)
    truth = metrics.binary(exact)
    held, drift = [], []
    for _ in range(60):
        found = estimates(metrics.binary, exact + rng.normal(0, 6.0, exact.shape), 6.0)
        for name in ("auroc", "brier", "accuracy", "prevalence"):
            held.append(found[name].low <= truth[name] <= found[name].high)
        drift.append(found["auroc"].value - truth["auroc"])
    assert 0.88 <= float(np.mean(held)) <= 1.0
    assert abs(float(np.mean(drift))) < 0.01


@pytest.mark.parametrize("name", ["logistic", "lstm", "cox", "translator"])
def test_any_patient_moves_the_release_by_at_most_the_clip(name: str) -> None:
    """Trained on or held out: without one patient the integers that leave differ by the grid's sensitivity."""
    study = evaluated(name, "shared-noise")
    admitted, state = check(manifest_of(study), None), state_of(study)
    x, y = encoded(study.contract, 8)
    index, held = np.repeat(np.arange(4), 2), held_of(study)

    def released(kept: Any, still: Any) -> Any:
        place = np.unique(held.patients[still], return_inverse=True)[1]
        own = HeldOut(held.x[still], held.y[still], place, len(np.unique(held.patients[still])), 1)
        gate = admitted.shared_gate(np.random.default_rng(0).bytes)
        return contribute(state, x[kept], y[kept], index[kept], study, gate, own).q

    everybody = released(index >= 0, held.patients >= 0)
    limit = admitted.params.delta_g  # type: ignore[union-attr]
    for patient in range(4):
        assert np.linalg.norm(everybody - released(index != patient, held.patients >= 0)) <= limit
    for patient in range(6):
        moved = np.linalg.norm(everybody - released(index >= 0, held.patients != patient))
        assert 0 < moved <= limit
