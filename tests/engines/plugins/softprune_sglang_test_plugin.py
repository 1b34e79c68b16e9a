"""A SGLang plugin for tests: changes the engine before softprune sees it, as environment variables say.

SOFTPRUNE_TEST_CPU_ATTENTION=1     gpt-oss runs where there is no GPU (see `_attention`)
SOFTPRUNE_TEST_STABLE_TOPK=1       expert selection on the CPU breaks ties by the smaller id, in descending order
SOFTPRUNE_TEST_REMOVE=module:path  delete this attribute, as a new engine version might
SOFTPRUNE_TEST_BREAK=role          softprune cannot be imported: "main" in the first process, "child" in all others
SOFTPRUNE_TEST_RAISE=role          softprune's register() raises there
SOFTPRUNE_TEST_SKIP_LAYER=n        softprune's mask is not written to MoE layer n (a mutation that tests must notice)
SOFTPRUNE_TEST_PROVEN=A,B          treat these MoE backends as proven, to find out whether they are
SOFTPRUNE_TEST_LIE=1               scheduler processes say that they serve another mask
SOFTPRUNE_TEST_VANISH=file         delete this file once the front end has read it
SOFTPRUNE_TEST_ONE_CACHE=1         all masks share one prefix cache (a mutation that tests must notice)
SOFTPRUNE_TEST_COLLECT=how          the routers' logits land in a slab: "copy" or "slab"; with "+sums" they are added up (see `_collect`)
SOFTPRUNE_TEST_REFUSE=n:hash       rank n refuses to switch to the mask with this hash
"""

import importlib
import multiprocessing
import os
import sys

ENV = os.environ
ROLE = "main" if multiprocessing.parent_process() is None else "child"

# SGLang imports this module before softprune's, so what keeps softprune from loading stands here.
if ENV.get("SOFTPRUNE_TEST_BREAK") == ROLE:
    sys.modules["softprune"] = None
if ENV.get("SOFTPRUNE_TEST_RAISE") == ROLE:
    import softprune.sglang_ext

    softprune.sglang_ext.register = lambda: _raise()


def register():
    if ENV.get("SOFTPRUNE_TEST_CPU_ATTENTION"):
        _attention()
    if ENV.get("SOFTPRUNE_TEST_STABLE_TOPK"):
        _stable_topk()
    if ENV.get("SOFTPRUNE_TEST_REMOVE"):
        _remove(*ENV["SOFTPRUNE_TEST_REMOVE"].split(":"))
    if ENV.get("SOFTPRUNE_TEST_SKIP_LAYER"):
        _skip_layer(int(ENV["SOFTPRUNE_TEST_SKIP_LAYER"]))
    if ENV.get("SOFTPRUNE_TEST_PROVEN"):
        _proven(ENV["SOFTPRUNE_TEST_PROVEN"].split(","))
    if ENV.get("SOFTPRUNE_TEST_LIE"):
        _lie()
    if ENV.get("SOFTPRUNE_TEST_ONE_CACHE"):
        _one_cache()
    if ENV.get("SOFTPRUNE_TEST_COLLECT"):
        _collect(ENV["SOFTPRUNE_TEST_COLLECT"])
    if ENV.get("SOFTPRUNE_TEST_REFUSE"):
        _refuse(*ENV["SOFTPRUNE_TEST_REFUSE"].split(":", 1))
    if ROLE == "child" and os.path.exists(ENV.get("SOFTPRUNE_TEST_VANISH", "")):
        os.unlink(ENV["SOFTPRUNE_TEST_VANISH"])


def _raise():
    raise RuntimeError("planted: softprune's plugin raises")


def _attention():
    """SGLang serves gpt-oss only with attention kernels that know its sinks, none of which is for a plain CPU.

    PyTorch's own attention takes the place of one of them and leaves the sinks and the window out: routers and
    experts are SGLang's, the attention is not gpt-oss's.
    """
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    for name in ("forward_decode", "forward_extend"):
        setattr(TorchNativeAttnBackend, name, _without_sinks(getattr(TorchNativeAttnBackend, name)))
    attention_registry.ATTENTION_BACKENDS["intel_amx"] = TorchNativeAttnBackend


