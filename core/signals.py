"""Signals that end a process: what it has to put back or to stop is put back and stopped first, as after Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise SystemExit(128 + their number); one that is ignored, as by nohup, stays so."""
    with _handled([number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN], _raise):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block, neither SIGTERM, SIGHUP nor Ctrl-C ends the process; for what takes seconds at most."""
    with _handled([signal.SIGINT, *_ENDING], signal.SIG_IGN):
        yield


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in which the signals of `ended_in_order` cancel the task, as Ctrl-C does.

    An exception out of nowhere would take a step from the event loop that a task then waits for, forever.

    Raises:
        SystemExit: the task was cancelled, or had just ended.
    """
    ended: list[int] = []

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel(number: int, frame: object) -> None:
            ended.append(number)
            loop.call_soon_threadsafe(task.cancel)

        with _handled([number for number in _ENDING if signal.getsignal(number) is _raise], cancel):
            return await main

    try:
        result = asyncio.run(cancellable())
    except asyncio.CancelledError:
        if not ended:
            raise
    if ended:
        raise SystemExit(128 + ended[0])
    return result


def _raise(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _handled(numbers: list[int], handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Handle signals otherwise; only a process's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)
