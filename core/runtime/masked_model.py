"""One process's model under the mask that it was launched with: what both engines hold in every worker."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from softprune.checkpoint.families import ModelSpec
from softprune.checkpoint.fingerprint import fingerprint
from softprune.control import BODY, ControlError, check_top_k
from softprune.errors import RefusedError
from softprune.launch import Launch
from softprune.mask import ExpertMask
from softprune.runtime.collector import Collector
from softprune.runtime.expert_norms import Experts
from softprune.runtime.route_probe import RouteProbe
from softprune.runtime.router_mask import Router, RouterMask
from softprune.runtime.tiles import fit_tiles

RouterWeights = tuple[torch.Tensor, torch.Tensor | None]
"""(weight [num_experts, hidden], bias [num_experts] or None) of one router, as loaded."""


class MaskedModel:
    """A model's routers, the mask in force on them, and what can be said of both.

    Attributes:
        launch: what was asked for.
        spec: the model's shape, with its own top_k.
        fingerprint: of the routers as loaded.
        hidden_size: width of the routers' input.
        routers: the routers and the mask in force.
        backend: the MoE backend in use, once the extension has found it proven.
        tiles: who chooses its kernels' tiles: "mask", for what that of the start keeps, or "engine"; "" before `fit_kernels`.
        probe: counts what the routers select, with `launch.debug_routes`.
        collector: of statistics, with `launch.stats`, in the one process that collects them.
    """

    def __init__(
        self, launch: Launch, spec: ModelSpec, loaded: Sequence[RouterWeights], routers: Sequence[Router], log: logging.Logger
    ) -> None:
        """Compare fingerprints, remember the biases as loaded, and put the mask in force.

        Args:
            launch, spec: see above.
            loaded: the routers' weights in layer order.
            routers: the same routers, with a bias that can be masked.
            log: the engine's logger.

        Raises:
            MaskError: the mask cannot be read any more, or was made for other weights.
        """
        mask = launch.read_mask(spec)
        self.launch, self.spec, self.backend, self.tiles, self._log = launch, spec, "", "", log
        self.fingerprint = fingerprint(spec, loaded)
        self.hidden_size, self._dtype = loaded[0][0].shape[1], loaded[0][0].dtype
        self.routers = RouterMask(routers)
        self.probe: RouteProbe | None = None
        self.collector: Collector | None = None
        if mask is not None:
            warning = mask.check_fingerprint(self.fingerprint, launch.mask_source, launch.expert_mask_force)
            if warning:
                log.warning("softprune: %s", warning)
            self.routers.apply(mask)

    @property
    def device(self) -> torch.device:
        """Where the routers lie."""
        return self.routers.routers[0].bias.device

    @property
    def summary(self) -> str:
        """One line for the log."""
        mask = self.routers.mask
        kept = "all experts" if mask is None else mask.summary
        return f"softprune: {self.spec.num_layers} MoE layers, {kept}, top_k {self.launch.top_k} ({self.launch.mask_source})"

    def verify(self) -> None:
        """Run every router once as the engine does and see that it obeys.

        Raises:
            RefusedError: it does not.
        """
        with self._probe_off():
            self.routers.verify(self.hidden_size, self._dtype)

    def fit_kernels(self, are_triton: bool) -> None:
        """Under the mask of the start, if it prunes: have the experts' kernels choose tiles for what it keeps, before graphs are captured.

        A live switch does not change them: graphs hold the kernels that they were captured with, and others would be compiled in serving.

        Args:
            are_triton: whether the experts run in OpenAI's Triton kernels; others choose their tiles otherwise.
        """
        mask, num_experts = self.routers.mask, self.spec.num_experts
        kept = num_experts if mask is None or not are_triton else statistics.fmean(mask.num_kept)
        self.tiles = "mask" if fit_tiles(kept if kept < num_experts else None, num_experts) else "engine"
        if kept < num_experts:
            how = "for it" if self.tiles == "mask" else "as without a mask: another choice was measured on Hopper GPUs only"
            self._log.info("softprune: the mask keeps %g of %d experts; their kernels choose tiles %s", kept, num_experts, how)

    @contextmanager
    def _probe_off(self) -> Iterator[None]:
        """Routers that run within the block select nothing that the engine does."""
        if self.probe is not None:
            self.probe.enabled = False
        try:
            yield
        finally:
            if self.probe is not None:
                self.probe.enabled = True

    def add_probe(self) -> RouteProbe:
        """Counters for the routers' selections; the extension connects them."""
        self.probe = RouteProbe(self.spec.num_layers, self.spec.num_experts, self.device)
        return self.probe

    def add_collector(self, max_rows: int, engine: str) -> Collector:
        """Room for statistics; the extension connects it to the routers.

        Args:
            max_rows: tokens in a step at most.
            engine: its name and version.

        Raises:
            RefusedError: the kernel cannot take so many experts.
        """
        self.collector = Collector(
            self.spec, self.fingerprint, self.launch.top_k, self.routers.mask, self.launch.num_tags, max_rows, self.device, self._dtype,
            engine, self._log, self.launch.stats or "router", self.hidden_size,
        )  # fmt: skip
        return self.collector

    def connect_experts(self, experts: Experts, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Where more than router statistics are collected: what runs the engine's experts, for their norms.

        Args:
            experts: the engine's.
            context: that they and the routers are to be called in.
        """
        if self.collector is None or self.collector.sampler is None:
            return
        routers = self.routers

        def run(layer: int, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            with context():
                return experts(layer, hidden, ids, gates)

        def route(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            with context(), self._probe_off():
                return routers.routers[layer].forward(hidden)

        self.collector.connect(run, route, routers.unmasked)

    def stage(self, text: str | None) -> dict[str, Any] | None:
        """First half of a live switch: check a mask and compute the biases under it. Nothing changes yet.

        Never raises: an exception in one of several processes would leave an engine's others waiting.

        Args:
            text: of a mask file; None for no mask.

        Returns:
            None if this process can put it in force, else `ControlError.answer`.
        """
        try:
            mask = None
            if text is not None:
                mask = ExpertMask.parse(json.loads(text), BODY)
                mask.check_model(self.spec, BODY)
                warning = mask.check_fingerprint(self.fingerprint, BODY, self.launch.expert_mask_force)
                if warning:
                    self._log.warning("softprune: %s", warning)
                check_top_k(mask, self.launch.top_k)
            self.routers.stage(mask)
        except Exception as error:  # noqa: BLE001 - see above
            return ControlError.of(error).answer
        return None

    def commit(self) -> dict[str, Any]:
        """Second half: put it in force, on the stream that runs the model. Returns the new `status`.

        What may fail comes before, or ends no more than the statistics: a mask that is in force while others believe in the one before
        would have its KV cached under that one's name.
        """
        if self.probe is not None:
            self.probe.begin_epoch()
        self.routers.commit()
        mask = self.routers.mask
        if self.collector is not None:
            self.collector.begin_epoch(mask)
        self._log.info("softprune: live switch to %s", "all experts" if mask is None else f"{mask.summary}, mask {mask.hash[:19]}…")
        return self.status()

    def drop(self) -> None:
        """Instead of the second half, where another process refused."""
        self.routers.drop()

    def mask_text(self) -> str | None:
        """The mask in force, as a mask file; None if there is none."""
        return None if self.routers.mask is None else self.routers.mask.dump()

    def verified(self) -> dict[str, Any] | None:
        """`verify` on a running engine: None, or `ControlError.answer`."""
        try:
            self.verify()
        except Exception as error:  # noqa: BLE001 - as in `stage`
            return ControlError.of(error).answer
        return None

    def status(self) -> dict[str, Any]:
        """What this process serves; JSON-ready."""
        mask = self.routers.mask
        return {
            "mask": None if mask is None else {"hash": mask.hash, "num_kept": mask.num_kept},
            "architecture": self.spec.architecture,
            "model_top_k": self.spec.top_k,
            "num_layers": self.spec.num_layers,
            "num_experts": self.spec.num_experts,
            "top_k": self.launch.top_k,
            "fingerprint": self.fingerprint,
            "moe_backend": self.backend,
            "moe_tiles": self.tiles,
            "statistics": None if self.collector is None else self.collector.status(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }

    def statistics(self, action: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """A call of `Collector.call`. Never raises, as `stage`.

        Returns:
            {"answer": …} or {"refused": `ControlError.answer`}; None in a process that does not collect.
        """
        if self.collector is None:
            return None
        try:
            return {"answer": self.collector.call(action, **arguments)}
        except Exception as error:  # noqa: BLE001 - as in `stage`
            known = ControlError.of(error)
            if known.status == 500:
                self._log.exception("softprune: statistics: %s failed", action)
            return {"refused": known.answer}

    def routes(self, reset: bool = False, trace: bool = False) -> dict[str, Any]:
        """What the route probe counted; see `RouteProbe.snapshot`.

        Raises:
            RefusedError: the probe is off.
        """
        if self.probe is None:
            raise RefusedError("the route probe is off; start the server with --softprune-debug-routes")
        snapshot = self.probe.snapshot(trace)
        if reset:
            self.probe.reset()
        return snapshot
