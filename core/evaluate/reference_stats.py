"""Exact statistics of a Transformers gpt-oss: the reference that engines' statistics are held against, token by token if wanted.

Every token is routed and counted, none is sampled; sums are float64, and p, H, gates and norms those of the model's own arithmetic.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from softprune.errors import RefusedError
from softprune.evaluate.packing import Blocks
from softprune.evaluate.reference import Scores, score
from softprune.mask import MaskModel
from softprune.runtime.router_stats import CONFIDENCE_BINS
from softprune.stats.file import Statistics
from softprune.stats.grid import DEFAULT_GRID, bin_of
from softprune.stats.header import DEFAULT_TAG, DataSet, Eaft, Grid, Header, MaskEpoch, Plane, Run, Tokens
from softprune.stats.layout import PLANE_BINS, SPECS, shapes

Attribution = Literal["predictor", "target"]
TOP = 20
"""Tokens in the entropy of the top (spec/metrics.md 1.4)."""


@dataclass(frozen=True)
class Routed:
    """What one MoE layer did with the tokens of a pass.

    Attributes:
        chosen: int64 [tokens, top_k].
        gates: float32, same shape; softmax over the chosen logits, as the model computed it.
        norms: float32, same shape; L2 norm of the expert's output with its bias and before its gate.
    """

    chosen: NDArray[np.int64]
    gates: NDArray[np.float32]
    norms: NDArray[np.float32]

    def at(self, rows: NDArray[np.int64]) -> Routed:
        """Only these tokens."""
        return Routed(self.chosen[rows], self.gates[rows], self.norms[rows])

    @property
    def gate_norms(self) -> NDArray[np.float64]:
        """Products of gate and norm."""
        return self.gates.astype(np.float64) * self.norms


@dataclass(frozen=True)
class TokenRecord:
    """The tokens that count, one by one, in the order of their blocks.

    Attributes:
        tag: index on the tag axis, int64 [n].
        block, position: of the predicted token, int64 [n].
        log_p, entropy, top_entropy: float32 [n]; natural log of p; H of all tokens in nats; H of the top 20 over ln 20.
        chosen, gates, norms: [num_layers, n, top_k], at the position that `attribution` names; as in `Routed`.
    """

    tag: NDArray[np.int64]
    block: NDArray[np.int64]
    position: NDArray[np.int64]
    log_p: NDArray[np.float32]
    entropy: NDArray[np.float32]
    top_entropy: NDArray[np.float32]
    chosen: NDArray[np.int64]
    gates: NDArray[np.float32]
    norms: NDArray[np.float32]


def collect(
    model: Any,
    shape: MaskModel,
    blocks: Mapping[str, Blocks],
    grid: Grid = DEFAULT_GRID,
    attribution: Attribution = "predictor",
    reap_everywhere: bool = False,
    record: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Statistics, TokenRecord | None]:
    """Run a model over blocks, unmasked, and add up all three modes.

    `router` counts every token. `reap` counts the tokens of the assistant (`keep`) at their own position, as the study did, or all
    tokens. `eaft` counts kept tokens that have a prediction, with the activations at the position that `attribution` names.

    Args:
        model: a Transformers gpt-oss with plain weights, e.g. from `load_reference`.
        shape: architecture, numbers and fingerprint, for the header.
        blocks: packed conversations by tag; "default" is added if it is missing.
        grid: edges of the EAFT grid.
        attribution: "predictor" takes the activations that made the prediction, "target" those at the predicted token.
        reap_everywhere: count all tokens for `reap`.
        record: also keep the tokens that count for `eaft` one by one.
        progress: called with 1 after each block.

    Returns:
        The statistics, and the record or None.

    Raises:
        RefusedError: not a gpt-oss with plain expert weights.
    """
    tags = [DEFAULT_TAG, *(tag for tag in blocks if tag != DEFAULT_TAG)]
    started = _now()
    sums = _Sums(shape, tags, grid, attribution, {tag: one.ids.size for tag, one in blocks.items()}, started, blocks)
    records: list[dict[str, NDArray[Any]]] = []
    with _routing(model) as passes:
        for tag, pack in blocks.items():
            for number, (ids, keep) in enumerate(zip(pack.ids, pack.keep, strict=True)):
                scores = score(model, ids[None], entropies=True, top=TOP)
                layers = [passes.pop(layer) for layer in range(shape.num_layers)]
                entry = sums.add(tags.index(tag), layers, scores, keep, reap_everywhere)
                if record:
                    records.append({**entry, "block": np.full(len(entry["position"]), number)})
                if progress:
                    progress(1)
    joined = None
    if record:
        axis = {"chosen": 1, "gates": 1, "norms": 1}
        joined = TokenRecord(**{name: np.concatenate([one[name] for one in records], axis.get(name, 0)) for name in records[0]})
    return sums.statistics(), joined


class _Sums:
    """The tensors of a file, and the header that goes with them."""

    def __init__(
        self, shape: MaskModel, tags: list[str], grid: Grid, attribution: Attribution, routed: Mapping[str, int], started: str,
        blocks: Mapping[str, Blocks],
    ) -> None:  # fmt: skip
        self.grid, self.attribution, self.plane = grid, attribution, Plane()
        run = Run(
            id=f"reference-{uuid.uuid4().hex}", engine="Transformers", engine_version=transformers.__version__, started=started,
            ended=started, modes=["router", "reap", "eaft"],
        )  # fmt: skip
        self.header = Header(
            model=shape, runs=[run], epochs=[MaskEpoch.of(run.id, 0, None, shape)], tags=tags, modes=["router", "reap", "eaft"],
            tokens={tag: Tokens(prefill=routed.get(tag, 0), decode=0, cached=0) for tag in tags}, sampling={"reap": 1, "eaft": 1},
            confidence_bins=CONFIDENCE_BINS, eaft=Eaft(attribution=attribution, plane=self.plane, grid=grid),
            data_sets=[DataSet(id=tag, hashes=[f"sha256:{pack.rows_sha256}"]) for tag, pack in blocks.items()],
        )  # fmt: skip
        self.raw = {name: np.zeros(size, SPECS[name].dtype) for name, size in shapes(self.header).items()}

    def add(
        self, tag: int, layers: list[Routed], scores: Scores, keep: NDArray[np.bool_], reap_everywhere: bool
    ) -> dict[str, NDArray[Any]]:
        """Add one block; returns the entries of its record, but for the block's number."""
        assert scores.entropy is not None
        assert scores.top_entropy is not None
        position = np.flatnonzero(keep & np.isfinite(scores.log_p[0]))
        at = position - 1 if self.attribution == "predictor" else position
        log_p, entropy, top = (values[0][position] for values in (scores.log_p, scores.entropy, scores.top_entropy))
        self._add_plane(tag, log_p, entropy, top)
        x = bin_of(log_p / np.log(10), self.grid.log10_p)
        y = bin_of(top if self.grid.entropy_form == "top20" else entropy, self.grid.entropy)
        reap_at = np.arange(len(keep)) if reap_everywhere else np.flatnonzero(keep)
        for layer, routed in enumerate(layers):
            self._add_router(tag, layer, routed)
            here = routed.at(reap_at)
            for name, values in (("count", 1), ("norm_sum", here.norms.astype(np.float64)), ("gate_norm_sum", here.gate_norms)):
                self._add(f"reap.{name}", (tag, layer, here.chosen), values)
            predicting = routed.at(at)
            cell = (tag, 0, layer, predicting.chosen, x[:, None], y[:, None])
            self._add("eaft.grid_count", cell, 1)
            self._add("eaft.grid_gate_norm", cell, predicting.gate_norms)
        stacked = {name: np.stack([getattr(routed, name)[at] for routed in layers]) for name in ("chosen", "gates", "norms")}
        whose = np.full(len(position), tag)
        return {"tag": whose, "position": position, "log_p": log_p, "entropy": entropy, "top_entropy": top, **stacked}

    def _add(self, name: str, index: Any, values: Any) -> None:
        np.add.at(self.raw[name], index, values)

    def _add_plane(self, tag: int, log_p: NDArray[Any], entropy: NDArray[Any], top: NDArray[Any]) -> None:
        nll, p = -log_p.astype(np.float64), np.exp(log_p.astype(np.float64))
        x = bin_of(p, np.linspace(self.plane.p_min, self.plane.p_max, PLANE_BINS[0] + 1).tolist())
        y = bin_of(top, np.linspace(self.plane.entropy_min, self.plane.entropy_max, PLANE_BINS[1] + 1).tolist())
        self._add("eaft.hist", (tag, 0, x, y), 1)
        for name, values in (("nll", nll), ("nll_square", nll**2), ("p", p), ("entropy", entropy), ("entropy_top", top)):
            # A rounding error below 0 is 0: sums are never negative.
            self.raw[f"eaft.{name}_sum"][tag, 0] += np.maximum(values.astype(np.float64), 0).sum()

    def _add_router(self, tag: int, layer: int, routed: Routed) -> None:
        self._add("router.count", (tag, 0, layer, routed.chosen), 1)
        self._add("router.gate_sum", (tag, 0, layer, routed.chosen), routed.gates.astype(np.float64))
        bins = np.minimum((routed.gates.max(1) * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        self._add("router.confidence", (tag, 0, layer, bins), 1)
        both = np.sort(routed.chosen, 1)
        for first in range(both.shape[1]):
            self._add("router.coactivation", (tag, layer, both[:, first : first + 1], both[:, first:]), 1)

    def statistics(self) -> Statistics:
        """What was added."""
        run = self.header.runs[0].model_copy(update={"ended": _now()})
        return Statistics.of(self.header.model_copy(update={"runs": [run]}), self.raw, "reference statistics")


@contextmanager
def _routing(model: Any) -> Iterator[dict[int, Routed]]:
    """Inside the block, each pass leaves what every MoE layer did, by layer."""
    modules = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    if not modules or not all(hasattr(module, "down_proj") and hasattr(module, "_apply_gate") for module in modules):
        raise RefusedError(f"{type(model).__name__}: found no gpt-oss experts with plain weights; expected a dequantised GptOssForCausalLM")
    passes: dict[int, Routed] = {}

    def hook(layer: int) -> Any:
        def keep(module: Any, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            hidden, chosen, gates = (tensor.reshape(-1, tensor.shape[-1]) for tensor in inputs)
            passes[layer] = Routed(
                chosen.cpu().numpy().astype(np.int64), gates.float().cpu().numpy(), output_norms(module, hidden, chosen).cpu().numpy()
            )

        return keep

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(modules)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def output_norms(experts: Any, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """L2 norm of each chosen expert's output, with its bias and before its gate (spec/metrics.md 3.1).

    Args:
        experts: a `GptOssExperts` with plain weights.
        hidden: [tokens, hidden], what the experts read.
        chosen: [tokens, top_k].

    Returns:
        float32 [tokens, top_k]; products in the weights' dtype, the norm in float32.
    """
    norms = torch.empty(chosen.shape, dtype=torch.float32, device=hidden.device)
    for expert in torch.unique(chosen).tolist():
        token, place = torch.where(chosen == expert)
        gate_up = hidden[token] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        out = experts._apply_gate(gate_up) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        norms[token, place] = out.float().norm(dim=-1)
    return norms


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
