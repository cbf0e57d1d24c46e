"""Hospitals that differ: the proximal pull, and public weights."""

from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UsageError
from common.privacy.gate import PlainGate, PlainParams
from common.study import Study
from common.tasks.models.layout import flatten, layout, size
from common.tasks.models.modules import build, load, losses
from common.tasks.training import train_local
from server.strategy import ServerStep
from tests.common.tasks.kinds import encoded, manifest_of, study_of


def trained(study: Study, member: int = 0) -> tuple[Any, Any, Any, Any]:
    tensors = layout(study.model, study.contract)
    rng = np.random.default_rng(5)
    state = {t.name: rng.normal(0, 0.3, t.shape).astype(np.float32) for t in tensors}
    x, y = encoded(study.contract, 12)
    gate = PlainGate(PlainParams(dim=size(tensors), steps=study.training.steps))
    change = train_local(state, x, y, np.arange(12), study, gate, lambda _a, _b: None, member=member)
    return change, state, x, y


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_the_proximal_term_is_fedproxs(mu: float) -> None:
    """Steps down the mean loss plus mu / 2 |w - start|^2, by torch alone."""
    study = study_of("mlp", dp=False, training__steps=4, training__proximal=mu, training__learning_rate=0.3)
    change, state, x, y = trained(study)
    module = load(build(study.model, study.contract), state)
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        loss = losses(study.model, study.contract)(module, torch.tensor(x), torch.tensor(y)).mean()
        apart = sum(((p - s) ** 2).sum() for p, s in zip(module.parameters(), start, strict=True))
        (loss + mu / 2 * apart).backward()
        optimizer.step()
    end = torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()
    expected = end - flatten(state, layout(study.model, study.contract))
    assert np.abs(change - expected).max() < 1e-9


@pytest.mark.parametrize("engine", ["opacus", "bookkeeping"])
def test_a_pull_is_a_function_of_what_was_released(engine: str) -> None:
    """With privacy too: the first step has none, and the same noise gives the same change."""
    from common.admissible import check

    changes = []
    for mu in (0.0, 0.5):
        study = study_of("logistic", training__steps=1, training__proximal=mu, training__engine=engine)
        gate = check(manifest_of(study), None).gate(np.random.default_rng(3).bytes)
        x, y = encoded(study.contract, 9)
        state = {t.name: np.zeros(t.shape, np.float32) for t in layout(study.model, study.contract)}
        changes.append(train_local(state, x, y, np.arange(9), study, gate, lambda _a, _b: None))  # type: ignore[arg-type]
    assert np.array_equal(*changes)


def test_weights_are_the_means() -> None:
    study = study_of("mlp", dp=False, training__weights=[1.0, 0.25, 0.5], training__steps=2)
    plain = study_of("mlp", dp=False, training__steps=2)
    for member, weight in enumerate((1.0, 0.25, 0.5)):
        assert trained(study, member)[0] == pytest.approx(weight * trained(plain)[0])
    step, whole = ServerStep(manifest_of(study)), size(layout(study.model, study.contract))
    _, state, _, _ = trained(study)
    # Two hospitals that moved by 4 and by 2, of weights 1 and 1/2.
    total = np.full(whole, 5_000_000, dtype=np.int64)
    after = step.advance(state, total, 1e-6, 1.5)
    moved = flatten(after, layout(study.model, study.contract)) - flatten(
        state, layout(study.model, study.contract)
    )
    assert moved == pytest.approx(np.full(whole, 5 / 1.5), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"training__proximal": 0.1, "mode": "shared-noise"}, "training.proximal"),
        ({"training__weights": [1.0, 1.0, 1.0], "mode": "shared-noise"}, "training.weights"),
        ({"training__weights": [1.0, 1.0]}, "training.weights"),
        ({"training__weights": [1.0, 1.0, 0.0]}, "training.weights.2"),
        ({"training__proximal": -1.0}, "training.proximal"),
    ],
)
def test_what_cannot_be_weighted_is_refused(changes: dict[str, Any], path: str) -> None:
    import tomli_w

    from tests.federation import small_study

    given = dict(changes)
    mode = given.pop("mode", "local")
    more = {"training__engine": None, "aggregation__codec__step": 1e-3} if mode != "local" else {}
    with pytest.raises(UsageError) as caught:
        Study.from_toml(tomli_w.dumps(small_study(["A", "B", "C"], training__mode=mode, **more, **given)))
    assert caught.value.code == f"study.{path}"
