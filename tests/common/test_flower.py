"""The contract with Flower: its touch points exist, it phones nobody, our messages have one shape in its."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from common import flower
from common.errors import VerificationError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_hub() -> None:
    flower.assume_identity(flower.HUB_NODE_ID)


# -- the touch points --------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", flower.TOUCH_POINTS)
def test_touch_points_exist(point: str) -> None:
    path = point.split("(", 1)[0].split(".")
    for length in range(len(path), 0, -1):
        try:
            found = importlib.import_module(".".join(path[:length]))
        except ModuleNotFoundError:
            continue
        break
    rest = path[length:]
    if rest and rest[-1].startswith("_"):
        # An attribute that every object of the class has.
        message = flower.instruction(1, "query.keys", b"x", ttl_s=1)
        assert rest[-1] in message.metadata.__dict__
        rest = rest[:-1]
    for name in rest:
        found = getattr(found, name)
    assert found is not None


def test_no_other_private_module_of_flower_is_imported() -> None:
    public = {"flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.serverapp.strategy"}
    listed = {point.split("(")[0].rsplit(".", 1)[0] for point in flower.TOUCH_POINTS}
    for path in [*ROOT.glob("common/**/*.py"), *ROOT.glob("server/*.py"), *ROOT.glob("client/**/*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("from flwr"):
                module = line.split()[1]
                assert module in public | (listed if path.name == "flower.py" else set()), (path, line)


def test_the_identity_is_process_wide() -> None:
    flower.assume_identity(7, run_id=3)
    assert (TaskIdentity.node_id, TaskIdentity.run_id, TaskIdentity.task_id) == (7, 3, 1)
    message = flower.instruction(2, "train.ready", b"x", ttl_s=1)
    assert (message.metadata.src_node_id, message.metadata.run_id) == (7, 3)
    flower.assume_identity(flower.HUB_NODE_ID)


def test_an_empty_run_is_the_one_asked_for() -> None:
    assert flower.empty_run(9).run_id == 9
    assert flower.empty_run() == flower.empty_run()


def test_a_context_carries_its_configuration() -> None:
    context = flower.context_for(4, {"site-home": "/x"})
    assert context.node_id == 4
    assert context.node_config == context.run_config == {"site-home": "/x"}


@pytest.mark.parametrize(
    "module", ["common.flower", "server.app", "server.link", "server.strategy", "client.app"]
)
def test_telemetry_is_off_before_flower_is_imported(module: str) -> None:
    program = (
        f"import {module}, os, sys; from flwr.supercore import telemetry; "
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    told_otherwise = environment | {"FLWR_TELEMETRY_ENABLED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=told_otherwise,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["0", "1"]


# -- our messages in Flower's ------------------------------------------------------------------------------


@given(st.binary(max_size=100), st.lists(st.binary(min_size=1, max_size=20), max_size=3))
def test_body_and_attachment_come_back(body: bytes, chunks: list[bytes]) -> None:
    message = flower.instruction(3, "train.upload", body, group="g", attachment=chunks, ttl_s=60)
    assert flower.body_of(message) == body
    assert flower.attachment_of(message) == chunks
    metadata = message.metadata
    assert (metadata.src_node_id, metadata.dst_node_id) == (flower.HUB_NODE_ID, 3)
    assert (metadata.message_type, metadata.group_id, metadata.ttl) == ("train.upload", "g", 60)


@given(st.integers(0, 3), st.integers(-1, 1))
def test_chunks_are_a_mebibyte(count: int, change: int) -> None:
    data = bytes(max(0, count * flower.CHUNK_SIZE_BYTES + change))
    cut = flower.chunks(data)
    assert b"".join(cut) == data
    assert all(len(chunk) == flower.CHUNK_SIZE_BYTES for chunk in cut[:-1])
    assert all(0 < len(chunk) <= flower.CHUNK_SIZE_BYTES for chunk in cut)


def test_a_message_received_is_the_one_sent_and_its_reply_goes_back() -> None:
    received = flower.received(
        "id-1", 5, "query.keys", b"body", group="g", attachment=[b"x"], created_at=1e9, ttl_s=30.0
    )
    assert isinstance(received.metadata, Metadata)
    assert (received.metadata.message_id, received.metadata.dst_node_id) == ("id-1", 5)
    assert (received.metadata.src_node_id, received.metadata.ttl) == (flower.HUB_NODE_ID, 30.0)
    assert (flower.body_of(received), flower.attachment_of(received)) == (b"body", [b"x"])
    reply = flower.reply(
        flower.received("id-2", 5, "query.keys", b"", group="", attachment=[], created_at=0, ttl_s=1e12),
        b"answer",
    )
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (5, flower.HUB_NODE_ID)
    assert reply.metadata.reply_to_message_id == "id-2"
    assert flower.body_of(reply) == b"answer"
    assert flower.attachment_of(reply) == []


def test_a_pushed_message_gets_its_id() -> None:
    message = flower.with_id(flower.instruction(1, "query.keys", b"x", ttl_s=1), "known")
    assert message.metadata.message_id == "known"
    assert flower.reply(message, b"y").metadata.reply_to_message_id == "known"


def foreign(records: dict[str, object]) -> Message:
    return Message(RecordDict(records), 1, "query.keys")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"other": ConfigRecord({"body": b"x"})},
        {"wardround": ConfigRecord({"body": b"x"}), "more": ConfigRecord({})},
        {"wardround": MetricRecord({"body": 1})},
        {"wardround": ConfigRecord({})},
        {"wardround": ConfigRecord({"attachment": [b"x"]})},
        {"wardround": ConfigRecord({"body": b"x", "loss": 0.5})},
    ],
)
def test_a_message_of_another_shape_is_refused(records: dict[str, object]) -> None:
    for read in (flower.body_of, flower.attachment_of):
        with pytest.raises(VerificationError, match="wardround"):
            read(foreign(records))


@pytest.mark.parametrize("body", ["text", 1, [b"x"]])
def test_a_body_is_bytes(body: object) -> None:
    with pytest.raises(VerificationError, match="is bytes"):
        flower.body_of(foreign({"wardround": ConfigRecord({"body": body})}))  # type: ignore[dict-item]


@pytest.mark.parametrize("attachment", [b"x", ["text"], [b""], [bytes((1 << 20) + 1)], [1.5]])
def test_an_attachment_is_a_list_of_chunks(attachment: object) -> None:
    message = foreign({"wardround": ConfigRecord({"body": b"", "attachment": attachment})})  # type: ignore[dict-item]
    with pytest.raises(VerificationError, match="chunks"):
        flower.attachment_of(message)
