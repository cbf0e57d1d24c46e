"""The hospital's end of the link: one outbound stream, requests in, replies out, reconnecting for ever.

Source: DESIGN "Built on Flower, carried by gRPC". Rules: nothing listens; a request is answered once and
its reply is kept, so that the same request sent again gets the same bytes; requests run one at a time in
a thread of their own, so a long computation never silences the heartbeat; the state that comes beside a
request is taken chunk by chunk, each against its digest, and is refused past its announced size.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from common import flower, link_pb2, link_pb2_grpc, messages
from common.errors import RefusedError, UnreachableError, VerificationError
from common.messages import PROTOCOL_VERSION
from common.version import SOFTWARE_VERSION

log = logging.getLogger("wardround.site.link")

MAX_ATTACHMENT_BYTES = 1 << 30
MAX_FRAME_BYTES = 8 << 20
HEARTBEAT_S = 5.0
BACKOFF_FIRST_S = 0.2
BACKOFF_LAST_S = 5.0
KEPT_REPLIES = 4
# With a new round or the end of a run, openings and payloads of the round before are not kept (PROTOCOL I11).
FORGETTING = (messages.READY.message_type, messages.CLOSE.message_type)
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply as it goes out: the envelope and, for an upload, the masked payload."""

    envelope: link_pb2.Envelope
    attachment: list[bytes]


class _Incoming:
    """A request whose attachment is still arriving."""

    def __init__(self, envelope: link_pb2.Envelope) -> None:
        if envelope.attachment_bytes > MAX_ATTACHMENT_BYTES:
            raise VerificationError("link.attachment", "the hub announced more than 1 GiB beside a request")
        self.envelope = envelope
        self.chunks: list[bytes] = []
        self.left = envelope.attachment_bytes

    def add(self, chunk: link_pb2.Chunk) -> bool:
        """Take the next chunk; true when the attachment is whole."""
        if chunk.index != len(self.chunks) or not 0 < len(chunk.data) <= min(
            self.left, flower.CHUNK_SIZE_BYTES
        ):
            raise VerificationError("link.chunk", "a chunk of the state is out of order or too long")
        if hashlib.sha256(chunk.data).digest() != chunk.digest:
            raise VerificationError("link.chunk-digest", "a chunk of the state does not match its digest")
        self.chunks.append(chunk.data)
        self.left -= len(chunk.data)
        return self.left == 0


