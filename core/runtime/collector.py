"""Collecting statistics in a serving engine: what a step's rows are, what was counted under which mask, and the file of it.

The engine's routers write their logits into the slab, in each step and at fixed addresses. After a step, the extension tells which
requests' tokens it had, and one call adds them up. A switch of masks closes what was counted: nothing of one mask is reported under
another. Only one process of an engine collects, since all tensor-parallel ranks route the same tokens alike. What the modes `reap`
and `eaft` add to that is in `softprune.runtime.sampled`.
"""

from __future__ import annotations

import base64
import logging
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from softprune.runtime.expert_norms import Experts
from softprune.runtime.router_stats import CONFIDENCE_BINS, RouterStats, TakenSums
from softprune.runtime.sampled import Sampler
from softprune.runtime.sampled_sums import eaft_header
from softprune.runtime.sampling import Settings
from softprune.runtime.tags import Spans, Tags, completions_of
from softprune.stats.collected import router_tensors
from softprune.stats.file import Statistics, dump
from softprune.stats.header import MODES, Header, MaskEpoch, Mode, Run, Sampled, Tokens

Unmask = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Span:
    """The rows of one request in a step, which follow one another.

    Attributes:
        tag: its number.
        prompt: tokens of the request's prompt. Those are counted as prefill, all others as decode, whatever kind the step is.
        first: position of the first row's token in the request.
        rows: tokens in this step.
        known: tokens of the request, prompt and answer, that there are when the step is launched; after the last of them, the step draws
            another.
        request: its name.
        completions: [first, end) positions of the prompt's tokens that `eaft` is to count; None for all.
    """

    tag: int
    prompt: int
    first: int
    rows: int
    known: int = 0
    request: str = ""
    completions: tuple[tuple[int, int], ...] | None = None


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
    settings: Settings
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
        mode: the most that can be collected; each mode has those before it in it.
        hidden_size: width of the MoE layers' input.

    Attributes:
        stats: the slab and the sums.
        tags: numbered as requests came.
        sampler: of `reap` and `eaft`; None in mode "router".

    Raises:
        RefusedError: the kernel cannot take so many experts.
    """

    def __init__(
        self, spec: ModelSpec, fingerprint: str, top_k: int, mask: ExpertMask | None, max_tags: int, max_rows: int,
        device: torch.device, dtype: torch.dtype, engine: str, log: logging.Logger, mode: str = "router", hidden_size: int = 0,
    ) -> None:  # fmt: skip
        experts = spec.num_experts
        if device.type == "cuda" and (experts < 16 or experts & (experts - 1)):
            raise RefusedError(f"--softprune-stats: found {experts} experts a layer; expected a power of two from 16 on")
        self.stats = RouterStats(spec.num_layers, experts, top_k, max_tags, max_rows, device, dtype)
        self.tags = Tags(max_tags)
        self._model = MaskModel.of(spec, fingerprint)
        self._engine, self._version = engine.split(" ", 1)
        self._top_k, self._log = top_k, log
        self._seen = [False] * spec.num_layers
        self._epoch, self._mask = 0, mask
        self.sampler: Sampler | None = None
        if mode != "router":
            shape = spec.num_layers, experts, top_k, hidden_size
            self.sampler = Sampler(*shape, max_tags, max_rows, device, dtype, eaft=mode == "eaft", log=log)
        self._most = mode
        self._running: _Running | None = None
        self._settings: Settings | None = None
        self._sampled: Settings | None = None
        self._quiet = False
        self._kept: dict[str | None, _Counted] = {}
        self._missed = 0
        self._failed: str | None = None

    def into_slab(self, layer: int, rows: int) -> torch.Tensor | None:
        """Where a router's kernel may write its logits: [rows, num_experts] of the slab; None if the step is too large for it.

        Args:
            layer: position among the MoE layers.
            rows: of the step, padding included.
        """
        self._seen[layer] = True
        return None if self._quiet or rows > self.stats.max_rows else self.stats.slab[layer, :rows]

    def record(self, layer: int, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """A layer's input and its router's logits: into the slab, and what is sampled; in a captured graph, one kernel.

        Args:
            layer: position among the MoE layers.
            hidden: [rows, at least hidden_size]; see `Sampler.take`.
            logits: [rows, num_experts], padding included; rows beyond `max_rows` are left out.

        Raises:
            RefusedError: another dtype than the slab's, which would lose what selection rests on, or another shape.
        """
        slab = self.stats.slab[layer, : len(logits)]
        if logits.dtype != slab.dtype or logits.shape[1:] != slab.shape[1:]:
            found = f"{logits.dtype} {list(logits.shape)}"
            raise RefusedError(f"MoE layer {layer}: found logits {found}; expected {slab.dtype} [rows, {slab.shape[1]}]")
        self._seen[layer] = True
        if self._quiet:
            return
        if self.sampler is None:
            slab.copy_(logits[: len(slab)])
        else:
            self.sampler.take(layer, hidden, logits, slab)

    def take(self, layer: int, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """`record` of logits that are in the slab already."""
        if self.sampler is not None and not self._quiet:
            self.sampler.take(layer, hidden, logits)

    def connect(self, experts: Experts, router: Callable[[int, torch.Tensor], torch.Tensor], unmask: Unmask) -> None:
        """Give the sampler what it asks of the engine.

        Args:
            experts: see `softprune.runtime.expert_norms.Experts`.
            router: (layer, hidden) -> logits, as the engine computes them; it may come by `record` and `take`, which look away meanwhile.
            unmask: makes a layer's router forget its mask for the length of a block.
        """
        assert self.sampler is not None

        def unmasked(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            self._quiet = True
            try:
                with unmask(layer):
                    return router(layer, hidden)
            finally:
                self._quiet = False

        self.sampler.experts, self.sampler.unmasked = experts, unmasked

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails within the block ends the statistics, until a reset, and not the engine."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a step or a switch that stopped half-way would end the engine, or worse
            self._log.exception("softprune: statistics: %s failed; nothing is collected or handed out before a reset", what)
            self._failed, self._running = f"{what}: {type(error).__name__}: {error}", None
            if self.sampler is not None:
                self.sampler.give_up()

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

    def completions(self, text: Any) -> Spans | None:
        """Where a request's completions are; what is not allowed, which the front end should have refused, counts as none and is logged."""
        try:
            return completions_of(text)
        except ControlError as error:
            self._log.error("softprune: counted without completions: %s", error)
            return ()

    def begin(self, rows: int, captured: bool = False, spans: Sequence[Span] | None = None) -> None:
        """A step is about to be launched. Waits for nothing.

        Args:
            rows, captured: see `Sampler.begin`.
            spans: as for `step`, if they are known already.
        """
        if self._running is None or self.sampler is None:
            return
        with self.guarded("sampling of a step"):
            self.sampler.begin(rows, captured)
            if spans is not None:
                self.sampler.has(spans)

    def step(self, spans: Iterable[Span]) -> None:
        """A step has been launched: add up its rows. Waits for nothing.

        Args:
            spans: in the order of the rows; together all rows but padding.
        """
        if self._running is None:
            return
        with self.guarded("counting of a step"):
            self._count(list(spans), self._running)

    def _count(self, spans: Sequence[Span], running: _Running) -> None:
        if self.sampler is not None:
            self.sampler.launched()
            self.sampler.has(spans)
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
            running.tokens += np.bincount(cells, minlength=2 * self.tags.room).reshape(-1, 2)

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
        with self.guarded("keeping what was counted under the mask before"):
            self._close()
        self._epoch, self._mask = self._epoch + 1, mask
        if collecting and self._failed is None:
            self._begin()

    def call(self, action: str, **arguments: Any) -> Any:
        """What the control API asks.

        Args:
            action: "start" (mode, sample, shadow, attribution: see `Settings`), "stop", "reset", or "file" (mask: a hash, "none", or None
                for the mask in force).

        Returns:
            JSON-ready: `status`, or for "file" {"name", "file"}, the file's bytes deflated and in base64.

        Raises:
            ControlError: refused; nothing has changed.
        """
        if self._failed is not None and action != "reset":
            raise ControlError(500, "statistics_failed", f"{self._failed}; what was counted may be wrong; expected a reset before")
        actions: dict[str, Callable[..., Any]] = {"start": self._start, "stop": self._stop, "reset": self._reset, "file": self._file}
        return actions[action](**arguments)

    def status(self) -> dict[str, Any]:
        """JSON-ready.

        Returns:
            {"mode": None before a start, "sample": N or None where nothing is sampled, "shadow", "attribution", "most": the mode that the
            server was started with, "collecting", "tags", "max_tags", "masks": of each mask that something was counted under
            {"mask": hash or None, "epochs", "tokens": {tag: {"prefill", "decode", "cached"}}}, "missed_tokens", "lost_samples",
            "reads_outputs": whether long prefills have their norms read from the engine's kernels (None in mode "router"),
            "device_bytes", "unhooked_layers", "failed": what ended the statistics until a reset, or None}.
        """
        settings = self._settings
        now = self._now()
        counted = {**self._kept, **({} if now is None else {self._hash: self._with(now)})}
        masks = [
            {"mask": mask, "epochs": [epoch.epoch for epoch in one.epochs], "tokens": self._tokens(one)} for mask, one in counted.items()
        ]
        return {
            "mode": None if settings is None else settings.mode, "sample": settings.sample if settings and settings.samples else None,
            "shadow": bool(settings and settings.shadow), "attribution": settings.attribution if settings else None, "most": self._most,
            "collecting": self._running is not None, "tags": list(self.tags.names), "max_tags": self.tags.room,
            "masks": masks, "missed_tokens": self._missed, "lost_samples": self.sampler.lost if self.sampler else 0,
            "reads_outputs": self.sampler.within.reads if self.sampler else None,
            "device_bytes": self.stats.num_bytes + (self.sampler.num_bytes if self.sampler else 0), "unhooked_layers": self.unseen,
            "failed": self._failed,
        }  # fmt: skip

    @property
    def _hash(self) -> str | None:
        return None if self._mask is None else self._mask.hash

    def _start(self, mode: str, **settings: Any) -> dict[str, Any]:
        wanted = Settings(mode, **settings)
        if self._running is not None:
            raise ControlError(409, "already_collecting", f"mode {self._running.settings.mode} is being collected; expected a stop before")
        if MODES.index(mode) > MODES.index(self._most) or (wanted.samples and self.sampler is None):
            needed = f"--softprune-stats {mode if mode != 'router' else 'reap'}"
            found = f"mode {mode}{' with shadow counts' if wanted.shadow else ''} on a server started with --softprune-stats {self._most}"
            raise ControlError(409, "mode_is_off", f"found {found}; expected one started with {needed}")
        kept = self._sampled
        if self._kept and kept is not None and wanted.samples:
            for name in ("sample", "attribution"):
                if getattr(kept, name) != getattr(wanted, name):
                    message = (
                        f"{name}: found {getattr(wanted, name)}; expected {getattr(kept, name)}, as in what is kept, or a reset before"
                    )
                    raise ControlError(409, "sampled_otherwise", message)
        self._settings = wanted
        if wanted.samples:
            self._sampled = wanted
        self._begin()
        return self.status()

    def _stop(self) -> dict[str, Any]:
        if self._running is None:
            raise ControlError(409, "not_collecting", "nothing is being collected; expected a start before")
        self._close()
        return self.status()

    def _reset(self) -> dict[str, Any]:
        self.stats.reset()
        if self.sampler is not None:
            self.sampler.reset()
        self._kept.clear()
        self._missed = 0
        self._sampled = self._failed = None
        if self._running is not None:
            if self._running.settings.samples:
                self._sampled = self._running.settings
            self._begin()
        return self.status()

    def _begin(self) -> None:
        tags, settings = self.tags.room, self._settings
        assert settings is not None
        self._running = _Running(uuid.uuid4().hex, _utc(), settings, np.zeros((tags, 2), np.int64), np.zeros(tags, np.int64))
        if self.sampler is not None:
            self.sampler.start(settings, self._hash)

    def _now(self, sums: TakenSums | None = None) -> _Counted | None:
        """What is being counted; None if nothing is."""
        now = self._running
        if now is None:
            return None
        run = Run(
            id=now.id, engine=self._engine, engine_version=self._version, started=now.started, ended=_utc(), modes=_modes(now.settings),
            sampled=_sampled(now.settings),
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
        if self.sampler is not None:
            self.sampler.stop()
        if now is not None and (now.tokens.any() or now.cached.any()):
            counted = self._now(self.stats.take())
            assert counted is not None
            self._kept[self._hash] = self._with(counted)
        self._running = None

    def _file(self, mask: str | None = None) -> dict[str, str]:
        if self._settings is None:
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
        data = dump(self._statistics(counted, counted.sums, wanted))
        name = f"{counted.runs[-1].modes[-1]}-{(wanted or 'unpruned').removeprefix('sha256:')[:12]}.safetensors"
        return {"name": name, "file": base64.b64encode(zlib.compress(data, 1)).decode()}

    def _statistics(self, counted: _Counted, taken: TakenSums, mask: str | None) -> Statistics:
        sums, names = taken.sums(), self.tags.names
        # What a collector saw that a step passed by, or a step that was described wrongly, is found here and not by a reader.
        selected, routed = sums.count.sum(-1).numpy(), counted.tokens[:, :, None] * self._top_k
        if not np.array_equal(selected, np.broadcast_to(routed, selected.shape)):
            raise ControlError(500, "counts_disagree", "the routers' counts are not the steps' tokens times top_k; nothing is handed out")
        modes: list[Mode] = [mode for mode in MODES if any(mode in run.modes for run in counted.runs)]
        sampled: set[Sampled] = {name for run in counted.runs for name in run.sampled}
        tensors = {name: values[: len(names)] for name, values in router_tensors(sums).items()}
        settings = self._sampled or Settings()
        if self.sampler is not None and sampled:
            kept = self.sampler.sums(mask).tensors(len(names), reap="reap" in modes, shadow="shadow" in sampled)
            tensors |= {name: values for name, values in kept.items() if "eaft" in modes or not name.startswith("eaft.")}
        header = Header(
            model=self._model, runs=counted.runs, epochs=counted.epochs, tags=names, modes=modes, tokens=self._header_tokens(counted),
            sampling=dict.fromkeys(sorted(sampled), settings.sample), confidence_bins=CONFIDENCE_BINS,
            eaft=eaft_header(settings.attribution) if "eaft" in modes else None,
        )  # fmt: skip
        return Statistics.of(header, tensors)

    def _header_tokens(self, counted: _Counted) -> dict[str, Tokens]:
        rows = zip(self.tags.names, counted.tokens, counted.cached, strict=False)
        return {name: Tokens(prefill=int(tokens[0]), decode=int(tokens[1]), cached=int(cached)) for name, tokens, cached in rows}

    def _tokens(self, counted: _Counted) -> dict[str, dict[str, int]]:
        return {name: tokens.model_dump() for name, tokens in self._header_tokens(counted).items()}


def _modes(settings: Settings) -> list[Mode]:
    return list(MODES[: MODES.index(settings.mode) + 1])


def _sampled(settings: Settings) -> dict[Sampled, str]:
    """Which tokens could be sampled, in words."""
    if not settings.samples:
        return {}
    routed = f"1 routed token in {settings.sample}, of prompts and of answers"
    scored = (
        f"{routed}, if its prediction was scored: answers, and prompts whose log-probabilities were asked for; the plane has all of those"
    )
    words: dict[Sampled, str] = {"reap": routed, "eaft": scored} if settings.mode == "eaft" else {"reap": routed}
    return {**(words if settings.mode != "router" else {}), **({"shadow": routed} if settings.shadow else {})}


def file_of(answer: dict[str, str]) -> bytes:
    """The statistics file in an answer of `Collector.call("file")`."""
    return zlib.decompress(base64.b64decode(answer["file"]))


def _utc() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
