"""Whether a manifest can be run: the one check that hub and hospital both make before anything else.

Source: PRIVACY.md "The release gate" (grid, noise, codec bounds), PROTOCOL.md "A hospital itself refuses",
"Codec". Rules: ``common.study`` has checked shape and ranges; here the model's size meets the gate's and the
codec's bounds, exactly; no torch, no clock, no data; what this returns is all that a round needs to know.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from common.contract import Contract
from common.errors import UsageError
from common.methods import RandomForest, Statistics
from common.privacy.clipping import weight_limit
from common.privacy.events import Event
from common.privacy.gate import (
    Entropy,
    GateParams,
    Integers,
    LocalGate,
    PlainGate,
    PlainParams,
    Quantise,
    SharedGate,
    Vector,
    plan_event,
)
from common.query import check_query
from common.secagg.codec import fits, quantise
from common.secagg.params import MAX_WORDS
from common.study import Codec, DifferentialPrivacy, Manifest, Study
from common.tasks import forest, statistics
from common.tasks.fit import fit
from common.tasks.fit import misfit as _refusal
from common.tasks.models import initial_norm
from common.tasks.models.layout import Layout, layout_digest, size, state_layout

TASK: Final = "training"
MAX_PATIENT_WORDS: Final = 1 << 27
NOISE_SPAN: Final = 8.0
"""Standard deviations of noise that a clamp must leave alone."""
_NO_ID: Final = "0" * 32
_PRIVACY_FIELDS: Final = {
    "privacy.eta": "privacy.max_patients",
    "privacy.grid-step": "privacy.grid_step",
    "privacy.noise-small": "privacy.noise_multiplier",
    "privacy.noise-large": "privacy.noise_multiplier",
    "privacy.rate": "training.sampling_rate",
    "privacy.steps": "training.steps",
}
"""Which field of the study is told when a bound of the gate does not hold."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What follows from a manifest that can be run.

    ``layout`` tensors in order; ``dim`` their length d; ``layout_digest`` 32 bytes; ``params`` the gate's
    constants for one round.
    """

    manifest_digest: bytes
    layout: Layout
    layout_digest: bytes
    dim: int
    params: GateParams | PlainParams
    codec: Codec
    members: int
    colluders: int
    minimum: int

    @property
    def private(self) -> bool:
        """Whether the study has differential privacy."""
        return isinstance(self.params, GateParams)

    @property
    def shared(self) -> bool:
        """Whether the hospitals share one noise."""
        return isinstance(self.params, GateParams) and self.params.mode == "shared-noise"

    @property
    def shares(self) -> tuple[int, ...]:
        """The variance of one hospital's share for each cohort from the smallest, empty without sharing."""
        if not isinstance(self.params, GateParams) or not self.shared:
            return ()
        sizes = range(self.minimum, self.members + 1)
        return tuple(self.params.variance(size - self.colluders) for size in sizes)

    def gate(self, entropy: Entropy) -> LocalGate | PlainGate:
        """A new gate for one round without shared noise. Product code passes os.urandom."""
        if isinstance(self.params, GateParams):
            return LocalGate(self.params, entropy)
        return PlainGate(self.params)

    def shared_gate(self, entropy: Entropy) -> SharedGate:
        """A new gate for one round with shared noise. Product code passes os.urandom."""
        if not isinstance(self.params, GateParams):
            raise UsageError("study.privacy", "a study without differential privacy shares no noise")
        return SharedGate(self.params, entropy)

    def quantiser(self, entropy: Entropy) -> Quantise:
        """float64 [d] to int64 [d] grid steps of the codec; ``entropy`` is used for dither alone."""
        codec = self.codec
        return partial(_quantised, codec=codec, entropy=entropy if codec.rounding == "dither" else None)

    def event(self, register_id: str, round: int, attempt: int, event_id: str) -> Event:
        """The event to charge to that register before a round; ids are 32 hex digits."""
        return plan_event(
            self.params,
            register_id,
            self.manifest_digest,
            TASK,
            round,
            attempt,
            self.members,
            self.colluders,
            event_id,
        )


