"""What a run has: time that ends, servers that end with it, and a folder that rows are kept in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from softprune.bench.gpu import run_file
from softprune.bench.gpu.launchers import Launcher
from softprune.bench.gpu.plan import Served
from softprune.bench.server import Server, ServerError
from softprune.errors import InputError
from softprune.files import write_whole

STOPPING_S = 8
"""Kept for stopping servers."""
SLACK = 1.15
PIDS = "servers.json"


@dataclass
class Budget:
    """Seconds of a run, and how far estimates were off so far."""

    limit_s: float
    began: float = field(default_factory=time.monotonic)
    _ratios: list[float] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.began + self.limit_s - STOPPING_S - time.monotonic()

    @property
    def pace(self) -> float:
        """What estimates of rows are multiplied by: the median of what the rows so far took over what was thought, at least 1."""
        return max(1.0, statistics.median(self._ratios)) if self._ratios else 1.0

    def fits(self, rows_s: float, fixed_s: float = 0.0) -> bool:
        """Whether there is time for rows of this estimate, after something else that takes `fixed_s`."""
        return fixed_s + rows_s * self.pace * SLACK <= self.left

    def took(self, estimate_s: float, seconds: float) -> None:
        self._ratios.append(seconds / estimate_s)


@dataclass
class Store:
    """Raw files by row name, each written whole as soon as it is measured, and what they all were measured with (`run_file`)."""

    folder: Path
    _facts: Mapping[str, Any] | None = None

    def open(self, resume: bool) -> None:
        """Make the folder.

        Raises:
            InputError: it holds rows, and they are not to be gone on with.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self.names or [path.name for path in self.folder.glob("*.partial")]
        if there and not resume:
            raise InputError(str(self.folder), "", f"{len(there)} rows of an earlier run", "an empty folder, or --resume")

    def measured_with(self, facts: Mapping[str, Any]) -> None:
        """Say what rows from now on are measured with.

        Raises:
            InputError: those that are there were measured with something else.
        """
        run_file.check(self.folder, facts, bool(self.names))
        self._facts = facts

    @property
    def names(self) -> set[str]:
        return {path.name.removesuffix(".json") for path in row_files(self.folder)}

    def keep(self, name: str, document: dict[str, Any]) -> None:
        """A row, whose half-measured form and error are no longer needed; the first one also says what it was measured with."""
        self._say()
        write_whole(self.folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
        for old in ("error", "partial"):
            (self.folder / f"{name}.{old}").unlink(missing_ok=True)

    def keep_part(self, name: str, document: dict[str, Any]) -> None:
        """What there is so far of a row that can be gone on with."""
        self._say()
        write_whole(self.folder / f"{name}.partial", json.dumps(document, indent=1) + "\n")

    def part(self, name: str) -> dict[str, Any] | None:
        """What `keep_part` kept; None for nothing."""
        path = self.folder / f"{name}.partial"
        return dict(json.loads(path.read_text())) if path.exists() else None

    def _say(self) -> None:
        if self._facts is not None and not (self.folder / run_file.NAME).exists():
            run_file.write(self.folder, self._facts)

    def failed(self, name: str, error: Exception) -> None:
        """Say why there is no such row; it stays to be measured."""
        text = f"{type(error).__name__}: {error}"
        typer.echo(f"{name}: {text[-1500:]}")
        write_whole(self.folder / f"{name}.error", text + "\n")

    def documents(self) -> dict[str, dict[str, Any]]:
        """All rows, by name."""
        return {name: json.loads((self.folder / f"{name}.json").read_text()) for name in sorted(self.names)}


@contextmanager
def alone(*folders: Path) -> Iterator[None]:
    """Have these folders, which are made, for this run alone until the block ends: it ends all servers that it finds in them.

    Raises:
        InputError: another run has one.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            opened = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, opened)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(str(folder), "", "another run at work in it", "a folder of its own for each run") from None
        yield


def row_files(folder: Path) -> list[Path]:
    """Raw files of rows, in order of their names."""
    return sorted(path for path in folder.glob("[!.]*.json") if path.name != run_file.NAME)


@contextmanager
def booted(
    launcher: Launcher, rooms: Mapping[Served, int], max_batch: int, work: Path, seconds: float, store: Store, *more: str
) -> Iterator[dict[str, Server]]:
    """Servers side by side, by name; they end with the block.

    Args:
        rooms: servers, and the KV tokens of each.
        max_batch, more: as for `Launcher.start`.
        work: the working folder.
        seconds: until they have to be up; the store is told of those that are not, or have less room, and they are left out.
    """
    stop_leftovers(work)
    servers: dict[Served, Server] = {}
    try:
        for served, kv_tokens in rooms.items():
            servers[served] = launcher.start(served, work, kv_tokens, max_batch, *more)
            write_whole(work / PIDS, json.dumps([server.process.pid for server in servers.values()]))
        began, up = time.monotonic(), {}
        for served, server in servers.items():
            try:
                server.wait_ready(max(1.0, began + seconds - time.monotonic()))
                launcher.check_room(server, rooms[served])
                up[served.name] = server
                typer.echo(f"{served.name}: up after {time.monotonic() - began:.0f} s")
            except ServerError as error:
                store.failed(f"boot.{served.name}", error)
        yield up
    finally:
        for server in servers.values():
            server.stop(grace=0)
        (work / PIDS).unlink(missing_ok=True)


def stop_leftovers(work: Path) -> None:
    """End the servers of a run in this folder that was killed: they would hold the GPU's memory."""
    with contextlib.suppress(OSError, ValueError):
        for pid in json.loads((work / PIDS).read_text()):
            with contextlib.suppress(OSError):
                # The number may belong to another process by now.
                if str(work).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.killpg(pid, signal.SIGKILL)
                    typer.echo(f"ended server {pid} of a run that was killed")
