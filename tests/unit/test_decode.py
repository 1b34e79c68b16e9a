"""The benchmark client's figures are those of a server whose times are known; what goes wrong is named, and loses nothing."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from softprune.bench import decode, options
from softprune.bench.decode import DecodeClient, Repeat, Step, Stream, measure
from softprune.bench.prompts import Api, ReportedError, Workload, counts_of_answer
from softprune.bench.server import free_port
from softprune.cli import app
from softprune.control import KEY_ENV, key_file
from softprune.errors import InputError
from softprune.server_client import ServerClient
from tests.unit.fake_server import SGLANG_INFO, Behaviour, FakeServer

ENGINES: dict[Api, str] = {"sglang": "sglang", "openai": "vllm"}
SMALL = Workload(prompt_tokens=8, max_new_tokens=6)
FAST = {"first_s": 0.02, "step_s": 0.005}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def passes(url: str, work: Workload, api: Api, stream: bool, batch: int, good: Callable[[Repeat], bool]) -> Repeat:
    """The first pass that is good, of at most thirty: a busy machine spoils some of them, a wrong client all."""

    async def run() -> Repeat:
        async with DecodeClient(url, work, api, stream) as client:
            for repeat in range(1, 31):
                result = await client.run_batch(batch, repeat)
                if good(result):
                    break
            return result

    return asyncio.run(run())


def test_the_key_is_found_as_other_clients_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SOFTPRUNE_KEY's for every server; a file's for servers on this machine only."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv(KEY_ENV, raising=False)
    key_file(7).parent.mkdir(parents=True)
    key_file(7).write_text("left")
    urls = ("http://localhost:7", "http://gpu-box.example:7")
    assert [DecodeClient(url, SMALL)._key for url in urls] == ["left", None]
    monkeypatch.setenv(KEY_ENV, "given")
    assert [DecodeClient(url, SMALL)._key for url in urls] == ["given"] * 2
    assert [ServerClient(url).key for url in urls] == ["given"] * 2


def near(found: float | None, known: float, share: float = 0.01) -> bool:
    return found is not None and abs(found / known - 1) <= share


def wrong(figures: dict[str, Any], known: dict[str, float], share: float) -> set[str]:
    """Names of the figures that are further from what is known."""
    found = {
        "total_tok_s": figures["total_tok_s"], "decode_tok_s": figures["decode_tok_s"], "per_stream": figures["per_stream_tok_s"]["p50"],
        "slowest": figures["per_stream_tok_s"]["min"], "ttft_s": figures["ttft_s"]["p50"], "inter_token": figures["inter_token_ms"]["p50"],
    }  # fmt: skip
    return {name for name, value in known.items() if not near(found[name], value, share)}


@pytest.mark.parametrize(("first_tokens", "chunk"), [(1, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_streaming_figures(server: FakeServer, api: Api, batch: int, first_tokens: int, chunk: int) -> None:
    first, step, length = 0.4, 0.012, 32 + first_tokens
    server.behave(Behaviour(ENGINES[api], first, step, first_tokens, chunk))
    known = {
        "total_tok_s": batch * length / (first + 32 * step), "decode_tok_s": batch / step, "per_stream": 1 / step, "slowest": 1 / step,
        "ttft_s": first, "inter_token": step * 1e3,
    }  # fmt: skip
    work = Workload(prompt_tokens=16, max_new_tokens=length)
    arrivals = [1 + 32 // chunk] * batch  # on a busy machine, two chunks may come together

    left = {*known, "arrivals"}

    def good(result: Repeat) -> bool:
        """Whether every figure has been right in some pass."""
        found = [len(stream.arrivals) for stream in result.streams]
        left.intersection_update(wrong(result.figures(), known, 0.01) | ({"arrivals"} if found != arrivals else set()))
        return not left

    result = passes(server.url, work, api, True, batch, good)
    assert not left, (known, {**result.figures(), "streams": [len(stream.arrivals) for stream in result.streams]})
    assert all(len(stream.inter_token_ms) == 32 for stream in result.streams)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_figures_without_streaming(server: FakeServer, api: Api, batch: int) -> None:
    server.behave(Behaviour(ENGINES[api], 0.4, 0.01))
    known = batch * 61 / 1.0
    result = passes(server.url, Workload(16, 61), api, False, batch, lambda result: near(result.total_tok_s, known))
    figures = result.figures()
    assert near(figures["total_tok_s"], known), figures
    assert not any(figures[name] for name in ("decode_tok_s", "per_stream_tok_s", "ttft_s", "inter_token_ms"))
    assert not any(request["body"]["stream"] for request in server.log())


def test_client_keeps_up_with_64_streams(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """8,000 tokens/s: 64 streams, one token each every 8 ms."""
    first, step, length = 0.4, 0.008, 150
    server.behave(Behaviour("vllm", first, step))
    known = {"total_tok_s": 64 * length / (first + (length - 1) * step), "decode_tok_s": 64 / step, "per_stream": 1 / step}
    known["inter_token"] = step * 1e3
    result = passes(server.url, Workload(64, length), "openai", True, 64, lambda result: not wrong(result.figures(), known, 0.03))
    figures = result.figures()
    with capsys.disabled():
        print(f"\n8,000 tok/s over 64 streams: client {result.client_cpu_share:.0%} of a core, {result.decode_tok_s:.0f} tok/s")
    assert not wrong(figures, known, 0.03), (known, {**figures, "streams": ...})
    assert 0 < result.client_cpu_share < 1


def test_a_client_that_is_kept_from_running_knows(server: FakeServer) -> None:
    server.behave(Behaviour("vllm", 0.1, 0.01))

    async def held_up() -> Repeat:
        async with DecodeClient(server.url, Workload(16, 250)) as client:
            asyncio.get_running_loop().call_later(1.0, time.sleep, 0.3)
            return await client.run_batch(2, 1)

    assert asyncio.run(held_up()).client_late_s >= 0.25


@pytest.mark.parametrize(("late", "wall", "told"), [(0.06, 5.9, True), (0.06, 6.1, False), (0.04, 0.1, False)])
def test_a_client_that_ran_too_late_is_told_of(late: float, wall: float, told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"repeats": [{"client_late_s": late, "wall_s": wall}, {"client_late_s": 0.0, "wall_s": wall}]}]
    options.warn_of_client(Console(width=300), rows)
    assert ("warning: in 1 of 2 passes, this client was kept from running for up to 0.06 s" in capsys.readouterr().out) is told


def test_figures_by_hand() -> None:
    """Two streams, the second one late and with two tokens in a chunk."""
    one = Stream(0, 4, None, 4, 0.0, 4.1, ((1.0, 1), (2.0, 2), (3.0, 3), (4.0, 4)))
    two = Stream(1, 4, 2, 4, 0.1, 5.5, ((2.5, 1), (3.5, 3), (5.5, 4)))
    figures = Repeat(2, 1, (one, two), 0.5, 0.0).figures()
    assert figures["wall_s"] == 5.5
    assert figures["total_tok_s"] == 8 / 5.5
    assert figures["decode_tok_s"] == (2 + 3) / 3.0
    assert figures["per_stream_tok_s"] == {"p50": 1.0, "min": 1.0, "max": 1.0}
    assert figures["ttft_s"] == pytest.approx({"p50": 1.7, "p90": 2.26, "p99": 2.386, "max": 2.4})
    assert two.inter_token_ms == [500.0, 500.0, 2000.0]
    assert figures["inter_token_ms"]["p50"] == 1000.0
    assert figures["streams"][1]["cached_tokens"] == 2
    single = Repeat(1, 1, (Stream(0, 4, None, 1, 0.0, 1.0, ((1.0, 1),)),), 0.0, 0.0).figures()
    assert (single["decode_tok_s"], single["per_stream_tok_s"], single["inter_token_ms"]) == (None, None, None)


def test_median_and_spread() -> None:
    assert decode.spread([10.0, 14.0, 11.0]) == {"median": 11.0, "min": 10.0, "max": 14.0, "spread": 4 / 11}
    assert decode.spread([10.0, 14.0]) == {"median": 12.0, "min": 10.0, "max": 14.0, "spread": 4 / 12}
    assert decode.spread([10.0, None]) is None


def test_prompts_differ_and_are_reproducible() -> None:
    work = Workload(32, 4, seed=3)
    prompts = {(b, r, s): tuple(work.prompt(b, r, s)) for b in (1, 8, 11) for r in (-1, 0, 1, 2, 11) for s in range(b)}
    assert len(set(prompts.values())) == len(prompts)
    assert all(len(prompt) == 32 and min(prompt) >= 100 and max(prompt) <= 999 for prompt in prompts.values())
    assert Workload(32, 4, seed=4).prompt(8, 1, 0) != work.prompt(8, 1, 0) == Workload(32, 9, seed=3).prompt(8, 1, 0)
    assert work.prompt(8, 1, 0)[:4] == [114, 612, 199, 627]
    assert set(Workload(99, 4, token_ids=(5, 7)).prompt(1, 1, 0)) == {5, 6}


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_what_is_sent(server: FakeServer, api: Api) -> None:
    """Every pass has its own prompts, its requests go out on connections that were open, and ask for a forced length."""
    server.behave(Behaviour(ENGINES[api], **FAST))
    steps: list[Step] = []
    document = measure(server.url, SMALL, [1, 5], repeats=2, warmup=2, progress=steps.append)
    log = server.log()
    field = "input_ids" if api == "sglang" else "prompt"
    prompts = [tuple(request["body"][field]) for request in log]
    expected = [tuple(SMALL.prompt(b, r, s)) for b in (1, 5) for r in (-1, 0, 1, 2) for s in range(b)]
    assert sorted(prompts) == sorted(set(expected))
    assert all(request["open"] for request in log)
    body = {name: value for name, value in log[0]["body"].items() if name != field}
    assert body == {
        "sglang": {"sampling_params": {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0}, "stream": True},
        "openai": {
            "model": "served-name", "max_tokens": 6, "ignore_eos": True, "temperature": 0, "repetition_penalty": 1.0, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    }[api]  # fmt: skip
    assert [(step.result.batch, step.result.repeat, step.done) for step in steps] == [
        (b, r, i * 4 + r + 2) for i, b in enumerate((1, 5)) for r in (-1, 0, 1, 2)
    ]
    assert [row["batch"] for row in document["results"]] == [1, 5]
    for row in document["results"]:
        speeds = [repeat["total_tok_s"] for repeat in row["repeats"]]
        assert [repeat["repeat"] for repeat in row["repeats"]] == [1, 2]
        assert row["total_tok_s"] == decode.spread(speeds)


FAULTS = {
    "short": (decode.LengthError, "found 3 generated tokens (finish reason length); expected 6"),
    "long": (decode.LengthError, "found 8 generated tokens (finish reason length); expected 6"),
    "prompt": (decode.LengthError, "found 7 prompt tokens (finish reason length); expected 8"),
    "stall": (decode.StallError, "found no bytes for 2 s; expected some"),
    "die": (decode.ServerGoneError, "; expected 6 tokens and an end mark"),
    "500": (decode.HttpStatusError, "found HTTP 500 with body"),
    "cut": (decode.ServerGoneError, "found the end of the stream after 2 tokens; expected an end mark"),
    "error": (decode.ServerReportedError, "found the server's error 'CUDA out of memory'; expected an answer"),
}

# Those that an answer in one piece can have.
WHOLE = set(FAULTS) - {"cut", "error"}


@pytest.mark.parametrize("api", ["sglang", "openai"])
@pytest.mark.parametrize(("fault", "stream"), [(fault, stream) for fault in FAULTS for stream in (True, False) if stream or fault in WHOLE])
def test_faults_are_named_and_lose_nothing(server: FakeServer, api: Api, fault: str, stream: bool) -> None:
    """A stream in the second repeat of batch 3 fails: batch 1 and the first repeat of batch 3 stay."""
    cls, message = FAULTS[fault]
    server.behave(Behaviour(ENGINES[api], **FAST, fault=fault, faulty=10))
    start = time.monotonic()
    with pytest.raises(decode.BenchmarkError) as caught:
        measure(server.url, SMALL, [1, 3], repeats=2, warmup=1, stream=stream, stall_seconds=2, notes={"a": "/b/c"})
    assert time.monotonic() - start < 30
    error = caught.value
    assert type(error) is cls
    # Which of the three connections the server takes first is its own affair.
    assert (error.batch, error.repeat, error.stream in (0, 1, 2)) == (3, 2, True), error
    assert str(error).startswith(f"batch 3, repeat 2, stream {error.stream}: ")
    assert message in str(error)
    assert "/opt" not in str(error)
    assert len(str(error)) < 250
    assert error.partial is not None
    assert error.partial["error"] == str(error)
    assert [(row["batch"], len(row["repeats"])) for row in error.partial["results"]] == [(1, 2), (3, 1)]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_refused_connection_and_strangers(server: FakeServer) -> None:
    with pytest.raises(decode.ServerGoneError) as gone:
        measure(f"http://127.0.0.1:{free_port()}", SMALL, [1])
    assert str(gone.value) == "benchmark: found no connection (Connection refused); expected a server that listens"
    assert gone.value.partial is None
    server.behave(Behaviour("none", **FAST, fault="short"))
    with pytest.raises(decode.BenchmarkError, match="no version at vLLM's /version"):
        measure(server.url, SMALL, [1])
    with pytest.raises(decode.LengthError, match="batch 1, warm-up 1, stream 0: found 3 generated"):
        measure(server.url, SMALL, [1], api="openai")
    assert measure(server.url, SMALL, [1], 1, api="openai")["engine"] == {"name": None, "version": None}


def test_answers_that_are_none() -> None:
    aborted = {"meta_info": {"finish_reason": {"type": "abort", "message": "out of memory"}, "completion_tokens": 3, "prompt_tokens": 8}}
    for api, body, message in (
        ("sglang", json.dumps(aborted), "abort: out of memory"),
        ("openai", json.dumps({"choices": [{"finish_reason": None}], "usage": None}), "no token counts"),
        ("openai", "<html>", "<html>"),
        ("openai", json.dumps({"error": {"message": "bad"}}), "bad"),
        ("sglang", json.dumps({"error": "worse"}), "worse"),
    ):
        with pytest.raises(ReportedError, match=message):
            counts_of_answer(api, body.encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches: found 0; expected at least 1"),
        ({"batches": [4, 4]}, "each size once"),
        ({"repeats": 0}, "repeats: found 0"),
        ({"warmup": -1}, "warmup: found -1"),
        ({"url": "127.0.0.1:30000"}, "--url: found '127.0.0.1:30000'; expected http://HOST:PORT"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        measure(**{"url": "http://127.0.0.1:1", "workload": SMALL, "batches": [1], **change})
    assert message in str(caught.value)


def test_metadata(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader needs to repeat it, and nothing of the machine it ran on."""
    monkeypatch.delenv(KEY_ENV, raising=False)
    monkeypatch.setattr(decode, "local_gpus", lambda: None)
    server.behave(Behaviour("sglang", **FAST, key="right", cached=3, text=False))
    document = measure(server.url, SMALL, [2], 1, key="right", gpu="Mine", notes={"why": "mask /home/me/keep24.json", "n": "1"})
    assert (document["format"], document["version"], document["error"]) == ("softprune.decode-benchmark", 1, None)
    assert (document["engine"], document["model"]) == ({"name": "SGLang", "version": "0.5.17"}, "gpt-oss-20b")
    assert document["server_flags"] == {
        "tp_size": 2, "moe_runner_backend": "triton_kernel", "cuda_graph_max_bs": 64, "disable_radix_cache": True, "dtype": "bfloat16",
        "load_format": "odd_loader", "max_total_num_tokens": 123456, "memory_usage": {"weight": 12.5}, "max_model_len": 4096,
    }  # fmt: skip
    assert document["softprune"] == {
        "fingerprint": "sha256:cd", "mask_hash": "sha256:ab", "num_kept": [24, 24], "top_k": 2, "moe_backend": "triton",
        "moe_tiles": "mask",
    }  # fmt: skip
    assert document["gpu"] == "NVIDIA Fake"
    assert document["notes"] == {"why": "mask keep24.json", "n": "1"}
    assert document["settings"] == {
        "prompt_tokens": 8, "max_new_tokens": 6, "seed": 0, "token_ids": (100, 1000), "batches": [2], "warmup": 1, "repeats": 1,
        "stream": True, "api": "sglang", "stall_seconds": 60.0,
    }  # fmt: skip
    assert [stream["cached_tokens"] for stream in document["results"][0]["repeats"][0]["streams"]] == [3, 3]
    text = json.dumps(document)
    for secret in ("/", "gpu-box-7", "sk-secret", "127.0.0.1", "right"):
        assert secret not in text.replace("tok/s", ""), secret
    assert "/data" in json.dumps(SGLANG_INFO)
    wrong = measure(server.url, SMALL, [1], 1, key="wrong", gpu="Mine")
    assert (wrong["softprune"], wrong["gpu"]) == (None, "Mine")
    server.behave(Behaviour("vllm", **FAST))
    plain = measure(server.url, SMALL, [1], 1, key="right")
    assert (plain["softprune"], plain["engine"]["name"], plain["model"]) == (None, "vLLM", "gpt-oss-20b")


