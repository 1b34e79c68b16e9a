"""Tiles of OpenAI's Triton kernels for MXFP4 experts, chosen for the experts that a mask keeps.

Both engines bring these kernels (triton_kernels 3.5 in vLLM, 3.6 in SGLang). How many rows their tiles have follows from the tokens of an
expert, which they take for a step's tokens over all experts that the weights have. Under a mask the kept ones have more, and a tile that
is too small reads an expert's weights more than once. They let themselves be told: `RoutingData.expected_tokens_per_expt`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from typing import Any

import torch

from softprune.runtime.gated_outputs import MODULE

_MEASURED = 9
"""Major compute capability (Hopper) that `rows_of_tile` was measured on; on others the kernels choose by rules of their own."""
_SPREAD = 1.2
"""Experts that have more than their share are to fit into one tile as well. Of what was measured, 1.1 to 1.3 choose the same."""


def rows_of_tile(tokens: float, own: int = 16) -> int:
    """Rows of the fastest tile, as measured on H200s with both generations of the kernels (bench/results/tiles_gpu.json).

    Args:
        tokens: of an expert in a step, mean over the experts kept.
        own: the kernels' choice, a power of two from 16 to 128; it is never smaller.
    """
    if tokens > 64:
        return 128
    tile = own
    while tile < 64 and tile < _SPREAD * tokens:
        tile *= 2
    return tile


def fit_tiles(kept: float | None, num_experts: int) -> bool:
    """Have this process's kernels choose tiles for so many experts, from now on; before any graph is captured.

    Where they do not take what they are told, they choose as they did.

    Args:
        kept: experts of a layer that the mask keeps, mean over layers; None leaves the kernels as they came.
        num_experts: experts of a layer.

    Returns:
        Whether they do; False where there are none of these kernels, or not on a GPU that they were measured on.
    """
    module: Any = sys.modules.get(MODULE)
    if module is None:
        return False
    choose = module.make_opt_flags = getattr(module.make_opt_flags, "_of_engine", module.make_opt_flags)
    names = list(inspect.signature(choose).parameters)
    if kept is None or not {"m", "routing_data"} <= set(names):
        return False
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != _MEASURED:
        return False
    gates, routing = names.index("m"), names.index("routing_data")
    told: dict[int, int | None] = {}

    def telling(args: tuple[Any, ...], tokens: int) -> tuple[Any, ...]:
        # A copy: the engine's own goes on to the kernels, which are compiled anew for it.
        return (*args[:routing], dataclasses.replace(args[routing], expected_tokens_per_expt=tokens), *args[routing + 1 :])

    @functools.wraps(choose)
    def make_opt_flags(*args: Any, **kwargs: Any) -> Any:
        data = args[routing] if len(args) > routing else None
        # Not of other uses of the kernels, nor where the engine knows better.
        if data is None or data.expt_hist is None or data.n_expts_tot != num_experts or data.expected_tokens_per_expt is not None:
            return choose(*args, **kwargs)
        m = args[gates]
        if m not in told:
            own = choose(*args, **kwargs).block_m
            tile = rows_of_tile(m / kept, own)
            # One generation takes the next power of two of what it is told, the other of twice as much.
            tries = (tile, tile // 2) if tile != own else ()
            told[m] = next((tokens for tokens in tries if choose(*telling(args, tokens), **kwargs).block_m == tile), None)
        tokens = told[m]
        return choose(*args, **kwargs) if tokens is None else choose(*telling(args, tokens), **kwargs)

    make_opt_flags._of_engine = choose  # type: ignore[attr-defined]
    module.make_opt_flags = make_opt_flags
    return True
