"""Fixtures of the auditor's tests: one federation that ran two studies, made once and never changed."""

from collections.abc import Iterator

import pytest

from common.audit.evidence import Evidence
from tests.common.audit.federation import WITHOUT_DP, Federation


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A study with privacy, of which one round went without Holy Cross, then one without privacy."""
    federation = Federation(tmp_path_factory.mktemp("ledgers"))
    private = federation.submit()
    federation.round(private, 1)
    federation.round(private, 2, cohort=(1, 2, 3))
    federation.round(private, 4)
    federation.end(private)
    plain = federation.submit(**WITHOUT_DP)
    federation.round(plain, 1)
    federation.round(plain, 2)
    yield federation
    federation.close()


@pytest.fixture
def evidences(ran: Federation) -> list[Evidence]:
    """The evidence of the hub and four hospitals, by id."""
    return ran.evidences()