def _without_sinks(forward):
    return lambda *args, sinks=None, **kwargs: forward(*args, **kwargs)


def _stable_topk():
    import torch
    from sglang.srt.layers.moe import topk as engine

    def softmax_topk(hidden_states, gating_output, topk, renormalize, *args, **kwargs):
        assert renormalize
        values, ids = torch.sort(gating_output.float(), dim=-1, descending=True, stable=True)
        return torch.softmax(values[:, :topk], dim=-1), ids[:, :topk].to(torch.int32)

    engine.fused_topk_native = engine.fused_topk = softmax_topk


def _remove(module, path):
    owner = importlib.import_module(module)
    *parents, last = path.split(".")
    for part in parents:
        owner = getattr(owner, part)
    delattr(owner, last)


def _skip_layer(layer):
    from softprune.runtime import router_mask

    original = router_mask.RouterMask.apply

    def apply(self, mask):
        original(self, mask)
        self.routers[layer].bias.copy_(self.loaded[layer])

    router_mask.RouterMask.apply = apply
    router_mask.RouterMask.verify = lambda self, hidden, dtype: None


def _proven(backends):
    from softprune.sglang_ext import proven

    for architecture in ("GptOssForCausalLM", "Qwen3MoeForCausalLM"):
        proven.PROVEN_BACKENDS.update({("cuda", architecture, backend): "on trial" for backend in backends})


def _lie():
    from softprune.runtime.masked_model import MaskedModel

    status = MaskedModel.status
    MaskedModel.status = lambda self: {**status(self), "mask": None}


def _one_cache():
    from softprune.sglang_ext import scheduler

    scheduler.cache_namespace = lambda mask_hash, own: own
    scheduler._bar_from_cache = lambda request: None


def _refuse(rank, refused):
    import torch.distributed as dist

    from softprune.control import ControlError
    from softprune.runtime.masked_model import MaskedModel

    stage = MaskedModel.stage

    def refusing(self, text):
        vote = stage(self, text)
        if dist.get_rank() == int(rank) and text is not None and self.routers._staged[0].hash == refused:
            return ControlError(409, "planted", "this rank refuses").answer
        return vote

    MaskedModel.stage = refusing


COLLECTED = []
"""This process's RouterStats, for tests."""


def _collect(how):
    """What would it cost to collect router statistics? One row of the slab holds a token's logits in one layer.

    copy    every router's output is copied into the slab
    slab    the small-batch router kernel writes into the slab in the first place
    +sums   the slab is added up once the model has run; as the model's last kernel, so that graphs hold it
    """
    from sglang.srt.model_executor.model_runner import ModelRunner

    load_model = ModelRunner.load_model

    def load(self, *args, **kwargs):
        result = load_model(self, *args, **kwargs)
        where, _, sums = how.partition("+")
        _attach_collector(self.model, where, bool(sums))
        return result

    ModelRunner.load_model = load


def _attach_collector(model, where, sums):
    from softprune.runtime.router_stats import RouterStats

    blocks = [layer.mlp for layer in model.model.layers]
    weight = blocks[0].router.weight
    stats = RouterStats(len(blocks), weight.shape[0], blocks[0].top_k, 8, 16384, weight.device, weight.dtype)
    stats.cells.fill_(1)
    stats.num_rows.fill_(16384)
    COLLECTED.append(stats)
    for slab, block in zip(stats.slab, blocks, strict=True):
        if where == "slab":
            block.router.forward = _into_slab(block.router, slab)
        else:
            block.router.register_forward_hook(lambda module, args, output, slab=slab: _copied(slab, output))
    if sums:
        model.model.register_forward_hook(lambda module, args, output: stats.add(output.shape[0]))


def _copied(slab, output):
    slab[: output[0].shape[0]].copy_(output[0])


def _into_slab(router, slab):
    from sglang.srt.models import gpt_oss

    forward = router.forward

    def into(x):
        if not (router._use_tinygemm and x.is_cuda and x.shape[0] <= 128):
            output = forward(x)
            _copied(slab, output)
            return output
        rows = slab[: x.shape[0]]
        gpt_oss.tinygemm_bf16(x, router.weight, rows, router.bias, use_pdl=gpt_oss.is_arch_support_pdl())
        return rows, None

    return into
