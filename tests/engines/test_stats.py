"""Statistics of live traffic, in a real vLLM and a real SGLang on the CPU.

Run alone: pytest tests/engines/test_stats.py
Prompts of known lengths under two tags and under none, with a mask switch in between: in every layer, selections are tokens times top_k,
for each tag, phase and mask, and all of them together are what the route probe counted. `reap` and `eaft` count the same tokens, and what
they say of tokens' probabilities is what the server itself answers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprune.bench.server import Server
from softprune.bench.tiny.weights import HERE as TINY
from softprune.evaluate import eval_packs
from softprune.evaluate.eval_packs import Sizes
from softprune.evaluate.evaluate import EvalSettings, evaluate
from softprune.evaluate.served import TOKENS_CALL
from softprune.mask import ExpertMask
from softprune.server_client import ServerClient
from softprune.stats.collect_packs import load
from softprune.stats.file import Statistics, read
from softprune.stats.summary import complete
from tests.conftest import random_mask, random_prompts
from tests.engines.harness import API, VllmServer
from tests.engines.sglang_harness import generation
from tests.engines.sglang_harness import start as start_sglang

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
FLAGS = ["--softprune-stats", "eaft", "--softprune-max-tags", "4", "--softprune-debug-routes"]
CHUNK = 64
LONG = 1600
"""Tokens of an answer that is still being generated when three switches are over; on a machine with other things to do, when one is."""
TAGS = ("default", "chat", "code")


class Engine(ABC):
    """A server that was started with statistics, and how to ask it.

    Attributes:
        surplus: steps that may be launched of a request before the engine knows that it has ended; what they route is counted, too.
    """

    surplus = 0
    name: str

    def __init__(self, server: Server, mask: ExpertMask) -> None:
        self.server, self.mask = server, mask
        self.client = ServerClient(f"http://127.0.0.1:{server.port}", server.key)

    @abstractmethod
    def body(self, prompt: list[int], tokens: int, tag: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """Path and body of a call that generates; its tag stands where the engine hands it on."""

    @abstractmethod
    def scored(self, prompt: list[int], tokens: int, tag: str, spans: str | None = None) -> tuple[list[float], list[float]]:
        """Generate, and ask for log-probabilities: of the prompt's tokens from the second one on, and of the answer's."""

    @abstractmethod
    def cached(self, answer: Any) -> int:
        """Tokens of the prompt that the prefix cache answered."""

    def ask(self, prompt: list[int], tokens: int, tag: Any = None, header: str | None = None, **more: Any) -> tuple[int, Any]:
        path, body = self.body(prompt, tokens, tag, **more)
        call = urllib.request.Request(self.client.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        if header is not None:
            call.add_header("X-Softprune-Tag", header)
        try:
            with urllib.request.urlopen(call, timeout=120) as response:
                text = response.read()
                return response.status, None if body.get("stream") else json.loads(text)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def fetch(self, folder: Path, mask: str | None = None) -> Statistics:
        file = folder / f"{mask}.safetensors"
        file.write_bytes(self.client.stats_file(mask))
        return read(file)


class Vllm(Engine):
    name = "vllm"

    def body(self, prompt: list[int], tokens: int, tag: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        body = {"model": self.server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}  # type: ignore[attr-defined]
        return "/v1/completions", {**body, **({} if tag is None else {"vllm_xargs": {"softprune_tag": tag}})}

    def scored(self, prompt: list[int], tokens: int, tag: str, spans: str | None = None) -> tuple[list[float], list[float]]:
        given = {"softprune_tag": tag, **({} if spans is None else {"softprune_spans": spans})}
        status, answer = self.ask(prompt, tokens, prompt_logprobs=0, logprobs=0, vllm_xargs=given)
        assert status == 200, answer
        choice = answer["choices"][0]
        asked = [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)]
        return asked, choice["logprobs"]["token_logprobs"]

    def cached(self, answer: Any) -> int:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


class Sglang(Engine):
    name = "sglang"
    surplus = 1

    def body(self, prompt: list[int], tokens: int, tag: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        body = {**generation(prompt, tokens), **more}
        if tag is not None:
            body["sampling_params"]["custom_params"] = {"softprune_tag": tag}
        return "/generate", body

    def scored(self, prompt: list[int], tokens: int, tag: str, spans: str | None = None) -> tuple[list[float], list[float]]:
        sampling = generation(prompt, tokens)["sampling_params"]
        given = {"softprune_tag": tag, **({} if spans is None else {"softprune_spans": spans})}
        more = {"sampling_params": {**sampling, "custom_params": given}, "return_logprob": True, "logprob_start_len": 0}
        status, answer = self.ask(prompt, tokens, **more)
        assert status == 200, answer
        asked, drawn = (answer["meta_info"][f"{part}_token_logprobs"] for part in ("input", "output"))
        return [entry[0] for entry in asked[1:]], [entry[0] for entry in drawn]

    def cached(self, answer: Any) -> int:
        return int(answer["meta_info"]["cached_tokens"])


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("stats") / "server.log"
    env = {"SOFTPRUNE_TEST_STABLE_TOPK": "1"}
    if request.param == "vllm":
        args = ["--enable-prompt-tokens-details", "--max-num-batched-tokens", str(CHUNK), "--block-size", "32", "--enable-scale-out"]
        server: Server = VllmServer(models["qwen3-moe"], *FLAGS, *args, log=log, env=env)
    else:
        server = start_sglang(models["qwen3-moe"], log, *FLAGS, "--enable-metrics", env=env)
    kind = Vllm if request.param == "vllm" else Sglang
    with server:
        server.wait_ready()
        yield kind(server, random_mask(models["qwen3-moe"], 9, seed=5))
        server.stop(grace=0)


@pytest.fixture(autouse=True)
def _as_found(engine: Engine) -> Iterator[None]:
    """A test that fails must not make the next ones fail."""
    yield
    status = engine.client.status()
    if status["statistics"]["collecting"]:
        engine.client.stop_stats()
    if status["mask"] is not None:
        engine.client.switch(None)


def test_before_a_start_there_is_nothing(engine: Engine) -> None:
    assert engine.ask([1, 2, 3], 2, "chat")[0] == 200
    state = engine.client.status()["statistics"]
    assert (state["mode"], state["collecting"], state["masks"], state["unhooked_layers"]) == (None, False, [], [])
    for method, path, body, expected in (
        ("GET", "/stats", None, (404, "never_started")),
        ("POST", "/stats/stop", None, (409, "not_collecting")),
        ("POST", "/stats/start", {"mode": "reap", "sample": 0}, (400, "invalid_mode")),
        ("POST", "/stats/start", {"mode": "eaft", "attribution": "both"}, (400, "invalid_mode")),
        ("POST", "/stats/start", {"mode": "other"}, (400, "invalid_mode")),
        ("POST", "/stats/start", None, (400, "invalid_mode")),
    ):
        status, answer = engine.server.request(method, API + path, body)
        assert (status, answer["error"]["type"]) == expected
        assert engine.server.request(method, API + path, body, key="wrong")[0] == 401


def test_counts_are_tokens_times_top_k(engine: Engine, tmp_path: Path) -> None:
    """By tag, phase and mask; what the prefix cache answered is not routed, and what crosses a switch counts on both of its sides."""
    before = engine.client.routes(reset=True)["scheduled_tokens"]
    assert engine.client.start_stats()["collecting"] is True
    status, answer = engine.server.request("POST", API + "/stats/start", {"mode": "router"})
    assert (status, answer["error"]["type"]) == (409, "already_collecting")

    expected = {}
    for mask in (None, engine.mask):
        if mask is not None:
            engine.client.put_mask(mask)
        expected[mask.hash if mask else None] = _traffic(engine, seed=20 if mask is None else 21)
    probed = engine.client.routes()
    engine.client.stop_stats()
    engine.ask([5] * 30, 3, "chat")  # not collected

    top_k, total = engine.client.status()["top_k"], 0
    for epoch, (mask_hash, tokens) in enumerate(expected.items()):
        found = engine.fetch(tmp_path, mask_hash or "none")
        assert found.header.mask == mask_hash
        assert [one.epoch for one in found.header.epochs] == [epoch]
        for tag in TAGS:
            counted, requests = found.header.tokens[tag].model_dump(), tokens[tag].pop("requests")
            assert 0 <= counted["decode"] - tokens[tag]["decode"] <= engine.surplus * requests
            assert counted == {**tokens[tag], "decode": counted["decode"]}
        routed = sum(one.routed for one in found.header.tokens.values())
        assert routed == probed["scheduled_tokens"][epoch] - sum(before[epoch : epoch + 1])
        assert complete(found) is True
        count = found["router.count"]
        for tag in TAGS:
            place = found.tag_index(tag)
            assert (count[place, 0].sum(-1) == tokens[tag]["prefill"] * top_k).all()
            assert (count[place, 1].sum(-1) == found.header.tokens[tag].decode * top_k).all()
        assert np.allclose(found["router.gate_sum"].sum(-1) * top_k, count.sum(-1), atol=1e-3)
        if mask_hash is not None:
            for layer in range(count.shape[2]):
                assert count[:, :, layer, engine.mask.pruned(layer)].sum() == 0
        assert np.array_equal(count.sum((0, 1)), np.array(probed["epochs"][str(epoch)]["counts"]))
        total += int(count.sum())
    assert total > 0
    engine.client.put_mask(engine.mask)
    status, answer = engine.server.request("GET", API + "/stats?mask=sha256:" + "0" * 64)
    assert (status, answer["error"]["type"]) == (404, "nothing_counted")
    engine.client.switch(None)


def test_tags_of_the_call_that_takes_ids(engine: Engine, tmp_path: Path) -> None:
    """vLLM's; of SGLang all tests here ask such a call."""
    if engine.name != "vllm":
        pytest.skip("SGLang has no other")

    def ask(number: int, header: str | None, **extra: Any) -> tuple[int, Any]:
        sampling = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "detokenize": False, **extra}
        body = {"token_ids": random_prompts(1, 20, seed=600 + number)[0], "sampling_params": sampling}
        call = urllib.request.Request(engine.client.url + TOKENS_CALL, json.dumps(body).encode(), {"content-type": "application/json"})
        if header is not None:
            call.add_header("X-Softprune-Tag", header)
        try:
            with urllib.request.urlopen(call, timeout=120) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    engine.client.reset_stats()
    engine.client.start_stats("router")
    epoch = engine.client.status()["mask_epoch"]
    for number, (header, extra) in enumerate((("chat", {}), (None, {"extra_args": {"softprune_tag": "code"}}), (None, {}))):
        status, answer = ask(number, header, **extra)
        assert (status, answer["softprune"]) == (200, {"epochs": [epoch]})
    status, answer = ask(3, "chat", extra_args={"softprune_tag": "code"})
    assert (status, answer["error"]["type"]) == (400, "invalid_tag")
    engine.client.stop_stats()
    found = engine.fetch(tmp_path)
    for tag in TAGS:
        assert (found.header.tokens[tag].prefill, found.header.tokens[tag].decode) == (20, 3)


