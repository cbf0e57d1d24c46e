"""The link over real gRPC and mutual TLS on loopback: who gets in, what crosses, what is refused."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest

from client import agent as agent_module
from client.agent import Agent, Answer
from common import flower, link_pb2, link_pb2_grpc
from common.certificates import Peer
from common.errors import FailureError, RefusedError, UnreachableError, VerificationError
from server import link as link_module
from server.grid import GrpcGrid
from server.link import Link
from server.transfers import PART_SIZE_BYTES
from tests.conftest import Credentials, Pki
from tests.cutting import CuttingProxy

TIMEOUT_S = 10.0


class Collected:
    """A sink that keeps what it is given, of a payload of ``count`` chunks."""

    def __init__(self, count: int = 1, refuse: str = "", slow_s: float = 0.0) -> None:
        self.headers: list[tuple[int, bytes]] = []
        self.chunks: list[tuple[int, int, bytes]] = []
        self.count = count
        self.refuse = refuse
        self.slow_s = slow_s

    def header(self, node_id: int, body: bytes) -> list[int]:
        if self.refuse == "header":
            raise VerificationError("test.header", "refused")
        self.headers.append((node_id, body))
        return [index for index in range(self.count) if index not in {i for _, i, _ in self.chunks}]

    def chunk(self, node_id: int, index: int, data: bytes) -> None:
        if self.refuse == "chunk":
            raise VerificationError("test.chunk", "refused")
        time.sleep(self.slow_s)
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
        port: int = 0,
        **hooks: Any,
    ) -> None:
        self.error: BaseException | None = None
        self._ready = threading.Event()
        self._arguments = (port or link.port, credentials, site_id, answer)
        self._hooks = hooks
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        port, credentials, site_id, answer = self._arguments
        self.loop = asyncio.get_running_loop()
        self.agent = Agent(
            f"127.0.0.1:{port}",
            site_id=site_id,
            key_pem=credentials.key_pem,
            certificate_pem=credentials.certificate_pem,
            authority_pem=credentials.authority_pem,
            answer=answer,
            **self._hooks,
        )
        self._ready.set()
        try:
            await self.agent.run()
        except RefusedError as error:
            self.error = error

    def __enter__(self) -> "RunningAgent":
        self.thread.start()
        assert self._ready.wait(TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.agent.stop)
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()

    def join(self) -> None:
        self.thread.join(TIMEOUT_S)


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
        data = bytes(range(256)) * 10_000
        grid.sink = sink = Collected(-(-len(data) // PART_SIZE_BYTES))
        wait_until(lambda: 3 in link.online())
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
def test_what_the_sink_refuses_ends_that_upload_and_nothing_else(pki: Pki, where: str) -> None:
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
        # A site that raced an attempt that was given up stays attached.
        assert [flower.body_of(reply) for reply in ask(grid, 1, b"ab")] == [b"ba"]


def test_an_attachment_without_a_sink_is_refused(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        message = flower.instruction(1, "query.keys", b"x", attachment=(b"data",), ttl_s=60)
        assert list(grid.send_and_receive([message], timeout=0.5)) == []


def test_replies_are_idempotent(pki: Pki) -> None:
    calls: list[bytes] = []

    def count(message: flower.Message) -> flower.Message:
        calls.append(flower.body_of(message))
        return flower.reply(message, hashlib.sha256(str(len(calls)).encode()).digest())

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, count):
        wait_until(lambda: 1 in link.online())
        got: list[bytes] = []
        envelope = link_pb2.Envelope(message_id="same", message_type="query.keys", body=b"x", ttl_s=60)
        for expected in (1, 2):
            link.request(1, envelope, (), None, lambda reply: got.append(reply.body))
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
            link.request(1, envelope, (), None, lambda reply: got.append(reply.body))
            wait_until(lambda number=number: len(got) == number)  # type: ignore[misc]
        assert calls == [b"o", b"r", b"o"]


def upload(grid: GrpcGrid, size: int, timeout_s: float = TIMEOUT_S) -> list[flower.Message]:
    """Ask site 1 for a payload of that many bytes: it sends zeros (see ``payload``)."""
    message = flower.instruction(1, "train.upload", str(size).encode(), group="study", ttl_s=60)
    return list(grid.send_and_receive([message], timeout=timeout_s))


def payload(message: flower.Message) -> flower.Message:
    """Reply with as many bytes as the body says."""
    return flower.reply(message, b"header", flower.chunks(bytes(int(flower.body_of(message)))))


def test_a_half_sent_upload_resumes(pki: Pki) -> None:
    """Cut five times, a payload crosses once: no chunk that was added is asked for again."""
    size, mib = 40 << 20, 1 << 20
    with running_link(pki) as link:
        proxy = CuttingProxy(link.port, [4 * mib, 11 * mib, 19 * mib, 30 * mib, 41 * mib])
        calls: list[str] = []

        def once(message: flower.Message) -> flower.Message:
            calls.append(message.metadata.message_type)
            return payload(message)

        try:
            with RunningAgent(link, pki.client(1), 1, once, port=proxy.port):
                wait_until(lambda: 1 in link.online())
                grid = GrpcGrid(link)
                grid.sink = sink = Collected(40)
                assert len(upload(grid, size, 30)) == 1
        finally:
            proxy.close()
    assert proxy.cut == 5
    assert calls == ["train.upload"]
    assert len(sink.headers) == 6
    assert sorted(index for _, index, _ in sink.chunks) == list(range(40))
    # At most the chunk in flight is lost by a cut.
    assert proxy.sent <= size * 1.01 + 5 * (mib + (64 << 10))


def test_payloads_are_fetched_not_pushed(pki: Pki) -> None:
    """A slow hub is not sent more than the chunk it asked for: memory and cuts cost one chunk."""
    with running_link(pki) as link:
        proxy = CuttingProxy(link.port, [])
        try:
            with RunningAgent(link, pki.client(1), 1, payload, port=proxy.port):
                wait_until(lambda: 1 in link.online())
                grid = GrpcGrid(link)
                grid.sink = sink = Collected(30, slow_s=0.05)
                message = flower.instruction(1, "train.upload", str(30 << 20).encode(), ttl_s=60)
                (message_id,) = grid.push_messages([message])
                wait_until(lambda: len(sink.chunks) >= 5)
                ahead = proxy.sent / (1 << 20) - len(sink.chunks)
                grid.withdraw([message_id])
                assert ahead < 3
        finally:
            proxy.close()


def test_what_is_withdrawn_is_dropped_with_its_late_chunks(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, payload):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        grid.sink = sink = Collected(30, slow_s=0.02)
        (message_id,) = grid.push_messages(
            [flower.instruction(1, "train.upload", str(30 << 20).encode(), ttl_s=60)]
        )
        wait_until(lambda: len(sink.chunks) >= 2)
        grid.withdraw([message_id])
        time.sleep(0.1)
        added = len(sink.chunks)
        time.sleep(0.3)
        assert len(sink.chunks) == added < 30
        assert list(grid.pull_messages([message_id])) == []
        # The site serves what comes next.
        grid.sink = Collected(1)
        assert len(upload(grid, 10)) == 1


def test_silent_sites_are_offline(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site whose stream is open and says nothing: offline after the limit, then cut, then back."""
    monkeypatch.setattr(link_module, "OFFLINE_S", 1.0)
    monkeypatch.setattr(link_module, "LOOK_PERIOD_S", 0.1)
    with running_link(pki) as link:
        silent = threading.Event()
        with RunningAgent(link, pki.client(1), 1, echo) as running:
            wait_until(lambda: 1 in link.online())

            def stand_still() -> None:
                silent.set()
                time.sleep(2.5)

            running.loop.call_soon_threadsafe(stand_still)
            assert silent.wait(TIMEOUT_S)
            began = time.monotonic()
            wait_until(lambda: 1 not in link.online())
            assert time.monotonic() - began < 2.0
            wait_until(lambda: 1 in link.online())
            assert [flower.body_of(r) for r in ask(GrpcGrid(link), 1, b"ab")] == [b"ba"]


