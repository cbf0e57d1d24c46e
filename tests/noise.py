"""Whether numbers have the variance that they should. For tests only."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FALSE_ALARM: Final = 1e-6
"""A p-value below this fails a test by chance once in a million runs."""


def chi_squared(values: NDArray[Any], variance: float) -> float:
    """The two-sided p-value of a sample of mean 0 for that variance."""
    statistic = float(np.square(values.astype(np.float64)).sum() / variance)
    return 2 * float(min(stats.chi2.cdf(statistic, values.size), stats.chi2.sf(statistic, values.size)))