def _traffic(engine: Engine, seed: int) -> dict[str, dict[str, int]]:
    """Requests at once, under two tags and none, and one whose prompt was seen before; the tokens that are routed for each tag."""
    expected = {tag: {"prefill": 0, "decode": 0, "cached": 0, "requests": 0} for tag in TAGS}
    lengths = [(20, 5), (150, 9), (70, 1), (33, 12), (96, 7), (41, 3)]
    prompts = [random_prompts(1, length, seed=100 * seed + i)[0] for i, (length, _) in enumerate(lengths)]
    jobs = [(prompts[i], lengths[i][1], TAGS[i % 3]) for i in range(len(prompts))]

    def one(job: tuple[list[int], int, str]) -> Any:
        prompt, tokens, tag = job
        if tag == "code":
            return engine.ask(prompt, tokens, header=tag)
        return engine.ask(prompt, tokens, None if tag == "default" else tag)

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(one, jobs))
    again = (prompts[1], 4, "chat")
    answers.append(one(again))
    assert engine.cached(answers[-1][1]) > 0
    for (prompt, tokens, tag), (status, answer) in zip([*jobs, again], answers, strict=True):
        assert status == 200, answer
        cached = engine.cached(answer)
        # The last token of an answer is never run.
        for name, more in (("prefill", len(prompt) - cached), ("decode", tokens - 1), ("cached", cached), ("requests", 1)):
            expected[tag][name] += more
    return expected


