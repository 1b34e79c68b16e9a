"""`softprune stats collect` against the control API of small fake engines: whole, interrupted in every way, and refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from softprune.bench.tiny import PACKS
from softprune.bench.tiny.weights import HERE as TINY
from softprune.cli import app
from softprune.control import KEY_ENV
from softprune.errors import InputError
from softprune.evaluate.packing import Blocks, block_hashes, completion_ranges
from softprune.evaluate.replay import Replay, spans_text
from softprune.server_client import ServerCallError, ServerClient
from softprune.stats.collect import Collection, Options
from softprune.stats.collect_packs import load
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, read
from softprune.stats.merge import merge_files
from softprune.stats.summary import complete
from tests.unit.fake_control import LAYERS, TOP_K, FakeControl, FakeEngine, ServedFake, make_launch, make_mask

SEQ_LEN, BLOCKS = 32, 5
TAGS = PACKS[:2]
FILES = [TINY / "packs" / f"{tag}.parquet" for tag in TAGS]
Start = Callable[..., ServedFake]


class Killed(BaseException):
    """The client is gone, and nothing after it is run."""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


@pytest.fixture(scope="module")
def packs() -> dict[str, Blocks]:
    return load(FILES, str(TINY / "tokenizer"), SEQ_LEN, BLOCKS)


@pytest.fixture
def start() -> Iterator[Start]:
    """start(engine name): one more fake server that collects."""
    with ExitStack() as stack:

        def one(name: str = "vLLM 0.32.0", **launch: Any) -> ServedFake:
            engine = FakeEngine(name, launch=make_launch(stats="router", max_tags=4, **launch))
            return stack.enter_context(ServedFake(FakeControl(engine)))

        yield one


def client_of(server: ServedFake) -> ServerClient:
    return ServerClient(server.url, "right")


def collection(server: ServedFake, packs: dict[str, Blocks], out: Path, **options: Any) -> Collection:
    return Collection(client_of(server), packs, out, Options(**{"blocks_a_part": 4, "concurrency": 3, **options}))


def cli(server: ServedFake, out: Path, *more: object) -> tuple[int, str]:
    arguments = ["--url", server.url, "--key", "right", "--packs", *FILES, "--tokenizer", TINY / "tokenizer", "-o", out]
    sizes = ["--seq-len", SEQ_LEN, "--num-blocks", BLOCKS, "--blocks-a-part", 4]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["stats", "collect", *map(str, [*arguments, *sizes, *more])])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def check(statistics: Statistics, packs: dict[str, Blocks]) -> None:
    """Every token of every block, in every layer, under its pack's tag, and nothing else."""
    header = statistics.header
    assert header.tags == ["default", *sorted(packs)]
    assert header.tokens["default"].routed == 0
    assert complete(statistics) is True
    for tag, blocks in packs.items():
        assert header.tokens[tag].model_dump() == {"prefill": blocks.ids.size, "decode": 0, "cached": 0}
        assert (statistics["router.count"][statistics.tag_index(tag), 0].sum(-1) == [blocks.ids.size * TOP_K] * LAYERS).all()
    found = {one.id: one.hashes for one in header.data_sets}
    assert found == {tag: sorted(f"sha256:{digest}" for digest in block_hashes(blocks)) for tag, blocks in packs.items()}


def at(count: int, what: Callable[[], Any]) -> Callable[[int], None]:
    """A progress that does something once so many blocks are done."""
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if done == count:
            what()

    return advance


def raising(error: BaseException) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


@pytest.mark.parametrize("engine", ["vLLM 0.32.0", "SGLang 0.5.17"])
def test_the_command(start: Start, packs: dict[str, Blocks], tmp_path: Path, engine: str) -> None:
    server = start(engine)
    code, output = cli(server, tmp_path / "s.safetensors")
    assert code == 0, output
    assert f"s.safetensors: mask none, 3 runs, routed tokens: {TAGS[0]} 160, {TAGS[1]} 160" in output
    check(read(tmp_path / "s.safetensors"), packs)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    state = client_of(server).status()["statistics"]
    assert (state["collecting"], state["masks"]) == (False, [])
    assert set(server.engine.seen) == ({"/generate"} if engine.startswith("SGLang") else {"/v1/models", "/v1/completions"})


