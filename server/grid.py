"""Flower's Grid over the link: what a ServerApp and a Strategy talk to.

Source: Flower's ``flwr.serverapp.Grid``; DESIGN "Built on Flower". Rules: each reply is given out once; the
payload of a reply goes to the sink that was set when its message was pushed, never into the reply; what is
withdrawn, or past its time, is forgotten.
"""

import threading
import time
import uuid
from collections.abc import Iterable, Sequence

from common import flower, link_pb2
from common.errors import UnreachableError
from server.link import Link
from server.transfers import Sink
from server.waiting import PromptGrid


class GrpcGrid(PromptGrid):
    """The Grid of one study. Attachments of messages are sent in chunks beside them."""

    sink: Sink | None = None

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self._waiting: dict[str, flower.Message] = {}
        self._expires: dict[str, float] = {}
        link.wake_on_stop(self._changed)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the sites whose stream is open, ascending."""
        return sorted(self._link.online())

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Send messages; their ids in order.

        Guarantee: nothing_is_kept_past_its_time - neither a question nor a reply that nobody fetches.
        """
        message_ids, now = [], time.monotonic()
        with self._changed:
            self._drop([m for m, expires in self._expires.items() if expires < now])
        for message in messages:
            message_id = uuid.uuid4().hex
            attachment = flower.attachment_of(message)
            envelope = link_pb2.Envelope(
                message_id=message_id,
                message_type=message.metadata.message_type,
                group=message.metadata.group_id,
                body=flower.body_of(message),
                attachment_bytes=sum(map(len, attachment)),
                ttl_s=message.metadata.ttl,
            )
            flower.with_id(message, message_id)
            with self._changed:
                self._waiting[message_id] = message
                self._expires[message_id] = now + message.metadata.ttl
            self._link.request(message.metadata.dst_node_id, envelope, attachment, self.sink, self._deliver)
            message_ids.append(message_id)
        return message_ids

    def _deliver(self, envelope: link_pb2.Envelope) -> None:
        with self._changed:
            request = self._waiting.pop(envelope.message_id, None)
            if request is not None:
                self._replies[envelope.message_id] = flower.reply(request, envelope.body)
                self._changed.notify_all()

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Send and wait for all replies or for ``timeout`` seconds; what is still open is then withdrawn.

        Raises: UnreachableError when the link stops meanwhile.
        """
        message_ids = list(self.push_messages(messages))
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        with self._changed:
            while waiting := [m for m in message_ids if m not in self._replies]:
                if (left_s := deadline - time.monotonic()) <= 0:
                    break
                self.wait(waiting, left_s)
        self.withdraw(waiting)
        return self.pull_messages(message_ids)

    def wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        """As PromptGrid. Raises UnreachableError when the link stops."""
        super().wait(message_ids, timeout_s)
        if self._over:
            raise UnreachableError("link.stopped", "the hub's link has been stopped")

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """As PromptGrid, at the link too."""
        super().withdraw(message_ids)
        if message_ids:
            self._link.withdraw(message_ids)

    @property
    def _over(self) -> bool:
        return self._link.stopped

    def _drop(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            for known in (self._waiting, self._replies, self._expires):
                known.pop(message_id, None)
