"""`softprune eval` against small fake engines of both kinds: the numbers, every bad answer, and interruptions that change nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

from softprune.bench.tiny.weights import HERE as TINY
from softprune.cli import app
from softprune.control import KEY_ENV
from softprune.errors import InputError, SoftpruneError
from softprune.evaluate import evaluation, noise
from softprune.evaluate.errors import EvaluationError, EvaluationFileError
from softprune.evaluate.eval_packs import PackSet, Sizes, load
from softprune.evaluate.eval_state import ScoreStore
from softprune.evaluate.evaluate import EvalSettings, Evaluating, evaluate
from softprune.evaluate.metrics import MetricSettings
from softprune.evaluate.packing import UNION, PackError, block_hashes
from softprune.evaluate.prompt_scores import PromptScorer, top_entropy
from softprune.evaluate.served import ask_served
from softprune.server_client import ServerCallError, ServerClient
from softprune.stats.collect_packs import load_tokenizer
from tests.unit.fake_control import ServedFake, make_mask
from tests.unit.scoring_engine import ScoringEngine, expected, served

SIZES = Sizes((32, 64), 12)
NAMES = ("chat_if", "code")
FILES = [TINY / "packs" / f"{name}.parquet" for name in NAMES]
ENGINES = ("vLLM 0.32.0", "SGLang 0.5.17", "vLLM 0.26.0")
Start = Callable[..., ServedFake]


class Killed(BaseException):
    """The client is gone, and nothing after it is run."""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(TINY / "tokenizer"))


@pytest.fixture(scope="module")
def packs() -> PackSet:
    return load(FILES, str(TINY / "tokenizer"), SIZES)


@pytest.fixture
def start(tokenizer: Any) -> Iterator[Start]:
    """start(engine name, softprune): one more server that scores."""
    with ExitStack() as stack:

        def one(name: str = ENGINES[0], softprune: bool = True, **more: Any) -> ServedFake:
            engine = ScoringEngine(name, tokenizer)
            for attribute, value in more.items():
                setattr(engine, attribute, value)
            return stack.enter_context(served(engine, softprune))

        yield one


def client_of(server: ServedFake) -> ServerClient:
    return ServerClient(server.url, "right")


def cli(server: ServedFake, out: Path, *more: object) -> tuple[int, str]:
    arguments = ["--url", server.url, "--key", "right", "--tokenizer", TINY / "tokenizer", "-o", out]
    sizes = [] if "--recipe" in more else ["--packs", *FILES, "--seq-lens", "32,64", "--num-blocks", 12]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["eval", *map(str, [*arguments, *sizes, *more])])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def timeless(path: Path) -> str:
    """A file's text without what the clock says."""
    return re.sub(r'"(date|run_id)": "[^"]*"|"(pack_wall_s|tok_s_pred)": [0-9.e+-]+', "", path.read_text())


def at(count: int, what: Callable[[], Any]) -> Callable[[int], None]:
    """A progress that does something once so many blocks are done."""
    done = 0

    def advance(_: int) -> None:
        nonlocal done
        done += 1
        if done == count:
            what()

    return advance


def raising(error: BaseException) -> Callable[..., Any]:
    def now(*_: Any, **__: Any) -> Any:
        raise error

    return now


