"""Every place in SGLang that softprune hooks into or reads.

No other file of this extension names SGLang's internals.
"""

from __future__ import annotations

import functools
import importlib
import os
from functools import partial
from typing import Any

from softprune import seams
from softprune.errors import SeamError
from softprune.seams import Seam, check

__all__ = ["Seam", "attribute", "check", "engine"]

KNOWN_VERSIONS = ("0.5.17", "0.5.23")
"""Those in which the seams were read or run."""

engine = partial(seams.engine, "sglang")
attribute = partial(seams.attribute, package="sglang")

LOAD_PLUGINS = Seam("plugins.load", "sglang.srt.plugins:load_plugins")
HOOK_REGISTRY = Seam("plugins.hook_registry", "sglang.srt.plugins.hook_registry:HookRegistry.register", ("target", "hook", "hook_type"))
PLUGINS = (LOAD_PLUGINS, HOOK_REGISTRY)

ADD_CLI_ARGS = Seam("cli.add_args", "sglang.srt.server_args:ServerArgs.add_cli_args", ("parser",))
FROM_CLI_ARGS = Seam("cli.from_args", "sglang.srt.server_args:ServerArgs.from_cli_args", ("args",))
PREPARE_ARGS = Seam("cli.prepare_args", "sglang.srt.server_args:prepare_server_args", ("argv",))
LAUNCH_SUBPROCESSES = Seam("engine.launch_subprocesses", "sglang.srt.entrypoints.engine:Engine._launch_subprocesses", ("server_args",))
LAUNCH_SCHEDULERS = Seam(
    "engine.launch_schedulers", "sglang.srt.entrypoints.engine:Engine._launch_scheduler_processes", ("server_args", "port_args")
)
RUN_HTTP_SERVER = Seam(
    "http.run_server", "sglang.srt.entrypoints.http_server:_setup_and_run_http_server", ("server_args", "tokenizer_manager")
)
DUMPER_CONTROL = Seam("tokenizer.dumper_control", "sglang.srt.managers.tokenizer_manager:TokenizerManager.dumper_control", ("obj",))
DUMPER_REQUEST = Seam("ipc.dumper_request", "sglang.srt.managers.io_struct:DumperControlReqInput", ("method", "body"))
RELEASE_MEMORY = Seam(
    "tokenizer.release_memory", "sglang.srt.managers.tokenizer_manager:TokenizerManager.release_memory_occupation", ("obj",)
)
RESUME_MEMORY = Seam("tokenizer.resume_memory", "sglang.srt.managers.tokenizer_manager:TokenizerManager.resume_memory_occupation", ("obj",))
BATCH_OUTPUT = Seam("tokenizer.batch_output", "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_batch_output", ("recv_obj",))
FRONT_END = (
    *PLUGINS, ADD_CLI_ARGS, FROM_CLI_ARGS, PREPARE_ARGS, LAUNCH_SUBPROCESSES, LAUNCH_SCHEDULERS, RUN_HTTP_SERVER,
    DUMPER_CONTROL, DUMPER_REQUEST, RELEASE_MEMORY, RESUME_MEMORY, BATCH_OUTPUT,
)  # fmt: skip
"""Checked before the flags are added, when processes are launched, and in every scheduler process."""

