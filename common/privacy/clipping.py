"""One patient's weight in a sum: clipping, the sensitivity on the integer grid, the noise that answers it.

Source: PRIVACY.md "The release gate"; Higham, "Accuracy and Stability of Numerical Algorithms", ch. 3-4
(rounding of sums); Canonne, Kamath, Steinke, arXiv 2004.00010 (discrete Gaussian).
Rules: everything that enters a privacy claim is exact integer or rational arithmetic, rounded towards more
noise and less privacy claimed; a patient's non-finite vector becomes zero, never an error.

Where eta comes from: floating point adds n numbers with an error of at most gamma = n 2^-53 relative to
the sum of their magnitudes, so two sums over at most B patients differ by the one patient, C, and by
2 gamma B C. eta is 1024 times that, which also covers a contraction from activations whose magnitudes
exceed the norm up to 1024 fold, dividing by the grid step, and C and the step being read as float64.
"""

import math
from fractions import Fraction
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import UsageError
from common.privacy.decimals import root_over_down
from common.privacy.noise import LARGEST_VARIANCE

Arithmetic: TypeAlias = Literal["f64_bounded", "f32_assumed"]
Vectors: TypeAlias = NDArray[np.float64]

ETA_LIMIT: Final = Fraction(1, 1000)
GRID_SHARE_OF_CLIP: Final = Fraction(1, 100)
SMALLEST_NOISE: Final = 16
_CANCELLATION: Final = 1024
_LARGEST_MAGNITUDE: Final = 2.0**450
_UNIT_ROUNDOFF: Final = Fraction(1, 2**53)


def eta(arithmetic: Arithmetic, max_patients: int, terms_per_patient: int = 1) -> Fraction:
    """Relative excess of a clipped contribution over C through floating point, exact.

    ``max_patients`` is the public bound B on patients in one sum, ``terms_per_patient`` how many products
    of one patient are added into an output element (1 when each patient's vector exists before the sum).
    ``f64_bounded``: 2 * 1024 * (n 2^-53) * B with n = B * terms. ``f32_assumed``: 1e-3, an assumption
    that reports list.

    Raises: UsageError when the bound exceeds 1e-3.
    """
    if max_patients < 1 or terms_per_patient < 1:
        raise UsageError("privacy.max-patients", "patients and terms in one sum must be at least 1")
    if arithmetic == "f32_assumed":
        return ETA_LIMIT
    bound = 2 * _CANCELLATION * (max_patients * terms_per_patient * _UNIT_ROUNDOFF) * max_patients
    if bound > ETA_LIMIT:
        problem = f"rounding over {max_patients} patients can exceed {float(ETA_LIMIT)} of the clip norm"
        raise UsageError("privacy.eta", problem, remedy="Lower max_patients or the rows of one patient.")
    return bound


def weight_limit(max_patients: int, clip_norm: float, rows_per_patient: int, width: int) -> float:
    """The norm of a linear model's weights up to which eta covers that rows share a matrix product.

    A row's logits may be added up in another order when other rows are present: they then differ by at most
    2 (w+2) 2^-53 sqrt(w+1) |W|, its softmax gradient by 2 sqrt(w+1) times that, a patient's by K times, the
    sum over B patients by B times. eta leaves 2046 B^2 2^-53 C for it; 250 B C / (K (w+2) (w+1)) uses half.
    """
    return 250.0 * max_patients * clip_norm / (rows_per_patient * (width + 2) * (width + 1))


def check_grid(clip_norm: Fraction, grid_step: Fraction, dim: int) -> None:
    """Refuse a grid whose rounding is not small beside the clip norm: sqrt(d) step <= 0.01 C, exactly.

    Guarantee: grid_rule_is_exact - accepted at equality, refused one part in 10^12 above it.
    Raises: UsageError.
    """
    if dim < 1 or clip_norm <= 0 or grid_step <= 0:
        raise UsageError("privacy.grid", "dimension, clip norm and grid step must be positive")
    if dim * grid_step**2 > (GRID_SHARE_OF_CLIP * clip_norm) ** 2:
        remedy = "Lower grid_step; a quarter of 0.01 * clip_norm / sqrt(dim) is a good value."
        raise UsageError("privacy.grid-step", "sqrt(dim) * grid_step exceeds 0.01 * clip_norm", remedy=remedy)


