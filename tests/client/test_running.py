"""One study while it runs here: what its machine answers by itself. The rounds are in test_participation."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client.running import Running
from common import messages


def test_a_pair_with_a_wrong_tag_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Which of the two is at fault nobody can say; that there is no pair, the hospital must know."""
    site = SimpleNamespace(disputed=frozenset({2}), on_confirms=lambda _: frozenset({3, 4}))
    fields: dict[str, Any] = dict.fromkeys(("manifest", "computation", "model_digest", "ledger_keys"))
    run = Running(
        site=cast(Any, site), params=cast(Any, SimpleNamespace(man=b"\1" * 32)), setup_ends=0.0, **fields
    )
    with caplog.at_level(logging.INFO, "wardround.site"):
        assert run.answer(messages.CONFIRMS, ()) == ()
    assert [record.getMessage() for record in caplog.records] == [
        "study 010101010101: keys shared with 2 hospitals",
        "study 010101010101: no keys shared with hospital 2: somebody is at fault",
    ]
