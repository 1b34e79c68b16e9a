"""Tiles of OpenAI's Triton kernels for MXFP4 experts, chosen for the experts that a mask keeps.

Both engines bring these kernels (triton_kernels 3.5 in vLLM, 3.6 in SGLang). How many rows their tiles have follows from the tokens of an
expert, which they take for a step's tokens over all experts that the weights have. Under a mask the kept ones have more, and a tile that
is too small reads an expert's weights more than once. They let themselves be told: `RoutingData.expected_tokens_per_expt`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch

_MODULE = "triton_kernels.matmul_ogs"
_MEASURED = 9
"""Major compute capability (Hopper) that `rows_of_tile` was measured on; on others the kernels choose by rules of their own."""
LEAST, MOST_IN_DECODING, MOST = 16, 64, 128
_SPREAD = 1.2
"""Experts that have more than their share are to fit into one tile as well; any factor from 1.1 to 1.3 is as good."""


def rows_of_tile(tokens: float) -> int:
    """Rows of the fastest tile, as measured on H200s with both generations of the kernels (bench/results/tiles_gpu.json).

    Args:
        tokens: of an expert in a step, mean over the experts kept.
    """
    if tokens > MOST_IN_DECODING:
        return MOST
    tile = LEAST
    while tile < MOST_IN_DECODING and tile < _SPREAD * tokens:
        tile *= 2
    return tile


def told(tile: int, doubles: bool) -> int:
    """Tokens per expert that make the kernels choose this tile.

    Args:
        tile: of `rows_of_tile`.
        doubles: whether they double up to 64 (triton_kernels 3.6), or take the next power of two as it is (3.5).
    """
    return tile // 2 if doubles and tile <= MOST_IN_DECODING else tile


def fit_tiles(kept: float, num_experts: int) -> bool:
    """Have this process's kernels choose tiles for so many experts, from now on; before any graph is captured.

    Args:
        kept: experts of a layer that the mask keeps, mean over layers.
        num_experts: experts of a layer.

    Returns:
        False where there are none of these kernels, or not on a GPU that they were measured on; then nothing changes.
    """
    module: Any = sys.modules.get(_MODULE)
    if module is None or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != _MEASURED:
        return False
    choose, doubles = module.make_opt_flags, not hasattr(module, "reduce_grouped")
    names = list(inspect.signature(choose).parameters)
    if not {"m", "routing_data"} <= set(names):
        return False
    gates, routing = names.index("m"), names.index("routing_data")

    @functools.wraps(choose)
    def make_opt_flags(*args: Any, **kwargs: Any) -> Any:
        data = args[routing] if len(args) > routing else None
        # Not of other uses of the kernels, nor where the engine knows better.
        if data is not None and data.expt_hist is not None and data.n_expts_tot == num_experts and data.expected_tokens_per_expt is None:
            data.expected_tokens_per_expt = told(rows_of_tile(args[gates] / kept), doubles)
        return choose(*args, **kwargs)

    module.make_opt_flags = make_opt_flags
    return True
