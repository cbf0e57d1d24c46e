"""What crosses the wire in a study with differential privacy: recorded at the hub, frame by frame."""

from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

import server.service
from common import link_pb2, messages
from common.secagg import records
from common.secagg.codec import Layout
from server.link import Link
from server.processes import Processes
from server.service import Hub
from tests.federation import Federation, extract_rows, small_study

RECORDED: list[tuple[int, link_pb2.SiteFrame]] = []
DECLARED_REPLIES = {
    messages.STUDY: None,
    messages.KEYS: records.KeyAnnounce,
    messages.DIRECTORY: records.PairSeed,
    messages.SEEDS: records.Confirm,
    messages.CONFIRMS: None,
    messages.HEAD: records.Head,
    messages.COSIGN: records.Cosigned,
    messages.COSIGNED: None,
    messages.READY: records.Ready,
    messages.UPLOAD: records.Upload,
    messages.OPEN: records.Open,
    messages.RESULT: None,
    messages.CLOSE: None,
}


class RecordingLink(Link):
    """The real link, keeping a copy of every frame a site sends."""

    async def _read(self, connection, frames):  # type: ignore[no-untyped-def]
        async def tee() -> AsyncIterator[link_pb2.SiteFrame]:
            async for frame in frames:
                kept = link_pb2.SiteFrame()
                kept.CopyFrom(frame)
                RECORDED.append((connection.peer.number, kept))
                yield frame

        await super()._read(connection, tee())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("wire")
    patch = pytest.MonkeyPatch()
    patch.setattr(server.service, "Link", RecordingLink)
    RECORDED.clear()
    with Processes(folder / "logs") as processes:
        federation = Federation(folder, processes)
        hub = Hub(federation.hub_home)
        hub.start()
        try:
            for number in (1, 2, 3):
                federation.start_site(number)
            digest = federation.submit(small_study(federation.names, training__rounds=4))
            federation.approve_all(digest)
            assert federation.watch(digest)[-1]["status"] == "done"
            yield federation
        finally:
            hub.stop()
            patch.undo()


def replies() -> list[tuple[int, messages.Reply, bytes]]:
    found = []
    for site, frame in RECORDED:
        if frame.WhichOneof("frame") == "reply":
            reply = messages.decode_reply(frame.reply.message_type, frame.reply.body)
            found.append((site, reply, frame.reply.body))
    return found


def payloads() -> list[tuple[int, bytes]]:
    """The payload of each upload, in order."""
    found: list[tuple[int, bytes]] = []
    open_uploads: dict[tuple[int, str], bytearray] = {}
    for site, frame in RECORDED:
        which = frame.WhichOneof("frame")
        if which == "reply" and frame.reply.attachment_bytes:
            open_uploads[(site, frame.reply.message_id)] = bytearray()
        elif which == "chunk":
            open_uploads[(site, frame.chunk.message_id)] += frame.chunk.data
    for (site, _), data in open_uploads.items():
        found.append((site, bytes(data)))
    return found


def test_the_gate_is_the_only_egress_on_the_wire(recorded: Federation) -> None:
    kinds = {frame.WhichOneof("frame") for _, frame in RECORDED}
    assert kinds <= {"greeting", "heartbeat", "reply", "chunk"}
    seen = set()
    for _, reply, body in replies():
        # Decoding is exact, so nothing rides along in a reply; the record types are the declared ones.
        assert messages.encode_reply(reply) == body
        expected = DECLARED_REPLIES[reply.kind]
        assert all(type(record) is expected for record in reply.records)
        assert reply.decision in (("", *messages.DECISIONS) if reply.kind is messages.STUDY else ("",))
        seen.add(reply.kind)
    assert seen == set(DECLARED_REPLIES)
    # Attachments belong to uploads alone, one for each site and round, each of the layout's exact length.
    attached = [
        f.reply.message_type
        for _, f in RECORDED
        if f.WhichOneof("frame") == "reply" and f.reply.attachment_bytes
    ]
    assert attached == [messages.UPLOAD.message_type] * 12
    layout = Layout(parameters=6, scalars=0, bits=32)
    assert [len(data) for _, data in payloads()] == [layout.payload_bytes] * 12


def test_no_plain_update_crosses_the_wire(recorded: Federation) -> None:
    # A plain update is at most range/step + 1 = 10^7 in absolute value; a masked word is uniform on 2^32, so
    # it is that small with probability 0.0047. Of 84 words, 9 or more would be small once in 10^10 runs.
    words = np.concatenate([np.frombuffer(data[: 7 * 4], dtype="<i4") for _, data in payloads()]).astype(
        np.int64
    )
    assert words.size == 84
    assert int((np.abs(words) <= 10_000_001).sum()) < 9
    # And no two payloads share a word, as they would if a mask were used twice on the same value.
    assert len({data for _, data in payloads()}) == 12


def test_nothing_of_a_record_crosses_the_wire_or_reaches_a_log(recorded: Federation) -> None:
    wire = b"".join(frame.SerializeToString() for _, frame in RECORDED)
    logs = "".join(recorded.log(f"site{number}") for number in (1, 2, 3)).encode()
    for number in (1, 2, 3):
        for patient, age, bmi, _ in extract_rows(number):
            for value in (patient, str(age), str(bmi)):
                assert value.encode() not in logs
                assert value.encode() not in wire


def test_every_site_sends_the_same_sizes_in_every_round(recorded: Federation) -> None:
    sizes: dict[int, list[tuple[str, int, int]]] = {}
    for site, frame in RECORDED:
        if frame.WhichOneof("frame") == "reply" and frame.reply.message_type.startswith("train."):
            row = (frame.reply.message_type, len(frame.reply.body), frame.reply.attachment_bytes)
            sizes.setdefault(site, []).append(row)
    assert sizes[1] == sizes[2] == sizes[3]
