"""Every place in vLLM that softprune hooks into or reads.

No other file of this extension names vLLM's internals.
"""

from __future__ import annotations

import importlib
import re
from functools import partial
from typing import Any

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
SCHEDULER_CLS = Seam("engine.scheduler_cls", "vllm.config:SchedulerConfig", ("scheduler_cls", "async_scheduling"))
WORKER_CLS = Seam("engine.worker_cls", "vllm.config:ParallelConfig", ("worker_cls", "worker_extension_cls"))
FRONT_END = (ADD_CLI_ARGS, FROM_CLI_ARGS, CREATE_ENGINE_CONFIG, ADDITIONAL_CONFIG, HF_OVERRIDES, SCHEDULER_CLS, WORKER_CLS)
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

APPLY_EXPERTS = Seam(
    "moe.apply", "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._apply_quant_method", ("hidden_states", "router_logits")
)
STEP_SIZE = Seam("engine.step_size", "vllm.config:SchedulerConfig", ("max_num_batched_tokens",))
CAPTURE_SIZES = Seam("engine.capture_sizes", "vllm.config:CompilationConfig", ("cudagraph_capture_sizes",))
EXECUTE_MODEL = Seam("worker.execute_model", "vllm.v1.worker.gpu_worker:Worker.execute_model", ("scheduler_output",))
WARM_UP = Seam("worker.warm_up", "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model")
DUMMY_BATCH = Seam("worker.dummy_batch", "vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch")
ROW_ORDER = Seam("worker.row_order", "vllm.v1.worker.gpu_input_batch:InputBatch")
NEW_REQUEST = Seam(
    "scheduler.new_request", "vllm.v1.core.sched.output:NewRequestData",
    ("req_id", "prompt_token_ids", "sampling_params", "num_computed_tokens"),
)  # fmt: skip
CACHED_REQUESTS = Seam("scheduler.cached_requests", "vllm.v1.core.sched.output:CachedRequestData", ("req_ids", "num_computed_tokens"))
FINISHED = Seam("scheduler.finished", "vllm.v1.core.sched.output:SchedulerOutput", ("finished_req_ids",))
EXTRA_ARGS = Seam("request.extra_args", "vllm.sampling_params:SamplingParams", ("extra_args",))
SAMPLE = Seam("runner.sample", "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample", ("logits",))
"""Of the older of vLLM's two model runners, as `PROMPT_LOGPROBS`."""
PROMPT_LOGPROBS = Seam(
    "runner.prompt_logprobs", "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
    ("hidden_states", "num_scheduled_tokens"),
)  # fmt: skip
GATHER_LOGPROBS = Seam("sampler.gather_logprobs", "vllm.v1.sample.sampler:Sampler.gather_logprobs", ("logprobs", "token_ids"))
"""Called once for each request whose prompt's log-probabilities were asked for, in `PROMPT_LOGPROBS`' own order."""
SCORES = (SAMPLE, PROMPT_LOGPROBS, GATHER_LOGPROBS)
"""Checked where tokens are scored."""
FORWARD_SELECTED = Seam(
    "moe.forward_modular", "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.forward_modular",
    ("x", "topk_weights", "topk_ids"),
)  # fmt: skip
FORWARD_SELECTING = Seam(
    "moe.forward_monolithic", "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.forward_monolithic",
    ("x", "router_logits"),
)  # fmt: skip
SELECTING_KERNEL = Seam(
    "moe.selecting_kernel", "vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe:OAITritonMxfp4ExpertsMonolithic"
)
EXPERTS = (FORWARD_SELECTED, FORWARD_SELECTING)
"""Checked where experts' norms are collected."""

STATISTICS = (
    APPLY_EXPERTS,
    STEP_SIZE,
    CAPTURE_SIZES,
    EXECUTE_MODEL,
    WARM_UP,
    DUMMY_BATCH,
    ROW_ORDER,
    NEW_REQUEST,
    CACHED_REQUESTS,
    FINISHED,
    EXTRA_ARGS,
)
"""Checked in the worker that collects statistics, before the model is loaded."""

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ENGINE_CORE = Seam("core.engine_core", "vllm.v1.engine.core:EngineCore")
PREPROCESS = Seam("core.preprocess_add_request", "vllm.v1.engine.core:EngineCore.preprocess_add_request", ("request",))
COLLECTIVE_RPC = Seam("core.collective_rpc", "vllm.v1.engine.core:EngineCore.collective_rpc", ("method", "args"))
ADD_REQUEST = Seam("scheduler.add_request", f"{_SCHEDULER}.add_request", ("request",))
SCHEDULE = Seam("scheduler.schedule", f"{_SCHEDULER}.schedule")
PREEMPT = Seam("scheduler.preempt_request", f"{_SCHEDULER}._preempt_request", ("request",))
UPDATE = Seam("scheduler.update_from_output", f"{_SCHEDULER}.update_from_output")
FREE_REQUEST = Seam("scheduler.free_request", f"{_SCHEDULER}._free_request", ("request",))
ASYNC_SCHEDULER = Seam("scheduler.async", "vllm.v1.core.sched.async_scheduler:AsyncScheduler")
BLOCK_HASHES = Seam("request.update_block_hashes", "vllm.v1.request:Request.update_block_hashes")
REQUEST = Seam("request.fields", "vllm.v1.request:Request", ("cache_salt", "block_hasher"))
REQUEST_FIELDS = ("request_id", "cache_salt", "block_hashes", "num_computed_tokens", "sampling_params")
"""What `scheduler` reads of every request."""
SCHEDULER_OUTPUT = Seam(
    "scheduler.output", "vllm.v1.core.sched.output:SchedulerOutput",
    ("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens"),
)  # fmt: skip
RESUMED = Seam("scheduler.resumed", "vllm.v1.core.sched.output:CachedRequestData", ("resumed_req_ids",))
SCHEDULER = (
    ENGINE_CORE, PREPROCESS, COLLECTIVE_RPC, ADD_REQUEST, SCHEDULE, UPDATE, PREEMPT, FREE_REQUEST, ASYNC_SCHEDULER, BLOCK_HASHES, REQUEST,
    SCHEDULER_OUTPUT, RESUMED,
)  # fmt: skip
"""Checked in the engine core before it schedules anything."""

