"""Statistics in vLLM: every router's logits into the slab, and which requests a step's rows are of.

The copy is made in the op that torch.compile does not look into and that CUDA graphs capture; what a step had is added up after it. Tokens
are scored where vLLM has their logits: when it samples, and when it answers a prompt's log-probabilities.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.errors import RefusedError
from softprune.runtime.blocks import MoeLayer
from softprune.runtime.collector import Collector, Span
from softprune.runtime.tags import SPANS_KEY, TAG_KEY, Spans
from softprune.vllm_ext import seams


def attach(layers: Sequence[MoeLayer], collector: Collector) -> None:
    """Have every layer copy its router's logits into the slab.

    Raises:
        SeamError: a layer does not look as expected.
    """
    seams.check(seams.STATISTICS)
    for position, layer in enumerate(layers):
        runner: Any = layer.block.experts
        apply = seams.attribute(runner, "_apply_quant_method", seams.APPLY_EXPERTS.name)
        runner._apply_quant_method = _copying(apply, collector, position)


def max_rows(vllm_config: Any) -> int:
    """Tokens in a step at most, padding included."""
    return int(seams.attribute(vllm_config, "scheduler_config.max_num_batched_tokens", seams.STEP_SIZE.name))


def captured_rows(vllm_config: Any) -> int:
    """Tokens up to which a step may run as a captured graph; 0 without graphs."""
    if seams.attribute(vllm_config, "model_config.enforce_eager", seams.CAPTURE_SIZES.name):
        return 0
    return max(seams.attribute(vllm_config, "compilation_config.cudagraph_capture_sizes", seams.CAPTURE_SIZES.name) or [0])


def _copying(apply: Any, collector: Collector, position: int) -> Any:
    @functools.wraps(apply)
    def copying(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        collector.record(position, hidden_states, router_logits)
        return apply(hidden_states, router_logits, *args, **kwargs)

    return copying


@dataclass(frozen=True)
class _Request:
    """A request: its tag's number, its prompt's tokens, and which of them `eaft` is to count."""

    tag: int
    prompt: int
    completions: Spans | None


class Steps:
    """Tells a collector what every step had, from what the scheduler sends to the worker.

    Args:
        collector: of this process.
        captured_rows: tokens up to which a step may run as a captured graph.
    """

    def __init__(self, collector: Collector, captured_rows: int) -> None:
        self._collector, self._captured_rows = collector, captured_rows
        self._requests: dict[str, _Request] = {}
        self._spans: list[Span] = []

    def begin(self, output: Any) -> None:
        """A step is about to be launched.

        Args:
            output: vLLM's `SchedulerOutput` of the step.
        """
        rows = output.total_num_scheduled_tokens
        if rows:
            self._collector.begin(rows, captured=rows <= self._captured_rows)

    def launched(self, runner: Any, output: Any) -> None:
        """A step has been launched.

        Args:
            runner: vLLM's model runner.
            output: vLLM's `SchedulerOutput` of the step.
        """
        for request_id in output.finished_req_ids:
            self._requests.pop(request_id, None)
        first: dict[str, int] = {}
        answered: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            first[new.req_id] = new.num_computed_tokens
            if new.req_id not in self._requests:  # else it was preempted, and is computed again
                extra = getattr(new.sampling_params, "extra_args", None) or {}
                tag, completions = self._collector.tag_number(extra.get(TAG_KEY)), self._collector.completions(extra.get(SPANS_KEY))
                self._requests[new.req_id] = _Request(tag, len(new.prompt_token_ids or ()), completions)
                self._collector.cached(tag, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        first.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        answered.update(zip(cached.req_ids, cached.num_output_tokens, strict=True))
        if not output.total_num_scheduled_tokens:
            return
        order = _rows_in_order(runner)
        if sorted(order) != sorted(output.num_scheduled_tokens):
            self._collector.miss(output.total_num_scheduled_tokens)
            self._spans = []
            return
        self._spans = list(self._rows(order, first, output.num_scheduled_tokens, answered))
        self._collector.step(self._spans)

    def _rows(self, order: Sequence[str], first: dict[str, int], rows: dict[str, int], answered: dict[str, int]) -> Iterator[Span]:
        for name in order:
            request = self._requests[name]
            known = request.prompt + answered.get(name, 0)
            yield Span(request.tag, request.prompt, first[name], rows[name], known, name, request.completions)

    def score(self, runner: Any) -> None:
        """Have the sampler told of every token that is drawn, and of every prompt's token whose log-probability is asked for.

        Args:
            runner: vLLM's model runner.

        Raises:
            SeamError: a seam is missing.
            RefusedError: the newer of vLLM's two model runners, which has other seams.
        """
        seams.check(seams.SCORES)
        if not isinstance(runner, seams.owner(seams.SAMPLE)):
            found = f"the model runner {type(runner).__module__}.{type(runner).__name__}"
            raise RefusedError(f"--softprune-stats eaft: found {found}; expected V1's, which VLLM_USE_V2_MODEL_RUNNER=0 chooses")
        runner._sample = self._drawing(runner._sample)
        runner._get_prompt_logprobs_dict = self._giving(runner._get_prompt_logprobs_dict, runner)

    def _drawing(self, sample: Any) -> Any:
        sampler = self._collector.sampler

        @functools.wraps(sample)
        def drawing(logits: Any, *args: Any, **kwargs: Any) -> Any:
            if sampler is None or not sampler.scores or logits is None:
                return sample(logits, *args, **kwargs)
            # vLLM's sampler makes float32 of others, and changes float32 in place.
            raw = logits.clone() if logits.dtype == torch.float32 else logits
            output = sample(logits, *args, **kwargs)
            with self._collector.guarded("scoring of drawn tokens"):
                sampler.drawn(raw, output.sampled_token_ids[:, 0])
            return output

        return drawing

    def _giving(self, answer: Any, runner: Any) -> Any:
        sampler, vllm_sampler = self._collector.sampler, runner.sampler

        @functools.wraps(answer)
        def giving(*args: Any, **kwargs: Any) -> Any:
            if sampler is None or not sampler.scores:
                return answer(*args, **kwargs)
            gather = vllm_sampler.gather_logprobs
            rows = self._rows_of_prompts(runner)

            def gathering(logprobs: Any, number: Any, token_ids: Any, *more: Any, **named: Any) -> Any:
                mine = rows.pop(0) if rows else np.empty(0, np.int64)
                if len(mine) == len(token_ids):
                    with self._collector.guarded("scoring of a prompt"):
                        sampler.given(mine, logprobs, token_ids)
                else:
                    sampler.lost += len(token_ids)
                return gather(logprobs, number, token_ids, *more, **named)

            vllm_sampler.gather_logprobs = gathering
            try:
                return answer(*args, **kwargs)
            finally:
                del vllm_sampler.gather_logprobs

        return giving

    def _rows_of_prompts(self, runner: Any) -> list[NDArray[np.int64]]:
        """Of each request in the step whose prompt's log-probabilities vLLM is about to look up, in its order: the rows that give them."""
        at, row = {}, 0
        for span in self._spans:
            # The last token of a prompt predicts what is drawn.
            at[span.request] = np.arange(row, row + min(span.rows, span.prompt - span.first - 1))
            row += span.rows
        asked = seams.attribute(runner, "num_prompt_logprobs", seams.PROMPT_LOGPROBS.name)
        return [at[name] for name in asked if name in at and len(at[name])]


def _rows_in_order(runner: Any) -> list[str]:
    """Ids of the requests in the step that was launched last, in the order of their rows."""
    # The newer of vLLM's two model runners keeps each step's batch with what is to be sampled of it, the older one has a single batch.
    batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
    return list(seams.attribute(runner, "input_batch.req_ids", seams.ROW_ORDER.name) if batch is None else batch.req_ids)
