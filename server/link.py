"""The hub's side of the link: one grpc.aio server in a thread, one stream a site.

Source: DESIGN "Built on Flower, carried by gRPC". Rules: a peer is admitted by its certificate and the
hub's own table, before its first frame is read; a second stream of one identity is refused, unless the first
has fallen silent; replies are matched by message id, once; a payload is fetched chunk by chunk, one ahead of
the one that is being added, and is never held whole; requests without an answer are sent again when the site
comes back, under the same id, and of a payload only what is missing; who is silent is offline.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # pyright: ignore[reportMissingImports] - no stubs

from common import flower, link_pb2, link_pb2_grpc
from common.certificates import Peer, peer_identity
from common.errors import FailureError, UnreachableError, VerificationError, WardroundError
from common.messages import PROTOCOL_VERSION
from common.version import SOFTWARE_VERSION

log = logging.getLogger("wardround.hub.link")

R = TypeVar("R")

MAX_FRAME_BYTES = 8 << 20
HEARTBEAT_S = 2.0
OFFLINE_S = 8.0
REPLACED_S = 4.0
LOOK_PERIOD_S = 1.0
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


class Sink(Protocol):
    """Where the payloads of uploads go while they arrive."""

    def header(self, node_id: int, body: bytes) -> Sequence[int]:
        """Check the reply that announces a payload; the chunks still missing. Raises WardroundError."""
        ...

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        """Take one chunk. Raises WardroundError to refuse it."""


def _chunk_frames(message_id: str, chunks: Sequence[bytes]) -> Iterable[link_pb2.HubFrame]:
    for index, data in enumerate(chunks):
        yield link_pb2.HubFrame(chunk=link_pb2.Chunk(message_id=message_id, index=index, data=data))


@dataclass
class _Pending:
    node_id: int
    envelope: link_pb2.Envelope
    attachment: Sequence[bytes]
    sink: Sink | None
    deliver: Callable[[link_pb2.Envelope], None]
    expires: float


@dataclass
class _Upload:
    """A payload on its way: chunks still to be asked for, and the one that was asked for."""

    sink: Sink
    reply: link_pb2.Envelope
    missing: deque[int]
    asked: int | None = None


@dataclass
class _Connection:
    peer: Peer
    context: Any
    task: "asyncio.Task[Any] | None"
    outbound: "asyncio.Queue[_Pending | link_pb2.HubFrame | None]"
    last_seen: float
    uploads: dict[str, _Upload] = field(default_factory=dict)
    ending: "asyncio.Task[None] | None" = None

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self.last_seen

    def cut(self) -> None:
        """End the stream at once, also one that is blocked in the middle of sending."""
        self.ending = asyncio.create_task(self._abort())

    async def _abort(self) -> None:
        # The status first: to cancel the sender alone would leave the other end waiting.
        try:
            await self.context.abort(grpc.StatusCode.UNAVAILABLE, "the hub cut this stream")
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            pass
        finally:
            if self.task is not None:
                self.task.cancel()


class Link(link_pb2_grpc.LinkServicer):
    """The server, its thread and the streams of the sites.

    ``admit`` maps a certificate's peer to None or raises RefusedError with the reason, which goes to the
    log and to the peer. ``services`` registers further servicers on the same port.
    """

    def __init__(
        self,
        address: str,
        *,
        key_pem: bytes,
        certificate_pem: bytes,
        authority_pem: bytes,
        admit: Callable[[Peer], None],
        services: Sequence[Callable[[grpc.aio.Server], None]] = (),
    ) -> None:
        self.address = address
        self.port = 0
        self._credentials = grpc.ssl_server_credentials(
            [(key_pem, certificate_pem)], root_certificates=authority_pem, require_client_auth=True
        )
        self._admit = admit
        self._services = services
        self._connections: dict[int, _Connection] = {}
        self._pending: dict[str, _Pending] = {}
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="accumulate")
        self._started = threading.Event()
        self._stopped = threading.Event()
        self._waiters: weakref.WeakSet[threading.Condition] = weakref.WeakSet()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> int:
        """Bind and serve. Returns the port. Raises FailureError when the address is taken."""
        self._thread.start()
        self._started.wait(timeout=30)
        if self._failure is not None or not self.port:
            raise FailureError(
                "link.bind",
                f"the hub cannot listen on {self.address}",
                remedy="Choose a free port, or end the program that holds it.",
            ) from self._failure
        return self.port

    def stop(self) -> None:
        """End all streams and the thread. Calling it twice does nothing more."""
        self._stopped.set()
        for waiting in list(self._waiters):
            with waiting:
                waiting.notify_all()
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._executor.shutdown(wait=True)

    @property
    def stopped(self) -> bool:
        """Whether stop() was called."""
        return self._stopped.is_set()

    def wake_on_stop(self, waiting: threading.Condition) -> None:
        """Notify a condition when the link stops, so that nobody waits for replies that cannot come."""
        self._waiters.add(waiting)

    def online(self) -> dict[int, float]:
        """Seconds since each attached site was last heard of. Raises UnreachableError after stop().

        Guarantee: silent_sites_are_offline - after OFFLINE_S, though their stream may still be open.
        """
        if self._stopped.is_set():
            raise UnreachableError("link.stopped", "the hub's link has been stopped")
        seconds = {node_id: c.silence_s for node_id, c in list(self._connections.items())}
        return {node_id: silence_s for node_id, silence_s in seconds.items() if silence_s < OFFLINE_S}

    def request(
        self,
        node_id: int,
        envelope: link_pb2.Envelope,
        attachment: Sequence[bytes],
        sink: Sink | None,
        deliver: Callable[[link_pb2.Envelope], None],
    ) -> None:
        """Send a request now or when the site attaches, within ``envelope.ttl_s``.

        ``deliver`` is called once, from the link's thread.
        """
        expires = time.monotonic() + envelope.ttl_s
        pending = _Pending(node_id, envelope, attachment, sink, deliver, expires)
        self._call(lambda: self._enqueue(pending))

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Forget requests nobody waits for any more; a late reply is then dropped."""
        self._call(lambda: [self._pending.pop(message_id, None) for message_id in message_ids])

    def disconnect(self, node_id: int) -> None:
        """Cut the live stream of a site at once; whether it may come back is for ``admit`` to say.

        Guarantee: a_revoked_stream_is_cut_at_once - also in the middle of a transfer.
        """

        def cut() -> None:
            if node_id in self._connections:
                self._connections[node_id].cut()

        self._call(cut)

    def _call(self, work: Callable[[], object]) -> None:
        if self._loop is None or self._loop.is_closed():
            raise UnreachableError(
                "link.stopped", "the hub's link is not running", remedy="Start it with 'hub run'."
            )
        self._loop.call_soon_threadsafe(work)

    def _enqueue(self, pending: _Pending) -> None:
        self._pending[pending.envelope.message_id] = pending
        connection = self._connections.get(pending.node_id)
        if connection is not None:
            connection.outbound.put_nowait(pending)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._failure = error
            log.error("the link ended: %s", error)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = grpc.aio.server(options=OPTIONS)
        link_pb2_grpc.add_LinkServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        health_servicer = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        for register in self._services:
            register(server)
        self.port = server.add_secure_port(self.address, self._credentials)
        await server.start()
        await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        self._started.set()
        while not self._stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK_PERIOD_S)
            self._drop_the_dead()
        for connection in self._connections.values():
            connection.outbound.put_nowait(None)
        await server.stop(grace=1.0)

    def _drop_the_dead(self) -> None:
        """Cut streams that have fallen silent, forget requests that nobody waits for any more."""
        for node_id, connection in self._connections.items():
            if connection.silence_s > OFFLINE_S:
                log.info("site %d %r: silent for %.0f s", node_id, connection.peer.name, OFFLINE_S)
                connection.cut()
        now = time.monotonic()
        for message_id in [m for m, pending in self._pending.items() if pending.expires < now]:
            del self._pending[message_id]

    async def Attach(  # noqa: N802 - the name is the service's
        self, request_iterator: AsyncIterator[link_pb2.SiteFrame], context: Any
    ) -> AsyncIterator[link_pb2.HubFrame]:
        """Serve one site's stream until either side ends it."""
        peer = await self._admitted(context)
        node_id = peer.number
        known = self._connections.get(node_id)
        if known is not None and known.silence_s < REPLACED_S:
            log.warning("refused: a second agent attached as site %d %r", node_id, peer.name)
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS, "another agent is attached with this identity"
            )
        if known is not None:
            known.cut()
        connection = _Connection(peer, context, asyncio.current_task(), asyncio.Queue(), time.monotonic())
        self._connections[node_id] = connection
        reader = asyncio.create_task(self._read(connection, request_iterator))
        # The reader knows first that the other end is gone.
        reader.add_done_callback(lambda _: connection.outbound.put_nowait(None))
        try:
            log.info("site %d %r attached", node_id, peer.name)
            yield link_pb2.HubFrame(
                greeting=link_pb2.Greeting(
                    protocol_version=PROTOCOL_VERSION, software_version=SOFTWARE_VERSION
                )
            )
            for pending in list(self._pending.values()):
                if pending.node_id == node_id:
                    connection.outbound.put_nowait(pending)
            while (item := await self._next(connection)) is not None:
                if isinstance(item, link_pb2.HubFrame):
                    yield item
                elif item.envelope.message_id in self._pending:
                    yield link_pb2.HubFrame(request=item.envelope)
                    for frame in _chunk_frames(item.envelope.message_id, item.attachment):
                        yield frame
        finally:
            reader.cancel()
            if self._connections.get(node_id) is connection:
                del self._connections[node_id]
            log.info("site %d %r detached%s", node_id, peer.name, _reason(reader))

    async def _next(self, connection: _Connection) -> "_Pending | link_pb2.HubFrame | None":
        """What to send next, a heartbeat at the least; None when the stream is to end."""
        try:
            return await asyncio.wait_for(connection.outbound.get(), HEARTBEAT_S)
        except TimeoutError:
            return link_pb2.HubFrame(heartbeat=link_pb2.Heartbeat())

    async def _admitted(self, context: Any) -> Peer:
        try:
            chain = context.auth_context().get("x509_pem_cert")
            if not chain:
                raise VerificationError("link.certificate", "the peer showed no certificate")
            peer = peer_identity(chain[0])
            if peer.role != "site":
                raise VerificationError("link.role", f"a {peer.role} certificate cannot attach as a site")
            self._admit(peer)
        except WardroundError as error:
            log.warning("refused at the link: %s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.diagnostics())
            raise
        return peer

    async def _read(self, connection: _Connection, frames: AsyncIterator[link_pb2.SiteFrame]) -> None:
        greeted = False
        async for frame in frames:
            connection.last_seen = time.monotonic()
            which = frame.WhichOneof("frame")
            if not greeted:
                if which != "greeting" or frame.greeting.protocol_version != PROTOCOL_VERSION:
                    raise VerificationError(
                        "link.protocol-version",
                        f"the site speaks another protocol version than {PROTOCOL_VERSION}",
                        remedy="Upgrade the older side.",
                    )
                greeted = True
            elif which == "reply":
                await self._on_reply(connection, frame.reply)
            elif which == "chunk":
                await self._on_chunk(connection, frame.chunk)
            elif which != "heartbeat":
                raise VerificationError("link.frame", "the site sent a frame that does not belong here")

    async def _on_reply(self, connection: _Connection, reply: link_pb2.Envelope) -> None:
        pending = self._pending.get(reply.message_id)
        if pending is None or pending.node_id != connection.peer.number:
            log.debug("site %d: dropped a reply that nobody waits for", connection.peer.number)
            return
        if not reply.attachment_bytes:
            self._deliver(pending, reply)
            return
        if pending.sink is None:
            raise VerificationError("link.attachment", "an attachment came with a reply that may have none")
        if reply.message_id in connection.uploads:
            return  # said twice on this stream: it is being fetched
        try:
            missing = await self._work(pending.sink.header, connection.peer.number, reply.body)
        except WardroundError as error:
            log.warning("site %d: refused: %s", connection.peer.number, error)
            return
        upload = _Upload(pending.sink, reply, deque(missing))
        if upload.missing:
            connection.uploads[reply.message_id] = upload
            self._fetch(connection, upload)
        else:
            self._deliver(pending, reply)

    def _fetch(self, connection: _Connection, upload: _Upload) -> None:
        """Ask for the next chunk that is missing.

        Guarantee: a_half_sent_upload_resumes - no chunk that was added is asked for again.
        """
        if upload.missing:
            upload.asked = upload.missing.popleft()
            want = link_pb2.Want(message_id=upload.reply.message_id, indices=[upload.asked])
            connection.outbound.put_nowait(link_pb2.HubFrame(want=want))

    async def _on_chunk(self, connection: _Connection, chunk: link_pb2.Chunk) -> None:
        upload = connection.uploads.get(chunk.message_id)
        pending = self._pending.get(chunk.message_id)
        if upload is None or pending is None or chunk.index != upload.asked:
            if pending is None:
                connection.uploads.pop(chunk.message_id, None)
            return
        if not 0 < len(chunk.data) <= flower.CHUNK_SIZE_BYTES:
            raise VerificationError("link.chunk", "a chunk is empty or longer than 1 MiB")
        # The next one travels while this one is added; awaiting here is the back-pressure on the site.
        upload.asked = None
        self._fetch(connection, upload)
        try:
            await self._work(upload.sink.chunk, connection.peer.number, chunk.index, chunk.data)
        except WardroundError as error:
            log.warning("site %d: refused: %s", connection.peer.number, error)
            connection.uploads.pop(chunk.message_id, None)
            return
        if upload.asked is None and not upload.missing:
            connection.uploads.pop(chunk.message_id, None)
            self._deliver(pending, upload.reply)

    async def _work(self, function: Callable[..., R], *arguments: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _deliver(self, pending: _Pending, reply: link_pb2.Envelope) -> None:
        if self._pending.pop(reply.message_id, None) is not None:
            pending.deliver(reply)


def _reason(reader: "asyncio.Task[None]") -> str:
    """Why a stream ended, when its reader knows."""
    error = reader.exception() if reader.done() and not reader.cancelled() else None
    return f": {error}" if error is not None else ""