@pytest.mark.parametrize("softprune", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_command(start: Start, packs: PackSet, tmp_path: Path, engine: str, softprune: bool) -> None:
    """Every number of the file is what the definitions give for the engine's table, whatever the engine and the order of the answers."""
    server = start(engine, softprune)
    code, output = cli(server, tmp_path / "base.json", "--label", "the base")
    assert code == 0, output
    assert f"base.json: the base, mask {'none' if softprune else 'unknown'}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["base.json"]
    found = evaluation.read(tmp_path / "base.json")
    assert list(found.cells) == [(name, length) for name in (*NAMES, UNION) for length in (32, 64)]
    for (name, length), cell in found.cells.items():
        blocks = packs.cells[name][length]
        scores = [expected(ids) for ids in blocks.ids]
        log_p, entropy = (np.concatenate([one[i][keep[1:]] for one, keep in zip(scores, blocks.keep, strict=True)]) for i in (0, 1))
        assert cell.tokens == blocks.num_kept == len(log_p)
        assert cell.metrics["ppl"] == pytest.approx(math.exp(-log_p.mean()), rel=1e-6)
        assert cell.metrics["mean_prob"] == pytest.approx(np.exp(log_p).mean(), rel=1e-6)
        assert cell.metrics["mean_entropy"] == pytest.approx(entropy.mean(), rel=1e-6)
        assert cell.blocks is not None
        assert cell.blocks.tokens.tolist() == blocks.keep.sum(1).tolist()
        assert cell.identity["rows_sha256"] == blocks.rows_sha256
    meta, own = found.meta, found.own
    assert (meta["engine"], meta["seq_lens"], meta["num_blocks"], meta["batch_size"]) == (engine.split()[0].lower(), [32, 64], 12, 8)
    assert meta[f"{meta['engine']}_version"] == engine.split()[1]
    assert (meta["model_path"], meta["pack_files"]) == ("fake", [file.name for file in FILES])
    fingerprint = server.engine.ranks[0].fingerprint
    assert (own["fingerprint"], own["mask"], own["num_kept"]) == ((fingerprint, None, [8, 8, 8]) if softprune else (None, None, None))
    assert (meta["top_k"], own["block_form"], own["vocabulary_size"]) == (2 if softprune else None, "L", 4096)
    # A block that two cells share is sent once; nothing else is sent twice.
    assert len(server.engine.scored) == num_sent(packs)


def num_sent(packs: PackSet) -> int:
    """Blocks that have to be scored: each once, and none without a token that counts."""
    every = [blocks for by_length in packs.cells.values() for blocks in by_length.values()]
    return len({digest for one in every for digest, keep in zip(block_hashes(one), one.keep, strict=True) if keep.any()})


def test_both_engines_give_the_same_file(start: Start, packs: PackSet, tmp_path: Path) -> None:
    cells = []
    for i, engine in enumerate(ENGINES):
        evaluate(client_of(start(engine)), packs, tmp_path / f"{i}.json", EvalSettings(concurrency=1 + 4 * i, order=i or None))
        cells.append(json.loads(timeless(tmp_path / f"{i}.json").replace(", ,", ",").replace("{, ", "{").replace(", }", "}"))["packs"])
    assert cells[0] == cells[1]


def test_a_mask_is_recorded(start: Start, packs: PackSet, tmp_path: Path) -> None:
    server = start()
    mask = make_mask([[0, 1, 2], None, [3, 4]], server.engine.ranks[0])
    client_of(server).put_mask(mask)
    found = evaluate(client_of(server), packs, tmp_path / "masked.json")
    assert (found.own["mask"], found.own["num_kept"]) == (mask.hash, [3, 8, 2])
    blocks = packs.cells[NAMES[0]][32]
    log_p = np.concatenate([expected(ids, mask.hash)[0][keep[1:]] for ids, keep in zip(blocks.ids, blocks.keep, strict=True)])
    assert found.cell(NAMES[0], 32).metrics["mean_nll"] == pytest.approx(-log_p.mean(), rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mask_that_is_switched_in_the_middle(start: Start, packs: PackSet, tmp_path: Path, engine: str) -> None:
    """Also for one that is switched back: its answers name another epoch."""
    server = start(engine)
    client = client_of(server)
    mask = make_mask([[0, 1, 2], None, [3, 4]], server.engine.ranks[0])

    def there_and_back() -> None:
        client.put_mask(mask)
        client.switch(None)

    for switch in (lambda: client.put_mask(mask), there_and_back):
        out = tmp_path / "switched.json"
        with pytest.raises(EvaluationError, match=r"mask epochs \[\d\]; expected epoch \d, as at the start: the mask was switched"):
            evaluate(client, packs, out, EvalSettings(concurrency=1), at(3, switch))
        assert not out.exists()
        if client.mask() is not None:
            with pytest.raises(EvaluationFileError, match=r"state\.json: mask: found None; expected 'sha256:.* to go on"):
                evaluate(client, packs, out)
            client.switch(None)
    server.engine.names_epochs = False
    with pytest.raises(EvaluationError, match="found an answer under mask epochs None"):
        evaluate(client, packs, tmp_path / "nameless.json")


BAD_ANSWERS = {
    "absent": r"found no log-probabilities of the prompt's tokens; expected \d+: the server leaves them out",
    "truncated": r"found \d+ log-probabilities of the prompt's tokens; expected \d+: they are truncated",
    "others": r"found token \d+ scored as .*; expected token \d+, as was sent",
    "nan": r"found \d+ tokens that count without a finite log-probability; expected a number for each",
    "-inf": r"found \d+ tokens that count without a finite log-probability; expected a number for each",
    "few": r"found the \d+ likeliest tokens; expected 20, as were asked for",
    "shape": r"found log-probabilities in another form; expected those of (vLLM|SGLang)",
    "vocabulary": r"HTTP 400 BadRequestError: .* \(the packs' tokenizer has ids that the model has not\)",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_answers(start: Start, packs: PackSet, tmp_path: Path, engine: str) -> None:
    """The first block's are whole; what was scored stays, and nothing is written."""
    server = start(engine)
    for i, (fault, message) in enumerate(BAD_ANSWERS.items()):
        server.engine.fault, server.engine.faulty = fault, len(server.engine.scored) + 1
        with pytest.raises(SoftpruneError, match=message) as caught:
            evaluate(client_of(server), packs, tmp_path / f"{i}.json", EvalSettings(concurrency=1))
        assert str(caught.value).startswith(server.url)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.json.parts" for i in range(len(BAD_ANSWERS))]


@pytest.mark.parametrize("limit", [0, 5, 19])
def test_a_server_that_gives_fewer_likeliest_tokens(start: Start, packs: PackSet, tmp_path: Path, limit: int) -> None:
    server = start(softprune=False, max_logprobs=limit)
    with pytest.raises(ServerCallError, match=rf"max allowed: {limit} \(20 likeliest tokens are needed: .* --max-logprobs 20 or more"):
        evaluate(client_of(server), packs, tmp_path / "x.json")


def test_the_token_beside_the_likeliest_is_not_one_of_them(start: Start) -> None:
    """vLLM appends the token itself where it is not among the likeliest: H is of the 20 best all the same."""
    server = start()
    client = client_of(server)
    ids = np.arange(100, 164, dtype=np.int32)
    keep = np.arange(64) > 0
    found = PromptScorer(client, ask_served(client)).score(ids, keep)
    log_p, entropy = expected(ids)
    assert np.allclose(found.log_p, log_p, rtol=1e-6)
    assert np.allclose(found.entropy, entropy, rtol=1e-5)


def test_entropy_is_the_studys() -> None:
    even, one = np.full(20, -3.0), np.array([0.0, *[-800.0] * 19])
    assert top_entropy([even, one], 20).tolist() == pytest.approx([1.0, 0.0], abs=1e-9)
    two = np.array([np.log(0.5), np.log(0.25)])
    assert top_entropy([two], 2)[0] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)) / np.log(2), rel=1e-6)
    assert top_entropy([], 20).shape == (0,)