def test_a_request_that_crosses_a_switch_counts_on_both_sides(engine: Engine, tmp_path: Path) -> None:
    engine.client.reset_stats()
    engine.client.start_stats()
    crossed = 0
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.ask, [7] * 40, LONG, "chat")
        for mask in (engine.mask, None, engine.mask):
            before = _routed(engine)
            while _routed(engine) == before and not running.done():
                pass
            if running.done():
                break
            engine.client.switch(mask)
            crossed += 1
        assert running.result()[0] == 200
    assert crossed > 0
    files = [engine.fetch(tmp_path, mask) for mask in ("none", engine.mask.hash)]
    engine.client.stop_stats()
    assert sum(len(file.header.runs) for file in files) == crossed + 1
    cached = sum(file.header.tokens["chat"].cached for file in files)
    assert sum(file.header.tokens["chat"].routed for file in files) in range(LONG + 39 - cached, LONG + 40 - cached + engine.surplus)
    for layer in range(files[1]["router.count"].shape[2]):
        assert files[1]["router.count"][:, :, layer, engine.mask.pruned(layer)].sum() == 0


def _routed(engine: Engine) -> int:
    """Tokens routed so far under the mask in force, in all its epochs."""
    status = engine.client.status()
    mask = (status["mask"] or {}).get("hash")
    tokens = [one for one in status["statistics"]["masks"] if one["mask"] == mask and one["epochs"][-1] == status["mask_epoch"]]
    return sum(count["prefill"] + count["decode"] for one in tokens for count in one["tokens"].values())


