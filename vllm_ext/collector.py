"""Statistics in vLLM: every router's logits into the slab, and which requests a step's rows are of.

The copy is made in the op that torch.compile does not look into and that CUDA graphs capture; what a step had is added up after it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from softprune.runtime.blocks import MoeLayer
from softprune.runtime.collector import Collector, Span
from softprune.runtime.tags import TAG_KEY
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


def _copying(apply: Any, collector: Collector, position: int) -> Any:
    @functools.wraps(apply)
    def copying(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        collector.copy(position, router_logits)
        return apply(hidden_states, router_logits, *args, **kwargs)

    return copying


class Steps:
    """Tells a collector what every step had, from what the scheduler sends to the worker.

    Args:
        collector: of this process.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._requests: dict[str, tuple[int, int]] = {}

    def launched(self, runner: Any, output: Any) -> None:
        """A step has been launched.

        Args:
            runner: vLLM's model runner.
            output: vLLM's `SchedulerOutput` of the step.
        """
        for request_id in output.finished_req_ids:
            self._requests.pop(request_id, None)
        first: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            first[new.req_id] = new.num_computed_tokens
            if new.req_id not in self._requests:  # else it was preempted, and is computed again
                tag = self._collector.tag_number((getattr(new.sampling_params, "extra_args", None) or {}).get(TAG_KEY))
                self._requests[new.req_id] = tag, len(new.prompt_token_ids or ())
                self._collector.cached(tag, new.num_computed_tokens)
        first.update(zip(output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True))
        if not output.total_num_scheduled_tokens:
            return
        order = _rows_in_order(runner)
        if sorted(order) != sorted(output.num_scheduled_tokens):
            self._collector.miss(output.total_num_scheduled_tokens)
            return
        self._collector.step(self._spans(order, first, output.num_scheduled_tokens))

    def _spans(self, order: Sequence[str], first: dict[str, int], rows: dict[str, int]) -> Iterator[Span]:
        for request_id in order:
            tag, prompt = self._requests[request_id]
            yield Span(tag, prompt, first[request_id], rows[request_id])


def _rows_in_order(runner: Any) -> list[str]:
    """Ids of the requests in the step that was launched last, in the order of their rows."""
    # The newer of vLLM's two model runners keeps each step's batch with what is to be sampled of it, the older one has a single batch.
    batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
    return list(seams.attribute(runner, "input_batch.req_ids", seams.ROW_ORDER.name) if batch is None else batch.req_ids)
