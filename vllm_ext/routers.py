"""Finding the routers of a model that vLLM has built, per architecture.

gpt-oss routers bring a bias. Qwen3-MoE gates have none and are given one of zeros before the first
step is compiled or captured: the GEMM then adds it in its epilogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.errors import RefusedError, SeamError
from softprune.runtime.blocks import MoeLayer, Site, check_router_bias, find_layers, router_weights
from softprune.runtime.router_mask import Router
from softprune.vllm_ext import seams

SITES = {
    "GptOssForCausalLM": Site(seams.GPT_OSS_BLOCK, "router", has_bias=True),
    "Qwen3MoeForCausalLM": Site(seams.QWEN3_MOE_BLOCK, "gate", has_bias=False),
}


_SEAM = "moe.router"


def adds_bias(hf_config: Any) -> bool:
    """Whether routers of this architecture are given a bias that their checkpoint does not have."""
    return any(name in SITES and not SITES[name].has_bias for name in hf_config.architectures or ())


find = partial(find_layers, sites=SITES, package="vllm", needs=("experts",))
weights = partial(router_weights, package="vllm")


def attach(layer: MoeLayer, spec: ModelSpec) -> Router:
    """The router of a layer with a bias that can be masked; adds one where the model has none.

    Raises:
        SeamError: the gate does not look as expected.
        RefusedError: its bias is not applied, or has another shape.
    """
    gate: Any = layer.gate
    if getattr(layer.block.experts, "_fse_fuse_gate", False):
        raise RefusedError(f"{layer.name}: the engine fuses this gate with a shared expert's, past any bias")
    if seams.attribute(gate, "skip_bias_add", _SEAM):
        raise SeamError(_SEAM, seams.engine(), f"{layer.name} does not add its bias itself")
    if not layer.has_bias:
        _add_bias(gate, spec.num_experts)
    bias = check_router_bias(layer.name, seams.attribute(gate, "bias", _SEAM), spec)
    return Router(layer.name, bias, lambda hidden: logits_of(gate(hidden)))


@contextmanager
def as_built(layers: Sequence[MoeLayer]) -> Iterator[None]:
    """Take added biases away while the engine reloads weights as it built them, then put them back, at the same address.

    Raises:
        SeamError: after the reload, a router's bias lies elsewhere.
    """
    biases: list[nn.Parameter] = [layer.gate.bias for layer in layers]  # type: ignore[misc]
    for layer in layers:
        if not layer.has_bias:
            layer.gate.register_parameter("bias", None)
    yield
    for layer, bias in zip(layers, biases, strict=True):
        if not layer.has_bias:
            layer.gate.register_parameter("bias", bias)
        after: Any = layer.gate.bias
        if after is None or after.data_ptr() != bias.data_ptr():
            raise SeamError(_SEAM, seams.engine(), f"the reload moved {layer.name}.bias")


def _add_bias(gate: nn.Module, num_experts: int) -> None:
    weight: torch.Tensor = gate.weight  # type: ignore[assignment]
    zeros = torch.zeros(num_experts, dtype=weight.dtype, device=weight.device)
    gate.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
    # GateLinear (vLLM >= 0.27) turns its kernels without a bias on when it is built without one; this
    # is what its constructor does when there is a bias.
    for name in list(vars(gate)):
        if (name.startswith("allow_") and name.endswith("_gemm")) or name in ("_router_gemm_no_bias", "_router_gemm_cublas_capable"):
            setattr(gate, name, False)


def logits_of(output: Any) -> torch.Tensor:
    """Logits [n, num_experts] in what a gate returns: they alone, or (logits, bias)."""
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return logits


def backend_of(runner: Any) -> str:
    """The MoE backend that a layer uses: how its experts are stored, and vLLM's name, e.g. "mxfp4/TRITON".

    Raises:
        SeamError: the layer does not say.
    """
    method = seams.attribute(runner, "routed_experts.quant_method", seams.MOE_RUNNER.name)
    method = getattr(method, "old_quant_method", method)
    for stored in ("mxfp4", "unquantized"):
        if hasattr(method, f"{stored}_backend"):
            return f"{stored}/{getattr(method, f'{stored}_backend').name}"
    return type(method).__name__
