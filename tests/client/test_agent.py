"""The agent's own rules; the link over the wire is tested from the hub's end, in server/test_link.py."""

import asyncio
import logging

import pytest

from client import agent as agent_module
from client.agent import MAX_ATTACHMENT_BYTES, Agent, _Incoming
from common import flower, link_pb2
from common.errors import VerificationError
from server.processes import free_port
from tests.conftest import Pki

DATA = bytes(range(256)) * 4


def incoming(size: int) -> _Incoming:
    return _Incoming(link_pb2.Envelope(message_id="m", attachment_bytes=size))


def chunk(index: int, data: bytes) -> link_pb2.Chunk:
    return link_pb2.Chunk(message_id="m", index=index, data=data)


def test_an_attachment_is_whole_when_its_last_byte_has_come() -> None:
    arriving = incoming(len(DATA))
    parts = [DATA[:500], DATA[500:1000], DATA[1000:]]
    left = []
    for index, part in enumerate(parts):
        arriving.add(chunk(index, part))
        left.append(arriving.left)
    assert left == [len(DATA) - 500, len(DATA) - 1000, 0]
    assert arriving.chunks == parts


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (chunk(0, DATA[:10]), "link.chunk"),
        (chunk(2, DATA[:10]), "link.chunk"),
        (chunk(1, b""), "link.chunk"),
        (chunk(1, DATA), "link.chunk"),
    ],
)
def test_a_chunk_out_of_order_or_too_long_is_refused(wrong: link_pb2.Chunk, code: str) -> None:
    arriving = incoming(len(DATA))
    arriving.add(chunk(0, DATA[:1000]))
    with pytest.raises(VerificationError) as caught:
        arriving.add(wrong)
    assert caught.value.code == code
    arriving.add(chunk(1, DATA[1000:]))
    assert arriving.left == 0


def test_an_announcement_past_the_limit_is_refused_before_anything_is_kept() -> None:
    incoming(MAX_ATTACHMENT_BYTES)
    with pytest.raises(VerificationError):
        incoming(MAX_ATTACHMENT_BYTES + 1)
    large = incoming(MAX_ATTACHMENT_BYTES)
    with pytest.raises(VerificationError):
        large.add(chunk(0, bytes(flower.CHUNK_SIZE_BYTES + 1)))


def test_an_absent_hub_is_tried_again_until_stopped(
    pki: Pki, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "BACKOFF_FIRST_S", 0.01)
    credentials = pki.client(1)

    async def main() -> None:
        agent = Agent(
            f"127.0.0.1:{free_port()}",
            site_id=1,
            key_pem=credentials.key_pem,
            certificate_pem=credentials.certificate_pem,
            authority_pem=credentials.authority_pem,
            answer=lambda message: message,
        )
        running = asyncio.create_task(agent.run())
        for _ in range(500):
            if len(caplog.records) >= 2:
                break
            await asyncio.sleep(0.01)
        agent.stop()
        await asyncio.wait_for(running, 5)

    with caplog.at_level(logging.WARNING, "wardround.site.link"):
        asyncio.run(main())
    assert len(caplog.records) >= 2
    assert all("cannot be reached" in record.getMessage() for record in caplog.records)
