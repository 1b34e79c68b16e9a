"""SGLang's scheduler processes with masked routers.

A process that was asked for a mask masks its routers right after the weights are loaded, before any
graph is captured, and tells the front end which mask it serves when it says that it is ready. What
SGLang does to the weights afterwards is refused. The control API's calls are answered between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from softprune.control import ControlError
from softprune.errors import RefusedError
from softprune.launch import Launch
from softprune.proven import only, undoing
from softprune.runtime.blocks import MoeLayer
from softprune.runtime.masked_model import MaskedModel
from softprune.runtime.route_probe import RouteProbe
from softprune.sglang_ext import collector, experts, proven, routers, seams
from softprune.sglang_ext import scheduler as live_scheduler
from softprune.sglang_ext.flags import CONFIG_KEY, OVERRIDES, launch_in
from softprune.sglang_ext.hooks import check_applied

logger = logging.getLogger("sglang.softprune")

CARRIER = "softprune/"
"""Prefix of the `method` of a dumper control request that is ours: SGLang's one message with free JSON both ways.

The slash keeps it out of reach of SGLang's own route for such messages, /dumper/{method}, which asks for another key or for none.
"""

_masked: MaskedModel | None = None
"""This process's model; SGLang runs one in each scheduler process."""


def load_model(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.load_model`."""
    # A server that was asked for nothing must not fail here; one whose request is not found is noticed by its front end.
    config = getattr(getattr(runner, "model_config", None), "hf_config", None)
    request = getattr(config, CONFIG_KEY, None)
    if request is None:
        return original(runner, *args, **kwargs)
    seams.check(seams.SCHEDULER)
    check_applied()
    if not seams.is_known():
        logger.warning("softprune: %s is not among the versions it was read with: %s", seams.engine(), ", ".join(seams.KNOWN_VERSIONS))
    if seams.attribute(runner, "is_draft_worker", seams.LOAD_MODEL.name):
        raise RefusedError("speculative decoding is not proven together with an expert mask")
    launch = Launch.parse(request, f"model config.{CONFIG_KEY}")
    proven.check_dtype(seams.attribute(runner, "model_config.dtype", seams.LOAD_MODEL.name))
    if launch.debug_routes and not seams.EAGER.resolve()():
        raise RefusedError("--softprune-debug-routes needs --disable-cuda-graph: inside CUDA graphs it would see nothing")
    result = original(runner, *args, **kwargs)
    _mask(runner, launch)
    return result


def _mask(runner: Any, launch: Launch) -> None:
    """Mask the routers, see that they obey, and that everything around them is proven."""
    global _masked
    spec = launch.spec(runner.model_config.hf_config)
    layers = routers.find(runner.model, spec)
    loaded = [routers.weights(layer, spec) for layer in layers]
    model = MaskedModel(launch, spec, loaded, [routers.attach(layer, spec) for layer in layers], logger)
    model.backend = only({routers.backend_of(layer) for layer in layers})
    proven.check_backend(seams.platform(runner), spec.architecture, model.backend, launch.top_k)
    for layer in layers:
        selected = routers.selected_top_k(layer)
        if selected != launch.top_k:
            raise RefusedError(f"{layer.name}: the engine selects {selected} experts a token; expected {launch.top_k}")
    model.fit_kernels(model.backend in proven.TRITON_KERNELS)
    if launch.stats is not None and dist.get_rank() == 0:  # tensor-parallel ranks are all there are
        rows = collector.max_rows(seams.attribute(runner, "server_args", seams.LOAD_MODEL.name))
        collector.attach(layers, model.add_collector(rows, seams.engine()))
        _connect_sampler(runner, model, layers)
    model.verify()  # with the collector in place, so that its kernels are seen to obey as well
    if launch.debug_routes:
        probe = model.add_probe()
        for position, layer in enumerate(layers):
            layer.block.topk.register_forward_hook(_counting(probe, position, launch.top_k))
    logger.info("%s", model.summary)
    _masked = model
    live_scheduler.begin(model)


def _connect_sampler(runner: Any, model: MaskedModel, layers: Sequence[MoeLayer]) -> None:
    """Where more than router statistics are collected: experts that can be run, and tokens that are scored."""
    if model.collector is None or model.collector.sampler is None:
        return
    if dist.get_world_size() != 1:
        found = f"{dist.get_world_size()} processes"
        raise RefusedError(f"--softprune-stats {model.launch.stats}: found {found}; expected one, which has whole experts")
    model.connect_experts(experts.experts_of(layers, model.spec.num_experts))
    # The route probe would count the rows of padding.
    collector.keep_within(model.collector.sampler, () if model.launch.debug_routes else layers)
    if model.launch.stats == "eaft":
        collector.score(runner, model.collector)


def tell_front_end(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """After `Scheduler.get_init_info`, which goes to the front end: what this process serves."""
    if _masked is not None and _masked.collector is not None and _masked.collector.sampler is not None:
        _masked.collector.sampler.warm_up()  # nothing runs yet
    return info if _masked is None else {**info, CONFIG_KEY: _masked.status()}


def answer(original: Callable[..., Any], scheduler: Any, request: Any) -> None:
    """Around `Scheduler.handle_dumper_control`: the control API's calls, between two steps, on every rank."""
    if not request.method.startswith(CARRIER):
        original(scheduler, request)
        return
    try:
        found, refusal = _answer(scheduler, request.method.removeprefix(CARRIER), request.body), None
    except Exception as error:  # anything that is raised here would end the server
        found, refusal = None, ControlError.of(error)
        if refusal.status == 500:
            logger.exception("softprune: %s failed", request.method)
    response = {"answer": found} if refusal is None else {"refused": refusal.answer}
    reply = seams.DUMPER_ANSWER.resolve()(success=refusal is None, response=[response], error="" if refusal is None else str(refusal))
    seams.attribute(scheduler, "ipc_channels.send_to_tokenizer", seams.HANDLE_DUMPER_CONTROL.name).send_output(reply, request)


def _answer(scheduler: Any, what: str, arguments: dict[str, Any]) -> Any:
    """What a call of the control API is answered.

    Raises:
        ControlError: it is refused.
    """
    live = live_scheduler.live()
    model, epochs = live.model, live.epochs
    of_this_process: dict[str, Callable[..., Any]] = {
        "switch": partial(live.switch, scheduler), "switched": live.outcome, "scheduler.status": live.status,
        "scheduler.request": epochs.of, "scheduler.tokens": lambda: epochs.tokens,
    }  # fmt: skip
    if what in of_this_process:
        return of_this_process[what](**arguments)
    of_all: dict[str, Callable[..., Any]] = {
        "status": model.status, "mask_text": model.mask_text, "verified": model.verified, "routes": model.routes,
        "statistics": model.statistics,
    }  # fmt: skip
    if what not in of_all:
        raise ControlError(404, "not_found", f"no call {what!r}")
    with live_scheduler.on_model_stream(scheduler):
        mine = of_all[what](**arguments)
    return live_scheduler.from_all_ranks(scheduler, mine)


def refused_update(name: str) -> Callable[..., Any]:
    """A hook that answers a call that would change the weights with its refusal."""

    def refuse(original: Callable[..., Any], manager: Any, request: Any) -> Any:
        if _masked is None:
            return original(manager, request)
        message = undoing(name)
        logger.error("softprune: %s", message)
        return seams.answer_to(request)(success=False, message=message)

    return refuse


def refused_call(name: str) -> Callable[..., Any]:
    """A hook that raises, for calls whose callers report exceptions; in the front end as well as in a scheduler process."""

    def refuse(original: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        if _masked is not None or _front_end_is_masked(owner):
            raise RefusedError(undoing(name))
        return original(owner, *args, **kwargs)

    return refuse


def _front_end_is_masked(owner: Any) -> bool:
    return launch_in(getattr(getattr(owner, "server_args", None), OVERRIDES, "")) is not None


def _counting(probe: RouteProbe, position: int, top_k: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        ids = routers.selected_ids(output, top_k)
        if ids is None:
            probe.record_logits(position, inputs[1], top_k)
        else:
            probe.record_ids(position, ids)

    return hook
