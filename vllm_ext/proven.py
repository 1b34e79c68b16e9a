"""What masks are known to work with in vLLM, and what is refused.

Platforms, MoE backends and router classes are those that were proven, and no others. Modes are refused by
name, as `UNPROVEN_MODES` lists them. The table in docs/proof.md is this file in prose; the evidence is in
tests/engines, tests/evidence and bench/results.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from softprune import proven
from softprune.errors import RefusedError
from softprune.proven import Mode, among, falsy, one
from softprune.vllm_ext import seams

UNPROVEN_MODES = (
    Mode("--pipeline-parallel-size", "parallel_config.pipeline_parallel_size", one),
    Mode("--data-parallel-size", "parallel_config.data_parallel_size", one),
    Mode("--prefill-context-parallel-size", "parallel_config.prefill_context_parallel_size", one),
    Mode("--decode-context-parallel-size", "parallel_config.decode_context_parallel_size", one),
    Mode("--enable-expert-parallel", "parallel_config.enable_expert_parallel", falsy),
    Mode("--enable-eplb", "parallel_config.enable_eplb", falsy),
    Mode("--enable-elastic-ep", "parallel_config.enable_elastic_ep", falsy),
    Mode("--enable-dbo", "parallel_config.enable_dbo", falsy),
    Mode("--nnodes", "parallel_config.nnodes", one),
    Mode("--api-server-count", "parallel_config._api_process_count", one),
    Mode("--distributed-executor-backend", "parallel_config.distributed_executor_backend", among(None, "mp", "uni")),
    Mode("--scheduler-cls", "scheduler_config.scheduler_cls", falsy),
    Mode("--worker-extension-cls", "parallel_config.worker_extension_cls", falsy),
    Mode("--speculative-config", "speculative_config", falsy),
    Mode("--enable-lora", "lora_config", falsy),
    Mode("--enable-sleep-mode", "model_config.enable_sleep_mode", falsy),
    Mode("--weight-transfer-config", "weight_transfer_config", falsy),
    Mode("--kv-transfer-config", "kv_transfer_config", falsy),
    Mode("--ec-transfer-config", "ec_transfer_config", falsy),
    Mode("--cpu-offload-gb", "offload_config.uva.cpu_offload_gb", falsy),
    Mode("--offload-group-size", "offload_config.prefetch.offload_group_size", falsy),
    Mode("--load-format", "load_config.load_format", among("auto", "safetensors", "hf")),
    Mode("--model-class-overrides", "model_config.model_class_overrides", falsy),
    Mode("--model-impl", "model_config.model_impl", among("auto", "vllm")),
)

_ON_GPU = "bench/results/vllm_gpu.json"
PROVEN_BACKENDS = {
    ("cpu", "GptOssForCausalLM", "unquantized/CPU"): "tests/engines",
    ("cpu", "Qwen3MoeForCausalLM", "unquantized/CPU"): "tests/evidence",
    ("cuda", "GptOssForCausalLM", "mxfp4/TRITON"): _ON_GPU,
    ("cuda", "GptOssForCausalLM", "mxfp4/TRITON_UNFUSED"): _ON_GPU,
    ("cuda", "GptOssForCausalLM", "mxfp4/MARLIN"): _ON_GPU,
    ("cuda", "Qwen3MoeForCausalLM", "unquantized/TRITON"): _ON_GPU,
}
"""(platform, architecture, MoE backend as `routers.backend_of` names the one that vLLM chose) -> what proves it."""

PROVEN_DTYPES = {"cpu": (torch.bfloat16, torch.float32)}
"""Platform -> what models may compute in; elsewhere bfloat16 alone."""

PROVEN_ROUTERS = ("FusedTopKRouter", "CPURouter")
"""vLLM's classes that select experts by the router's logits and nothing else."""

TRITON_KERNELS = ("mxfp4/TRITON", "mxfp4/TRITON_UNFUSED")
"""Backends whose experts run in OpenAI's Triton kernels; their routing takes a top_k that is a power of two only."""

check_backend = partial(proven.check_backend, proven=PROVEN_BACKENDS, power_of_two=TRITON_KERNELS, flag="--moe-backend", package="vllm")


def check_modes(vllm_config: Any) -> None:
    """Refuse a mode that masks are not proven with.

    Raises:
        RefusedError: names the flag, and what was found.
        SeamError: a mode cannot be read in this version of vLLM.
    """
    proven.check_modes(UNPROVEN_MODES, lambda path: seams.attribute(vllm_config, path, "config." + path), "vllm")
    check_dtype(seams.attribute(vllm_config, "model_config.dtype", "config.model_config.dtype"), seams.platform())
    if os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        raise RefusedError("VLLM_SERVER_DEV_MODE is set: anybody could call the workers, past softprune's key and its bookkeeping")
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        raise RefusedError("VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set: vLLM would select experts without asking the routers")


def check_dtype(dtype: Any, platform: str) -> None:
    """Refuse a dtype that masks are not proven with.

    Args:
        dtype: the model's.
        platform: the engine's name for the kind of device.

    Raises:
        RefusedError: names what was found.
    """
    if dtype not in PROVEN_DTYPES.get(platform, (torch.bfloat16,)):
        raise proven.refusal(f"--dtype ({dtype})", "vllm")


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
            raise proven.refusal(name, "vllm")


def check_router(name: str, router: Any, top_k: int) -> None:
    """Refuse a class that selects experts by something else than their logits, or another number of them.

    Raises:
        RefusedError: names what was found.
    """
    if type(router).__name__ not in PROVEN_ROUTERS:
        raise RefusedError(f"{name}: {type(router).__name__} selects experts; proven: {', '.join(PROVEN_ROUTERS)}")
    if seams.attribute(router, "top_k", seams.MOE_RUNNER.name) != top_k:
        raise RefusedError(f"{name}: the engine selects {router.top_k} experts a token; expected {top_k}")