def test_a_silent_hub_is_left_and_tried_again(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent_module, "SILENCE_S", 1.0)
    caplog.set_level(logging.INFO)
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        assert link._loop is not None
        link._loop.call_soon_threadsafe(time.sleep, 2.0)
        wait_until(lambda: any("the hub was silent for 1 s" in r.message for r in caplog.records))
        wait_until(lambda: sum("attached to the hub" in r.message for r in caplog.records) >= 2)
        assert [flower.body_of(r) for r in ask(GrpcGrid(link), 1, b"ab")] == [b"ba"]


def test_a_restarted_hub_has_its_agents_back_soon(pki: Pki) -> None:
    server = pki.server()

    def start(address: str) -> Link:
        link = Link(
            address,
            key_pem=server.key_pem,
            certificate_pem=server.certificate_pem,
            authority_pem=server.authority_pem,
            admit=lambda _peer: None,
        )
        link.start()
        return link

    first = start("127.0.0.1:0")
    with ExitStack() as agents:
        for site in (1, 2, 3):
            agents.enter_context(RunningAgent(first, pki.client(site, f"Site {site}"), site, echo))
        wait_until(lambda: set(first.online()) == {1, 2, 3})
        first.stop()
        second = start(f"127.0.0.1:{first.port}")
        try:
            wait_until(lambda: set(second.online()) == {1, 2, 3})
            assert len(ask(GrpcGrid(second), 2, b"ab")) == 1
        finally:
            second.stop()


