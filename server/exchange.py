"""Questions about one study to its hospitals, over any Grid: sent together, answered one by one.

Source: DESIGN "Built on Flower"; PROTOCOL C1, C4. Rules: a reply that does not verify counts as missing and
is logged with the reason, in one line; each reply is used as it comes; a question ends with the last reply,
at its time, or when its asker has enough, and late replies are dropped; an ended study stops at once.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from flwr.serverapp import Grid

from common import flower, messages
from common.errors import FailureError, WardroundError
from common.messages import Kind, Reply, Request
from common.secagg.records import Record
from server.waiting import PromptGrid

log = logging.getLogger("wardround.hub.rounds")

R = TypeVar("R", bound=Record)
Answer = tuple[int, Reply, Sequence[bytes]]
Take = Callable[[int, tuple[Record, ...]], object]

LOOK_PERIOD_S: Final = 0.5
POLL_PERIOD_S: Final = 0.05
PUSH_TTL_S: Final = 60.0


class Exchange:
    """Asks the hospitals of one study.

    ``names`` maps site ids to names for the log; ``going_on`` raises when the study is not to go on and is
    called at least every half second; ``man`` is the manifest's digest.
    """

    def __init__(
        self, grid: Grid, man: bytes, names: Mapping[int, str], going_on: Callable[[], object]
    ) -> None:
        self.grid, self.names = grid, names
        self._man, self._going_on = man, going_on

    def online(self) -> list[int]:
        """Members that are attached, ascending."""
        return sorted(set(self.grid.get_node_ids()) & set(self.names))

    def pause(self, seconds: float) -> None:
        """Wait, unless the study is not to go on."""
        self._going_on()
        time.sleep(seconds)

    def name(self, site: int) -> str:
        """How the log calls a site of this study."""
        return f"study {self._man.hex()[:12]}, site {site} {self.names.get(site, '?')!r}"

    def request(self, kind: Kind, *parts: Record, document: bytes = b"") -> Request:
        """A request about this study."""
        return Request(kind, self._man, tuple(parts), document)

    def ask(
        self,
        kind: Kind,
        requests: Mapping[int, Request],
        timeout_s: float,
        *,
        attachment: Sequence[bytes] = (),
        until: Callable[[], float] = lambda: math.inf,
    ) -> Iterator[Answer]:
        """Send one request to each site and give what verifies as a reply of that kind, as it comes.

        ``until`` is asked again and again for the monotonic time at which to stop waiting, if that is sooner.
        """
        deadline = time.monotonic() + timeout_s
        wanted = [self._message(site, request, timeout_s, attachment) for site, request in requests.items()]
        waiting = dict(zip(self.grid.push_messages(wanted), requests, strict=True))
        try:
            while waiting and (left_s := min(deadline, until()) - time.monotonic()) > 0:
                self._wait(list(waiting), min(left_s, LOOK_PERIOD_S))
                self._going_on()
                for message in self.grid.pull_messages(list(waiting)):
                    site = waiting.pop(message.metadata.reply_to_message_id)
                    try:
                        reply = messages.decode_reply(kind.message_type, flower.body_of(message))
                        chunks = flower.attachment_of(message)
                    except WardroundError as error:
                        log.warning(
                            "%s: a reply to %s was dropped: %s", self.name(site), kind.message_type, error
                        )
                        continue
                    yield site, reply, chunks
        finally:
            if waiting and isinstance(self.grid, PromptGrid):
                self.grid.withdraw(list(waiting))
        for site in sorted(waiting.values()):
            log.info("%s: no reply to %s", self.name(site), kind.message_type)

    def collect(
        self,
        kind: Kind,
        requests: Mapping[int, Request],
        timeout_s: float,
        take: Take,
        *,
        attachment: Sequence[bytes] = (),
        enough: Callable[[], bool] = lambda: False,
        least: int = 0,
        late_s: float = 0.0,
        unavailable: set[int] | None = None,
    ) -> None:
        """Ask, and hand each available reply to ``take``; what it refuses counts as missing.

        ``unavailable`` grows by the sites that say they are; when fewer than ``least`` are left nobody is
        waited for. Once ``enough`` says so the others have ``late_s`` more.
        """
        unavailable, end = set() if unavailable is None else unavailable, math.inf

        def until() -> float:
            nonlocal end
            if len(requests) - len(unavailable) < least:
                return 0.0
            if enough() and end == math.inf:
                end = time.monotonic() + late_s
            return end

        for site, reply, _ in self.ask(kind, requests, timeout_s, attachment=attachment, until=until):
            if not reply.available:
                log.info("%s: unavailable for %s", self.name(site), kind.message_type)
                unavailable.add(site)
                continue
            try:
                take(site, reply.records)
            except WardroundError as error:
                log.warning("%s: refused: %s", self.name(site), error)

    def tell(self, kind: Kind, sites: Iterable[int], *parts: Record) -> None:
        """Push a message whose reply nobody waits for."""
        request = self.request(kind, *parts)
        self.grid.push_messages([self._message(site, request, PUSH_TTL_S) for site in sites])

    def _message(
        self, site: int, request: Request, ttl_s: float, attachment: Sequence[bytes] = ()
    ) -> flower.Message:
        body, kind = messages.encode_request(request), request.kind.message_type
        group = request.man.hex()
        return flower.instruction(site, kind, body, group=group, attachment=attachment, ttl_s=ttl_s)

    def _wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        if isinstance(self.grid, PromptGrid):
            self.grid.wait(message_ids, timeout_s)
        else:
            time.sleep(min(timeout_s, POLL_PERIOD_S))


def only(found: tuple[Record, ...], kind: type[R]) -> R:
    """The one record of a reply. Raises FailureError for another type."""
    return every(found, kind)[0]


def every(found: tuple[Record, ...], kind: type[R]) -> tuple[R, ...]:
    """The records of a reply. Raises FailureError for another type."""
    if not all(isinstance(record, kind) for record in found):
        raise FailureError("rounds.record", f"a reply must hold {kind.__name__} records")
    return found  # type: ignore[return-value]
