"""The coordinator's service on the hub's port: roster, submit, list, show, watch, abort, export.

Source: DESIGN "Three people, one program". Rules: only a coordinator certificate may call; a manifest is
checked whole (signature, roster, admissibility) before anything is stored; submitting the same manifest
twice changes nothing; an error goes back as its code, exit code, problem and remedy.
"""

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any, Final, Protocol

import grpc
import grpc.aio

from common import link_pb2, link_pb2_grpc
from common.admissible import check
from common.certificates import peer_identity
from common.errors import RefusedError, VerificationError, WardroundError
from common.identity import key_text
from common.roster import SignedRoster
from common.study import SignedManifest
from server.store import ENDED, Store, StudyRow

log = logging.getLogger("wardround.hub.studies")

WATCH_PERIOD_S: Final = 0.2
SIGN_OF_LIFE_S: Final = 4.0
STATE_CHUNK_BYTES: Final = 1 << 20


class Desk(Protocol):
    """What the service needs of the running hub."""

    store: Store
    hub_public_key: bytes

    def signed_roster(self) -> SignedRoster:
        """The current roster, signed by the hub."""
        ...

    def online(self) -> dict[int, float]:
        """Attached sites and the seconds since each was heard of."""
        ...

    def wake(self) -> None:
        """A study was submitted."""
        ...

    def abort(self, digest: str, reason: str) -> None:
        """End a study."""
        ...

    def missing_consents(self, digest: str) -> list[str]:
        """The hospitals without whose word a study's model does not leave, and that have not given it."""
        ...

    def now(self) -> datetime:
        """The hub's clock, UTC."""
        ...


def minute(now: datetime) -> str:
    """A time as the product writes it: UTC to the minute."""
    return now.strftime("%Y-%m-%dT%H:%MZ")


def describe(row: StudyRow) -> link_pb2.StudyInfo:
    """A study as it goes over the wire."""
    return link_pb2.StudyInfo(
        digest=row.digest,
        name=row.name,
        status=row.status,
        round=row.round,
        rounds=row.rounds,
        detail=row.detail,
        submitted=row.submitted,
    )


def _authorise(context: Any) -> None:
    chain = context.auth_context().get("x509_pem_cert")
    if not chain:
        raise VerificationError("studies.certificate", "the caller showed no certificate")
    peer = peer_identity(chain[0])
    if peer.role != "coordinator":
        log.warning("refused: %s %d %r called the coordinator's service", peer.role, peer.number, peer.name)
        raise RefusedError("studies.role", f"a {peer.role} certificate may not manage studies")


async def _fail(context: Any, error: WardroundError) -> None:
    detail = {"code": error.code, "exit": error.exit_code, "problem": error.problem, "remedy": error.remedy}
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, json.dumps(detail))


