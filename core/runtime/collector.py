"""Collecting router statistics in a serving engine: what a step's rows are, what was counted under which mask, and the file of it.

The engine's routers write their logits into the slab, in each step and at fixed addresses. After a step, the extension tells which
requests' tokens it had, and one call adds them up. A switch of masks closes what was counted: nothing of one mask is reported under
another. Only one process of an engine collects, since all tensor-parallel ranks route the same tokens alike.
"""

from __future__ import annotations

import base64
import logging
import uuid
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.checkpoint.families import ModelSpec
from softprune.control import ControlError
from softprune.errors import RefusedError
from softprune.mask import ExpertMask, MaskModel
from softprune.runtime.router_stats import CONFIDENCE_BINS, RouterStats, TakenSums
from softprune.runtime.tags import Tags
from softprune.stats.collected import router_tensors
from softprune.stats.file import Statistics, dump
from softprune.stats.header import Header, MaskEpoch, Run, Tokens

MODES = ("router",)
LATER_MODES = ("reap", "eaft")
"""Modes of the file format that no engine collects yet."""


@dataclass(frozen=True)
class Span:
    """The rows of one request in a step, which follow one another.

    Attributes:
        tag: its number.
        prompt: tokens of the request's prompt. Those are counted as prefill, all others as decode, whatever kind the step is.
        first: position of the first row's token in the request.
        rows: tokens in this step.
    """

    tag: int
    prompt: int
    first: int
    rows: int


@dataclass
class _Counted:
    """Sums of one or several runs under one mask; `tokens` int64 [num_tags, 2], `cached` int64 [num_tags]."""

    runs: list[Run]
    epochs: list[MaskEpoch]
    tokens: NDArray[np.int64]
    cached: NDArray[np.int64]
    sums: TakenSums | None = None

    def add(self, more: _Counted) -> None:
        self.runs, self.epochs = [*self.runs, *more.runs], [*self.epochs, *more.epochs]
        self.tokens, self.cached = self.tokens + more.tokens, self.cached + more.cached
        self.sums = more.sums if self.sums is None or more.sums is None else self.sums.added(more.sums)


@dataclass
class _Running:
    """What is being counted: from a start, a reset or a switch of masks on."""

    id: str
    started: str
    tokens: NDArray[np.int64]
    cached: NDArray[np.int64] = field(repr=False)


