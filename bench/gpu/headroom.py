"""How large a batch fits on a smaller card: SGLang with the KV room that a 16 GiB or 24 GiB card would leave it.

The room is the card's size, less 1 GiB, less weights and CUDA graphs as the engine reports them of a server that booted alone; it is set by
the engine's own KV-token flag. The largest batch is found by `softprune.bench.max_batch`, exactly: whole checkpoint against rewritten ones.
A search whose time is over keeps its tries, and goes on from them in the next run.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from softprune.bench.decode import DecodeClient, Workload, about, head
from softprune.bench.gpu.launchers import Launcher
from softprune.bench.gpu.plan import PLAIN, REWRITTEN, Served
from softprune.bench.gpu.prepare import prepare, prepare_seconds
from softprune.bench.gpu.run_file import facts_of
from softprune.bench.gpu.session import Budget, Store, booted
from softprune.bench.graph_memory import graph_entries
from softprune.bench.max_batch import Try, max_batch
from softprune.bench.server import Server, ServerError
from softprune.errors import InputError, SoftpruneError
from softprune.signals import run_async

FORMAT, VERSION = "softprune.gpu-memory", 1
GIB = 2**30
LEAST_GRAPHS_GIB = -0.05
"""An engine that subtracts what is free after from before can find a little less than nothing."""
DESCRIBED = ("engine", "model", "server_flags", "gpu", "softprune")
VARIANTS: Mapping[str, Served] = {"unmasked": PLAIN, "keep16": REWRITTEN[16], "keep24": REWRITTEN[24]}
"""All are served by the engine alone."""


@dataclass(frozen=True)
class Shape:
    """What is looked for.

    Attributes:
        cards_gib, reserve_gib: sizes of cards, and what is left free of each.
        prompt_tokens, max_new_tokens: of every request.
        probe_tokens: KV room of the servers whose memory is read.
        graphs: largest batch with a CUDA graph, the same for all.
        most: largest batch that is tried.
        boot_s, search_s: estimates of a boot, alone or two or three side by side, and of a search with its repeats, by card and variant.
        least_s: what a search has to have to be begun, less if it is thought to take less: some tries and what follows them.
    """

    cards_gib: tuple[float, ...] = (16, 24)
    reserve_gib: float = 1.0
    prompt_tokens: int = 256
    max_new_tokens: int = 2048
    probe_tokens: int = 80_000
    graphs: int = 192
    most: int = 512
    boot_s: tuple[float, float] = (60, 90)
    search_s: tuple[Mapping[str, float], ...] = (
        {"unmasked": 100, "keep16": 150, "keep24": 120},
        {"unmasked": 190, "keep16": 280, "keep24": 230},
    )
    least_s: float = 150

    def room(self, card_gib: float, memory: Mapping[str, Any]) -> int:
        """KV tokens that a card has room for, 0 for none; `memory` is of `Launcher.memory`."""
        free = card_gib - self.reserve_gib - memory["weights_gib"] - memory["graphs_gib"]
        return max(0, int(free * memory["kv_tokens"] / memory["kv_gib"]))


# Two of the larger card at once, since three of them do not fit 80 GB.
GROUPS = ((0, ("unmasked", "keep16", "keep24")), (1, ("unmasked", "keep16")), (1, ("keep24",)))


class Headroom:
    """As `softprune.bench.gpu.matrix.Matrix`; rows are "memory.VARIANT" and "max_batch.16gib.VARIANT"."""

    def __init__(
        self, launcher: Launcher, shape: Shape, work: Path, store: Store, budget: Budget, only: Collection[str] | None = None
    ) -> None:
        self.launcher, self.shape, self.work, self.store, self.budget = launcher, shape, work, store, budget
        known = self.rows
        if unknown := sorted(set(only or ()) - set(known)):
            raise InputError("--only", "", ", ".join(unknown), "rows of the plan, which `plan` prints")
        self.only = set(known) if only is None else set(only)

    @property
    def rows(self) -> dict[str, float]:
        """Estimated seconds by name, in order of importance."""
        memory = {f"memory.{variant}": self.shape.boot_s[0] for variant in VARIANTS}
        searches = {self._row(card, one): self.shape.search_s[card][one] for card, group in GROUPS for one in group}
        return memory | searches

    def _row(self, card: int, variant: str) -> str:
        return f"max_batch.{self.shape.cards_gib[card]:g}gib.{variant}"

    def left(self) -> list[str]:
        """Names of rows to measure."""
        there = self.store.names
        return [name for name in self.rows if name in self.only and name not in there]

    def run(self) -> list[str]:
        """Measure what there is time for; what is left."""
        for variant, served in VARIANTS.items():
            if (name := f"memory.{variant}") in self.left() and self._has_time(name, [served], self.shape.boot_s[0], 0):
                self._probe(name, served)
        for card, group in GROUPS:
            left = self.left()
            todo = [one for one in group if self._row(card, one) in left and f"memory.{one}" in self.store.names]
            if not todo:
                continue
            name = self._row(card, todo[0])
            if self._has_time(name, [VARIANTS[one] for one in todo], self.shape.boot_s[len(todo) > 1], self._least(name)):
                self._search(card, todo)
        return self.left()

    def _least(self, name: str) -> float:
        return min(self.rows[name], self.shape.least_s)

    def _has_time(self, name: str, served: Sequence[Served], boot_s: float, row_s: float) -> bool:
        fixed = boot_s + prepare_seconds(self.work, [one.model for one in served])
        if fits := self.budget.fits(row_s, fixed):
            prepare(self.work, [one.model for one in served], self.launcher.preset)
            self.store.measured_with(facts_of(self.launcher, self.work))
        else:
            typer.echo(f"{name}: {fixed:.0f} s and {row_s:.0f} s of measuring do not fit into {self.budget.left:.0f} s")
        return fits

    def _probe(self, name: str, served: Served) -> None:
        """Read a server's memory; nothing else may run on the device."""
        with booted(self.launcher, {served: self.shape.probe_tokens}, self.shape.graphs, self.work, self.budget.left, self.store) as up:
            if served.name not in up:
                return
            try:
                memory, described = self.launcher.memory(up[served.name], self.work / served.model), describe(up[served.name])
                if None in memory.values():
                    raise ServerError(f"{served.name}: found {memory}; expected numbers for all of them")
                account = (described["server_flags"].get("memory_usage") or {}).get("graph")
                if (low := min(graph_entries(account), default=0.0)) < LEAST_GRAPHS_GIB:
                    found = f"{low:.2f} GiB of CUDA graphs, for something else gave memory back while it booted"
                    raise ServerError(f"{served.name}: found {found}; expected a server that is alone on its device")
            except (OSError, SoftpruneError) as error:
                self.store.failed(name, error)
                return
        self.store.keep(name, {**head(FORMAT, VERSION, {"servers_on_gpu": "1"}), **described, "memory": memory})
        typer.echo(f"{name}: {memory}")

    def _search(self, card: int, variants: Sequence[str]) -> None:
        size, documents = self.shape.cards_gib[card], self.store.documents()
        memory = {one: documents[f"memory.{one}"]["memory"] for one in variants}
        rooms = {one: self.shape.room(size, memory[one]) for one in variants}
        least = self.shape.prompt_tokens + self.shape.max_new_tokens
        notes = {one: self._notes(size, one, memory[one], rooms[one]) for one in variants}
        for one in [one for one in variants if rooms[one] < least]:
            served = {field: documents[f"memory.{one}"][field] for field in DESCRIBED}
            self._keep_no_room(self._row(card, one), served, memory[one], rooms.pop(one), notes[one])
        servers = {VARIANTS[one]: tokens for one, tokens in rooms.items()}
        seconds = self.budget.left - self._least(self._row(card, variants[0]))
        with booted(self.launcher, servers, self.shape.graphs, self.work, seconds, self.store, *self.launcher.metrics_args) as up:
            for one in rooms:
                name, server = self._row(card, one), up.get(VARIANTS[one].name)
                if server is None or not self.budget.fits(self._least(name)):
                    continue
                self._find(name, server, {**notes[one], "servers_on_gpu": str(len(servers))})

    def _notes(self, size: float, variant: str, memory: Mapping[str, Any], kv_tokens: int) -> dict[str, str]:
        """What the KV room was worked out from."""
        return {
            "variant": variant, "card_gib": f"{size:g}", "reserve_gib": f"{self.shape.reserve_gib:g}", "kv_tokens": str(kv_tokens),
            "kv_bytes_a_token": f"{memory['kv_gib'] * GIB / memory['kv_tokens']:.0f}",
            **{name: f"{memory[name]:.3f}" for name in ("weights_gib", "graphs_gib")},
        }  # fmt: skip

    def _keep_no_room(self, name: str, served: dict[str, Any], memory: Mapping[str, Any], kv_tokens: int, notes: dict[str, str]) -> None:
        """That not even one request fits is a finding, too."""
        limit = f"room for {kv_tokens} KV tokens; a request needs {self.shape.prompt_tokens + self.shape.max_new_tokens}"
        sizes = {"prompt_tokens": self.shape.prompt_tokens, "max_new_tokens": self.shape.max_new_tokens}
        document = {**head("softprune.max-batch", 1, notes), **served, "settings": sizes, "memory": {**memory, "kv_tokens": kv_tokens}}
        self.store.keep(name, {**document, "tries": [], "max_batch": None, "limit": limit, "result": None, "error": None})
        typer.echo(f"{name}: {limit}")

    def _find(self, name: str, server: Server, notes: dict[str, str]) -> None:
        began, shape = time.monotonic(), self.shape
        document: dict[str, Any] = {}

        def say(tried: Try, number: int) -> None:
            self.store.keep_part(name, document)
            typer.echo(f"{name}: try {number}, batch {tried.batch}: {tried.why or 'ran'}, {self.budget.left:.0f} s left")

        work = Workload(shape.prompt_tokens, shape.max_new_tokens, 0, self.launcher.token_ids)
        try:
            max_batch(
                f"http://127.0.0.1:{server.port}", work, shape.most, key=server.key, notes=notes, stall_seconds=180, progress=say,
                into=document, until=began + self.budget.left, earlier=self.store.part(name),
            )  # fmt: skip
        except (OSError, SoftpruneError) as error:
            self.store.failed(name, error)
            return
        if document["out_of_time"]:
            self.store.keep_part(name, document)
            typer.echo(f"{name}: {document['limit']}; {len(document['tries'])} tries are kept")
            return
        self.store.keep(name, document)
        if not document["resumed"]:
            self.budget.took(self.rows[name], time.monotonic() - began)
        typer.echo(f"{name}: {document['max_batch']} ({document['limit']})")


def describe(server: Server) -> dict[str, Any]:
    """What a server says of itself, as documents hold it."""

    async def look() -> dict[str, Any]:
        async with DecodeClient(f"http://127.0.0.1:{server.port}", Workload(1, 1), key=server.key) as client:
            return await about(client, None)

    return run_async(look())
