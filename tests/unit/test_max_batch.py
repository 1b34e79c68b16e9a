"""The largest batch is the server's true capacity, whatever happens to one more request; and what cannot be told is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from softprune.bench import engine_metrics
from softprune.bench.decode import BenchmarkError
from softprune.bench.engine_metrics import Load, load_of, memory_of, parse
from softprune.bench.max_batch import max_batch
from softprune.bench.prompts import Workload
from softprune.cli import app
from softprune.errors import InputError
from tests.unit.fake_server import Behaviour, FakeServer

WORK = Workload(prompt_tokens=8, max_new_tokens=10)
SLOW = {"first_s": 0.05, "step_s": 0.04}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.mark.parametrize(
    ("engine", "full", "capacity", "why"),
    [
        ("vllm", "preempt", 5, "1 of 6 requests were preempted"),
        ("sglang", "preempt", 17, "1 of 18 requests were preempted"),
        ("vllm", "queue", 11, "queued: of 12 requests at most 11 ran at once"),
        ("sglang", "queue", 1, "queued: of 2 requests at most 1 ran at once"),
        ("vllm", "error", 6, "error at 7: batch 7, repeat"),
    ],
)
def test_finds_the_capacity(server: FakeServer, engine: str, full: str, capacity: int, why: str) -> None:
    server.behave(Behaviour(engine, **SLOW, capacity=capacity, full=full))
    document = max_batch(server.url, WORK, most=40, start=4, repeats=2)
    assert document["max_batch"] == capacity, document["tries"]
    assert document["limit"].startswith(why)
    assert document["next_failed"] == capacity + 1
    assert document["not_monotone"] == []
    assert (document["format"], document["version"], document["error"]) == ("softprune.max-batch", 1, None)
    tries = document["tries"]
    assert [one["batch"] for one in tries if one["kind"] == "repeat"] == [capacity] * 2
    assert all(one["ok"] == (one["batch"] <= capacity) for one in tries)
    assert document["result"]["batch"] == capacity
    assert len(document["result"]["repeats"]) == 2
    assert "streams" not in document["result"]["repeats"][0]
    assert document["result"]["total_tok_s"]["median"] > 0
    assert json.loads(json.dumps(document))["tries"] == tries


def test_without_streaming_the_gauge_decides(server: FakeServer) -> None:
    server.behave(Behaviour("vllm", 0.5, 0.015, capacity=3))
    document = max_batch(server.url, WORK, most=8, start=3, repeats=1, stream=False)
    assert (document["max_batch"], document["tries"][0]["together"], document["tries"][0]["max_running"]) == (3, None, 3)


def test_a_preemption_ends_its_pass(server: FakeServer) -> None:
    """It is known after 0.2 s of 1 s that it has failed."""
    server.behave(Behaviour("vllm", 0.1, 0.1, capacity=1, full="preempt"))
    document = max_batch(server.url, WORK, most=2, start=2, repeats=1)
    assert document["max_batch"] == 1
    assert document["limit"] == "1 of 2 requests were preempted by the time that one was seen"
    assert [one["total_tok_s"] is None for one in document["tries"]] == [True, False, False]


def test_bounds(server: FakeServer) -> None:
    """No size is tried above what was asked for, or above what the engine takes; not even one may run."""
    server.behave(Behaviour("vllm", **SLOW))
    for options, limit in (({"most": 6}, "--max = 6"), ({"most": 9, "max_running": 3}, "--max-running = 3")):
        document = max_batch(server.url, WORK, start=2, repeats=1, **options)
        size = int(limit.split()[-1])
        assert (document["max_batch"], document["limit"], document["next_failed"]) == (size, limit, None)
        assert max(one["batch"] for one in document["tries"]) == size


def test_nothing_runs(server: FakeServer) -> None:
    server.behave(Behaviour("vllm", **SLOW, fault="short", faulty=1))  # the warm-up is request 0
    document = max_batch(server.url, WORK, most=1, repeats=1)
    assert (document["max_batch"], document["result"]) == (None, None)
    assert "found 7 generated tokens" in document["limit"]


def test_a_repeat_that_fails_is_searched_below(server: FakeServer) -> None:
    """Requests: 1 of warm-up, 4, 8 (refused), 6, 7 (refused), then the second repeat of 6 fails."""
    server.behave(Behaviour("vllm", **SLOW, capacity=6, full="error", fault="short", faulty=1 + 4 + 8 + 6 + 7 - 2 - 1 + 7))
    document = max_batch(server.url, WORK, most=40, start=4, repeats=2)
    assert (document["max_batch"], document["not_monotone"], document["next_failed"]) == (5, [6], 6), document["tries"]
    assert document["limit"].startswith("error at 6")
    assert [one["batch"] for one in document["tries"] if one["kind"] == "repeat"] == [6, 6, 5, 5]


@pytest.mark.parametrize(("first", "sizes"), [(0, [6, 6, 6, 6]), (6, [6, 6, 6, 6])])
def test_requests_that_come_too_far_apart_are_asked_again(server: FakeServer, first: int, sizes: list[int]) -> None:
    """A request, of the search or of its first repeat, begins when the others have ended: 5 ran at once, and none was seen to wait."""
    server.behave(Behaviour("vllm", **SLOW, fault="late", faulty=1 + first + 5))
    document = max_batch(server.url, WORK, most=6, start=6, repeats=2)
    assert [one["batch"] for one in document["tries"]] == sizes, document["tries"]
    assert (document["max_batch"], document["not_monotone"]) == (6, [])


@pytest.mark.parametrize(("most", "found"), [(1, None), (2, 1)])
def test_a_repeat_that_fails_where_nothing_smaller_ran(server: FakeServer, most: int, found: int | None) -> None:
    """Requests: 1 of warm-up, `most` of the search, and the first of the repeat fails."""
    server.behave(Behaviour("vllm", **SLOW, fault="short", faulty=1 + most))
    document = max_batch(server.url, WORK, most=most, start=most, repeats=2)
    assert document["max_batch"] == found, document["tries"]
    assert (document["next_failed"], document["not_monotone"]) == (most, [most])
    assert re.match(rf"error at {most}: batch {most}, repeat 2, stream \d: found 7 generated tokens", document["limit"])
    assert (document["result"] is None) == (found is None)
    assert [one["batch"] for one in document["tries"]] == [most, most, *([1] * 3 if found else [])]


def test_a_search_out_of_time_goes_on(server: FakeServer) -> None:
    server.behave(Behaviour("vllm", **SLOW, capacity=9, full="error"))
    whole = max_batch(server.url, WORK, most=40, start=4, repeats=2)
    sizes = [one["batch"] for one in whole["tries"]]
    assert sizes == [4, 8, 16, 12, 10, 9, 9, 9]
    assert (whole["out_of_time"], whole["resumed"]) == (False, 0)
    none = max_batch(server.url, WORK, most=40, start=4, until=time.monotonic())
    assert (none["out_of_time"], none["tries"], none["limit"]) == (
        True, [], "not known: out of time with the answer between 0 and 40",
    )  # fmt: skip
    clock = Clock(4)
    part = max_batch(server.url, WORK, most=40, start=4, repeats=2, until=clock.end, progress=clock)
    assert [one["batch"] for one in part["tries"]] == sizes[:4]
    assert (part["out_of_time"], part["max_batch"], part["result"], part["error"]) == (True, None, None, None)
    assert part["limit"] == "not known: out of time with the answer between 8 and 11"
    part = json.loads(json.dumps(part))
    rest = max_batch(server.url, WORK, most=40, start=4, repeats=2, earlier=part)
    assert rest["tries"][:4] == part["tries"]
    assert ([one["batch"] for one in rest["tries"]], rest["resumed"]) == (sizes, 4)
    assert (rest["max_batch"], rest["limit"].startswith("error at 10: batch 10")) == (9, True)
    other = max_batch(server.url, Workload(8, 11), most=4, start=4, repeats=1, earlier=part)
    assert ([one["batch"] for one in other["tries"]], other["resumed"]) == ([4, 4], 0)
    # The size that failed in the first part is why the answer is what it is.
    least = max_batch(server.url, WORK, most=40, start=4, repeats=1, earlier={**part, "tries": part["tries"][2:]})
    assert least["max_batch"] == 9


class Clock:
    """An end of time that comes after so many tries."""

    def __init__(self, tries: int) -> None:
        self.tries, self.end = tries, End()

    def __call__(self, tried: object, number: int) -> None:
        if number == self.tries:
            self.end.over = True


class End(float):
    """Later than everything, until it is over."""

    over = False

    def __lt__(self, other: float) -> bool:
        return self.over


def test_no_address_in_the_document(server: FakeServer) -> None:
    """A server's error may name it."""
    url = server.url.replace("127.0.0.1", "localhost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softprune.bench.errors.BenchmarkError.__str__", lambda _: f"{url}: no room on localhost")
        server.behave(Behaviour("vllm", **SLOW, fault="short", faulty=1))
        document = max_batch(url, WORK, most=1, repeats=1)
        assert document["limit"] == "error at 1: the server: no room on the server"
        assert "localhost" not in json.dumps(document)


