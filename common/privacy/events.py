"""The privacy event: what one release did to one register, in data-independent fields only.

Source: PRIVACY.md "Event fields", "Registers, budget, filter"; DESIGN.md "Privacy" (store events, derive
epsilon). Rules: integers and canonical decimal strings, nothing else; every field is required for its
kind and refused for the others; a claim that can be recomputed (Delta_g, z_t, z_w) must be exactly what
the other fields give, so an event cannot state a privacy that its own noise does not have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.errors import UsageError
from common.privacy import clipping
from common.privacy.decimals import fraction_of
from common.privacy.noise import LARGEST_VARIANCE

MANY: Final = 2**53 - 1
BETA: Final = "0.000000000000000000000000827181"
"""Total-variation bound of one noise coordinate: 2^-80, rounded up."""

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TaskName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
Many = Annotated[int, Field(ge=1, le=MANY)]
Few = Annotated[int, Field(ge=1, le=65535)]
DecimalText = Annotated[str, Field(max_length=64)]
State = Literal["reserved", "charged", "released"]
Reason = Literal["", "approved", "denied", "paused", "contract_holds", "retry", "no_upload"]


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
    steps: Many | None = None
    dim: Many | None = None
    clip_norm: Annotated[DecimalText | None, Field(alias="C")] = None
    grid_step: Annotated[DecimalText | None, Field(alias="step")] = None
    eta: DecimalText | None = None
    arith: Literal["f64_bounded", "f32_assumed"] | None = None
    noise: Literal["integer", "float"] | None = None
    delta_g: Annotated[Many | None, Field(alias="Delta_g")] = None
    s_g_squared: Annotated[int, Field(ge=256, le=LARGEST_VARIANCE)] | None = None
    members: Few | None = None
    u_size: Annotated[Few | None, Field(alias="U_size")] = None
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
        # The mechanism's fields, and only they, are absent by default.
        mechanism = [name for name, field in type(self).model_fields.items() if field.default is None]
        absent = [name for name in mechanism if getattr(self, name) is None]
        if self.kind != "sum":
            if absent != mechanism:
                raise ValueError(f"an event of kind {self.kind} has no mechanism fields")
            return self
        if absent:
            raise ValueError(f"an event of kind sum needs {', '.join(absent)}")
        try:
            broken = next((rule for holds, rule in self._rules() if not holds), "")
        except UsageError as error:
            raise ValueError(error.problem) from error
        if broken:
            raise ValueError(broken)
        return self

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Whether each rule between the fields holds, and its text."""
        m = self.mechanism
        yield self.round >= 1, "rounds count from 1"
        rate = 0 < m.q <= 1 and (self.sampling == "full") == (m.q == 1)
        yield rate, "q must be 1 for full and inside (0, 1) for poisson sampling"
        yield m.t < m.u_size <= m.members, "t must be below U_size, U_size at most members"
        yield self.mode != "shared-noise" or m.sharers >= 2, "shared noise needs U_size - t >= 2"
        eta = 0 < m.eta <= clipping.ETA_LIMIT and (self.arith != "f32_assumed" or m.eta == clipping.ETA_LIMIT)
        yield eta, "eta must be in (0, 0.001], and 0.001 for f32_assumed"
        clipping.check_grid(m.clip_norm, m.grid_step, m.dim)
        delta_g = clipping.grid_sensitivity(m.clip_norm, m.grid_step, m.dim, m.eta)
        yield m.delta_g == delta_g, "Delta_g is not what C, step, eta and dim give"
        z_t = clipping.z_threshold(m.s_g_squared, delta_g, m.sharers)
        yield self.z_t == z_t, "z_t is not what s_g and Delta_g give"
        z_w = clipping.z_worst(m.s_g_squared, delta_g)
        yield self.z_w == z_w, "z_w is not what s_g and Delta_g give"
        yield m.z_w > 0 and m.z_t > 0, "z must be positive"
        yield fraction_of(BETA) <= m.beta < 1, "beta must be at least 2^-80"

    @property
    def mechanism(self) -> "Mechanism":
        """The mechanism's fields as exact numbers. Raises UsageError unless the kind is ``sum``."""
        found = {field.name: (field.type, getattr(self, field.name)) for field in fields(Mechanism)}
        if any(value is None for _, value in found.values()):
            raise UsageError("privacy.event-kind", "this event has no mechanism")
        exact: dict[str, Any] = {
            name: fraction_of(v) if kind is Fraction else v for name, (kind, v) in found.items()
        }
        return Mechanism(**exact)

    def to_fields(self) -> dict[str, str | int]:
        """The fields under their names on disk, without absent ones."""
        return self.model_dump(exclude_none=True)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``to_fields`` back, strictly. Raises UsageError naming the field and the rule, never a value.

        Guarantee: events_survive_the_ledger - from_fields(to_fields(x)) == x.
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


def settled(event: Event, uploads: Sequence[tuple[int, int]]) -> Event:
    """``event`` at the least noise of its uploads, each (U_size, s_g^2); itself in ``local`` or without any.

    An attempt for another cohort has shares of another variance. Both z are then at most those of each.

    Guarantee: a_round_is_settled_at_its_least_noise - in both views, whatever the cohorts.
    """
    if event.mode != "shared-noise" or not uploads:
        return event
    m = event.mechanism
    u_size = max(size for size, _ in uploads)
    whole = min((size - m.t) * variance for size, variance in uploads)
    variance = min(whole // (u_size - m.t), *(variance for _, variance in uploads))
    return Event.from_fields(
        {
            **event.to_fields(),
            "U_size": u_size,
            "s_g_squared": variance,
            "z_t": clipping.z_threshold(variance, m.delta_g, u_size - m.t),
            "z_w": clipping.z_worst(variance, m.delta_g),
        }
    )


@dataclass(frozen=True, slots=True)
class Mechanism:
    """The mechanism of an event of kind ``sum``: present, typed, exact.

    z_t, z_w are noise multipliers (standard deviation over sensitivity) of one step; q, eta, beta ratios.
    """

    mode: str
    sampling: str
    q: Fraction
    steps: int
    dim: int
    clip_norm: Fraction
    grid_step: Fraction
    eta: Fraction
    delta_g: int
    s_g_squared: int
    members: int
    u_size: int
    t: int
    z_t: Fraction
    z_w: Fraction
    beta: Fraction

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