def check(manifest: Manifest, now_minute: str | None) -> Admitted:
    """Refuse a manifest that cannot be run as it stands.

    ``now_minute`` is the own clock as "YYYY-MM-DDTHH:MMZ", None where the expiry is checked elsewhere.

    Guarantee: bounds_hold_at_the_edge - the grid, the noise, eta and the codec are accepted at their bounds
    and refused one step past them.
    Guarantee: planned_events_exist - an admitted manifest's event is one that the ledger accepts.

    Raises: UsageError with code ``study.<path>`` and the rule.
    """
    study = manifest.study
    if now_minute is not None and now_minute >= study.expires:
        raise _refusal("expires", f"the study expired at {study.expires}")
    _check_query(study.contract)
    fit(study.model, study.contract)
    _check_counting(study)
    tensors = state_layout(study)
    dim = size(tensors)
    if dim > MAX_WORDS:
        place = "model.hidden" if study.model.kind == "mlp" else "contract.features"
        raise _refusal(place, f"the model has {dim} parameters, more than {MAX_WORDS}")
    if dim * study.contract.rows_per_patient > MAX_PATIENT_WORDS:
        # A patient is clipped whole: a hospital that ran out of memory would do so after its charge.
        raise _refusal(
            "contract.rows_per_patient",
            f"the gradients of a patient's rows would be {dim * study.contract.rows_per_patient} numbers",
            "Keep fewer rows of a patient, or use a smaller model.",
        )
    _check_arithmetic(study)
    admitted = Admitted(
        manifest_digest=manifest.digest,
        layout=tensors,
        layout_digest=layout_digest(tensors),
        dim=dim,
        params=_gate_params(study, dim),
        codec=study.aggregation.codec,
        members=len(manifest.members),
        colluders=study.aggregation.colluders,
        minimum=study.aggregation.minimum_hospitals,
    )
    try:
        admitted.event(_NO_ID, study.rounds, 1, _NO_ID)
        shares = admitted.shares
    except UsageError as error:
        raise _refusal(_PRIVACY_FIELDS.get(error.code, "privacy"), error.problem, error.remedy) from error
    _check_codec(study, shares)
    _check_counts_fit(admitted, study)
    return admitted


def _gate_params(study: Study, dim: int) -> GateParams | PlainParams:
    privacy, training = study.privacy, study.training
    if not isinstance(privacy, DifferentialPrivacy):
        return PlainParams(dim=dim, steps=training.steps)
    try:
        return GateParams(
            clip_norm=privacy.clip_norm,
            grid_step=privacy.grid_step,
            dim=dim,
            noise_multiplier=privacy.noise_multiplier,
            sampling=training.sampling,
            rate=training.sampling_rate,
            steps=training.steps,
            max_patients=privacy.max_patients,
            arithmetic=privacy.arithmetic,
            mode=training.mode,
            terms_per_patient=1
            if study.counts or training.engine != "bookkeeping"
            else study.contract.rows_per_patient,
            minimum=study.aggregation.minimum_hospitals,
            clamp=study.aggregation.codec.range if training.mode == "shared-noise" else None,
        )
    except UsageError as error:
        raise _refusal(_PRIVACY_FIELDS.get(error.code, "privacy"), error.problem, error.remedy) from error


def _check_query(contract: Contract) -> None:
    """Refuse a query that may mix patients, or that makes other columns than the contract reads."""
    if not contract.query:
        return
    public = {table.name: table.columns for table in contract.tables}
    columns, _ = check_query(contract.query, contract.patient, public)
    window = () if contract.window is None else (contract.window.column,)
    needed = {contract.patient, *contract.columns, *window}
    if set(columns) != needed:
        differing = min(set(columns) ^ needed)
        raise _refusal("contract.query", f"it and the contract differ in the column {differing!r}")


