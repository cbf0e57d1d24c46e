"""The bound of one run against the paper's printed values and randomised response; the test of variances."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.errors import UsageError
from common.privacy.canaries import largest_shown, lower_bound, p_value, shown_epsilon, variance_p_value


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_one_run_bound_is_the_papers(
    canaries: int, guesses: int, correct: int, delta: float, printed: float
) -> None:
    """Appendix D (page 46) and section 7 (page 28) of arXiv 2305.08846; the second is cut, not rounded."""
    assert lower_bound(canaries, guesses, correct, delta, 0.05) == pytest.approx(printed, abs=1e-3)


@given(
    guesses=st.integers(1, 60),
    share=st.floats(0, 1),
    epsilon=st.floats(0, 8),
    delta=st.sampled_from([0.0, 1e-6, 1e-3]),
)
def test_p_value_agrees_with_the_theorem_written_out(
    guesses: int, share: float, epsilon: float, delta: float
) -> None:
    correct, canaries = round(share * guesses), 2 * guesses
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = [float(stats.binom.sf(at - 1, guesses, accuracy)) for at in range(correct + 1)]
    worst = max(((tail[correct - i] - tail[correct]) / i for i in range(1, correct + 1)), default=0.0)
    expected = min(1.0, tail[correct] + 2 * canaries * delta * worst)
    assert p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_randomised_response_is_right_about_its_epsilon() -> None:
    """The mechanism that the bound is tight for: its epsilon is excluded in at most 5 of 100 runs."""
    random = np.random.default_rng(5)
    for epsilon in (0.5, 2.0, 4.0):
        counts = random.binomial(200, 1 / (1 + math.exp(-epsilon)), 4000)
        bounds = {int(count): lower_bound(200, 200, int(count), 0.0, 0.05) for count in set(counts)}
        excluded = float(np.mean([bounds[int(count)] > epsilon for count in counts]))
        assert excluded <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4000)


@given(canaries=st.integers(4, 400), share=st.floats(0.5, 1))
def test_more_right_guesses_show_more(canaries: int, share: float) -> None:
    correct = max(1, round(share * canaries))
    here = lower_bound(canaries, canaries, correct, 1e-6, 0.05)
    assert here >= lower_bound(canaries, canaries, correct - 1, 1e-6, 0.05)
    assert here >= lower_bound(canaries * 10, canaries, correct, 1e-4, 0.05) - 1e-9
    assert here >= lower_bound(canaries, canaries, correct, 1e-6, 0.01)
    # All right: accuracy to the power of n is 5 percent.
    accuracy = 0.05 ** (1 / canaries)
    assert here <= max(0.0, math.log(accuracy / (1 - accuracy))) + 1e-9


def test_all_right_without_delta_is_the_closed_form() -> None:
    accuracy = 0.05 ** (1 / 500)
    assert lower_bound(500, 500, 500, 0.0, 0.05) == pytest.approx(math.log(accuracy / (1 - accuracy)))
    assert lower_bound(500, 500, 250, 0.0, 0.05) == 0.0


def test_scores_without_information_show_nothing() -> None:
    random = np.random.default_rng(2)
    shown = [
        shown_epsilon(random.normal(size=(3, 200)), random.integers(0, 2, 200).astype(bool), 1e-6)
        for _ in range(200)
    ]
    assert np.mean(np.array(shown) > 0) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_scores_that_tell_all_show_the_most() -> None:
    included = np.random.default_rng(1).integers(0, 2, 300).astype(bool)
    scores = np.tile(included.astype(np.float64), (3, 1))
    shown = shown_epsilon(scores, included, 1e-6)
    assert shown == pytest.approx(largest_shown(3, 300, 1e-6))
    assert 3.9 < shown < math.log(300 / -math.log(0.95))
    # One way of reading is enough; upside down shows nothing.
    scores[1:] = 0.0
    assert shown_epsilon(scores, included, 1e-6) == pytest.approx(shown)
    assert shown_epsilon(-scores, included, 1e-6) == 0.0


def test_only_sure_guesses_are_made() -> None:
    """A tenth of the canaries give themselves away: that is shown though the others are not told apart."""
    random = np.random.default_rng(3)
    included = random.integers(0, 2, 1000).astype(bool)
    scores = random.normal(0, 0.01, (1, 1000))
    scores[0, :100] = np.where(included[:100], 1.0, -1.0)
    assert 2.5 < shown_epsilon(scores, included, 1e-6) <= largest_shown(1, 100, 1e-6) + 1.2


@pytest.mark.parametrize("count", [62, 1240, 20_000])
def test_wrong_variances_are_told(count: int) -> None:
    """The p-value bounds the exact one, and finds half of the variance where there are numbers enough."""
    for ratio in (0.2, 0.5, 0.8, 0.95, 1.05, 1.3, 2.0, 4.0):
        statistic = ratio * count
        exact = min(stats.chi2.cdf(statistic, count), stats.chi2.sf(statistic, count))
        assert variance_p_value(ratio, count) >= exact
    assert variance_p_value(0.0, count) == 0.0
    assert variance_p_value(math.inf, count) == 0.0
    assert variance_p_value(math.nan, count) == 0.0
    assert variance_p_value(1.0, count) == 1.0
    if count >= 200:
        assert variance_p_value(0.5, count) < 1e-6
        assert variance_p_value(2.0, count) < 1e-6


@pytest.mark.parametrize(
    "wrong", [(10, 11, 5, 1.0, 0.0), (10, 5, 6, 1.0, 0.0), (10, 5, 5, -1.0, 0.0), (10, 5, 5, 1.0, 1.0)]
)
def test_impossible_counts_are_refused(wrong: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(UsageError):
        p_value(*wrong)