def test_interruptions_change_nothing(start: Start, packs: PackSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, a killed client, a dead server, a full disk, a torn record: what was scored is not scored again, and the file is the same."""
    whole, out = tmp_path / "whole.json", tmp_path / "x.json"
    evaluate(client_of(start()), packs, whole)
    server = start()
    settings = EvalSettings(concurrency=3)

    def done() -> int:
        with Evaluating(client_of(start()), packs, out, settings) as run:
            return run.num_done

    server.engine.delay = 0.02  # else others may all be scored until the error is seen
    for error in (KeyboardInterrupt(), Killed()):
        with pytest.raises(type(error)):
            evaluate(client_of(server), packs, out, settings, at(3, raising(error)))
    server.engine.delay = 0.0
    assert 6 * 32 <= done() < num_sent(packs) * 32
    assert len(server.engine.scored) < num_sent(packs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(EvaluationFileError, match=r"scores\.bin: found No space left on device; expected room for scores"):
            evaluate(client_of(server), packs, out, settings)
    dead = start(fault="die", faulty=3)
    before = done()
    with pytest.raises(ServerCallError, match="no answer: "):
        evaluate(client_of(dead), packs, out, EvalSettings(concurrency=1))
    assert done() > before
    scores = tmp_path / "x.json.parts" / "scores.bin"
    with open(scores, "r+b") as file:
        file.truncate(scores.stat().st_size - 3)
    with open(scores, "ab") as file:
        file.write(b"\0" * 100)
    assert done() > 0
    last = start()
    evaluate(client_of(last), packs, out, settings)
    assert timeless(out).replace('"batch_size": 3', '"batch_size": 8') == timeless(whole)
    assert not (tmp_path / "x.json.parts").exists()
    assert len(last.engine.scored) < num_sent(packs) - 6


def test_killed_and_run_again(start: Start, tmp_path: Path) -> None:
    """The command itself, by SIGKILL."""
    server = start()
    code, output = cli(server, tmp_path / "whole.json")
    assert code == 0, output
    server.engine.delay = 0.3
    command = [str(Path(sys.executable).with_name("softprune")), "eval", "--url", server.url, "--key", "right", "--packs", *map(str, FILES)]
    command += ["--seq-lens", "32,64", "--num-blocks", "12", "--tokenizer", str(TINY / "tokenizer"), "-o", str(tmp_path / "x.json")]
    scores = tmp_path / "x.json.parts" / "scores.bin"
    with subprocess.Popen([*command, "--concurrency", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not scores.exists() or scores.stat().st_size < 600:
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    assert not (tmp_path / "x.json").exists()
    server.engine.delay, before = 0.0, len(server.engine.scored)
    code, output = cli(server, tmp_path / "x.json")
    assert code == 0, output
    assert len(server.engine.scored) - before < before - 2
    assert timeless(tmp_path / "x.json") == timeless(tmp_path / "whole.json")


def test_ctrl_c_says_how_to_go_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ScoreStore, "get", raising(KeyboardInterrupt()))
        code, output = cli(start(), tmp_path / "x.json")
    assert code == 130
    assert re.search(r"([\d,]+) of \1 tokens are in .*x\.json\.parts; the same command goes on from there", output)


def test_another_evaluation_does_not_go_on(start: Start, packs: PackSet, tmp_path: Path) -> None:
    server, out = start(), tmp_path / "x.json"
    client = client_of(server)
    with pytest.raises(KeyboardInterrupt):
        evaluate(client, packs, out, advance=at(1, raising(KeyboardInterrupt())))
    fewer = load(FILES, str(TINY / "tokenizer"), Sizes((32, 64), 11))
    longer = load(FILES, str(TINY / "tokenizer"), Sizes((32, 64), 12, form="L+1"))
    for other, given, settings, field in (
        (client, fewer, EvalSettings(), "cells"),
        (client, longer, EvalSettings(), "block_form"),
        (client, packs, EvalSettings(MetricSettings(entropy_topk=10)), "entropy_topk"),
        (client, packs, EvalSettings(order=1), "order"),
        (client_of(start(ENGINES[1])), packs, EvalSettings(), "engine"),
        (client_of(start(softprune=False)), packs, EvalSettings(), "fingerprint"),
    ):
        with pytest.raises(EvaluationFileError, match=rf"state\.json: {field}: found .*; expected .* to go on; to begin anew, move "):
            evaluate(other, given, out, settings)
    state = out.with_name("x.json.parts") / "state.json"
    for text in ("{", json.dumps({**json.loads(state.read_text()), "version": 2})):
        state.write_text(text)
        with pytest.raises(EvaluationFileError, match="found no state of an evaluation"):
            evaluate(client, packs, out)
    state.unlink()
    with pytest.raises(EvaluationFileError, match=r"x\.json\.parts: found something without state\.json in it"):
        evaluate(client, packs, out)


NO_TOKENIZER = [
    (404, "Not Found"), (405, "Method Not Allowed"), (501, "not implemented"),
    (400, "Tokenizer not available when `skip_tokenizer_init=True`"),
    (500, "Internal server error during tokenization: 'NoneType' object has no attribute 'encode'"),
]  # fmt: skip
"""The last two are what vLLM 0.32.0 and SGLang 0.5.17 answer when started with --skip-tokenizer-init."""


@pytest.mark.parametrize("engine", ENGINES)
def test_another_model_does_not_go_on_without_softprune(start: Start, packs: PackSet, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(client_of(start(engine, softprune=False)), packs, out, advance=at(1, raising(KeyboardInterrupt())))
    for field, more in (("path", {"model": "/data/models/other"}), ("context", {"context": 2048})):
        with pytest.raises(EvaluationFileError, match=rf"state\.json: {field}: found .*; expected .* to go on"):
            evaluate(client_of(start(engine, softprune=False, **more)), packs, out)
    # Elsewhere on the disk is the same one.
    evaluate(client_of(start(engine, softprune=False, model="/mnt/fake")), packs, out)


@pytest.mark.parametrize("softprune", [True, False])
def test_other_weights_behind_the_same_name_do_not_go_on(start: Start, packs: PackSet, tmp_path: Path, softprune: bool) -> None:
    """The routers' fingerprint stays as well: a block that was scored is scored again."""
    out, server = tmp_path / "x.json", start(softprune=softprune)
    with pytest.raises(KeyboardInterrupt):
        evaluate(client_of(server), packs, out, advance=at(3, raising(KeyboardInterrupt())))
    other = start(softprune=softprune, weights=1)
    message = (
        r"x\.json\.parts: block \d+: found log p that is [\d.]+ off on the mean, scored again; expected at most 0\.05, as the same weights"
    )
    with pytest.raises(EvaluationFileError, match=message):
        evaluate(client_of(other), packs, out)
    assert len(other.engine.scored) == 1
    assert not out.exists()
    evaluate(client_of(server), packs, out)


def test_tokenizers_are_compared(start: Start, packs: PackSet, tokenizer: Any, tmp_path: Path) -> None:
    class Other:
        def __call__(self, text: str, **options: Any) -> Any:
            ids = tokenizer(text, **options)["input_ids"]
            return {"input_ids": [*ids[:40], 7, *ids[41:]]}

    with pytest.raises(InputError, match=r"--tokenizer: found \d+ tokens of a text, .* from token 40 on; expected the server's \d+, 7, "):
        evaluate(client_of(start(tokenizer=Other())), packs, tmp_path / "x.json")
    for number, (status, said) in enumerate(NO_TOKENIZER):
        told: list[str] = []
        server = start(ENGINES[number == len(NO_TOKENIZER) - 1], tokenizer=None, refusal=(status, said))
        evaluate(client_of(server), packs, tmp_path / f"x{number}.json", tell=told.append)
        assert len(told) == 1
        assert f"does not tokenise (HTTP {status}), so nobody knows whether its tokenizer is the packs'" in told[0]
    for status, said in ((500, "CUDA error"), (503, "busy"), (429, "slow down"), (400, "no such field"), (401, "key")):
        for engine in ENGINES:
            with pytest.raises(ServerCallError, match=f"HTTP {status} Error: {said}"):
                evaluate(client_of(start(engine, tokenizer=None, refusal=(status, said))), packs, tmp_path / "y.json")
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps({**json.loads((TINY / "weights" / "config.json").read_text()), "vocab_size": 400}))
    with pytest.raises(InputError, match=rf"--tokenizer: found token \d+; expected ids below 400, the vocabulary of {small}"):
        evaluate(client_of(start(softprune=False, model=str(small))), packs, tmp_path / "y.json")