def test_reap_and_eaft_in_one_pass(engine: Engine, tmp_path: Path) -> None:
    """With all tokens sampled: REAP's counts are the router's, and the plane holds each token that counts once, by tag and kind."""
    engine.client.reset_stats()
    assert engine.client.start_stats("eaft", sample=1)["mode"] == "eaft"
    spans = {"chat": "1-40,77-150", "code": None}
    jobs = [("chat", 150, 6), ("code", 70, 1), ("chat", 151, 9), ("code", 33, 12), ("code", 128, 3)]
    prompts = random_prompts(len(jobs), 160, seed=900)

    def one(i: int) -> tuple[str, list[float], list[float]]:
        tag, length, tokens = jobs[i]
        asked, drawn = engine.scored(prompts[i][:length], tokens, tag, spans[tag])
        counted = asked[0:39] + asked[76:149] if tag == "chat" else asked
        return tag, counted, drawn

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(one, range(len(jobs))))
    status, answer = engine.ask(random_prompts(1, 50, seed=950)[0], 4, "chat")  # nobody asks for its prompt's probabilities
    assert status == 200, answer
    file = engine.fetch(tmp_path, "none")
    assert engine.client.stop_stats()["lost_samples"] == 0
    assert (file.header.modes, file.header.sampling) == (["router", "reap", "eaft"], {"reap": 1, "eaft": 1})
    assert np.array_equal(file["reap.count"], file["router.count"].sum(1))
    top_k = engine.client.status()["top_k"]
    for tag, more in (("chat", 4), ("code", 0)):
        place = file.tag_index(tag)
        given, drawn = ([score for one in found if one[0] == tag for score in one[kind]] for kind in (1, 2))
        assert file["eaft.hist"][place].sum((1, 2)).tolist() == [len(given), len(drawn) + more]
        per_layer = file["eaft.grid_count"][place].sum((2, 3, 4)) / top_k
        assert (per_layer == [[len(given)], [len(drawn) + more]]).all()
        assert file["eaft.nll_sum"][place, 0] == pytest.approx(-sum(given), rel=1e-3)
        assert file["eaft.p_sum"][place, 0] == pytest.approx(np.exp(given).sum(), rel=1e-3)
        if not more:
            assert file["eaft.nll_sum"][place, 1] == pytest.approx(-sum(drawn), rel=1e-3)
    assert (file["reap.norm_sum"] > 0).sum() == (file["reap.count"] > 0).sum()
    assert (file["reap.gate_norm_sum"] <= file["reap.norm_sum"]).all()


