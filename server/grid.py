"""Flower's Grid over the link: what a ServerApp and a Strategy talk to.

Source: Flower's ``flwr.serverapp.Grid``; DESIGN "Built on Flower". Rules: each reply is given out once; the
payload of a reply goes to the sink that was set when its message was pushed, never into the reply; what is
withdrawn, or past its time, is forgotten.
"""

import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.serverapp import Grid

from common import flower, link_pb2
from common.errors import FailureError, UnreachableError
from server.link import Link
from server.transfers import Sink


class GrpcGrid(Grid):
    """The Grid of one study. Attachments of messages are sent in chunks beside them."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._run = flower.empty_run()
        self._condition = threading.Condition()
        self._waiting: dict[str, flower.Message] = {}
        self._expires: dict[str, float] = {}
        self._replies: dict[str, flower.Message] = {}
        self._wakes = 0
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
        """Send messages; their ids in order.

        Guarantee: nothing_is_kept_past_its_time - neither a question nor a reply that nobody fetches.
        """
        message_ids, now = [], time.monotonic()
        with self._condition:
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
            with self._condition:
                self._waiting[message_id] = message
                self._expires[message_id] = now + message.metadata.ttl
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
            found = {m: self._replies[m] for m in message_ids if m in self._replies}
            self._drop(found)
        return list(found.values())

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Send and wait for all replies or for ``timeout`` seconds; what is still open is then withdrawn.

        Raises: UnreachableError when the link stops meanwhile.
        """
        message_ids = list(self.push_messages(messages))
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        with self._condition:
            while waiting := [m for m in message_ids if m not in self._replies]:
                if (left_s := deadline - time.monotonic()) <= 0:
                    break
                self._wait(waiting, left_s)
        self.withdraw(waiting)
        return self.pull_messages(message_ids)

    def wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        """Return when one of these has a reply, at ``wake``, or after ``timeout_s``.

        Raises: UnreachableError when the link stops.
        """
        with self._condition:
            self._wait(message_ids, timeout_s)

    def _wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        wakes = self._wakes
        self._condition.wait_for(
            lambda: (
                self._link.stopped or self._wakes != wakes or not self._replies.keys().isdisjoint(message_ids)
            ),
            timeout_s,
        )
        if self._link.stopped:
            raise UnreachableError("link.stopped", "the hub's link has been stopped")

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Wait no more for these: late replies and their payloads are dropped."""
        with self._condition:
            self._drop(message_ids)
        if message_ids:
            self._link.withdraw(message_ids)

    def _drop(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            for known in (self._waiting, self._replies, self._expires):
                known.pop(message_id, None)

    def wake(self) -> None:
        """End every wait at once."""
        with self._condition:
            self._wakes += 1
            self._condition.notify_all()
