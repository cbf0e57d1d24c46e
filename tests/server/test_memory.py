"""The Grid in this process: who is called, who is not, and how waiting ends."""

import threading
import time

import pytest

from common import flower
from common.errors import FailureError
from server.memory import MemoryGrid
from server.waiting import PromptGrid


def echo(message: flower.Message) -> flower.Message:
    return flower.reply(message, b"to " + flower.body_of(message), flower.attachment_of(message))


def ask(node: int, body: bytes = b"x") -> flower.Message:
    return flower.instruction(node, "query.test", body, attachment=[b"chunk"], ttl_s=5)


def bodies(replies: list[flower.Message]) -> dict[int, bytes]:
    return {reply.metadata.src_node_id: flower.body_of(reply) for reply in replies}


def test_replies_come_with_their_payload_to_whom_they_answer() -> None:
    grid = MemoryGrid({3: echo, 1: echo})
    assert grid.get_node_ids() == [1, 3]
    ids = grid.push_messages([ask(3, b"c"), ask(1, b"a")])
    assert len(set(ids)) == 2
    second = grid.pull_messages(ids[1:])
    assert bodies(second) == {1: b"to a"}
    assert flower.attachment_of(second[0]) == [b"chunk"]
    first = grid.pull_messages(ids)
    assert [reply.metadata.reply_to_message_id for reply in first] == ids[:1]
    assert grid.pull_messages(ids) == []
    assert bodies(grid.send_and_receive([ask(1), ask(3)], timeout=1)) == {1: b"to x", 3: b"to x"}


def test_it_is_the_grid_that_an_exchange_wants() -> None:
    grid = MemoryGrid({})
    assert isinstance(grid, PromptGrid)
    assert grid.sink is None


def test_offline_nodes_get_nothing() -> None:
    called: list[int] = []

    def note(message: flower.Message) -> flower.Message:
        called.append(message.metadata.dst_node_id)
        return echo(message)

    grid = MemoryGrid({1: note, 2: note})
    grid.online.discard(2)
    assert grid.get_node_ids() == [1]
    ids = grid.push_messages([ask(1), ask(2), ask(9)])
    assert len(ids) == 3
    assert bodies(grid.pull_messages(ids)) == {1: b"to x"}
    grid.online.add(2)
    assert grid.pull_messages(ids) == []
    assert bodies(grid.send_and_receive([ask(2)])) == {2: b"to x"}
    assert called == [1, 2]


def test_a_node_that_leaves_while_it_answers_is_silent() -> None:
    def die(message: flower.Message) -> flower.Message:
        grid.online.discard(1)
        return echo(message)

    grid = MemoryGrid({1: die})
    ids = grid.push_messages([ask(1)])
    grid.online.add(1)
    assert grid.pull_messages(ids) == []


def test_waiting_ends_with_a_reply_a_wake_or_the_time() -> None:
    grid = MemoryGrid({1: echo, 2: echo})
    grid.online.discard(2)
    ids = grid.push_messages([ask(1), ask(2)])
    began = time.monotonic()
    grid.wait(ids, 30)
    assert time.monotonic() - began < 5
    began = time.monotonic()
    grid.wait(ids[1:], 0.05)
    assert 0.04 < time.monotonic() - began < 5

    ended = threading.Event()

    def wait() -> None:
        grid.wait(ids[1:], 30)
        ended.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    deadline = time.monotonic() + 10
    while not ended.is_set():
        assert time.monotonic() < deadline
        grid.wake()
        ended.wait(0.01)
    waiter.join(5)


def test_withdrawn_replies_are_dropped() -> None:
    grid = MemoryGrid({1: echo})
    ids = grid.push_messages([ask(1), ask(1)])
    grid.withdraw(ids[:1])
    grid.withdraw(ids[:1])
    assert len(grid.pull_messages(ids)) == 1


def test_runs_are_remembered_and_messages_not_made() -> None:
    grid = MemoryGrid({})
    assert grid.run == flower.empty_run()
    grid.set_run(flower.empty_run(7))
    assert grid.run.run_id == 7
    with pytest.raises(FailureError):
        grid.create_message()
