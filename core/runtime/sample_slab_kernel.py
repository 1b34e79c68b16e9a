"""`SampleSlab.take` as one Triton kernel: a program copies one row of one layer, or ends at once; some copy a block of logits besides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from softprune.runtime.sample_slab import SampleSlab

BLOCK = 1024
COPY_ROWS = 32


@triton.jit(do_not_specialize=["num_rows", "num_moves", "num_copied"])  # type: ignore[untyped-decorator]
def _take(
    hidden, logits, kept_hidden, kept_logits, source, target, num_rows, num_moves, stride_hidden, stride_logits, copy_to, num_copied,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, EXPERTS_BLOCK)
    if program < num_moves:
        row, place = tl.load(source + program), tl.load(target + program)
        if (place >= 0) & (row < num_rows):
            columns = part * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(hidden + row.to(tl.int64) * stride_hidden + columns, mask=columns < WIDTH)
            tl.store(kept_hidden + place.to(tl.int64) * WIDTH + columns, values, mask=columns < WIDTH)
            if part == 0:
                scores = tl.load(logits + row.to(tl.int64) * stride_logits + experts, mask=experts < EXPERTS)
                tl.store(kept_logits + place.to(tl.int64) * EXPERTS + experts, scores, mask=experts < EXPERTS)
    if (part == 0) & (program * ROWS < num_copied):
        rows = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there = (rows < num_copied)[:, None] & (experts < EXPERTS)[None, :]
        block = tl.load(logits + rows[:, None] * stride_logits + experts[None, :], mask=there)
        tl.store(copy_to + rows[:, None] * EXPERTS + experts[None, :], block, mask=there)


def take(slab: SampleSlab, layer: int, hidden: torch.Tensor, logits: torch.Tensor, copy_to: torch.Tensor | None = None) -> None:
    """Launch it; in a captured graph, over as many rows as the graph's steps can keep."""
    source, target = slab.moves
    width, experts = slab.hidden.shape[-1], slab.logits.shape[-1]
    moves, copied = min(len(hidden), len(source)), 0 if copy_to is None else len(copy_to)
    _take[(max(moves, triton.cdiv(copied, COPY_ROWS)), triton.cdiv(width, BLOCK))](
        hidden, logits, slab.hidden[layer], slab.logits[layer], source, target, len(hidden), moves, hidden.stride(0), logits.stride(0),
        slab.logits if copy_to is None else copy_to, copied,
        WIDTH=width, EXPERTS=experts, BLOCK=BLOCK, EXPERTS_BLOCK=triton.next_power_of_2(experts), ROWS=COPY_ROWS,
    )  # fmt: skip