def _call(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(method)
    async def run(self: Any, request: Any, context: Any) -> Any:
        try:
            _authorise(context)
            return await method(self, request, context)
        except WardroundError as error:
            await _fail(context, error)

    return run


class Studies(link_pb2_grpc.StudiesServicer):
    """The service; all state is in the hub that ``desk`` stands for."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def register(self, server: grpc.aio.Server) -> None:
        """Add this service to the hub's server."""
        link_pb2_grpc.add_StudiesServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    @_call
    async def Roster(self, request: link_pb2.Empty, context: Any) -> link_pb2.Document:  # noqa: N802
        """The current signed roster."""
        signed = self._desk.signed_roster()
        return link_pb2.Document(data=signed.data, signature=signed.signature)

    @_call
    async def Submit(self, request: link_pb2.Document, context: Any) -> link_pb2.StudyInfo:  # noqa: N802
        """Check and store a signed manifest; the hub then asks its members."""
        signed = SignedManifest(request.data, request.signature)
        manifest = signed.verify()
        roster = self._desk.signed_roster()
        if manifest.roster != roster.digest.hex():
            raise RefusedError(
                "study.roster", "the manifest names another roster than the hub's", remedy="Submit again."
            )
        if manifest.hub != key_text(self._desk.hub_public_key):
            raise RefusedError(
                "study.hub", "the manifest names another hub", remedy="Submit to the hub it names."
            )
        check(manifest, minute(self._desk.now()))
        known = {member.id: member.name for member in roster.verify(self._desk.hub_public_key).members}
        for party in manifest.members:
            if known.get(party.id) != party.name:
                raise RefusedError("study.member", f"{party.name!r} is not on the roster under id {party.id}")
        row = StudyRow(
            digest=manifest.digest.hex(),
            name=manifest.study.name,
            manifest=request.data,
            signature=request.signature,
            roster=roster.data,
            roster_signature=roster.signature,
            status="queued",
            rounds=manifest.study.training.rounds,
            submitted=minute(self._desk.now()),
        )
        if self._desk.store.add_study(row):
            log.info("study %s %r submitted", row.digest[:12], row.name)
            self._desk.wake()
        return describe(self._desk.store.study(row.digest))

    @_call
    async def List(self, request: link_pb2.Empty, context: Any) -> link_pb2.StudyList:  # noqa: N802
        """All studies in the order of submission."""
        return link_pb2.StudyList(studies=[describe(row) for row in self._desk.store.studies()])

    @_call
    async def Show(self, request: link_pb2.StudyReference, context: Any) -> link_pb2.StudyDetail:  # noqa: N802
        """A study's manifest, its members, and every round that was started."""
        row = self._desk.store.study(request.digest)
        event = self._event(request.digest)
        detail = link_pb2.StudyDetail(study=event.study, sites=event.sites)
        detail.manifest.data, detail.manifest.signature = row.manifest, row.signature
        for started in self._desk.store.started(request.digest):
            detail.rounds.add(
                step=started.step or 0,
                number=started.number,
                attempt=started.attempt,
                cohort=json.loads(started.cohort),
                seconds=started.seconds,
                lost=started.lost,
            )
        return detail

    @_call
    async def Abort(self, request: link_pb2.AbortRequest, context: Any) -> link_pb2.StudyInfo:  # noqa: N802
        """End a study for good."""
        row = self._desk.store.study(request.digest)
        if not request.reason.strip():
            raise RefusedError("study.reason", "an abort needs a reason", remedy="Give --reason.")
        if row.status in ENDED:
            raise RefusedError("study.ended", f"the study has ended already: {row.status}")
        self._desk.abort(row.digest, request.reason)
        return describe(self._desk.store.study(row.digest))

    async def Watch(  # noqa: N802
        self, request: link_pb2.StudyReference, context: Any
    ) -> AsyncIterator[link_pb2.StudyEvent]:
        """An event now, at every change and as a sign of life, until the study has ended."""
        try:
            _authorise(context)
            self._desk.store.study(request.digest)
            async for event in self._events(request.digest):
                yield event
        except WardroundError as error:
            await _fail(context, error)

    async def _events(self, digest: str) -> AsyncIterator[link_pb2.StudyEvent]:
        store = self._desk.store
        last: link_pb2.StudyEvent | None = None
        shown, told = 0, 0.0
        while True:
            # The status first: a round that is stored after it is then told in the next turn, never lost.
            event = self._event(digest)
            for row in store.rounds(digest, after=shown):
                shown = row.step or shown
                event.study.round = shown
                del event.cohort[:]
                event.cohort.extend(json.loads(row.cohort))
                event.seconds = row.seconds
                last = link_pb2.StudyEvent()
                last.CopyFrom(event)
                yield event
            if last is not None:
                event.cohort[:] = last.cohort
                event.seconds = last.seconds
            event.study.round = shown
            if event != last or time.monotonic() - told > SIGN_OF_LIFE_S:
                last, told = link_pb2.StudyEvent(), time.monotonic()
                last.CopyFrom(event)
                yield event
            if event.study.status in ENDED:
                return
            await asyncio.sleep(WATCH_PERIOD_S)

    def _event(self, digest: str) -> link_pb2.StudyEvent:
        row = self._desk.store.study(digest)
        decisions = json.loads(row.decisions)
        online = self._desk.online()
        manifest = SignedManifest(row.manifest, row.signature).verify()
        event = link_pb2.StudyEvent(study=describe(row))
        for party in manifest.members:
            event.sites.add(
                id=party.id,
                name=party.name,
                decision=decisions.get(str(party.id), ""),
                online=party.id in online,
            )
        return event

    async def Export(  # noqa: N802
        self, request: link_pb2.ExportRequest, context: Any
    ) -> AsyncIterator[link_pb2.Document]:
        """The safetensors file of a completed round, in chunks of 1 MiB.

        Guarantee: no_model_leaves_without_consent - of every hospital that the study names for it.
        """
        try:
            _authorise(context)
            self._desk.store.study(request.digest)
            state = self._desk.store.state(request.digest, request.round)
            if missing := await asyncio.to_thread(self._desk.missing_consents, request.digest):
                raise RefusedError(
                    "study.consent",
                    f"no model of this study leaves without the consent of {', '.join(missing)}",
                    remedy=f"Ask them for 'wardround site consent {request.digest[:12]}', and to be online.",
                )
        except WardroundError as error:
            await _fail(context, error)
            return
        for start in range(0, len(state), STATE_CHUNK_BYTES):
            yield link_pb2.Document(data=state[start : start + STATE_CHUNK_BYTES])
