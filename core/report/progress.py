"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


@contextmanager
def tensor_progress(total_bytes: int | None, console: Console) -> Iterator[Callable[[str, int], None]]:
    """A bar over bytes written; the yielded function takes (tensor name, bytes)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("writing", total=total_bytes)

        def advance(name: str, num_bytes: int) -> None:
            progress.update(task, advance=num_bytes, description=name[-48:])

        yield advance


@contextmanager
def count_progress(description: str, total: int, console: Console, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over things of one kind, `done` of which were done before; the yielded function takes how many more are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


class _TokensPerSecond(TextColumn):
    """Of what was done since the bar was drawn."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s", style="progress.data.speed")


@contextmanager
def token_progress(description: str, total: int, console: Console, done: int = 0) -> Iterator[Callable[[int], None]]:
    """As `count_progress`, of tokens, with their rate."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _TokensPerSecond(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda count: progress.advance(task, count)
