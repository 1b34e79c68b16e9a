"""Every place in vLLM that softprune hooks into or reads.

No other file of this extension names vLLM's internals.
"""

from __future__ import annotations

from functools import partial

from softprune import seams
from softprune.seams import Seam, check

__all__ = ["Seam", "attribute", "check", "engine"]

KNOWN_VERSIONS = ("0.26.0", "0.32.0", "0.33.0")
"""Those in which the seams were read or run."""

engine = partial(seams.engine, "vllm")
attribute = partial(seams.attribute, package="vllm")

ADD_CLI_ARGS = Seam("cli.add_args", "vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",))
FROM_CLI_ARGS = Seam("cli.from_args", "vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",))
CREATE_ENGINE_CONFIG = Seam("engine.create_config", "vllm.engine.arg_utils:EngineArgs.create_engine_config")
ADDITIONAL_CONFIG = Seam("engine.additional_config", "vllm.config:VllmConfig", ("additional_config",))
HF_OVERRIDES = Seam("engine.hf_overrides", "vllm.config:ModelConfig", ("hf_overrides",))
WORKER_CLS = Seam("engine.worker_cls", "vllm.config:ParallelConfig", ("worker_cls", "worker_extension_cls"))
FRONT_END = (ADD_CLI_ARGS, FROM_CLI_ARGS, CREATE_ENGINE_CONFIG, ADDITIONAL_CONFIG, HF_OVERRIDES, WORKER_CLS)
"""Checked when a softprune flag is parsed, and again when the engine's configuration is made."""

LOAD_MODEL = Seam("worker.load_model", "vllm.v1.worker.gpu_worker:Worker.load_model")
RELOAD_WEIGHTS = Seam("worker.reload_weights", "vllm.v1.worker.gpu_worker:Worker.reload_weights")
PROCESS_WEIGHTS = Seam("loader.process_weights", "vllm.model_executor.model_loader.base_loader:process_weights_after_loading", ("model",))
SELECT_EXPERTS = Seam(
    "router.select_experts", "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter.select_experts", ("router_logits",)
)
MOE_RUNNER = Seam("moe.runner", "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner", ("router", "gate"))
GPT_OSS_BLOCK = Seam("model.gpt_oss_block", "vllm.model_executor.models.gpt_oss:MLPBlock")
QWEN3_MOE_BLOCK = Seam("model.qwen3_moe_block", "vllm.model_executor.models.qwen3_moe:Qwen3MoeSparseMoeBlock")
WORKER = (LOAD_MODEL, RELOAD_WEIGHTS, PROCESS_WEIGHTS, SELECT_EXPERTS, MOE_RUNNER, GPT_OSS_BLOCK, QWEN3_MOE_BLOCK)
"""Checked in every worker process before the model is loaded."""

GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


def is_known() -> bool:
    """Whether this version of vLLM is one of those that the seams were read in."""
    import vllm

    return vllm.__version__.split("+")[0] in KNOWN_VERSIONS


def platform() -> str:
    """vLLM's name for the kind of device: "cuda", "cpu", "rocm", …"""
    from vllm.platforms import current_platform

    return "rocm" if current_platform.is_rocm() else str(current_platform.device_type)
