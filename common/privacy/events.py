"""The privacy event: what one release did to one register, in data-independent fields only.

Source: PRIVACY.md "Event fields", "Registers, budget, filter"; DESIGN.md "Privacy" (store events, derive
epsilon). Rules: integers and canonical decimal strings, nothing else; every field is required for its
kind and refused for the others; a claim that can be recomputed (Delta_g, z_t, z_w) must be exactly what
the other fields give, so an event cannot state a privacy that its own noise does not have.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.errors import UsageError
from common.privacy import clipping
from common.privacy.decimals import fraction_of

MANY: Final = 2**53 - 1
BETA: Final = "0.000000000000000000000000827181"
"""Total-variation bound of one noise coordinate: 2^-80, rounded up."""

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TaskName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
DecimalText = Annotated[str, Field(max_length=64)]
State = Literal["reserved", "charged", "released"]
Reason = Literal["", "approved", "denied", "paused", "contract_holds", "retry", "no_upload"]

_MECHANISM: Final = (
    "mode",
    "sampling",
    "q",
    "steps",
    "dim",
    "clip_norm",
    "grid_step",
    "eta",
    "arith",
    "noise",
    "delta_g",
    "s_g_squared",
    "members",
    "u_size",
    "t",
    "z_t",
    "z_w",
    "beta",
)


class Event(BaseModel):
    """One charge of one register.

    Fields by their names on disk: ``C`` (clip norm), ``step`` (grid step), ``Delta_g``, ``U_size`` and
    ``s_g_squared`` (the integer variance: s_g itself is irrational). Mechanism fields are set for kind
    ``sum`` and absent for ``declared`` (a person's act) and ``no_dp`` (a release without noise). State:
    ``reserved`` (scheduled), ``charged`` (spent, from before the computation), ``released`` (spent, and
    the result left the hospital); both last states count in full.

    Guarantee: malformed_events_are_refused - unknown, missing, extra, NaN, z <= 0, q outside (0,1],
    steps < 1, other JSON types and inconsistent claims.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    event_id: Hex32
    register_id: Hex32
    manifest_digest: Hex64
    task: TaskName
    round: Annotated[int, Field(ge=0, le=MANY)]
    attempt: Annotated[int, Field(ge=0, le=MANY)]
    kind: Literal["sum", "declared", "no_dp"]
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add_remove"] = "add_remove"
    state: State
    reason: Reason = ""
    mode: Literal["local", "shared-noise"] | None = None
    sampling: Literal["poisson", "full"] | None = None
    q: DecimalText | None = None
    steps: Annotated[int, Field(ge=1, le=MANY)] | None = None
    dim: Annotated[int, Field(ge=1, le=MANY)] | None = None
    clip_norm: Annotated[DecimalText | None, Field(alias="C")] = None
    grid_step: Annotated[DecimalText | None, Field(alias="step")] = None
    eta: DecimalText | None = None
    arith: Literal["f64_bounded", "f32_assumed"] | None = None
    noise: Literal["integer", "float"] | None = None
    delta_g: Annotated[Annotated[int, Field(ge=1, le=MANY)] | None, Field(alias="Delta_g")] = None
    s_g_squared: Annotated[int, Field(ge=256, le=clipping.LARGEST_VARIANCE)] | None = None
    members: Annotated[int, Field(ge=1, le=65535)] | None = None
    u_size: Annotated[Annotated[int, Field(ge=1, le=65535)] | None, Field(alias="U_size")] = None
    t: Annotated[int, Field(ge=0, le=65535)] | None = None
    z_t: DecimalText | None = None
    z_w: DecimalText | None = None
    beta: DecimalText | None = None

    @field_validator("schema_version", mode="before")
    @classmethod
    def _schema_is_an_integer(cls, value: object) -> object:
        # True == 1 passes a Literal; a ledger field of another JSON type must not.
        if type(value) is not int:
            raise ValueError("must be the integer 1")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        absent = [name for name in _MECHANISM if getattr(self, name) is None]
        if self.kind != "sum":
            if len(absent) != len(_MECHANISM):
                raise ValueError(f"an event of kind {self.kind} has no mechanism fields")
            return self
        if absent:
            raise ValueError(f"an event of kind sum needs {', '.join(absent)}")
        try:
            self._check_mechanism()
        except UsageError as error:
            raise ValueError(error.problem) from error
        return self

    def _check_mechanism(self) -> None:
        mechanism = self.mechanism
        q = mechanism.q
        if self.round < 1:
            raise ValueError("rounds count from 1")
        if not 0 < q <= 1 or (self.sampling == "full") != (q == 1):
            raise ValueError("q must be 1 for full and inside (0, 1) for poisson sampling")
        if not mechanism.t < mechanism.u_size <= mechanism.members:
            raise ValueError("t must be below U_size, U_size at most members")
        sharers = mechanism.sharers
        if self.mode == "shared-noise" and sharers < 2:
            raise ValueError("shared noise needs U_size - t >= 2")
        eta = mechanism.eta
        if not 0 < eta <= clipping.ETA_LIMIT or (self.arith == "f32_assumed" and eta != clipping.ETA_LIMIT):
            raise ValueError("eta must be in (0, 0.001], and 0.001 for f32_assumed")
        clipping.check_grid(mechanism.clip_norm, mechanism.grid_step, mechanism.dim)
        delta_g = clipping.grid_sensitivity(mechanism.clip_norm, mechanism.grid_step, mechanism.dim, eta)
        if mechanism.delta_g != delta_g:
            raise ValueError("Delta_g is not what C, step, eta and dim give")
        variance = mechanism.s_g_squared
        if mechanism.z_t_text != clipping.z_threshold(variance, delta_g, sharers):
            raise ValueError("z_t is not what s_g and Delta_g give")
        if mechanism.z_w_text != clipping.z_worst(variance, delta_g):
            raise ValueError("z_w is not what s_g and Delta_g give")
        if not mechanism.z_w > 0 or not mechanism.z_t > 0:
            raise ValueError("z must be positive")
        if not fraction_of(BETA) <= mechanism.beta < 1:
            raise ValueError("beta must be at least 2^-80")

    @property
    def mechanism(self) -> "Mechanism":
        """The mechanism's fields as exact numbers. Raises UsageError unless the kind is ``sum``."""
        return Mechanism(self)

    def to_fields(self) -> dict[str, str | int]:
        """The fields under their names on disk; absent ones are left out."""
        return self.model_dump(exclude_none=True)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``to_fields`` back, strictly.

        Guarantee: events_survive_the_ledger - from_fields(to_fields(x)) == x.
        Raises: UsageError naming the field and the rule, never a value.
        """
        try:
            return cls.model_validate(dict(fields), by_alias=True, by_name=False)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "event"
            raise UsageError("privacy.event", f"{where}: {first['msg']}") from error

    def with_state(self, state: State, reason: Reason = "") -> Self:
        """The same event in another state."""
        return type(self).from_fields({**self.to_fields(), "state": state, "reason": reason})


class Mechanism:
    """The mechanism of an event of kind ``sum``: present, typed, exact.

    z_t, z_w are noise multipliers (standard deviation over sensitivity) of one step; q, eta, beta ratios.
    """

    __slots__ = (
        "beta",
        "clip_norm",
        "delta_g",
        "dim",
        "eta",
        "grid_step",
        "members",
        "mode",
        "q",
        "s_g_squared",
        "sampling",
        "steps",
        "t",
        "u_size",
        "z_t",
        "z_t_text",
        "z_w",
        "z_w_text",
    )

    def __init__(self, event: Event) -> None:
        def integer(value: int | None) -> int:
            if value is None:
                raise UsageError("privacy.event-kind", "this event has no mechanism")
            return value

        def text(value: str | None) -> str:
            if value is None:
                raise UsageError("privacy.event-kind", "this event has no mechanism")
            return value

        self.mode = text(event.mode)
        self.sampling = text(event.sampling)
        self.q = fraction_of(text(event.q))
        self.steps = integer(event.steps)
        self.dim = integer(event.dim)
        self.clip_norm = fraction_of(text(event.clip_norm))
        self.grid_step = fraction_of(text(event.grid_step))
        self.eta = fraction_of(text(event.eta))
        self.delta_g = integer(event.delta_g)
        self.s_g_squared = integer(event.s_g_squared)
        self.members = integer(event.members)
        self.u_size = integer(event.u_size)
        self.t = integer(event.t)
        self.z_t_text = text(event.z_t)
        self.z_w_text = text(event.z_w)
        self.z_t = fraction_of(self.z_t_text)
        self.z_w = fraction_of(self.z_w_text)
        self.beta = fraction_of(text(event.beta))

    @property
    def sharers(self) -> int:
        """Hospitals whose noise shares are counted in the t view: U_size - t, or 1 in ``local``."""
        return 1 if self.mode == "local" else self.u_size - self.t

    def z(self, view: Literal["t", "w"]) -> Fraction:
        """The noise multiplier of one step in that view."""
        return self.z_t if view == "t" else self.z_w

    @property
    def slack(self) -> Fraction:
        """d T |U| beta: total variation that the sampler may be off by, over the whole event."""
        return self.dim * self.steps * self.u_size * self.beta


__all__ = ["BETA", "Event", "Mechanism", "Reason", "State"]