def test_sampled_under_masks(engine: Engine, tmp_path: Path) -> None:
    """Pruned experts have no norms, while shadow counts show what the unmasked router would choose; nothing of one mask under another."""
    engine.client.reset_stats()
    engine.client.put_mask(engine.mask)
    engine.client.routes(reset=True)
    engine.client.start_stats("reap", sample=2, shadow=True)
    for seed, mask in ((31, engine.mask), (32, None)):
        engine.client.switch(mask)
        for i, prompt in enumerate(random_prompts(4, 90, seed=seed)):
            assert engine.ask(prompt, 5, TAGS[i % 3])[0] == 200
    masked, unpruned = (engine.fetch(tmp_path, mask) for mask in (engine.mask.hash, "none"))
    probed = engine.client.routes()["epochs"]
    assert engine.client.stop_stats()["lost_samples"] == 0
    for file in (masked, unpruned):
        assert file.header.sampling == {"reap": 2, "shadow": 2}
        routed = sum(one.routed for one in file.header.tokens.values())
        assert routed in range(4 * 94, 4 * 94 + 4 * engine.surplus + 1)
        top_k = file.header.epochs[0].top_k[0]
        for name in ("reap.count", "router.shadow_count"):
            assert (abs(file[name].sum((0, 2)) - routed * top_k / 2) <= top_k).all()
        # Routers that were asked for shadow counts are not among what was selected.
        counts = sum(np.array(probed[str(epoch.epoch)]["counts"]) for epoch in file.header.epochs if str(epoch.epoch) in probed)
        assert np.array_equal(counts, file["router.count"].sum((0, 1)))
    # The router is asked again with other rows beside, so a tie of BF16 logits may fall the other way.
    moved = np.abs(unpruned["router.shadow_count"] - unpruned["reap.count"]).sum()
    assert moved <= 0.01 * unpruned["reap.count"].sum()
    for layer in range(masked["reap.count"].shape[1]):
        pruned = engine.mask.pruned(layer)
        assert masked["reap.count"][:, layer, pruned].sum() == 0
        assert masked["router.shadow_count"][:, layer, pruned].sum() > 0
    assert engine.server.request("POST", API + "/verify")[0] == 200


def test_tags_that_are_refused(engine: Engine) -> None:
    """400, also where the answer would be a stream."""
    known = engine.client.status()["statistics"]["tags"]
    assert set(known) == set(TAGS)
    assert engine.ask([1, 2], 1, "fourth")[0] == 200
    for tag, header, kind in (
        ("fifth", None, "too_many_tags"),
        (None, "fifth", "too_many_tags"),
        ("x" * 10_000, None, "invalid_tag"),
        ("", None, "invalid_tag"),
        (7, None, "invalid_tag"),
        ("a\nb", None, "invalid_tag"),
        ("chat", "code", "invalid_tag"),
    ):
        for stream in (False, True):
            status, answer = engine.ask([1, 2], 1, tag, header, stream=stream)
            assert (status, answer["error"]["type"]) == (400, kind)
    assert engine.ask([1, 2], 2, "chat", "chat", stream=True)[0] == 200
    assert "counted as default" not in engine.server.text()


