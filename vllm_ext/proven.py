"""What masks are known to work with in vLLM, and what is refused.

Platforms, MoE backends and router classes are those that were proven, and no others. Modes are refused by
name, as `UNPROVEN_MODES` lists them. The README's table is this file in prose; the evidence is in
tests/engines and bench/results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from softprune.errors import RefusedError
from softprune.vllm_ext import seams


@dataclass(frozen=True)
class Mode:
    """A way to run vLLM that a mask has not been proven with.

    Attributes:
        flag: what a user would have typed.
        path: where VllmConfig says so.
        is_off: whether a value means that the mode is not in use.
    """

    flag: str
    path: str
    is_off: Callable[[Any], bool]


def _falsy(value: Any) -> bool:
    return not value


def _one(value: Any) -> bool:
    return value == 1


UNPROVEN_MODES = (
    Mode("--pipeline-parallel-size", "parallel_config.pipeline_parallel_size", _one),
    Mode("--data-parallel-size", "parallel_config.data_parallel_size", _one),
    Mode("--prefill-context-parallel-size", "parallel_config.prefill_context_parallel_size", _one),
    Mode("--decode-context-parallel-size", "parallel_config.decode_context_parallel_size", _one),
    Mode("--enable-expert-parallel", "parallel_config.enable_expert_parallel", _falsy),
    Mode("--enable-eplb", "parallel_config.enable_eplb", _falsy),
    Mode("--enable-elastic-ep", "parallel_config.enable_elastic_ep", _falsy),
    Mode("--enable-dbo", "parallel_config.enable_dbo", _falsy),
    Mode("--nnodes", "parallel_config.nnodes", _one),
    Mode("--api-server-count", "parallel_config._api_process_count", _one),
    Mode("--distributed-executor-backend", "parallel_config.distributed_executor_backend", lambda v: v in (None, "mp", "uni")),
    Mode("--worker-extension-cls", "parallel_config.worker_extension_cls", _falsy),
    Mode("--speculative-config", "speculative_config", _falsy),
    Mode("--enable-lora", "lora_config", _falsy),
    Mode("--enable-sleep-mode", "model_config.enable_sleep_mode", _falsy),
    Mode("--weight-transfer-config", "weight_transfer_config", _falsy),
    Mode("--kv-transfer-config", "kv_transfer_config", _falsy),
    Mode("--ec-transfer-config", "ec_transfer_config", _falsy),
    Mode("--cpu-offload-gb", "offload_config.uva.cpu_offload_gb", _falsy),
    Mode("--offload-group-size", "offload_config.prefetch.offload_group_size", _falsy),
    Mode("--load-format", "load_config.load_format", lambda v: v in ("auto", "safetensors", "hf")),
    Mode("--dtype", "model_config.dtype", lambda v: v == torch.bfloat16),
    Mode("--model-class-overrides", "model_config.model_class_overrides", _falsy),
    Mode("--model-impl", "model_config.model_impl", lambda v: v in ("auto", "vllm")),
)

_ON_GPU = "bench/results/vllm_gpu.json"
PROVEN_BACKENDS = {
    ("cpu", "GptOssForCausalLM", "unquantized/CPU"): "tests/engines",
    ("cpu", "Qwen3MoeForCausalLM", "unquantized/CPU"): "tests/engines",
    ("cuda", "GptOssForCausalLM", "mxfp4/TRITON"): _ON_GPU,
    ("cuda", "GptOssForCausalLM", "mxfp4/TRITON_UNFUSED"): _ON_GPU,
    ("cuda", "GptOssForCausalLM", "mxfp4/MARLIN"): _ON_GPU,
    ("cuda", "Qwen3MoeForCausalLM", "unquantized/TRITON"): _ON_GPU,
}
"""(platform, architecture, MoE backend as `routers.backend_of` names the one that vLLM chose) -> what proves it."""

PROVEN_ROUTERS = ("FusedTopKRouter", "CPURouter")
"""vLLM's classes that select experts by the router's logits and nothing else."""

POWER_OF_TWO_TOP_K = ("mxfp4/TRITON", "mxfp4/TRITON_UNFUSED")
"""MXFP4 backends whose routing kernel takes a top_k that is a power of two only."""


def check_modes(vllm_config: Any) -> None:
    """Refuse a mode that masks are not proven with.

    Raises:
        RefusedError: names the flag, and what was found.
        SeamError: a mode cannot be read in this version of vLLM.
    """
    for mode in UNPROVEN_MODES:
        value = seams.attribute(vllm_config, mode.path, "config." + mode.path)
        if not mode.is_off(value):
            shown = value if isinstance(value, (str, int, float, bool, torch.dtype)) else "set"
            raise RefusedError(
                f"{mode.flag} ({shown}) is not proven together with an expert mask in {seams.engine()}; "
                "softprune refuses to start. Leave it out, or leave the softprune flags out."
            )
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        raise RefusedError("VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set: vLLM would select experts without asking the routers")


def check_front_end(args: Any) -> None:
    """Refuse front ends that do not run the control API, and with it the check at start-up.

    Args:
        args: the parsed command line.

    Raises:
        RefusedError: names the flag or the environment variable.
    """
    asked = {
        "--grpc": getattr(args, "grpc", False),
        "--headless": getattr(args, "headless", False),
        "vllm preload": hasattr(args, "weight_cache_socket_dir"),
        "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    }
    for name, is_on in asked.items():
        if is_on:
            raise RefusedError(f"{name} is not proven together with an expert mask in {seams.engine()}; softprune refuses to start")


def check_backend(platform: str, architecture: str, backend: str, top_k: int) -> None:
    """Refuse an MoE backend that masks are not proven with, or a top_k that its kernel cannot take.

    Args:
        platform: vLLM's name for the kind of device.
        architecture: the model's.
        backend: the one in use, as `routers.backend_of` names it.
        top_k: experts per token.

    Raises:
        RefusedError: not proven, or top_k is not a power of two where it has to be.
    """
    if (platform, architecture, backend) not in PROVEN_BACKENDS:
        proven = [name for where, which, name in PROVEN_BACKENDS if (where, which) == (platform, architecture)]
        raise RefusedError(
            f"MoE backend {backend} for {architecture} on {platform} is not proven with an expert mask in {seams.engine()}; "
            f"proven there: {', '.join(proven) or 'none'}. --moe-backend chooses."
        )
    if backend in POWER_OF_TWO_TOP_K and top_k & (top_k - 1):
        raise RefusedError(f"top_k {top_k}: MoE backend {backend} takes powers of two only (1, 2, 4, ...)")


def check_router(name: str, router: Any, top_k: int) -> None:
    """Refuse a class that selects experts by something else than their logits, or another number of them.

    Raises:
        RefusedError: names what was found.
    """
    if type(router).__name__ not in PROVEN_ROUTERS:
        raise RefusedError(f"{name}: {type(router).__name__} selects experts; proven: {', '.join(PROVEN_ROUTERS)}")
    if seams.attribute(router, "top_k", seams.MOE_RUNNER.name) != top_k:
        raise RefusedError(f"{name}: the engine selects {router.top_k} experts a token; expected {top_k}")