class Collector:
    """Collects in one process; every call comes between two steps, on the stream that runs the model.

    Args:
        spec, fingerprint: of the model, with its own top_k.
        top_k: experts per token that the engine runs with.
        mask: in force.
        max_tags: "default" among them.
        max_rows: tokens in a step at most.
        device, dtype: of the routers' logits.
        engine: its name and version, e.g. "vLLM 0.32.0".
        log: the engine's logger.

    Attributes:
        stats: the slab and the sums.
        tags: numbered as requests came.

    Raises:
        RefusedError: the kernel cannot take so many experts.
    """

    def __init__(
        self, spec: ModelSpec, fingerprint: str, top_k: int, mask: ExpertMask | None, max_tags: int, max_rows: int,
        device: torch.device, dtype: torch.dtype, engine: str, log: logging.Logger,
    ) -> None:  # fmt: skip
        experts = spec.num_experts
        if device.type == "cuda" and (experts < 16 or experts & (experts - 1)):
            raise RefusedError(f"--softprune-stats: found {experts} experts a layer; expected a power of two from 16 on")
        self.stats = RouterStats(spec.num_layers, experts, top_k, max_tags, max_rows, device, dtype)
        self.tags = Tags(max_tags)
        self._model = MaskModel(
            architecture=spec.architecture, num_layers=spec.num_layers, num_experts=experts, top_k=spec.top_k, fingerprint=fingerprint
        )
        self._engine, self._version = engine.split(" ", 1)
        self._top_k, self._log = top_k, log
        self._seen = [False] * spec.num_layers
        self._epoch, self._mask = 0, mask
        self._running: _Running | None = None
        self._mode: str | None = None
        self._kept: dict[str | None, _Counted] = {}
        self._missed = 0

    def into_slab(self, layer: int, rows: int) -> torch.Tensor | None:
        """Where a router's kernel may write its logits: [rows, num_experts] of the slab; None if the step is too large for it.

        Args:
            layer: position among the MoE layers.
            rows: of the step, padding included.
        """
        self._seen[layer] = True
        return self.stats.slab[layer, :rows] if rows <= self.stats.max_rows else None

    def copy(self, layer: int, logits: torch.Tensor) -> None:
        """Put a router's logits into the slab; in a captured graph, one copy.

        Args:
            layer: position among the MoE layers.
            logits: [rows, num_experts], padding included; rows beyond `max_rows` are left out.

        Raises:
            RefusedError: another dtype than the slab's, which would lose what selection rests on, or another shape.
        """
        slab = self.stats.slab[layer]
        if logits.dtype != slab.dtype or logits.shape[1:] != slab.shape[1:]:
            found = f"{logits.dtype} {list(logits.shape)}"
            raise RefusedError(f"MoE layer {layer}: found logits {found}; expected {slab.dtype} [rows, {slab.shape[1]}]")
        self._seen[layer] = True
        slab[: len(logits)].copy_(logits[: len(slab)])

    @property
    def unseen(self) -> list[int]:
        """MoE layers whose router has never written into the slab."""
        return [layer for layer, seen in enumerate(self._seen) if not seen]

    def tag_number(self, tag: Any) -> int:
        """A request's tag; one that is not allowed, which the front end should have refused, counts as "default" and is logged."""
        try:
            return self.tags.number(tag)
        except ControlError as error:
            self._log.error("softprune: counted as %s: %s", self.tags.names[0], error)
            return 0

    def step(self, spans: Iterable[Span]) -> None:
        """A step has been launched: add up its rows. Waits for nothing.

        Args:
            spans: in the order of the rows; together all rows but padding.
        """
        if self._running is None:
            return
        codes: list[int] = []
        rows: list[int] = []
        for span in spans:
            prefill = min(max(span.prompt - span.first, 0), span.rows)
            codes += (2 * span.tag, 2 * span.tag + 1)
            rows += (prefill, span.rows - prefill)
        cells = np.repeat(np.array(codes, np.int32), rows)
        if len(cells) > self.stats.max_rows:
            self.miss(len(cells))
        elif len(cells):
            self.stats.describe(cells)
            self.stats.add(len(cells))
            self._running.tokens += np.bincount(cells, minlength=2 * self.tags.room).reshape(-1, 2)

    def miss(self, rows: int) -> None:
        """A step could not be counted; `GET status` shows how many tokens that were."""
        if self._running is not None:
            self._missed += rows
            self._log.warning("softprune: the statistics miss a step of %d tokens", rows)

    def cached(self, tag: int, tokens: int) -> None:
        """A request begins, of whose prompt the prefix cache answers so many tokens: they are not routed again."""
        if self._running is not None:
            self._running.cached[tag] += tokens

    def begin_epoch(self, mask: ExpertMask | None) -> None:
        """A mask is in force, for steps launched from now on."""
        collecting = self._running is not None
        self._close()
        self._epoch, self._mask = self._epoch + 1, mask
        if collecting:
            self._begin()

    def call(self, action: str, **arguments: Any) -> Any:
        """What the control API asks.

        Args:
            action: "start" (mode), "stop", "reset", or "file" (mask: a hash, "none", or None for the mask in force).

        Returns:
            JSON-ready: `status`, or for "file" {"name", "file"}, the file's bytes deflated and in base64.

        Raises:
            ControlError: refused; nothing has changed.
        """
        actions: dict[str, Callable[..., Any]] = {"start": self._start, "stop": self._stop, "reset": self._reset, "file": self._file}
        return actions[action](**arguments)

    def status(self) -> dict[str, Any]:
        """JSON-ready.

        Returns:
            {"mode": None before a start, "collecting", "tags", "max_tags", "masks": of each mask that something was counted under
            {"mask": hash or None, "epochs", "tokens": {tag: {"prefill", "decode", "cached"}}}, "missed_tokens", "device_bytes",
            "unhooked_layers"}.
        """
        now = self._now()
        counted = {**self._kept, **({} if now is None else {self._hash: self._with(now)})}
        masks = [
            {"mask": mask, "epochs": [epoch.epoch for epoch in one.epochs], "tokens": self._tokens(one)} for mask, one in counted.items()
        ]
        return {
            "mode": self._mode, "collecting": self._running is not None, "tags": list(self.tags.names), "max_tags": self.tags.room,
            "masks": masks, "missed_tokens": self._missed, "device_bytes": self.stats.num_bytes, "unhooked_layers": self.unseen,
        }  # fmt: skip

    @property
    def _hash(self) -> str | None:
        return None if self._mask is None else self._mask.hash

    def _start(self, mode: str) -> dict[str, Any]:
        if self._running is not None:
            raise ControlError(409, "already_collecting", f"mode {self._mode} is being collected; expected a stop before")
        self._mode = mode
        self._begin()
        return self.status()

    def _stop(self) -> dict[str, Any]:
        if self._running is None:
            raise ControlError(409, "not_collecting", "nothing is being collected; expected a start before")
        self._close()
        return self.status()

    def _reset(self) -> dict[str, Any]:
        self.stats.reset()
        self._kept.clear()
        self._missed = 0
        if self._running is not None:
            self._begin()
        return self.status()

    def _begin(self) -> None:
        tags = self.tags.room
        self._running = _Running(uuid.uuid4().hex, _utc(), np.zeros((tags, 2), np.int64), np.zeros(tags, np.int64))

    def _now(self, sums: TakenSums | None = None) -> _Counted | None:
        """What is being counted; None if nothing is."""
        now = self._running
        if now is None:
            return None
        run = Run(
            id=now.id, engine=self._engine, engine_version=self._version, started=now.started, ended=_utc(), modes=["router"]
        )  # fmt: skip
        kept = MaskEpoch.of(now.id, self._epoch, self._mask, self._model).num_kept
        epoch = MaskEpoch(run=now.id, epoch=self._epoch, mask=self._hash, num_kept=kept, top_k=[self._top_k] * len(kept))
        return _Counted([run], [epoch], now.tokens.copy(), now.cached.copy(), sums)

    def _with(self, now: _Counted) -> _Counted:
        """What is being counted, and what was counted under the same mask before."""
        before = self._kept.get(self._hash)
        if before is None:
            return now
        total = _Counted(before.runs, before.epochs, before.tokens, before.cached, before.sums)
        total.add(now)
        return total

    def _close(self) -> None:
        """Keep what was counted, apart from what will be."""
        now = self._running
        if now is not None and (now.tokens.any() or now.cached.any()):
            counted = self._now(self.stats.take())
            assert counted is not None
            self._kept[self._hash] = self._with(counted)
        self._running = None

    def _file(self, mask: str | None = None) -> dict[str, str]:
        if self._mode is None:
            raise ControlError(404, "never_started", "no statistics: POST stats/start has never been called")
        wanted = self._hash if mask is None else None if mask == "none" else mask
        counted = self._kept.get(wanted)
        if wanted == self._hash and self._running is not None:
            now = self._now(self.stats.copied())
            assert now is not None
            counted = self._with(now)
        if counted is None or counted.sums is None:
            known = ", ".join(str(one or "none") for one in self._kept) or "no mask at all"
            raise ControlError(404, "nothing_counted", f"nothing was counted under mask {wanted or 'none'}; something was under {known}")
        data = dump(self._statistics(counted, counted.sums))
        name = f"router-{(wanted or 'unpruned').removeprefix('sha256:')[:12]}.safetensors"
        return {"name": name, "file": base64.b64encode(zlib.compress(data, 1)).decode()}

    def _statistics(self, counted: _Counted, taken: TakenSums) -> Statistics:
        sums, names = taken.sums(), self.tags.names
        # What a collector saw that a step passed by, or a step that was described wrongly, is found here and not by a reader.
        selected, routed = sums.count.sum(-1).numpy(), counted.tokens[:, :, None] * self._top_k
        if not np.array_equal(selected, np.broadcast_to(routed, selected.shape)):
            raise ControlError(500, "counts_disagree", "the routers' counts are not the steps' tokens times top_k; nothing is handed out")
        header = Header(
            model=self._model, runs=counted.runs, epochs=counted.epochs, tags=names, modes=["router"], tokens=self._header_tokens(counted),
            confidence_bins=CONFIDENCE_BINS,
        )  # fmt: skip
        return Statistics.of(header, {name: values[: len(names)] for name, values in router_tensors(sums).items()})

    def _header_tokens(self, counted: _Counted) -> dict[str, Tokens]:
        rows = zip(self.tags.names, counted.tokens, counted.cached, strict=False)
        return {name: Tokens(prefill=int(tokens[0]), decode=int(tokens[1]), cached=int(cached)) for name, tokens, cached in rows}

    def _tokens(self, counted: _Counted) -> dict[str, dict[str, int]]:
        return {name: tokens.model_dump() for name, tokens in self._header_tokens(counted).items()}


def file_of(answer: dict[str, str]) -> bytes:
    """The statistics file in an answer of `Collector.call("file")`."""
    return zlib.decompress(base64.b64decode(answer["file"]))


def _utc() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