def test_a_server_that_goes_away_ends_the_search(tmp_path: Path) -> None:
    with FakeServer() as fake:
        fake.behave(Behaviour("vllm", **SLOW))
        kept: dict[str, Any] = {}

        def kill(tried: object, number: int) -> None:
            fake.process.kill()
            fake.process.wait()

        with pytest.raises(BenchmarkError, match="no connection") as caught:
            max_batch(fake.url, WORK, start=2, progress=kill, into=kept)
        assert caught.value.partial is kept
        assert [one["batch"] for one in kept["tries"]] == [2]
        assert kept["error"] == str(caught.value)


def test_refusals(server: FakeServer) -> None:
    server.behave(Behaviour("sglang", **SLOW, metrics=False))
    with pytest.raises(BenchmarkError, match="HTTP 404 at /metrics; expected the engine's metrics; start SGLang with --enable-metrics"):
        max_batch(server.url, WORK)
    server.behave(Behaviour("none", **SLOW))
    with pytest.raises(BenchmarkError, match="no version at vLLM's /version"):
        max_batch(server.url, WORK)
    for options, message in (({"most": 0}, "batches: found 0"), ({"step": 0}, "step: found 0"), ({"start": 0}, "start: found 0")):
        with pytest.raises(InputError, match=message):
            max_batch(server.url, WORK, **options)


