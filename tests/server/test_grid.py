"""The Grid's own rules, over a link without sites and with one."""

import time

import pytest

from common import flower
from common.errors import FailureError, UnreachableError
from server.grid import GrpcGrid
from tests.conftest import Pki
from tests.server.test_link import RunningAgent, ask, echo, running_link, wait_until


def question(node_id: int, ttl_s: float, body: bytes = b"x") -> flower.Message:
    return flower.instruction(node_id, "query.result", body, ttl_s=ttl_s)


def test_nothing_is_kept_past_its_time(pki: Pki) -> None:
    """Results are pushed and their replies never fetched: a long study must not collect them."""
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        grid.push_messages([question(site, 0.3) for site in (1, 1, 9) for _ in range(10)])
        wait_until(lambda: len(grid._replies) == 20)
        assert len(grid._waiting) == 10
        time.sleep(0.35)
        (kept,) = grid.push_messages([question(9, 60)])
        assert list(grid._waiting) == list(grid._expires) == [kept]
        assert not grid._replies


def test_a_reply_is_given_out_once(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        grid = GrpcGrid(link)
        message_ids = list(grid.push_messages([question(1, 60, b"ab"), question(9, 60)]))
        grid.wait(message_ids, 10)
        assert [flower.body_of(reply) for reply in grid.pull_messages(message_ids)] == [b"ba"]
        assert list(grid.pull_messages(message_ids)) == []
        grid.withdraw(message_ids)
        assert not grid._waiting
        assert not grid._expires


def test_two_grids_on_one_link_keep_apart(pki: Pki) -> None:
    with running_link(pki) as link, RunningAgent(link, pki.client(1), 1, echo):
        wait_until(lambda: 1 in link.online())
        first, second = GrpcGrid(link), GrpcGrid(link)
        message_ids = list(first.push_messages([question(1, 60)]))
        first.wait(message_ids, 10)
        assert list(second.pull_messages(message_ids)) == []
        assert len(ask(second, 1, b"ab")) == 1
        assert len(list(first.pull_messages(message_ids))) == 1


def test_a_stopped_link_and_create_message_are_clear_errors(pki: Pki) -> None:
    with running_link(pki) as link:
        grid = GrpcGrid(link)
        with pytest.raises(FailureError, match="deprecated"):
            grid.create_message()
    with pytest.raises(UnreachableError):
        grid.get_node_ids()
    with pytest.raises(UnreachableError):
        grid.push_messages([question(1, 60)])
    with pytest.raises(UnreachableError):
        grid.withdraw(["nobody"])
