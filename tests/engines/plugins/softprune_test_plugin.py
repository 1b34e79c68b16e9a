"""A vLLM plugin for tests: changes the engine before softprune sees it, as environment variables say.

SOFTPRUNE_TEST_STABLE_TOPK=1       expert selection in CPU routers breaks ties by the smaller id, in descending order
SOFTPRUNE_TEST_REMOVE=module:path  delete this attribute, as a new engine version might
SOFTPRUNE_TEST_DROP=module:path:p  the callable no longer takes parameter p
SOFTPRUNE_TEST_BREAK=role          softprune cannot be imported: "main" in the first process, "child" in all others
SOFTPRUNE_TEST_RAISE=1             softprune's register() raises
SOFTPRUNE_TEST_SKIP_LAYER=n        softprune's mask is not written to MoE layer n (a mutation that tests must notice)
SOFTPRUNE_TEST_PROVEN=A,B          treat these MoE backends as proven, to find out whether they are
SOFTPRUNE_TEST_LIE=1               workers say that they serve another mask
SOFTPRUNE_TEST_ONE_CACHE=file      while it exists, KV is cached without the mask in its name, and requests that cross a switch cache on
SOFTPRUNE_TEST_PAUSE=seconds       between two steps, so that a test can act in the middle of an answer on a machine with few cores
SOFTPRUNE_TEST_RANK_1=file         tensor parallel rank 1 refuses a live mask while this file says "refuse", and dies while it says "die"
SOFTPRUNE_TEST_COLLECT=how          the routers' logits are copied into a slab ("copy"), and with "copy+sums" added up after each step
SOFTPRUNE_TEST_VANISH=file         delete this file once the front end has read it
"""

import importlib
import inspect
import multiprocessing
import os
import sys

ENV = os.environ
ROLE = "main" if multiprocessing.parent_process() is None else "child"

# vLLM imports this module before softprune's, so what keeps softprune from loading stands here.
if ENV.get("SOFTPRUNE_TEST_BREAK") == ROLE:
    sys.modules["softprune"] = None
if ENV.get("SOFTPRUNE_TEST_RAISE"):
    import softprune.vllm_ext

    softprune.vllm_ext.register = lambda: _raise()


def register():
    if ENV.get("SOFTPRUNE_TEST_STABLE_TOPK"):
        _stable_topk()
    if ENV.get("SOFTPRUNE_TEST_REMOVE"):
        _remove(ENV["SOFTPRUNE_TEST_REMOVE"])
    if ENV.get("SOFTPRUNE_TEST_DROP"):
        _drop(*ENV["SOFTPRUNE_TEST_DROP"].split(":"))
    if ENV.get("SOFTPRUNE_TEST_SKIP_LAYER"):
        _skip_layer(int(ENV["SOFTPRUNE_TEST_SKIP_LAYER"]))
    if ENV.get("SOFTPRUNE_TEST_LIE"):
        _lie()
    if ENV.get("SOFTPRUNE_TEST_ONE_CACHE"):
        _one_cache(ENV["SOFTPRUNE_TEST_ONE_CACHE"])
    if ENV.get("SOFTPRUNE_TEST_PAUSE"):
        _pause(float(ENV["SOFTPRUNE_TEST_PAUSE"]))
    if ENV.get("SOFTPRUNE_TEST_RANK_1"):
        _rank_1(ENV["SOFTPRUNE_TEST_RANK_1"])
    if ENV.get("SOFTPRUNE_TEST_COLLECT"):
        _collect(ENV["SOFTPRUNE_TEST_COLLECT"])
    if ENV.get("SOFTPRUNE_TEST_PROVEN"):
        _proven(ENV["SOFTPRUNE_TEST_PROVEN"].split(","))
    if ROLE == "child" and os.path.exists(ENV.get("SOFTPRUNE_TEST_VANISH", "")):
        os.unlink(ENV["SOFTPRUNE_TEST_VANISH"])


def _raise():
    raise RuntimeError("planted: softprune's plugin raises")


def _proven(backends):
    from softprune.vllm_ext import proven

    for architecture in ("GptOssForCausalLM", "Qwen3MoeForCausalLM"):
        proven.PROVEN_BACKENDS.update({("cuda", architecture, backend): "on trial" for backend in backends})


