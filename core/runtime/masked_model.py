"""One process's model under the mask that it was launched with: what both engines hold in every worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from softprune.checkpoint.families import ModelSpec
from softprune.checkpoint.fingerprint import fingerprint
from softprune.errors import RefusedError
from softprune.launch import Launch
from softprune.runtime.route_probe import RouteProbe
from softprune.runtime.router_mask import Router, RouterMask

RouterWeights = tuple[torch.Tensor, torch.Tensor | None]
"""(weight [num_experts, hidden], bias [num_experts] or None) of one router, as loaded."""


class MaskedModel:
    """A model's routers, the mask in force on them, and what can be said of both.

    Attributes:
        launch: what was asked for.
        spec: the model's shape, with its own top_k.
        fingerprint: of the routers as loaded.
        routers: the routers and the mask in force.
        backend: the MoE backend in use, once the extension has found it proven.
        probe: counts what the routers select, with `launch.debug_routes`.
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
        self.launch, self.spec, self.backend = launch, spec, ""
        self.fingerprint = fingerprint(spec, loaded)
        self._hidden, self._dtype = loaded[0][0].shape[1], loaded[0][0].dtype
        self.routers = RouterMask(routers)
        self.probe: RouteProbe | None = None
        if mask is not None:
            warning = mask.check_fingerprint(self.fingerprint, str(launch.expert_mask), launch.expert_mask_force)
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
        return f"softprune: {self.spec.num_layers} MoE layers, {kept}, top_k {self.launch.top_k}"

    def verify(self) -> None:
        """Run every router once as the engine does and see that it obeys.

        Raises:
            RefusedError: it does not.
        """
        self.routers.verify(self._hidden, self._dtype)

    def add_probe(self) -> RouteProbe:
        """Counters for the routers' selections; the extension connects them."""
        self.probe = RouteProbe(self.spec.num_layers, self.spec.num_experts, self.device)
        return self.probe

    def status(self) -> dict[str, Any]:
        """What this process serves; JSON-ready."""
        mask = self.routers.mask
        return {
            "mask": None if mask is None else {"hash": mask.hash, "num_kept": mask.num_kept},
            "top_k": self.launch.top_k,
            "fingerprint": self.fingerprint,
            "moe_backend": self.backend,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }

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
