"""Which rows a step has by what each engine says of its requests: positions, phases, and whether what is drawn is a token of an answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from softprune.runtime.collector import Collector, Span
from softprune.sglang_ext.collector import spans
from softprune.vllm_ext.collector import Steps
from tests.unit.fake_control import make_launch, make_model


def collector() -> Collector:
    found = make_model(make_launch(stats="eaft")).add_collector(64, "vLLM 0.32.0")
    found.call("start", mode="router")
    return found


def draws(span: Span) -> bool:
    return span.first + span.rows >= span.known


def sglang_request(name: str, prompt: int, max_new_tokens: int, **parameters: str) -> Any:
    sampling = SimpleNamespace(max_new_tokens=max_new_tokens, custom_params=parameters or None)
    return SimpleNamespace(rid=name, origin_input_ids=[0] * prompt, output_ids=[], sampling_params=sampling)


class SglangSteps:
    """Steps of SGLang, which runs one ahead: a request's `output_ids` are those of the steps before the last."""

    def __init__(self) -> None:
        self.collector = collector()

    def prefill(self, *parts: tuple[Any, int, int]) -> list[Span]:
        mode = SimpleNamespace(is_decode=lambda: False, is_extend=lambda: True)
        requests, firsts, rows = zip(*parts, strict=True)
        batch = SimpleNamespace(forward_mode=mode, reqs=list(requests), prefix_lens=list(firsts), extend_lens=list(rows))
        return spans(batch, self.collector)

    def decode(self, *requests: Any) -> list[Span]:
        mode = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False)
        return spans(SimpleNamespace(forward_mode=mode, reqs=list(requests)), self.collector)


def test_sglang_chunks_answers_and_the_step_after_the_end() -> None:
    steps, request = SglangSteps(), sglang_request("a", 10, 3, softprune_tag="chat", softprune_spans="2-5,7-9")
    chunk, last = steps.prefill((request, 4, 3))[0], steps.prefill((request, 7, 3))[0]
    assert (chunk.first, chunk.rows, chunk.prompt, draws(chunk)) == (4, 3, 10, False)
    assert (last.completions, last.tag, draws(last)) == (((2, 5), (7, 9)), 1, True)
    found = []
    for late in (0, 0, 1):  # tokens that the host knows when the step is launched
        request.output_ids = [1] * late
        found.append(steps.decode(request)[0])
    assert [(span.first, span.rows) for span in found] == [(10, 1), (11, 1), (12, 1)]
    assert [draws(span) for span in found] == [True, True, False]
    assert steps.collector.status()["masks"][0]["tokens"]["chat"]["cached"] == 4


def test_sglang_answers_of_no_token() -> None:
    steps = SglangSteps()
    assert [draws(span) for span in steps.prefill((sglang_request("a", 8, 0), 0, 8), (sglang_request("b", 8, 1), 0, 8))] == [False, True]
    assert steps.prefill((sglang_request("c", 8, 0), 0, 8))[0].known == sys.maxsize


def test_sglang_retracted() -> None:
    """A request whose KV was taken is computed again, its answer so far as well, and goes on where it was."""
    steps, request = SglangSteps(), sglang_request("a", 5, 4)
    steps.prefill((request, 0, 5))
    steps.decode(request)
    request.output_ids = [1, 2]
    again = steps.prefill((request, 0, 7))[0]
    assert (again.first, again.rows, again.prompt, draws(again)) == (0, 7, 5, True)
    assert [(span.first, draws(span)) for span in (steps.decode(request)[0], steps.decode(request)[0])] == [(7, True), (8, False)]


def vllm_output(
    new: dict[str, tuple[int, int]], cached: dict[str, tuple[int, int]], rows: dict[str, int], finished: set[str] | None = None,
    parameters: dict[str, str] | None = None,
) -> Any:  # fmt: skip
    """A `SchedulerOutput`; new requests are (prompt, computed), known ones (computed, answered)."""
    sampling = SimpleNamespace(extra_args=parameters)
    return SimpleNamespace(
        finished_req_ids=finished or set(), num_scheduled_tokens=rows, total_num_scheduled_tokens=sum(rows.values()),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, prompt_token_ids=[0] * prompt, num_computed_tokens=computed, sampling_params=sampling)
            for name, (prompt, computed) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[one[0] for one in cached.values()],
            num_output_tokens=[one[1] for one in cached.values()],
        ),
    )  # fmt: skip


def vllm_step(steps: Steps, order: list[str], output: Any) -> list[Span]:
    steps.begin(output)
    steps.launched(SimpleNamespace(execute_model_state=None, input_batch=SimpleNamespace(req_ids=order)), output)
    return list(steps._spans)


def test_vllm_chunks_answers_and_preemption() -> None:
    steps = Steps(collector(), 0)
    named = {"softprune_tag": "chat", "softprune_spans": ""}
    found = vllm_step(steps, ["a"], vllm_output({"a": (10, 2)}, {}, {"a": 4}, parameters=named))
    assert [(span.first, span.rows, span.tag, span.completions, draws(span)) for span in found] == [(2, 4, 1, (), False)]
    # Rows are in the order of the runner's batch, not of the scheduler's output.
    found = vllm_step(steps, ["b", "a"], vllm_output({"b": (3, 0)}, {"a": (6, 0)}, {"a": 4, "b": 3}))
    assert [(span.request, span.first, draws(span)) for span in found] == [("b", 0, True), ("a", 6, True)]
    found = vllm_step(steps, ["b", "a"], vllm_output({}, {"a": (10, 1), "b": (3, 1)}, {"a": 1, "b": 1}))
    assert [(span.first, span.prompt, draws(span)) for span in found] == [(3, 3, True), (10, 10, True)]
    # Preempted with two tokens of an answer, and computed again in two chunks.
    found = vllm_step(steps, ["a"], vllm_output({}, {"a": (0, 2)}, {"a": 11}, finished={"b"}))
    assert [(span.first, span.rows, draws(span)) for span in found] == [(0, 11, False)]
    assert [draws(span) for span in vllm_step(steps, ["a"], vllm_output({}, {"a": (11, 2)}, {"a": 1}))] == [True]
    assert list(steps._requests) == ["a"]


def test_vllm_a_step_whose_rows_are_not_known_is_missed() -> None:
    steps = Steps(found := collector(), 0)
    assert vllm_step(steps, ["other"], vllm_output({"a": (10, 0)}, {}, {"a": 10})) == []
    assert found.status()["missed_tokens"] == 10
