"""Channels between threads of one process, and the mailbox that a worker reads."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fakes import until

from engine import Engine
from engine.seam.channel import ChannelClosed
from engine.seam.messages import HTTP, INITIAL_CREDIT, Call, Cancel
from engine.testing.fakes import FakeListener
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine.testing.strikes import struck
from engine_inline import InlineAdapter
from engine_inline.channel import InlineChannel, Mailbox, connect


def at_once(function: Callable[[], object]) -> None:
    function()


class World:
    """A pair of ends; what the caller sends waits in the mailbox until the worker reads."""

    def __init__(self) -> None:
        self.caller, self.service, self.mailbox = FakeListener(), FakeListener(), Mailbox()
        self.mailbox.take_turn()
        near, self.far = connect(self.caller, at_once, self.service, self.mailbox)
        assert isinstance(near, InlineChannel)
        self.near = near

    def read(self) -> None:
        self.mailbox.run_pending(0)


def test_calls_that_had_not_begun_when_it_was_cut_do_not_begin_any_more() -> None:
    world = World()
    assert world.far.begin(3)
    assert world.far.begin(2)
    assert [number for number in (1, 2, 3, 4) if world.near.may_have_begun(number)] == [2, 3]
    world.far.cut("was killed")
    assert not world.near.may_have_begun(4)
    assert not world.far.begin(4)


def test_each_end_delivers_where_its_listener_lives() -> None:
    world = World()
    world.near.send(Cancel(1))
    world.near.send(Cancel(2))
    assert world.service.heard == []
    world.read()
    assert world.service.heard == [Cancel(1), Cancel(2)]
    world.far.send(Cancel(3))
    assert world.caller.heard == [Cancel(3)]
    world.near.watch()
    assert not world.near.drive(lambda: False, 0.0)


@pytest.mark.parametrize("end", ["near", "far"])
def test_closing_one_end_loses_the_other(end: str) -> None:
    world = World()
    mine, theirs = (world.near, world.far) if end == "near" else (world.far, world.near)
    own, other = (world.caller, world.service) if end == "near" else (world.service, world.caller)
    mine.close()
    mine.close()
    world.read()
    assert (own.losses, other.losses) == (0, 1)
    assert other.reason == "the peer closed the channel"
    assert mine.closed and theirs.closed
    for channel in (mine, theirs):
        with pytest.raises(ChannelClosed):
            channel.send(Cancel(1))
    theirs.close()
    assert (own.losses, other.losses) == (0, 1)


def test_a_closed_end_hears_nothing_that_was_on_its_way() -> None:
    world = World()
    world.near.send(Cancel(1))
    world.far.close()
    world.read()
    assert world.service.heard == []


# -- the mailbox -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mailbox(leaves_nothing: Footprint) -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.close()


def test_reading_waits_for_the_first_item() -> None:
    mailbox, heard = Mailbox(), []
    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(lambda: (mailbox.post(None), mailbox.post(lambda: heard.append(1))))
        while not heard:
            mailbox.run_pending(None)
        posting.result(PATIENCE_S)
    mailbox.run_pending(0.0)
    mailbox.run_pending(0.001)
    assert heard == [1]


def test_while_user_code_runs_whoever_posts_delivers(mailbox: Mailbox) -> None:
    threads: list[str] = []

    def note() -> None:
        threads.append(threading.current_thread().name)

    mailbox.take_turn()
    with ThreadPoolExecutor(1, thread_name_prefix="poster") as pool:
        pool.submit(mailbox.post, note).result(PATIENCE_S)
        assert threads == []  # it waits for the worker
        mailbox.step_out()
        assert threads == ["MainThread"]
        pool.submit(mailbox.post, note).result(PATIENCE_S)
        assert threads == ["MainThread", "poster_0"]
        mailbox.step_in()
        pool.submit(mailbox.post, note).result(PATIENCE_S)
        assert len(threads) == 2
        mailbox.run_pending(0)
        assert threads[2:] == ["MainThread"]


def test_the_main_thread_runs_nothing_of_a_worker(mailbox: Mailbox) -> None:
    """A signal handler that raises there would tear it."""
    threads: list[threading.Thread] = []
    out, back = threading.Event(), threading.Event()

    def work() -> None:
        mailbox.take_turn()
        mailbox.step_out()
        out.set()
        assert back.wait(PATIENCE_S)
        mailbox.step_in()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        assert out.wait(PATIENCE_S)
        mailbox.post(lambda: threads.append(threading.current_thread()))
        eventually(lambda: threads)
        assert threads != [threading.main_thread()]
        back.set()
        working.result(PATIENCE_S)


def test_when_there_are_no_threads_left_the_main_thread_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    mailbox, heard = Mailbox(), []
    mailbox.take_turn()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        mailbox.step_out()
    mailbox.post(lambda: heard.append(1))
    assert heard == [1]


def test_what_is_sent_arrives_once_wherever_that_is_interrupted() -> None:
    for place in range(200):
        world = World()
        where = struck(lambda world=world: world.near.send(Cancel(1)), place, KeyboardInterrupt())
        world.near.send(Cancel(2))
        while len(world.service.heard) < 1 or world.service.heard[-1] != Cancel(2):
            world.read()
        assert world.service.heard in ([Cancel(1), Cancel(2)], [Cancel(2)]), where
        assert not world.near.closed and not world.service.losses
        if not where:
            assert place > 3
            return


def test_a_worker_that_comes_back_waits_for_who_delivers(mailbox: Mailbox) -> None:
    delivering, go_on, back = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        delivering.set()
        assert go_on.wait(PATIENCE_S)
        assert not back.is_set()

    mailbox.take_turn()
    mailbox.step_out()
    with ThreadPoolExecutor(2) as pool:
        posting = pool.submit(mailbox.post, slow)
        assert delivering.wait(PATIENCE_S)
        later = pool.submit(mailbox.post, lambda: None)  # somebody else delivers: it is left to them
        later.result(PATIENCE_S)
        go_on.set()
        mailbox.step_in()
        back.set()
        posting.result(PATIENCE_S)


def test_on_a_loop_the_loop_delivers_in_the_workers_context() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    heard: list[str] = []
    mailbox = Mailbox()

    def note() -> None:
        heard.append(f"{variable.get()} on {threading.current_thread().name}")

    async def worker() -> None:
        mailbox.bind(asyncio.get_running_loop())
        with ThreadPoolExecutor(1) as pool:

            def post() -> None:
                variable.set("the poster's")
                mailbox.post(note)
                mailbox.post(None)

            pool.submit(post).result(PATIENCE_S)
        await until(lambda: len(heard) == 2)

    variable.set("the worker's")
    mailbox.post(note)  # before there is a loop
    mailbox.post(None)
    asyncio.run(worker())
    assert heard == ["the worker's on MainThread"] * 2
    mailbox.post(note)  # after it is gone
    assert len(heard) == 2


def test_a_worker_that_is_killed_gives_its_streams_up(leaves_nothing: Any) -> None:
    """Its thread waits for credit that nobody will give any more."""

    def endless(request: Any) -> Any:
        while True:
            yield b"x"

    adapter = InlineAdapter()
    with Engine(adapter) as engine:
        engine.create_backend("b", endless)
        listener = FakeListener()
        channel = adapter.open_channel("inline:b#1", listener, on_loop=False)
        scope = pickle.dumps({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""})
        channel.send(Call(1, HTTP, "__call__", None, "", scope, b""))
        eventually(lambda: len(listener.heard) == INITIAL_CREDIT)
        engine.delete_backend("b", force=True)
