"""An engine of three routers that serves made-up tokens, and what a collector of it has to find, added up token by token.

A token's input to a layer, its logits and what is predicted from it depend on its request and position alone, so they are the same in
whatever steps they are computed. Experts scale their input, each by a number of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softprune.mask import ExpertMask
from softprune.runtime.collector import Span, file_of
from softprune.runtime.router_stats import chosen_experts
from softprune.runtime.token_scores import token_scores
from softprune.stats.file import Statistics, read
from softprune.stats.grid import DEFAULT_GRID, bin_of
from softprune.stats.layout import COARSE
from tests.unit.fake_control import EXPERTS, HIDDEN, LAYERS, TOP_K, make_launch, make_model

VOCABULARY = 50
SCALES = torch.arange(1, LAYERS * EXPERTS + 1).view(LAYERS, EXPERTS) / 4
"""Of each layer's experts."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny, and threads wait for each other on a machine with other things to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Request:
    """One request; `asked`: with its prompt's log-probabilities."""

    name: str
    tag: int = 0
    prompt: int = 1
    asked: bool = False
    completions: tuple[tuple[int, int], ...] | None = None


@dataclass
class Row:
    """A token that was computed: of which request, under which mask, and what each layer chose."""

    request: Request
    position: int
    mask: str | None
    ids: list[list[int]] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    unmasked: list[list[int]] = field(default_factory=list)