@pytest.mark.parametrize(("engine", "flag"), [(ENGINES[0], "--max-model-len"), (ENGINES[1], "--context-length")])
def test_a_context_that_is_too_short(start: Start, packs: PackSet, tmp_path: Path, engine: str, flag: str) -> None:
    with pytest.raises(ServerCallError, match=rf"found a context of 64 tokens; expected at least 65 for blocks of 64 \({flag}\)"):
        evaluate(client_of(start(engine, context=64)), packs, tmp_path / "x.json")
    assert evaluate(client_of(start(engine, context=None)), packs, tmp_path / "x.json").cells


def test_servers_that_are_none(tmp_path: Path, start: Start) -> None:
    with ServedFake() as server, pytest.raises(ServerCallError, match="found no version at vLLM's /version or SGLang's /server_info"):
        ask_served(client_of(server))
    with pytest.raises(ServerCallError, match="HTTP 401"):
        ask_served(ServerClient(start().url, "wrong"))
    with pytest.raises(ServerCallError, match="no answer"):
        ask_served(ServerClient("http://127.0.0.1:9", "right"))


def write_pack(path: Path, texts: list[str]) -> Path:
    parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num-blocks", 100_000), "expected 100000 blocks of 32 tokens"),
        (("--seq-lens", "32,x"), "--seq-lens: found '32,x'; expected lengths and commas, e.g. 1024,2048"),
        (("--seq-lens", "32,32"), "--seq-lens: found 32,32; expected lengths of at least 2, each once"),
        (("--seq-lens", "1"), "--seq-lens: found 1; expected lengths of at least 2"),
        (("--tokenizer", "/nowhere"), "--tokenizer /nowhere: found no tokenizer"),
        ((FILES[0],), f"--packs: found a second pack named {NAMES[0]}"),
        (("/nowhere/x.parquet",), "/nowhere/x.parquet: found"),
        (("--token-budget", 100), "--token-budget: found --num-blocks as well; expected one of the two"),
        (("-o", "/nowhere/x.json"), "/nowhere/x.json.parts: found No such file or directory; expected a folder that can be written"),
        (("--run", "a"), "--run: found a; expected one of none: the recipe has no run_matrix"),
    ],
)
def test_refusals(start: Start, tmp_path: Path, more: tuple[object, ...], message: str) -> None:
    server = start()
    code, output = cli(server, tmp_path / "x.json", *more)
    assert code == 2
    assert message in output
    assert list(tmp_path.iterdir()) == []
    assert server.engine.scored == []


