"""The hospital's end of the link: one outbound stream, requests in, replies out, reconnecting for ever.

Source: DESIGN "Built on Flower, carried by gRPC". Rules: nothing listens; a request is answered once and
its reply is kept, so that the same request sent again gets the same bytes; a payload is sent chunk by chunk
as the hub asks for it; requests of one study run in the order in which they came, in threads of their own: a
long computation silences neither the heartbeat nor another study, and the end of a study overtakes all; what
comes beside a request is taken in order and refused past its announced size (what it is worth is for the
digest that the hub signed to say); a hub that is silent is left and tried again.
"""

import asyncio
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import grpc
import grpc.aio

from common import flower, link_pb2, link_pb2_grpc, messages
from common.errors import RefusedError, UnreachableError, VerificationError
from common.messages import PROTOCOL_VERSION
from common.version import SOFTWARE_VERSION

log = logging.getLogger("wardround.site.link")

MAX_ATTACHMENT_BYTES = 1 << 30
MAX_FRAME_BYTES = 8 << 20
MAX_IN_FLIGHT = 32
MAX_CONCURRENT = 8
OUTBOUND_FRAMES = 64
HEARTBEAT_S = 2.0
SILENCE_S = 8.0
WATCH_S = 1.0
BACKOFF_FIRST_S = 0.2
BACKOFF_LAST_S = 5.0
KEPT_REPLIES = 4
MAX_KEPT = 256
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

    def add(self, chunk: link_pb2.Chunk) -> None:
        """Take the next chunk."""
        if chunk.index != len(self.chunks) or not 0 < len(chunk.data) <= min(
            self.left, flower.CHUNK_SIZE_BYTES
        ):
            raise VerificationError("link.chunk", "a chunk of the state is out of order or too long")
        self.chunks.append(chunk.data)
        self.left -= len(chunk.data)


