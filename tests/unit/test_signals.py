"""Signals that end a process, wherever in its event loop they come."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from softprune.signals import ended_in_order, run_async, uninterrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """They are the old ones afterwards; and a test that hangs fails."""

    def hung(number: int, frame: object) -> None:
        raise AssertionError("the signal did not end it")

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert [signal.getsignal(number) for number in numbers] == before


class Interrupted(deque[Any]):
    """What an event loop is to call; the process gets a signal just as a task's wake-up has been taken out of it."""

    number: int | None = None

    def popleft(self) -> Any:
        handle = super().popleft()
        if self.number is not None and "wakeup" in repr(handle).lower():
            number, self.number = self.number, None
            os.kill(os.getpid(), number)
        return handle


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_in_the_middle_of_an_event_loop(number: int) -> None:
    """An exception out of the handler would lose the wake-up there, and the loop would wait for the task forever."""
    ended: list[str] = []

    async def waits() -> None:
        loop: Any = asyncio.get_running_loop()
        loop._ready = ready = Interrupted(loop._ready)
        ready.number = number
        woken = loop.create_future()
        loop.call_later(0.01, woken.set_result, None)
        try:
            await woken
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled" if ready.number is None else "no signal came")

    with pytest.raises(SystemExit) as caught, ended_in_order():
        run_async(waits())
    assert caught.value.code == 128 + number
    assert ended == ["cancelled"]


def test_a_signal_is_not_lost_when_the_task_has_just_ended() -> None:
    async def ends() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit), ended_in_order():
        run_async(ends())


def test_without_a_signal() -> None:
    async def seven() -> int:
        return 7

    async def gives_up() -> None:
        raise asyncio.CancelledError

    assert run_async(seven()) == 7
    with ended_in_order():
        assert run_async(seven()) == 7
        with pytest.raises(asyncio.CancelledError):
            run_async(gives_up())


def test_outside_an_event_loop() -> None:
    with pytest.raises(SystemExit) as caught, ended_in_order():
        os.kill(os.getpid(), signal.SIGHUP)
    assert caught.value.code == 129
    with uninterrupted():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)


def test_what_is_ignored_stays_so() -> None:
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone() -> None:
    def work() -> None:
        with ended_in_order(), uninterrupted():
            done.append(1)

    done: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
