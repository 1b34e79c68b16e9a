"""How fast a server could decode if it did nothing but read: bytes of one decode step over the memory's bandwidth.

A step of batch B reads the weights outside the experts once, the experts that any of its B tokens was routed to once, and each sequence's
keys and values. Sizes come from a checkpoint's headers; no tensor is loaded. What is left out makes the true limit lower: activations,
writes, and reads that caches do not spare. Reads of one device: of a server over several, `--bandwidth` has to be that of all together.

The distinct experts of a layer: each token chooses expert e with probability p_e, tokens choose independently, so B tokens touch
sum over e of 1 - (1 - p_e)^B. With uniform routing over E kept experts, p_e = k / E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.checkpoint.families import ModelSpec, family_of, read_config, spec_of
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.places import place_of
from softprune.errors import CheckpointError, InputError
from softprune.stats.file import Statistics
from softprune.stats.header import PHASES

Chosen = NDArray[np.float64]
"""Probability that a token is routed to each expert, [MoE layers, experts]; a layer's row sums to top_k."""

_EMBEDDING = "model.embed_tokens.weight"
_KV_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "bf16": 2, "fp8_e5m2": 1, "fp8_e4m3": 1, "fp8": 1}


@dataclass(frozen=True)
class StepSizes:
    """What a decode step of one checkpoint may read.

    Attributes:
        spec: the model's shape.
        rest_bytes: weights outside the experts that every step reads whole; routers and the output head are among them.
        row_bytes: one row of the embedding table, read for each token.
        expert_bytes: one expert, per MoE layer.
        kv_bytes: keys and values of one token in one layer.
        windows: per decoder layer, the most tokens that it attends to; None for all.
    """

    spec: ModelSpec
    rest_bytes: int
    row_bytes: int
    expert_bytes: tuple[int, ...]
    kv_bytes: int
    windows: tuple[int | None, ...]

    def step(self, chosen: Chosen, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Bytes of a mean decode step: {"rest", "experts", "kv"}.

        Args:
            chosen: see `Chosen`.
            batch, prompt_tokens, new_tokens: sequences, and their lengths; the first new token comes from the prefill.
        """
        experts = sum(float(n) * size for n, size in zip(distinct(chosen, batch), self.expert_bytes, strict=True))
        steps = np.arange(prompt_tokens + 1, prompt_tokens + max(new_tokens, 2))
        context = sum(float(np.minimum(steps, window or steps[-1]).mean()) for window in self.windows)
        return {"rest": float(self.rest_bytes + batch * self.row_bytes), "experts": experts, "kv": batch * self.kv_bytes * context}


def step_sizes(model_dir: str | Path, kv_cache_dtype: str | None = None) -> StepSizes:
    """Sizes from config.json and the safetensors headers of a checkpoint folder.

    Args:
        model_dir: the checkpoint.
        kv_cache_dtype: as the server's flag says; None or "auto" for the model's own.

    Raises:
        CheckpointError: the checkpoint cannot be read, is of no known family, or its KV dtype is unknown.
    """
    config, index = read_config(model_dir), TensorIndex(model_dir)
    source = str(Path(model_dir) / "config.json")
    family, spec = family_of(config, source), spec_of(config, source)
    experts = dict.fromkeys(spec.moe_layers, 0)
    routers = {name.format(layer=layer) for layer in spec.moe_layers for name in (family.router_weight, family.router_bias) if name}
    for name, info in index.tensors.items():
        place = place_of(family, name)
        if place.is_pruned and name not in routers and place.layer in experts:
            experts[place.layer] += info.num_bytes
    table = index.tensors.get(_EMBEDDING)
    tied = bool(config.get("tie_word_embeddings"))
    rest = index.num_bytes - sum(experts.values()) - (table.num_bytes if table and not tied else 0)
    row = table.num_bytes // table.shape[0] if table else 0
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    asked = kv_cache_dtype if kv_cache_dtype not in (None, "auto") else str(config.get("torch_dtype") or config.get("dtype"))
    if asked not in _KV_BYTES:
        raise CheckpointError(source, "torch_dtype", repr(asked), f"one of {', '.join(_KV_BYTES)}, of which keys and values are")
    each = tuple(experts[layer] // spec.num_experts for layer in spec.moe_layers)
    return StepSizes(spec, rest, row, each, 2 * heads * width * _KV_BYTES[asked], _windows(config))


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return (None,) * layers
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def distinct(chosen: Chosen, batch: int) -> NDArray[np.float64]:
    """Expected number of distinct experts that a batch touches, [MoE layers]."""
    found: NDArray[np.float64] = (1 - (1 - chosen) ** batch).sum(-1)
    return found


def uniform(num_kept: Sequence[int], top_k: int, num_experts: int) -> Chosen:
    """Every kept expert as likely as any other; which ones they are does not matter.

    Args:
        num_kept: per MoE layer.
        top_k: experts a token.
        num_experts: of a layer, pruned ones included.
    """
    return np.array([[top_k / kept] * kept + [0.0] * (num_experts - kept) for kept in num_kept])


def counted(counts: NDArray[Any], top_k: int, source: str, pruned: Sequence[Sequence[int]] | None = None) -> Chosen:
    """From how often each expert was chosen, as a mask leaves it.

    Args:
        counts: selections [MoE layers, experts].
        top_k: experts a token under the mask.
        source: of the counts, for errors.
        pruned: ids per MoE layer that the mask prunes but the counting did not; the others take over in proportion.

    Raises:
        InputError: a layer in which nothing that is kept was counted.
    """
    mass = np.array(counts, np.float64)
    for layer, ids in enumerate(pruned or ()):
        mass[layer, list(ids)] = 0.0
    if not (mass.sum(-1) > 0).all():
        nothing = f"no selection of an expert that is kept in layer {int(mass.sum(-1).argmin())}"
        raise InputError(source, "router.count", nothing, "some in every layer")
    chosen = top_k * mass / mass.sum(-1, keepdims=True)
    # No token chooses an expert twice: what is above 1 goes to the layer's others.
    while (chosen > 1 + 1e-12).any():
        free = np.where(chosen < 1, chosen, 0.0)
        room = top_k - (chosen >= 1).sum(-1, keepdims=True)
        scale = np.divide(room, free.sum(-1, keepdims=True), out=np.zeros_like(room, float), where=free.sum(-1, keepdims=True) > 0)
        chosen = np.where(chosen >= 1, 1.0, free * scale)
    found: Chosen = chosen
    return found


def decode_counts(statistics: Statistics) -> NDArray[Any]:
    """Selections [MoE layers, experts] of a statistics file: those of decode steps, or all where none were counted.

    Raises:
        StatisticsError: it has no router counts.
    """
    counts = statistics["router.count"].sum(0)
    decode = counts[PHASES.index("decode")]
    found: NDArray[Any] = decode if decode.sum(-1).all() else counts.sum(0)
    return found


def limit(sizes: StepSizes, chosen: Chosen, batch: int, lengths: tuple[int, int], gb_s: float) -> dict[str, Any]:
    """The roofline of one batch size: {"tok_s", "bytes", "distinct_experts"}.

    Args:
        sizes: of the checkpoint.
        chosen: see `Chosen`.
        batch, lengths: sequences; their prompt and new tokens.
        gb_s: the memory's bandwidth, in 10^9 bytes per second.
    """
    step = sizes.step(chosen, batch, *lengths)
    mean = float(distinct(chosen, batch).mean())
    return {"tok_s": batch * gb_s * 1e9 / math.fsum(step.values()), "bytes": step, "distinct_experts": mean}


def check_shape(counts: NDArray[Any], spec: ModelSpec, source: str) -> None:
    """See that counts are of this model's shape.

    Raises:
        InputError: they are not.
    """
    expected = (spec.num_layers, spec.num_experts)
    if counts.shape != expected:
        raise InputError(source, "router.count", f"layers and experts {counts.shape}", f"{expected}, as the checkpoint has")
