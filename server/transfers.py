"""Payloads beside the messages: a model on its way to the sites, uploads fetched from them chunk by chunk.

Source: DESIGN "Built on Flower, carried by gRPC"; PROTOCOL C1. Rules: what goes to the sites is cut while
it is sent, into parts of 256 KiB; the next chunk of an upload is asked for while the last one is added; few
chunks are on their way to the hub at any time, however many sites send; a slow site keeps no other waiting.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from common import link_pb2

PART_SIZE_BYTES: Final = 256 << 10
MAX_FETCHED: Final = 8
PATIENCE_S: Final = 0.5


class Sink(Protocol):
    """Where the payloads of uploads go while they arrive."""

    def header(self, node_id: int, body: bytes) -> Sequence[int]:
        """Check the reply that announces a payload; the chunks still missing. Raises WardroundError."""
        ...

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        """Take one chunk. Raises WardroundError to refuse it."""


def chunk_frames(message_id: str, chunks: Sequence[bytes]) -> Iterator[link_pb2.HubFrame]:
    """What goes beside a request, each frame made when it is sent: many streams take little memory."""
    parts = (
        chunk[at : at + PART_SIZE_BYTES] for chunk in chunks for at in range(0, len(chunk), PART_SIZE_BYTES)
    )
    for index, data in enumerate(parts):
        yield link_pb2.HubFrame(chunk=link_pb2.Chunk(message_id=message_id, index=index, data=data))


@dataclass(eq=False)
class Upload:
    """A payload on its way: the chunks still to be asked for, the one that was, the way to its site."""

    sink: Sink
    reply: link_pb2.Envelope
    missing: deque[int]
    send: Callable[[link_pb2.HubFrame], None]
    asked: int | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing or on its way."""
        return self.asked is None and not self.missing

    def ask(self) -> None:
        """Ask the site for the next chunk that is missing."""
        self.asked = self.missing.popleft()
        want = link_pb2.Want(message_id=self.reply.message_id, indices=[self.asked])
        self.send(link_pb2.HubFrame(want=want))


class Fetching:
    """Whose turn it is to send a chunk. Used from the link's thread only.

    Guarantee: few_chunks_are_on_their_way - MAX_FETCHED, but one asked for PATIENCE_S ago is not waited for.
    """

    def __init__(self) -> None:
        self._turns: deque[Upload] = deque()
        self._asked: dict[Upload, float] = {}
        self._adding = 0

    def go_on(self) -> None:
        """Ask for as many chunks as there is room for."""
        late = time.monotonic() - PATIENCE_S
        while self._turns and self._adding + sum(at > late for at in self._asked.values()) < MAX_FETCHED:
            upload = self._turns.popleft()
            if upload.missing:
                upload.ask()
                self._asked[upload] = time.monotonic()

    def begin(self, upload: Upload) -> None:
        """Queue an upload for its next chunk."""
        if upload.missing:
            self._turns.append(upload)
        self.go_on()

    def arrived(self, upload: Upload) -> None:
        """The chunk that was asked for is here and is now added; the next one may travel meanwhile."""
        upload.asked = None
        self._asked.pop(upload, None)
        self._adding += 1
        self.begin(upload)

    def added(self) -> None:
        """A chunk was added, or refused."""
        self._adding -= 1
        self.go_on()

    def end(self, upload: Upload) -> None:
        """Ask for nothing more of it."""
        upload.missing.clear()
        self._asked.pop(upload, None)
        self.go_on()
