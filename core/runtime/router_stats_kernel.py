"""`RouterStats.add` as one Triton kernel: a program adds up a block of rows of one layer in registers, and the sums with atomics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    from softprune.runtime.router_stats import RouterStats

BLOCK_ROWS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _add(
    slab, cells, num_rows, count, gates, confidence, coactivation, stride_layer, stride_row, num_layers,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, CELLS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS)
    counted = rows < tl.load(num_rows)
    cell = tl.load(cells + rows, mask=counted, other=-1)
    counted = counted & (cell >= 0)
    if tl.sum(counted.to(tl.int32)) > 0:
        at = slab + layer.to(tl.int64) * stride_layer + rows[:, None] * stride_row + experts[None, :]
        logits = tl.load(at, mask=counted[:, None], other=0.0).to(tl.float32)

        left = logits
        chosen = tl.zeros((ROWS, EXPERTS), dtype=tl.int32)
        largest = tl.max(logits, axis=1)
        for _ in tl.static_range(TOP_K):
            best = tl.argmax(left, axis=1, tie_break_left=True)
            taken = experts[None, :] == best[:, None]
            chosen += taken.to(tl.int32)
            left = tl.where(taken, float("-inf"), left)
        weights = tl.where(chosen > 0, tl.exp(logits - largest[:, None]), 0.0)
        gate = weights / tl.sum(weights, axis=1)[:, None]
        units = (gate.to(tl.float64) * 4294967296.0 + 0.5).to(tl.int64)
        top = tl.minimum((tl.max(gate, axis=1) * BINS).to(tl.int32), BINS - 1)
        in_bin = tl.arange(0, BINS)[None, :] == top[:, None]

        for one in range(CELLS):
            mine = counted & (cell == one)
            if tl.sum(mine.to(tl.int32)) > 0:
                base = (one * num_layers + layer).to(tl.int64)
                selected = tl.where(mine[:, None], chosen, 0)
                counts = tl.sum(selected, axis=0)
                tl.atomic_add(count + base * EXPERTS + experts, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
                sums = tl.sum(tl.where(mine[:, None], units, 0), axis=0)
                tl.atomic_add(gates + base * EXPERTS + experts, sums, mask=counts > 0, sem="relaxed")
                tokens = tl.sum((in_bin & mine[:, None]).to(tl.int32), axis=0)
                tl.atomic_add(confidence + base * BINS + tl.arange(0, BINS), tokens.to(tl.int64), mask=tokens > 0, sem="relaxed")
                matrix = selected.to(tl.float16)
                pairs = tl.dot(tl.trans(matrix), matrix).to(tl.int64)  # whole numbers up to ROWS: exact
                place = ((one // 2) * num_layers + layer).to(tl.int64) * EXPERTS * EXPERTS
                to = coactivation + place + experts[:, None] * EXPERTS + experts[None, :]
                tl.atomic_add(to, pairs, mask=pairs > 0, sem="relaxed")


def add(stats: RouterStats, rows: int) -> None:
    """Launch it over the first `rows` rows.

    Raises:
        ValueError: a number of experts that is not a power of two from 16 on.
    """
    layers, _, experts = stats.slab.shape
    if experts < 16 or experts & (experts - 1):
        raise ValueError(f"{experts} experts; this kernel takes powers of two from 16 on")
    arguments: tuple[Any, ...] = stats.kernel_arguments()
    confidence = arguments[5]
    _add[(triton.cdiv(rows, BLOCK_ROWS), layers)](
        *arguments, stats.slab.stride(0), stats.slab.stride(1), layers,
        EXPERTS=experts, TOP_K=stats.top_k, CELLS=confidence.shape[0], BINS=confidence.shape[2], ROWS=BLOCK_ROWS,
    )  # fmt: skip
