"""Random but valid checkpoints, for tests, demos and speed measurements where no weights can be had.

Every tensor has its own random stream, seeded by the seed and its name, so a part of a model holds
the same bytes as the whole, and the BF16 form is exactly the MXFP4 one dequantised.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from softprune.checkpoint.families import family_of
from softprune.checkpoint.harmony import EOS_TOKENS, tokenizer_files
from softprune.checkpoint.mxfp4 import BLOCK, E2M1, dequantize
from softprune.checkpoint.presets import MXFP4_CONFIG, PRESETS
from softprune.checkpoint.writer import MAX_SHARD_BYTES, PlannedTensor, Progress, write_checkpoint
from softprune.errors import CheckpointError

CHUNK_ELEMENTS = 1 << 24
"""Random numbers held at a time; bounds memory at about 100 MB."""

ROUTER_LOGIT_STD = 2.0
"""Spread of router logits over experts; real gpt-oss routers are of this order, and ties are rare."""


def synth_checkpoint(
    preset: str,
    out_dir: str | Path,
    storage: Literal["mxfp4", "bf16"] = "bf16",
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a random checkpoint of a preset's shape.

    Args:
        preset: a name in `presets.PRESETS`.
        out_dir: the folder to make; it must not exist.
        storage: form of the experts; the others than gpt-oss have "bf16" only.
        seed: same seed, same bytes.
        layers: write these decoder layers only, under their own numbers, with embeddings and norms left
            out; the config stays the whole model's. Such a part can be rewritten but not served.
        max_shard_bytes: payload of a shard at most.
        progress: called after each tensor.

    Raises:
        CheckpointError: unknown preset, a layer out of range, or `out_dir` exists.
    """
    if preset not in PRESETS:
        raise CheckpointError("preset", "", repr(preset), f"one of {', '.join(PRESETS)}")
    config = copy.deepcopy(PRESETS[preset])
    if storage == "mxfp4":
        config["quantization_config"] = dict(MXFP4_CONFIG)
    family_of(config, f"preset {preset}")
    num_layers = config["num_hidden_layers"]
    bad = [i for i in layers or () if not 0 <= i < num_layers]
    if bad:
        raise CheckpointError(f"preset {preset}", "layers", str(bad[0]), f"layers from 0 to {num_layers - 1}")
    tokenizer = tokenizer_files()
    eos = [tokenizer.ids[token] for token in EOS_TOKENS]
    config.update(eos_token_id=eos[0], pad_token_id=tokenizer.ids["<|endoftext|>"])
    generation = {"bos_token_id": tokenizer.ids["<|startoftext|>"], "eos_token_id": eos, "do_sample": True}
    tensors = [_planned(name, shape, kind, fan_in, seed) for name, shape, kind, fan_in in _tensors(config, storage, layers)]
    files = {**tokenizer.files, "config.json": config, "generation_config.json": generation}
    write_checkpoint(out_dir, tensors, files, max_shard_bytes, progress)


Kind = Literal["normal", "ones", "blocks", "scales", "decoded"]
Row = tuple[str, tuple[int, ...], Kind, float]