def test_the_command_line(engine: Engine, tmp_path: Path) -> None:
    to = ["--url", engine.client.url, "--key", engine.server.key]

    def run(*args: str, fails: bool = False) -> str:
        command = [str(Path(sys.executable).with_name("softprune")), "stats", *args, *to]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == (2 if fails else 0), done.stdout + done.stderr
        return done.stdout + done.stderr

    run("reset")
    assert "collecting reap" in run("start", "--mode", "reap", "--sample", "1/4", "--shadow", "1/4")
    run("stop")
    run("reset")
    assert "collecting router" in run("start")
    assert "already_collecting" in run("start", fails=True)
    engine.ask(random_prompts(1, 50, seed=3000)[0], 4, "code")
    assert re.search(r"not collecting, 5[34] routed tokens under 1 masks", run("stop"))
    file = tmp_path / "s.safetensors"
    assert re.search("5[34] routed tokens", run("fetch", "--out", str(file)))
    assert read(file).header.tokens["code"].prefill == 50
    assert "nothing_counted" in run("fetch", "--out", str(file), "--mask", engine.mask.hash, fails=True)
    assert read(file).header.tokens["code"].prefill == 50


def test_packs_are_replayed(engine: Engine, tmp_path: Path) -> None:
    """By `softprune stats collect`, killed in the middle and run again: every token once, and what was drained is readable."""
    engine.client.switch(None)
    engine.client.reset_stats()
    packs = {}
    for tag, name in (("chat", "chat_if"), ("code", "code")):  # tags that the server has room for
        packs[tag] = shutil.copy(TINY / "packs" / f"{name}.parquet", tmp_path / f"{tag}.parquet")
    out, seq_len, blocks = tmp_path / "s.safetensors", 2 * CHUNK, 20
    command = [str(Path(sys.executable).with_name("softprune")), "stats", "collect", "--packs", *map(str, packs.values()), "-o", str(out)]
    command += ["--seq-len", str(seq_len), "--num-blocks", str(blocks), "--blocks-a-part", "4", "--concurrency", "2"]
    command += ["--mode", "eaft", "--sample", "1/4"]
    command += ["--url", engine.client.url, "--key", engine.server.key]
    parts = tmp_path / "s.safetensors.parts"
    state = parts / "state.json"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not state.exists() or len(json.loads(state.read_text())["parts"]) < 2:
            assert first.poll() is None
            time.sleep(0.002)
        first.kill()
    assert not out.exists()
    drained = [read(parts / f"000{number}.safetensors") for number in (1, 2)]
    assert [one.header.tokens[tag].prefill for one in drained for tag in packs] == [2 * seq_len] * 4
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    found, top_k = read(out), engine.client.status()["top_k"]
    assert complete(found) is True
    assert {tag: tokens.prefill for tag, tokens in found.header.tokens.items() if tokens.routed} == dict.fromkeys(packs, blocks * seq_len)
    for tag in packs:
        tokens = found.header.tokens[tag]
        assert tokens.cached == 0
        assert tokens.decode <= engine.surplus * blocks
        assert (found["router.count"][found.tag_index(tag), 0].sum(-1) == blocks * seq_len * top_k).all()
        keep = load([packs[tag]], engine.client.status()["model"], seq_len, blocks)[tag].keep
        drawn = blocks if engine.name == "vllm" else 0  # one token each, where there has to be an answer
        assert found["eaft.hist"][found.tag_index(tag)].sum((1, 2)).tolist() == [keep[:, 1:].sum(), drawn]
        sampled = found["reap.count"][found.tag_index(tag)].sum(-1)
        assert abs(sampled - blocks * seq_len * top_k / 4).max() <= len(found.header.runs) * 2 * top_k
    assert [len(one.hashes) for one in found.header.data_sets] == [blocks] * 2
    assert {run.id for one in drained for run in one.header.runs} < {run.id for run in found.header.runs}
    assert (engine.client.status()["statistics"]["collecting"], parts.exists()) == (False, False)