class Agent:
    """Keeps the stream to the hub and hands every request to ``answer``.

    ``answer`` is the ClientApp bound to its context: Message in, Message out; it is called from a thread for
    each study, and from one more for the end of a study. ``watch`` is called every second, in a thread;
    ``interrupt`` once, when the agent is told to stop, to end what is being computed; ``may_send`` says, by
    the group of a study, whether what is kept of its round may still leave. ``finished`` is asked
    after every reply; when it says true the agent ends.

    Guarantee: replies_are_idempotent - a request sent again gets the bytes of its first reply.
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
        watch: Callable[[], object] = lambda: None,
        interrupt: Callable[[], object] = lambda: None,
        may_send: Callable[[str], bool] = lambda _group: True,
        finished: Callable[[], bool] = lambda: False,
    ) -> None:
        self._address = address
        self._site_id = site_id
        self._credentials = grpc.ssl_channel_credentials(authority_pem, key_pem, certificate_pem)
        self._answer = answer
        self._watch = watch
        self._interrupt = interrupt
        self._may_send = may_send
        self._finished = finished
        self._kept: OrderedDict[str, Answer] = OrderedDict()
        self._working: dict[str, str] = {}
        self._orders: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: list[int] = []
        self._released = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=MAX_CONCURRENT, thread_name_prefix="study")
        # The end of a study and the watch must not wait for computations.
        self._urgent = ThreadPoolExecutor(max_workers=2, thread_name_prefix="urgent")
        self._stop = asyncio.Event()
        self._outbound: asyncio.Queue[link_pb2.SiteFrame] = asyncio.Queue()
        self._heard = time.monotonic()
        flower.assume_identity(site_id)

    def stop(self) -> None:
        """Ask the agent to end. Call from its event loop (a signal handler)."""
        self._stop.set()

    async def run(self) -> None:
        """Stay attached until stop() or ``finished``.

        Raises: RefusedError when the hub refuses this identity; UnreachableError is retried, never raised.
        """
        backoff_s = BACKOFF_FIRST_S
        watching = asyncio.create_task(self._watching())
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
            watching.cancel()
            self._interrupt()
            for executor in (self._executor, self._urgent):
                executor.shutdown(wait=True, cancel_futures=True)

    async def _watching(self) -> None:
        while not await self._stopped_within(WATCH_S):
            try:
                await asyncio.get_running_loop().run_in_executor(self._urgent, self._watch)
            except Exception as error:
                # It must go on; and only the kind is named, for the text may hold what must not be in a log.
                log.error("the watch failed: %s", type(error).__name__)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _attached(self) -> None:
        # A reply computed while the stream was down must go out on the new one: always the current queue.
        self._outbound = asyncio.Queue()
        self._heard = time.monotonic()
        async with grpc.aio.secure_channel(self._address, self._credentials, options=OPTIONS) as channel:
            call: Any = link_pb2_grpc.LinkStub(channel).Attach(self._frames(self._outbound))  # type: ignore[no-untyped-call]
            reader = asyncio.create_task(self._read(call))
            ends = [reader, asyncio.create_task(self._stop.wait()), asyncio.create_task(self._silence())]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    reader.result()
                    raise UnreachableError("link.ended", "the hub ended the stream")
                if not self._stop.is_set():
                    raise UnreachableError("link.silent", f"the hub was silent for {SILENCE_S:.0f} s")
            except grpc.aio.AioRpcError as error:
                raise self._explain(error) from error
            finally:
                for end in ends:
                    end.cancel()
                call.cancel()

    async def _silence(self) -> None:
        """Ends when nothing has come for too long."""
        while (left_s := self._heard + SILENCE_S - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, WATCH_S))

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
        self, outbound: "asyncio.Queue[link_pb2.SiteFrame]"
    ) -> AsyncIterator[link_pb2.SiteFrame]:
        yield link_pb2.SiteFrame(
            greeting=link_pb2.Greeting(protocol_version=PROTOCOL_VERSION, software_version=SOFTWARE_VERSION)
        )
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    frame = await outbound.get()
            except TimeoutError:
                frame = link_pb2.SiteFrame(heartbeat=link_pb2.Heartbeat())
            yield frame

    async def _read(self, call: Any) -> None:
        arriving: _Incoming | None = None
        greeted = False
        try:
            async for frame in call:
                self._heard = time.monotonic()
                which = frame.WhichOneof("frame")
                if not greeted:
                    if which != "greeting" or frame.greeting.protocol_version != PROTOCOL_VERSION:
                        raise VerificationError(
                            "link.protocol-version", "the hub speaks another protocol version"
                        )
                    greeted = True
                    log.info("attached to the hub at %s", self._address)
                elif which == "request":
                    # The hub sends a request and all that comes beside it, or the next one if it withdrew it.
                    if arriving is not None:
                        self._release(arriving.envelope)
                    arriving = None
                    incoming = _Incoming(frame.request)
                    await self._take_room(incoming.envelope)
                    arriving = incoming
                elif which == "chunk":
                    if arriving is None or arriving.envelope.message_id != frame.chunk.message_id:
                        raise VerificationError("link.chunk", "a chunk belongs to no request")
                    arriving.add(frame.chunk)
                elif which == "want":
                    self._send_chunks(frame.want)
                elif which != "heartbeat":
                    raise VerificationError("link.frame", "the hub sent a frame that does not belong here")
                if arriving is not None and not arriving.left:
                    task = asyncio.create_task(self._serve(arriving.envelope, arriving.chunks))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                    arriving = None
        finally:
            if arriving is not None:
                self._release(arriving.envelope)

    async def _take_room(self, envelope: link_pb2.Envelope) -> None:
        """Read no further while too much is in flight: the hub's sending then stops by itself."""
        size_bytes, self._heard = envelope.attachment_bytes, math.inf
        while len(self._in_flight) >= MAX_IN_FLIGHT or (
            size_bytes and sum(self._in_flight) + size_bytes > MAX_ATTACHMENT_BYTES
        ):
            self._released.clear()
            await self._released.wait()
        self._in_flight.append(size_bytes)
        self._heard = time.monotonic()

    def _release(self, envelope: link_pb2.Envelope) -> None:
        self._in_flight.remove(envelope.attachment_bytes)
        self._released.set()

    def _send_chunks(self, want: link_pb2.Want) -> None:
        """Send chunks of a payload that is kept; one that is kept no more is not sent, and not missed."""
        if self._outbound.qsize() + len(want.indices) > OUTBOUND_FRAMES:
            raise VerificationError("link.want", "the hub asks for more chunks than it takes")
        answer = self._still_kept(want.message_id)
        for index in want.indices if answer is not None else ():
            if answer is not None and index < len(answer.attachment):
                chunk = link_pb2.Chunk(message_id=want.message_id, index=index, data=answer.attachment[index])
                self._outbound.put_nowait(link_pb2.SiteFrame(chunk=chunk))

    async def _serve(self, envelope: link_pb2.Envelope, attachment: list[bytes]) -> None:
        try:
            answer = await self._answered(envelope, attachment)
        except Exception as error:
            if not self._stop.is_set():
                log.error("a %s request has no answer: %s", envelope.message_type, type(error).__name__)
            return
        finally:
            self._release(envelope)
        if answer is not None and self._outbound.qsize() < OUTBOUND_FRAMES:
            # A hub that does not read gets a reply when it attaches anew and asks again.
            self._outbound.put_nowait(link_pb2.SiteFrame(reply=answer.envelope))
        if self._finished():
            # The last reply is given time to leave before the stream ends.
            await asyncio.sleep(0.2)
            self._stop.set()

    async def _answered(self, envelope: link_pb2.Envelope, attachment: list[bytes]) -> Answer | None:
        """The reply to a request, kept or made now; None while it is being made for an earlier copy."""
        message_id, kind, loop = envelope.message_id, envelope.message_type, asyncio.get_running_loop()
        if message_id in self._working:
            return None
        if (kept := self._still_kept(message_id)) is not None:
            return kept
        self._working[message_id] = envelope.group
        try:
            if kind == messages.CLOSE.message_type:
                self._forget(envelope)
                answer = await loop.run_in_executor(self._urgent, self._compute, envelope, attachment)
            else:
                order = self._orders.setdefault(envelope.group, asyncio.Lock())
                async with order:
                    if kind == messages.READY.message_type:
                        self._forget(envelope)
                    made = loop.run_in_executor(self._executor, self._compute, envelope, attachment)
                    if kind != messages.READY.message_type:
                        await made
                # A computation is waited for outside the order: the start of a newer round ends it.
                answer = await made
        finally:
            wanted = self._working.pop(message_id, None) is not None
        if wanted:
            self._keep(answer)
        return answer

    def _still_kept(self, message_id: str) -> Answer | None:
        """A kept reply, unless it belongs to a round of a study that ended or was stopped here since.

        Guarantee: nothing_kept_leaves_after_a_decision - neither a reply nor a chunk of a payload.
        """
        answer = self._kept.get(message_id)
        if answer is None or not answer.envelope.message_type.startswith("train."):
            return answer
        if not self._may_send(answer.envelope.group):
            del self._kept[message_id]
            return None
        return answer

    def _forget(self, envelope: link_pb2.Envelope) -> None:
        """A new round or the end of a run: nothing of the round before is kept (PROTOCOL I11).

        Guarantee: what_a_close_overtakes_is_not_kept - a payload that is made while its run ends.
        """
        group = envelope.group
        for message_id in [m for m, kept in self._kept.items() if kept.envelope.group == group]:
            del self._kept[message_id]
        for message_id in [m for m, of in self._working.items() if of == group and m != envelope.message_id]:
            del self._working[message_id]

    def _keep(self, answer: Answer) -> None:
        group = answer.envelope.group
        of_group = [m for m, kept in self._kept.items() if kept.envelope.group == group]
        for message_id in of_group[: 1 - KEPT_REPLIES]:
            del self._kept[message_id]
        self._kept[answer.envelope.message_id] = answer
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

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
