"""Canaries in a study's own code: correct code passes, and code without noise or clipping does not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common.admissible import check
from common.errors import UsageError
from common.privacy import gate
from common.privacy.accountant import Term, compose_epsilon
from common.privacy.canaries import shown_epsilon, variance_p_value
from common.privacy.clipping import sanitise
from common.study import Manifest
from common.tasks import canaries, training
from common.tasks.canaries import Observed, observe
from common.tasks.models import initial_state
from tests.canary_study import make

torch.set_num_threads(1)
DELTA = 1e-6


def seen(manifest: Manifest, seed: int = 0) -> Observed:
    """One run whose noise and coins come from a seed."""
    admitted = check(manifest, None)
    entropy = np.random.default_rng([seed, 77]).bytes
    return observe(manifest.study, admitted, initial_state(manifest), seed, entropy)


def bounds(manifest: Manifest, found: Observed) -> tuple[float, float]:
    """What the canaries show, what the accountant says."""
    event = check(manifest, None).event("0" * 32, 1, 1, "0" * 32).mechanism
    upper = compose_epsilon([Term(event.q, event.z_t, event.steps * found.rounds)], DELTA)
    return shown_epsilon(found.scores, found.included, DELTA), upper


def noise_is_wrong(found: Observed) -> bool:
    return variance_p_value(found.noise_ratio, found.noise_count) < 1e-6


def fainter(sampler: Callable[..., Any], divisor: int) -> Callable[..., Any]:
    """The sampler with its variance divided; by 0: no noise."""

    def sample(variance: int, size: int, entropy: Callable[[int], bytes]) -> Any:
        return sampler(variance // divisor, size, entropy) if divisor else np.zeros(size, dtype=np.int64)

    return sample


KINDS: dict[str, dict[str, Any]] = {
    "local": {},
    "steps": {"rounds": 10, "steps": 3, "z": 11.0},
    "mlp": {"hidden": (8,), "rows": 1},
    "shared": {"mode": "shared-noise"},
    "poisson": {"rate": 0.2, "z": 2.0},
    "shared-poisson": {"mode": "shared-noise", "rate": 0.2, "z": 2.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_correct_code_passes(kind: str, tmp_path: Any) -> None:
    manifest = make(tmp_path, **KINDS[kind])
    shown = []
    for seed in range(8):
        found = seen(manifest, seed)
        lower, upper = bounds(manifest, found)
        assert lower <= upper
        assert not noise_is_wrong(found)
        assert found.sum_error < (1e-3 if kind in ("mlp", "shared", "shared-poisson") else 1e-9) + 1e-2 * (
            kind.startswith("shared")
        )
        shown.append(lower)
    if "poisson" not in kind:
        # The canaries are no dead weight: usually they show something.
        assert np.mean(shown) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divisor", [0, 2])
def test_no_noise_is_flagged(kind: str, divisor: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path, **KINDS[kind])
    for module in (gate, canaries):
        monkeypatch.setattr(module, "discrete_gaussian", fainter(module.discrete_gaussian, divisor))
    found = seen(manifest)
    assert noise_is_wrong(found)
    assert found.noise_ratio == pytest.approx(0.5 if divisor else 0.0, abs=0.1)
    if divisor == 0 and "poisson" not in kind:
        lower, upper = bounds(manifest, found)
        assert lower > upper


def test_a_share_that_is_missing_is_flagged(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four hospitals are honest here; canaries alone do not see that one of them adds no noise."""
    manifest = make(tmp_path, mode="shared-noise")
    real, calls = canaries.with_noise, []

    def sometimes(words: Any, *rest: Any) -> Any:
        calls.append(1)
        return words if len(calls) % 3 == 0 else real(words, *rest)

    monkeypatch.setattr(canaries, "with_noise", sometimes)
    found = seen(manifest)
    assert found.noise_ratio == pytest.approx(2 / 3, abs=0.1)
    assert noise_is_wrong(found)
    lower, upper = bounds(manifest, found)
    assert lower <= upper


@pytest.mark.parametrize("kind", KINDS)
def test_no_clipping_is_flagged(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path, **KINDS[kind])
    real = training.clipped_sum
    monkeypatch.setattr(training, "clip", lambda vectors, _norm: sanitise(vectors))
    monkeypatch.setattr(training, "clipped_sum", lambda *given, **more: real(*given[:-1], 1e9, **more))
    found = seen(manifest)
    assert found.sum_error > 1
    if kind in ("local", "steps", "shared"):
        lower, upper = bounds(manifest, found)
        assert lower > upper


def test_the_run_is_the_seeds_and_the_entropys(tmp_path: Any) -> None:
    """Rows from the seed; coins and noise from the entropy; torch's own generator is not touched."""
    manifest = make(tmp_path, rounds=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = seen(manifest, 1), seen(manifest, 1), seen(manifest, 2)
    assert np.array_equal(first.scores, again.scores)
    assert np.array_equal(first.included, again.included)
    assert not np.array_equal(first.included, other.included[: first.included.size])
    assert torch.equal(before, torch.get_rng_state())


def test_long_studies_are_run_in_part(tmp_path: Any) -> None:
    assert seen(make(tmp_path, rounds=90, steps=30, width=3)).rounds == 2
    assert seen(make(tmp_path, rounds=3, steps=70, width=3)).rounds == 1


def test_a_study_without_privacy_claims_nothing(tmp_path: Any) -> None:
    with pytest.raises(UsageError) as caught:
        seen(make(tmp_path, private=False))
    assert caught.value.code == "audit.no-privacy"
