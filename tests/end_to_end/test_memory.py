"""The same apps give the same bits in memory and on the link: without DP, with nearest rounding."""

from pathlib import Path
from typing import Any

import pytest

from client import app as client_app
from common import flower
from server import rounds
from server.app import app as server_app
from server.memory import MemoryGrid
from server.processes import Processes
from server.store import Store, StudyRow
from tests.client import federation as in_process
from tests.federation import Federation, small_study

WITHOUT_DP: dict[str, Any] = {"kind": "without_differential_privacy"}
ALLOWED = {"allow_studies_without_differential_privacy": True}
STUDY: dict[str, Any] = {
    "privacy": WITHOUT_DP,
    "training__rounds": 3,
    "training__steps": 2,
    "training__server": {"strategy": "fedadam", "learning_rate": 0.05},
}


def models(database: Path, digest: str) -> list[bytes]:
    store = Store.open(database)
    try:
        assert store.study(digest).status == "done", store.study(digest).detail
        return [store.state(digest, row.step or 0) for row in store.rounds(digest)]
    finally:
        store.close()


def on_the_link(folder: Path) -> list[bytes]:
    with Processes(folder / "logs") as processes:
        federation = Federation(folder, processes, rules=ALLOWED)
        federation.start()
        digest = federation.submit(small_study(federation.names, **STUDY))
        federation.approve_all(digest)
        federation.watch(digest)
        return models(federation.hub_home.database, digest)


def in_memory(folder: Path) -> list[bytes]:
    in_process.make(folder / "template", 3)
    federation = in_process.Federation(folder / "template", folder / "run", **ALLOWED)
    manifest = federation.manifest(**STUDY)
    signed, digest = federation.sign(manifest), manifest.digest.hex()
    store = Store.open(federation.hub.database)
    store.add_study(
        StudyRow(
            digest=digest,
            name=manifest.study.name,
            manifest=signed.manifest_bytes,
            signature=signed.signature,
            roster=federation.roster.data,
            roster_signature=federation.roster.signature,
            status="queued",
            rounds=manifest.study.training.rounds,
            submitted="2026-01-01T00:00Z",
        )
    )
    store.close()
    folders = {number: str(home.folder) for number, home in federation.sites.items()}
    apps = {}
    for number, home in folders.items():
        federation.decide(number, manifest)
        context = flower.context_for(number, {"site-home": home})
        apps[number] = lambda message, context=context: client_app.app(message, context)
    try:
        config = {"hub-home": str(federation.hub.folder), "study": digest}
        server_app(MemoryGrid(apps), flower.context_for(flower.HUB_NODE_ID, config))
    finally:
        for home in folders.values():
            client_app.close(home)
    return models(federation.hub.database, digest)


def test_the_same_apps_give_the_same_bits_in_memory_and_on_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "CONSENT_PERIOD_S", 0.02)
    found = in_memory(tmp_path / "memory")
    assert len(set(found)) == 3
    assert found == on_the_link(tmp_path / "link")
