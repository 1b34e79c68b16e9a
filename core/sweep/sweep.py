"""One sweep: servers that run already, masks switched live, every mask evaluated, gated and timed.

A folder holds an evaluation, a gate's result and a decode comparison for each mask, and `sweep.json`, which is written anew after each.
What lies there of the same sweep is not measured again, so an interrupted one goes on. The masks that were in force are put back, whatever
ends it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from softprune import __version__
from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.evaluate import EvalSettings, Evaluating
from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.gates import Gates
from softprune.evaluate.pair import compare
from softprune.files import write_whole
from softprune.mask import ExpertMask, read_json
from softprune.server_client import ServerClient, without_address
from softprune.server_mask import mask_put_back, switch_obeyed
from softprune.signals import ended_in_order
from softprune.sweep.cells import Cell
from softprune.sweep.decode import Decode, decode_beside, is_of
from softprune.sweep.errors import SweepError
from softprune.sweep.pareto import pareto_front

FORMAT: Final = "softprune.sweep"
VERSION: Final = 1
BASE = "base"


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        gates: by which masks are judged.
        evaluation: of every mask; its label is not used.
        decode: how speed is measured; None for not at all.
    """

    gates: Gates
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    decode: Decode | None = None


@dataclass(frozen=True)
class _Job:
    """A mask on a server over one order of the packs; `cell` None for the server as it is without a mask."""

    server: int
    cell: Cell | None
    seed: int | None
    label: str
    name: str

    @property
    def mask(self) -> ExpertMask | None:
        return None if self.cell is None else self.cell.mask

    @property
    def is_base(self) -> bool:
        """Whether others are judged against it."""
        return self.cell is None and self.server == 0