class Agent:
    """Keeps the stream to the hub and hands every request to ``answer``.

    ``answer`` is the ClientApp bound to its context: Message in, Message out; it runs in one worker
    thread. ``finished`` is asked after every reply; when it says true the agent ends.
    """

    def __init__(
        self,
        address: str,
        *,
        site_id: int,
        key_pem: bytes,
        certificate_pem: bytes,
        authority_pem: bytes,
        answer: Callable[[flower.Message], flower.Message],
        finished: Callable[[], bool] = lambda: False,
    ) -> None:
        self._address = address
        self._site_id = site_id
        self._credentials = grpc.ssl_channel_credentials(authority_pem, key_pem, certificate_pem)
        self._answer = answer
        self._finished = finished
        self._kept: OrderedDict[str, Answer] = OrderedDict()
        self._working: set[str] = set()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="round")
        self._stop = asyncio.Event()
        self._outbound: asyncio.Queue[link_pb2.SiteFrame | Answer] = asyncio.Queue()
        flower.assume_identity(site_id)

    def stop(self) -> None:
        """Ask the agent to end. Call from its event loop (a signal handler)."""
        self._stop.set()

    async def run(self) -> None:
        """Stay attached until stop() or ``finished``.

        Raises: RefusedError when the hub refuses this identity; UnreachableError is retried, never raised.
        """
        backoff_s = BACKOFF_FIRST_S
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                try:
                    await self._attached()
                except UnreachableError as error:
                    log.warning("%s", error.problem)
                except VerificationError as error:
                    log.error("the stream was ended by this side: %s", error)
                if time.monotonic() - started > BACKOFF_LAST_S:
                    backoff_s = BACKOFF_FIRST_S
                if not self._stop.is_set():
                    # Jitter spreads the reconnects of many sites after a restart of the hub.
                    wait_s = backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
                    await self._stopped_within(wait_s)
                    backoff_s = min(BACKOFF_LAST_S, backoff_s * 2)
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _attached(self) -> None:
        # A reply computed while the stream was down must go out on the new one: always the current queue.
        self._outbound = asyncio.Queue()
        async with grpc.aio.secure_channel(self._address, self._credentials, options=OPTIONS) as channel:
            call: Any = link_pb2_grpc.LinkStub(channel).Attach(self._frames(self._outbound))  # type: ignore[no-untyped-call]
            reader = asyncio.create_task(self._read(call))
            stopper = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait({reader, stopper}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    reader.result()
                    raise UnreachableError("link.ended", "the hub ended the stream")
            except grpc.aio.AioRpcError as error:
                raise self._explain(error) from error
            finally:
                stopper.cancel()
                reader.cancel()
                call.cancel()

    def _explain(self, error: grpc.aio.AioRpcError) -> UnreachableError | RefusedError:
        if error.code() == grpc.StatusCode.PERMISSION_DENIED:
            return RefusedError(
                "link.refused",
                f"the hub at {self._address} refused this site: {error.details()}",
                remedy="Ask the coordinator whether this site is admitted and its certificate current.",
            )
        return UnreachableError(
            "link.unreachable",
            f"the hub at {self._address} cannot be reached ({error.code().name}: {error.details()})",
            remedy="Check the address, the network and the certificates; the agent keeps trying.",
        )

    async def _frames(
        self, outbound: "asyncio.Queue[link_pb2.SiteFrame | Answer]"
    ) -> AsyncIterator[link_pb2.SiteFrame]:
        yield link_pb2.SiteFrame(
            greeting=link_pb2.Greeting(protocol_version=PROTOCOL_VERSION, software_version=SOFTWARE_VERSION)
        )
        while True:
            try:
                item = await asyncio.wait_for(outbound.get(), HEARTBEAT_S)
            except TimeoutError:
                yield link_pb2.SiteFrame(heartbeat=link_pb2.Heartbeat())
                continue
            if isinstance(item, Answer):
                yield link_pb2.SiteFrame(reply=item.envelope)
                for index, data in enumerate(item.attachment):
                    yield link_pb2.SiteFrame(
                        chunk=link_pb2.Chunk(message_id=item.envelope.message_id, index=index, data=data)
                    )
            else:
                yield item

    async def _read(self, call: Any) -> None:
        incoming: dict[str, _Incoming] = {}
        tasks: set[asyncio.Task[None]] = set()
        greeted = False
        async for frame in call:
            which = frame.WhichOneof("frame")
            if not greeted:
                if which != "greeting" or frame.greeting.protocol_version != PROTOCOL_VERSION:
                    raise VerificationError(
                        "link.protocol-version", "the hub speaks another protocol version"
                    )
                greeted = True
                log.info("attached to the hub at %s", self._address)
                continue
            whole: tuple[link_pb2.Envelope, list[bytes]] | None = None
            if which == "request":
                if frame.request.attachment_bytes:
                    incoming[frame.request.message_id] = _Incoming(frame.request)
                else:
                    whole = (frame.request, [])
            elif which == "chunk":
                arriving = incoming.get(frame.chunk.message_id)
                if arriving is None:
                    raise VerificationError("link.chunk", "a chunk belongs to no request")
                if arriving.add(frame.chunk):
                    del incoming[frame.chunk.message_id]
                    whole = (arriving.envelope, arriving.chunks)
            else:
                raise VerificationError("link.frame", "the hub sent a frame that does not belong here")
            if whole is not None:
                task = asyncio.create_task(self._serve(*whole))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def _serve(self, envelope: link_pb2.Envelope, attachment: list[bytes]) -> None:
        message_id = envelope.message_id
        if message_id in self._working:
            return
        answer = self._kept.get(message_id)
        if answer is None:
            self._working.add(message_id)
            try:
                answer = await asyncio.get_running_loop().run_in_executor(
                    self._executor, self._compute, envelope, attachment
                )
            finally:
                self._working.discard(message_id)
            if envelope.message_type in FORGETTING:
                self._kept.clear()
            self._kept[message_id] = answer
            while len(self._kept) > KEPT_REPLIES:
                self._kept.popitem(last=False)
        self._outbound.put_nowait(answer)
        if self._finished():
            # The last reply is given time to leave before the stream ends.
            await asyncio.sleep(0.2)
            self._stop.set()

    def _compute(self, envelope: link_pb2.Envelope, attachment: list[bytes]) -> Answer:
        request = flower.received(
            envelope.message_id,
            self._site_id,
            envelope.message_type,
            envelope.body,
            group=envelope.group,
            attachment=attachment,
            created_at=time.time(),
            ttl_s=envelope.ttl_s,
        )
        reply = self._answer(request)
        payload = flower.attachment_of(reply)
        return Answer(
            link_pb2.Envelope(
                message_id=envelope.message_id,
                message_type=envelope.message_type,
                group=envelope.group,
                body=flower.body_of(reply),
                attachment_bytes=sum(map(len, payload)),
                ttl_s=envelope.ttl_s,
            ),
            payload,
        )
