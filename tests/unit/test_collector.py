"""Claim: what a collector hands out is what the steps had, by tag, phase and mask, and every wrong call is answered with what was wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprune.control import PREFIX, ControlError
from softprune.control_api import check_served
from softprune.errors import RefusedError
from softprune.launch import LaunchRequest
from softprune.mask import ExpertMask
from softprune.request_tags import with_tags
from softprune.runtime.collector import Collector, Span, file_of
from softprune.runtime.masked_model import MaskedModel
from softprune.runtime.tags import Tags, completions_of
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, dump, read, write
from softprune.stats.merge import merge
from softprune.stats.summary import complete
from tests.unit.fake_control import EXPERTS, LAYERS, TOP_K, FakeControl, FakeEngine, make_launch, make_mask, make_model
from tests.unit.test_control_api import call, run

KEEP: list[list[int] | None] = [[0, 1, 2], None, [3, 4, 5, 6]]


def model_with_collector(max_rows: int = 64, **launch: Any) -> tuple[MaskedModel, Collector]:
    model = make_model(make_launch(stats="router", **launch))
    return model, model.add_collector(max_rows, "vLLM 0.32.0")


def step(model: MaskedModel, collector: Collector, spans: list[Span], padding: int = 0, seed: int = 0) -> None:
    """Route random tokens as an engine does, with some rows of padding behind them."""
    rows = sum(span.rows for span in spans) + padding
    hidden = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for layer, router in enumerate(model.routers.routers):
        collector.record(layer, hidden, router.forward(hidden).detach())
    collector.step(spans)


def fetched(collector: Collector, tmp_path: Path, mask: str | None = None) -> Statistics:
    (tmp_path / "s").write_bytes(file_of(collector.call("file", mask=mask)))
    return read(tmp_path / "s")


def test_tags_phases_and_padding(tmp_path: Path) -> None:
    """A span over the end of its prompt counts on both sides of it."""
    model, collector = model_with_collector()
    chat = collector.tag_number("chat")
    step(model, collector, [Span(chat, 9, 0, 9)])
    collector.call("start", mode="router")
    collector.cached(chat, 5)
    spans = [Span(0, 10, 4, 3), Span(chat, 6, 4, 5), Span(0, 3, 7, 1)]
    step(model, collector, spans, padding=20, seed=1)
    step(model, collector, [], padding=20)
    step(model, collector, spans, seed=2)
    found = fetched(collector, tmp_path)
    assert found.header.tags == ["default", "chat"]
    assert found.header.tokens["default"].model_dump() == {"prefill": 6, "decode": 2, "cached": 0}
    assert found.header.tokens["chat"].model_dump() == {"prefill": 4, "decode": 6, "cached": 5}
    assert complete(found) is True
    tokens = np.array([[6, 2], [4, 6]])
    assert np.array_equal(found["router.count"].sum(-1), np.broadcast_to(tokens[:, :, None] * TOP_K, (2, 2, LAYERS)))


def test_a_switch_keeps_masks_apart(tmp_path: Path) -> None:
    """Back under a mask, its sums go on where they were, as another run of the same file; a reset forgets all masks."""
    model, collector = model_with_collector()
    mask = make_mask(KEEP, model)
    collector.call("start", mode="router")
    for number, now in enumerate((None, mask, None, None, mask)):
        if number:
            assert model.stage(None if now is None else now.dump()) is None
            model.commit()
        step(model, collector, [Span(0, 100, 0, 10 + number)], seed=number)
    unpruned, pruned = fetched(collector, tmp_path, "none"), fetched(collector, tmp_path)
    assert ([one.epoch for one in unpruned.header.epochs], unpruned.header.tokens["default"].prefill) == ([0, 2, 3], 35)
    assert ([one.epoch for one in pruned.header.epochs], pruned.header.tokens["default"].prefill) == ([1, 4], 25)
    assert (unpruned.header.mask, pruned.header.mask) == (None, mask.hash)
    assert len({one.id for one in [*unpruned.header.runs, *pruned.header.runs]}) == 5
    for layer in range(LAYERS):
        assert pruned["router.count"][:, :, layer, mask.pruned(layer)].sum() == 0
        assert (unpruned["router.count"][0, 0, layer] > 0).all()
    status = {one["mask"]: one for one in collector.status()["masks"]}
    assert status[None]["epochs"] == [0, 2, 3]
    assert status[mask.hash]["tokens"]["default"] == {"prefill": 25, "decode": 0, "cached": 0}
    collector.call("reset")
    assert collector.status()["masks"] == [
        {"mask": mask.hash, "epochs": [4], "tokens": {"default": {"prefill": 0, "decode": 0, "cached": 0}}}
    ]
    with pytest.raises(ControlError, match="nothing was counted under mask none"):
        collector.call("file", mask="none")


def test_stopped_is_not_counted_and_files_of_two_resets_merge(tmp_path: Path) -> None:
    model, collector = model_with_collector()
    parts = []
    for number in (1, 2):
        collector.call("start", mode="router")
        step(model, collector, [Span(0, 100, 0, 10 * number)], seed=number)
        collector.call("stop")
        step(model, collector, [Span(0, 100, 0, 7)])
        parts.append(fetched(collector, tmp_path))
        collector.call("reset")
    assert [one.header.tokens["default"].prefill for one in parts] == [10, 20]
    assert merge(parts).header.tokens["default"].prefill == 30


def test_a_file_fetched_twice_is_not_counted_twice(tmp_path: Path) -> None:
    model, collector = model_with_collector()
    collector.call("start", mode="router")
    step(model, collector, [Span(0, 100, 0, 5)])
    first = fetched(collector, tmp_path)
    step(model, collector, [Span(0, 100, 5, 5)])
    with pytest.raises(StatisticsError):
        merge([first, fetched(collector, tmp_path)])


def test_top_k_in_force_is_that_of_the_launch(tmp_path: Path) -> None:
    model, collector = model_with_collector(top_k=1)
    collector.call("start", mode="router")
    step(model, collector, [Span(0, 100, 0, 5)])
    found = fetched(collector, tmp_path)
    assert found.header.epochs[0].top_k == [1] * LAYERS
    assert found.header.model.top_k == TOP_K
    assert complete(found) is True


def test_what_does_not_add_up_is_not_handed_out() -> None:
    model, collector = model_with_collector()
    collector.call("start", mode="router")
    step(model, collector, [Span(0, 9, 0, 9)])
    collector.stats.add(9)  # a step that nobody launched
    with pytest.raises(ControlError, match="not the steps' tokens times top_k"):
        collector.call("file")


def test_a_step_too_large_is_missed_and_said_so() -> None:
    model, collector = model_with_collector(max_rows=8)
    collector.call("start", mode="router")
    step(model, collector, [Span(0, 9, 0, 9)])
    step(model, collector, [Span(0, 8, 0, 8)])
    status = collector.status()
    assert (status["missed_tokens"], status["masks"][0]["tokens"]["default"]["prefill"]) == (9, 8)
    assert collector.into_slab(0, 9) is None


def test_logits_of_another_dtype_are_refused() -> None:
    _, collector = model_with_collector()
    for logits in (torch.zeros(3, EXPERTS), torch.zeros(3, EXPERTS + 1, dtype=torch.bfloat16)):
        with pytest.raises(RefusedError, match="expected torch.bfloat16"):
            collector.record(0, torch.zeros(3, 16), logits)


def test_a_router_that_is_not_seen_stops_the_server() -> None:
    model, collector = model_with_collector()
    launch = model.launch
    for layer in range(LAYERS):
        with pytest.raises(RefusedError, match=rf"no logits of MoE layers \[{layer}"):
            check_served(launch, 0, model.status())
        collector.record(layer, torch.zeros(1, 16), torch.zeros(1, EXPERTS, dtype=torch.bfloat16))
    check_served(launch, 0, model.status())
    without = make_model(launch).status()
    check_served(launch, 1, without)  # only the first process collects
    with pytest.raises(RefusedError, match="no collector"):
        check_served(launch, 0, without)


def test_the_file_is_what_write_writes(tmp_path: Path) -> None:
    model, collector = model_with_collector()
    collector.call("start", mode="router")
    step(model, collector, [Span(0, 9, 0, 9)])
    found = fetched(collector, tmp_path)
    write(found, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == dump(found) == (tmp_path / "s").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stats": "all"}, "--softprune-stats: found all; expected one of router, reap, eaft"),
        ({"max_tags": 4}, "with it"),
        ({"stats": "router", "max_tags": 0}, "found 0"),
        ({"stats": "router", "max_tags": 65}, "found 65"),
    ],
)
def test_flags_that_are_refused(fields: dict[str, Any], message: str) -> None:
    config = {
        "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    with pytest.raises(RefusedError, match=message):
        LaunchRequest(**fields).resolve(config, "m")


def api(ranks: int = 2, **launch: Any) -> FakeControl:
    return FakeControl(FakeEngine(ranks=ranks, launch=make_launch(**{"stats": "router", **launch})))


def test_calls_and_their_errors() -> None:
    served = api()
    start = b'{"mode": "router"}'
    for method, path, body, expected in (
        ("GET", "stats", b"", (404, "never_started")),
        ("POST", "stats/stop", b"", (409, "not_collecting")),
        ("POST", "stats/start", b"", (400, "invalid_mode")),
        ("POST", "stats/start", b'"router"', (400, "invalid_mode")),
        ("POST", "stats/start", b'{"mode": "router", "tag": 1}', (400, "invalid_mode")),
        ("POST", "stats/start", b'{"mode": ["router"]}', (400, "invalid_mode")),
        ("POST", "stats/start", b'{"mode": "reap"}', (409, "mode_is_off")),
        ("POST", "stats/start", b'{"mode": "eaft"}', (409, "mode_is_off")),
        ("POST", "stats/start", b'{"mode": "router", "shadow": true}', (409, "mode_is_off")),
        ("POST", "stats/start", start, (200, None)),
        ("POST", "stats/start", start, (409, "already_collecting")),
        ("GET", "stats?mask=other", b"", (404, "nothing_counted")),
        ("POST", "stats/stop", b"", (200, None)),
    ):
        answer = run(served, method, path, body)
        assert (answer.status, None if answer.status == 200 else answer.kind) == expected, (path, body)
    run(served, "POST", "stats/start", start)
    answer = run(served, "GET", "stats")
    assert answer.headers[b"content-type"] == b"application/octet-stream"
    assert b"softprune.statistics" in answer.body
    off = api(stats=None)
    for method, path in (("GET", "stats"), ("POST", "stats/start"), ("POST", "stats/stop"), ("POST", "stats/reset")):
        assert (run(off, method, path, start).status, run(off, method, path, start).kind) == (409, "statistics_are_off")


def ask(served: FakeControl, body: Any, header: bytes | None = None, status: int = 200) -> tuple[int, Any]:
    """Send a request through `with_tags`: (its error's status or that of the engine, what the engine was sent)."""
    sent: list[Any] = []

    async def go() -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        messages = [{"type": "http.request", "body": data[:9], "more_body": True}, {"type": "http.request", "body": data[9:]}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        headers = [(b"content-length", str(len(data)).encode()), *([] if header is None else [(b"x-softprune-tag", header)])]
        assert served.tags is not None
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        try:
            scope, receive_again, send_again = await with_tags(scope, receive, send, served.tags, served.tag_places)
        except ControlError as error:
            return error.status
        message = await receive_again()
        assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
        sent.append(message["body"])
        assert (await receive_again())["type"] == "http.disconnect"
        await send_again({"type": "http.response.start", "status": status, "headers": []})
        return status

    return asyncio.run(go()), sent[0] if sent else None


def tagged(tag: Any) -> dict[str, Any]:
    return {"prompt": [1], "vllm_xargs": {"softprune_tag": tag, "other": 1}}


def test_the_headers_tag_goes_into_the_body() -> None:
    served = api(max_tags=3)
    plain = b'{"prompt": [1],   "x": 2}'
    assert ask(served, plain) == (200, plain)
    status, sent = ask(served, plain, b"chat")
    assert (status, json.loads(sent)) == (200, {"prompt": [1], "x": 2, "vllm_xargs": {"softprune_tag": "chat"}})
    status, sent = ask(served, tagged("chat"), b"chat")
    assert (status, json.loads(sent)) == (200, tagged("chat"))
    assert ask(served, tagged("code"))[0] == 200
    assert ask(served, tagged("code"), b"chat") == (400, None)
    assert ask(served, b"[1]", b"chat") == (400, None)
    assert ask(served, b"no json", None) == (200, b"no json")
    assert served.tags is not None
    assert served.tags.names == ["default", "chat", "code"]


def test_one_tag_too_many_and_tags_that_are_none() -> None:
    served = api(max_tags=2)
    assert ask(served, tagged("chat"))[0] == 200
    escaped = b'{"prompt": [1], "vllm_xargs": {"softprune_ta\\u0067": "more"}}'
    for body in (
        tagged("more"),
        escaped,
        json.dumps(tagged("more")).encode("utf-16"),
        tagged("x" * 10_000),
        tagged(""),
        tagged(3),
        tagged([]),
    ):
        assert ask(served, body) == (400, None)
    assert ask(served, {"prompt": [1]}, b"x" * 10_000) == (400, None)
    assert ask(served, tagged("default"))[0] == 200


@pytest.mark.parametrize(
    "spans", ["5", "5-", "-5", "7-5", "5-5", "5-9,7-12", "5-9,", "a-b", "5-9-12", "0.5-2", " ", 7, 0, False, [], ["5-9"], {}]
)
def test_spans_that_are_none(spans: Any) -> None:
    served = api(stats="eaft")
    assert ask(served, {"prompt": [1], "vllm_xargs": {"softprune_spans": spans}}) == (400, None)


def test_spans() -> None:
    for spans, expected in ((None, None), ("", ()), ("5-9", ((5, 9),)), ("0-1,1-3,55-90", ((0, 1), (1, 3), (55, 90)))):
        assert ask(api(stats="eaft"), {"prompt": [1], "vllm_xargs": {"softprune_spans": spans}})[0] == 200
        assert completions_of(spans) == expected


def test_a_tag_of_somebody_whom_the_engine_refuses_takes_no_room() -> None:
    served = api(max_tags=2)
    assert ask(served, tagged("theirs"), status=401)[0] == 401
    assert ask(served, tagged("chat"))[0] == 200


def test_the_engine_never_sees_a_tag_that_is_refused() -> None:
    served = api(max_tags=1)
    answer = asyncio.run(call(served, "POST", "/v1/completions", json.dumps(tagged("chat")).encode(), full_path=True))
    assert (answer.status, answer.kind, served.engine.seen) == (400, "too_many_tags", [])
    assert PREFIX not in served.engine.seen


def test_a_process_counts_an_unknown_tag_as_default_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    _, collector = model_with_collector(max_tags=1)
    assert collector.tag_number("chat") == 0
    assert "counted as default" in caplog.text


def test_tags_are_numbered_as_they_come() -> None:
    tags = Tags(3)
    assert [tags.number(tag) for tag in (None, "b", "a", "b", "default")] == [0, 1, 2, 1, 0]


def test_masks_of_the_launch_are_the_first_epoch() -> None:
    mask: ExpertMask = make_mask(KEEP)
    model, _ = model_with_collector()
    model.routers.apply(mask)
    collector = model.add_collector(8, "SGLang 0.5.17")
    collector.call("start", mode="router")
    assert collector.status()["masks"][0]["mask"] == mask.hash