class SampledEngine:
    """Launches steps as vLLM does, which says what a step has when it is launched, or as SGLang does, which says it before.

    Attributes:
        rows: computed while something was collected.
        scored: (request, position) -> (kind, [log p, H, H of the top]) of each token whose prediction counts.
        adds_up: given what experts make of each row times their gates, [rows, top_k, HIDDEN], experts ascending; None for nothing.
    """

    adds_up: Any = None

    def __init__(self, most: str = "eaft", says_before: bool = False, **settings: Any) -> None:
        self.model = make_model(make_launch(stats=most))
        self.collector = self.model.add_collector(512, "vLLM 0.32.0")
        self.says_before, self.settings = says_before, {"mode": most, "sample": 1, **settings}
        self.rows: list[Row] = []
        self.scored: dict[tuple[str, int], tuple[int, NDArray[np.float32]]] = {}
        self._known: dict[Any, torch.Tensor] = {}
        for layer, router in enumerate(self.model.routers.routers):
            forward = router.forward
            # A router through whose module its logits are seen, as SGLang's are.
            object.__setattr__(router, "forward", self._seen(layer, forward))
        self.model.connect_experts(lambda layer, hidden, ids, gates: hidden.float() * (SCALES[layer][ids] * gates).sum(1, keepdim=True))

    @property
    def sampler(self) -> Any:
        return self.collector.sampler

    def _seen(self, layer: int, forward: Any) -> Any:
        def seen(hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = forward(hidden).detach()
            self.collector.record(layer, hidden, logits)
            return logits

        self._plain = [*getattr(self, "_plain", []), forward]
        return seen

    def start(self) -> None:
        self.collector.call("start", **self.settings)

    def switch(self, mask: ExpertMask | None) -> None:
        assert self.model.stage(None if mask is None else mask.dump()) is None
        self.model.commit()

    def step(
        self, *parts: tuple[Request, int, int], padding: int = 0, captured: bool = False, surplus: tuple[Request, ...] = (),
        fails: bool = False, draws: bool = True,
    ) -> None:  # fmt: skip
        """One step.

        Args:
            parts: (request, position of its first token, tokens).
            padding: rows behind them.
            captured: see `Sampler.begin`.
            surplus: requests that have come to their end, whose draw is thrown away.
            fails: the model raises, so nothing is told of the step.
            draws: whether the step's tokens are drawn.
        """
        spans = [
            Span(
                request.tag, request.prompt, first, rows, 10**9 if request in surplus else max(request.prompt, first + rows), request.name,
                request.completions,
            )
            for request, first, rows in parts
        ]  # fmt: skip
        tokens = [(request, position) for request, first, rows in parts for position in range(first, first + rows)]
        self.collector.begin(len(tokens), captured, spans if self.says_before else None)
        self._forward(tokens, padding)
        if fails:
            return
        if self.says_before:
            self._give(parts)
            self._draw(parts, surplus, draws)
            self.collector.step(spans)
        else:
            self.collector.step(spans)
            self._draw(parts, surplus, draws)
            self._give(parts)
        if self.collector.status()["collecting"]:
            mask = self.model.routers.mask
            self.rows += [self._row(request, position, mask) for request, position in tokens]

    def _forward(self, tokens: list[tuple[Request, int]], padding: int) -> None:
        hidden = torch.stack([_random(request.name, position, HIDDEN) for request, position in tokens]).bfloat16()
        hidden = torch.nn.functional.pad(hidden, (0, 8, 0, padding), value=77.0)  # what lies beyond is the engine's
        for layer in range(LAYERS):
            logits = [self._logits(layer, request, position) for request, position in tokens]
            logits += [torch.full((EXPERTS,), 3.0, dtype=torch.bfloat16)] * padding
            self.collector.record(layer, hidden, torch.stack(logits))
            if self.adds_up is not None:
                ids, gates = _ascending(torch.stack(logits))
                self.adds_up(hidden[:, None, :HIDDEN].float() * (SCALES[layer][ids] * gates.bfloat16().float())[..., None])

    def _logits(self, layer: int, request: Request, position: int, unmasked: bool = False) -> torch.Tensor:
        """Of one row alone, so that the number of rows does not matter."""
        mask = None if unmasked or self.model.routers.mask is None else self.model.routers.mask.hash
        key = layer, request.name, position, mask
        if key not in self._known:
            hidden = _random(request.name, position, HIDDEN).bfloat16()
            if unmasked:
                with self.model.routers.unmasked(layer):
                    self._known[key] = self._plain[layer](hidden[None])[0].detach()
            else:
                self._known[key] = self._plain[layer](hidden[None])[0].detach()
        return self._known[key]

    def _row(self, request: Request, position: int, mask: ExpertMask | None) -> Row:
        row = Row(request, position, None if mask is None else mask.hash)
        norm = float(_random(request.name, position, HIDDEN).bfloat16().double().norm())
        for layer in range(LAYERS):
            ids, gates = _chosen(self._logits(layer, request, position).tolist())
            row.ids.append(ids)
            row.gates.append(gates)
            row.norms.append([norm * float(SCALES[layer][expert]) for expert in ids])
            if self.settings.get("shadow"):
                row.unmasked.append(_chosen(self._logits(layer, request, position, unmasked=True).tolist())[0])
        return row

    def _draw(self, parts: tuple[tuple[Request, int, int], ...], surplus: tuple[Request, ...], draws: bool) -> None:
        if not draws:
            return
        ends = [(request, first + rows) for request, first, rows in parts]
        logits, tokens = _predictions(ends)
        self.sampler.drawn(logits, tokens)
        for (request, end), scores in zip(ends, token_scores(logits, tokens).numpy(), strict=True):
            if end >= request.prompt and request not in surplus and self.sampler.scores:
                self.scored[request.name, end] = 1, scores

    def _give(self, parts: tuple[tuple[Request, int, int], ...]) -> None:
        row = 0
        for request, first, rows in parts:
            predicted = [(request, position + 1) for position in range(first, first + rows)]
            inside = np.array([position < request.prompt for _, position in predicted])
            if request.asked:
                logits, tokens = _predictions(predicted)
                self.sampler.given(np.where(inside, np.arange(row, row + rows), -1), logits, tokens)
                for (_, position), scores in zip(predicted, token_scores(logits, tokens).numpy(), strict=True):
                    listed = request.completions is None or any(a <= position < b for a, b in request.completions)
                    if position < request.prompt and listed and self.sampler.scores:
                        self.scored[request.name, position] = 0, scores
            row += rows

    def file(self, folder: Any, mask: str | None = None) -> Statistics:
        (folder / "sampled").write_bytes(file_of(self.collector.call("file", mask=mask)))
        return read(folder / "sampled")

    def expected(self, num_tags: int, mask: str | None = None, attribution: str = "predictor") -> dict[str, NDArray[Any]]:
        """Tensors of a file, with every row sampled."""
        routed, grid = (num_tags, LAYERS, EXPERTS), (len(DEFAULT_GRID.log10_p) - 1, len(DEFAULT_GRID.entropy) - 1)
        found = {name: np.zeros(routed) for name in ("reap.count", "reap.norm_sum", "reap.gate_norm_sum", "router.shadow_count")}
        found |= {name: np.zeros((num_tags, 2, LAYERS, EXPERTS, *grid)) for name in ("eaft.grid_count", "eaft.grid_gate_norm")}
        for row in (row for row in self.rows if row.mask == mask):
            score = self.scored.get((row.request.name, row.position + (attribution == "predictor")))
            for layer in range(LAYERS):
                for expert, gate, norm in zip(row.ids[layer], row.gates[layer], row.norms[layer], strict=True):
                    place = row.request.tag, layer, expert
                    found["reap.count"][place] += 1
                    found["reap.norm_sum"][place] += norm
                    found["reap.gate_norm_sum"][place] += gate * norm
                    if score is not None:
                        cell = (row.request.tag, score[0], layer, expert, *_cell(score[1]))
                        found["eaft.grid_count"][cell] += 1
                        found["eaft.grid_gate_norm"][cell] += gate * norm
                for expert in row.unmasked[layer] if row.unmasked else ():
                    found["router.shadow_count"][row.request.tag, layer, expert] += 1
        return found


def same(found: Statistics, expected: dict[str, NDArray[Any]], *prefixes: str) -> None:
    """Counts are equal, and sums but for float32 and their quanta."""
    names = [name for name in expected if name.startswith(prefixes)]
    assert names
    for name in names:
        if "count" in name:
            assert np.array_equal(found[name], expected[name]), name
        else:
            assert np.allclose(found[name], expected[name], rtol=1e-5, atol=1000 * COARSE), name


def _ascending(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts and their gates, in ascending order of ids."""
    ids, gates = chosen_experts(logits.float(), TOP_K)
    order = ids.argsort(-1)
    return ids.gather(1, order), gates.gather(1, order)


def _random(name: str, position: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([position, *name.encode()]).standard_normal(size, np.float32))


def _predictions(of: list[tuple[Request, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] that predict the tokens at these positions, and the tokens."""
    logits = torch.stack([_random(request.name + "#", position, VOCABULARY) * (1 + position % 7) for request, position in of])
    return logits, torch.tensor([(7 * position + sum(request.name.encode())) % VOCABULARY for request, position in of])


def _chosen(logits: list[float]) -> tuple[list[int], list[float]]:
    ids = sorted(range(EXPERTS), key=lambda expert: (-logits[expert], expert))[:TOP_K]
    total = sum(math.exp(logits[expert]) for expert in ids)
    return ids, [math.exp(logits[expert]) / total for expert in ids]


def _cell(scores: NDArray[np.float32]) -> tuple[int, int]:
    log_p, _, top = scores.astype(np.float64)
    return int(bin_of(log_p / np.log(10), DEFAULT_GRID.log10_p)), int(bin_of(top, DEFAULT_GRID.entropy))