def cli(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(argument) for argument in ("bench", "decode", *arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_cli(server: FakeServer, tmp_path: Path) -> None:
    out, sizes = tmp_path / "out.json", ("--prompt-tokens", 8, "--max-new-tokens", 6, "--repeats", 2)
    server.behave(Behaviour("sglang", **FAST))
    code, output = cli("--url", server.url, "--batch", "1,3", *sizes, "--note", "mask=keep24", "--token-ids", "5-9", "-o", out)
    assert code == 0, output
    document = json.loads(out.read_text())
    assert [row["batch"] for row in document["results"]] == [1, 3]
    assert document["notes"] == {"mask": "keep24"}
    assert document["settings"]["token_ids"] == [5, 10]
    assert "gpt-oss-20b on SGLang 0.5.17" in output
    assert f"{document['results'][1]['total_tok_s']['median']:,.1f}" in output
    assert "prefix cache" not in output
    server.behave(Behaviour("sglang", **FAST, cached=8))
    code, output = cli("--url", server.url, "--batch", "2", *sizes, "--no-stream", "-o", out)
    assert code == 0, output
    assert json.loads(out.read_text())["results"][0]["inter_token_p50_ms"] is None
    assert "warning: 32 prompt tokens came from the server's prefix cache" in output


def test_cli_keeps_what_was_measured(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    server.behave(Behaviour("vllm", **FAST, fault="die", faulty=4))
    sizes = ("--prompt-tokens", 8, "--max-new-tokens", 6, "--repeats", 1)
    code, output = cli("--url", server.url, "--batch", "1,3", *sizes, "-o", out)
    assert code == 2
    assert output.strip().startswith("error: batch 3, warm-up 1, stream ")
    assert len(output.strip().splitlines()) == 1
    document = json.loads(out.read_text())
    assert document["error"].startswith("batch 3, warm-up 1")
    assert [row["batch"] for row in document["results"]] == [1]


def test_cli_refuses_before_it_measures(server: FakeServer, tmp_path: Path) -> None:
    server.behave(Behaviour())
    for given, message in (
        (("-o", tmp_path / "none" / "out.json"), "no such folder"),
        (("-o", tmp_path / "out.json", "--batch", "1;2"), "expected whole numbers, e.g. 1,8,32"),
        (("-o", tmp_path / "out.json", "--note", "x"), "expected KEY=VALUE"),
        (("-o", tmp_path / "out.json", "--token-ids", "9-5"), "token_ids: found 9 to 6"),
    ):
        code, output = cli("--url", server.url, *given)
        assert (code, message in output) == (2, True), output
    assert not server.log()


def test_the_command_line_starts_without_aiohttp() -> None:
    check = "import sys, softprune.cli; assert 'aiohttp' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
