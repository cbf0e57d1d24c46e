"""Payloads under bad conditions: streams that are not read, frames that come twice, many sites, withdrawals."""

import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import agent as agent_module
from common import flower, link_pb2, link_pb2_grpc
from server import link as link_module
from server import transfers
from server.grid import GrpcGrid
from server.link import Link
from server.transfers import PART_SIZE_BYTES, Fetching, Upload, chunk_frames
from tests.conftest import Pki
from tests.server.test_link import (
    TIMEOUT_S,
    Collected,
    RunningAgent,
    ask,
    echo,
    payload,
    running_link,
    upload,
    wait_until,
)

MIB = 1 << 20


class RawSite:
    """A site made of frames: it says what it is told to, and reads only when it is asked to."""

    def __init__(self, stub: Any) -> None:
        self._frames: queue.Queue[link_pb2.SiteFrame | None] = queue.Queue()
        self.say(greeting=link_pb2.Greeting(protocol_version=1))
        # Heartbeats would keep a read going for ever.
        self.call = stub.Attach(iter(self._frames.get, None), timeout=2 * TIMEOUT_S)
        assert self.read() == "greeting"

    def say(self, **frame: Any) -> None:
        self._frames.put(link_pb2.SiteFrame(**frame))

    def read(self) -> str:
        """The kind of the next frame that is no heartbeat; the frame is in ``last``."""
        while True:
            self.last = next(self.call)
            kind = self.last.WhichOneof("frame")
            if kind != "heartbeat":
                return str(kind)

    def end(self) -> None:
        self._frames.put(None)
        self.call.cancel()


@contextmanager
def raw_site(pki: Pki, link: Link) -> Iterator[RawSite]:
    mine = pki.client(1)
    credentials = grpc.ssl_channel_credentials(mine.authority_pem, mine.key_pem, mine.certificate_pem)
    with grpc.secure_channel(f"127.0.0.1:{link.port}", credentials) as channel:
        site = RawSite(link_pb2_grpc.LinkStub(channel))
        try:
            wait_until(lambda: 1 in link.online())
            yield site
        finally:
            site.end()


def push(grid: GrpcGrid, body: bytes, chunks: tuple[bytes, ...] = ()) -> str:
    message = flower.instruction(1, "train.upload", body, group="g", attachment=chunks, ttl_s=60)
    return next(iter(grid.push_messages([message])))


def test_what_goes_beside_a_request_is_cut_into_small_parts() -> None:
    data = bytes(range(256)) * 4500
    frames = list(chunk_frames("m", flower.chunks(data)))
    assert b"".join(frame.chunk.data for frame in frames) == data
    assert [frame.chunk.index for frame in frames] == list(range(len(frames)))
    assert max(len(frame.chunk.data) for frame in frames) == PART_SIZE_BYTES


def test_a_stream_blocked_in_sending_is_cut_too(pki: Pki) -> None:
    """A revoked site that reads nothing: its stream is gone at once, and the hub stops in time."""
    with running_link(pki) as link:
        with raw_site(pki, link) as site:
            push(GrpcGrid(link), b"x", flower.chunks(bytes(64 * MIB)))
            assert site.read() == "request"
            time.sleep(0.3)
            began = time.monotonic()
            link.disconnect(1)
            wait_until(lambda: 1 not in link.online())
            assert time.monotonic() - began < 0.5
            # The same site may come back while the old stream is still blocked.
            with RunningAgent(link, pki.client(1), 1, echo):
                wait_until(lambda: 1 in link.online())
        began = time.monotonic()
    assert time.monotonic() - began < 2


def test_a_cut_stream_says_so_to_its_site(pki: Pki) -> None:
    with running_link(pki) as link, raw_site(pki, link) as site:
        link.disconnect(1)
        with pytest.raises(grpc.RpcError) as raised:
            site.read()
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert "cut this stream" in raised.value.details()  # type: ignore[attr-defined]


