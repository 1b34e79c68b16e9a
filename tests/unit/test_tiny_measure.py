"""The figures of the small model are what they are called, computed by hand where that can be done."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softprune.bench.tiny import PACKS, baseline, baseline_kenlm, baseline_ngram
from softprune.bench.tiny.measure_bars import Bar, bars
from softprune.bench.tiny.measure_curve import plot_curve, read_curve
from softprune.bench.tiny.measure_packs import block_hashes, heldout_blocks, load_tokenizer
from softprune.bench.tiny.measure_routing import Selections, random_mask, recorded, router_modules, routers
from softprune.bench.tiny.measure_samples import Prompt, cut_prompt, declared_functions, first_call, generate, judge_calls
from softprune.bench.tiny.weights import HERE as TINY
from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.families import ModelSpec
from softprune.errors import InputError
from softprune.evaluate.harmony import HarmonyError
from softprune.evaluate.packing import Blocks
from softprune.evaluate.reference import load_reference, score
from softprune.runtime.router_mask import RouterMask
from softprune.stats.figures import js_divergence

SYSTEM = "<|start|>system<|message|>Small.<|end|>"
TOOLS = "namespace functions {\n// Adds.\ntype add = (_: {a: number}) => any;\ntype now = () => any;\n}"
DEVELOPER = f"<|start|>developer<|message|>{TOOLS}<|end|>"
USER = "<|start|>user<|message|>Add type lie = (1).<|end|>"
CALL = '<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 2}<|call|>'
ANSWER = "<|start|>functions.add to=assistant<|channel|>commentary<|message|>{}<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)  # on a busy machine, small products wait for each other's threads
    return load_reference(TRAINED)


def test_js_by_hand() -> None:
    a, b = np.array([[1, 1, 0], [2, 2, 2], [5, 0, 0]]), np.array([[0, 3, 3], [7, 7, 7], [0, 0, 2]])
    # Halves {1, 2} and {2, 3} meet in the middle at (1/4, 1/2, 1/4): each is ln 2 / 2 away.
    assert js_divergence(a, b).tolist() == pytest.approx([math.log(2) / 2, 0.0, math.log(2)])
    assert js_divergence(b, a).tolist() == pytest.approx(js_divergence(a, b).tolist())


def test_histograms_by_hand() -> None:
    passes = [[np.array([[0, 1], [0, 2]]), np.array([[3, 0]])], [np.array([[1, 2], [1, 2]]), np.array([[1, 0]])]]
    selections = Selections(passes)
    assert selections.histogram(4).tolist() == [[3, 1, 1, 1], [1, 3, 2, 0]]
    assert selections.histogram(4, np.array([[False, True, True]])).tolist() == [[2, 0, 1, 1], [1, 2, 1, 0]]


def test_routers_are_recorded_and_obey_a_mask(model: Any) -> None:
    ids = np.random.default_rng(0).integers(20, 500, (2, 24)).astype(np.int32)
    with recorded(model) as selections:
        plain = score(model, ids, 1).log_p
    counts = selections.histogram(32)
    assert counts.shape == (4, 32)
    assert (counts.sum(-1) == ids.size * 4).all()
    mask, spec = RouterMask(routers(model)), ModelSpec("GptOssForCausalLM", (0, 1, 2, 3), 32, 4)
    chosen = random_mask(spec, 16, 0)
    mask.apply(chosen)
    try:
        with recorded(model) as selections:
            masked = score(model, ids, 2).log_p
        mask.verify(model.config.hidden_size, torch.float32)
    finally:
        mask.apply(None)
    counts = selections.histogram(32)
    for layer in range(4):
        assert counts[layer, chosen.pruned(layer)].sum() == 0
        assert counts[layer, chosen.kept(layer)].sum() == ids.size * 4
    assert not np.allclose(masked[:, 1:], plain[:, 1:])
    assert np.array_equal(score(model, ids, 1).log_p, plain, equal_nan=True)
    assert len(selections.passes[0]) == 1, "the hooks have to be gone"
    assert len(router_modules(model)) == 4


def test_random_masks_are_seeded() -> None:
    spec = ModelSpec("GptOssForCausalLM", (0, 1), 32, 4)
    masks = [random_mask(spec, 16, seed) for seed in (0, 0, 1)]
    assert masks[0].keep == masks[1].keep != masks[2].keep
    assert masks[0].num_kept == [16, 16]
    assert masks[0].keep[0] != masks[0].keep[1]


def test_batched_answers_equal_single_ones(model: Any) -> None:
    tokenizer = load_tokenizer(TRAINED)
    prompts = [SYSTEM + USER, SYSTEM, SYSTEM + USER + FINAL + USER]
    done: list[int] = []
    together = generate(model, tokenizer, prompts, 6, progress=done.append)
    assert together == [generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert done == [3]
    assert all(together)


def test_prompts_end_before_the_last_turn() -> None:
    first, last = USER + CALL + ANSWER + FINAL, USER + CALL + ANSWER + FINAL.replace("Done", "Again")
    assert cut_prompt(SYSTEM + first + last, 3) == Prompt(3, SYSTEM + first + USER, last.removeprefix(USER))
    assert cut_prompt(SYSTEM, 0) is None
    assert cut_prompt(SYSTEM + USER, 0) is None
    assert declared_functions(SYSTEM + DEVELOPER + USER) == {"add", "now"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FINAL, "no message with a recipient"),
        (CALL.removesuffix("<|call|>"), "the end of the text"),
        (CALL.replace("add", "sub"), "recipient: found 'functions.sub'; expected functions. and one of add, now"),
        (CALL.replace("functions.add", "add"), "recipient: found 'add'"),
        (CALL.replace("<|call|>", "<|end|>"), "terminator: found <|end|>"),
        (CALL.replace("2}", "2"), "arguments: found no JSON"),
        (CALL.replace('{"a": 2}', "[2]"), "arguments: found list"),
        ("Sure. " + CALL, "expected <|start|>"),
    ],
)
def test_bad_calls(text: str, message: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        first_call(text, {"add", "now"})
    assert message in str(caught.value)


def test_shares_of_calls() -> None:
    prompts = [Prompt(i, DEVELOPER + USER, CALL + ANSWER + FINAL) for i in range(4)]
    analysis = "<|start|>assistant<|channel|>analysis<|message|>I add.<|end|>"
    texts = [analysis + CALL, CALL.replace("2", "3"), CALL.replace("functions.add", "functions.now"), FINAL]
    found = judge_calls(prompts, texts)
    assert (found["prompts"], found["valid"], found["same_name"], found["same_call"]) == (4, 0.75, 0.5, 0.25)
    assert [failure["row"] for failure in found["failures"]] == [3]


def test_training_streams_are_cut_into_conversations() -> None:
    # EOS is 9; conversations begin with 1 2. One ends with an EOS id of its own, one has one inside.
    stream = np.array([1, 2, 5, 9, 9, 1, 2, 9, 1, 3, 9, 1, 2, 6, 9], np.uint16)
    parts = baseline_ngram.split_conversations(stream, 9, [1, 2])
    assert [part.tolist() for part in parts] == [[1, 2, 5, 9], [1, 2, 9, 1, 3], [1, 2, 6]]


def blocks_of(ids: list[list[int]], rows: list[list[int]]) -> Blocks:
    keep = np.ones((len(ids), len(ids[0])), np.bool_)
    keep[:, 0] = False
    return Blocks(np.array(ids, np.int32), keep, np.array(rows, np.int32), 2, "")


def test_ngram_scores_of_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def query(_command: Any, input: str) -> Any:
        asked.append(input)
        lines = ["\t".join(f"{word}={0 if word == '8' else 5} 2 -{word}.0" for word in line.split()) for line in input.splitlines()]
        return SimpleNamespace(stdout="".join(line + "\t</s>=2 1 -1.5\tTotal: -1.0 OOV: 0\n" for line in lines))

    monkeypatch.setattr(baseline_ngram, "run", query)
    ngram = baseline_ngram.Ngram(baseline_kenlm.Kenlm(tmp_path, tmp_path), tmp_path / "arpa", {})
    blocks = blocks_of([[3, 4, 5], [6, 7, 8]], [[0, 0, 0], [0, 1, 1]])
    log_p, unknown = baseline_ngram.score_blocks(ngram, blocks)
    assert asked == ["3 4 5 6\n7 8\n"]
    assert unknown == 1
    np.testing.assert_allclose(log_p, -np.array([[3, 4, 5], [6, 7, 8]]) * math.log(10), rtol=1e-6)
    figures = baseline.evaluate(ngram, blocks)
    assert figures["ppl"] == pytest.approx(10**6)
    document = {"packs": {"code": json.loads(json.dumps(figures))}}
    first = Blocks(blocks.ids[:1], blocks.keep[:1], blocks.row[:1], 1, "")
    assert baseline.perplexity_on(document, "code", first, "f") == pytest.approx(10**4.5, rel=1e-4)
    with pytest.raises(InputError, match="f: packs.code: found 1 unknown blocks of 1"):
        baseline.perplexity_on(document, "code", blocks_of([[3, 4, 6]], [[0, 0, 0]]), "f")
    monkeypatch.setattr(baseline_ngram, "run", lambda *_, **__: SimpleNamespace(stdout="3=5 1 -1\n"))
    with pytest.raises(baseline_kenlm.KenlmError, match="expected one entry a word"):
        ngram.log_p([np.array([3, 4])])


def test_block_hashes_see_ids_and_mask() -> None:
    blocks = blocks_of([[3, 4, 5], [3, 4, 5], [3, 4, 6]], [[0] * 3] * 3)
    blocks.keep[1, 2] = False
    assert len(set(block_hashes(blocks))) == 3


def test_a_failing_program_says_why() -> None:
    with pytest.raises(baseline_kenlm.KenlmError, match=r"(?s)sh: found exit status 3; expected 0.*bad corpus"):
        baseline_kenlm.run(["sh", "-c", "echo bad corpus >&2; exit 3"])
    with pytest.raises(baseline_kenlm.KenlmError, match="no-such-program: found no such program"):
        baseline_kenlm.run(["no-such-program"])


def document(ratio: float | None = 0.5, **parts: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "perplexity": {pack: {"ratio": ratio} for pack in (*PACKS, "UNION")},
        "routing": {"min_share": [0.01, 0.002], "js": {"a and b": {"mean": 0.03}}},
        "pruning": {"num_kept": 16, "rise": 0.2},
        "storage": {"relative": -0.01},
        "second_seed": {"same_order": True},
        "tool_calls": {"valid": 0.8, "prompts": 200},
        "samples": {"code": [{}] * 8},
    }
    return {**whole, **parts}


def test_bars() -> None:
    assert all(bar.passed is True for bar in bars(document()))
    failing = {
        "perplexity": document(0.701)["perplexity"],
        "routing": {"min_share": [0.0019, 0.01], "js": {"a and b": {"mean": 0.029}}},
        "pruning": {"num_kept": 16, "rise": 0.149},
        "storage": {"relative": -0.021},
        "second_seed": {"same_order": False},
        "tool_calls": {"valid": 0.79, "prompts": 199},
        "samples": {"code": [{}] * 8, "chat_if": [{}] * 7},
    }
    assert all(bar.passed is False for bar in bars({**document(), **failing}))
    missing = [bar.name for bar in bars(document(None, storage=None, second_seed=None)) if bar.passed is None]
    assert len(missing) == 7
    assert Bar("x", 0.0, ">=", 1).record() == {"name": "x", "value": 0.0, "bar": ">= 1", "passed": False}


def test_curve(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    points = [{"step": i, "tokens": i * 1000, "seconds": i, "train_loss": 8.0 - i, "heldout": {"code": 90.0 - i}} for i in range(3)]
    file.write_text(json.dumps([*points, {"step": 9, "tokens": 9000, "seconds": 9, "train_loss": 1}]))
    for name in ("a.svg", "b.svg"):
        plot_curve(read_curve(file), {"code": 20.0}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for content, message in (("[]", "at least one point"), ("{", "no JSON"), ('[{"step": 1}]', r"\[0\].tokens")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            read_curve(file)


def test_heldout_blocks_are_those_that_the_committed_figures_are_of() -> None:
    """Cheap proof that today's code cuts the blocks that the weights were judged on; a comparison with engines stands on them."""
    document = json.loads((TINY.parent / "results" / "tiny.json").read_text(encoding="utf-8"))
    found = heldout_blocks(TINY / "packs", load_tokenizer(TINY / "tokenizer"), document["settings"]["num_blocks"])
    assert set(found) == {*PACKS, "UNION"}
    for pack, blocks in found.items():
        recorded = document["perplexity"][pack]
        assert (blocks.num_kept, blocks.rows_seen, blocks.rows_sha256) == tuple(
            recorded[name] for name in ("kept_tokens", "rows_seen", "rows_sha256")
        ), pack
    ngram = json.loads((TINY.parent / "results" / "tiny_ngram.json").read_text(encoding="utf-8"))["packs"]
    assert all([digest for digest, *_ in ngram[pack]["blocks"]][:48] == block_hashes(blocks) for pack, blocks in found.items())
    compared = json.loads((TINY.parent / "results" / "tiny_vllm_cpu.json").read_text(encoding="utf-8"))["packs"]
    assert {pack: int(found[pack].keep[:12].sum()) for pack in PACKS} == {pack: one["completion_tokens"] for pack, one in compared.items()}