CALL_UTILITY = Seam("client.call_utility", "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async", ("method",))
PROCESS_OUTPUTS = Seam(
    "client.process_outputs", "vllm.v1.engine.output_processor:OutputProcessor.process_outputs", ("engine_core_outputs",)
)
CORE_OUTPUT = Seam("client.core_output", "vllm.v1.engine:EngineCoreOutput", ("request_id", "kv_transfer_params"))
PAUSE = Seam("client.pause_generation", "vllm.v1.engine.async_llm:AsyncLLM.pause_generation", ("mode", "clear_cache"))
RESUME = Seam("client.resume_generation", "vllm.v1.engine.async_llm:AsyncLLM.resume_generation")
IS_PAUSED = Seam("client.is_paused", "vllm.v1.engine.async_llm:AsyncLLM.is_paused")
CONTROL_API = (CALL_UTILITY, PROCESS_OUTPUTS, CORE_OUTPUT, PAUSE, RESUME, IS_PAUSED)
"""Checked by the control API before the server answers anything."""

REFUSED_CALLS = (
    "sleep", "wake_up", "discard", "checkpoint_prepare", "checkpoint_restore", "reset_weights", "init_weight_transfer_engine",
    "start_weight_update", "start_draft_weight_update", "update_weights", "finish_weight_update", "save_sharded_state",
    "save_tensorized_model", "elastic_ep_execute", "add_lora", "update_config",
)  # fmt: skip
"""Calls to a worker that would undo or copy a mask; not every version has all of them."""
OTHER_CALLS = (
    "annotate_profile", "apply_model", "check_health", "compile_or_warm_up_model", "compute_weight_checksums", "determine_available_memory",
    "execute_dummy_batch", "execute_model", "get_cache_block_size_bytes", "get_compilation_match_table", "get_draft_model",
    "get_encoder_timing_stats", "get_kv_cache_spec", "get_kv_connector_handshake_metadata", "get_model", "get_model_inspection",
    "get_simple_cpu_offload_num_cpu_blocks", "get_supported_kv_cache_layouts", "get_supported_tasks", "handle_ft_command", "init_device",
    "initialize_from_config", "list_loras", "load_model", "pin_lora", "profile", "randomize_dummy_inputs",
    "release_late_interaction_query_cache", "reload_weights", "remove_lora", "reset_encoder_cache", "reset_mm_cache", "sample_tokens",
    "set_kv_cache_layout", "shutdown", "shutdown_weight_transfer_engine", "sleep_mode_backend", "supports_draft_weight_updates",
    "synchronize_device", "take_draft_token_ids", "update_max_model_len", "vocab_size",
)  # fmt: skip
"""A worker's other public methods: they leave the routers alone, or softprune follows them. The contract test reports a new one."""

GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


def owner(seam: Seam) -> Any:
    """The class that a seam's method belongs to."""
    module, _, name = seam.target.partition(":")
    return getattr(importlib.import_module(module), name.partition(".")[0])


def is_known() -> bool:
    """Whether this version of vLLM is one of those that the seams were read in."""
    import vllm

    return vllm.__version__.split("+")[0] in KNOWN_VERSIONS


def platform() -> str:
    """vLLM's name for the kind of device: "cuda", "cpu", "rocm", …"""
    from vllm.platforms import current_platform

    return "rocm" if current_platform.is_rocm() else str(current_platform.device_type)


def call_ids(request_id: str) -> set[str]:
    """The ids that a client may know one of vLLM's requests by.

    Of a call "cmpl-x" (or "chatcmpl-x", "generate-tokens-x"), vLLM makes "cmpl-x-0", "cmpl-x-1" for its prompts, "0_cmpl-x" for
    further answers, and adds "-" and eight random digits to each.
    """
    bare = re.sub(r"^\d+_", "", request_id)
    call = re.sub(r"-[0-9a-f]{8}$", "", bare)
    return {request_id, bare, call, re.sub(r"-\d+$", "", call)}
