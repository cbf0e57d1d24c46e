"""The hub's side of the link: one grpc.aio server in a thread, one stream a site.

Source: DESIGN "Built on Flower, carried by gRPC". Rules: a peer is admitted by its certificate and the
hub's own table, before its first frame is read; a second stream of one identity is refused, unless the first
has fallen silent; replies are matched by message id, once; payloads are fetched (server/transfers.py), never
held whole; requests without an answer are sent again when the site comes back, under the same id, and of a
payload only what is missing; who is silent is offline.
"""

import asyncio
import gc
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # pyright: ignore[reportMissingImports] - no stubs

from common import flower, link_pb2, link_pb2_grpc
from common.certificates import Peer, peer_identity
from common.errors import FailureError, UnreachableError, VerificationError, WardroundError
from common.messages import PROTOCOL_VERSION
from common.version import SOFTWARE_VERSION
from server.transfers import Fetching, Sink, Upload, chunk_frames

log = logging.getLogger("wardround.hub.link")

R = TypeVar("R")

MAX_FRAME_BYTES = 8 << 20
HEARTBEAT_S = 2.0
OFFLINE_S = 8.0
REPLACED_S = 4.0
BLOCKED_S = 30.0
LOOK_PERIOD_S = 1.0
MAX_UNASKED = 200
"""Of one stream within LOOK_PERIOD_S: late replies, repeated frames, heartbeats."""
MAX_STREAMS = 16
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Of one connection; and none is kept on which nothing is asked.
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.so_reuseport", 0),
)


@dataclass
class _Pending:
    node_id: int
    envelope: link_pb2.Envelope
    attachment: Sequence[bytes]
    sink: Sink | None
    deliver: Callable[[link_pb2.Envelope], None]
    expires: float