def _lie():
    from softprune.vllm_ext.worker import ExpertMaskWorker

    status = ExpertMaskWorker.softprune_status
    ExpertMaskWorker.softprune_status = lambda self: {**status(self), "mask": None}


def _one_cache(path):
    from softprune.vllm_ext import scheduler

    named, seal = scheduler.cache_namespace, scheduler.ExpertMaskScheduling._seal_cache
    scheduler.cache_namespace = lambda mask_hash, own: own if os.path.exists(path) else named(mask_hash, own)
    scheduler.ExpertMaskScheduling._seal_cache = lambda self, request: None if os.path.exists(path) else seal(self, request)


def _pause(seconds):
    import time

    from softprune.vllm_ext.scheduler import ExpertMaskScheduling

    schedule = ExpertMaskScheduling.schedule

    def paused(self, *args, **kwargs):
        time.sleep(seconds)
        return schedule(self, *args, **kwargs)

    ExpertMaskScheduling.schedule = paused


def _rank_1(path):
    import torch.distributed as dist

    from softprune.runtime.masked_model import MaskedModel

    stage = MaskedModel.stage

    def staged(self, text):
        with open(path) as file:
            order = file.read().strip()
        if order and dist.get_rank() == 1:
            if order == "die":
                os._exit(1)
            return {"status": 409, "kind": "refused", "message": "planted: no", "detail": None}
        return stage(self, text)

    MaskedModel.stage = staged


def _owner(module, path):
    owner = importlib.import_module(module)
    *parents, last = path.split(".")
    for part in parents:
        owner = getattr(owner, part)
    return owner, last


def _remove(target):
    owner, name = _owner(*target.split(":"))
    for holder in getattr(owner, "__mro__", [owner]):
        if name in vars(holder):
            delattr(holder, name)


def _drop(module, path, parameter):
    owner, name = _owner(module, path)
    target = getattr(owner, name)
    signature = inspect.signature(target)
    kept = [p for p in signature.parameters.values() if p.name != parameter]
    target.__signature__ = signature.replace(parameters=kept)


def _stable_topk():
    import torch
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    def softmax_topk(router_logits, top_k, renormalize):
        values, ids = torch.sort(router_logits, dim=-1, descending=True, stable=True)
        values, ids = values[:, :top_k], ids[:, :top_k]
        weights = torch.softmax(values, dim=-1) if renormalize else (values - torch.logsumexp(router_logits, dim=-1, keepdim=True)).exp()
        return weights.to(torch.float32).contiguous(), ids.to(torch.int32).contiguous()

    cpu_router._softmax_topk = softmax_topk


def _skip_layer(layer):
    from softprune.runtime import router_mask

    original = router_mask.RouterMask.apply

    def apply(self, mask):
        original(self, mask)
        self.routers[layer].bias.copy_(self.loaded[layer])

    router_mask.RouterMask.apply = apply
    router_mask.RouterMask.verify = lambda self, hidden, dtype: None


COLLECTED = []
"""This process's RouterStats, for tests."""


def _collect(how):
    """What would it cost to collect router statistics? Copies are made in the op that torch.compile cannot look into, sums after a step."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    apply, forward, layers = MoERunner._apply_quant_method, GPUModelRunner._model_forward, {}

    def copying(self, hidden_states, router_logits, *args, **kwargs):
        layer = layers.setdefault(id(self), len(layers))
        COLLECTED[0].slab[layer, : router_logits.shape[0]].copy_(router_logits)
        return apply(self, hidden_states, router_logits, *args, **kwargs)

    def adding(self, input_ids=None, *args, **kwargs):
        output = forward(self, input_ids, *args, **kwargs)
        if how.endswith("+sums"):
            COLLECTED[0].add(input_ids.shape[0])
        return output

    load_model = Worker.load_model

    def load(self, *args, **kwargs):
        from softprune.runtime.router_stats import RouterStats

        result = load_model(self, *args, **kwargs)
        config, weight = self.model_config.hf_config, self.model_runner.model.model.layers[0].mlp.router.weight
        shape = config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok
        stats = RouterStats(*shape, 8, 16384, weight.device, weight.dtype)
        stats.cells.fill_(1)
        stats.num_rows.fill_(16384)
        COLLECTED.append(stats)
        return result

    MoERunner._apply_quant_method, GPUModelRunner._model_forward, Worker.load_model = copying, adding, load
