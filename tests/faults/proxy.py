"""A man in the middle for every site: sees each frame of its stream, records it, and breaks what it is told to.

It ends mutual TLS towards the agent with the hub's own server key and dials the hub with the site's own key,
which only a test that owns both folders can do. Frames are relayed in order, one at a time, so that the
back-pressure of either side reaches the other.
"""

import asyncio
import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from client.state import SiteHome
from common import link_pb2_grpc, messages
from common.enrolment import Admission
from common.identity import read_secret
from common.secagg import records
from server.home import HubHome

UP, DOWN = "up", "down"
READY, UPLOAD, OPEN = (kind.message_type for kind in (messages.READY, messages.UPLOAD, messages.OPEN))
REORDER_S = 0.05
SETTLE_S = 0.02
OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


@dataclass(eq=False)
class Fault:
    """What to do at the ``nth`` frame from now of one kind (``WhichOneof``) and message type in a direction.

    ``action``: cut (after the frame), drop (cut instead of the frame), delay, duplicate, reorder (swap with the
    next frame, or 50 ms later), stall (nothing passes either way for ``seconds``), call (``then`` is called, and
    the frame relayed: before it, or with ``late`` after it).
    """

    direction: str
    kind: str
    message_type: str
    nth: int
    action: str
    seconds: float = 0.0
    late: bool = False
    then: Callable[[], None] = lambda: None
    fired: threading.Event = field(default_factory=threading.Event)
    fired_at: float = 0.0


class _CutError(Exception):
    """The stream is to be aborted on both sides."""


@dataclass(frozen=True)
class Upload:
    """A context that a site was asked to upload for."""

    man: str
    round: int
    attempt: int


class Seen:
    """What left one site, and for which round: facts for the invariants. Openings are kept, never printed."""

    def __init__(self) -> None:
        self.contexts: dict[bytes, Upload] = {}
        self.payloads: dict[bytes, set[bytes]] = defaultdict(set)
        self.chunks: dict[tuple[bytes, int], set[bytes]] = defaultdict(set)
        self.opened: dict[bytes, set[bytes]] = defaultdict(set)
        self.sent: set[tuple[str, int]] = set()
        self.started: dict[tuple[str, int], set[tuple[bytes, bytes]]] = defaultdict(set)
        self.frames: dict[tuple[str, str, str], int] = defaultdict(int)
        self.unreadable: list[str] = []
        self._types: dict[str, str] = {}
        self._uploading: dict[str, bytes] = {}

    def take(self, direction: str, frame: Any) -> tuple[str, str]:
        """Record a frame; its kind and message type ('' where it has none)."""
        kind = frame.WhichOneof("frame") or ""
        body: Any = getattr(frame, kind, None)
        if kind in ("request", "reply"):
            self._types[body.message_id] = body.message_type
            try:
                self._envelope(kind, body)
            except Exception as error:  # whatever it is, the invariants report it
                self.unreadable.append(f"{kind} {body.message_type}: {type(error).__name__}: {error}")
        elif kind == "chunk" and direction == UP and body.message_id in self._uploading:
            ctx = self._uploading[body.message_id]
            self.chunks[ctx, body.index].add(hashlib.sha256(body.data).digest())
            self.sent.add((self.contexts[ctx].man, self.contexts[ctx].round))
        message_type = self._types.get(getattr(body, "message_id", ""), "")
        self.frames[direction, kind, message_type] += 1
        return kind, message_type

    def _envelope(self, kind: str, body: Any) -> None:
        if kind == "request" and body.message_type in (READY, UPLOAD):
            request = messages.decode_request(body.message_type, body.body)
            (record,), man = request.records, request.man
            if isinstance(record, records.RoundStart):
                self.started[man.hex(), record.round].add((record.dirh, record.model_digest))
            elif isinstance(record, records.Cohort):
                for dirh, model in self.started[man.hex(), record.round]:
                    ctx = records.context(man, dirh, model, record)
                    self.contexts[ctx] = Upload(man.hex(), record.round, record.attempt)
        elif kind == "reply" and body.message_type in (UPLOAD, OPEN):
            for record in messages.decode_reply(body.message_type, body.body).records:
                if isinstance(record, records.Upload):
                    self.payloads[record.ctx].add(record.payload_digest)
                    self._uploading[body.message_id] = record.ctx
                    upload = self.contexts[record.ctx]
                    self.sent.add((upload.man, upload.round))
                elif isinstance(record, records.Open):
                    self.opened[record.ctx].add(record.b)