def test_packs_without_completion_tokens(tmp_path: Path) -> None:
    plain = write_pack(tmp_path / "plain.parquet", ["some text without messages, again and again. " * 20] * 3)
    with pytest.raises(PackError, match=r"plain\.parquet: text: found no completion token in 2 blocks of 32 .* messages of the assistant"):
        load([plain], str(TINY / "tokenizer"), Sizes((32,), 2))
    union_file = write_pack(tmp_path / "UNION.parquet", ["x"])
    with pytest.raises(InputError, match="found a second pack named UNION"):
        load([union_file], str(TINY / "tokenizer"), Sizes((32,), 2))
    with pytest.raises(InputError, match="--packs: found none; expected at least one Parquet file"):
        load([], str(TINY / "tokenizer"), Sizes((32,), 2))


def test_block_forms_budgets_and_union() -> None:
    """L+1 holds one id more, of which as many count as can be predicted; a budget is divided by the length; UNION takes rows in turn."""
    plain, longer = (load(FILES, str(TINY / "tokenizer"), Sizes((32, 64), 512, 640, form)) for form in ("L", "L+1"))
    assert [blocks.ids.shape for blocks in plain.cells[UNION].values()] == [(20, 32), (10, 64)]
    assert [blocks.ids.shape for blocks in longer.cells[UNION].values()] == [(20, 33), (10, 65)]
    assert plain.cells[NAMES[0]][32].ids.reshape(-1)[:20].tolist() == longer.cells[NAMES[0]][32].ids.reshape(-1)[:20].tolist()
    alone = load(FILES, str(TINY / "tokenizer"), SIZES, with_union=False)
    assert list(alone.cells) == list(NAMES)
    assert alone.tokenizer_sha256 == plain.tokenizer_sha256


