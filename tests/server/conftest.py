"""A running hub on loopback with three admitted hospitals, made once a module."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.desk import CoordinatorDesk
from server.service import Hub
from tests.server.hospitals import Founded, found


@dataclass
class RunningHub:
    """A hub that listens, its folder, and a desk of its coordinator."""

    founded: Founded
    hub: Hub
    desk: CoordinatorDesk

    def submit(self, **changes: object) -> str:
        signed = self.founded.sign_study(**changes)
        return self.desk.submit(signed.manifest_bytes, signed.signature).digest


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder: Path = tmp_path_factory.mktemp("running")
    founded = found(folder)
    hub = Hub(founded.home)
    hub.start()
    try:
        with CoordinatorDesk(founded.coordinator) as desk:
            yield RunningHub(founded, hub, desk)
    finally:
        hub.stop()