LOAD_MODEL = Seam("scheduler.load_model", "sglang.srt.model_executor.model_runner:ModelRunner.load_model")
INIT_INFO = Seam("scheduler.init_info", "sglang.srt.managers.scheduler:Scheduler.get_init_info")
HANDLE_DUMPER_CONTROL = Seam("scheduler.dumper_control", "sglang.srt.managers.scheduler:Scheduler.handle_dumper_control", ("recv_req",))
DUMPER_ANSWER = Seam("ipc.dumper_answer", "sglang.srt.managers.io_struct:DumperControlReqOutput", ("success", "response", "error"))
EAGER = Seam("cuda_graph.disabled", "sglang.srt.model_executor.cuda_graph_config:cuda_graph_fully_disabled")
TOP_K = Seam("moe.top_k", "sglang.srt.layers.moe.topk:TopK")
GPT_OSS_BLOCK = Seam("model.gpt_oss_block", "sglang.srt.models.gpt_oss:GptOssSparseMoeBlock")
QWEN3_MOE_BLOCK = Seam("model.qwen3_moe_block", "sglang.srt.models.qwen3_moe:Qwen3MoeSparseMoeBlock")
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
WEIGHT_UPDATES = {
    method: Seam(f"scheduler.{method}", f"{owner}.{method}", ("recv_req",))
    for owner, methods in {
        _UPDATER: (
            "update_weights_from_disk", "init_weights_update_group", "update_weights_from_distributed", "update_weights_from_tensor",
            "update_weights_from_ipc", "check_weights",
        ),
        _SCHEDULER: ("init_weights_send_group_for_remote_instance", "send_weights_to_remote_instance"),
    }.items()
    for method in methods
}  # fmt: skip
"""Calls that change weights or hand them, masked, to another server; each answers with `success` and `message`."""
BEGIN_WEIGHT_UPDATE = Seam("scheduler.begin_weight_update", f"{_UPDATER}.begin_weight_update", ("recv_req",))
"""Since 0.5.19 or so; where it exists, it is refused as well."""
WEIGHT_UPDATER = Seam("scheduler.weight_updater", _UPDATER)
OTHER_UPDATER_CALLS = (
    "destroy_weights_update_group", "end_weight_update", "flush_cache_after_weight_update", "get_weights_by_name",
    "record_weight_version_after_update", "release_memory_occupation", "resume_memory_occupation",
    "save_remote_model", "save_sharded_model",
)  # fmt: skip
"""The updater's other public methods: harmless without those above, or refused elsewhere. The contract test reports a new one."""
SAVE_REMOTE_MODEL = Seam("scheduler.save_remote_model", "sglang.srt.managers.scheduler:Scheduler.save_remote_model")
SAVE_SHARDED_MODEL = Seam("scheduler.save_sharded_model", "sglang.srt.managers.scheduler:Scheduler.save_sharded_model")
RAISING = (SAVE_REMOTE_MODEL, SAVE_SHARDED_MODEL, RELEASE_MEMORY, RESUME_MEMORY)
"""Calls whose callers report an exception: they would copy the mask into a checkpoint, or move the weights."""

RUN_BATCH = Seam("scheduler.run_batch", f"{_SCHEDULER}.run_batch", ("batch",))
ADD_REQUEST = Seam("scheduler.add_request", f"{_SCHEDULER}._add_request_to_queue", ("req",))
"""Where every request enters the queue of those without KV: new ones, ones whose grammar is ready, preempted and retracted ones."""
STASH_CHUNKED = Seam("scheduler.stash_chunked", f"{_SCHEDULER}.stash_chunked_request", ("req",))
"""Called between two chunks of a prefill."""
NEW_PREFILL = Seam("scheduler.new_prefill", f"{_SCHEDULER}.get_new_batch_prefill", ("running_batch",))
PROCESS_INPUT = Seam("scheduler.process_input", f"{_SCHEDULER}.process_input_requests", ("recv_reqs",))
PAUSE = Seam("scheduler.pause", f"{_SCHEDULER}.pause_generation", ("recv_req",))
CONTINUE = Seam("scheduler.continue", f"{_SCHEDULER}.continue_generation", ("recv_req",))
PAUSE_REQUEST = Seam("ipc.pause", "sglang.srt.managers.io_struct:PauseGenerationReqInput", ("mode",))
CONTINUE_REQUEST = Seam("ipc.continue", "sglang.srt.managers.io_struct:ContinueGenerationReqInput", ("torch_empty_cache",))
ACCEPT_OUTPUT = Seam(
    "scheduler.accept_output",
    "sglang.srt.managers.scheduler_components.output_streamer:_GenerationStreamAccumulator.accept",
    ("req",),
)
"""Called for every request that has something to be sent, the last time once it is finished."""
SEND_OUTPUT = Seam("scheduler.send_output", "sglang.srt.managers.scheduler_components.output_sender:SenderWrapper.send_output", ("output",))
ABORT = Seam("ipc.abort", "sglang.srt.managers.io_struct:AbortReq", ("rid", "finished_reason"))
"""What the front end is sent of a request that is given up without an output."""
REQUEST = Seam("scheduler.request", "sglang.srt.managers.schedule_batch:Req")
REQUEST_FIELDS = ("rid", "extra_key", "skip_radix_cache_insert", "retracted_stain")
"""What `scheduler` reads of every request."""
CACHE_UNFINISHED = Seam("cache.unfinished", "sglang.srt.mem_cache.common:maybe_cache_unfinished_req")
"""Until 0.5.18 or so: what `STASH_CHUNKED` calls there forgets the KV of a request that may not be cached."""
SCHEDULER = (
    LOAD_MODEL, INIT_INFO, HANDLE_DUMPER_CONTROL, DUMPER_ANSWER, EAGER, TOP_K, GPT_OSS_BLOCK, QWEN3_MOE_BLOCK,
    *WEIGHT_UPDATES.values(), SAVE_REMOTE_MODEL, SAVE_SHARDED_MODEL, RUN_BATCH, ADD_REQUEST, STASH_CHUNKED, NEW_PREFILL, PROCESS_INPUT,
    PAUSE, CONTINUE, PAUSE_REQUEST, CONTINUE_REQUEST, ACCEPT_OUTPUT, SEND_OUTPUT, ABORT, REQUEST,
)  # fmt: skip
"""Checked in every scheduler process before the model is loaded."""