def test_a_site_with_another_version_is_told_so(pki: Pki) -> None:
    with running_link(pki) as link, raw_site(pki, link) as site:
        site.say(greeting=link_pb2.Greeting(protocol_version=2))
        with pytest.raises(grpc.RpcError) as raised:
            site.read()
        assert "does not belong here" in raised.value.details()  # type: ignore[attr-defined]


def test_a_withdrawn_state_is_not_sent_to_its_end(pki: Pki) -> None:
    """So that the end of a study need not wait behind 100 MB for a slow site."""
    with running_link(pki) as link, raw_site(pki, link) as site:
        grid = GrpcGrid(link)
        large = push(grid, b"large", flower.chunks(bytes(64 * MIB)))
        assert site.read() == "request"
        assert site.read() == "chunk"
        grid.withdraw([large])
        push(grid, b"small")
        parts = 1
        while site.read() == "chunk":
            parts += 1
        assert site.last.request.body == b"small"
        assert parts < 64 * MIB // PART_SIZE_BYTES


def test_an_agent_drops_a_state_that_was_withdrawn_half_way(pki: Pki) -> None:
    heard: list[bytes] = []

    def hear(message: flower.Message) -> flower.Message:
        heard.append(flower.body_of(message))
        return echo(message)

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, hear) as running:
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        large = push(grid, b"large", flower.chunks(bytes(200 * MIB)))
        wait_until(lambda: running.agent._in_flight == [200 * MIB])
        grid.withdraw([large])
        assert [flower.body_of(reply) for reply in ask(grid, 1, b"ab")] == [b"ba"]
        assert heard == [b"ab"]
        assert running.agent._in_flight == []


def test_frames_that_come_twice_or_uncalled_change_nothing(pki: Pki) -> None:
    with running_link(pki) as link, raw_site(pki, link) as site:
        grid = GrpcGrid(link)
        grid.sink = sink = Collected(3)
        stranger = link_pb2.Envelope(message_id="stranger", attachment_bytes=5)
        site.say(reply=stranger)
        site.say(chunk=link_pb2.Chunk(message_id="stranger", index=0, data=b"data"))
        message_id = push(grid, b"x")
        assert site.read() == "request"
        reply = link_pb2.Envelope(message_id=message_id, body=b"header", attachment_bytes=6)
        site.say(reply=reply)
        site.say(reply=reply)
        for index in range(3):
            assert site.read() == "want"
            assert list(site.last.want.indices) == [index]
            for wrong in ((index + 1) % 3, index, index):
                chunk = link_pb2.Chunk(message_id=message_id, index=wrong, data=bytes([wrong]))
                site.say(chunk=chunk)
        grid.wait([message_id], TIMEOUT_S)
        assert len(list(grid.pull_messages([message_id]))) == 1
        site.say(reply=reply)
        site.say(chunk=link_pb2.Chunk(message_id=message_id, index=2, data=b"2"))
        push(grid, b"next")
        assert site.read() == "request"
        assert sink.headers == [(1, b"header")]
        assert sink.chunks == [(1, index, bytes([index])) for index in range(3)]
        assert list(grid.pull_messages([message_id])) == []


def flooded(site: RawSite) -> str:
    """What a site is told whose stream the hub cuts."""
    with pytest.raises(grpc.RpcError) as raised:
        list(iter(site.read, "the end"))
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    return str(raised.value.details())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "frame",
    [
        {"reply": link_pb2.Envelope(message_id="stranger", body=bytes(1000))},
        {"chunk": link_pb2.Chunk(message_id="stranger", index=0, data=bytes(1000))},
        {"heartbeat": link_pb2.Heartbeat()},
    ],
    ids=["reply", "chunk", "heartbeat"],
)
def test_floods_are_cut(pki: Pki, frame: dict[str, Any]) -> None:
    """With the reason, and the other sites notice nothing."""
    with running_link(pki) as link, raw_site(pki, link) as site, RunningAgent(link, pki.client(2), 2, echo):
        wait_until(lambda: set(link.online()) == {1, 2})
        for _ in range(2 * link_module.MAX_UNASKED):
            site.say(**frame)
        assert "frames at once that nobody asked for" in flooded(site)
        wait_until(lambda: 1 not in link.online())
        assert [flower.body_of(reply) for reply in ask(GrpcGrid(link), 2, b"ab")] == [b"ba"]
        # It may come back, and is heard.
        with RunningAgent(link, pki.client(1), 1, echo):
            wait_until(lambda: 1 in link.online())
            assert [flower.body_of(reply) for reply in ask(GrpcGrid(link), 1, b"cd")] == [b"dc"]