class Proxy(link_pb2_grpc.LinkServicer):
    """Stands between one site and the hub. Made and served by ``Wire``; arm() may be called from any thread."""

    def __init__(self, hub: HubHome, hub_address: str, site: SiteHome) -> None:
        admission = Admission.from_bytes(site.admission.read_bytes())
        self.site = admission.id
        self.seen = Seen()
        self.pace_s = 0.0
        self.address = ""
        self.attached = 0
        self._hub_address = hub_address
        self._to_hub = grpc.ssl_channel_credentials(
            admission.ca_pem, read_secret(site.tls_key), admission.certificate_pem
        )
        self.to_site = grpc.ssl_server_credentials(
            [(read_secret(hub.server_key), hub.server_certificate.read_bytes())],
            root_certificates=admission.ca_pem,
            require_client_auth=True,
        )
        self._armed: list[Fault] = []
        self._held_until = 0.0
        self._lock = threading.Lock()
        self._resume_at = 0.0

    def arm(self, fault: Fault) -> Fault:
        """Watch for its frame from now on."""
        with self._lock:
            self._armed.append(fault)
        return fault

    def disarm(self) -> None:
        """Forget every fault that has not fired."""
        with self._lock:
            self._armed.clear()

    def hold(self, seconds: float) -> None:
        """Keep the start of the next round back for so long; 0 lets it go."""
        self._held_until = time.monotonic() + seconds

    def _due(self, direction: str, kind: str, message_type: str) -> Fault | None:
        with self._lock:
            due = None
            for fault in list(self._armed):
                if (fault.direction, fault.kind, fault.message_type) == (direction, kind, message_type):
                    fault.nth -= 1
                    if fault.nth <= 0 and due is None:
                        due = fault
                        self._armed.remove(fault)
            return due

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """Relay one stream until either side ends it or a fault cuts it."""
        self.attached += 1
        async with grpc.aio.secure_channel(self._hub_address, self._to_hub, options=OPTIONS) as channel:
            call: Any = link_pb2_grpc.LinkStub(channel).Attach()  # type: ignore[no-untyped-call]
            pumps = [
                asyncio.create_task(self._pump(UP, request_iterator, call.write)),
                asyncio.create_task(self._pump(DOWN, call, context.write)),
            ]
            try:
                done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                errors = [task.exception() for task in done]
                if any(isinstance(error, _CutError) for error in errors):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                if any(errors) and call.done():
                    await context.abort(await call.code(), await call.details())
                elif any(errors):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the other side is gone")
            finally:
                self.attached -= 1
                call.cancel()
                for task in pumps:
                    task.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, direction: str, source: AsyncIterable[Any], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        # A cancelled read would end a gRPC stream: waiting with a limit is done on a queue of one frame.
        queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)

        async def fill() -> None:
            broken: Exception | None = None
            try:
                async for frame in source:
                    await queue.put(frame)
            except Exception as error:
                broken = error
            await queue.put(None)
            if broken is not None:
                raise broken

        reader = asyncio.create_task(fill())
        held: Any = None
        try:
            while True:
                try:
                    frame = await asyncio.wait_for(queue.get(), REORDER_S if held is not None else None)
                except TimeoutError:
                    await send(held)
                    held = None
                    continue
                if frame is None:
                    return await reader
                kind, message_type = self.seen.take(direction, frame)
                if (direction, kind, message_type) == (DOWN, "request", READY):
                    await asyncio.sleep(self.pace_s)
                    while time.monotonic() < self._held_until:
                        await asyncio.sleep(0.005)
                fault = self._due(direction, kind, message_type)
                if fault is not None and fault.action == "reorder" and held is None:
                    _fire(fault)
                    held = frame
                    continue
                await self._apply(fault, frame, send)
                if held is not None:
                    await self._apply(None, held, send)
                    held = None
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _apply(self, fault: Fault | None, frame: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        while (left_s := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        if fault is None:
            await send(frame)
            return
        if fault.action == "drop":
            _fire(fault)
            raise _CutError
        if fault.late or fault.action == "cut":
            await send(frame)
            await asyncio.sleep(SETTLE_S)
        _fire(fault)
        if fault.action == "cut":
            raise _CutError
        if fault.action == "stall":
            self._resume_at = time.monotonic() + fault.seconds
        elif fault.action == "delay":
            await asyncio.sleep(fault.seconds)
        elif fault.action == "duplicate":
            await send(frame)
        if not fault.late:
            await self._apply(None, frame, send)


def _fire(fault: Fault) -> None:
    fault.fired_at = time.monotonic()
    fault.then()
    fault.fired.set()


class Wire:
    """All proxies of a federation: one thread, one event loop, one server a site."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._servers: list[grpc.aio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()

    def serve(self, proxy: Proxy) -> None:
        """Serve a proxy on a free port; its ``address`` says where."""
        proxy.address = asyncio.run_coroutine_threadsafe(self._serve(proxy), self._loop).result(10)

    async def _serve(self, proxy: Proxy) -> str:
        server = grpc.aio.server(options=OPTIONS)
        link_pb2_grpc.add_LinkServicer_to_server(proxy, server)  # type: ignore[no-untyped-call]
        port = server.add_secure_port("127.0.0.1:0", proxy.to_site)
        await server.start()
        self._servers.append(server)
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        """End every stream, the servers and the thread."""

        async def end() -> None:
            await asyncio.gather(*(server.stop(grace=0) for server in self._servers))
            # Handlers that were cancelled get their turn.
            await asyncio.sleep(0.1)

        try:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(15)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            if not self._thread.is_alive():
                self._loop.close()
