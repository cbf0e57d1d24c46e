"""The coordinator's service on the hub's port: roster, submit, list, show, watch, abort, export.

Source: DESIGN "Three people, one program". Rules: only a coordinator certificate may call; a manifest is
checked whole (signature, roster, admissibility) before anything is stored; submitting the same manifest
twice changes nothing; an error goes back as its code, exit code, problem and remedy.
"""

import asyncio
import copy
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from common import link_pb2, link_pb2_grpc
from common.admissible import check
from common.certificates import peer_identity
from common.errors import RefusedError, VerificationError, WardroundError
from common.identity import key_text
from common.ledger.entries import utc_minute
from common.study import SignedManifest
from server.store import ENDED, StudyRow

if TYPE_CHECKING:
    from server.service import Hub

log = logging.getLogger("wardround.hub.studies")

WATCH_PERIOD_S: Final = 0.2
SIGN_OF_LIFE_S: Final = 4.0
STATE_CHUNK_BYTES: Final = 1 << 20


def describe(row: StudyRow) -> link_pb2.StudyInfo:
    """A study as it goes over the wire."""
    return link_pb2.StudyInfo(
        **{name: getattr(row, name) for name in link_pb2.StudyInfo.DESCRIPTOR.fields_by_name}
    )


def _authorise(context: Any) -> None:
    chain = context.auth_context().get("x509_pem_cert")
    if not chain:
        raise VerificationError("studies.certificate", "the caller showed no certificate")
    peer = peer_identity(chain[0])
    if peer.role != "coordinator":
        log.warning("refused: %s %d %r called the coordinator's service", peer.role, peer.number, peer.name)
        raise RefusedError("studies.role", f"a {peer.role} certificate may not manage studies")


@asynccontextmanager
async def _answering(context: Any) -> AsyncIterator[None]:
    """Serve a coordinator alone, and let an error go back as its code, exit code, problem and remedy."""
    try:
        _authorise(context)
        yield
    except WardroundError as error:
        sent = {"code": error.code, "exit": error.exit_code, "problem": error.problem, "remedy": error.remedy}
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, json.dumps(sent))


