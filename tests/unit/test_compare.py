"""A comparison measures in turns, says what was in force, and leaves a server as it found it, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from softprune.bench import roofline
from softprune.bench import sides as sides_module
from softprune.bench.compare import Masks, Urls, compare
from softprune.bench.decode import BenchmarkError, Step, measure
from softprune.bench.errors import HttpStatusError
from softprune.bench.hollow import hollow_checkpoint
from softprune.bench.prompts import Workload
from softprune.bench.step_limits import StepLimits
from softprune.checkpoint.presets import PRESETS, gpt_oss
from softprune.cli import app
from softprune.control import KEY_ENV
from softprune.errors import InputError, SoftpruneError
from softprune.mask import ExpertMask
from softprune.server_client import ServerCallError, ServerClient, without_address
from softprune.server_mask import mask_put_back
from softprune.sweep import decode as sweep_decode
from softprune.sweep.decode import Decode, decode_beside
from tests.unit.fake_control import REFUSED, FakeControl, FakeEngine, ServedFake, make_launch, make_mask
from tests.unit.fake_server import Behaviour, FakeServer

SMALL = Workload(prompt_tokens=8, max_new_tokens=6)
FAST = {"first_s": 0.02, "step_s": 0.005}
OPTIONS: dict[str, Any] = {"api": "openai", "key": "right"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedFake]:
    """A server of three layers with 8 experts, and a mask in force."""
    monkeypatch.setenv(KEY_ENV, "right")
    with ServedFake(FakeControl(FakeEngine(launch=make_launch(debug_routes=True)))) as fake:
        fake.engine.step_s = (0.002, 0.001)
        ServerClient(fake.url).put_mask(mask_of(3, fake))
        fake.api.asked.clear()
        yield fake


def mask_of(keep: int, fake: ServedFake) -> ExpertMask:
    return make_mask([list(range(keep))] * 3, fake.engine.ranks[0])


def masks(fake: ServedFake) -> Masks:
    return Masks(fake.url, None, mask_of(4, fake), ("none", "keep4.json"))


def test_two_servers_in_turns(server: FakeServer) -> None:
    """Every pass has prompts of its own; the document is what its description says."""
    server.behave(Behaviour("vllm", 0.06, 0.06, second=1.5))
    steps: list[tuple[str, Step]] = []
    document = compare(
        Urls(server.url, server.second), SMALL, [1, 3], repeats=3, warmup=1, gpu="Mine", progress=lambda *step: steps.append(step)
    )
    assert (document["format"], document["version"], document["error"]) == ("softprune.decode-comparison", 1, None)
    assert [(name, step.result.batch, step.result.repeat) for name, step in steps] == [
        (letter, batch, place) for batch in (1, 3) for place, letter in enumerate("ababbaab", -1)
    ]
    assert [step.done for _, step in steps] == list(range(1, 17))
    assert {step.total for _, step in steps} == {16}
    prompts = [tuple(request["body"]["prompt"]) for request in server.log()]
    assert len(prompts) == len(set(prompts)) == 8 * 1 + 8 * 3
    assert set(document["sides"]) == {"a", "b"}
    assert document["sides"]["a"]["engine"] == {"name": "vLLM", "version": "0.32.0"}
    assert (document["settings"]["way"], document["settings"]["api"], document["bandwidth"]) == ("urls", "openai", None)
    for row in document["results"]:
        assert row["order"] == "ABBAAB"
        assert [one["repeat"] for one in row["a"]["repeats"]] == [1, 4, 5]
        assert [one["repeat"] for one in row["b"]["repeats"]] == [2, 3, 6]
        for figure in ("decode_tok_s", "total_tok_s")[row["figure"] == "total_tok_s" :]:
            a, b = ([one[figure] for one in row[side]["repeats"]] for side in "ab")
            assert row["ratio"][figure]["pairs"] == [second / first for first, second in zip(a, b, strict=True)]
        assert row["ratio"][row["figure"]]["median"] > 1.1
        assert row["roofline"] is None
        assert row["says"].startswith("B is ") or row["says"].startswith("no difference")
    assert json.loads(json.dumps(document))["results"] == document["results"]


def test_without_streaming(server: FakeServer) -> None:
    server.behave(Behaviour("sglang", **FAST))
    row = compare(Urls(server.url, server.second), SMALL, [2], 1, 0, stream=False)["results"][0]
    assert (row["figure"], row["ratio"]["decode_tok_s"], row["ratio"]["total_tok_s"]["verdict"]) == ("total_tok_s", None, "too few pairs")


def test_masks_are_switched_and_put_back(live: ServedFake) -> None:
    live.engine.step_s = (0.06, 0.03)
    before = live.api.in_force
    sides = masks(live)
    document = compare(sides, SMALL, [1, 2], repeats=4, warmup=1, **OPTIONS)
    a, b = (document["sides"][name]["softprune"] for name in "ab")
    assert sides.b is not None
    assert (a["mask_hash"], a["num_kept"]) == (None, None)
    assert (b["mask_hash"], b["num_kept"]) == (sides.b.hash, [4, 4, 4])
    assert [document["sides"][name]["name"] for name in "ab"] == ["none", "keep4.json"]
    assert before is not None
    assert live.api.in_force is not None
    assert live.api.in_force.hash == before.hash
    # Looked at A and B; then AB|ABBAABBA twice, each switch only where the side changes; then put back.
    letters = "AB" + "ABABBAABBA" * 2
    changes = [letter for letter, last in zip(letters, " " + letters, strict=False) if letter != last]
    found = ["A" if text is None else "B" for text, _ in live.api.asked]
    assert found == [*changes, "B"]
    assert document["results"][0]["ratio"]["total_tok_s"]["median"] > 1.2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(3), BenchmarkError(None, None, None, "a fault", "none")])
def test_the_mask_is_put_back_whatever_happens(live: ServedFake, error: BaseException | type[BaseException]) -> None:
    before, document = live.api.in_force, {}

    def stop(name: str, step: Step) -> None:
        if step.done == 5:
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        compare(masks(live), SMALL, [1], repeats=4, warmup=1, progress=stop, into=document, **OPTIONS)
    assert before is not None
    assert live.api.in_force is not None
    assert live.api.in_force.hash == before.hash
    assert document["error"]
    assert document["results"][0]["order"] == "ABB"
    assert [len(document["results"][0][side]["repeats"]) for side in "ab"] == [1, 2]  # the pass without its pair is kept
    assert len(document["results"][0]["ratio"]["total_tok_s"]["pairs"]) == 1


def test_a_pass_that_fails_keeps_what_was_measured(server: FakeServer) -> None:
    server.behave(Behaviour("vllm", **FAST, fault="500", faulty=4))
    with pytest.raises(HttpStatusError, match="batch 1, repeat 3, stream 0") as caught:
        compare(Urls(server.url, server.second), SMALL, [1], repeats=2)
    assert caught.value.partial is not None
    assert caught.value.partial["error"] == str(caught.value)
    assert caught.value.partial["results"][0]["order"] == "AB"


def test_a_signal_puts_the_mask_back(live: ServedFake, tmp_path: Path) -> None:
    """As `timeout` sends it, and Ctrl-C; and what was measured is written."""
    live.engine.step_s = (0.01, 0.01)
    before, mask, out = live.api.in_force, tmp_path / "b.json", tmp_path / "out.json"
    mask.write_text(mask_of(4, live).dump())
    # What a shell started in the background ignores Ctrl-C, and so do its children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from softprune.cli import app; app()"
    command = [sys.executable, "-c", code, "bench", "compare", "--url", live.url, "--mask-a", "none", "--mask-b", str(mask)]
    command += ["--api", "openai", "--batch", "1", "--prompt-tokens", "8", "--max-new-tokens", "8", "--repeats", "500", "-o", str(out)]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        live.api.asked.clear()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, KEY_ENV: "right"})
        deadline = time.monotonic() + 60
        while len(live.api.asked) < 6 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        output = process.communicate(timeout=30)
        assert process.returncode not in (0, -number), output
        assert live.api.in_force is not None
        assert before is not None
        assert live.api.in_force.hash == before.hash
        assert "interrupted after" in json.loads(out.read_text())["error"]


def test_a_mask_that_cannot_be_put_back_is_named(live: ServedFake) -> None:
    before = live.api.in_force

    def stop(name: str, step: Step) -> None:
        live.api.switches = [REFUSED]
        raise KeyboardInterrupt

    with pytest.raises(SoftpruneError) as caught:
        compare(masks(live), SMALL, [1], progress=stop, **OPTIONS)
    assert before is not None
    assert f"NOT PUT BACK: mask {before.hash} was in force before" in str(caught.value)


def test_nobody_else_may_switch(live: ServedFake) -> None:
    def meddle(name: str, step: Step) -> None:
        if step.done == 4:  # the next pass is B's, which is in force already
            ServerClient(live.url).delete_mask()

    with pytest.raises(BenchmarkError, match="someone else switched the mask during the pass"):
        compare(masks(live), SMALL, [1], progress=meddle, **OPTIONS)
    assert live.api.in_force is None, "what somebody wanted meanwhile stays"


@pytest.mark.parametrize("two_urls", [False, True])
def test_a_switch_between_passes_is_noticed(live: ServedFake, two_urls: bool) -> None:
    def meddle(*_: Any) -> None:
        ServerClient(live.url).delete_mask()

    def benchmark() -> None:
        if two_urls:
            compare(Urls(live.url, live.url), SMALL, [1], progress=meddle, **OPTIONS)
        else:
            measure(live.url, SMALL, [1], 3, api="openai", progress=meddle)

    with pytest.raises(BenchmarkError, match=r"mask epoch 2: someone switched the mask meanwhile; expected epoch 1"):
        benchmark()


def test_a_mask_that_somebody_put_meanwhile_stays(live: ServedFake) -> None:
    client, before, theirs = ServerClient(live.url), live.api.in_force, mask_of(5, live)

    def use(*masks: ExpertMask | None, meddled: bool = True) -> None:
        with mask_put_back(client):
            for mask in masks:
                client.switch(mask)
            if meddled:
                ServerClient(live.url).switch(theirs)

    with pytest.raises(SoftpruneError, match=f"somebody else switched .* not mask {before.hash if before else ''}"):
        use(mask_of(4, live))
    assert live.api.in_force == theirs
    use(mask_of(4, live), None, meddled=False)
    assert live.api.in_force == theirs


def test_a_switch_of_which_nothing_is_known_is_taken_back(live: ServedFake, monkeypatch: pytest.MonkeyPatch) -> None:
    client, before, call = ServerClient(live.url), live.api.in_force, ServerClient._call
    lost: list[Any] = []

    def unanswered(self: ServerClient, method: str, *args: Any) -> Any:
        answer = call(self, method, *args)
        if method == "PUT" and not lost:
            lost.append(answer)
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(ServerClient, "_call", unanswered)
    with pytest.raises(KeyboardInterrupt), mask_put_back(client):
        client.switch(mask_of(4, live))
    assert live.api.in_force == before


def test_refusals_before_anything_is_measured(server: FakeServer, live: ServedFake) -> None:
    server.behave(Behaviour("vllm", **FAST))
    foreign = Masks(server.url, None, mask_of(4, live))
    with pytest.raises(ServerCallError, match="started with --softprune-control"):
        compare(foreign, SMALL, [1])
    assert not server.log()
    live.api.switches = [None, REFUSED]
    with pytest.raises(ServerCallError, match="409 refused: not now"):
        compare(masks(live), SMALL, [1], **OPTIONS)
    assert "/v1/completions" not in live.engine.seen
    with pytest.raises(InputError, match="repeats: found 0"):
        compare(masks(live), SMALL, [1], repeats=0)


def test_addresses_stay_out_of_the_document(server: FakeServer) -> None:
    """Whatever an error names."""
    named = {name: url.replace("127.0.0.1", "localhost") for name, url in (("a", server.url), ("b", server.second))}
    server.behave(Behaviour("vllm", **FAST))

    def fail(name: str, step: Step) -> None:
        raise ServerCallError(named["b"], None, "", f"no route to {named['a']}/x of LOCALHOST")

    document: dict[str, Any] = {}
    with pytest.raises(ServerCallError, match="localhost"):
        compare(Urls(named["a"], named["b"]), SMALL, [1], progress=fail, into=document)
    assert document["error"] == "server B: no answer: no route to server A/x of the server's host"


def test_without_address() -> None:
    one = {"the server": "https://GPU-box.example:8443/base/"}
    text = "https://gpu-box.example:8443/base: HTTP 500 from gpu-box.example."
    assert without_address(text, one) == "the server: HTTP 500 from the server."
    text = "GPU-BOX.example:8443, not gpu-box.example.org or my-gpu-box.example"
    assert without_address(text, one) == "the server, not gpu-box.example.org or my-gpu-box.example"
    two = {"server A": "http://h:80", "server B": "http://[::1]:300"}
    assert without_address("h:80 http://h [::1]:300 http://[::1]:3000 ::1", two).startswith("server A http://server A server B http://")
    assert "::1" not in without_address("http://[::1]:3000 ::1", two)
    assert without_address("as it is", {}) == "as it is"


def test_keys_of_two_servers(server: FakeServer) -> None:
    server.behave(Behaviour("vllm", **FAST, key="one"))
    options: list[tuple[tuple[str | None, str | None], str | None, list[bool]]] = [
        (("one", None), None, [True, False]), ((None, None), None, [False, False]), (("one", "one"), None, [True, True]),
        ((None, "two"), "one", [True, False]),
    ]  # fmt: skip
    for keys, key, seen in options:
        document = compare(Urls(server.url, server.second, keys=keys), SMALL, [1], 1, 0, key=key)
        assert [document["sides"][name]["softprune"] is not None for name in "ab"] == seen


def test_statistics_that_do_not_fit_are_refused_before_a_pass(live: ServedFake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a mask keeps was counted in one layer."""
    shape = gpt_oss(num_layers=3, num_experts=8, hidden=128, intermediate=128, heads=4, kv_heads=2, vocab=1024)
    monkeypatch.setitem(PRESETS, "odd", shape)
    hollow_checkpoint("odd", tmp_path / "odd")
    counts = np.ones((3, 8), np.int64)
    counts[1, :4] = 0
    monkeypatch.setattr(roofline, "decode_counts", lambda _: counts)
    monkeypatch.setattr(sides_module, "_has_probe", lambda _: False)
    statistics: Any = SimpleNamespace(source="stats.safetensors", header=SimpleNamespace(tokens={}, mask=None))
    limits = StepLimits({"a": tmp_path / "odd", "b": tmp_path / "odd"}, statistics, 10.0)
    before = live.api.in_force
    with pytest.raises(InputError, match="stats.safetensors: router.count: found no selection of an expert that is kept in layer 1"):
        compare(masks(live), SMALL, [1], limits=limits, **OPTIONS)
    assert "/v1/completions" not in live.engine.seen
    assert before is not None
    assert live.api.in_force is not None
    assert live.api.in_force.hash == before.hash


