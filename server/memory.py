"""A Grid in this process: apps are called where messages are pushed. For tests, planning and the strategies.

Source: Flower's ``flwr.serverapp.Grid``. Rules: the same methods as the Grid on the link; a payload stays in
its reply, so a sink is never used; nothing is late: a reply is there when the push is over, or never.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from flwr.serverapp import Grid

from common import flower
from common.errors import FailureError

App: TypeAlias = Callable[[flower.Message], flower.Message]


class MemoryGrid(Grid):
    """``apps`` maps node ids to ClientApps. ``online`` holds the nodes that are there; it may be changed.

    A node that leaves ``online`` while its app answers has died answering: the reply is lost.

    Guarantee: offline_nodes_get_nothing - their apps are not called, and they are not listed.
    """

    sink: object = None

    def __init__(self, apps: Mapping[int, App]) -> None:
        flower.assume_identity(flower.HUB_NODE_ID)
        self.online = set(apps)
        self._apps = dict(apps)
        self._run = flower.empty_run()
        self._numbers = itertools.count(1)
        self._replies: dict[str, flower.Message] = {}
        self._changed = threading.Condition()
        self._wakes = 0

    def set_run(self, run: flower.Run) -> None:
        """Remember the run."""
        self._run = run

    @property
    def run(self) -> flower.Run:
        """The run set last, at first an empty one."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> flower.Message:
        """Deprecated by Flower. Raises FailureError."""
        raise FailureError("memory.message", "messages are made by common.flower")

    def get_node_ids(self) -> list[int]:
        """The nodes that are online, ascending."""
        return sorted(self.online)

    def push_messages(self, messages: Iterable[flower.Message]) -> list[str]:
        """Call the app of each message's node, one after the other, in this thread; ids in their order."""
        message_ids = []
        for message in messages:
            message_id, node = str(next(self._numbers)), message.metadata.dst_node_id
            message_ids.append(message_id)
            if node not in self.online:
                continue
            reply = self._apps[node](flower.with_id(message, message_id))
            with self._changed:
                if node in self.online:
                    self._replies[message_id] = reply
                    self._changed.notify_all()
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[flower.Message]:
        """The replies to these that have not been pulled yet."""
        with self._changed:
            return [self._replies.pop(found) for found in message_ids if found in self._replies]

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> list[flower.Message]:
        """Push and pull; there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))

    def wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        """Return when one of these has a reply, at ``wake``, or after ``timeout_s``."""
        with self._changed:
            wakes = self._wakes
            self._changed.wait_for(
                lambda: self._wakes != wakes or not self._replies.keys().isdisjoint(message_ids), timeout_s
            )

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Drop the replies to these."""
        self.pull_messages(message_ids)

    def wake(self) -> None:
        """End every ``wait`` at once."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()
