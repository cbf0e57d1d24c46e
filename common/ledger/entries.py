"""What a ledger leaf may say: closed schemas of data-independent fields.

Source: PRIVACY "Registers", "What else may cross the wire", "Event fields"; RFC 8785 (leaf bytes).
Rules: every field is on a list here; a leaf holds no count of rows, duration, batch size or exception
text; times are whole minutes of UTC; every leaf names who wrote it and with which version; only a person's
decision carries free text; a hospital's ledger and the hub's have no kind of leaf in common.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from common.encoding import canonical_json
from common.errors import UsageError, VerificationError
from common.identity import MAX_ID, key_bytes, name_problem
from common.version import SOFTWARE_VERSION

UNPLACED: Final = -1
"""The sequence number of an entry that the ledger has not taken yet."""

EVENT_FIELDS: Final = frozenset(
    {
        "schema",
        "event_id",
        "register_id",
        "manifest_digest",
        "task",
        "round",
        "attempt",
        "kind",
        "mode",
        "unit",
        "adjacency",
        "sampling",
        "q",
        "steps",
        "dim",
        "C",
        "step",
        "eta",
        "arith",
        "noise",
        "Delta_g",
        "s_g_squared",
        "members",
        "U_size",
        "t",
        "z_t",
        "z_w",
        "beta",
        "state",
        "reason",
    }
)
"""PRIVACY's event fields: the ledger checks names and types, common.privacy.events what they mean."""

_EVENT_TEXT: Final = re.compile(r"[A-Za-z0-9._-]{0,80}")
_MAX_EXACT: Final = 2**53 - 1

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Minute = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}Z$")]
DecimalText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,19})(\.[0-9]{0,39}[1-9])?$")]

OutcomeReason = Literal[
    "upload_started",
    "completed",
    "round_lost",
    "left_out_of_cohort",
    "upload_not_made",
    "study_aborted",
    "site_stopped",
    "site_restored",
]


def _frozen(fields: Mapping[str, str | int]) -> Mapping[str, str | int]:
    return MappingProxyType(dict(fields))


def _frozen_texts(texts: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(texts))


def _one_visible_line(reason: str) -> str:
    try:
        return check_reason(reason)
    except UsageError as error:
        raise ValueError(error.problem) from error


def _key_text(value: str) -> str:
    try:
        key_bytes(value)
    except VerificationError as error:
        raise ValueError(error.problem) from error
    return value


def _party_name(value: str) -> str:
    if problem := name_problem(value, "name"):
        raise ValueError(problem)
    return value


def _ascending(ids: tuple[int, ...]) -> tuple[int, ...]:
    if list(ids) != sorted(set(ids)):
        raise ValueError("ids must ascend")
    return ids