class Sweep:
    """A sweep.

    Args:
        clients: servers of one model; masks are judged against the first one without a mask.
        cells: masks; each is put in force on every server.
        packs: what is scored, by data seed; None stands for the packs' own order.
        out: folder.
        settings: see `Settings`.
        tell: told in words what is done.

    Raises:
        SweepError: the servers differ, or the folder holds another sweep.
        MaskError: a mask of another model.
        ServerCallError: a server does not answer, or has no control API.
    """

    def __init__(
        self, clients: Sequence[ServerClient], cells: Sequence[Cell], packs: Mapping[int | None, PackSet], out: Path, settings: Settings,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._clients, self._packs, self._out, self._settings, self._tell = list(clients), dict(packs), out, settings, tell
        self._served = [client.status() for client in clients]
        fingerprint = self._served[0]["fingerprint"]
        for client, status in zip(clients, self._served, strict=True):
            if status["fingerprint"] != fingerprint:
                raise SweepError(client.url, "fingerprint", status["fingerprint"], f"{fingerprint}, as {clients[0].url} has")
            for cell in cells:
                cell.mask.check_fingerprint(fingerprint, cell.label)
                if cell.mask.top_k not in (None, status["top_k"]):
                    raise SweepError(cell.label, "top_k", str(cell.mask.top_k), f"null, or {status['top_k']}, as {client.url} runs")
        self._jobs = list(self._all_jobs(cells))
        self._cells = list(cells)

    @property
    def num_jobs(self) -> int:
        """Evaluations in all."""
        return len(self._jobs)

    def run(self, advance: Callable[[int], None] = lambda jobs: None) -> dict[str, Any]:
        """Measure what is not there, and write `sweep.json`.

        Args:
            advance: told of evaluations that are done.

        Returns:
            What stands in `sweep.json`.

        Raises:
            SoftpruneError: something failed; what was measured stays, and every server has its own mask again.
        """
        (self._out / "masks").mkdir(parents=True, exist_ok=True)
        for cell in self._cells:
            self._keep(self._out / self._mask_file(cell), cell.mask.dump())
        document = self._head()
        entries: list[dict[str, Any]] = []
        bases: dict[int | None, Evaluation] = {}
        try:
            with ExitStack() as after:
                after.enter_context(ended_in_order())
                for client in self._clients:
                    after.enter_context(mask_put_back(client))
                for job in self._jobs:
                    found = self._evaluated(job)
                    if job.is_base:
                        bases[job.seed] = found
                    else:
                        entries.append(self._entry(job, bases[job.seed], found))
                    advance(1)
                    document["cells"] = _with_front(entries)
                    self._write(document)
        except BaseException as error:
            servers = {f"server {i}": client.url for i, client in enumerate(self._clients, 1)}
            document["error"] = without_address(str(error), servers) or type(error).__name__
            self._write(document)
            raise
        return document

    def _all_jobs(self, cells: Sequence[Cell]) -> Iterator[_Job]:
        """Bases first, since the others are judged against them; then one mask after another, over all seeds."""
        for server in range(len(self._clients)):
            suffix = "" if server == 0 else f" on server {server + 1} (top_k {self._served[server]['top_k']})"
            for cell in (None, *cells):
                label = (BASE if server == 0 else "unmasked") if cell is None else cell.label
                name = (BASE if server == 0 else "unmasked") if cell is None else cell.name
                for seed in self._packs:
                    end = ("" if server == 0 else f".server{server + 1}") + ("" if seed is None else f".data{seed}")
                    yield _Job(server, cell, seed, label + suffix, name + end)

    def _evaluated(self, job: _Job) -> Evaluation:
        """The evaluation's file, made if it is not there."""
        client = self._clients[job.server]
        switch_obeyed(client, job.mask, job.label)
        settings = replace(self._settings.evaluation, label=job.label)
        path = self._out / f"{job.name}.json"
        run = Evaluating(client, self._packs[job.seed], path, settings, self._tell)
        if (known := run.known()) is not None:
            self._tell(f"{job.label}: skipped, {path.name} is there and was made of the same")
            return known
        if path.exists():
            raise SweepError(str(path), "", "an evaluation of something else", "one of this sweep, or another --out")
        with run:
            return run.run()

    def _entry(self, job: _Job, base: Evaluation, found: Evaluation) -> dict[str, Any]:
        """A line of `sweep.json`; gates are cheap and are always judged anew."""
        result = compare(base, found, self._settings.gates)
        gate_file = f"{job.name}.gate.json"
        write_whole(self._out / gate_file, result.dump())
        primary = next((row for row in result.rows if row.primary), None)
        cell = job.cell
        entry = {
            "label": job.label, "method": cell and cell.method, "keep": cell and cell.keep, "seed": cell and cell.seed,
            "data_seed": job.seed, "server": job.server, "top_k": self._served[job.server]["top_k"],
            "mask": None if cell is None else self._mask_file(cell), "mask_hash": None if cell is None else cell.mask.hash,
            "base": self._base_name(job.seed), "evaluation": f"{job.name}.json", "gate": gate_file, "verdict": result.verdict,
            "ppl": {f"{pack}@{length}": one.metrics["ppl"] for (pack, length), one in found.cells.items()},
            "rel_ppl": None if primary is None else primary.delta["rel_ppl"].value, "decode": self._decoded(job), "pareto": False,
        }  # fmt: skip
        self._tell(f"{job.label}: {result.verdict}")
        return entry

    def _decoded(self, job: _Job) -> dict[str, Any] | None:
        """Speed beside the base's, once for each mask: it does not depend on what is scored."""
        first = next(iter(self._packs))
        if self._settings.decode is None or job.seed != first:
            return None
        path = self._out / f"{job.name}.decode.json"
        found = None
        if path.exists():
            found = read_json(path)
            if not is_of(found, self._settings.decode, job.mask, job.label):
                raise SweepError(
                    str(path), "", "decoding measured otherwise", "the same mask, batch, lengths and repeats, or another --out"
                )
        if found is None:
            found = decode_beside(self._clients[0], self._clients[job.server], job.mask, job.label, self._settings.decode)
            write_whole(path, json.dumps(found) + "\n")
        row = found["results"][0]
        figure = row["figure"]
        ratio = row["ratio"][figure]
        return {
            "batch": row["batch"], "tok_s": row["b"][figure]["median"], "over_base": ratio["median"], "low": ratio["low"],
            "high": ratio["high"], "raw": path.name,
        }  # fmt: skip

    def _head(self) -> dict[str, Any]:
        own, first = self._served[0], next(iter(self._packs))
        return {
            "format": FORMAT, "version": VERSION, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "softprune_version": __version__, "engine": own["engine"], "model": Path(str(own.get("model") or "")).name or None,
            "fingerprint": own["fingerprint"], "base": self._base_name(first), "gates": self._settings.gates.name,
            "data_seeds": list(self._packs), "cells": [], "error": None,
        }  # fmt: skip

    def _base_name(self, seed: int | None) -> str:
        return next(f"{job.name}.json" for job in self._jobs if job.is_base and job.seed == seed)

    def _mask_file(self, cell: Cell) -> str:
        return f"masks/{cell.name}.json"

    def _keep(self, path: Path, text: str) -> None:
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise SweepError(str(path), "", "another mask", "the one of this sweep, or another --out")
        write_whole(path, text)

    def _write(self, document: Mapping[str, Any]) -> None:
        write_whole(self._out / "sweep.json", json.dumps(document, indent=1, allow_nan=False) + "\n")


def _with_front(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries with the Pareto front of those that were timed marked; quality is the primary row's relative perplexity.

    The base, at speed 1 and a difference of 0, is one of the points.
    """
    timed = [i for i, entry in enumerate(entries) if entry["decode"] is not None and entry["rel_ppl"] is not None]
    front = pareto_front([*((entries[i]["decode"]["over_base"], entries[i]["rel_ppl"]) for i in timed), (1.0, 0.0)])
    marked = {i for i, best in zip(timed, front[:-1], strict=True) if best}
    return [{**entry, "pareto": i in marked} for i, entry in enumerate(entries)]
