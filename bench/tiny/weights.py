"""The small model's shape, and its checkpoints: the BF16 parent and the MXFP4 child."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from softprune.checkpoint.harmony import EOS_TOKENS
from softprune.checkpoint.mxfp4 import quantize
from softprune.checkpoint.presets import MXFP4_CONFIG, gpt_oss
from softprune.checkpoint.writer import PlannedTensor, write_checkpoint

HERE = Path(__file__).resolve().parent
TRAINED = HERE / "weights"
"""The committed MXFP4 checkpoint."""
SHARD_BYTES = 11_500_000
EXPERTS = ("gate_up_proj", "down_proj")


def config() -> dict[str, Any]:
    """config.json of the parent: four layers of gpt-oss, 32 experts, widths that the engines' MXFP4 kernels take."""
    shape = gpt_oss(num_layers=4, num_experts=32, hidden=256, intermediate=256, heads=4, kv_heads=2, vocab=4096)
    ids = special_ids()
    # 0.02 is for wide models; this is nearer to 1 / sqrt(hidden).
    return {**shape, "initializer_range": 0.04, "eos_token_id": ids["<|return|>"], "pad_token_id": ids["<|endoftext|>"]}


def special_ids() -> dict[str, int]:
    """Ids of the tokenizer's special tokens."""
    added = json.loads((HERE / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def is_experts(name: str) -> bool:
    """Whether a parameter is one of those that MXFP4 stores, by its name in a checkpoint."""
    return ".mlp.experts." in name and name.endswith(EXPERTS)


def write(masters: dict[str, torch.Tensor], out: Path, storage: str) -> None:
    """Write a checkpoint folder from float32 weights.

    Args:
        masters: by their name in a BF16 gpt-oss checkpoint.
        out: the folder to make; it must not exist.
        storage: "bf16", or "mxfp4" for the experts.
    """
    described = config()
    if storage == "mxfp4":
        described["quantization_config"] = dict(MXFP4_CONFIG)
    ids = special_ids()
    eos = [ids[token] for token in EOS_TOKENS]
    generation = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": eos, "do_sample": False}
    tokenizer = {path.name: path for path in sorted((HERE / "tokenizer").iterdir())}
    planned = [tensor for name, weight in masters.items() for tensor in _stored(name, weight, storage)]
    write_checkpoint(out, planned, {**tokenizer, "config.json": described, "generation_config.json": generation}, SHARD_BYTES)


def _stored(name: str, weight: torch.Tensor, storage: str) -> Iterator[PlannedTensor]:
    if storage == "mxfp4" and is_experts(name):
        for suffix, packed in zip(("_blocks", "_scales"), quantize(weight), strict=True):
            yield _planned(name + suffix, "U8", packed.cpu())
    else:
        yield _planned(name, "BF16", weight.to(torch.bfloat16).cpu())


def _planned(name: str, dtype: str, tensor: torch.Tensor) -> PlannedTensor:
    return PlannedTensor(name, dtype, tuple(tensor.shape), lambda: iter([tensor]))
