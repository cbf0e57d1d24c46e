"""The ServerApp as Flower calls it: the study comes from the run configuration."""

from pathlib import Path

import pytest
from flwr.serverapp import ServerApp

from common import flower
from common.errors import RefusedError, UsageError
from server import app as module
from server import rounds
from server.store import Store
from tests.server.hospitals import Hospital, Room, found


def test_the_app_runs_the_study_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "CONSENT_PERIOD_S", 0.001)
    founded = found(tmp_path)
    store = Store.open(founded.home.database)
    digest = founded.store_study(store, founded.sign_study(training__rounds=1))
    room = Room([Hospital(founded, site) for site in founded.admissions])
    config = {"hub-home": str(founded.home.folder), "study": digest}
    module.app(room, flower.context_for(flower.HUB_NODE_ID, config))
    assert store.study(digest).status == "done"
    with pytest.raises(RefusedError, match="there is no study"):
        module.app(room, flower.context_for(flower.HUB_NODE_ID, config | {"study": "0" * 64}))
    store.close()


@pytest.mark.parametrize("missing", ["hub-home", "study"])
def test_a_missing_setting_is_named(missing: str) -> None:
    config = {"hub-home": "x", "study": "y"}
    del config[missing]
    with pytest.raises(UsageError, match=missing):
        module.app(Room([]), flower.context_for(flower.HUB_NODE_ID, config))


def test_the_app_is_a_plain_assignment() -> None:
    # Flower's bundle builder finds "app" by this very line.
    assert isinstance(module.app, ServerApp)
    assert "\napp = ServerApp()\n" in Path(module.__file__).read_text(encoding="utf-8")
