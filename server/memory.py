"""A Grid in this process: apps are called where messages are pushed. For tests, planning and the strategies.

Source: Flower's ``flwr.serverapp.Grid``. Rules: the same methods as the Grid on the link; a payload stays in
its reply, so a sink is never used; nothing is late: a reply is there when the push is over, or never.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from common import flower
from server.waiting import PromptGrid

App: TypeAlias = Callable[[flower.Message], flower.Message]


class MemoryGrid(PromptGrid):
    """``apps`` maps node ids to ClientApps. ``online`` holds the nodes that are there; it may be changed.

    A node that leaves ``online`` while its app answers has died answering: the reply is lost.

    Guarantee: offline_nodes_get_nothing - their apps are not called, and they are not listed.
    """

    def __init__(self, apps: Mapping[int, App]) -> None:
        super().__init__()
        self.online = set(apps)
        self._apps = dict(apps)
        self._numbers = itertools.count(1)

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

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> list[flower.Message]:
        """Push and pull; there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))