def test_the_noise_floor(start: Start, tmp_path: Path) -> None:
    """Twice, in another order and other batches; done again, what is there stays; another mask makes it anew."""
    server = start()
    arguments = ["noise-floor", "--url", server.url, "--key", "right", "--tokenizer", TINY / "tokenizer", "-o", tmp_path / "noise"]
    sizes = ["--packs", FILES[0], "--seq-lens", "64", "--num-blocks", 12, "--gates", gates_file(tmp_path)]

    def run() -> tuple[int, str]:
        result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(one) for one in [*arguments, *sizes]])
        return result.exit_code, " ".join(result.output.split())

    code, output = run()
    assert code == 0, output
    assert "PASS by here" in output
    assert sorted(path.name for path in (tmp_path / "noise").iterdir()) == ["first.json", "gate.json", "second.json"]
    half = len(server.engine.scored) // 2
    assert half == 6  # UNION of one pack has its blocks
    first, second = server.engine.scored[:half], server.engine.scored[half:]
    assert sorted(first) == sorted(second)
    assert first != second
    rows = json.loads((tmp_path / "noise" / "gate.json").read_text())["rows"]
    assert [row["delta"]["ppl"]["value"] for row in rows] == [0.0] * 2
    sent = len(server.engine.scored)
    code, output = run()
    # A block each is scored again.
    assert (code, output.count("skipped, it is there and was made of the same"), len(server.engine.scored)) == (0, 2, sent + 2)
    server.engine.weights, sent = 1, len(server.engine.scored)
    code, output = run()
    assert (code, "skipped" in output, len(server.engine.scored)) == (0, False, sent + 2 + 2 * half)
    sent = len(server.engine.scored)
    client_of(server).put_mask(make_mask([[0, 1, 2], None, [3, 4]], server.engine.ranks[0]))
    code, output = run()
    assert (code, "skipped" in output, len(server.engine.scored)) == (0, False, sent + 2 * half)
    (tmp_path / "noise" / "second.json").unlink()
    server.engine.fault = "absent"
    code, output = run()
    assert (code, "found no log-probabilities" in output) == (3, True)