def test_a_revoked_stream_is_cut_at_once(pki: Pki) -> None:
    """In the middle of a transfer too; then ``admit`` decides."""
    revoked = threading.Event()

    def admit(peer: Peer) -> None:
        if revoked.is_set():
            raise RefusedError("enrolment.revoked", "the admission was revoked")

    with running_link(pki, admit) as link, RunningAgent(link, pki.client(1), 1, payload) as running:
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        grid.sink = sink = Collected(200, slow_s=0.02)
        grid.push_messages([flower.instruction(1, "train.upload", str(200 << 20).encode(), ttl_s=60)])
        wait_until(lambda: len(sink.chunks) >= 2)
        revoked.set()
        link.disconnect(1)
        wait_until(lambda: 1 not in link.online())
        running.join()
        assert isinstance(running.error, RefusedError)
        assert "was revoked" in running.error.problem
        time.sleep(0.1)
        added = len(sink.chunks)
        time.sleep(0.2)
        assert len(sink.chunks) == added < 200


def test_a_stream_that_fell_silent_does_not_lock_its_site_out(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "REPLACED_S", 0.3)
    credentials = pki.client(1)
    channel_credentials = grpc.ssl_channel_credentials(
        credentials.authority_pem, credentials.key_pem, credentials.certificate_pem
    )
    with (
        running_link(pki) as link,
        grpc.secure_channel(f"127.0.0.1:{link.port}", channel_credentials) as channel,
    ):
        held = threading.Event()

        def greet_and_stay() -> Iterator[link_pb2.SiteFrame]:
            yield link_pb2.SiteFrame(greeting=link_pb2.Greeting(protocol_version=1))
            held.wait(TIMEOUT_S)

        old = link_pb2_grpc.LinkStub(channel).Attach(greet_and_stay())
        next(old)
        wait_until(lambda: 1 in link.online())
        time.sleep(0.5)
        with RunningAgent(link, credentials, 1, echo):
            wait_until(lambda: link.online().get(1, 9.0) < 0.3)
            assert [flower.body_of(r) for r in ask(GrpcGrid(link), 1, b"ab")] == [b"ba"]
            with pytest.raises(grpc.RpcError):
                list(old)
            assert 1 in link.online()
        held.set()


def test_requests_of_a_study_keep_their_order_and_others_do_not_wait(pki: Pki) -> None:
    """Studies run side by side, each in order; the end of a study overtakes what it still computes."""
    release = threading.Event()
    begun: list[str] = []

    def answer(message: flower.Message) -> flower.Message:
        body = flower.body_of(message)
        begun.append(body.decode())
        if body == b"slow":
            release.wait(TIMEOUT_S)
        return flower.reply(message, body)

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, answer):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)

        def push(kind: str, group: str, body: bytes) -> str:
            (message_id,) = grid.push_messages([flower.instruction(1, kind, body, group=group, ttl_s=60)])
            return message_id

        slow, after = push("train.upload", "a", b"slow"), push("query.keys", "a", b"after")
        other, close = push("query.keys", "b", b"other"), push("query.close", "a", b"close")
        found: list[bytes] = []
        wait_until(
            lambda: bool(
                found.extend(map(flower.body_of, grid.pull_messages([other, close]))) or len(found) == 2
            )
        )
        assert sorted(found) == [b"close", b"other"]
        assert sorted(begun) == ["close", "other", "slow"]
        release.set()
        found.clear()
        wait_until(
            lambda: bool(
                found.extend(map(flower.body_of, grid.pull_messages([slow, after]))) or len(found) == 2
            )
        )
        assert begun.index("slow") < begun.index("after")


def test_a_newer_round_does_not_wait_for_an_older_computation(pki: Pki) -> None:
    """The site can only end the older one if the newer one's start reaches it."""
    newer = threading.Event()

    def answer(message: flower.Message) -> flower.Message:
        body = flower.body_of(message)
        if body == b"2":
            newer.set()
        return flower.reply(message, body if newer.wait(TIMEOUT_S) else b"waited")

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, answer):
        wait_until(lambda: 1 in link.online())
        messages = [flower.instruction(1, "train.ready", body, group="a", ttl_s=60) for body in (b"1", b"2")]
        replies = GrpcGrid(link).send_and_receive(messages, timeout=TIMEOUT_S)
        assert [flower.body_of(reply) for reply in replies] == [b"1", b"2"]