def _tensors(config: dict[str, Any], storage: str, layers: Sequence[int] | None) -> Iterator[Row]:
    """(name, shape, kind, fan_in) of every tensor; "normal" has standard deviation 1 / sqrt(fan_in)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    if layers is None:
        yield "model.embed_tokens.weight", (vocab, hidden), "normal", 1.0
    for layer in range(config["num_hidden_layers"]) if layers is None else sorted(set(layers)):
        prefix = f"model.layers.{layer}."
        yield from _attention(config, prefix)
        yield from _gpt_oss_moe(config, prefix, storage) if config["model_type"] == "gpt_oss" else _single_experts(config, prefix)
    if layers is None:
        yield "model.norm.weight", (hidden,), "ones", 1.0
        yield "lm_head.weight", (vocab, hidden), "normal", hidden / 4.0


def _attention(config: dict[str, Any], prefix: str) -> Iterator[Row]:
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield prefix + "input_layernorm.weight", (hidden,), "ones", 1.0
    yield prefix + "post_attention_layernorm.weight", (hidden,), "ones", 1.0
    for name, rows, columns in (
        ("q_proj", heads * head, hidden), ("k_proj", kv_heads * head, hidden), ("v_proj", kv_heads * head, hidden),
        ("o_proj", hidden, heads * head),
    ):  # fmt: skip
        yield f"{prefix}self_attn.{name}.weight", (rows, columns), "normal", columns
        if config.get("attention_bias"):
            yield f"{prefix}self_attn.{name}.bias", (rows,), "normal", 100.0
    if config["model_type"] == "gpt_oss":
        yield prefix + "self_attn.sinks", (heads,), "normal", 1.0
    elif config["model_type"] == "qwen3_moe":
        yield prefix + "self_attn.q_norm.weight", (head,), "ones", 1.0
        yield prefix + "self_attn.k_norm.weight", (head,), "ones", 1.0


def _gpt_oss_moe(config: dict[str, Any], prefix: str, storage: str) -> Iterator[Row]:
    hidden, inter, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield prefix + "mlp.router.weight", (experts, hidden), "normal", hidden / ROUTER_LOGIT_STD**2
    yield prefix + "mlp.router.bias", (experts,), "normal", 16.0
    for name, rows, columns in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
        stem = f"{prefix}mlp.experts.{name}"
        if storage == "mxfp4":
            yield stem + "_blocks", (experts, rows, columns // BLOCK, BLOCK // 2), "blocks", columns
            yield stem + "_scales", (experts, rows, columns // BLOCK), "scales", columns
        else:
            yield stem, (experts, columns, rows), "decoded", columns
        yield stem + "_bias", (experts, rows), "normal", 100.0


def _single_experts(config: dict[str, Any], prefix: str) -> Iterator[Row]:
    """Qwen3-MoE's and Mixtral's: a tensor for each expert's matrix."""
    qwen = config["model_type"] == "qwen3_moe"
    hidden, inter = config["hidden_size"], config["moe_intermediate_size" if qwen else "intermediate_size"]
    experts = config["num_experts" if qwen else "num_local_experts"]
    stem = prefix + ("mlp" if qwen else "block_sparse_moe")
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
    yield f"{stem}.gate.weight", (experts, hidden), "normal", hidden / ROUTER_LOGIT_STD**2
    for expert in range(experts):
        for name, rows, columns in ((gate, inter, hidden), (up, inter, hidden), (down, hidden, inter)):
            yield f"{stem}.experts.{expert}.{name}.weight", (rows, columns), "normal", columns


def _planned(name: str, shape: tuple[int, ...], kind: Kind, fan_in: float, seed: int) -> PlannedTensor:
    dtype = "U8" if kind in ("blocks", "scales") else "BF16"
    return PlannedTensor(name, dtype, shape, lambda: _chunks(name, shape, kind, fan_in, seed))


def _chunks(name: str, shape: tuple[int, ...], kind: Kind, fan_in: float, seed: int) -> Iterator[torch.Tensor]:
    if kind == "ones":
        yield torch.ones(shape, dtype=torch.bfloat16)
    elif kind == "normal":
        rng = _rng(name, seed)
        rows, width = shape[0], math.prod(shape[1:])
        step = max(1, CHUNK_ELEMENTS // max(1, width))
        for start in range(0, rows, step):
            values = rng.standard_normal((min(step, rows - start), width), dtype=np.float32)
            yield torch.from_numpy(values).mul_(fan_in**-0.5).to(torch.bfloat16)
    elif kind == "decoded":
        experts, columns, rows = shape
        for expert in range(experts):
            blocks = _expert_bytes(name + "_blocks", expert, (1, rows, columns // BLOCK, BLOCK // 2), "blocks", fan_in, seed)
            scales = _expert_bytes(name + "_scales", expert, (1, rows, columns // BLOCK), "scales", fan_in, seed)
            yield dequantize(blocks, scales)
    else:
        for expert in range(shape[0]):
            yield _expert_bytes(name, expert, (1, *shape[1:]), kind, fan_in, seed)


def _expert_bytes(name: str, expert: int, shape: tuple[int, ...], kind: Kind, fan_in: float, seed: int) -> torch.Tensor:
    """One expert's packed values (any code will do) or scales (two neighbouring powers of two)."""
    rng = _rng(f"{name}.{expert}", seed)
    data = np.frombuffer(rng.bytes(math.prod(shape)), dtype=np.uint8).reshape(shape)
    if kind == "scales":
        rms = math.sqrt(sum(value**2 for value in E2M1) / len(E2M1))
        exponent = round(math.log2(fan_in**-0.5 / rms))
        data = (127 + exponent - (data & 1)).astype(np.uint8)
    return torch.from_numpy(data.copy())


def _rng(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
