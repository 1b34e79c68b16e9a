"""Switching the mask of a real vLLM server while it answers.

Run alone: pytest tests/engines/test_live.py
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from softprune.bench.prompts import Workload
from softprune.mask import ExpertMask
from tests.conftest import Evidence, heldout_prompts, random_mask, saved
from tests.engines.bench_checks import check_comparison, check_largest
from tests.engines.conftest import Masked
from tests.engines.harness import API, Live, Stream, VllmServer, scores

pytestmark = pytest.mark.engine
# Few slots and blocks: requests wait in the queue, and are preempted.
SMALL = ["--softprune-debug-routes", "--enable-prompt-tokens-details", "--max-num-seqs", "32", "--block-size", "32"]
STREAMS, SWITCHES = 40, 200


@pytest.fixture(scope="module")
def live_masks(models: dict[str, Path]) -> list[ExpertMask]:
    return [random_mask(models["gpt-oss"], keep, seed=seed) for keep, seed in ((24, 11), (16, 12), ([20, 4, 32, 11], 13))]


@pytest.fixture(scope="module")
def live(models: dict[str, Path], live_masks: list[ExpertMask], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("live") / "server.log"
    with VllmServer(models["gpt-oss"], *SMALL, "--num-gpu-blocks-override", "260", log=log) as server:
        server.wait_ready()
        yield Live(server, live_masks)


def test_put_live_is_the_same_as_at_launch(live: Live, masked: Masked) -> None:
    """To the last bit, against a server that was started with the mask; and without it the old values are back."""
    prompts = heldout_prompts(8, 96, seed=51)
    unmasked = scores(live.server, prompts)
    assert masked.mask.hash == live.masks[0].hash
    live.put(live.masks[0])
    assert scores(live.server, prompts) == scores(masked.server, prompts) != unmasked
    live.put(None)
    assert scores(live.server, prompts) == unmasked
    assert live.server.request("POST", API + "/verify") == (200, {"obeyed": True, "detail": None})


def test_status_mask_and_metrics_tell_what_is_in_force(live: Live) -> None:
    done = live.put(live.masks[1])
    status = live.status()
    assert status["moe_tiles"] == "engine", "on a CPU there are no others"
    assert (status["mask_epoch"], status["mask"]["hash"]) == (done["epoch"], live.masks[1].hash)
    assert (status["launch_mask"], status["after_restart"]) == (None, "the launch mask")
    assert "a restart returns to the launch mask" in live.server.text()
    assert ExpertMask.parse(live.server.request("GET", API + "/mask")[1]["mask"], "").hash == live.masks[1].hash
    metrics = live.server.get_text("/metrics")
    assert f"softprune:mask_epoch {done['epoch']:.1f}" in metrics
    assert 'softprune:kept_experts{layer="2"} 16.0' in metrics
    assert "softprune:mask_switch_seconds_count" in metrics
    assert 'softprune:mask_switches_total{result="done"}' in metrics


@pytest.mark.timeout(300)
def test_many_switches_under_many_streams(live: Live, evidence: Evidence) -> None:
    """Nothing fails or comes short, and each step ran under the mask of the epoch that its requests name.

    The probe, in the worker, counts selections by epoch; the scheduler counts the tokens of the steps that it stamped. If they
    agree in every epoch, a response's epochs are those that its tokens ran under.
    """
    live.server.request("DELETE", API + "/routes")
    first = live.put(live.masks[0])["epoch"]
    prompts, lengths = iter(heldout_prompts(4000, 100, seed=61)), itertools.cycle((24, 40, 56))
    stop = threading.Event()

    def client() -> list[tuple[int, Stream]]:
        answers = []
        while not stop.is_set():
            length = next(lengths)
            answers.append((length, live.server.stream(next(prompts), length)))
        return answers

    hashes, seconds = {first: live.masks[0].hash}, []
    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(client) for _ in range(STREAMS)]
        try:
            for turn in range(1, SWITCHES + 1):
                mask = live.masks[turn % 3]
                began = time.perf_counter()
                hashes[live.put(mask)["epoch"]] = mask.hash
                seconds.append(time.perf_counter() - began)
                time.sleep(0.05)
        finally:
            stop.set()
        answers = [answer for one in clients for answer in one.result()]

    assert list(hashes) == list(range(first, first + SWITCHES + 1))
    for length, answer in answers:
        assert len(answer.tokens) == length
        assert answer.epochs == sorted(set(answer.epochs))  # with gaps, where it waited
        assert first <= answer.epochs[0] <= answer.epochs[-1] <= first + SWITCHES
    status, body = live.server.request("GET", f"{API}/requests/{answers[-1][1].id}")
    assert (status, body["epochs"], body["finished"]) == (200, answers[-1][1].epochs, True)
    assert body["masks"] == {str(epoch): hashes[epoch] for epoch in body["epochs"]}
    assert live.server.request("GET", f"{API}/requests/nobody")[0] == 404

    routes = live.server.request("GET", API + "/routes")[1]
    by_hash = {mask.hash: mask for mask in live.masks}
    for epoch, mask_hash in hashes.items():
        found, mask = routes["epochs"][str(epoch)], by_hash[mask_hash]
        for layer, counts in enumerate(found["counts"]):
            assert found["tokens"][layer] == routes["scheduled_tokens"][epoch], (epoch, layer)
            assert sum(counts) == found["tokens"][layer] * 4
            assert sum(counts[i] for i in mask.pruned(layer)) == 0, (epoch, layer)
    crossed = sum(len(answer.epochs) > 1 for _, answer in answers)
    preempted = live.server.metric("vllm:num_preemptions_total")
    assert crossed > 30
    assert preempted > 0
    assert live.status()["crossed_requests"] == 0
    seconds.sort()
    evidence("vllm_cpu.live.switches", {
        "switches": SWITCHES, "streams": STREAMS, "responses": len(answers), "crossed": crossed, "preemptions": preempted,
        "most_epochs_of_a_response": max(len(answer.epochs) for _, answer in answers),
        "http_ms": {"p50": round(1000 * seconds[len(seconds) // 2], 2), "p99": round(1000 * seconds[-3], 2)},
    })  # fmt: skip


def test_a_users_own_salt_still_separates(live: Live) -> None:
    live.put(live.masks[0])
    prompt = heldout_prompts(1, 200, seed=72)[0]
    assert [live.first_token(prompt, cache_salt=salt)[1] > 0 for salt in ("x", "y", "x")] == [False, False, True]


def test_the_command_line_switches_and_proves(live: Live, tmp_path: Path) -> None:
    """`softprune server` and `softprune selftest`, as a user runs them; the selftest leaves the mask that it found."""
    mask = saved(live.masks[2], tmp_path / "c.json")
    to = ["--url", f"http://127.0.0.1:{live.server.port}", "--key", live.server.key]

    def run(*args: str) -> str:
        done = subprocess.run([str(Path(sys.executable).with_name("softprune")), *args, *to], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("server", "apply", mask, "--wait", "30")
    assert live.status()["mask"]["hash"] == live.masks[2].hash
    assert json.loads(run("server", "status", "--json"))[0]["mask"]["hash"] == live.masks[2].hash
    report = run("selftest", "--batch", "4", "--tokens", "16", "--token-ids", "0-480")
    assert "FAIL" not in report
    assert live.status()["mask"]["hash"] == live.masks[2].hash
    run("server", "clear")
    assert live.status()["mask"] is None


def test_an_answer_that_a_stop_string_ends_names_its_epochs(live: Live) -> None:
    """vLLM's front end ends it, and the engine core sends no last output."""
    epoch = live.put(live.masks[1])["epoch"]
    prompt = heldout_prompts(1, 40, seed=83)[0]
    stop = live.server.complete(prompt, 40)["choices"][0]["text"][10]
    answer = live.server.complete(prompt, 40, stop=[stop])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["softprune"] == {"epochs": [epoch]}


