"""Masks switched live in SGLang, in real server processes on the CPU.

Run alone: pytest tests/engines/test_sglang_live.py
One server that was started without a mask, with the prefix cache on and prefills in small chunks; tests/evidence has one of two ranks.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from softprune.bench.prompts import Workload
from softprune.bench.server import Server
from softprune.mask import ExpertMask
from tests.conftest import Evidence, random_mask, random_prompts
from tests.engines.bench_checks import check_comparison, check_largest
from tests.engines.harness import API
from tests.engines.sglang_harness import CHUNK, TOP, Client, Pause, difference, epochs, generation, mixed_then_asked, start

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
SWITCHES, CLIENTS = 200, 32


@pytest.fixture(scope="module")
def masks(models: dict[str, Path]) -> dict[str, ExpertMask]:
    return {name: random_mask(models["qwen3-moe"], 9, seed=seed) for seed, name in enumerate("ABCD")}


@pytest.fixture(scope="module")
def live(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server that was started without a mask."""
    log = tmp_path_factory.mktemp("live") / "one.log"
    with start(models["qwen3-moe"], log, "--softprune-control", "--softprune-debug-routes", "--enable-metrics") as server:
        server.wait_ready()
        yield Client(server)
        server.stop(grace=0)


def test_removing_a_mask_restores_the_loaded_routers(live: Client, masks: Any) -> None:
    """To the last bit, and a mask changes them."""
    prompts = random_prompts(6, 2 * CHUNK, seed=1)
    before = live.scores(prompts)
    live.switch(masks["A"])
    assert live.scores(prompts) != before
    live.switch(None)
    assert live.scores(prompts) == before