def test_interruptions_change_nothing(start: Start, packs: dict[str, Blocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, a killed client, a killed server and a full disk: what was drained stays, and the whole is what it would have been."""
    whole = collection(start(), packs, tmp_path / "whole").run(lambda number: None)
    out, server = tmp_path / "s", start()

    # Ctrl-C within the second part: blocks under way are waited for, and drained.
    with pytest.raises(KeyboardInterrupt):
        collection(server, packs, out).run(at(5, raising(KeyboardInterrupt())))
    assert client_of(server).status()["statistics"]["masks"] == []
    one = collection(server, packs, out)
    assert 5 <= one.num_done <= 8
    first = merge_files(one.folder.files(one._state))
    assert first.header.tokens[TAGS[0]].prefill + first.header.tokens[TAGS[1]].prefill == one.num_done * SEQ_LEN
    drained = {path.name: path.read_bytes() for path in one.folder.files(one._state)}
    assert len(drained) == 2

    # Killed in the next part: the server goes on collecting, and is told to forget.
    with monkeypatch.context() as patch:
        patch.setattr(ServerClient, "stop_stats", raising_call(Killed()))
        with pytest.raises(Killed):
            one.run(lambda number: None)
    state = client_of(server).status()["statistics"]
    assert state["collecting"] is True
    assert state["masks"][0]["tokens"][TAGS[0]]["prefill"] > 0
    two = collection(server, packs, out)
    assert two.num_done == one.num_done

    # A full disk when it is drained: the server keeps it, and the state stays whole.
    with monkeypatch.context() as patch:
        patch.setattr("softprune.stats.file.save_file", raising_call(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(StatisticsError, match="No space left on device"):
            two.run(lambda number: None)
    assert {path.name: path.read_bytes() for path in two.folder.path.iterdir() if path.suffix == ".safetensors"} == drained

    # Killed together with its server; the new one is elsewhere.
    replaced = start()
    total = collection(replaced, packs, out).run(lambda number: None)
    check(total, packs)
    for name, values in whole.tensors.items():
        # Tokens of different requests may be added up in another order.
        assert np.array_equal(total[name], values) if values.dtype == np.int64 else np.allclose(total[name], values, atol=1e-4), name
    assert read(out).header == total.header
    assert not out.with_name("s.parts").exists()


def raising_call(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_ctrl_c_says_how_to_go_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("softprune.stats.cli.count_progress", lambda *_: _Bar(at(2, raising(KeyboardInterrupt()))))
        code, output = cli(start(), out, "--concurrency", 1)
    assert code == 130
    assert "of 10 blocks are in " in output
    assert "s.safetensors.parts; the same command goes on from there" in output
    assert not out.exists()


class _Bar:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def __enter__(self) -> Callable[[int], None]:
        return self.advance

    def __exit__(self, *_: object) -> None:
        pass


def test_killed_while_it_was_starting(start: Start, packs: dict[str, Blocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server collects, and the client never learned the run's name."""
    server = start()
    with monkeypatch.context() as patch:
        patch.setattr(Collection, "_fetch", raising_call(Killed()))
        patch.setattr(ServerClient, "stop_stats", raising_call(Killed()))
        with pytest.raises(Killed):
            collection(server, packs, tmp_path / "s").run(lambda number: None)
    assert client_of(server).status()["statistics"]["collecting"] is True
    check(collection(server, packs, tmp_path / "s").run(lambda number: None), packs)


def test_lost_samples_are_told(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = ServerClient.stop_stats
    monkeypatch.setattr(ServerClient, "stop_stats", lambda client: {**stop(client), "lost_samples": 7})
    code, output = cli(start(), tmp_path / "s")
    assert (code, "warning: 21 tokens were to be sampled, and could not be" in output) == (0, True)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_statistics_of_others_are_left_alone(start: Start, packs: dict[str, Blocks], tmp_path: Path, stopped: bool) -> None:
    server = start()
    client = client_of(server)
    client.start_stats()
    client.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2})
    if stopped:
        client.stop_stats()
    before = client.status()["statistics"]
    with pytest.raises(StatisticsError, match="statistics: found statistics of 4 tokens, .* expected nothing counted yet"):
        collection(server, packs, tmp_path / "s")
    assert client.status()["statistics"] == before


def test_what_was_not_sent_is_not_written(start: Start, packs: dict[str, Blocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of somebody else under a pack's tag, and masks that are switched meanwhile."""
    server = start()
    client = client_of(server)

    def others() -> None:
        client.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1, "vllm_xargs": {"softprune_tag": TAGS[0]}})

    with pytest.raises(StatisticsError, match=rf"tokens\.{TAGS[0]}: found 67 tokens routed in prefill, .* expected 64 in prefill"):
        collection(server, packs, tmp_path / "s").run(at(1, others))
    mask = make_mask([[0, 1, 2], None, [3, 4]], server.engine.ranks[0])
    switched = collection(server, packs, tmp_path / "s", concurrency=1)
    send, sent = Replay.send, []

    def switching(replay: Replay, *args: Any) -> None:
        sent.append(args)
        if len(sent) == 2:
            client.put_mask(mask)
        send(replay, *args)

    monkeypatch.setattr(Replay, "send", switching)
    with pytest.raises(StatisticsError, match=rf"tokens\.{TAGS[0]}: found 32 tokens .* \(the mask was switched meanwhile"):
        switched.run(lambda number: None)
    with pytest.raises(StatisticsError, match=r"state\.json: mask: found None; expected 'sha256:.* to go on; to begin anew, move"):
        collection(server, packs, tmp_path / "s")
    shutil.rmtree(tmp_path / "s.parts")
    client.reset_stats()
    under_mask = collection(server, packs, tmp_path / "s").run(lambda number: None)
    check(under_mask, packs)
    assert under_mask.header.mask == mask.hash
    with pytest.raises(StatisticsError, match=f"mask: found none in force; expected {mask.hash}, as at the start"):
        collection(server, packs, tmp_path / "t", concurrency=1, blocks_a_part=1).run(at(1, lambda: client.switch(None)))


def test_requests_of_others_are_counted_apart(start: Start, packs: dict[str, Blocks], tmp_path: Path) -> None:
    server = start()
    request = {"prompt": [1, 2, 3], "max_tokens": 2}
    total = collection(server, packs, tmp_path / "s").run(at(1, lambda: client_of(server).post("/v1/completions", request)))
    assert total.header.tokens["default"].model_dump() == {"prefill": 3, "decode": 1, "cached": 0}
    assert total.header.tokens[TAGS[0]].prefill == BLOCKS * SEQ_LEN


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mode", "reap"), "HTTP 4"),
        (("--sample", "16"), "--sample: found '16'; expected 1/N, e.g. 1/16"),
        (("--sample", "1/0"), "--sample: found '1/0'"),
        (("--num-blocks", 100_000), "expected 100000 blocks of 32 tokens"),
        (("--tokenizer", "/nowhere"), "--tokenizer /nowhere: found no tokenizer"),
        ((FILES[0],), f"--packs: found two files named {TAGS[0]}"),
        (("/nowhere/x.parquet",), "/nowhere/x.parquet: found"),
        (tuple(TINY / "packs" / f"{tag}.parquet" for tag in PACKS[2:]), "expected room for reasoning_style, tool_agentic, chat_if, code"),
        (("-o", "/nowhere/s"), "/nowhere/s.parts: found No such file or directory; expected a folder that can be written"),
    ],
)
def test_refusals(start: Start, tmp_path: Path, more: tuple[object, ...], message: str) -> None:
    server = start()
    code, output = cli(server, tmp_path / "s", *more)
    assert code == 2
    assert message in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []
    assert client_of(server).status()["statistics"]["masks"] == []


