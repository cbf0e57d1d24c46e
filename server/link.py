"""The hub's side of the link: one grpc.aio server in a thread, one stream a site, one Flower Grid on top.

Source: DESIGN "Built on Flower, carried by gRPC". Rules: a peer is admitted by its certificate and the
hub's own table, before its first frame is read; a second stream of one identity is refused; replies are
matched by message id, once; an attachment goes chunk by chunk into the sink and is never held whole;
requests without an answer are sent again when the site comes back, under the same id.
"""

import asyncio
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from flwr.serverapp import Grid
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # pyright: ignore[reportMissingImports] - no stubs

from common import flower, link_pb2, link_pb2_grpc
from common.certificates import Peer, peer_identity
from common.errors import FailureError, UnreachableError, VerificationError, WardroundError
from common.messages import PROTOCOL_VERSION
from common.version import SOFTWARE_VERSION

log = logging.getLogger("wardround.hub.link")

MAX_FRAME_BYTES = 8 << 20
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

    def header(self, node_id: int, body: bytes) -> None:
        """Check the reply that announces an attachment. Raises WardroundError to refuse it."""

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        """Take one chunk. Raises WardroundError to refuse it."""


class Attachment:
    """Chunks to send with a request; their digests are computed once for all sites."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self.chunks = chunks
        self.digests = [hashlib.sha256(chunk).digest() for chunk in chunks]
        self.size_bytes = sum(map(len, chunks))

    def frames(self, message_id: str) -> Iterable[link_pb2.HubFrame]:
        """The chunk frames, in order."""
        for index, (data, digest) in enumerate(zip(self.chunks, self.digests, strict=True)):
            yield link_pb2.HubFrame(
                chunk=link_pb2.Chunk(message_id=message_id, index=index, data=data, digest=digest)
            )


@dataclass
class _Pending:
    node_id: int
    envelope: link_pb2.Envelope
    attachment: Attachment | None
    sink: Sink | None
    deliver: Callable[[link_pb2.Envelope], None]


@dataclass
class _Connection:
    peer: Peer
    outbound: "asyncio.Queue[_Pending | None]"
    last_seen: float
    uploads: dict[str, tuple[_Pending, link_pb2.Envelope, int]] = field(default_factory=dict)


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
        self._waiters: list[threading.Condition] = []
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
        for waiting in self._waiters:
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
        self._waiters.append(waiting)

    def online(self) -> dict[int, float]:
        """Seconds since each attached site was last heard of. Raises UnreachableError after stop()."""
        if self._stopped.is_set():
            raise UnreachableError("link.stopped", "the hub's link has been stopped")
        now = time.monotonic()
        return {node_id: now - c.last_seen for node_id, c in list(self._connections.items())}

    def request(
        self,
        node_id: int,
        envelope: link_pb2.Envelope,
        attachment: Attachment | None,
        sink: Sink | None,
        deliver: Callable[[link_pb2.Envelope], None],
    ) -> None:
        """Send a request now or when the site attaches.

        ``deliver`` is called once, from the link's thread.
        """
        pending = _Pending(node_id, envelope, attachment, sink, deliver)
        self._call(lambda: self._enqueue(pending))

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Forget requests nobody waits for any more; a late reply is then dropped."""
        self._call(lambda: [self._pending.pop(message_id, None) for message_id in message_ids])

    def disconnect(self, node_id: int) -> None:
        """Cut the live stream of a site."""

        def cut() -> None:
            connection = self._connections.get(node_id)
            if connection is not None:
                connection.outbound.put_nowait(None)

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
        await self._stop.wait()
        for connection in self._connections.values():
            connection.outbound.put_nowait(None)
        await server.stop(grace=1.0)

    async def Attach(  # noqa: N802 - the name is the service's
        self, request_iterator: AsyncIterator[link_pb2.SiteFrame], context: Any
    ) -> AsyncIterator[link_pb2.HubFrame]:
        """Serve one site's stream until either side ends it."""
        peer = await self._admitted(context)
        node_id = peer.number
        if node_id in self._connections:
            log.warning("refused: a second agent attached as site %d %r", node_id, peer.name)
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS, "another agent is attached with this identity"
            )
        connection = _Connection(peer, asyncio.Queue(), time.monotonic())
        self._connections[node_id] = connection
        reader = asyncio.create_task(self._read(connection, request_iterator))
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
            while True:
                pending_or_end = await self._next(connection, reader)
                if pending_or_end is None:
                    return
                yield link_pb2.HubFrame(request=pending_or_end.envelope)
                if pending_or_end.attachment is not None:
                    for frame in pending_or_end.attachment.frames(pending_or_end.envelope.message_id):
                        yield frame
        finally:
            reader.cancel()
            self._connections.pop(node_id, None)
            log.info("site %d %r detached", node_id, peer.name)

    async def _next(self, connection: _Connection, reader: "asyncio.Task[None]") -> _Pending | None:
        """The next request to send, or None when the stream is to end."""
        getter = asyncio.create_task(connection.outbound.get())
        try:
            await asyncio.wait({getter, reader}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                if (error := reader.exception()) is not None:
                    log.warning("site %d: stream ended: %s", connection.peer.number, error)
                return None
            return getter.result()
        finally:
            getter.cancel()

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
            log.info("site %d: dropped a reply that nobody waits for", connection.peer.number)
            return
        if reply.attachment_bytes:
            if pending.sink is None:
                raise VerificationError(
                    "link.attachment", "an attachment came with a reply that may have none"
                )
            await self._work(pending.sink.header, connection.peer.number, reply.body)
            connection.uploads[reply.message_id] = (pending, reply, reply.attachment_bytes)
        else:
            self._deliver(pending, reply)

    async def _on_chunk(self, connection: _Connection, chunk: link_pb2.Chunk) -> None:
        upload = connection.uploads.get(chunk.message_id)
        if upload is None or chunk.message_id not in self._pending:
            connection.uploads.pop(chunk.message_id, None)
            return
        pending, reply, left = upload
        if not chunk.data or len(chunk.data) > min(left, flower.CHUNK_SIZE_BYTES) or pending.sink is None:
            raise VerificationError("link.chunk", "a chunk is empty or longer than what was announced")
        # Awaiting here is the back-pressure: the next frame is read only when this one has been added.
        await self._work(pending.sink.chunk, connection.peer.number, chunk.index, chunk.data)
        left -= len(chunk.data)
        if left:
            connection.uploads[chunk.message_id] = (pending, reply, left)
        else:
            del connection.uploads[chunk.message_id]
            self._deliver(pending, reply)

    async def _work(self, function: Callable[..., None], *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _deliver(self, pending: _Pending, reply: link_pb2.Envelope) -> None:
        if self._pending.pop(reply.message_id, None) is not None:
            pending.deliver(reply)


class GrpcGrid(Grid):
    """Flower's Grid over the link: what a ServerApp and a Strategy talk to.

    Messages that carry an attachment in their record are sent with it in chunks; the attachments of
    replies go to ``sink`` and do not appear in the reply.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._run = flower.empty_run()
        self._condition = threading.Condition()
        self._waiting: dict[str, flower.Message] = {}
        self._replies: dict[str, flower.Message] = {}
        self.sink: Sink | None = None
        link.wake_on_stop(self._condition)
        flower.assume_identity(flower.HUB_NODE_ID)

    def set_run(self, run: flower.Run) -> None:
        """Remember the run. One Grid serves one run."""
        self._run = run

    @property
    def run(self) -> flower.Run:
        """The run that set_run gave."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> flower.Message:
        """Not offered: Flower deprecates it in favour of ``Message(...)``. Raises FailureError."""
        raise FailureError(
            "link.create-message", "Grid.create_message is deprecated; construct a Message instead"
        )

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the sites whose stream is open, ascending."""
        return sorted(self._link.online())

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Send messages; equal attachments are cut and hashed once."""
        attachments: dict[tuple[int, ...], Attachment] = {}
        message_ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            attachment = None
            if chunks := flower.attachment_of(message):
                key = tuple(map(id, chunks))
                attachment = attachments.get(key) or attachments.setdefault(key, Attachment(chunks))
            envelope = link_pb2.Envelope(
                message_id=message_id,
                message_type=message.metadata.message_type,
                group=message.metadata.group_id,
                body=flower.body_of(message),
                attachment_bytes=attachment.size_bytes if attachment else 0,
                ttl_s=message.metadata.ttl,
            )
            flower.with_id(message, message_id)
            with self._condition:
                self._waiting[message_id] = message
            self._link.request(message.metadata.dst_node_id, envelope, attachment, self.sink, self._deliver)
            message_ids.append(message_id)
        return message_ids

    def _deliver(self, envelope: link_pb2.Envelope) -> None:
        with self._condition:
            request = self._waiting.pop(envelope.message_id, None)
            if request is not None:
                self._replies[envelope.message_id] = flower.reply(request, envelope.body)
                self._condition.notify_all()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flower.Message]:
        """The replies that have come, each given out once."""
        with self._condition:
            found = [self._replies.pop(m, None) for m in message_ids]
        return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Send and wait for all replies or for ``timeout`` seconds; what is still open is then withdrawn.

        Raises: UnreachableError when the link stops meanwhile.
        """
        message_ids = list(self.push_messages(messages))
        with self._condition:
            self._condition.wait_for(
                lambda: self._link.stopped or all(m in self._replies for m in message_ids), timeout
            )
            late = [m for m in message_ids if m not in self._replies]
            for message_id in late:
                self._waiting.pop(message_id, None)
        if late:
            self._link.withdraw(late)
        return self.pull_messages(message_ids)
