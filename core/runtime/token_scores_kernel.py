"""`token_scores` as two Triton kernels: each program of the first reads a part of a row once, the second puts a row's parts together.

The 20 likeliest tokens lie in those 20 groups of 64 whose own likeliest are the likeliest: the first kernel keeps each group's maximum,
the second looks for the groups among them, and then for the tokens in the groups.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from softprune.runtime.token_scores import TOP

_GROUP = 64
_GROUPS = 64
"""Groups in a part."""
_TOP_PLACES = 32
"""The power of two from TOP on."""


@triton.jit  # type: ignore[untyped-decorator]
def _parts(logits, parts, maxima, stride, vocabulary, num_parts, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    columns = (part * GROUPS + groups[:, None]) * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * stride + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    of_group = tl.max(x, axis=1)
    tl.store(maxima + (row * num_parts + part) * GROUPS + groups, of_group)
    largest = tl.max(of_group, axis=0)
    # Of a part that is -inf throughout, nothing is added.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(x - shift)
    weighted = tl.where(weights > 0, weights * (x - shift), 0.0)
    at = parts + (row * num_parts + part) * 3
    tl.store(at, largest)
    tl.store(at + 1, tl.sum(tl.sum(weights, axis=1), axis=0))
    tl.store(at + 2, tl.sum(tl.sum(weighted, axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _whole(
    logits, tokens, parts, maxima, scores, stride, vocabulary, num_parts, log_top, TOP: tl.constexpr, PARTS: tl.constexpr,
    ALL_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TOP_PLACES: tl.constexpr,
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

    group = tl.arange(0, ALL_GROUPS)
    left = tl.load(maxima + row * num_parts * GROUPS + group, mask=group < num_parts * GROUPS, other=float("-inf"))
    places = tl.arange(0, TOP_PLACES)
    chosen = tl.full((TOP_PLACES,), -1, dtype=tl.int32)
    for i in tl.static_range(TOP):
        best, where = tl.max(left, axis=0, return_indices=True)
        chosen = tl.where(places == i, tl.where(best > float("-inf"), where, -1), chosen)
        left = tl.where(group == where, float("-inf"), left)
    columns = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (chosen[:, None] >= 0) & (columns < vocabulary)
    x = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.reshape(x, (TOP_PLACES * GROUP,))
    candidates = tl.arange(0, TOP_PLACES * GROUP)
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
    num_parts = triton.cdiv(vocabulary, _GROUPS * _GROUP)
    parts = torch.empty(rows, num_parts, 3, dtype=torch.float32, device=logits.device)
    maxima = torch.empty(rows, num_parts, _GROUPS, dtype=torch.float32, device=logits.device)
    _parts[(rows, num_parts)](
        logits, parts, maxima, logits.stride(0), vocabulary, num_parts, GROUPS=_GROUPS, GROUP=_GROUP, num_warps=8
    )  # fmt: skip
    _whole[(rows,)](
        logits, tokens, parts, maxima, scores, logits.stride(0), vocabulary, num_parts, math.log(max(2, min(TOP, vocabulary))), TOP=TOP,
        PARTS=triton.next_power_of_2(num_parts), ALL_GROUPS=triton.next_power_of_2(num_parts * _GROUPS), GROUPS=_GROUPS, GROUP=_GROUP,
        TOP_PLACES=_TOP_PLACES, num_warps=8,
    )  # fmt: skip
    return scores
