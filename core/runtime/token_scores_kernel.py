"""`token_scores` as two Triton kernels: each program of the first reads a part of a row once, the second puts a row's parts together."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from softprune.runtime.token_scores import TOP

_BLOCK = 4096
_TOP_BLOCK = 32
"""The power of two from TOP on."""


@triton.jit  # type: ignore[untyped-decorator]
def _parts(logits, parts, tops, stride, vocabulary, num_parts, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, axis=0)
    # Of a part that is -inf throughout, nothing is added.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(x - shift)
    total = tl.sum(weights, axis=0)
    weighted = tl.sum(tl.where(weights > 0, weights * (x - shift), 0.0), axis=0)
    at = parts + (row * num_parts + part) * 3
    tl.store(at, largest)
    tl.store(at + 1, total)
    tl.store(at + 2, weighted)
    places = tl.arange(0, TOP_BLOCK)
    top = tl.full((TOP_BLOCK,), float("-inf"), tl.float32)
    for i in tl.static_range(TOP):
        best, where = tl.max(x, axis=0, return_indices=True)
        top = tl.where(places == i, best, top)
        x = tl.where(tl.arange(0, BLOCK) == where, float("-inf"), x)
    tl.store(tops + (row * num_parts + part) * TOP_BLOCK + places, top)


@triton.jit  # type: ignore[untyped-decorator]
def _whole(
    logits, tokens, parts, tops, scores, stride, num_parts, log_top, TOP: tl.constexpr, PARTS: tl.constexpr, CANDIDATES: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = parts + (row * num_parts + part) * 3
    largest = tl.load(at, mask=part < num_parts, other=float("-inf"))
    highest = tl.max(largest, axis=0)
    scale = tl.exp(largest - highest)
    totals = tl.load(at + 1, mask=part < num_parts, other=0.0) * scale
    total = tl.sum(totals, axis=0)
    # The part's sum of w * (x - its maximum), seen from the row's maximum.
    own = tl.load(at + 2, mask=part < num_parts, other=0.0) * scale
    weighted = tl.sum(own + tl.where(totals > 0, totals * (largest - highest), 0.0), axis=0)
    log_total = tl.log(total)
    token = tl.load(tokens + row).to(tl.int64)
    log_p = tl.load(logits + row * stride + token).to(tl.float32) - highest - log_total
    candidates = tl.arange(0, CANDIDATES)
    x = tl.load(tops + row * num_parts * TOP_BLOCK + candidates, mask=candidates < num_parts * TOP_BLOCK, other=float("-inf"))
    top_total = 0.0
    top_weighted = 0.0
    for _ in tl.static_range(TOP):
        best, where = tl.max(x, axis=0, return_indices=True)
        weight = tl.exp(best - highest)
        top_total += weight
        top_weighted += tl.where(weight > 0, weight * (best - highest), 0.0)
        x = tl.where(candidates == where, float("-inf"), x)
    tl.store(scores + row * 3, log_p)
    tl.store(scores + row * 3 + 1, log_total - weighted / total)
    tl.store(scores + row * 3 + 2, (tl.log(top_total) - top_weighted / top_total) / log_top)


def token_scores(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Launch both; see `softprune.runtime.token_scores`."""
    rows, vocabulary = logits.shape
    scores = torch.empty(rows, 3, dtype=torch.float32, device=logits.device)
    if not rows:
        return scores
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_parts = triton.cdiv(vocabulary, _BLOCK)
    parts = torch.empty(rows, num_parts, 3, dtype=torch.float32, device=logits.device)
    tops = torch.empty(rows, num_parts, _TOP_BLOCK, dtype=torch.float32, device=logits.device)
    _parts[(rows, num_parts)](
        logits, parts, tops, logits.stride(0), vocabulary, num_parts, TOP=TOP, TOP_BLOCK=_TOP_BLOCK, BLOCK=_BLOCK, num_warps=8
    )  # fmt: skip
    _whole[(rows,)](
        logits, tokens, parts, tops, scores, logits.stride(0), num_parts, math.log(max(2, min(TOP, vocabulary))), TOP=TOP,
        PARTS=triton.next_power_of_2(num_parts), CANDIDATES=triton.next_power_of_2(num_parts * _TOP_BLOCK), TOP_BLOCK=_TOP_BLOCK,
    )  # fmt: skip
    return scores
