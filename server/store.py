"""The hub's tables: admitted sites, studies, and one row a completed round with its model.

Source: DESIGN "Libraries" (SQLAlchemy; SQLite by default). Rules: a round's checkpoint and its row are
one transaction; nothing here is secret and nothing here depends on a single hospital's update.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import LargeBinary, create_engine, event, func, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, defer, mapped_column

from common.errors import RefusedError

STATUSES: Final = (
    "waiting for approval",
    "queued",
    "setting up",
    "running",
    "done",
    "failed",
    "aborted",
    "denied",
)
ENDED: Final = ("done", "failed", "aborted", "denied")


class Base(DeclarativeBase):
    """All tables of the hub."""


class SiteRow(Base):
    """One admitted hospital."""

    __tablename__ = "sites"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    protocol_key: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    ledger_key: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    tls_fingerprint: Mapped[str] = mapped_column(unique=True)
    admitted: Mapped[str]


class StudyRow(Base):
    """One submitted study version, by its manifest digest."""

    __tablename__ = "studies"
    digest: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    name: Mapped[str]
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    roster: Mapped[bytes] = mapped_column(LargeBinary)
    roster_signature: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[str]
    detail: Mapped[str] = mapped_column(default="")
    round: Mapped[int] = mapped_column(default=0)
    rounds: Mapped[int]
    submitted: Mapped[str]
    decisions: Mapped[str] = mapped_column(default="{}")


class RoundRow(Base):
    """One completed round: who took part, digests, and the model it gave."""

    __tablename__ = "rounds"
    study: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    cohort: Mapped[str]
    context: Mapped[bytes] = mapped_column(LargeBinary)
    sum_digest: Mapped[bytes] = mapped_column(LargeBinary)
    model_digest: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[bytes] = mapped_column(LargeBinary)
    seconds: Mapped[float]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A completed round as the round loop hands it over. ``state`` is a safetensors file."""

    round: int
    attempt: int
    cohort: tuple[int, ...]
    context: bytes
    sum_digest: bytes
    model_digest: bytes
    state: bytes
    seconds: float


def duplicate(name: str) -> RefusedError:
    """The refusal of a second site with a name, a key or an id that is taken."""
    return RefusedError(
        "enrolment.duplicate",
        f"a site with the id, the name or one of the keys of {name!r} is admitted already",
        remedy="Make a fresh request with new keys and a name of its own.",
    )


class Store:
    """The hub's database. Every method is one transaction; rows come back detached.

    Guarantee: writers_see_what_they_change - what a method reads before it writes cannot change in between,
    also when another thread or process writes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(begin="BEGIN IMMEDIATE")
        Base.metadata.create_all(engine)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open or create the SQLite file at ``path``, durable at every commit."""
        engine = create_engine(f"sqlite:///{path}")

        @event.listens_for(engine, "connect")
        def configure(connection: sqlite3.Connection, _record: object) -> None:
            # The driver would begin a transaction at the first write only, after what was read before it.
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA busy_timeout=10000")
            cursor.close()

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

        return cls(engine)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

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

    def sites(self) -> Sequence[SiteRow]:
        """All admitted sites, by id."""
        with self._reading() as session:
            return session.scalars(select(SiteRow).order_by(SiteRow.id)).all()

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
            raise RefusedError(
                "study.unknown", f"there is no study {digest}", remedy="See 'wardround study list'."
            )
        return row

    def studies(self) -> Sequence[StudyRow]:
        """All studies in the order of submission."""
        with self._reading() as session:
            return session.scalars(select(StudyRow).order_by(StudyRow.number)).all()

    def set_status(self, digest: str, status: str, detail: str = "") -> None:
        """Change a study's status unless it has ended: an ended study stays as it is."""
        with self._writing() as session:
            row = session.get_one(StudyRow, digest)
            if row.status not in ENDED:
                row.status, row.detail = status, detail

    def set_decisions(self, digest: str, decisions: dict[int, str]) -> None:
        """Remember what each site has declared."""
        with self._writing() as session:
            session.get_one(StudyRow, digest).decisions = json.dumps(
                {str(k): v for k, v in sorted(decisions.items())}
            )

    def add_round(self, digest: str, checkpoint: Checkpoint) -> None:
        """Store a completed round and move the study's counter, in one transaction."""
        with self._writing() as session:
            session.add(
                RoundRow(
                    study=digest,
                    round=checkpoint.round,
                    attempt=checkpoint.attempt,
                    cohort=json.dumps(checkpoint.cohort),
                    context=checkpoint.context,
                    sum_digest=checkpoint.sum_digest,
                    model_digest=checkpoint.model_digest,
                    state=checkpoint.state,
                    seconds=checkpoint.seconds,
                )
            )
            session.get_one(StudyRow, digest).round = checkpoint.round

    def rounds(self, digest: str, after: int = 0) -> Sequence[RoundRow]:
        """The completed rounds of a study past round ``after``, in order, without their models."""
        with self._reading() as session:
            return session.scalars(
                select(RoundRow)
                .where(RoundRow.study == digest, RoundRow.round > after)
                .order_by(RoundRow.round)
                .options(defer(RoundRow.state))
            ).all()

    def state(self, digest: str, round_number: int = 0) -> bytes:
        """The model after a completed round, 0 for the last. Raises RefusedError when there is none."""
        query = select(RoundRow).where(RoundRow.study == digest).order_by(RoundRow.round.desc()).limit(1)
        if round_number:
            query = query.where(RoundRow.round == round_number)
        with self._reading() as session:
            row = session.scalars(query).one_or_none()
        if row is None:
            raise RefusedError(
                "study.no-model", "the study has no such completed round", remedy="Watch the study."
            )
        return row.state