Words = Annotated[str, AfterValidator(_one_visible_line)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
KeyText = Annotated[str, AfterValidator(_key_text)]
PartyName = Annotated[str, AfterValidator(_party_name)]
SiteId = Annotated[int, Field(ge=1, le=MAX_ID)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class _Leaf(_Strict):
    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    seq: Annotated[int, Field(ge=UNPLACED, le=_MAX_EXACT)] = UNPLACED
    time: Minute | Literal[""] = ""
    actor: KeyText
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+_-]{1,64}$")] = SOFTWARE_VERSION

    @field_validator("time")
    @classmethod
    def _time_exists(cls, value: str) -> str:
        if value:
            datetime.strptime(value, "%Y-%m-%dT%H:%MZ").replace(tzinfo=UTC)
        return value


class Opened(_Leaf):
    """A register was made, with the caps of the site's policy; epsilon_w is absent where only one exists.

    Epsilons and delta are canonical decimal text (common.privacy.decimals.text_of).
    """

    type: Literal["opened"] = "opened"
    register_id: Hex32
    epsilon_t: DecimalText
    epsilon_w: DecimalText | None
    delta: DecimalText


class Source(_Strict):
    """An extract that studies may name: its name, the patient column, and the columns they may see."""

    name: Text
    patient: Text
    columns: Annotated[tuple[Text, ...], Field(strict=False)]


class Rules(_Strict):
    """What a site's policy allows: its caps, as in ``Opened``, whose studies, on what, when and how."""

    epsilon_t: DecimalText
    epsilon_w: DecimalText | None
    delta: DecimalText
    epsilon_per_study: DecimalText | None = None
    minimum_hospitals: Annotated[int, Field(ge=3, le=MAX_ID)]
    minimum_patients: Annotated[int, Field(ge=1, le=_MAX_EXACT)] = 1
    max_round_minutes: Annotated[int, Field(ge=1, le=_MAX_EXACT)]
    training_window: Annotated[str, Field(pattern=r"^([0-9:]{5}-[0-9:]{5})?$")] = ""
    outsiders_only: bool = False
    without_differential_privacy: bool
    without_masks: bool
    coordinators: Annotated[tuple[KeyText, ...], Field(strict=False)]
    officers: Annotated[tuple[KeyText, ...], Field(strict=False)] = ()
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()


class PolicyChange(_Leaf):
    """The policy was found to say something else than before; ``before`` is absent in the first one."""

    type: Literal["policy"] = "policy"
    before: Rules | None
    after: Rules


class Approval(_Leaf):
    """A person's decision on one manifest digest, in their own words."""

    type: Literal["approval"] = "approval"
    manifest: Hex64
    decision: Literal["approved", "denied"]
    reason: Words


class Pause(_Leaf):
    """A person's decision that the whole site takes part in nothing, or takes part again."""

    type: Literal["pause"] = "pause"
    decision: Literal["paused", "resumed"]
    reason: Words


class Charge(_Leaf):
    """A privacy event, appended before the computation that it pays for.

    ``event`` is common.privacy.events.Event.to_fields(); as read from a ledger it has the same fields.
    """

    type: Literal["charge"] = "charge"
    event: Annotated[Mapping[str, str | int], AfterValidator(_frozen), PlainSerializer(dict)]

    @field_validator("event")
    @classmethod
    def _only_event_fields(cls, value: Mapping[str, str | int]) -> Mapping[str, str | int]:
        if not set(value) <= EVENT_FIELDS:
            raise ValueError("holds a field that is not an event field")
        for name in ("event_id", "register_id"):
            if not re.fullmatch(r"[0-9a-f]{32}", str(value.get(name, ""))):
                raise ValueError(f"{name} must be 32 hex digits")
        for name, field in value.items():
            if isinstance(field, bool):
                raise ValueError(f"{name} must be an integer or text")
            if isinstance(field, int) and not 0 <= field <= _MAX_EXACT:
                raise ValueError(f"{name} is outside 0 to 2^53 - 1")
            if isinstance(field, str) and not _EVENT_TEXT.fullmatch(field):
                raise ValueError(f"{name} holds a character that no event field has")
        return value

    @property
    def event_id(self) -> str:
        """The event's id, 32 hex digits."""
        return str(self.event["event_id"])

    @property
    def register_id(self) -> str:
        """The charged register, 32 hex digits."""
        return str(self.event["register_id"])


class Outcome(_Leaf):
    """How a charged event ended: ``charged`` (spent) or ``released`` (spent, and the result left).

    Neither gives anything back. ``ctx`` is the context of the upload concerned, absent when none was made.
    With shared noise ``upload_started`` states for how many hospitals, and with which variance: a round is
    settled at the least noise of all its uploads (common.privacy.events.settled).
    """

    type: Literal["outcome"] = "outcome"
    event_id: Hex32
    state: Literal["charged", "released"]
    attempt: Annotated[int, Field(ge=1, le=3)]
    ctx: Hex64 | None
    u_size: Annotated[int | None, Field(alias="U_size", ge=3, le=MAX_ID)] = None
    s_g_squared: Annotated[int | None, Field(ge=256, le=2**52)] = None
    reason: OutcomeReason


class Closed(_Leaf):
    """A study is over at this hospital: what it had not charged is not reserved any more."""

    type: Literal["closed"] = "closed"
    manifest: Hex64


class Consent(_Leaf):
    """A person's word that a study's model may leave the hub's circle, or that it may not after all."""

    type: Literal["consent"] = "consent"
    manifest: Hex64
    decision: Literal["given", "withdrawn"]
    reason: Words


class OptOuts(_Leaf):
    """A source's list of patients to leave out was found changed; ``digest`` is under the site's secret."""

    type: Literal["opt_outs"] = "opt_outs"
    source: Text
    digest: Hex64


class Override(_Leaf):
    """What two officers of the hospital have signed against the rules of the register.

    ``raise_caps`` begins a new claim over the whole history at the caps stated; ``reopen`` lets a register
    be charged that was closed by a restore. ``size`` is the ledger's when they signed; ``signatures`` are
    Ed25519 over common.ledger.overrides' bytes, hex, by officer key.
    """

    type: Literal["override"] = "override"
    action: Literal["raise_caps", "reopen"]
    register_id: Hex32
    epsilon_t: DecimalText
    epsilon_w: DecimalText
    size: Annotated[int, Field(ge=1, le=_MAX_EXACT)]
    reason: Words
    signatures: Annotated[Mapping[KeyText, Hex128], AfterValidator(_frozen_texts), PlainSerializer(dict)]


class Restored(_Leaf):
    """The site came back from a backup: what that lacks may have been spent, so nothing is charged now."""

    type: Literal["restored"] = "restored"
    reason: Words


class Membership(_Leaf):
    """Hub: a hospital was admitted or revoked; ``fingerprint`` is common.identity.party_fingerprint."""

    type: Literal["membership"] = "membership"
    id: SiteId
    name: PartyName
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{4}(-[0-9a-f]{4}){7}$")]
    decision: Literal["admitted", "revoked"]


class Submission(_Leaf):
    """Hub: a coordinator (``ed25519:`` key) submitted a manifest."""

    type: Literal["submission"] = "submission"
    manifest: Hex64
    coordinator: KeyText


class Completed(_Leaf):
    """Hub: the ``step``-th completed round of a study, and over whom its one sum was opened."""

    type: Literal["completed"] = "completed"
    manifest: Hex64
    round: Annotated[int, Field(ge=1, le=_MAX_EXACT)]
    step: Annotated[int, Field(ge=1, le=_MAX_EXACT)]
    attempt: Annotated[int, Field(ge=1, le=3)]
    cohort: Annotated[tuple[SiteId, ...], Field(min_length=3, strict=False), AfterValidator(_ascending)]
    ctx: Hex64
    sum_digest: Hex64
    model_digest: Hex64


class Ended(_Leaf):
    """Hub: a study is over."""

    type: Literal["ended"] = "ended"
    manifest: Hex64
    status: Literal["done", "failed", "aborted", "denied"]


SiteEntry = (
    Opened
    | PolicyChange
    | Approval
    | Pause
    | Charge
    | Outcome
    | Closed
    | Consent
    | OptOuts
    | Override
    | Restored
)
HubEntry = Membership | Submission | Completed | Ended
Entry = SiteEntry | HubEntry

_ENTRIES: Final[TypeAdapter[Entry]] = TypeAdapter(Annotated[Entry, Field(discriminator="type")])


def utc_minute(now: datetime) -> str:
    """``now`` (aware) as a ledger time, cut to the minute. Raises UsageError without a time zone."""
    if now.utcoffset() is None:
        raise UsageError("ledger.time", "a ledger time needs a time zone")
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%MZ")


def check_reason(reason: str) -> str:
    """``reason`` itself when a person's words may stand in the ledger: one line of 1-500 characters.

    Control and direction marks are refused: a report could show other words than were signed.

    Raises: UsageError.
    """
    if not 1 <= len(reason) <= 500 or not reason.isprintable() or reason != reason.strip():
        raise UsageError(
            "ledger.reason",
            "the reason must be one line of 1 to 500 visible characters",
            remedy="Write it shorter or without line breaks, and without anything about a patient.",
        )
    return reason


def placed(entry: Entry, seq: int, time: str) -> Entry:
    """``entry`` as number ``seq`` at ``time``, unless it states its own (History.check compares them)."""
    return entry.model_copy(
        update={"seq": seq if entry.seq == UNPLACED else entry.seq, "time": entry.time or time}
    )


def encode(entry: Entry) -> bytes:
    """The leaf: RFC 8785 bytes. Raises UsageError for an entry without number or time."""
    if entry.seq == UNPLACED or not entry.time:
        raise UsageError(
            "ledger.unplaced", "an entry becomes a leaf when the ledger gives it number and time"
        )
    return canonical_json(entry.model_dump())


def decode(leaf: bytes) -> Entry:
    """Read a leaf.

    Guarantee: leaves_are_read_exactly - decode(encode(x)) == x and every other byte string is refused:
    unknown, missing or extra fields, other types, other JSON forms.

    Raises: VerificationError naming the field and the rule, never a value.
    """
    try:
        entry = _ENTRIES.validate_python(json.loads(leaf))
        # Only the canonical form of just these fields comes out the same.
        same = encode(entry) == leaf
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "entry"
        raise VerificationError("ledger.entry", f"{where}: {first['msg']}") from error
    except UsageError as error:
        raise VerificationError("ledger.entry", error.problem) from error
    except (ValueError, RecursionError) as error:
        raise VerificationError("ledger.entry", "the ledger entry is not JSON") from error
    if not same:
        problem = "the ledger entry is not in canonical form, or a field is missing or has another type"
        raise VerificationError("ledger.entry", problem)
    return entry


def events(entries: Sequence[Entry], register_id: str) -> list[Mapping[str, str | int]]:
    """The events charged to a register, in order, as their fields."""
    return [
        entry.event for entry in entries if isinstance(entry, Charge) and entry.register_id == register_id
    ]