def test_a_server_without_statistics(packs: dict[str, Blocks], tmp_path: Path) -> None:
    with ServedFake() as server, pytest.raises(ServerCallError, match="statistics_are_off: start the server with --softprune-stats"):
        collection(server, packs, tmp_path / "s")


def test_a_pack_named_default(start: Start, packs: dict[str, Blocks], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--packs: found a pack named default"):
        collection(start(), {"default": packs[TAGS[0]]}, tmp_path / "s")


def test_another_collection_does_not_go_on(start: Start, packs: dict[str, Blocks], tmp_path: Path) -> None:
    server, out = start(), tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        collection(server, packs, out).run(at(1, raising(KeyboardInterrupt())))
    kept = sorted(path.name for path in (tmp_path / "s.parts").iterdir())
    fewer = load(FILES, str(TINY / "tokenizer"), SEQ_LEN, BLOCKS - 1)
    with pytest.raises(StatisticsError, match=r"state\.json: packs: found .*; expected .* to go on"):
        collection(server, fewer, out)
    state = tmp_path / "s.parts" / "state.json"
    for text in ("{", json.dumps({**json.loads(state.read_text()), "version": 2})):
        state.write_text(text)
        with pytest.raises(StatisticsError, match=r"state\.json: found no state of a collection"):
            collection(server, packs, out)
    state.unlink()
    with pytest.raises(StatisticsError, match=r"s\.parts: found something without state\.json in it"):
        collection(server, packs, out)
    assert sorted([*(path.name for path in (tmp_path / "s.parts").iterdir()), "state.json"]) == kept


def test_what_is_asked_of_the_server(start: Start, packs: dict[str, Blocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode, sampling and attribution as given; what was not given is left to the server, whose refusal leaves nothing behind."""
    asked: list[Any] = []

    def refusing(client: ServerClient, method: str, path: str, body: bytes | None = None, timeout: float | None = None) -> Any:
        if path != "/stats/start":
            return answer(client, method, path, body, timeout)
        asked.append(json.loads(body or b""))
        raise ServerCallError(client.url, 409, "refused", "not this")

    answer = ServerClient._object
    monkeypatch.setattr(ServerClient, "_object", refusing)
    for mode, sample, attribution in (("router", None, None), ("reap", 8, None), ("eaft", 1, "target")):
        with pytest.raises(ServerCallError, match="409 refused: not this"):
            collection(start(), packs, tmp_path / "s", mode=mode, sample=sample, attribution=attribution).run(lambda number: None)
    assert asked == [{"mode": "router"}, {"mode": "reap", "sample": 8}, {"mode": "eaft", "sample": 1, "attribution": "target"}]
    assert list(tmp_path.iterdir()) == []


class _Asked:
    """A client that keeps what is sent, and answers as it is told."""

    url = "http://fake"

    def __init__(self, answer: Any) -> None:
        self.answer, self.sent = answer, []

    def post(self, path: str, body: Any) -> Any:
        self.sent.append((path, body))
        return self.answer


def test_what_is_sent() -> None:
    """Every position's log-probability is asked for; where it matters, with the completion tokens' ranges beside the tag."""
    sglang = _Asked({"meta_info": {"input_token_logprobs": [[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]]}})
    Replay(sglang, None).send([5, 6, 7], "code", [(1, 3)])  # type: ignore[arg-type]
    parameters = {"softprune_tag": "code", "softprune_spans": "1-3"}
    sampling = {"max_new_tokens": 0, "temperature": 0, "custom_params": parameters}
    body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    assert sglang.sent == [("/generate", body)]
    vllm = _Asked({"choices": [{"prompt_logprobs": [None, {"6": {"logprob": -1.0}}, {"7": {"logprob": -1.0}, "9": {"logprob": -0.1}}]}]})
    Replay(vllm, "name").send([5, 6, 7], "code")  # type: ignore[arg-type]
    asked = {"model": "name", "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    assert vllm.sent == [("/v1/completions", {**asked, "vllm_xargs": {"softprune_tag": "code"}})]
    for fake, model, ids in ((sglang, None, [5, 6, 8]), (sglang, None, [5, 6]), (vllm, "name", [5, 6, 8]), (vllm, "name", [5, 6, 7, 8])):
        with pytest.raises(ServerCallError, match="found log-probabilities of . other tokens; expected those of the . that were sent"):
            Replay(fake, model).send(ids, "code")  # type: ignore[arg-type]
    for answer in ({}, [], {"meta_info": {"input_token_logprobs": None}}, {"choices": []}, {"choices": [{"prompt_logprobs": None}]}):
        for model in (None, "name"):
            with pytest.raises(ServerCallError, match="expected log-probabilities of a prompt"):
                Replay(_Asked(answer), model).send([5, 6], "code")  # type: ignore[arg-type]


def test_completion_ranges() -> None:
    for keep, spans, text in (
        ([0, 1, 1, 0, 1], [(1, 3), (4, 5)], "1-3,4-5"),
        ([1, 0, 0], [(0, 1)], "0-1"),
        ([0, 0], [], ""),
        ([1, 1], [(0, 2)], "0-2"),
    ):
        assert completion_ranges(np.array(keep, bool)) == spans
        assert spans_text(spans) == text


def test_ranges_of_real_blocks_are_their_masks(packs: dict[str, Blocks]) -> None:
    for blocks in packs.values():
        for keep in blocks.keep:
            again = np.zeros(SEQ_LEN, bool)
            for first, stop in completion_ranges(keep):
                again[first:stop] = True
            assert np.array_equal(again, keep)


def test_prometheus_reads_what_was_counted(start: Start, packs: dict[str, Blocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import REGISTRY

    monkeypatch.setattr("softprune.control_api.SCRAPE_SECONDS", 30)
    server = start()
    client = client_of(server)

    def scraped() -> None:
        with pytest.raises(ServerCallError, match="404"):  # the fake engine has no metrics of its own
            client.get("/metrics/")

    def found(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"softprune:stats_{name}", labels)

    client.start_stats()
    assert found("collecting") == 1
    client.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 3, "vllm_xargs": {"softprune_tag": TAGS[0]}})
    scraped()
    assert [found("tokens", tag=TAGS[0], phase=phase) for phase in ("prefill", "decode", "cached")] == [3, 2, 0]
    assert found("missed_tokens") == 0
    asked, ask = [], server.api.ask

    async def counting(scope: Any, what: str, **arguments: Any) -> list[Any]:
        asked.append(what)
        return await ask(scope, what, **arguments)

    server.api.ask = counting  # type: ignore[method-assign]
    scraped()
    assert asked == [], "asked a moment ago"
    server.api._scraped = float("-inf")
    scraped()
    assert asked == ["status"]

    async def broken(scope: Any, what: str, **arguments: Any) -> list[Any]:
        raise RuntimeError("gone")

    server.api.ask, server.api._scraped = broken, float("-inf")  # type: ignore[method-assign]
    scraped()
    server.api.ask = ask  # type: ignore[method-assign]
    client.stop_stats()
    assert found("collecting") == 0
    client.reset_stats()
    assert found("tokens", tag=TAGS[0], phase="prefill") == 0