def test_a_masked_server_is_evaluated(engine: Engine, tmp_path: Path) -> None:
    """Past the prefix cache and in chunks; in blocks of L and, as L + 1, of the same ids, the numbers are the same; the mask is named."""
    files = [TINY / "packs" / f"{name}.parquet" for name in ("chat_if", "code")]
    engine.client.put_mask(engine.mask)
    found = {}
    for form, seq_len in (("L", 2 * CHUNK), ("L+1", 2 * CHUNK - 1)):
        sizes = Sizes((seq_len,), 8, form=form)  # type: ignore[arg-type]
        packs = eval_packs.load(files, engine.client.status()["model"], sizes)
        found[form] = evaluate(engine.client, packs, tmp_path / f"{form}.json", EvalSettings(concurrency=4))
        own = found[form].own
        assert (own["mask"], own["num_kept"], own["block_form"]) == (engine.mask.hash, engine.mask.num_kept, form)
        assert (own["fingerprint"], found[form].meta["engine"]) == (engine.client.status()["fingerprint"], engine.name)
        # Both cut blocks of the same ids here.
        blocks = packs.cells["UNION"][seq_len]
        scored = [engine.scored(ids.tolist(), 1, "chat")[0] for ids in blocks.ids]
        kept = np.concatenate([np.array(one)[keep[1:]] for one, keep in zip(scored, blocks.keep, strict=True)])
        cell = found[form].cell("UNION", seq_len)
        assert cell.tokens == len(kept) > 100
        assert cell.metrics["mean_nll"] == pytest.approx(-kept.mean(), rel=1e-3)
        assert cell.metrics["mean_prob"] == pytest.approx(np.exp(kept).mean(), rel=1e-3)
    one, other = (found[form].cell("UNION", seq_len) for form, seq_len in (("L", 2 * CHUNK), ("L+1", 2 * CHUNK - 1)))
    assert one.identity["blocks_sha256"] == other.identity["blocks_sha256"]
    assert one.metrics["mean_nll"] == pytest.approx(other.metrics["mean_nll"], rel=1e-3)
    assert one.metrics["mean_entropy"] == pytest.approx(other.metrics["mean_entropy"], rel=1e-3)
    engine.client.switch(None)
    unmasked = evaluate(engine.client, packs, tmp_path / "unmasked.json", EvalSettings(concurrency=4))
    assert unmasked.own["mask"] is None
    assert unmasked.cell("UNION", seq_len).metrics["mean_nll"] != pytest.approx(other.metrics["mean_nll"], rel=1e-3)


def test_prometheus_reads_the_tokens(engine: Engine) -> None:
    """Fresh at every scrape; the engine's own metrics are there as before."""
    engine.client.start_stats()
    engine.ask(random_prompts(1, 40, seed=4000)[0], 1, "chat")
    time.sleep(1.1)  # one question a second is asked of the engine
    with urllib.request.urlopen(f"{engine.client.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    engine.client.stop_stats()
    figures = dict(line.rsplit(" ", 1) for line in lines if line.startswith("softprune:stats_"))
    assert float(figures['softprune:stats_tokens{phase="prefill",tag="chat"}']) == 40
    assert [float(figures[f"softprune:stats_{name}"]) for name in ("collecting", "missed_tokens")] == [1, 0]
    assert len(figures) == 2 + 3 * len(engine.client.status()["statistics"]["tags"])
    assert any(line.startswith(f"{engine.name}:") for line in lines)
