"""A model's fingerprint: what its routers are, whatever form its experts are stored in.

SHA-256 over, in this order:
  1. the ASCII line `softprune.fingerprint.v1 <architecture> <num_layers> <num_experts> <top_k>\\n`,
     where num_layers counts MoE layers and top_k is the model's own;
  2. for each MoE layer, ascending: the router weight [num_experts, hidden] row-major, then the
     router bias [num_experts] if the architecture has one, as little-endian BF16.

An MXFP4 checkpoint, its dequantised copy and the routers that a server has loaded share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from softprune.checkpoint.families import ModelSpec, family_of, read_config, spec_of
from softprune.checkpoint.headers import TensorIndex

Router = tuple[torch.Tensor, torch.Tensor | None]


def fingerprint(spec: ModelSpec, routers: Iterable[Router]) -> str:
    """Fingerprint of routers given in layer order.

    Args:
        spec: the model's shape.
        routers: (weight [num_experts, hidden], bias [num_experts] or None) for each MoE layer, any float dtype.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    digest = hashlib.sha256(
        f"softprune.fingerprint.v1 {spec.architecture} {spec.num_layers} {spec.num_experts} {spec.top_k}\n".encode("ascii")
    )
    for weight, bias in routers:
        digest.update(_bf16_bytes(weight))
        if bias is not None:
            digest.update(_bf16_bytes(bias))
    return "sha256:" + digest.hexdigest()


def fingerprint_of_checkpoint(model_dir: str | Path) -> str:
    """Fingerprint of a checkpoint folder; reads the routers only.

    Raises:
        CheckpointError: unknown architecture, or a router tensor is missing.
    """
    config = read_config(model_dir)
    source = str(Path(model_dir) / "config.json")
    family, spec, index = family_of(config, source), spec_of(config, source), TensorIndex(model_dir)
    return fingerprint(
        spec,
        (
            (
                index.load(family.router_weight.format(layer=layer)),
                index.load(family.router_bias.format(layer=layer)) if family.router_bias else None,
            )
            for layer in spec.moe_layers
        ),
    )


def _bf16_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return flat.view(torch.int16).numpy().tobytes()