def test_requests_expire_with_their_time(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LOOK_PERIOD_S", 0.05)
    with running_link(pki) as link:
        grid = GrpcGrid(link)
        grid.push_messages([flower.instruction(1, "query.result", bytes([i]), ttl_s=0.2) for i in range(50)])
        wait_until(lambda: len(link._pending) == 50)
        wait_until(lambda: not link._pending)
        heard: list[bytes] = []
        with RunningAgent(link, pki.client(1), 1, lambda m: (heard.append(flower.body_of(m)), echo(m))[1]):
            assert [flower.body_of(r) for r in ask(grid, 1, b"ab")] == [b"ba"]
        assert heard == [b"ab"]


def test_waiting_ends_with_a_reply_a_wake_or_the_link(pki: Pki) -> None:
    with running_link(pki) as link:
        grid = GrpcGrid(link)
        began = time.monotonic()
        grid.wait(["nobody"], 0.1)
        assert 0.09 < time.monotonic() - began < 2
        threading.Timer(0.1, grid.wake).start()
        grid.wait(["nobody"], TIMEOUT_S)
        threading.Timer(0.1, link.stop).start()
        with pytest.raises(UnreachableError, match="stopped"):
            grid.wait(["nobody"], TIMEOUT_S)
        assert time.monotonic() - began < 5


def test_the_agent_watches_and_interrupts(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computation that would take for ever does not keep the agent from ending at once."""
    monkeypatch.setattr(agent_module, "WATCH_S", 0.05)
    watched: list[float] = []
    interrupted = threading.Event()

    def compute(message: flower.Message) -> flower.Message:
        interrupted.wait(60)
        return flower.reply(message, b"")

    with running_link(pki) as link:
        running = RunningAgent(
            link, pki.client(1), 1, compute,
            watch=lambda: watched.append(time.monotonic()), interrupt=interrupted.set,
        )  # fmt: skip
        with running:
            wait_until(lambda: 1 in link.online())
            GrpcGrid(link).push_messages([flower.instruction(1, "train.ready", b"x", ttl_s=60)])
            wait_until(lambda: len(watched) > 5)
            began = time.monotonic()
        assert time.monotonic() - began < 2
        assert interrupted.is_set()


def test_a_hub_that_asks_for_too_much_is_left(pki: Pki) -> None:
    agent = Agent("127.0.0.1:1", site_id=1, key_pem=b"", certificate_pem=b"", authority_pem=b"", answer=echo)
    agent._keep(Answer(link_pb2.Envelope(message_id="m", group="g"), [b"chunk"]))
    agent._send_chunks(link_pb2.Want(message_id="m", indices=[0, 1, 7]))
    assert agent._outbound.qsize() == 1
    agent._send_chunks(link_pb2.Want(message_id="unknown", indices=[0]))
    assert agent._outbound.qsize() == 1
    with pytest.raises(VerificationError, match="more chunks than it takes"):
        agent._send_chunks(link_pb2.Want(message_id="m", indices=[0] * 64))


def test_nothing_kept_leaves_after_a_decision(pki: Pki) -> None:
    """A reply of a round is kept for a hub that asks again, until the site may send it no more."""
    allowed = threading.Event()
    allowed.set()
    calls: list[str] = []

    def count(message: flower.Message) -> flower.Message:
        calls.append(message.metadata.message_type)
        chunks = [b"data"] if allowed.is_set() else []
        return flower.reply(message, b"header" if chunks else b"unavailable", chunks)

    hooks = {"may_send": lambda group: group == "study" and allowed.is_set()}
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, count, **hooks):
        wait_until(lambda: 1 in link.online())
        got: list[bytes] = []
        sink = Collected(1)
        envelope = link_pb2.Envelope(
            message_id="same", message_type="train.upload", group="study", body=b"x", ttl_s=60
        )

        def ask(expected: int) -> bytes:
            link.request(1, envelope, (), sink, lambda reply: got.append(reply.body))
            wait_until(lambda: len(got) == expected)
            return got[-1]

        assert (ask(1), ask(2), len(calls)) == (b"header", b"header", 1)
        allowed.clear()
        assert (ask(3), len(calls)) == (b"unavailable", 2)
        added = len(sink.chunks)
        link._loop.call_soon_threadsafe(  # type: ignore[union-attr]
            link._connections[1].outbound.put_nowait,
            link_pb2.HubFrame(want=link_pb2.Want(message_id="same", indices=[0])),
        )
        time.sleep(0.3)
        assert len(sink.chunks) == added
