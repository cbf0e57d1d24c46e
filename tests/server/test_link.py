"""The link over real gRPC and mutual TLS on loopback: who gets in, what crosses, what is refused."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from client.agent import Agent
from common import flower, link_pb2, link_pb2_grpc
from common.certificates import Peer
from common.errors import FailureError, RefusedError, VerificationError
from server.link import GrpcGrid, Link
from tests.conftest import Credentials, Pki

TIMEOUT_S = 10.0


class Collected:
    """A sink that keeps what it is given."""

    def __init__(self, refuse: str = "") -> None:
        self.headers: list[tuple[int, bytes]] = []
        self.chunks: list[tuple[int, int, bytes]] = []
        self.refuse = refuse

    def header(self, node_id: int, body: bytes) -> None:
        if self.refuse == "header":
            raise VerificationError("test.header", "refused")
        self.headers.append((node_id, body))

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        if self.refuse == "chunk":
            raise VerificationError("test.chunk", "refused")
        self.chunks.append((node_id, index, data))


@contextmanager
def running_link(pki: Pki, admit: Callable[[Peer], None] = lambda _peer: None) -> Iterator[Link]:
    server = pki.server()
    link = Link(
        "127.0.0.1:0",
        key_pem=server.key_pem,
        certificate_pem=server.certificate_pem,
        authority_pem=server.authority_pem,
        admit=admit,
    )
    link.start()
    try:
        yield link
    finally:
        link.stop()


class RunningAgent:
    """An agent in a thread, for as long as the block lasts."""

    def __init__(
        self,
        link: Link,
        credentials: Credentials,
        site_id: int,
        answer: Callable[[flower.Message], flower.Message],
    ) -> None:
        self.error: BaseException | None = None
        self._ready = threading.Event()
        self._arguments = (link, credentials, site_id, answer)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        link, credentials, site_id, answer = self._arguments
        self.loop = asyncio.get_running_loop()
        self.agent = Agent(
            f"127.0.0.1:{link.port}",
            site_id=site_id,
            key_pem=credentials.key_pem,
            certificate_pem=credentials.certificate_pem,
            authority_pem=credentials.authority_pem,
            answer=answer,
        )
        self._ready.set()
        try:
            await self.agent.run()
        except RefusedError as error:
            self.error = error

    def __enter__(self) -> "RunningAgent":
        self._thread.start()
        assert self._ready.wait(TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.agent.stop)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)


def echo(message: flower.Message) -> flower.Message:
    """Reply with the body reversed and the attachment as it came."""
    return flower.reply(message, flower.body_of(message)[::-1], flower.attachment_of(message))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def ask(grid: GrpcGrid, node_id: int, body: bytes, chunks: tuple[bytes, ...] = ()) -> list[flower.Message]:
    message = flower.instruction(node_id, "query.keys", body, attachment=chunks, ttl_s=60)
    return list(grid.send_and_receive([message], timeout=TIMEOUT_S))


def test_a_request_and_its_attachment_come_back_through_the_sink(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(3), 3, echo):
        grid = GrpcGrid(link)
        grid.sink = sink = Collected()
        wait_until(lambda: 3 in link.online())
        data = bytes(range(256)) * 10_000
        replies = ask(grid, 3, b"hello", flower.chunks(data))
        assert [flower.body_of(reply) for reply in replies] == [b"olleh"]
        assert flower.attachment_of(replies[0]) == []
        assert sink.headers == [(3, b"olleh")]
        assert [index for _, index, _ in sink.chunks] == list(range(len(sink.chunks)))
        assert b"".join(chunk for _, _, chunk in sink.chunks) == data


def test_several_sites_answer_side_by_side(pki: Pki) -> None:
    with (
        running_link(pki) as link,
        RunningAgent(link, pki.client(1), 1, echo),
        RunningAgent(link, pki.client(2, "Northgate"), 2, echo),
    ):
        wait_until(lambda: set(link.online()) == {1, 2})
        grid = GrpcGrid(link)
        assert list(grid.get_node_ids()) == [1, 2]
        messages = [
            flower.instruction(i, "query.keys", bytes([i]), ttl_s=60) for i in (1, 2) for _ in range(20)
        ]
        replies = list(grid.send_and_receive(messages, timeout=TIMEOUT_S))
        assert [reply.metadata.src_node_id for reply in replies] == [1] * 20 + [2] * 20


def test_a_request_to_an_absent_site_waits_for_it(pki: Pki) -> None:
    with running_link(pki) as link:
        grid = GrpcGrid(link)
        message_ids = list(grid.push_messages([flower.instruction(5, "query.keys", b"later", ttl_s=60)]))
        assert list(grid.pull_messages(message_ids)) == []
        with RunningAgent(link, pki.client(5), 5, echo):
            found: list[flower.Message] = []
            wait_until(lambda: bool(found.extend(grid.pull_messages(message_ids)) or found))
            assert flower.body_of(found[0]) == b"retal"
            assert list(grid.pull_messages(message_ids)) == []


def test_a_timeout_gives_what_came_and_withdraws_the_rest(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        messages = [flower.instruction(i, "query.keys", b"x", ttl_s=60) for i in (1, 9)]
        replies = list(grid.send_and_receive(messages, timeout=0.5))
        assert [reply.metadata.src_node_id for reply in replies] == [1]


def test_only_the_roster_attaches(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    def admit(peer: Peer) -> None:
        raise RefusedError("link.wrong-key", f"the certificate of site {peer.number} holds another key")

    with caplog.at_level(logging.WARNING), running_link(pki, admit) as link:
        with RunningAgent(link, pki.client(7), 7, echo) as agent:
            agent.join()
            assert isinstance(agent.error, RefusedError)
            assert "holds another key" in str(agent.error)
        assert link.online() == {}
    assert any("refused at the link" in r.message and "site 7" in r.message for r in caplog.records)


def test_a_coordinator_certificate_cannot_attach_as_a_site(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1, "c", "coordinator"), 1, echo) as agent:
        agent.join()
        assert isinstance(agent.error, RefusedError)
        assert "coordinator" in str(agent.error)


def _attach_once(link: Link, credentials: Credentials | None, authority_pem: bytes) -> grpc.StatusCode:
    channel_credentials = grpc.ssl_channel_credentials(
        authority_pem,
        credentials.key_pem if credentials else None,
        credentials.certificate_pem if credentials else None,
    )
    with grpc.secure_channel(f"127.0.0.1:{link.port}", channel_credentials) as channel:
        call = link_pb2_grpc.LinkStub(channel).Attach(iter([]), timeout=5)
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
        return raised.value.code()


def test_no_certificate_and_a_foreign_certificate_fail_in_the_handshake(pki: Pki) -> None:
    with running_link(pki) as link:
        authority = pki.server().authority_pem
        assert _attach_once(link, None, authority) == grpc.StatusCode.UNAVAILABLE
        assert _attach_once(link, Pki().client(1), authority) == grpc.StatusCode.UNAVAILABLE


def test_a_hub_with_another_authority_is_refused_by_the_agent(pki: Pki) -> None:
    stranger = Pki().client(1)
    with running_link(pki) as link, RunningAgent(link, stranger, 1, echo):
        time.sleep(0.5)
        assert link.online() == {}


def test_a_second_agent_with_one_identity_is_refused(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        with caplog.at_level(logging.WARNING):
            assert (
                _attach_once(link, pki.client(1), pki.server().authority_pem)
                == grpc.StatusCode.ALREADY_EXISTS
            )
    assert any("second agent" in record.message for record in caplog.records)


@pytest.mark.parametrize("where", ["header", "chunk"])
def test_what_the_sink_refuses_ends_the_stream_and_nothing_else(pki: Pki, where: str) -> None:
    with (
        running_link(pki) as link,
        RunningAgent(link, pki.client(1), 1, echo),
        RunningAgent(link, pki.client(2, "Northgate"), 2, echo),
    ):
        wait_until(lambda: set(link.online()) == {1, 2})
        grid = GrpcGrid(link)
        grid.sink = Collected(refuse=where)
        message = flower.instruction(1, "query.keys", b"x", attachment=(b"data",), ttl_s=60)
        assert list(grid.send_and_receive([message], timeout=0.5)) == []
        assert [flower.body_of(reply) for reply in ask(grid, 2, b"ab")] == [b"ba"]


def test_an_attachment_without_a_sink_is_refused(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        message = flower.instruction(1, "query.keys", b"x", attachment=(b"data",), ttl_s=60)
        assert list(grid.send_and_receive([message], timeout=0.5)) == []


def test_the_same_request_sent_again_gets_the_kept_reply(pki: Pki) -> None:
    calls: list[bytes] = []

    def count(message: flower.Message) -> flower.Message:
        calls.append(flower.body_of(message))
        return flower.reply(message, hashlib.sha256(str(len(calls)).encode()).digest())

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, count):
        wait_until(lambda: 1 in link.online())
        got: list[bytes] = []
        envelope = link_pb2.Envelope(message_id="same", message_type="query.keys", body=b"x", ttl_s=60)
        for expected in (1, 2):
            link.request(1, envelope, None, None, lambda reply: got.append(reply.body))
            wait_until(lambda expected=expected: len(got) == expected)  # type: ignore[misc]
        assert len(calls) == 1
        assert got[0] == got[1]


def test_a_port_in_use_is_a_clear_error(pki: Pki) -> None:
    with running_link(pki) as link:
        server = pki.server()
        second = Link(
            f"127.0.0.1:{link.port}",
            key_pem=server.key_pem,
            certificate_pem=server.certificate_pem,
            authority_pem=server.authority_pem,
            admit=lambda _peer: None,
        )
        with pytest.raises(FailureError, match="cannot listen"):
            second.start()
        second.stop()


def test_a_new_round_forgets_the_replies_before_it(pki: Pki) -> None:
    calls: list[bytes] = []

    def count(message: flower.Message) -> flower.Message:
        calls.append(flower.body_of(message))
        return flower.reply(message, b"reply")

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, count):
        wait_until(lambda: 1 in link.online())
        got: list[bytes] = []
        kinds = ("train.open", "train.open", "train.ready", "train.open")
        for number, (kind, name) in enumerate(zip(kinds, ("o", "o", "r", "o"), strict=True), start=1):
            envelope = link_pb2.Envelope(message_id=name, message_type=kind, body=name.encode(), ttl_s=60)
            link.request(1, envelope, None, None, lambda reply: got.append(reply.body))
            wait_until(lambda number=number: len(got) == number)  # type: ignore[misc]
        assert calls == [b"o", b"r", b"o"]
