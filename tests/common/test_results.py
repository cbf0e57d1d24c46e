"""What a last state says: the noise that is stated is there, the card claims no less than is spent."""

import json
from typing import Any

import numpy as np
import pytest

from common.admissible import check
from common.privacy.filter import odometer
from common.privacy.noise import discrete_gaussian
from common.results import card, forest_json, noise_sd, results
from common.secagg.codec import from_words, to_words
from common.secagg.noise import with_noise
from common.study import Study
from common.tasks import forest
from common.tasks.holdout import HeldOut
from common.tasks.models import initial_state
from common.tasks.models.layout import EVALUATION
from common.tasks.training import contribute, train_local
from server.strategy import ServerStep
from tests.common.tasks.kinds import KINDS, encoded, manifest_of, study_of


def with_evaluation(mode: str, **changes: Any) -> Study:
    features, label = KINDS["logistic"][1:]
    contract = {"patient": "patient", "features": features, "label": label, "holdout": 0.3}
    rules = {"rounds": 2, "subgroups": ["sex"], "bins": 50}
    steps = {"training__steps": 4} if mode == "local" else {}
    return study_of("logistic", mode, contract=contract, evaluation=rules, **(steps | changes))


def run(study: Study, rows: int, seed: int) -> Any:
    """The last state of a study of three hospitals, with the real noise of seeded bytes."""
    manifest, entropy = manifest_of(study), np.random.default_rng(seed).bytes
    admitted = check(manifest, None)
    step, state = ServerStep(manifest), dict(initial_state(manifest))
    for _ in range(study.rounds):
        total: Any = 0
        for member in range(3):
            x, y = encoded(study.contract, rows, member)
            index = np.arange(rows)
            held = None if study.evaluation is None else HeldOut(x, y, index, rows, member)
            if admitted.shared:
                q = contribute(state, x, y, index, study, admitted.shared_gate(entropy), held).q
                words = to_words(q, 32, q.size, 2**31 - 1, "sums")
                noisy = with_noise(words, admitted.shares[-1], entropy(32), entropy(32), discrete_gaussian)
                total = total + from_words(noisy).astype(np.int64)
            else:
                gate = admitted.gate(entropy)
                delta = train_local(state, x, y, index, study, gate, lambda _a, _b: None, held, member)
                total = total + gate.finish(delta, admitted.quantiser(entropy)).q
        state = step.advance(state, total, admitted.codec.step, 3)
    return manifest, admitted, state


@pytest.mark.parametrize("mode", ["local", "shared-noise"])
def test_the_stated_noise_is_the_noise(mode: str) -> None:
    """Nobody is counted: what is in the state is noise alone."""
    manifest, admitted, state = run(with_evaluation(mode), 0, 5)
    noise = state[EVALUATION].astype(float)
    assert noise.size == 27
    assert noise.std() == pytest.approx(noise_sd(manifest, admitted, 3), rel=0.35)
    manifest, admitted, state = run(study_of("statistics", mode), 0, 6)
    assert state["counts"].std() == pytest.approx(noise_sd(manifest, admitted, 3), rel=0.2)


def test_without_privacy_there_is_no_noise() -> None:
    study = study_of("statistics", dp=False)
    manifest, admitted, state = run(study, 20, 1)
    assert noise_sd(manifest, admitted, 3) == 0
    found = results(manifest, admitted, state, 3)
    total = sum(found["groups"][group]["rows"]["count"]["value"] for group in ("f", "m", "none"))
    assert total == 60
    assert "single patients" in card(manifest, admitted, found, 3)


def test_a_card_claims_what_is_spent() -> None:
    manifest, admitted, state = run(with_evaluation("shared-noise"), 30, 2)
    found = results(manifest, admitted, state, 3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = card(manifest, admitted, found, 3)
    events = [admitted.event("0" * 32, 1, 1, "0" * 32)] * manifest.study.rounds
    for view in ("t", "w"):
        spent = odometer(events, 1e-6, view)
        assert any(
            spent <= float(word) <= spent + 0.002
            for word in text.replace(",", "").split()
            if word[0].isdigit() and word.count(".") == 1
        )
    assert "sex = f" in text
    assert manifest.digest.hex() in text


def test_a_model_without_an_evaluation_says_so() -> None:
    manifest, admitted, state = run(study_of("mlp"), 5, 3)
    assert results(manifest, admitted, state, 3) == {}
    assert "nothing is known" in card(manifest, admitted, {}, 3)
    assert forest_json(manifest, admitted, state, 3) == ""


def test_a_forest_is_read_out_with_its_noise() -> None:
    manifest, admitted, state = run(study_of("forest", "shared-noise"), 40, 4)
    read = json.loads(forest_json(manifest, admitted, state, 3))
    planted = forest.plant(manifest.study.model, manifest.study.contract)  # type: ignore[arg-type]
    expected = forest.read_out(planted, state["leaves"].astype(float), noise_sd(manifest, admitted, 3))
    assert np.array(read["log_levels"]) == pytest.approx(expected.logs)


def test_the_nearest_terms_point_the_same_way() -> None:
    manifest, admitted, state = run(study_of("skip_gram"), 8, 7)
    vectors = state["embedding.weight"][2:].astype(float)
    found = results(manifest, admitted, state, 3)["nearest"]
    terms = ("pain", "fever", "cough")
    for at, term in enumerate(terms):
        alike = vectors @ vectors[at] / np.linalg.norm(vectors, axis=1)
        others = sorted((place for place in range(3) if place != at), key=lambda place: -alike[place])
        assert found[term][:2] == [terms[place] for place in others]
    assert "near pain" in card(manifest, admitted, {"nearest": found}, 3)