class Meddler(list[str]):
    """Paths that a server was asked for; with the first benchmark request, someone takes another server's mask away."""

    def __init__(self, other: ServedFake) -> None:
        super().__init__()
        self.other = other

    def append(self, path: str) -> None:
        if path == "/v1/completions" and path not in self:
            ServerClient(self.other.url, "right").delete_mask()
        super().append(path)


def test_decode_beside_another_server(live: ServedFake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are seen with keys of their own, and serve the same masks throughout."""
    monkeypatch.delenv(KEY_ENV)
    with ServedFake() as base:
        own = (ServerClient(base.url, "right"), ServerClient(live.url, "right"))
        mask, decode = mask_of(4, live), Decode(1, 8, 6, 1)
        monkeypatch.setattr(sweep_decode, "compare", partial(compare, api="openai"))
        found = decode_beside(*own, mask, "keep4", decode)
        assert [found["sides"][name]["softprune"]["mask_hash"] for name in "ab"] == [None, mask.hash]
        for one, other in ((base, live), (live, base)):
            one.engine.seen = Meddler(other)
            with pytest.raises(SoftpruneError, match="someone switched the mask meanwhile"):
                decode_beside(*own, mask, "keep4", decode)
            one.engine.seen = []

        def late(*args: Any, **kwargs: Any) -> Any:
            own[1].delete_mask()
            return compare(*args, api="openai", **kwargs)

        monkeypatch.setattr(sweep_decode, "compare", late)
        with pytest.raises(SoftpruneError, match=r"keep4: found masks \[None, None\] when decoding began"):
            decode_beside(*own, mask, "keep4", decode)


def test_decode_beside_no_mask_on_one_server(live: ServedFake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its switches are the caller's own, who puts back what was in force before all."""
    monkeypatch.setattr(sweep_decode, "compare", partial(compare, api="openai"))
    client, before, mask = ServerClient(live.url), live.api.in_force, mask_of(4, live)
    with mask_put_back(client):
        client.switch(mask)
        found = decode_beside(client, client, mask, "keep4", Decode(1, 8, 6, 1))
        assert live.api.in_force == mask
    assert found["sides"]["b"]["softprune"]["mask_hash"] == mask.hash
    assert live.api.in_force == before


def cli(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(argument) for argument in ("bench", "compare", *arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


SIZES = ("--prompt-tokens", 8, "--max-new-tokens", 6, "--batch", "1,3")


def test_cli(server: FakeServer, tmp_path: Path) -> None:
    server.behave(Behaviour("sglang", 0.02, 0.015, second=1.5))
    out = tmp_path / "out.json"
    code, output = cli("--url-a", server.url, "--url-b", server.second, *SIZES, "--repeats", 3, "--note", "why=test", "-o", out)
    assert code == 0, output
    document = json.loads(out.read_text())
    assert document["notes"] == {"why": "test"}
    for row in document["results"]:
        assert f"batch {row['batch']}: {row['says']}" in output
        assert f"{row['ratio'][row['figure']]['median']:.3f}" in output
    assert "gpt-oss-20b on SGLang 0.5.17" in output
    assert "prefix cache" not in output


def test_cli_asks_for_one_way(server: FakeServer, live: ServedFake, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.json")
    for options in ((), ("--url", live.url), ("--url-a", server.url), ("--url", live.url, "--mask-a", "none", "--url-b", server.url)):
        code, output = cli(*options, *out)
        assert (code, "give either --url, --mask-a and --mask-b" in output) == (2, True), output
    code, output = cli("--url-a", server.url, "--url-b", server.second, "--bandwidth", 10, *out)
    assert (code, "a roofline needs --model" in output) == (2, True), output
    code, output = cli("--url", live.url, "--mask-a", "none", "--mask-b", tmp_path / "missing.json", *out)
    assert (code, "missing.json" in output) == (2, True), output
