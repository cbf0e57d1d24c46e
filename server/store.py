"""The hub's tables: admitted sites, studies, and one row a round, completed or lost.

Source: DESIGN "Libraries" (SQLAlchemy; SQLite by default). Rules: a round's number is in the table before
its start leaves, and is never used again; model, strategy state and round are one transaction; nothing here
is secret and nothing here depends on a single hospital's update.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import Select, create_engine, event, func, insert, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, defer, mapped_column, sessionmaker

from common.errors import RefusedError

PART_SIZE_BYTES: Final = 1 << 20
ENDED: Final = ("done", "failed", "aborted", "denied")


R = TypeVar("R")


class Base(DeclarativeBase):
    """All tables of the hub."""


class SiteRow(Base):
    """One admitted hospital."""

    __tablename__ = "sites"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    protocol_key: Mapped[bytes] = mapped_column(unique=True)
    ledger_key: Mapped[bytes] = mapped_column(unique=True)
    tls_fingerprint: Mapped[str] = mapped_column(unique=True)
    admitted: Mapped[str]
    revoked: Mapped[str] = mapped_column(default="")


class StudyRow(Base):
    """One submitted study version, by its manifest digest."""

    __tablename__ = "studies"
    digest: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    name: Mapped[str]
    manifest: Mapped[bytes]
    signature: Mapped[bytes]
    roster: Mapped[bytes]
    roster_signature: Mapped[bytes]
    status: Mapped[str]
    detail: Mapped[str] = mapped_column(default="")
    round: Mapped[int] = mapped_column(default=0)
    rounds: Mapped[int]
    submitted: Mapped[str]
    decisions: Mapped[str] = mapped_column(default="{}")
    directory: Mapped[bytes] = mapped_column(default=b"")
    pairs: Mapped[str] = mapped_column(default="")
    closed: Mapped[str] = mapped_column(default="[]")


class RoundRow(Base):
    """One round that was started: ``lost`` says why it gave nothing; ``step`` counts the completed ones.

    A row without a step and a reason is the round in flight, or the one in which the hub was killed.
    """

    __tablename__ = "rounds"
    study: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int | None] = mapped_column(default=None)
    lost: Mapped[str] = mapped_column(default="")
    attempt: Mapped[int] = mapped_column(default=0)
    cohort: Mapped[str] = mapped_column(default="[]")
    context: Mapped[bytes] = mapped_column(default=b"")
    sum_digest: Mapped[bytes] = mapped_column(default=b"")
    model_digest: Mapped[bytes] = mapped_column(default=b"")
    seconds: Mapped[float] = mapped_column(default=0.0)


class ModelRow(Base):
    """A part of the model after a completed round: one large value would be copied whole, and twice."""

    __tablename__ = "models"
    study: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class TranscriptRow(Base):
    """The signed records of a completed round (common.secagg.transcript)."""

    __tablename__ = "transcripts"
    study: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class StrategyRow(Base):
    """The server strategy's state after the last completed round of a study."""

    __tablename__ = "strategies"
    study: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[bytes]


