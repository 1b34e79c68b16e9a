"""Statistics in SGLang: every router's logits into the slab, and which requests a step's rows are of.

The router's kernel for small batches writes into the slab in the first place, others' logits are copied; CUDA graphs capture either.
What a step had is added up after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from softprune.runtime.blocks import MoeLayer
from softprune.runtime.collector import Collector, Span
from softprune.runtime.tags import TAG_KEY
from softprune.sglang_ext import seams

_TAG = "softprune_tag_number"
"""Attribute of a request: its tag, once a first step with it is to be launched."""

SMALL_BATCH = 128
"""Rows up to which gpt-oss's router runs its own kernel."""
DECODE_ROWS = 1024
"""Requests in a step at most where nobody says so."""


def attach(layers: Sequence[MoeLayer], collector: Collector) -> None:
    """Have every router write its logits into the slab.

    Raises:
        SeamError: a router does not look as expected.
    """
    seams.check(seams.STATISTICS)
    for position, layer in enumerate(layers):
        gate: Any = layer.gate
        gate.forward = _into_slab(gate, collector, position)


def max_rows(server_args: Any) -> int:
    """Tokens in a step at most, padding included."""
    chunk, prefill = seams.setting(server_args, "chunked_prefill_size") or 0, seams.setting(server_args, "max_prefill_tokens") or 0
    decode = seams.setting(server_args, "max_running_requests") or DECODE_ROWS
    in_prefill = chunk if chunk > 0 else prefill
    mixed = decode if seams.setting(server_args, "enable_mixed_chunk") else 0
    return max(in_prefill + mixed, decode)


def _into_slab(gate: Any, collector: Collector, position: int) -> Callable[[torch.Tensor], Any]:
    forward = gate.forward
    kernel = seams.TINY_GEMM.resolve() if getattr(gate, "_use_tinygemm", False) else None
    pdl = kernel is not None and bool(seams.TINY_GEMM_PDL.resolve()())

    def into(x: torch.Tensor) -> Any:
        if kernel is not None and _fits(gate, x):
            rows = collector.into_slab(position, x.shape[0])
            if rows is not None:
                kernel(x, gate.weight, rows, gate.bias, use_pdl=pdl)
                return rows, None
        output = forward(x)
        collector.copy(position, output[0])
        return output

    return into


def _fits(gate: Any, x: torch.Tensor) -> bool:
    """Whether SGLang would run the kernel for small batches."""
    width = x.shape[-1] == gate.weight.shape[1] and x.dtype == torch.bfloat16
    return x.ndim == 2 and x.is_cuda and x.shape[0] <= SMALL_BATCH and x.is_contiguous() and width


def spans(batch: Any, collector: Collector) -> list[Span]:
    """The rows of a step that is about to be launched.

    Args:
        batch: SGLang's.
        collector: of this process.
    """
    mode = batch.forward_mode
    if mode.is_decode():
        return [Span(_tag(request, collector, 0), 0, 0, 1) for request in batch.reqs]
    if not mode.is_extend():
        return []
    return [
        Span(_tag(request, collector, first), len(request.origin_input_ids), first, rows)
        for request, first, rows in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
    ]


def _tag(request: Any, collector: Collector, first: int) -> int:
    """A request's tag; in its first step, whose first row is at position `first`, tells how much of it was cached."""
    tag: int | None = getattr(request, _TAG, None)
    if tag is None:
        tag = collector.tag_number((request.sampling_params.custom_params or {}).get(TAG_KEY))
        setattr(request, _TAG, tag)
        collector.cached(tag, first)
    return tag
