"""The Flower ClientApp: every kind of message goes to the hospital's Participation.

Source: Flower's ``ClientApp``; DESIGN "Built on Flower". Rules: which hospital comes from the node
configuration (``site-home``); one Participation a folder and process; ``app`` stays a plain unannotated
assignment, because Flower's bundle builder finds no other.
"""

import logging
import threading
from pathlib import Path

from flwr.clientapp import ClientApp

from client.participation import Participation
from client.state import SiteHome
from common import flower, messages
from common.errors import UsageError
from common.messages import Reply

log = logging.getLogger("wardround.site")

app = ClientApp()
_open: dict[str, Participation] = {}
_opening = threading.Lock()


def participation(folder: str) -> Participation:
    """The hospital of a folder, opened once in this process."""
    with _opening:
        if folder not in _open:
            _open[folder] = Participation(SiteHome(Path(folder)))
        return _open[folder]


def close(folder: str) -> None:
    """Close the hospital of a folder."""
    with _opening:
        hospital = _open.pop(folder, None)
    if hospital is not None:
        hospital.close()


def answer(message: flower.Message, context: flower.Context) -> flower.Message:
    """One request in, one reply out."""
    folder = context.node_config.get("site-home")
    if not isinstance(folder, str):
        raise UsageError("client-app.config", "the node configuration lacks 'site-home'")
    hospital, kind = participation(folder), message.metadata.message_type
    body = flower.body_of(message)
    if messages.run_of(kind, body) == message.metadata.group_id:
        body, payload = hospital.answer(kind, body, flower.attachment_of(message))
    else:
        # What is kept for one study must not be kept in another one's name.
        log.warning("a %s request came under another study than it names", kind)
        body, payload = messages.encode_reply(Reply(messages.kind_of(kind), available=False)), ()
    return flower.reply(message, body, payload)


for _kind in messages.KINDS.values():
    _category, _action = _kind.message_type.split(".")
    getattr(app, _category)(_action)(answer)
