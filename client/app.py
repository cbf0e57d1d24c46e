"""The Flower ClientApp: every kind of message goes to the hospital's Participation.

Source: Flower's ``ClientApp``; DESIGN "Built on Flower". Rules: which hospital comes from the node
configuration (``site-home``); one Participation a folder and process; ``app`` stays a plain unannotated
assignment, because Flower's bundle builder finds no other.
"""

import threading
from pathlib import Path

from flwr.clientapp import ClientApp

from client.participation import Participation
from client.state import SiteHome
from common import flower, messages
from common.errors import UsageError

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
    body, payload = participation(folder).answer(
        message.metadata.message_type, flower.body_of(message), flower.attachment_of(message)
    )
    return flower.reply(message, body, payload)


for _kind in messages.KINDS.values():
    _category, _action = _kind.message_type.split(".")
    getattr(app, _category)(_action)(answer)