def test_a_refused_header_that_comes_again_and_again_is_a_flood(pki: Pki) -> None:
    with running_link(pki) as link, raw_site(pki, link) as site:
        grid = GrpcGrid(link)
        grid.sink = Collected(3, refuse="header")
        message_id = push(grid, b"x")
        assert site.read() == "request"
        for _ in range(2 * link_module.MAX_UNASKED):
            site.say(reply=link_pb2.Envelope(message_id=message_id, body=b"header", attachment_bytes=6))
        assert "nobody asked for" in flooded(site)


def test_a_frame_past_the_limit_ends_its_own_stream_alone(pki: Pki) -> None:
    with running_link(pki) as link, raw_site(pki, link) as site, RunningAgent(link, pki.client(2), 2, echo):
        wait_until(lambda: set(link.online()) == {1, 2})
        message_id = push(GrpcGrid(link), b"x")
        assert site.read() == "request"
        site.say(reply=link_pb2.Envelope(message_id=message_id, body=bytes(link_module.MAX_FRAME_BYTES)))
        wait_until(lambda: 1 not in link.online())
        assert message_id in link._pending
        assert [flower.body_of(reply) for reply in ask(GrpcGrid(link), 2, b"ab")] == [b"ba"]


def test_a_site_that_reads_nothing_is_cut(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it speaks: it would hold its place in every round."""
    monkeypatch.setattr(link_module, "BLOCKED_S", 0.3)
    with running_link(pki) as link, raw_site(pki, link) as site:
        push(GrpcGrid(link), b"x", flower.chunks(bytes(64 * MIB)))
        assert site.read() == "request"

        def gone() -> bool:
            site.say(heartbeat=link_pb2.Heartbeat())
            return 1 not in link.online()

        wait_until(gone)
        assert "cut this stream" in flooded(site)


def test_late_frames_over_a_long_time_are_no_flood(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_UNASKED", 3)
    with running_link(pki) as link, raw_site(pki, link) as site:
        connection = link._connections[1]
        for _ in range(3):
            wait_until(lambda: connection.unasked == 0)
            for _ in range(3):
                site.say(reply=link_pb2.Envelope(message_id="late"))
            wait_until(lambda: connection.unasked > 0)
        assert link._connections[1] is connection
        push(GrpcGrid(link), b"next")
        assert site.read() == "request"


def test_one_connection_has_few_streams(pki: Pki) -> None:
    mine, request = pki.client(1), health_pb2.HealthCheckRequest()
    credentials = grpc.ssl_channel_credentials(mine.authority_pem, mine.key_pem, mine.certificate_pem)
    with running_link(pki) as link, grpc.secure_channel(f"127.0.0.1:{link.port}", credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        calls = [stub.Watch(request, timeout=TIMEOUT_S) for _ in range(link_module.MAX_STREAMS)]
        for call in calls:
            assert next(call).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            next(stub.Watch(request, timeout=0.5))
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        calls.pop().cancel()
        assert next(stub.Watch(request, timeout=TIMEOUT_S)).status == health_pb2.HealthCheckResponse.SERVING
        for call in calls:
            call.cancel()


def test_waiting_requests_are_sent_once_to_a_site_that_attaches(pki: Pki) -> None:
    with running_link(pki) as link:
        grid = GrpcGrid(link)
        message_ids = [push(grid, bytes([i])) for i in range(3)]
        with raw_site(pki, link) as site:
            found = []
            for _ in range(3):
                assert site.read() == "request"
                found.append(site.last.request.message_id)
            assert found == message_ids
            last = push(grid, b"last")
            assert site.read() == "request"
            assert site.last.request.message_id == last


def waiting(sent: list[str], count: int, chunks: int) -> list[Upload]:
    return [
        Upload(
            Collected(),
            link_pb2.Envelope(message_id=str(number)),
            deque(range(chunks)),
            lambda frame: sent.append(frame.want.message_id),
        )
        for number in range(count)
    ]


def test_few_chunks_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all, for any number of sites; each has its turn, and one that ends is passed over."""
    monkeypatch.setattr(transfers, "MAX_FETCHED", 3)
    fetching, sent = Fetching(), list[str]()
    uploads = waiting(sent, 5, 2)
    for one in uploads:
        fetching.begin(one)
    assert sent == ["0", "1", "2"]
    fetching.arrived(uploads[0])
    assert sent == ["0", "1", "2"]
    fetching.added()
    assert sent[3:] == ["3"]
    fetching.end(uploads[4])
    fetching.end(uploads[1])
    assert sent[4:] == ["0"]
    for number in (2, 3):
        fetching.arrived(uploads[number])
        fetching.added()
    assert sent[5:] == ["2", "3"]
    for number in (0, 2, 3):
        fetching.arrived(uploads[number])
        fetching.added()
        assert uploads[number].whole
    assert len(sent) == 7


def test_a_slow_site_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MAX_FETCHED", 1)
    monkeypatch.setattr(transfers, "PATIENCE_S", 0.05)
    fetching, sent = Fetching(), list[str]()
    for one in waiting(sent, 2, 1):
        fetching.begin(one)
    assert sent == ["0"]
    time.sleep(0.06)
    fetching.go_on()
    assert sent == ["0", "1"]


def test_many_sites_upload_through_few_places(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MAX_FETCHED", 2)
    with running_link(pki) as link, ExitStack() as agents:
        for site in range(1, 7):
            agents.enter_context(RunningAgent(link, pki.client(site, f"Site {site}"), site, payload))
        wait_until(lambda: len(link.online()) == 6)
        grid = GrpcGrid(link)
        sinks = Collected(4)
        # One sink for all: each site has its own four chunks.
        sinks.header = lambda node_id, body: list(range(4))  # type: ignore[method-assign]
        grid.sink = sinks
        messages = [
            flower.instruction(site, "train.upload", str(4 * MIB).encode(), ttl_s=60) for site in range(1, 7)
        ]
        assert len(list(grid.send_and_receive(messages, timeout=TIMEOUT_S))) == 6
        assert sorted((node, index) for node, index, _ in sinks.chunks) == [
            (node, index) for node in range(1, 7) for index in range(4)
        ]
        assert link._fetching._adding == 0
        assert not link._fetching._asked


def test_a_site_takes_no_more_than_it_can_hold(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bounds its stream is not read; nothing is lost by that."""
    release = threading.Event()

    def slow(message: flower.Message) -> flower.Message:
        release.wait(TIMEOUT_S)
        return flower.reply(message, flower.body_of(message))

    monkeypatch.setattr(agent_module, "MAX_ATTACHMENT_BYTES", 3 * MIB)
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, slow) as running:
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        messages = [
            flower.instruction(1, "query.keys", bytes([i]), group=str(i), attachment=(bytes(MIB),), ttl_s=60)
            for i in range(6)
        ] + [flower.instruction(1, "query.keys", bytes([i]), group=str(i), ttl_s=60) for i in range(6, 50)]
        message_ids = list(grid.push_messages(messages))
        wait_until(lambda: len(running.agent._in_flight) == 3)
        time.sleep(0.1)
        assert running.agent._in_flight == [MIB] * 3
        release.set()
        found: list[bytes] = []
        wait_until(
            lambda: (
                bool(found.extend(map(flower.body_of, grid.pull_messages(message_ids)))) or len(found) == 50
            )
        )
        assert running.agent._in_flight == []


def test_at_most_so_many_requests_are_in_flight(pki: Pki) -> None:
    release = threading.Event()
    most: list[int] = []

    def slow(message: flower.Message) -> flower.Message:
        release.wait(TIMEOUT_S)
        most.append(len(running.agent._in_flight))
        return flower.reply(message, b"")

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, slow) as running:
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        message_ids = [push(grid, bytes([i])) for i in range(100)]
        wait_until(lambda: len(running.agent._in_flight) == agent_module.MAX_IN_FLIGHT)
        release.set()
        wait_until(lambda: len(list(grid._replies)) == 100)
        assert len(list(grid.pull_messages(message_ids))) == 100
        assert max(most) == agent_module.MAX_IN_FLIGHT


def test_what_a_close_overtakes_is_not_kept(pki: Pki) -> None:
    """A payload that is made while its run is closed is not kept at the site."""
    making, release = threading.Event(), threading.Event()

    def answer(message: flower.Message) -> flower.Message:
        if message.metadata.message_type == "query.close":
            release.set()
            return flower.reply(message, b"closed")
        making.set()
        release.wait(TIMEOUT_S)
        return flower.reply(message, b"header", (b"payload",))

    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, answer) as running:
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        grid.sink = Collected(1)
        push(grid, b"x")
        assert making.wait(TIMEOUT_S)
        close = flower.instruction(1, "query.close", b"c", group="g", ttl_s=60)
        assert len(list(grid.send_and_receive([close], timeout=TIMEOUT_S))) == 1
        wait_until(lambda: not running.agent._tasks)
        assert [kept.envelope.body for kept in running.agent._kept.values()] == [b"closed"]


def test_a_defect_in_answering_ends_one_request_only(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    def answer(message: flower.Message) -> flower.Message:
        if flower.body_of(message) == b"bad":
            raise ValueError("what must not be in a log")
        return flower.reply(message, b"good")

    def watch() -> None:
        raise OSError("what must not be in a log")

    with pytest.MonkeyPatch.context() as patch, running_link(pki) as link:
        patch.setattr(agent_module, "WATCH_S", 0.02)
        with RunningAgent(link, pki.client(1), 1, answer, watch=watch):
            wait_until(lambda: 1 in link.online())
            grid = GrpcGrid(link)
            push(grid, b"bad")
            assert [flower.body_of(reply) for reply in ask(grid, 1, b"x")] == [b"good"]
            wait_until(lambda: sum("the watch failed: OSError" in r.message for r in caplog.records) >= 2)
    assert any("train.upload request has no answer: ValueError" in r.message for r in caplog.records)
    assert "must not be in a log" not in caplog.text


def test_uploads_go_on_after_one_was_refused(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, payload):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        for _ in range(transfers.MAX_FETCHED + 2):
            grid.sink = Collected(3, refuse="chunk")
            assert upload(grid, 3 * MIB, 0.1) == []
        grid.sink = sink = Collected(3)
        assert len(upload(grid, 3 * MIB)) == 1
        assert len(sink.chunks) == 3


REFUSING = """
import time
from tests.conftest import Pki
from tests.server.test_link import _attach_once, running_link
from common.errors import RefusedError

def admit(peer):
    raise RefusedError("test.refused", "refused")

pki = Pki()
with running_link(pki, admit) as link:
    _attach_once(link, pki.client(1), pki.server().authority_pem)
print(time.time())
"""


def test_a_hub_that_refused_somebody_ends_at_once() -> None:
    """gRPC waits for calls that were not collected when the process ends."""
    done = subprocess.run([sys.executable, "-c", REFUSING], capture_output=True, text=True, timeout=60)
    assert time.time() - float(done.stdout) < 1.5, done.stderr


def test_an_agent_that_is_stopped_in_a_transfer_ends_at_once(pki: Pki) -> None:
    with running_link(pki) as link:
        with RunningAgent(link, pki.client(1), 1, payload):
            wait_until(lambda: 1 in link.online())
            grid = GrpcGrid(link)
            grid.sink = sink = Collected(200, slow_s=0.02)
            push(grid, str(200 * MIB).encode())
            wait_until(lambda: len(sink.chunks) >= 2)
            began = time.monotonic()
        assert time.monotonic() - began < 2
        wait_until(lambda: 1 not in link.online())