def test_a_rewrite_of_all_experts(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written once, verified again, served beside its source, and refused once it was changed."""
    places: list[str] = []

    @contextmanager
    def serving(engine: str, model: Path, seq_len: int, flags: Sequence[str]) -> Iterator[ServerClient]:
        places.append(model.name)
        assert (engine, seq_len, list(flags)) == ("vllm", 64, ["--softprune-control", "--enforce-eager"])
        yield client_of(start())

    monkeypatch.setattr(noise, "serving", serving)
    monkeypatch.setattr(noise, "servable", nullcontext)
    out = tmp_path / "no-op"
    command = ["no-op", TINY / "weights", "-o", out, "--packs", FILES[0], "--seq-lens", 64, "--num-blocks", 12]
    command += ["--gates", gates_file(tmp_path), "--engine", "vllm", "--engine-args=--enforce-eager"]

    def run() -> tuple[int, str]:
        result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(one) for one in command])
        return result.exit_code, " ".join(result.output.split())

    code, output = run()
    assert code == 0, output
    assert "PASS by here" in output
    assert places == ["weights", "rewritten"]
    assert sorted(path.name for path in out.iterdir()) == ["base.json", "gate.json", "rewritten", "rewritten.json"]
    code, output = run()
    assert (code, output.count("skipped")) == (0, 3)
    shard = next((out / "rewritten").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, output = run()
    assert (code, shard.name in output) == (3, True)


def gates_file(folder: Path) -> Path:
    """near-lossless-v1 for the length of these tests, and any JS2D, for which their tokens are too few."""
    shipped = json.loads((Path(evaluation.__file__).resolve().parent / "gates" / "near-lossless-v1.json").read_text())
    file = folder / "here.json"
    file.write_text(json.dumps({**shipped, "name": "here", "max_js2d": 1, "primary_seq_lens": [64]}))
    return file


def test_a_recipe_is_run(start: Start, tmp_path: Path) -> None:
    """Each run of its matrix into a file of its own; options go before what it says; the top_k that it says is the server's."""
    recipe = tmp_path / "eval.yaml"
    text = {
        "schema_version": 1, "calib_packs": {"pack_files": [str(file) for file in FILES]}, "model": {"label": "it"},
        "collector_defaults": {"top_k": 2, "num_blocks": 12, "sample_points": 7},
        "run_matrix": [{"name": f"len{length}", "collector_overrides": {"seq_lens_csv": length}} for length in (32, 64)],
    }  # fmt: skip
    recipe.write_text(json.dumps(text))
    server = start()
    code, output = cli(server, tmp_path / "base.json", "--recipe", recipe, "--concurrency", 3)
    assert code == 0, output
    for length in (32, 64):
        found = evaluation.read(tmp_path / f"base.len{length}.json")
        assert (found.label, found.meta["batch_size"], found.meta["sample_points"]) == ("it", 3, 7)
        assert list(found.cells) == [(name, length) for name in (*NAMES, UNION)]
    code, output = cli(server, tmp_path / "one.json", "--recipe", recipe, "--run", "len32", "--num-blocks", 8, "--no-union")
    assert code == 0, output
    one = evaluation.read(tmp_path / "one.json")
    assert ([*one.cells], one.meta["num_blocks"]) == ([(name, 32) for name in NAMES], 8)
    assert cli(server, tmp_path / "x.json", "--recipe", recipe, "--run", "len3")[0] == 2
    recipe.write_text(json.dumps({**text, "collector_defaults": {"top_k": 4}}))
    code, output = cli(server, tmp_path / "x.json", "--recipe", recipe)
    assert (code, f"{server.url}: top_k: found 2; expected 4, as {recipe} says" in output) == (2, True)


def test_a_file_that_is_no_evaluation_is_not_written_over(start: Start, packs: PackSet, tmp_path: Path) -> None:
    mask = tmp_path / "keep24.json"
    mask.write_text('{"format": "softprune.expert-mask"}')
    server = start()
    with pytest.raises(EvaluationFileError, match=r"keep24\.json"):
        evaluate(client_of(server), packs, mask)
    assert (mask.read_text(), server.engine.scored) == ('{"format": "softprune.expert-mask"}', [])
    assert list(tmp_path.iterdir()) == [mask]
