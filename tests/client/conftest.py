"""Fixtures of the hospital's tests: admitted hospitals, made once and copied."""

from pathlib import Path

import pytest

from tests.client.federation import Federation, make


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub and four admitted hospitals; never changed."""
    folder = tmp_path_factory.mktemp("template")
    make(folder)
    return folder


@pytest.fixture
def federation(template: Path, tmp_path: Path) -> Federation:
    return Federation(template, tmp_path / "federation")