def test_metrics_as_engines_write_them() -> None:
    text = """# HELP vllm:num_requests_running x
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\", c"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0"} 1e+00
vllm:num_preemptions_total{engine="0"} 7.0
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="260"} 1.0
process_open_fds 30
"""
    metrics = parse(text)
    assert load_of(metrics, "vLLM") == Load(running=5, waiting=1, preempted=7)
    assert metrics["vllm:num_requests_running"][0][0]["model_name"] == 'a \\"b\\", c'
    assert memory_of({}, metrics)["kv_tokens"] == 8320
    with pytest.raises(
        BenchmarkError, match="no sglang:num_running_reqs at /metrics; expected the engine's metrics, which SGLang has with"
    ):
        load_of(metrics, "SGLang")
    with pytest.raises(BenchmarkError, match="the engine None"):
        load_of(metrics, None)


def test_sglang_shows_priorities_beside_their_sum() -> None:
    lines = [
        'sglang:num_running_reqs{priority=""} 5.0', 'sglang:num_running_reqs{priority="1"} 5.0', "sglang:num_queue_reqs 0.0",
        "sglang:num_retracted_reqs 0.0",
    ]  # fmt: skip
    assert load_of(parse("\n".join(lines)), "SGLang") == Load(5, 0, 0)
    flags = {"memory_usage": {"weight": 12.5, "kvcache": 3.25, "token_capacity": 65536, "graph": {"decode": 0.25, "prefill": 0.5}}}
    for graphs, known in (({"decode": -0.7, "prefill": 0.5}, 0.5), (-0.02, 0.0), (0.9, 0.9), (None, None)):
        assert memory_of({"memory_usage": {**flags["memory_usage"], "graph": graphs}}, {})["graphs_gib"] == known
    assert memory_of(flags, {}) == {
        "weights_gib": 12.5, "kv_gib": 3.25, "graphs_gib": 0.75, "kv_tokens": 65536, "kv_blocks": None, "block_size": None,
    }  # fmt: skip


def test_other_requests_are_waited_for_and_named(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behave(Behaviour("vllm", **SLOW))
    monkeypatch.setattr("softprune.bench.max_batch.IDLE_SECONDS", 0.5)
    monkeypatch.setattr(engine_metrics, "load_of", lambda metrics, engine: Load(2, 1, 0))
    with pytest.raises(
        BenchmarkError, match="2 requests running and 1 waiting, none of them ours; expected a server that nobody else uses"
    ):
        max_batch(server.url, WORK)


def test_cli(server: FakeServer, tmp_path: Path) -> None:
    server.behave(Behaviour("sglang", **SLOW, capacity=3))
    out = tmp_path / "out.json"
    command = [
        "bench",
        "max-batch",
        "--url",
        server.url,
        "--prompt-tokens",
        "8",
        "--max-new-tokens",
        "10",
        "--start",
        "2",
        "--repeats",
        "2",
    ]
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [*command, "-o", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert document["max_batch"] == 3
    assert "largest batch 3" in result.output
    assert "limited by: queued: of 4 requests at most 3 ran at once" in result.output
    server.behave(Behaviour("vllm", **SLOW, fault="short", faulty=1))
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [*command, "--max", "1", "-o", str(out)])
    assert (result.exit_code, "not even 1 request of this length runs" in result.output) == (2, True), result.output