def test_every_api_names_its_epochs(live: Client, masks: Any) -> None:
    """Native and OpenAI's, whole, batched and streamed; `GET requests/{id}` says the same."""
    now = live.switch(masks["A"])
    prompts = random_prompts(3, 20, seed=2)
    native = live.server.request("POST", "/generate", {**generation([], 3), "input_ids": prompts})[1]
    assert [epochs(one) for one in native] == [[now]] * 3
    assert "softprune" not in native[0]["meta_info"]["finish_reason"]
    assert epochs(live.stream(prompts[0], 3)) == [now]
    found = live.server.request("GET", f"{API}/requests/{native[1]['meta_info']['id']}")[1]
    assert (found["epochs"], found["masks"], found["finished"]) == ([now], {str(now): masks["A"].hash}, True)
    plain = {"model": "m", "max_tokens": 3, "ignore_eos": True}
    for path, body in (
        ("/v1/completions", {"prompt": "a b c"}),
        ("/v1/completions", {"prompt": ["a b c", "d"], "n": 2, "temperature": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        status, answer = live.server.request("POST", path, {**plain, **body})
        assert status == 200, answer
        assert answer["softprune"] == {"epochs": [now]}
        call = urllib.request.Request(
            f"http://127.0.0.1:{live.server.port}{path}", data=json.dumps({**plain, **body, "stream": True}).encode(),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(call, timeout=60) as response:
            chunks = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
        assert [chunk["softprune"] for chunk in chunks if "softprune" in chunk][-1] == {"epochs": [now]}


def test_no_kv_of_another_mask_is_ever_found(live: Client, masks: Any, evidence: Evidence) -> None:
    """A request that ran under two masks leaves nothing mixed behind."""
    prompt = random_prompts(1, 3 * CHUNK, seed=3)[0]
    found = mixed_then_asked(live, masks, prompt)
    evidence("sglang_cpu.live.cache", found)
    assert found == {"epochs": 3, "hit": len(prompt), "difference": 0.0, "common": TOP}


def test_hits_are_those_of_the_mask_in_force(live: Client, masks: Any) -> None:
    """None right after a switch, as many as before after switching back, and users' own keys still separate."""
    prompt, own = random_prompts(1, 4 * CHUNK, seed=4)[0], {"extra_key": "mine"}
    full = len(prompt) - 1  # the last token is always computed

    def hits(**more: Any) -> list[int]:
        return [live.ask(prompt, **more)["meta_info"]["cached_tokens"] for _ in range(2)]

    for mask in (masks["A"], masks["B"], None):
        live.switch(mask)
        assert hits() == [0, full]
        assert hits(**own) == [0, full]
    for mask in (masks["A"], masks["B"], None):
        live.switch(mask)
        assert hits() == [full, full]
        assert hits(**own) == [full, full]
        live.switch(mask)  # the same mask again is another epoch, and the same cache
        assert hits() == [full, full]


def test_a_prefill_in_chunks_crosses_a_switch(live: Client, masks: Any) -> None:
    """Under both masks; what it had computed before is found under the first, and nothing under the second."""
    prompt = random_prompts(1, 40 * CHUNK, seed=5)[0]
    now = live.switch(masks["A"])
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(live.ask, prompt, 8, rid="chunked")
        live.wait_begun("chunked")
        live.switch(masks["B"])
        answer = run.result()
    assert epochs(answer) == [now, now + 1]
    assert len(answer["output_ids"]) == 8
    cached, hit = live.next_token(prompt)
    fresh, _ = live.next_token(prompt, extra_key="chunks B")
    assert (hit, difference(cached, fresh)) == (0, 0.0)
    live.switch(masks["A"])
    cached, hit = live.next_token(prompt)
    fresh, _ = live.next_token(prompt, extra_key="chunks A")
    print("chunks of the first mask:", hit / CHUNK)
    assert 0 < hit < len(prompt)
    assert (hit % CHUNK, difference(cached, fresh)) == (0, 0.0)


def test_drain(live: Client, masks: Any) -> None:
    """What runs ends under the old mask, what comes waits for the new one, and the API answers meanwhile."""
    now = live.switch(masks["A"])
    prompts, waiting = random_prompts(8, CHUNK, seed=6), random_prompts(1, CHUNK, seed=7)[0]
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(live.stream, ids, 400, rid=f"drained{i}") for i, ids in enumerate(prompts)]
        for i in range(8):
            live.wait_begun(f"drained{i}")
        switch = pool.submit(live.switch, masks["B"], "drain")
        while not live.status()["draining"]:
            assert not switch.done()
        late = pool.submit(live.ask, waiting, 4)
        status = live.status()
        assert (status["mask_epoch"], status["draining"], status["mask"]["hash"]) == (now, True, masks["A"].hash)
        assert switch.result() == now + 1
        assert [epochs(one.result()) for one in running] == [[now]] * 8
        assert all(one.result()["meta_info"]["completion_tokens"] == 400 for one in running)
        assert epochs(late.result()) == [now + 1]
    assert live.status()["draining"] is False
    assert live.ask(waiting)["meta_info"]["cached_tokens"] == CHUNK - 1
    live.switch(masks["A"], "drain")  # with nothing running
    assert live.ask(waiting)["meta_info"]["cached_tokens"] == 0  # it came while A was in force, and ran under B


def test_retract(live: Client, masks: Any) -> None:
    """Running requests are computed again under the new mask and go on where they were."""
    now = live.switch(masks["A"])
    pauses, length = [Pause() for _ in range(4)], 8 * CHUNK
    with ThreadPoolExecutor(4) as pool:
        prompts = random_prompts(4, CHUNK, seed=8)
        running = [pool.submit(live.stream, ids, length, pause) for ids, pause in zip(prompts, pauses, strict=True)]
        for pause in pauses:
            pause.until(CHUNK)
        live.switch(masks["B"], "retract")
        answers = [one.result() for one in running]
    assert [epochs(one) for one in answers] == [[now, now + 1]] * 4
    assert all(one["meta_info"]["num_retractions"] == 1 for one in answers)
    assert all(len(one["output_ids"]) == length for one in answers)


def test_retracted_requests_leave_the_new_masks_kv(live: Client, masks: Any) -> None:
    """Exactly what a prefill of the same text computes under the new mask, although the text was begun under another."""
    prompt, pause = random_prompts(1, CHUNK, seed=11)[0], Pause()
    live.switch(masks["A"])
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(live.stream, prompt, 8 * CHUNK, pause)
        pause.until(CHUNK)
        live.switch(masks["B"], "retract")
        answer = run.result()
    ids = [*prompt, *answer["output_ids"][:CHUNK]]  # computed in two chunks after the switch
    ids += random_prompts(1, CHUNK, seed=12)[0]
    cached, hit = live.next_token(ids)
    fresh, _ = live.next_token(ids, extra_key="retracted")
    assert (hit, difference(cached, fresh)) == (2 * CHUNK, 0.0)
    live.switch(masks["A"])
    assert live.next_token(ids)[1] == CHUNK


def test_a_paused_engine_switches(live: Client, masks: Any) -> None:
    """Also what it holds in place while it is paused, and it stays paused."""
    now, pause = live.switch(masks["A"]), Pause()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(live.stream, random_prompts(1, CHUNK, seed=13)[0], 8 * CHUNK, pause)
        pause.until(CHUNK)
        assert live.server.request("POST", "/pause_generation", {"mode": "in_place"})[0] == 200
        live.switch(masks["B"])
        live.switch(masks["C"], "retract")
        time.sleep(0.3)
        assert not run.done()
        assert live.server.request("POST", "/continue_generation", {})[0] == 200
        answer = run.result()
    assert (epochs(answer), len(answer["output_ids"])) == ([now, now + 2], 8 * CHUNK)


def test_a_drain_is_given_up_when_the_engine_is_paused(live: Client, masks: Any) -> None:
    """What runs would never end, and the switch would wait for it and keep all others waiting."""
    now, pause = live.switch(masks["A"]), Pause()
    path, body = f"{API}/mask?in_flight=drain", json.loads(masks["B"].dump())
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(live.stream, random_prompts(1, CHUNK, seed=17)[0], 12 * CHUNK, pause)
        pause.until(CHUNK)
        drain = pool.submit(live.server.request, "PUT", path, body)
        while not live.status()["draining"]:
            assert not drain.done()
        assert live.server.request("POST", "/pause_generation", {"mode": "in_place"})[0] == 200
        status, answer = drain.result(30)
        assert (status, answer["error"]["type"]) == (409, "engine_is_paused")
        status = live.status()
        assert (status["mask_epoch"], status["draining"], status["mask"]["hash"]) == (now, False, masks["A"].hash)
        assert live.switch(masks["C"]) == now + 1
        assert live.server.request("POST", "/continue_generation", {})[0] == 200
        answer = run.result()
    assert (epochs(answer), len(answer["output_ids"])) == ([now, now + 1], 12 * CHUNK)


def test_switches_under_load(live: Client, masks: Any, evidence: Evidence) -> None:
    """Nothing fails, every answer is whole and names its epochs, and no step selects an expert that its epoch's mask prunes."""
    cycle = [masks[name] for name in "ABC"]
    first, stop, answers, failed = live.switch(cycle[0]), threading.Event(), [], []
    live.server.request("DELETE", f"{API}/routes")
    first = live.switch(cycle[0])
    in_force = {first: cycle[0]}

    def keep_asking(number: int) -> None:
        prompts = iter(random_prompts(1000, 24, seed=100 + number))
        while not stop.is_set():
            try:
                answers.append(live.stream(next(prompts), 16))
            except Exception as error:  # noqa: BLE001 - whatever a client is told is a failure of the server here
                failed.append(error)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(CLIENTS)]
        began, times = time.perf_counter(), []
        for number in range(1, SWITCHES + 1):
            asked = time.perf_counter()
            in_force[live.switch(cycle[number % 3])] = cycle[number % 3]
            times.append(time.perf_counter() - asked)
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        stop.set()
        for client in clients:
            client.result()
    routes = live.server.request("GET", f"{API}/routes")[1]
    crossed = sum(len(epochs(one)) > 1 for one in answers)
    evidence("sglang_cpu.live.load", {
        "switches": SWITCHES, "clients": CLIENTS, "answers": len(answers), "crossed": crossed, "seconds": round(seconds, 1),
        "switch_ms_median": round(1000 * sorted(times)[SWITCHES // 2], 1), "switch_ms_max": round(1000 * max(times), 1),
    })  # fmt: skip
    assert failed == []
    assert len(answers) >= CLIENTS
    assert crossed > 0
    assert all(one["meta_info"]["completion_tokens"] == len(one["output_ids"]) == 16 for one in answers)
    for one in answers:
        named = epochs(one)
        assert named
        assert set(named) <= set(in_force)
        assert named == sorted(set(named))  # not all between: a step may be another request's prefill
    for epoch, mask in in_force.items():
        counted = routes["epochs"][str(epoch)]
        pruned = [sum(counted["counts"][layer][i] for i in mask.pruned(layer)) for layer in range(4)]
        assert pruned == [0] * 4, f"epoch {epoch}"
        assert counted["tokens"] == [routes["scheduled_tokens"][epoch]] * 4, f"epoch {epoch}"
    named_tokens = sum(routes["scheduled_tokens"][first:])
    assert named_tokens > 1000
    assert live.status()["crossed_requests"] == 0  # none is left behind


def test_requests_that_are_given_up_are_forgotten(live: Client, masks: Any) -> None:
    """Aborted while running, while chunked and while queued: none stays in the ledger."""
    live.switch(masks["A"])
    prompts = [*random_prompts(3, CHUNK, seed=9), *random_prompts(2, 40 * CHUNK, seed=10)]
    with ThreadPoolExecutor(5) as pool:
        running = [
            pool.submit(live.server.request, "POST", "/generate", {**generation(ids, 1000), "rid": f"gone{i}"})
            for i, ids in enumerate(prompts)
        ]
        live.wait_begun("gone0")
        assert live.server.request("GET", f"{API}/requests/gone0")[1]["finished"] is False
        live.switch(masks["B"])
        assert live.server.request("POST", "/abort_request", {"rid": "", "abort_all": True})[0] == 200
        for one in running:
            one.result()
    assert live.status()["crossed_requests"] == 0
    found = live.server.request("GET", f"{API}/requests/gone0")[1]
    assert (found["finished"], len(found["epochs"])) == (True, 2)


def foreign(mask: ExpertMask, **model: Any) -> dict[str, Any]:
    """A mask as JSON, for another model."""
    data = json.loads(mask.dump())
    data["model"].update(model)
    return data


def test_refused_masks_change_nothing(live: Client, models: Any, masks: Any) -> None:
    live.switch(masks["A"])
    before = live.status()
    other_top_k = random_mask(models["qwen3-moe"], 9, seed=1, top_k=2)
    cases: list[tuple[Any, int, str]] = [
        (foreign(masks["B"], fingerprint="sha256:" + "0" * 64), 400, "invalid_mask"),
        (foreign(masks["B"], architecture="GptOssForCausalLM"), 400, "invalid_mask"),
        (json.loads(other_top_k.dump()), 409, "top_k_is_fixed_at_launch"),
        ({"nonsense": 1}, 400, "invalid_mask"),
    ]
    for body, status, kind in cases:
        found = live.server.request("PUT", f"{API}/mask", body)
        assert (found[0], found[1]["error"]["type"]) == (status, kind), found
    assert live.server.request("PUT", f"{API}/mask?in_flight=never", json.loads(masks["B"].dump()))[0] == 400
    assert live.server.request("PUT", f"{API}/mask", json.loads(masks["B"].dump()), key="wrong")[0] == 401
    assert live.server.request("DELETE", f"{API}/mask", key="")[0] == 401
    hang_up(live.server, masks["B"].dump().encode())
    assert live.status() == before
    assert live.server.request("POST", f"{API}/verify")[1] == {"obeyed": True, "detail": None}
    assert live.server.request("GET", f"{API}/mask")[1]["mask"] == json.loads(masks["A"].dump())


def hang_up(server: Server, body: bytes) -> None:
    """Send half a mask and go."""
    head = f"PUT {API}/mask HTTP/1.1\r\nhost: x\r\nX-Softprune-Key: {server.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body[: len(body) // 2])
        time.sleep(0.2)
    time.sleep(0.2)


def test_metrics(live: Client, masks: Any) -> None:
    """Beside the engine's own on its /metrics."""
    epoch = live.switch(masks["A"])
    with urllib.request.urlopen(f"http://127.0.0.1:{live.server.port}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("softprune:"))
    assert float(found["softprune:mask_epoch"]) == epoch
    assert float(found['softprune:kept_experts{layer="3"}']) == 9
    assert float(found['softprune:mask_switches_total{result="done"}']) == epoch
    assert float(found["softprune:mask_switch_seconds_count"]) == epoch


def test_masks_are_compared(live: Client, models: dict[str, Path], masks: Any) -> None:
    check_comparison(live.server, models["qwen3-moe"], masks["A"])


def test_the_largest_batch_is_found(live: Client) -> None:
    """As far as was asked for; the metrics are those that SGLang 0.5.17 has once it has served."""
    found = check_largest(live.server, Workload(64, 112), 4, "--max = 4", start=3, most=4)
    assert found["memory"]["kv_tokens"] == 16384


def test_the_first_server_is_well(live: Client) -> None:
    """After all of that: SGLang's own checks of its memory when idle have found nothing."""
    time.sleep(0.5)
    assert live.server.process.poll() is None
    log = live.server.text()
    assert "leak" not in log
    assert "Traceback" not in log