def test_an_id_that_is_used_again_names_the_new_epochs(live: Live) -> None:
    def ask() -> list[int]:
        body = {"model": live.server.model, "prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}
        call = urllib.request.Request(f"http://127.0.0.1:{live.server.port}/v1/completions", json.dumps(body).encode())
        call.add_header("content-type", "application/json")
        call.add_header("X-Request-Id", "again")
        with urllib.request.urlopen(call, timeout=60) as response:
            return list(json.load(response)["softprune"]["epochs"])

    first = live.put(live.masks[0])["epoch"]
    assert ask() == [first]
    live.put(live.masks[1])
    assert ask() == [first + 1]


def test_drain_lets_running_requests_finish_under_their_mask(live: Live) -> None:
    old = live.put(live.masks[0])["epoch"]
    started: Future[None] = Future()
    prompt, other = heldout_prompts(2, 64, seed=81)

    def on_chunk(count: int) -> None:
        if count >= 20 and not started.done():
            started.set_result(None)

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(live.server.stream, prompt, 800, on_chunk)
        started.result(60)
        switch = pool.submit(live.put, live.masks[1], "?in_flight=drain")
        time.sleep(0.7)
        assert not running.done()
        later = pool.submit(live.server.stream, other, 8)
        assert running.result(120).epochs == [old]
        assert later.result(120).epochs == [old + 1]
        assert switch.result(120)["epoch"] == old + 1


def test_what_is_refused_changes_nothing(live: Live, models: dict[str, Path]) -> None:
    mask = live.masks[0]
    before = live.put(mask)
    good = json.loads(mask.dump())
    foreign = {**good, "model": {**good["model"], "fingerprint": "sha256:" + "0" * 64}}
    qwen = json.loads(random_mask(models["qwen3-moe"], 9).dump())
    for body, query, expected in (
        (foreign, "", (400, "invalid_mask")),
        (qwen, "", (400, "invalid_mask")),
        ({**good, "top_k": 2}, "", (409, "top_k_is_fixed_at_launch")),
        ({**good, "keep": good["keep"][1:]}, "", (400, "invalid_mask")),
        (good, "?in_flight=never", (400, "invalid_in_flight")),
        (good, "?in_flight=retract", (409, "in_flight_not_supported")),
        ([], "", (400, "invalid_mask")),
    ):
        status, answer = live.server.request("PUT", API + "/mask" + query, body)
        assert (status, answer["error"]["type"]) == expected
    for key in ("", "wrong"):
        for method, path in (("PUT", "/mask"), ("DELETE", "/mask"), ("GET", "/mask"), ("POST", "/verify"), ("GET", "/requests/x")):
            assert live.server.request(method, API + path, good, key=key)[0] == 401
    _hang_up(live.server, mask.dump().encode())
    now = live.status()
    assert (now["mask"]["hash"], now["mask_epoch"]) == (mask.hash, before["epoch"])


def _hang_up(server: VllmServer, body: bytes) -> None:
    """Begin a PUT, and go in the middle of its body."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"PUT {API}/mask HTTP/1.1\r\nHost: x\r\nX-Softprune-Key: {server.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: len(body) // 2])
        time.sleep(0.3)


def test_too_large_a_body_is_refused_unread(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live.server.port)) as connection:
        head = f"PUT {API}/mask HTTP/1.1\r\nHost: x\r\nX-Softprune-Key: {live.server.key}\r\nContent-Length: 16000001\r\n\r\n"
        connection.sendall(head.encode())
        connection.settimeout(20)
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_masks_are_compared(live: Live, models: dict[str, Path]) -> None:
    check_comparison(live.server, models["gpt-oss"], live.masks[1])


def test_the_largest_batch_is_found(live: Live) -> None:
    """Bounded by --max-num-seqs; and, of long requests, by blocks: the layers' two kinds take 17 and 6 of the 260."""
    found = check_largest(live.server, Workload(16, 112), 32, "queued: of 33 requests at most 32 ran at once", start=32, most=33)
    assert found["memory"]["kv_blocks"] == 260
    check_largest(live.server, Workload(480, 64), 11, "of 12 requests were preempted", start=10, most=12)
