"""What a Transformers gpt-oss selects, and how it does under a mask."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.checkpoint.families import ModelSpec
from softprune.mask import ExpertMask, MaskModel
from softprune.runtime.router_mask import Router


def router_modules(model: Any) -> dict[str, Any]:
    """The routers' modules by name, in layer order."""
    return {name: module for name, module in model.named_modules() if name.endswith(".mlp.router")}


def routers(model: Any) -> list[Router]:
    """A model's routers as `RouterMask` takes them."""

    def logits_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        # It answers with (logits, gates of the chosen, the chosen).
        return lambda hidden: module(hidden)[0]

    return [Router(name, module.bias, logits_of(module)) for name, module in router_modules(model).items()]


@dataclass
class Selections:
    """What every router chose, pass after pass.

    Attributes:
        passes: per layer int16 arrays [tokens, top_k], one a pass.
    """

    passes: list[list[NDArray[np.int16]]] = field(default_factory=list)

    def histogram(self, num_experts: int, keep: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Selections [num_layers, num_experts], of all tokens or of those kept.

        Args:
            num_experts: experts in a layer.
            keep: bool with one entry a token, in the order in which they were run.
        """
        layers = [np.concatenate(layer) for layer in self.passes]
        if keep is not None:
            layers = [layer[keep.reshape(-1)] for layer in layers]
        return np.stack([np.bincount(layer.reshape(-1), minlength=num_experts) for layer in layers])


@contextmanager
def recorded(model: Any) -> Iterator[Selections]:
    """Record what the routers choose inside the block."""
    modules = router_modules(model)
    selections = Selections([[] for _ in modules])

    def hook(layer: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            selections.passes[layer].append(output[2].cpu().numpy().astype(np.int16))

        return keep

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(modules.values())]
    try:
        yield selections
    finally:
        for handle in handles:
            handle.remove()


def random_mask(spec: ModelSpec, num_kept: int, seed: int) -> ExpertMask:
    """A mask that keeps `num_kept` experts of each layer, drawn anew for each."""
    rng = random.Random(f"softprune.tiny/{seed}")
    model = MaskModel.of(spec)
    keep: list[list[int] | None] = [sorted(rng.sample(range(spec.num_experts), num_kept)) for _ in range(spec.num_layers)]
    return ExpertMask(model=model, keep=keep, provenance={"method": "random", "seed": seed})