TINY_GEMM = Seam("router.tiny_gemm", "sglang.srt.models.gpt_oss:tinygemm_bf16")
TINY_GEMM_PDL = Seam("router.tiny_gemm_pdl", "sglang.srt.models.gpt_oss:is_arch_support_pdl")
"""Resolved where gpt-oss's router has a kernel for small batches."""
BATCH = Seam("scheduler.batch", "sglang.srt.managers.schedule_batch:ScheduleBatch", ("reqs", "forward_mode", "prefix_lens", "extend_lens"))
SAMPLING_PARAMS = Seam("request.sampling_params", "sglang.srt.sampling.sampling_params:SamplingParams", ("custom_params",))
STATISTICS = (BATCH, SAMPLING_PARAMS)
"""Checked in the scheduler process that collects statistics."""
PREFILL_GRAPH = Seam(
    "prefill.can_run_graph", "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner.can_run_graph",
    ("forward_batch",),
)  # fmt: skip
"""Asked before each prefill whether it runs as a captured graph."""
GPT_OSS_FORWARD = Seam("model.gpt_oss_forward", f"{GPT_OSS_BLOCK.target}.forward", ("hidden_states",))
QWEN3_MOE_FORWARD = Seam("model.qwen3_moe_forward", f"{QWEN3_MOE_BLOCK.target}.forward", ("hidden_states",))
SAMPLES = (PREFILL_GRAPH, GPT_OSS_FORWARD, QWEN3_MOE_FORWARD)
"""Checked where experts' norms are collected."""
SAMPLE = Seam("runner.sample", "sglang.srt.model_executor.model_runner:ModelRunner.sample", ("logits_output", "forward_batch"))
INPUT_LOGPROBS = Seam(
    "logits.input_logprobs", "sglang.srt.layers.logprob_processor:InputLogprobProcessor.forward",
    ("pruned_states", "input_logprob_indices", "get_logits_fn", "logits_metadata"),
)  # fmt: skip
"""Makes the logits of prompts whose log-probabilities were asked for, some rows at a time."""
SCORES = (SAMPLE, INPUT_LOGPROBS)
"""Checked where tokens are scored."""


def owner(seam: Seam) -> Any:
    """The class that a seam's method belongs to."""
    module, _, name = seam.target.partition(":")
    return getattr(importlib.import_module(module), name.partition(".")[0])


def is_known() -> bool:
    """Whether this version of SGLang is one of those that the seams were read in."""
    import sglang

    return sglang.__version__.split("+")[0] in KNOWN_VERSIONS


@functools.cache
def exists(seam: Seam) -> bool:
    """Whether this version has a seam that not all have."""
    try:
        seam.resolve()
    except SeamError:
        return False
    return True


def answer_to(request: Any) -> Any:
    """SGLang's class for the answer to a control request: `…ReqInput` -> `…ReqOutput`."""
    from sglang.srt.managers import io_struct

    return attribute(io_struct, type(request).__name__.removesuffix("Input") + "Output", "ipc.answer")


def setting(server_args: Any, name: str) -> Any:
    """A setting of the server as SGLang has resolved it.

    Since 0.5.19 or so, `ServerArgs` keeps what the user gave, and a view of it what became of that.

    Raises:
        SeamError: there is no such setting.
    """
    try:
        from sglang.srt.arg_groups.model_override_base import resolving_view
    except ImportError:
        return attribute(server_args, name, "server_args." + name)
    return attribute(resolving_view(server_args), name, "server_args." + name)


def platform(model_runner: Any) -> str:
    """SGLang's name for the kind of device: "cuda", "cpu", "hip", …"""
    from sglang.srt.utils import is_hip

    return "hip" if is_hip() else str(attribute(model_runner, "device", LOAD_MODEL.name))


def switched_on(variable: str) -> bool:
    """Whether an environment variable of SGLang's is set to something that is not "no"."""
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no", "n", "off")
