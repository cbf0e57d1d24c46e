"""The one place that touches Flower beyond its public API, and the shape of our messages inside Flower's.

Source: Flower 1.41 ``flwr.{app,serverapp,clientapp}``; the touch points are listed in TOUCH_POINTS and
held by a contract test. Rules: telemetry and the update check are off before flwr is imported
(``common/__init__.py``);
a wardround message is one ConfigRecord named ``wardround`` with a ``body`` and at most one ``attachment``,
a list of chunks; our link carries the chunks beside the message, other engines inside it.
"""

from collections.abc import Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import VerificationError

TOUCH_POINTS = (
    "flwr.supercore.task_identity.TaskIdentity",
    "flwr.supercore.run.Run",
    "flwr.app.metadata.Metadata",
    "flwr.app.metadata.Metadata._message_id",
    "flwr.app.Message(metadata=...)",
)
HUB_NODE_ID = 0
RECORD = "wardround"
CHUNK_SIZE_BYTES = 1 << 20

__all__ = [
    "CHUNK_SIZE_BYTES",
    "HUB_NODE_ID",
    "TOUCH_POINTS",
    "Context",
    "Message",
    "Run",
    "assume_identity",
    "attachment_of",
    "body_of",
    "chunks",
    "context_for",
    "empty_run",
    "instruction",
    "received",
    "reply",
    "with_id",
]


def assume_identity(node_id: int, run_id: int = 1) -> None:
    """Set the process-global identity that ``Message(...)`` reads since Flower 1.38."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def empty_run(run_id: int = 1) -> Run:
    """A Run with nothing in it: what ``Grid.set_run`` and ``Grid.run`` exchange."""
    return Run.create_empty(run_id)


def context_for(node_id: int, config: dict[str, str]) -> Context:
    """The Context that an app gets; ``config`` is both its node and its run configuration."""
    return Context(
        run_id=1, node_id=node_id, node_config=dict(config), state=RecordDict(), run_config=dict(config)
    )


def content(body: bytes, attachment: Sequence[bytes] = ()) -> RecordDict:
    """The RecordDict of one wardround message. ``attachment`` is a sequence of chunks, at most 1 MiB each."""
    record = ConfigRecord({"body": body})
    if attachment:
        record["attachment"] = list(attachment)
    return RecordDict({RECORD: record})


def chunks(data: bytes) -> tuple[bytes, ...]:
    """Cut bytes into chunks of 1 MiB, the last one shorter."""
    view = memoryview(data)
    return tuple(bytes(view[at : at + CHUNK_SIZE_BYTES]) for at in range(0, len(data), CHUNK_SIZE_BYTES))


def instruction(
    node_id: int,
    message_type: str,
    body: bytes,
    *,
    group: str = "",
    attachment: Sequence[bytes] = (),
    ttl_s: float,
) -> Message:
    """A message from the hub to one site. ``ttl_s`` in seconds, > 0."""
    return Message(content(body, attachment), node_id, message_type, ttl=ttl_s, group_id=group)


def received(
    message_id: str,
    node_id: int,
    message_type: str,
    body: bytes,
    *,
    group: str,
    attachment: Sequence[bytes],
    created_at: float,
    ttl_s: float,
) -> Message:
    """Rebuild at a site the message that the hub sent. Raises VerificationError for no type of Flower's."""
    try:
        metadata = Metadata(
            run_id=1,
            message_id=message_id,
            src_node_id=HUB_NODE_ID,
            dst_node_id=node_id,
            reply_to_message_id="",
            group_id=group,
            created_at=created_at,
            ttl=ttl_s,
            message_type=message_type,
            src_task_id=1,
            dst_task_id=1,
        )
    except ValueError as error:
        raise VerificationError("flower.type", "the hub sent a message of no known type") from error
    return Message(content=content(body, attachment), metadata=metadata)  # type: ignore[call-overload,no-any-return]


def reply(request: Message, body: bytes, attachment: Sequence[bytes] = ()) -> Message:
    """A site's answer to ``request``."""
    return Message(content(body, attachment), reply_to=request)


def with_id(message: Message, message_id: str) -> Message:
    """Give a pushed message the id under which its reply will be pulled."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


def _field(message: Message, name: str) -> Any:
    if not message.has_content() or list(message.content.keys()) != [RECORD]:
        raise VerificationError("flower.content", "a wardround message holds exactly one record, 'wardround'")
    record = message.content[RECORD]
    if (
        not isinstance(record, ConfigRecord)
        or not set(record) <= {"body", "attachment"}
        or "body" not in record
    ):
        raise VerificationError("flower.content", "a wardround record holds 'body' and at most 'attachment'")
    return record.get(name)


def body_of(message: Message) -> bytes:
    """The encoded request or reply inside a message. Raises VerificationError if it is not ours."""
    value = _field(message, "body")
    if not isinstance(value, bytes):
        raise VerificationError("flower.content", "the body of a wardround message is bytes")
    return value


def attachment_of(message: Message) -> list[bytes]:
    """The chunks carried with the body, empty if there are none. Raises VerificationError if not ours."""
    value = _field(message, "attachment")
    if value is None:
        return []
    if not isinstance(value, list) or not all(
        isinstance(chunk, bytes) and 0 < len(chunk) <= CHUNK_SIZE_BYTES for chunk in value
    ):
        raise VerificationError("flower.content", "an attachment is a list of chunks of 1 byte to 1 MiB")
    return list(value)