def grid_sensitivity(clip_norm: Fraction, grid_step: Fraction, dim: int, eta_bound: Fraction) -> int:
    """Delta_g = ceil((1 + eta) C / step + sqrt(d)), in grid units, exact.

    Guarantee: neighbours_differ_by_at_most_delta - the rounded sums Q, Q' of two data sets that differ in
    one patient satisfy |Q - Q'|_2 <= Delta_g.
    Guarantee: grid_sensitivity_is_exact - the least integer that satisfies the inequality.
    """
    base = (1 + eta_bound) * clip_norm / grid_step
    bound = math.ceil(base) + math.isqrt(dim - 1)
    while bound < base or (bound - base) ** 2 < dim:
        bound += 1
    return bound


def noise_variance(z: Fraction, delta_g: int, sharers: int = 1) -> int:
    """s_g^2 = ceil((z^2 Delta_g^2 + 4) / sharers) + 4, the variance of one hospital's integer noise.

    ``sharers`` is |U| - t for shared noise and 1 in ``local``. Raises: UsageError unless s_g >= 16 and
    s_g^2 <= 2^52.
    """
    if z <= 0 or delta_g < 1 or sharers < 1:
        raise UsageError("privacy.noise", "noise multiplier, sensitivity and sharers must be positive")
    variance = math.ceil((z**2 * delta_g**2 + 4) / sharers) + 4
    if variance < SMALLEST_NOISE**2:
        remedy = "Lower grid_step or add noise."
        raise UsageError("privacy.noise-small", "the noise is under 16 grid steps", remedy=remedy)
    if variance > LARGEST_VARIANCE:
        remedy = "Raise grid_step."
        raise UsageError("privacy.noise-large", "the noise is over 2^26 grid steps", remedy=remedy)
    return variance


def z_threshold(variance: int, delta_g: int, sharers: int = 1) -> str:
    """z_t = sqrt(sharers s_g^2 - 4) / Delta_g, rounded down: at most t members collude with the hub.

    Guarantee: the_variance_less_four_rule_holds_in_one_dimension - the hockey-stick divergence of shifted
    discrete Gaussians of variance s^2 is at most that of continuous ones of variance s^2 - 4.
    """
    return root_over_down(sharers * variance - 4, delta_g)


def z_worst(variance: int, delta_g: int) -> str:
    """z_w = sqrt(s_g^2 - 4) / Delta_g, rounded down: the hub and all others collude, masks stripped."""
    return root_over_down(variance - 4, delta_g)


def sanitise(vectors: Vectors) -> Vectors:
    """A copy of ``vectors`` [patients, dim] with every row that holds NaN or infinity set to zero.

    Guarantee: a_nan_row_changes_nothing_but_its_patient - other rows keep their bits.
    """
    clean: Vectors = np.array(vectors, dtype=np.float64, ndmin=2)
    clean[~np.isfinite(clean).all(axis=1)] = 0.0
    return clean


def clip(vectors: Vectors, clip_norm: float) -> Vectors:
    """``sanitise``, then each row scaled to an L2 norm of at most ``clip_norm``; shape [patients, dim].

    Guarantee: clipped_norm_is_exact - in rational arithmetic no row's norm exceeds clip_norm, whatever
    the sizes (also where squares would overflow or vanish).
    Assumes: 1e-40 <= clip_norm < 1e20.
    """
    clean = sanitise(vectors)
    # The square of 2^450 times any dimension is finite; a magnitude past it keeps its sign and is clipped.
    np.clip(clean, -_LARGEST_MAGNITUDE, _LARGEST_MAGNITUDE, out=clean)
    # The factor covers the rounding of the sum of squares, the root, the quotient and the product.
    slack = 1.0 + (clean.shape[1] + 16) * 2.0**-52
    norm = np.sqrt(np.square(clean).sum(axis=1, keepdims=True)) * slack
    scale = np.divide(clip_norm, norm, out=np.ones_like(norm), where=norm > clip_norm)
    clean *= scale
    return clean


def clipped_sum(vectors: Vectors, clip_norm: float) -> Vectors:
    """Sum over patients of the clipped rows of ``vectors`` [patients, dim]; shape [dim], float64.

    No patients give zeros. The order of additions is that of the rows.
    """
    total: Vectors = clip(vectors, clip_norm).sum(axis=0)
    return total
