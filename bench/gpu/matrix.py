"""Runs a plan's rows on live servers until they are all there, or the time is over."""

from __future__ import annotations

import datetime
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from softprune.bench.decode import Workload, local_gpus, measure
from softprune.bench.gpu.launchers import Launcher
from softprune.bench.gpu.plan import VARIANTS, Phase, Row, Variant
from softprune.bench.gpu.prepare import masks_for, prepare, prepare_seconds
from softprune.bench.gpu.run_file import facts_of
from softprune.bench.gpu.session import Budget, Store, booted
from softprune.bench.server import Server
from softprune.errors import InputError, SoftpruneError
from softprune.files import write_whole
from softprune.server_client import ServerClient

WARM_TOKENS = 8
UNKNOWN = -1
"""A server's mask while it is switched, and after a switch that failed."""


class NotMeasuredError(SoftpruneError):
    """A row that was measured, but not what it was to be."""


class Matrix:
    """A plan, an engine, a working folder and a folder of raw files.

    Args:
        phases: in order of importance.
        only: names of rows; None for all.

    Raises:
        InputError: no such row.
    """

    def __init__(
        self, launcher: Launcher, phases: Sequence[Phase], work: Path, store: Store, budget: Budget, only: Collection[str] | None = None
    ) -> None:
        self.launcher, self.phases, self.work, self.store, self.budget = launcher, phases, work, store, budget
        known = {row.name for phase in phases for row in phase.rows}
        if unknown := sorted(set(only or ()) - known):
            raise InputError("--only", "", ", ".join(unknown), "rows of the plan, which `plan` prints")
        self.only = known if only is None else set(only)
        self._warm: set[tuple[int, int]] = set()
        self._masks: dict[int, int | None] = {}

    def left(self, phase: Phase | None = None) -> list[Row]:
        """Rows to measure, of one phase or all."""
        there = self.store.names
        rows = phase.rows if phase else [row for one in self.phases for row in one.rows]
        return [row for row in rows if row.name in self.only and row.name not in there]

    def run(self) -> list[Row]:
        """Measure what there is time for; what is left."""
        for phase in self.phases:
            rows = self.left(phase)
            if not rows:
                continue
            servers = list(dict.fromkeys(VARIANTS[row.variant].server for row in rows))
            models = [served.model for served in servers]
            fixed = phase.boot_s + prepare_seconds(self.work, models)
            if not self.budget.fits(_first_round(rows), fixed):
                typer.echo(
                    f"{phase.name}: {fixed:.0f} s and a first round of {_first_round(rows):.0f} s do not fit into {self.budget.left:.0f} s"
                )
                continue
            prepare(self.work, models, self.launcher.preset)
            self.store.measured_with(facts_of(self.launcher, self.work))
            self.masks = masks_for(self.work)
            for served in servers:
                if served.mask is not None:
                    write_whole(self.work / served.mask_file, self.masks[served.mask].dump())
            typer.echo(f"{phase.name}: {len(servers)} servers at once on this device, {len(rows)} rows")
            room = max(phase.kv_tokens, max(row.kv_tokens for row in rows))
            seconds = self.budget.left - _first_round(rows)
            with booted(self.launcher, dict.fromkeys(servers, room), phase.max_batch, self.work, seconds, self.store) as up:
                self._measure(phase, rows, up, len(servers))
        return self.left()

    def _measure(self, phase: Phase, rows: list[Row], up: dict[str, Server], together: int) -> None:
        boot = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._warm.clear()
        self._masks.clear()
        entered = None
        for row in rows:
            # A round is begun only if it can be ended, as its rows are compared with each other.
            of_round = [one for one in rows if _key(one) == _key(row)]
            if entered != _key(row) and not self.budget.fits(sum(one.seconds for one in of_round)):
                continue
            entered = _key(row)
            server = up.get(VARIANTS[row.variant].server.name)
            if server is None or not self.budget.fits(row.seconds):
                continue
            notes = {"row": row.name, "variant": row.variant, "round": row.round, "phase": phase.name, "boot": boot}
            try:
                self._row(row, server, {**notes, "servers_on_gpu": str(together)})
            except (OSError, SoftpruneError) as error:
                self.store.failed(row.name, error)
                if server.process.poll() is not None:
                    del up[VARIANTS[row.variant].server.name]

    def _row(self, row: Row, server: Server, notes: dict[str, str]) -> None:
        began = time.monotonic()
        self._put(server, VARIANTS[row.variant])
        seed = zlib.crc32(f"{row.round}/{row.max_new_tokens}".encode())
        if (server.port, row.batch) not in self._warm:
            self._send(row, server, Workload(row.prompt_tokens, WARM_TOKENS, seed + 1, self.launcher.token_ids), {})
            self._warm.add((server.port, row.batch))
        document = self._send(row, server, Workload(row.prompt_tokens, row.max_new_tokens, seed, self.launcher.token_ids), notes)
        self._check_served(row, document)
        check_cache(row, document)
        # An unpatched server does not say what it runs on, and a patched one may call it otherwise.
        self.store.keep(row.name, {**document, "gpu": local_gpus() or "CPU"})
        self.budget.took(row.seconds, time.monotonic() - began)
        result = document["results"][0]
        speed = (result["decode_tok_s"] or result["total_tok_s"])["median"]
        typer.echo(f"{row.name}: {speed:,.1f} tok/s, {self.budget.left:.0f} s left")

    def _check_served(self, row: Row, document: Mapping[str, Any]) -> None:
        variant, found = VARIANTS[row.variant], document["softprune"] or {}
        mask = None if variant.keep is None else self.masks[variant.keep].hash
        top_k = found.get("top_k") if variant.server.top_k is None else variant.server.top_k
        if bool(found) != variant.server.is_patched or (found.get("mask_hash"), found.get("top_k")) != (mask, top_k):
            raise NotMeasuredError(f"{row.name}: found {found}; expected mask {mask}, top_k {top_k or 'as the model has it'}")
        tiles = self.launcher.tiles if variant.server.mask is not None else "engine"
        if found and found.get("moe_tiles") != tiles:
            raise NotMeasuredError(f"{row.name}: moe_tiles: found {found.get('moe_tiles')}; expected {tiles}")

    def _put(self, server: Server, variant: Variant) -> None:
        """Put the row's mask in force, and see that every router obeys it."""
        served, keep = variant.server, variant.keep
        if not served.is_patched or self._masks.setdefault(server.port, served.mask) == keep:
            return
        self._masks[server.port] = UNKNOWN
        client = ServerClient(f"http://127.0.0.1:{server.port}", server.key)
        client.switch(None if keep is None else self.masks[keep])
        if keep is not None and not (found := client.verify())["obeyed"]:
            raise NotMeasuredError(f"keep {keep}: a router does not obey the mask: {found['detail']}")
        self._masks[server.port] = keep

    def _send(self, row: Row, server: Server, work: Workload, notes: dict[str, str]) -> dict[str, Any]:
        return measure(
            f"http://127.0.0.1:{server.port}", work, [row.batch], repeats=1, warmup=0, stream=self.launcher.stream, key=server.key,
            notes=notes, stall_seconds=max(1.0, min(60 + 4 * row.seconds, self.budget.left)),
        )  # fmt: skip


def check_cache(row: Row, document: Mapping[str, Any]) -> None:
    """Refuse a row whose prompts the prefix cache knew; raises `NotMeasuredError`."""
    requests = document["results"][0]["repeats"][0]["streams"]
    cached = sum(request["cached_tokens"] or 0 for request in requests)
    if cached > 0.05 * row.batch * row.prompt_tokens:
        raise NotMeasuredError(f"{row.name}: {cached} prompt tokens came from the prefix cache; expected next to none")


def _key(row: Row) -> tuple[str, int, int]:
    return row.round, row.batch, row.max_new_tokens


def _first_round(rows: Sequence[Row]) -> float:
    return sum(row.seconds for row in rows if _key(row) == _key(rows[0]))