def _call(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(method)
    async def run(self: Any, request: Any, context: Any) -> Any:
        async with _answering(context):
            return await method(self, request, context)

    return run


class Studies(link_pb2_grpc.StudiesServicer):
    """The service; all state is in the hub."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub

    def register(self, server: grpc.aio.Server) -> None:
        """Add this service to the hub's server."""
        link_pb2_grpc.add_StudiesServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    @_call
    async def Roster(self, request: link_pb2.Empty, context: Any) -> link_pb2.Document:  # noqa: N802
        """The current signed roster."""
        signed = self._hub.signed_roster()
        return link_pb2.Document(data=signed.data, signature=signed.signature)

    @_call
    async def Submit(self, request: link_pb2.Document, context: Any) -> link_pb2.StudyInfo:  # noqa: N802
        """Check and store a signed manifest; the hub then asks its members."""
        signed = SignedManifest(request.data, request.signature)
        manifest = signed.verify()
        roster = self._hub.signed_roster()
        if manifest.roster != roster.digest.hex():
            problem = "the manifest names another roster than the hub's"
            raise RefusedError("study.roster", problem, remedy="Submit again.")
        if manifest.hub != key_text(self._hub.hub_public_key):
            remedy = "Submit to the hub it names."
            raise RefusedError("study.hub", "the manifest names another hub", remedy=remedy)
        submitted = utc_minute(datetime.now(UTC))
        check(manifest, submitted)
        known = {member.id: member.name for member in roster.verify(self._hub.hub_public_key).members}
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
            rounds=manifest.study.rounds,
            submitted=submitted,
        )
        if self._hub.store.add_study(row):
            log.info("study %s %r submitted", row.digest[:12], row.name)
            self._hub.wake()
        return describe(self._hub.store.study(row.digest))

    @_call
    async def List(self, request: link_pb2.Empty, context: Any) -> link_pb2.StudyList:  # noqa: N802
        """All studies in the order of submission."""
        return link_pb2.StudyList(studies=[describe(row) for row in self._hub.store.studies()])

    @_call
    async def Show(self, request: link_pb2.StudyReference, context: Any) -> link_pb2.StudyDetail:  # noqa: N802
        """A study's manifest, its members, and every round that was started."""
        row = self._hub.store.study(request.digest)
        event = self._event(request.digest)
        detail = link_pb2.StudyDetail(study=event.study, sites=event.sites)
        detail.manifest.data, detail.manifest.signature = row.manifest, row.signature
        for started in self._hub.store.started(request.digest):
            same = {name: getattr(started, name) for name in ("number", "attempt", "seconds", "lost")}
            detail.rounds.add(**same, step=started.step or 0, cohort=json.loads(started.cohort))
        return detail

    @_call
    async def Abort(self, request: link_pb2.AbortRequest, context: Any) -> link_pb2.StudyInfo:  # noqa: N802
        """End a study for good."""
        row = self._hub.store.study(request.digest)
        if not request.reason.strip():
            raise RefusedError("study.reason", "an abort needs a reason", remedy="Give --reason.")
        if row.status in ENDED:
            raise RefusedError("study.ended", f"the study has ended already: {row.status}")
        self._hub.abort(row.digest, request.reason)
        return describe(self._hub.store.study(row.digest))

    async def Watch(  # noqa: N802
        self, request: link_pb2.StudyReference, context: Any
    ) -> AsyncIterator[link_pb2.StudyEvent]:
        """An event now, at every change and as a sign of life, until the study has ended."""
        async with _answering(context):
            async for event in self._events(request.digest):
                yield event

    async def _events(self, digest: str) -> AsyncIterator[link_pb2.StudyEvent]:
        last: link_pb2.StudyEvent | None = None
        shown, told = 0, 0.0
        while True:
            # The status first: a round that is stored after it is then told in the next turn, never lost.
            event = self._event(digest)
            for row in self._hub.store.rounds(digest, after=shown):
                event.study.round = shown = row.step or shown
                event.cohort[:], event.seconds = json.loads(row.cohort), row.seconds
                last = copy.deepcopy(event)
                yield event
            if last is not None:
                event.cohort[:], event.seconds = last.cohort, last.seconds
            event.study.round = shown
            if event != last or time.monotonic() - told > SIGN_OF_LIFE_S:
                last, told = copy.deepcopy(event), time.monotonic()
                yield event
            if event.study.status in ENDED:
                return
            await asyncio.sleep(WATCH_PERIOD_S)

    def _event(self, digest: str) -> link_pb2.StudyEvent:
        row = self._hub.store.study(digest)
        decisions = json.loads(row.decisions)
        online = self._hub.link.online()
        manifest = SignedManifest(row.manifest, row.signature).verify()
        event = link_pb2.StudyEvent(study=describe(row))
        for party in manifest.members:
            said, here = decisions.get(str(party.id), ""), party.id in online
            event.sites.add(id=party.id, name=party.name, decision=said, online=here)
        return event

    async def Export(  # noqa: N802
        self, request: link_pb2.ExportRequest, context: Any
    ) -> AsyncIterator[link_pb2.Document]:
        """The safetensors file of a completed round, in chunks of 1 MiB.

        Guarantee: no_model_leaves_without_consent - of every hospital that the study names for it.
        """
        async with _answering(context):
            self._hub.store.study(request.digest)
            state = self._hub.store.state(request.digest, request.round)
            if missing := await asyncio.to_thread(self._hub.missing_consents, request.digest):
                problem = f"no model of this study leaves without the consent of {', '.join(missing)}"
                remedy = f"Ask them for 'wardround site consent {request.digest[:12]}', and to be online."
                raise RefusedError("study.consent", problem, remedy=remedy)
            for start in range(0, len(state), STATE_CHUNK_BYTES):
                yield link_pb2.Document(data=state[start : start + STATE_CHUNK_BYTES])
