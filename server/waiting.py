"""What the Grids of this hub share: replies that somebody waits for, given out once, or forgotten.

Source: Flower's ``flwr.serverapp.Grid``. Rules: a reply is kept until it is pulled or withdrawn; who waits
is woken by a reply, by ``wake`` and when no reply can come any more.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.serverapp import Grid

from common import flower
from common.errors import FailureError


class PromptGrid(Grid):
    """A Grid that can wait for replies and forget questions, as ours do and Flower's own do not."""

    sink: Any = None

    def __init__(self) -> None:
        flower.assume_identity(flower.HUB_NODE_ID)
        self._run = flower.empty_run()
        self._changed = threading.Condition()
        self._replies: dict[str, flower.Message] = {}
        self._wakes = 0

    def set_run(self, run: flower.Run) -> None:
        """Remember the run. One Grid serves one run."""
        self._run = run

    @property
    def run(self) -> flower.Run:
        """The run set last, at first an empty one."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> flower.Message:
        """Not offered: Flower deprecates it in favour of ``Message(...)``. Raises FailureError."""
        problem = "Grid.create_message is deprecated; construct a Message instead"
        raise FailureError("link.create-message", problem)

    def pull_messages(self, message_ids: Iterable[str]) -> list[flower.Message]:
        """The replies to these that have come and have not been pulled yet."""
        with self._changed:
            found = {m: self._replies[m] for m in message_ids if m in self._replies}
            self._drop(found)
        return list(found.values())

    def wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        """Return when one of these has a reply, at ``wake``, or after ``timeout_s``."""
        with self._changed:
            wakes = self._wakes
            self._changed.wait_for(
                lambda: (
                    self._over or self._wakes != wakes or not self._replies.keys().isdisjoint(message_ids)
                ),
                timeout_s,
            )

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Wait no more for these: late replies and their payloads are dropped."""
        with self._changed:
            self._drop(message_ids)

    def wake(self) -> None:
        """End every ``wait`` at once."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    @property
    def _over(self) -> bool:
        """Whether no reply can come any more."""
        return False

    def _drop(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._replies.pop(message_id, None)
