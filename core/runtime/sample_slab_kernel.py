"""`SampleSlab.take` as one Triton kernel: a program copies one row of one layer, or ends at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from softprune.runtime.sample_slab import SampleSlab


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _take(
    hidden, logits, kept_hidden, kept_logits, source, target, num_rows, stride_hidden, stride_logits,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS_BLOCK: tl.constexpr,
):  # fmt: skip
    move = tl.program_id(0)
    row, place = tl.load(source + move), tl.load(target + move)
    if (place >= 0) & (row < num_rows):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(hidden + row.to(tl.int64) * stride_hidden + columns, mask=columns < WIDTH)
        tl.store(kept_hidden + place.to(tl.int64) * WIDTH + columns, values, mask=columns < WIDTH)
        if tl.program_id(1) == 0:
            experts = tl.arange(0, EXPERTS_BLOCK)
            scores = tl.load(logits + row.to(tl.int64) * stride_logits + experts, mask=experts < EXPERTS)
            tl.store(kept_logits + place.to(tl.int64) * EXPERTS + experts, scores, mask=experts < EXPERTS)


def take(slab: SampleSlab, layer: int, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    """Launch it; in a captured graph, over as many rows as the graph's steps can keep."""
    source, target = slab.moves
    width, experts, block = slab.hidden.shape[-1], slab.logits.shape[-1], 1024
    _take[(min(len(hidden), len(source)), triton.cdiv(width, block))](
        hidden, logits, slab.hidden[layer], slab.logits[layer], source, target, len(hidden), hidden.stride(0), logits.stride(0),
        WIDTH=width, EXPERTS=experts, BLOCK=block, EXPERTS_BLOCK=triton.next_power_of_2(experts),
    )  # fmt: skip