def _check_arithmetic(study: Study) -> None:
    """eta is derived for one linear layer, up to a norm; training checks its iterates against it too."""
    privacy, contract, bound = study.privacy, study.contract, study.aggregation.state_norm_bound
    start = initial_norm(study.model, contract)
    if bound < start:
        raise _refusal(
            "aggregation.state_norm_bound", f"must be at least {start:.6g}, where the model starts"
        )
    if not isinstance(privacy, DifferentialPrivacy) or privacy.arithmetic != "f64_bounded":
        return
    if study.counts:
        # Each patient's vector exists before the sum, and no product is shared by patients.
        return
    if study.model.kind != "logistic_regression" or contract.label.kind != "classes":
        raise _refusal(
            "privacy.arithmetic",
            "f64_bounded is derived for logistic_regression of classes and for counts alone",
            'Use arithmetic = "f32_assumed"; reports list it as an assumption.',
        )
    limit = weight_limit(privacy.max_patients, privacy.clip_norm, contract.rows_per_patient, contract.width)
    if bound > limit:
        raise _refusal(
            "aggregation.state_norm_bound",
            f"the bound on rounding errors holds for models of norm up to {limit:.6g} only",
            "Lower state_norm_bound, or use arithmetic f32_assumed.",
        )


def _check_counting(study: Study) -> None:
    """Counts are one sum: nothing descends, and no count may be cut by clipping."""
    model, training, privacy = study.model, study.training, study.privacy
    if not isinstance(model, RandomForest | Statistics):
        return
    stated: dict[str, tuple[object, object]] = {
        "rounds": (training.rounds, 1),
        "steps": (training.steps, 1),
        "sampling": (training.sampling, "full"),
        "learning_rate": (training.learning_rate, 1.0),
        "server.strategy": (training.server.strategy, "fedavg"),
    }
    for field, (found, needed) in stated.items():
        if found != needed:
            raise _refusal(f"training.{field}", f"must be {needed!r} for {model.kind}, a single sum")
    rows = study.contract.rows_per_patient
    needed_norm = (
        forest.bound(model, rows)
        if isinstance(model, RandomForest)
        else statistics.bound(model, study.contract)
    )
    if isinstance(privacy, DifferentialPrivacy) and privacy.clip_norm < needed_norm:
        raise _refusal("privacy.clip_norm", f"must be at least {needed_norm:.9g}, else counts would be cut")


def _check_counts_fit(admitted: Admitted, study: Study) -> None:
    """No count may be clamped: what every patient adds to, in ``local`` with the noise on it."""
    params = admitted.params
    if not study.counts or not isinstance(params, GateParams):
        return
    needed = float(params.max_patients * study.contract.rows_per_patient)
    if not admitted.shared:
        needed += NOISE_SPAN * math.sqrt(params.variance(1)) * float(params.grid_step)
    if study.aggregation.codec.range < needed:
        rule = f"must be at least {needed:.9g}, else counts would be clamped"
        raise _refusal("aggregation.codec.range", rule, "Or lower privacy.max_patients.")


def _check_codec(study: Study, shares: Sequence[int]) -> None:
    """The sum of no cohort may wrap. In ``local`` the noise is inside the value that the codec clamps."""
    rules, codec = study.aggregation, study.aggregation.codec
    for at, cohort in enumerate(range(rules.minimum_hospitals, len(study.members) + 1)):
        if not fits(cohort, codec.bits, codec.step, codec.range, shares[at] if shares else 0):
            raise _refusal(
                "aggregation.codec.range",
                f"the sum over {cohort} hospitals can overflow {codec.bits} bits: range / step is too large",
                "Use 32 bits, a larger step or a smaller range.",
            )


def _quantised(values: Vector, *, codec: Codec, entropy: Callable[[int], bytes] | None) -> Integers:
    return quantise(values, codec.step, codec.range, codec.rounding, entropy)
