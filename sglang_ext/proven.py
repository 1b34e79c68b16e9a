"""What masks are known to work with in SGLang, and what is refused.

Platforms and MoE backends are those that were proven, and no others. Modes are refused by name, as
`UNPROVEN_MODES` lists them. The table in docs/proof.md is this file in prose; the evidence is in tests/engines
and bench/results.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from softprune import proven
from softprune.errors import RefusedError
from softprune.proven import Mode, among, falsy, one
from softprune.sglang_ext import seams

UNPROVEN_MODES = (
    Mode("--pipeline-parallel-size", "pp_size", one),
    Mode("--data-parallel-size", "dp_size", one),
    Mode("--enable-dp-attention", "enable_dp_attention", falsy),
    Mode("--expert-parallel-size", "ep_size", one),
    Mode("--moe-data-parallel-size", "moe_dp_size", one),
    Mode("--attention-context-parallel-size", "attn_cp_size", one),
    Mode("--dcp-size", "dcp_size", one),
    Mode("--nnodes", "nnodes", one),
    Mode("--moe-a2a-backend", "moe_a2a_backend", among("none")),
    Mode("--enable-eplb", "enable_eplb", falsy),
    Mode("--ep-num-redundant-experts", "ep_num_redundant_experts", falsy),
    Mode("--init-expert-location", "init_expert_location", among("trivial")),
    Mode("--elastic-ep-backend", "elastic_ep_backend", among(None, "none")),
    Mode("--enable-elastic-expert-backup", "enable_elastic_expert_backup", falsy),
    Mode("--speculative-algorithm", "speculative_algorithm", falsy),
    Mode("--decoupled-spec-role", "decoupled_spec_role", among("null")),
    Mode("--tokenizer-worker-num", "tokenizer_worker_num", one),
    Mode("--enable-lora", "enable_lora", falsy),
    Mode("--lora-paths", "lora_paths", falsy),
    Mode("--grpc-mode", "grpc_mode", falsy),
    Mode("--smg-grpc-mode", "smg_grpc_mode", falsy),
    Mode("--grpc-port", "grpc_port", falsy),
    Mode("--enable-http2", "enable_http2", falsy),
    Mode("--use-ray", "use_ray", falsy),
    Mode("--encoder-only", "encoder_only", falsy),
    Mode("--enable-memory-saver", "enable_memory_saver", falsy),
    Mode("--custom-weight-loader", "custom_weight_loader", falsy),
    Mode("--checkpoint-engine-wait-weights-before-ready", "checkpoint_engine_wait_weights_before_ready", falsy),
    Mode(
        "--remote-instance-weight-loader-start-seed-via-transfer-engine",
        "remote_instance_weight_loader_start_seed_via_transfer_engine",
        falsy,
    ),
    Mode("--enable-hierarchical-cache", "enable_hierarchical_cache", falsy),
    Mode("--hicache-storage-backend", "hicache_storage_backend", falsy),
    Mode("--enable-lmcache", "enable_lmcache", falsy),
    Mode("--enable-flexkv", "enable_flexkv", falsy),
    Mode("--disaggregation-mode", "disaggregation_mode", among("null")),
    Mode("--load-format", "load_format", among("auto", "safetensors")),
    Mode("--model-impl", "model_impl", among("auto", "sglang")),
    Mode("--quantization", "quantization", among(None, "mxfp4")),
    Mode("--cpu-offload-gb", "cpu_offload_gb", falsy),
    Mode("--offload-group-size", "offload_group_size", among(-1, 0)),
    Mode("--enable-torch-compile", "enable_torch_compile", falsy),
    Mode("--enable-two-batch-overlap", "enable_two_batch_overlap", falsy),
    Mode("--enable-single-batch-overlap", "enable_single_batch_overlap", falsy),
    Mode("--enable-pdmux", "enable_pdmux", falsy),
    Mode("--dllm-algorithm", "dllm_algorithm", falsy),
    Mode("--enable-streaming-session", "enable_streaming_session", falsy),  # keeps KV from one request to the next past the prefix cache
    Mode("--radix-cache-backend", "radix_cache_backend", falsy),  # may have no namespaces
    Mode("--is-embedding", "is_embedding", falsy),
)
MODES_OF_SOME_VERSIONS = (
    Mode("--torchao-config", "torchao_config", falsy),
    Mode("--dwdp-size", "dwdp_size", one),
    Mode("--weight-cache-mode", "weight_cache_mode", among("off")),
    Mode("--startup-weight-load-mode", "startup_weight_load_mode", lambda mode: mode != "overlap"),
)
"""Modes that came after 0.5.16 or went before 0.5.23."""

PROVEN_BACKENDS: dict[proven.Backend, str] = {
    ("cuda", "GptOssForCausalLM", "mxfp4/triton_kernel"): "bench/results/sglang_gpu.json",
    ("cuda", "Qwen3MoeForCausalLM", "bf16/triton"): "bench/results/sglang_gpu.json",
    ("cpu", "GptOssForCausalLM", "bf16/native"): "tests/engines",
    ("cpu", "Qwen3MoeForCausalLM", "bf16/native"): "tests/engines",
}
"""(platform, architecture, MoE backend as `routers.backend_of` names the one that SGLang chose) -> what proves it."""

TRITON_KERNELS = ("mxfp4/triton_kernel",)
"""Backends whose experts run in OpenAI's Triton kernels; their routing takes a top_k that is a power of two only."""

check_backend = partial(
    proven.check_backend, proven=PROVEN_BACKENDS, power_of_two=TRITON_KERNELS, flag="--moe-runner-backend", package="sglang"
)
refusal = partial(proven.refusal, package="sglang")


def check_modes(server_args: Any) -> None:
    """Refuse a mode that masks are not proven with.

    Raises:
        RefusedError: names the flag, and what was found.
        SeamError: a mode cannot be read in this version of SGLang.
    """
    some = [mode for mode in MODES_OF_SOME_VERSIONS if hasattr(server_args, mode.path)]
    proven.check_modes([*UNPROVEN_MODES, *some], lambda name: seams.setting(server_args, name), "sglang")
    _check_environment()


def check_front_end(args: Any) -> None:
    """Refuse front ends that start their processes past softprune's hooks.

    Args:
        args: the parsed command line, before SGLang makes anything of it.

    Raises:
        RefusedError: names the flag or the environment variable.
    """
    for name in ("use_ray", "encoder_only", "grpc_mode", "smg_grpc_mode"):
        if getattr(args, name, False):
            raise refusal(f"--{name.replace('_', '-')}")
    _check_environment()


def _check_environment() -> None:
    # The C++ radix tree has no namespaces: it would find one mask's KV under another.
    simulated = ("SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS")
    for variable in ("SGLANG_RUST_SERVER", "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", *simulated):
        if seams.switched_on(variable):
            raise refusal(variable)


def check_dtype(dtype: Any) -> None:
    """Refuse any dtype but bfloat16.

    Raises:
        RefusedError: names what was found.
    """
    if dtype != torch.bfloat16:
        raise RefusedError(f"--dtype: found {dtype}; expected bfloat16, the only one proven with an expert mask in {seams.engine()}")
