"""Statistics in SGLang: every router's logits into the slab, and which requests a step's rows are of.

The router's kernel for small batches writes into the slab in the first place, others' logits are copied; CUDA graphs capture either.
What a step had is added up after it. Tokens are scored where SGLang has their logits: when it samples, and when it answers a prompt's
log-probabilities.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from softprune.runtime.blocks import MoeLayer
from softprune.runtime.collector import Collector, Span
from softprune.runtime.sample_slab import SLAB_ROWS
from softprune.runtime.sampled import Sampler
from softprune.runtime.tags import SPANS_KEY, TAG_KEY
from softprune.sglang_ext import seams

_TAG = "softprune_tag_number"
"""Attribute of a request: its tag, once a first step with it is to be launched."""
_DRAWN = "softprune_drawn"
"""Attribute of a request: tokens of its answer that have been drawn when the steps launched so far are done."""

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
                collector.take(position, x, rows)
                return rows, None
        output = forward(x)
        collector.record(position, x, output[0])
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
        return [_decoding(request, collector) for request in batch.reqs]
    if not mode.is_extend():
        return []
    return [_span(request, collector, *place) for request, *place in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)]


def _span(request: Any, collector: Collector, first: int, rows: int) -> Span:
    prompt = len(request.origin_input_ids)
    completions = collector.completions((request.sampling_params.custom_params or {}).get(SPANS_KEY))
    answered = len(request.output_ids)
    setattr(request, _DRAWN, answered + 1)
    known = prompt + answered if answered < request.sampling_params.max_new_tokens else sys.maxsize
    return Span(_tag(request, collector, first), prompt, first, rows, known, request.rid, completions)


def _decoding(request: Any, collector: Collector) -> Span:
    """The row of a request that decodes.

    SGLang launches a step before it knows the token of the last one, so a request may be in a step after its end, whose token is thrown
    away; of the longest answer that was asked for, that is known here.
    """
    prompt = len(request.origin_input_ids)
    drawn: int = getattr(request, _DRAWN, len(request.output_ids))
    setattr(request, _DRAWN, drawn + 1)
    known = 0 if drawn < request.sampling_params.max_new_tokens else sys.maxsize
    return Span(_tag(request, collector, 0), prompt, prompt + drawn - 1, 1, known, request.rid)


def keep_within(sampler: Sampler, layers: Sequence[MoeLayer]) -> None:
    """Have SGLang run a prefill whose rows are measured within its layers without its captured graph, but in few sizes, as graphs have.

    SGLang's kernels are compiled anew for every 32 rows more, and for numbers of other divisors. To launch such a step takes the host some
    90 ms of the 20B shape, the GPU less up to 5,000 tokens; up to 3,072, their rows wait in the slab instead, and the graph is used.

    Args:
        sampler: of this process.
        layers: all MoE layers; none where padding must not be routed.

    Raises:
        SeamError: a seam is missing.
    """
    seams.check(seams.SAMPLES)
    runner = seams.owner(seams.PREFILL_GRAPH)
    can_run: Any = seams.PREFILL_GRAPH.resolve()

    @functools.wraps(can_run)
    def can_run_graph(self: Any, *args: Any, **kwargs: Any) -> bool:
        return not sampler.measures_within and bool(can_run(self, *args, **kwargs))

    runner.can_run_graph = can_run_graph
    for layer in layers:
        layer.block.forward = _padded(layer.block.forward, sampler)
    sampler.within.pads, sampler.within.least = bool(layers), SLAB_ROWS


def _padded(forward: Any, sampler: Sampler) -> Any:
    within = sampler.within

    @functools.wraps(forward)
    def padded(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = len(hidden_states)
        more = within.padded(rows) - rows if sampler.measures_within and within.reads else 0
        if not more:
            return forward(hidden_states, *args, **kwargs)
        return forward(functional.pad(hidden_states, (0, 0, 0, more)), *args, **kwargs)[:rows]

    return padded


def score(runner: Any, collector: Collector) -> None:
    """Have the sampler told of every token that is drawn, and of every prompt's token whose log-probability is asked for.

    Args:
        runner: SGLang's model runner.
        collector: of this process, with a sampler.

    Raises:
        SeamError: a seam is missing.
    """
    seams.check(seams.SCORES)
    runner.sample = _drawing(runner.sample, collector)
    owner: Any = seams.owner(seams.INPUT_LOGPROBS)
    owner.forward = _giving(owner.forward, collector)


def _drawing(sample: Any, collector: Collector) -> Any:
    sampler = collector.sampler

    @functools.wraps(sample)
    def drawing(logits_output: Any, *args: Any, **kwargs: Any) -> Any:
        if sampler is None or not sampler.scores:
            return sample(logits_output, *args, **kwargs)
        raw = logits_output.next_token_logits.clone()  # SGLang masks, scales and normalises them in place
        tokens = sample(logits_output, *args, **kwargs)
        with collector.guarded("scoring of drawn tokens"):
            sampler.drawn(raw, tokens)
        return tokens

    return drawing


def _giving(forward: Any, collector: Collector) -> Any:
    sampler, signature = collector.sampler, inspect.signature(forward)

    @functools.wraps(forward)
    def giving(*args: Any, **kwargs: Any) -> Any:
        if sampler is None or not sampler.scores:
            return forward(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        states, indices, metadata = (given.arguments[name] for name in ("pruned_states", "input_logprob_indices", "logits_metadata"))
        rows = _rows_of_prompts(metadata, sampler.spans)
        if len(rows) != len(states):
            sampler.lost += len(states)
            return forward(*args, **kwargs)
        targets = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        targets[indices] = metadata.extend_input_logprob_token_ids_gpu
        logits_of, done = given.arguments["get_logits_fn"], 0

        def get_logits(part: Any, *more: Any, **named: Any) -> Any:
            nonlocal done
            logits, place = logits_of(part, *more, **named), slice(done, done + len(part))
            with collector.guarded("scoring of a prompt"):
                sampler.given(rows[place], logits[: len(part)], targets[place])
            done += len(part)
            return logits

        given.arguments["get_logits_fn"] = get_logits
        return forward(*given.args, **given.kwargs)

    return giving


def _rows_of_prompts(metadata: Any, spans: Sequence[Span]) -> NDArray[np.int64]:
    """Of each row that logits are made of: its row in the step if what follows is a token of the prompt, else -1.

    Only the rows from where a request asks for log-probabilities are there, and always its last one, which predicts what is drawn.
    """
    found, row = [np.empty(0, np.int64)], 0
    for span, start, length in zip(spans, metadata.extend_logprob_start_lens_cpu, metadata.extend_seq_lens_cpu, strict=False):
        rows = np.arange(row + (start - 1 if start == length else start), row + length)
        asked = (rows >= row + start) & (rows - row + span.first + 1 < span.prompt)
        found.append(np.where(asked, rows, -1))
        row += length
    return np.concatenate(found)


def _tag(request: Any, collector: Collector, first: int) -> int:
    """A request's tag; in its first step, whose first row is at position `first`, tells how much of it was cached."""
    tag: int | None = getattr(request, _TAG, None)
    if tag is None:
        tag = collector.tag_number((request.sampling_params.custom_params or {}).get(TAG_KEY))
        setattr(request, _TAG, tag)
        collector.cached(tag, first)
    return tag