class HeadRow(Base):
    """The last head of a party's ledger, 0 is the hub's own with its cosignatures (common.secagg.records)."""

    __tablename__ = "heads"
    party: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int]
    head: Mapped[bytes]
    cosigns: Mapped[str] = mapped_column(default="[]")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A completed round as the round loop hands it over.

    ``number`` is the protocol's, ``step`` the count of completed ones; ``state`` and ``strategy`` are
    safetensors files; ``transcript`` is common.secagg.transcript's.
    """

    number: int
    step: int
    attempt: int
    cohort: tuple[int, ...]
    context: bytes
    sum_digest: bytes
    model_digest: bytes
    state: bytes
    strategy: bytes
    transcript: bytes
    seconds: float


def duplicate(name: str) -> RefusedError:
    """The refusal of a second site with a name, a key or an id that is taken."""
    problem = f"a site with the id, the name or one of the keys of {name!r} is admitted already"
    remedy = "Make a fresh request with new keys and a name of its own."
    return RefusedError("enrolment.duplicate", problem, remedy=remedy)


class Store:
    """The hub's database. Every method is one transaction; rows come back detached.

    Guarantee: writers_see_what_they_change - what a method reads before it writes cannot change in between,
    also when another thread or process writes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        writer = engine.execution_options(begin="BEGIN IMMEDIATE")
        self._reading = sessionmaker(engine, expire_on_commit=False).begin
        self._writing = sessionmaker(writer, expire_on_commit=False).begin
        Base.metadata.create_all(engine)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open or create the SQLite file at ``path``, durable at every commit."""
        # A cached statement keeps a copy of what was bound to it last: of a whole model.
        engine = create_engine(f"sqlite:///{path}", connect_args={"cached_statements": 0})

        @event.listens_for(engine, "connect")
        def configure(connection: sqlite3.Connection, _record: object) -> None:
            # The driver would begin a transaction at the first write only, after what was read before it.
            connection.isolation_level = None
            # Models are large: with small pages a checkpoint of one takes twice as long.
            for rule in ("page_size=65536", "journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
                connection.execute(f"PRAGMA {rule}").close()

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

        return cls(engine)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _all(self, query: Select[R]) -> Sequence[R]:
        with self._reading() as session:
            return session.scalars(query).all()

    def next_site_id(self) -> int:
        """The id the next admitted site will have, from 1."""
        with self._reading() as session:
            return (session.scalar(select(func.max(SiteRow.id))) or 0) + 1

    def add_site(self, row: SiteRow) -> None:
        """Store an admitted site. Raises RefusedError when its id, name or a key is taken."""
        name = row.name
        try:
            with self._writing() as session:
                session.add(row)
        except IntegrityError as error:
            raise duplicate(name) from error

    def sites(self, revoked: bool = False) -> Sequence[SiteRow]:
        """All admitted sites by id, or those whose admission was revoked."""
        chosen = SiteRow.revoked != "" if revoked else SiteRow.revoked == ""
        return self._all(select(SiteRow).where(chosen).order_by(SiteRow.id))

    def revoke_site(self, name: str, when: str, reason: str) -> SiteRow:
        """End a site's admission for good. Raises RefusedError when no site of that name is admitted."""
        with self._writing() as session:
            row = session.scalars(select(SiteRow).where(SiteRow.name == name)).one_or_none()
            if row is None or row.revoked:
                problem = f"no site named {name!r} is admitted"
                raise RefusedError("enrolment.unknown", problem, remedy="Give the name of its admission.")
            row.revoked = f"{when} {reason}"
            return row

    def site(self, site_id: int) -> SiteRow | None:
        """One site, or None."""
        with self._reading() as session:
            return session.get(SiteRow, site_id)

    def add_study(self, row: StudyRow) -> bool:
        """Store a study; false when this digest is there already (submitting twice changes nothing)."""
        with self._writing() as session:
            if session.get(StudyRow, row.digest) is not None:
                return False
            row.number = (session.scalar(select(func.max(StudyRow.number))) or 0) + 1
            session.add(row)
            return True

    def study(self, digest: str) -> StudyRow:
        """One study. Raises RefusedError when the digest is unknown."""
        with self._reading() as session:
            row = session.get(StudyRow, digest)
        if row is None:
            remedy = "See 'wardround study list'."
            raise RefusedError("study.unknown", f"there is no study {digest}", remedy=remedy)
        return row

    def studies(self) -> Sequence[StudyRow]:
        """All studies in the order of submission, without their documents."""
        documents = map(defer, (StudyRow.manifest, StudyRow.roster, StudyRow.directory, StudyRow.pairs))
        return self._all(select(StudyRow).order_by(StudyRow.number).options(*documents))

    def set_status(self, digest: str, status: str, detail: str = "") -> None:
        """Change a study's status unless it has ended: an ended study stays as it is."""
        with self._writing() as session:
            row = session.get_one(StudyRow, digest)
            if row.status not in ENDED:
                row.status, row.detail = status, detail

    def set_decisions(self, digest: str, decisions: dict[int, str]) -> None:
        """Remember what each site has declared."""
        with self._writing() as session:
            session.get_one(StudyRow, digest).decisions = json.dumps(dict(sorted(decisions.items())))

    def keep_setup(self, digest: str, directory: bytes, pairs: Sequence[tuple[int, int]] | None) -> None:
        """Remember the Directory before it leaves, and the confirmed pairs once they are known."""
        with self._writing() as session:
            row = session.get_one(StudyRow, digest)
            row.directory, row.pairs = directory, "" if pairs is None else json.dumps(sorted(pairs))

    def start_round(self, digest: str) -> int:
        """Take the next round number, before its start leaves.

        Guarantee: a_round_number_is_used_once - also when the hub is killed right after.
        """
        with self._writing() as session:
            last = session.scalar(select(func.max(RoundRow.number)).where(RoundRow.study == digest)) or 0
            session.add(RoundRow(study=digest, number=last + 1))
            return last + 1

    def lose_round(self, digest: str, number: int, reason: str) -> None:
        """Remember why a round that was started gave nothing."""
        with self._writing() as session:
            session.get_one(RoundRow, (digest, number)).lost = reason

    def complete_round(self, digest: str, checkpoint: Checkpoint) -> None:
        """Store model, strategy state, transcript and round, in one transaction."""
        model = memoryview(checkpoint.state)
        parts = [
            {"study": digest, "step": checkpoint.step, "part": part, "data": model[at : at + PART_SIZE_BYTES]}
            for part, at in enumerate(range(0, len(model), PART_SIZE_BYTES))
        ]
        fields = ("step", "attempt", "context", "sum_digest", "model_digest", "seconds")
        with self._writing() as session:
            row = session.get_one(RoundRow, (digest, checkpoint.number))
            for name in fields:
                setattr(row, name, getattr(checkpoint, name))
            row.cohort = json.dumps(checkpoint.cohort)
            session.execute(insert(ModelRow), parts)
            session.get_one(StudyRow, digest).round = checkpoint.step
            session.merge(StrategyRow(study=digest, state=checkpoint.strategy))
            session.add(TranscriptRow(study=digest, number=checkpoint.number, data=checkpoint.transcript))

    def started(self, digest: str) -> Sequence[RoundRow]:
        """Every round that was started, by number, without models."""
        return self._all(select(RoundRow).where(RoundRow.study == digest).order_by(RoundRow.number))

    def rounds(self, digest: str, after: int = 0) -> Sequence[RoundRow]:
        """The completed rounds past step ``after``, in order, without their models."""
        completed = select(RoundRow).where(RoundRow.study == digest, RoundRow.step > after)
        return self._all(completed.order_by(RoundRow.step))

    def state(self, digest: str, step: int = 0) -> bytes:
        """The model after ``step`` completed rounds, 0: the last. Raises RefusedError when there is none."""
        last = select(func.max(ModelRow.step)).where(ModelRow.study == digest).scalar_subquery()
        query = select(ModelRow.data).where(ModelRow.study == digest, ModelRow.step == (step or last))
        if not (parts := self._all(query.order_by(ModelRow.part))):
            problem = "the study has no such completed round"
            raise RefusedError("study.no-model", problem, remedy="Watch the study.")
        return b"".join(parts)

    def strategy(self, digest: str) -> bytes:
        """The strategy's state after the last completed round; empty before the first."""
        with self._reading() as session:
            row = session.get(StrategyRow, digest)
        return b"" if row is None else row.state

    def transcripts(self, digest: str) -> dict[int, bytes]:
        """The transcripts of the completed rounds of a study by the protocol's round, in order."""
        query = select(TranscriptRow).where(TranscriptRow.study == digest).order_by(TranscriptRow.number)
        return {row.number: row.data for row in self._all(query)}

    def keep_heads(self, rows: Iterable[HeadRow]) -> None:
        """Remember heads of ledgers; a longer one stays, for studies run side by side."""
        with self._writing() as session:
            for row in rows:
                known = session.get(HeadRow, row.party)
                if known is None or known.size <= row.size:
                    session.merge(row)

    def heads(self) -> Sequence[HeadRow]:
        """The last head of every ledger that was seen, by party."""
        return self._all(select(HeadRow).order_by(HeadRow.party))

    def closed_at(self, digest: str, site_id: int) -> None:
        """Remember that a site has erased its secrets of an ended study."""
        with self._writing() as session:
            row = session.get_one(StudyRow, digest)
            row.closed = json.dumps(sorted({*json.loads(row.closed), site_id}))