@dataclass
class _Connection:
    peer: Peer
    task: "asyncio.Task[Any] | None"
    outbound: "asyncio.Queue[str | link_pb2.HubFrame | None]"
    last_seen: float
    uploads: dict[str, Upload] = field(default_factory=dict)
    reader: "asyncio.Task[None] | None" = None
    blocked_since: float = math.inf
    unasked: int = 0
    cut: bool = False

    @property
    def silence_s(self) -> float:
        return max(0.0, time.monotonic() - self.last_seen)


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
        self._fetching = Fetching()
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
        self._call(lambda: self._forget(message_ids))

    def disconnect(self, node_id: int) -> None:
        """Cut the live stream of a site at once; whether it may come back is for ``admit`` to say.

        Guarantee: a_revoked_stream_is_cut_at_once - also in the middle of a transfer.
        """

        self._call(lambda: self._cut(self._connections.get(node_id)))

    def _call(self, work: Callable[[], object]) -> None:
        try:
            if self._loop is None:
                raise RuntimeError("not started")
            self._loop.call_soon_threadsafe(work)
        except RuntimeError as error:
            raise UnreachableError(
                "link.stopped", "the hub's link is not running", remedy="Start it with 'hub run'."
            ) from error

    def _enqueue(self, pending: _Pending) -> None:
        self._pending[pending.envelope.message_id] = pending
        connection = self._connections.get(pending.node_id)
        if connection is not None:
            connection.outbound.put_nowait(pending.envelope.message_id)

    def _forget(self, message_ids: Sequence[str]) -> None:
        for message_id in message_ids:
            pending = self._pending.pop(message_id, None)
            if pending is not None and pending.node_id in self._connections:
                self._end_upload(self._connections[pending.node_id], message_id)

    def _end_upload(self, connection: _Connection, message_id: str) -> None:
        upload = connection.uploads.pop(message_id, None)
        if upload is not None:
            self._fetching.end(upload)

    def _cut(self, connection: _Connection | None) -> None:
        """End a stream at once, also one that is blocked in the middle of sending."""
        if connection is not None and connection.task is not None and not connection.cut:
            connection.cut = True
            self._detach(connection)
            connection.task.cancel()

    def _detach(self, connection: _Connection) -> None:
        """Read no more of a stream, and know its site as absent."""
        reader, node_id = connection.reader, connection.peer.number
        if reader is not None:
            reader.cancel()
        for message_id in list(connection.uploads):
            self._end_upload(connection, message_id)
        if self._connections.get(node_id) is connection:
            del self._connections[node_id]
            why = _failure(reader)
            log.info("site %d %r detached%s", node_id, connection.peer.name, f": {why}" if why else "")

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._failure = error
            log.error("the link ended: %s", error)
        finally:
            self._started.set()
            # A refused call refers to itself; were it still there, gRPC would hold up the end of the process.
            gc.collect()

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
            self._fetching.go_on()
        for connection in self._connections.values():
            connection.outbound.put_nowait(None)
        await server.stop(grace=1.0)

    def _drop_the_dead(self) -> None:
        """Cut streams that have fallen silent, forget requests that nobody waits for any more."""
        for node_id, connection in list(self._connections.items()):
            connection.unasked = 0
            if connection.silence_s > OFFLINE_S:
                log.info("site %d %r: silent for %.0f s", node_id, connection.peer.name, OFFLINE_S)
                self._cut(connection)
            elif time.monotonic() - connection.blocked_since > BLOCKED_S:
                log.info("site %d %r: took nothing for %.0f s", node_id, connection.peer.name, BLOCKED_S)
                self._cut(connection)
        now = time.monotonic()
        self._forget([m for m, pending in self._pending.items() if pending.expires < now])

    async def Attach(  # noqa: N802 - the name is the service's
        self, request_iterator: AsyncIterator[link_pb2.SiteFrame], context: Any
    ) -> None:
        """Serve one site's stream until either side ends it."""
        peer = await self._admitted(context)
        # A stream cut while these were on their way could not be given a status any more.
        await context.send_initial_metadata(())
        node_id = peer.number
        known = self._connections.get(node_id)
        if known is not None and known.silence_s < REPLACED_S:
            log.warning("refused: a second agent attached as site %d %r", node_id, peer.name)
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS, "another agent is attached with this identity"
            )
        self._cut(known)
        connection = _Connection(peer, asyncio.current_task(), asyncio.Queue(), time.monotonic())
        self._connections[node_id] = connection
        for pending in self._pending.values():
            if pending.node_id == node_id:
                connection.outbound.put_nowait(pending.envelope.message_id)
        reader = connection.reader = asyncio.create_task(self._read(connection, request_iterator))
        # The reader knows first that the other end is gone.
        reader.add_done_callback(lambda _: connection.outbound.put_nowait(None))
        log.info("site %d %r attached", node_id, peer.name)
        greeting = link_pb2.Greeting(protocol_version=PROTOCOL_VERSION, software_version=SOFTWARE_VERSION)
        try:
            await context.write(link_pb2.HubFrame(greeting=greeting))
            while (item := await self._next(connection)) is not None:
                for frame in self._frames(item):
                    connection.blocked_since = time.monotonic()
                    await context.write(frame)
                    connection.blocked_since = math.inf
        except grpc.aio.InternalError:
            # The other end is gone; the cancellation that follows ends this call.
            await asyncio.sleep(LOOK_PERIOD_S)
        except asyncio.CancelledError:
            if not connection.cut:
                raise
        finally:
            self._detach(connection)
            connection.reader = connection.task = None
        why = "the hub cut this stream" if connection.cut else _failure(reader)
        if why:
            # A task that ends leaves the other end waiting; a status that cannot leave is not waited for.
            with suppress(TimeoutError):
                await asyncio.wait_for(context.abort(grpc.StatusCode.UNAVAILABLE, why), LOOK_PERIOD_S)

    async def _next(self, connection: _Connection) -> str | link_pb2.HubFrame | None:
        """What to send next, a heartbeat at the least; None when the stream is to end."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                return await connection.outbound.get()
        except TimeoutError:
            return link_pb2.HubFrame(heartbeat=link_pb2.Heartbeat())

    def _frames(self, item: str | link_pb2.HubFrame) -> Iterator[link_pb2.HubFrame]:
        """The frames of a request and what comes beside it, for as long as somebody waits for the reply."""
        if isinstance(item, link_pb2.HubFrame):
            yield item
        elif (pending := self._pending.get(item)) is not None:
            yield link_pb2.HubFrame(request=pending.envelope)
            for frame in chunk_frames(item, pending.attachment):
                if item not in self._pending:
                    return
                yield frame

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
        """Take a site's frames until its stream ends.

        Guarantee: floods_are_cut - more than MAX_UNASKED frames within LOOK_PERIOD_S that nobody asked for.
        """
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
            elif which not in ("reply", "chunk", "heartbeat"):
                raise VerificationError("link.frame", "the site sent a frame that does not belong here")
            elif not (
                (which == "reply" and await self._on_reply(connection, frame.reply))
                or (which == "chunk" and await self._on_chunk(connection, frame.chunk))
            ):
                connection.unasked += 1
                if connection.unasked > MAX_UNASKED:
                    problem = f"the site sent more than {MAX_UNASKED} frames at once that nobody asked for"
                    raise VerificationError("link.flood", problem, remedy="Ask that hospital; or revoke it.")

    async def _on_reply(self, connection: _Connection, reply: link_pb2.Envelope) -> bool:
        """Take a reply; whether it was asked for and taken."""
        pending = self._pending.get(reply.message_id)
        if pending is None or pending.node_id != connection.peer.number:
            log.debug("site %d: dropped a reply that nobody waits for", connection.peer.number)
            return False
        if not reply.attachment_bytes:
            self._deliver(reply)
            return True
        if pending.sink is None:
            raise VerificationError("link.attachment", "an attachment came with a reply that may have none")
        if reply.message_id in connection.uploads:
            return False  # said twice on this stream: it is being fetched
        try:
            missing = await self._work(connection, pending.sink.header, reply.body)
        except WardroundError as error:
            log.warning("site %d: refused: %s", connection.peer.number, error)
            return False
        if not missing:
            self._deliver(reply)
        elif reply.message_id in self._pending:
            upload = Upload(pending.sink, reply, deque(missing), connection.outbound.put_nowait)
            connection.uploads[reply.message_id] = upload
            self._fetching.begin(upload)
        return True

    async def _on_chunk(self, connection: _Connection, chunk: link_pb2.Chunk) -> bool:
        """Add a chunk that was asked for; what was withdrawn meanwhile, or comes twice, is dropped.

        Guarantee: a_half_sent_upload_resumes - no chunk that was added is asked for again.
        """
        upload = connection.uploads.get(chunk.message_id)
        if upload is None or chunk.index != upload.asked:
            return False
        if not 0 < len(chunk.data) <= flower.CHUNK_SIZE_BYTES:
            raise VerificationError("link.chunk", "a chunk is empty or longer than 1 MiB")
        self._fetching.arrived(upload)
        try:
            # Awaiting here is the back-pressure on the site.
            await self._work(connection, upload.sink.chunk, chunk.index, chunk.data)
        except WardroundError as error:
            log.warning("site %d: refused: %s", connection.peer.number, error)
            self._end_upload(connection, chunk.message_id)
            return False
        finally:
            self._fetching.added()
        if upload.whole and connection.uploads.pop(chunk.message_id, None) is upload:
            self._deliver(upload.reply)
        return True

    async def _work(self, connection: _Connection, function: Callable[..., R], *arguments: object) -> R:
        """Call the sink in a thread. Meanwhile the hub does not listen: the site is not silent."""
        connection.last_seen = math.inf
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._executor, function, connection.peer.number, *arguments
            )
        finally:
            connection.last_seen = time.monotonic()

    def _deliver(self, reply: link_pb2.Envelope) -> None:
        pending = self._pending.pop(reply.message_id, None)
        if pending is not None:
            pending.deliver(reply)


def _failure(reader: "asyncio.Task[None] | None") -> str:
    """Why reading a stream failed, if it did."""
    return str(reader.exception() or "") if reader and reader.done() and not reader.cancelled() else ""
