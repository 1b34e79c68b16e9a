"""vLLM's worker with masked routers.

`ParallelConfig.worker_cls` names one of these classes, so vLLM itself makes sure that every worker
process has one. What vLLM does to the weights afterwards is either followed by the mask before the
next step, or refused.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from vllm.v1.worker.gpu_worker import Worker

from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.errors import RefusedError, SeamError
from softprune.proven import only, undoing
from softprune.runtime.masked_model import MaskedModel
from softprune.runtime.route_probe import RouteProbe
from softprune.vllm_ext import collector, experts, proven, routers, seams
from softprune.vllm_ext.flags import launch_of

logger = logging.getLogger("vllm.softprune")


class ExpertMaskWorker:
    """Mixed into vLLM's workers; holds this process's routers."""

    vllm_config: Any
    model_runner: Any
    rank: int
    _masked: MaskedModel | None = None
    _steps: collector.Steps | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, mask its routers before its weights are packed, and see that they obey."""
        seams.check(seams.WORKER)
        if not seams.is_known():
            logger.warning("softprune: %s is not among the versions it was read with: %s", seams.engine(), ", ".join(seams.KNOWN_VERSIONS))
        self._launch = launch_of(self.vllm_config)
        self._spec = self._launch.spec(self.vllm_config.model_config.hf_config)
        with _before_weights_are_processed(self._mask_routers):
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        model = self._model()
        model.backend = self._proven_backend()
        model.fit_kernels(model.backend in proven.TRITON_KERNELS)
        self._verify()
        if self._launch.debug_routes:
            self._attach_probe(model.add_probe())
        if self._launch.stats is not None and self.rank == 0:
            collecting = model.add_collector(collector.max_rows(self.vllm_config), seams.engine())
            collector.attach(self._layers, collecting)
            self._steps = collector.Steps(collecting, collector.captured_rows(self.vllm_config))
            if collecting.sampler is not None:
                self._connect_sampler(model)
        logger.info("%s", model.summary)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Warm up; where statistics are asked for, with a step on every rank that shows whether each router's logits are seen."""
        result = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        if self._launch.stats is not None:
            self.execute_dummy_batch()  # type: ignore[attr-defined]
        collecting = self._model().collector
        if collecting is not None and collecting.sampler is not None:
            collecting.sampler.warm_up()
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """A step; what it had is added to the statistics behind it."""
        if self._steps is not None:
            self._steps.begin(scheduler_output)
        result = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self._steps is not None:
            self._steps.launched(self.model_runner, scheduler_output)
        return result

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload from a checkpoint folder, and mask again before the next step.

        Raises:
            RefusedError: weights come from elsewhere, or are not those that the mask was made for; nothing changes.
            MaskError: the checkpoint's fingerprint is not the mask's.
        """
        unknown = {key for key, value in kwargs.items() if value is not None} - {"weights_path", "is_checkpoint_format"}
        if args or unknown or not kwargs.get("is_checkpoint_format", True):
            raise RefusedError(
                "reload_weights: with an expert mask in force, weights are reloaded from a checkpoint folder only (weights_path)"
            )
        path = kwargs.get("weights_path") or self.vllm_config.model_config.model
        if not Path(path).is_dir():
            raise RefusedError(f"reload_weights: found {path}; expected a checkpoint folder, whose routers can be compared with the mask's")
        model = self._model()
        state, mask = model.routers, model.routers.mask
        incoming = fingerprint_of_checkpoint(path)
        if model.collector is not None and incoming != model.fingerprint:
            raise RefusedError(f"reload_weights: {path} has other routers than those that --softprune-stats collects of")
        if mask is not None and incoming != model.fingerprint:
            mask.check_fingerprint(incoming, self._launch.mask_source)
            if mask.model.fingerprint is None:
                raise RefusedError(f"reload_weights: {path} has other routers than those loaded, and the mask names no fingerprint")
        state.apply(None)
        try:
            with routers.as_built(self._layers):
                super().reload_weights(*args, **kwargs)  # type: ignore[misc]
            state.remember()
            state.apply(mask)
            self._verify()
            model.fingerprint = incoming
        except BaseException:
            # The routers are in no known state now. Nothing may be computed with them.
            self.execute_model = self._refuse_to_serve  # type: ignore[method-assign]
            raise

    def softprune_status(self) -> dict[str, Any]:
        """What this process serves; JSON-ready."""
        return self._model().status()

    def softprune_stage(self, text: str | None, nonce: int) -> dict[str, Any]:
        """First half of a live switch: "refused" is None, or why this process cannot put the mask in force; "nonce" as given."""
        return {"refused": self._model().stage(text), "nonce": nonce}

    def softprune_commit(self) -> dict[str, Any]:
        """Second half: steps launched from now on run under the new mask."""
        return self._model().commit()

    def softprune_drop(self) -> None:
        """Instead of the second half."""
        self._model().drop()

    def softprune_mask_text(self) -> str | None:
        """The mask in force, as a mask file."""
        return self._model().mask_text()

    def softprune_verified(self) -> dict[str, Any] | None:
        """Run every router once: None, or how one does not obey."""
        with _engine_context(self.vllm_config):
            return self._model().verified()

    def softprune_routes(self, reset: bool = False, trace: bool = False) -> dict[str, Any]:
        """Counts of the route probe."""
        return self._model().routes(reset, trace)

    def softprune_statistics(self, action: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Start, stop, reset or hand out statistics."""
        return self._model().statistics(action, arguments)

    def _mask_routers(self, model: nn.Module) -> None:
        """Find the routers and put the mask in force."""
        self._layers = routers.find(model, self._spec)
        loaded = [routers.weights(layer, self._spec) for layer in self._layers]
        attached = [routers.attach(layer, self._spec) for layer in self._layers]
        self._masked = MaskedModel(self._launch, self._spec, loaded, attached, logger)

    def _connect_sampler(self, model: MaskedModel) -> None:
        """Where more than router statistics are collected: experts that can be run, and tokens that are scored."""
        world = self.vllm_config.parallel_config.world_size
        if world != 1:
            raise RefusedError(f"--softprune-stats {self._launch.stats}: found {world} processes; expected one, which has whole experts")
        if seams.platform() == "cpu" and not self.vllm_config.model_config.enforce_eager:
            # There, vLLM's compiler looks into the op that the hook stands in.
            raise RefusedError(f"--softprune-stats {self._launch.stats}: found a compiled model on a CPU; expected --enforce-eager")
        seams.check(seams.EXPERTS)
        model.connect_experts(experts.experts_of(self._layers, model.hidden_size), partial(_engine_context, self.vllm_config))
        if self._launch.stats == "eaft" and self._steps is not None:
            self._steps.score(self.model_runner)

    def _model(self) -> MaskedModel:
        if self._masked is None:
            raise SeamError(seams.PROCESS_WEIGHTS.name, seams.engine(), "the model loader in use never called it")
        return self._masked

    def _proven_backend(self) -> str:
        """See that the MoE backend is proven, and that the engine runs with the top_k that was asked for."""
        backend = only({routers.backend_of(layer.block.experts) for layer in self._layers})
        proven.check_backend(seams.platform(), self._spec.architecture, backend, self._launch.top_k)
        for layer in self._layers:
            router = seams.attribute(layer.block.experts, "router", seams.MOE_RUNNER.name)
            proven.check_router(layer.name, router, self._launch.top_k)
        return backend

    def _verify(self) -> None:
        with _engine_context(self.vllm_config):
            self._model().verify()

    def _attach_probe(self, probe: RouteProbe) -> None:
        """Count what the engine selects; where its kernel selects in secret, what the logits imply."""
        for position, layer in enumerate(self._layers):
            if layer.block.experts.routed_experts.quant_method.is_monolithic:
                layer.gate.register_forward_hook(_logits_hook(probe, position, self._launch.top_k))
            else:
                layer.block.experts.router.select_experts = _counting(layer.block.experts.router.select_experts, probe, position)

    def _refuse_to_serve(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RefusedError("a weight reload failed under an expert mask; this worker serves no more")


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise RefusedError(undoing(name))

    return refuse


for _name in seams.REFUSED_CALLS:
    setattr(ExpertMaskWorker, _name, _refused(_name))


class ExpertMaskGPUWorker(ExpertMaskWorker, Worker):
    """vLLM's GPU worker, masked."""


def __getattr__(name: str) -> Any:
    # vLLM's CPU worker can be imported on CPU builds only, so the class is made when it is asked for.
    if name == "ExpertMaskCPUWorker":
        return _cpu_worker()
    raise AttributeError(name)


@functools.cache
def _cpu_worker() -> type:
    from vllm.v1.worker.cpu_worker import CPUWorker

    return type("ExpertMaskCPUWorker", (ExpertMaskWorker, CPUWorker), {"__doc__": "vLLM's CPU worker, masked.", "__module__": __name__})


WORKERS = {
    seams.GPU_WORKER: f"{__name__}.ExpertMaskGPUWorker",
    seams.CPU_WORKER: f"{__name__}.ExpertMaskCPUWorker",
}
"""vLLM's worker classes that have been proven, and what takes their place."""


@contextmanager
def _before_weights_are_processed(act: Callable[[nn.Module], None]) -> Iterator[None]:
    """Run `act` on the model when its weights are loaded but not yet packed for the kernels.

    Some kernels copy the bias when they pack, and some free the weight; before that, both are plain tensors.
    """
    original = seams.PROCESS_WEIGHTS.resolve()
    module: Any = importlib.import_module(seams.PROCESS_WEIGHTS.target.partition(":")[0])

    @functools.wraps(original)
    def process(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        act(model)
        return original(model, *args, **kwargs)

    module.process_weights_after_loading = process
    try:
        yield
    finally:
        module.process_weights_after_loading = original


def _engine_context(vllm_config: Any) -> Any:
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(vllm_config)


def _counting(select: Callable[..., Any], probe: RouteProbe, position: int) -> Callable[..., Any]:
    @functools.wraps(select)
    def counted(*args: Any, **kwargs: Any) -> Any:
        weights, ids = select(*args, **kwargs)
        probe.record_ids(position, ids)
        return weights, ids

    return counted


def _logits_hook(probe: RouteProbe, position: int, top_k: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        probe.record_logits(position, routers.logits_of(output), top_k)

    return hook
