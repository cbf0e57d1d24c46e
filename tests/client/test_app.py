"""The Flower ClientApp: every kind of message reaches the hospital of the node's folder."""

import threading
import time
from collections.abc import Iterator

import pytest

from client import app as client_app
from client.participation import Participation
from common import flower, messages
from common.errors import UsageError
from common.messages import KINDS, Reply, Request
from common.secagg import records
from tests.client.federation import Federation


@pytest.fixture
def folder(federation: Federation) -> Iterator[str]:
    name = str(federation.sites[1].folder)
    yield name
    client_app.close(name)


def message(message_type: str, body: bytes, group: str | None = None) -> flower.Message:
    """A request as it arrives, under the study it names or under another group."""
    group = messages.run_of(message_type, body) if group is None else group
    return flower.received(
        "m1", 1, message_type, body, group=group, attachment=(), created_at=time.time(), ttl_s=60.0
    )


def test_every_kind_of_message_is_answered(folder: str) -> None:
    context = flower.context_for(1, {"site-home": folder})
    for kind in KINDS.values():
        reply = client_app.app(message(kind.message_type, b"garbage"), context)
        assert flower.body_of(reply) == messages.encode_reply(Reply(kind, available=False))
        assert flower.attachment_of(reply) == []


def test_a_study_arrives_and_its_keys_wait_for_a_person(federation: Federation, folder: str) -> None:
    context = flower.context_for(1, {"site-home": folder})
    manifest = federation.manifest()
    offer = Request(messages.STUDY, manifest.digest, (), federation.document(manifest))
    reply = client_app.app(message("query.study", messages.encode_request(offer)), context)
    assert messages.decode_reply("query.study", flower.body_of(reply)).decision == "received"
    federation.decide(1, manifest)
    body = messages.encode_request(Request(messages.KEYS, manifest.digest))
    reply = client_app.app(message("query.keys", body), context)
    (announced,) = messages.decode_reply("query.keys", flower.body_of(reply)).records
    assert isinstance(announced, records.KeyAnnounce)
    assert announced.id == 1


def test_a_folder_is_opened_once_and_again_after_closing(folder: str) -> None:
    first = client_app.participation(folder)
    assert client_app.participation(folder) is first
    client_app.close(folder)
    client_app.close(folder)
    assert client_app.participation(folder) is not first


def test_many_threads_open_one_hospital(folder: str) -> None:
    found: list[Participation] = []
    threads = [
        threading.Thread(target=lambda: found.append(client_app.participation(folder))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(hospital) for hospital in found}) == 1


def test_a_node_without_a_folder_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        client_app.answer(message("query.keys", b""), flower.context_for(1, {}))
    assert caught.value.code == "client-app.config"


def test_a_request_under_another_study_than_it_names_is_refused(federation: Federation, folder: str) -> None:
    """Replies are kept by group: a hub must not choose under which one."""
    context = flower.context_for(1, {"site-home": folder})
    manifest = federation.manifest()
    offer = messages.encode_request(
        Request(messages.STUDY, manifest.digest, (), federation.document(manifest))
    )
    for group in ("", "00" * 32, manifest.digest.hex() + "x"):
        reply = client_app.app(message("query.study", offer, group), context)
        assert flower.body_of(reply) == messages.encode_reply(Reply(messages.STUDY, available=False))
    reply = client_app.app(message("query.study", offer), context)
    assert messages.decode_reply("query.study", flower.body_of(reply)).decision == "received"
