"""A sweep puts every mask in force, evaluates and gates it, goes on after an interruption, and leaves servers as it found them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from softprune.bench.tiny.weights import HERE as TINY
from softprune.cli import app
from softprune.control import KEY_ENV
from softprune.errors import InputError, MaskError, SoftpruneError
from softprune.evaluate import gates as gates_module
from softprune.evaluate.eval_packs import PackSet, Sizes, load
from softprune.evaluate.evaluate import EvalSettings
from softprune.mask import MaskModel
from softprune.ranking import scores_file
from softprune.ranking.scores import Scores
from softprune.selection.select import Protect
from softprune.server_client import ServerClient
from softprune.stats import file as stats_file
from softprune.stats.collect_packs import load_tokenizer
from softprune.sweep import sweep as sweep_module
from softprune.sweep.cells import Cell, of_files, of_masks, of_rankings, of_statistics
from softprune.sweep.decode import Decode
from softprune.sweep.errors import SweepError
from softprune.sweep.pareto import pareto_front
from softprune.sweep.sweep import Settings, Sweep
from softprune.sweep.table import table
from tests.unit.fake_control import EXPERTS, LAYERS, TOP_K, ServedFake, make_launch, make_mask, make_model
from tests.unit.scoring_engine import ScoringEngine, served
from tests.unit.stats_of import collected

PACK = TINY / "packs" / "code.parquet"
GATES = gates_module.Gates(
    format="softprune.gates", version=1, name="wide", max_abs_delta_ppl=1e9, max_rel_delta_ppl=1e9, max_abs_delta_cc_rate=1,
    max_abs_delta_mean_prob=1, max_js2d=1, primary_pack="UNION", primary_seq_lens=[32],
)  # fmt: skip
SETTINGS = Settings(GATES, EvalSettings(concurrency=2))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "right")


@pytest.fixture(scope="module")
def packs() -> dict[int | None, PackSet]:
    return {None: load([PACK], str(TINY / "tokenizer"), Sizes((32,), 12))}


@pytest.fixture
def servers() -> Iterator[Any]:
    """servers(top_k=…): one more server, with a mask in force."""
    with ExitStack() as stack:

        def one(top_k: int = TOP_K) -> ServedFake:
            engine = ScoringEngine(tokenizer=load_tokenizer(str(TINY / "tokenizer")))
            engine.launch = make_launch(top_k=top_k)
            engine.ranks = [make_model(engine.launch)]
            fake = stack.enter_context(served(engine))
            ServerClient(fake.url).put_mask(mask_of(7, fake))
            return fake

        yield one


def mask_of(keep: int, fake: ServedFake) -> Any:
    return make_mask([list(range(keep))] * LAYERS, fake.engine.ranks[0])


def cells_of(fake: ServedFake, *keeps: int) -> list[Cell]:
    return of_masks([(f"keep{keep}", mask_of(keep, fake)) for keep in keeps])


def scores(method: str, seed: int, fingerprint: str | None = None, source: str = "scores.yaml") -> Scores:
    model = MaskModel(architecture="GptOssForCausalLM", num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, fingerprint=fingerprint)
    return Scores(method, model, np.random.default_rng(seed).random((LAYERS, EXPERTS)), "x", "anything", source=source)


def test_cells_of_scores() -> None:
    rankings = of_files([scores("reap", 0, source="a.yaml"), scores("reap", 1, source="b.yaml"), scores("ean", 2)])
    cells = of_rankings(rankings, [6, 4], Protect(), random_seeds=[0, 1])
    assert [cell.label for cell in cells] == [
        "reap (a) keep 6", "reap (a) keep 4", "reap (b) keep 6", "reap (b) keep 4", "ean keep 6", "ean keep 4",
        "random keep 6 seed 0", "random keep 4 seed 0", "random keep 6 seed 1", "random keep 4 seed 1",
    ]  # fmt: skip
    assert [cell.name for cell in cells[:2]] == ["reap-a-keep-6", "reap-a-keep-4"]
    assert all(cell.mask.num_kept == [cell.keep] * LAYERS for cell in cells)
    assert len({cell.mask.hash for cell in cells}) == len(cells)
    with pytest.raises(InputError, match="different models"):
        of_rankings([("a", scores("reap", 0, "sha256:" + "a" * 64)), ("b", scores("reap", 1, "sha256:" + "b" * 64))], [4])
    with pytest.raises(InputError, match="twice"):
        of_rankings(of_files([scores("reap", 0), scores("reap", 1)]), [4])
    with pytest.raises(InputError, match="no scores"):
        of_rankings([], [4], random_seeds=[0])
    mask = make_mask([list(range(4))] * LAYERS)
    for name in ("base", "sweep", "unmasked", "a.gate", "a.decode"):
        with pytest.raises(InputError, match=f"found '{name}'; expected a name other than"):
            of_masks([(name, mask)])


def test_cells_of_a_grid_of_parameters(tmp_path: Path) -> None:
    """Statistics are ranked again with every combination; each that the parameters change gives another mask."""
    file = tmp_path / "stats.safetensors"
    stats_file.write(collected("a"), file)
    rankings = of_statistics([file], ["eaft_reap"], {"w_conflict": [-50.0, 0.0], "w_uncertain": [0.0, 1.0]}, {})
    assert [label for label, _ in rankings] == [
        f"eaft_reap w_conflict={conflict} w_uncertain={uncertain}" for conflict in (-50, 0) for uncertain in (0, 1)
    ]
    assert len({one.values.tobytes() for _, one in rankings}) == 4


def test_pareto() -> None:
    points = [(1.0, 1.0), (1.2, 1.1), (1.1, 1.2), (1.2, 1.1), (0.9, 0.9), (1.0, 1.5)]
    assert pareto_front(points) == [True, True, False, True, True, False]


def test_a_mask_that_is_slower_and_worse_than_none_is_not_on_the_front() -> None:
    def entry(speed: float, loss: float) -> dict[str, Any]:
        return {"decode": {"over_base": speed}, "rel_ppl": loss}

    found = sweep_module._with_front([entry(0.9, 0.1), entry(1.1, 0.2), {"decode": None, "rel_ppl": 0.0}])
    assert [one["pareto"] for one in found] == [False, True, False]


def test_a_sweep(servers: Any, packs: Any, tmp_path: Path) -> None:
    """Files, verdicts, one evaluation a mask, and the mask that was in force afterwards."""
    fake, said = servers(), []
    cells = cells_of(fake, 6, 4)
    run = Sweep([ServerClient(fake.url)], cells, packs, tmp_path, SETTINGS, said.append)
    fake.api.asked.clear()
    document = run.run()
    assert document == json.loads((tmp_path / "sweep.json").read_text())
    assert (document["base"], document["error"], document["gates"]) == ("base.json", None, "wide")
    assert [(one["label"], one["keep"], one["verdict"], one["mask_hash"]) for one in document["cells"]] == [
        (f"keep{cell.keep}", cell.keep, "PASS", cell.mask.hash) for cell in cells
    ]
    for one in document["cells"]:
        own = json.loads((tmp_path / one["evaluation"]).read_text())["meta"]["softprune"]
        assert own["mask"] == one["mask_hash"] == json.loads((tmp_path / one["gate"]).read_text())["candidate"]["mask"]
        assert (tmp_path / one["mask"]).read_text() == next(cell.mask for cell in cells if cell.label == one["label"]).dump()
        assert set(one["ppl"]) == {"code@32", "UNION@32"}
    assert [None if text is None else json.loads(text)["keep"][0] for text, _ in fake.api.asked] == [
        None, list(range(6)), list(range(4)), list(range(7)),
    ]  # fmt: skip
    assert fake.api.in_force is not None
    assert fake.api.in_force.hash == mask_of(7, fake).hash
    asked = len(fake.engine.scored)
    again = Sweep([ServerClient(fake.url)], cells, packs, tmp_path, SETTINGS, said.append).run()
    assert again["cells"] == document["cells"]
    # A block of each evaluation is scored again.
    assert len(fake.engine.scored) == asked + 3
    assert "keep4: skipped, keep4.json is there and was made of the same" in said
    shown = table(document)
    assert shown.row_count == 2


def test_one_that_is_cut_off(servers: Any, packs: Any, tmp_path: Path) -> None:
    """A server that dies in the middle: what was measured stays, the mask is put back, and the rest comes out the same."""
    fake = servers()
    cells = cells_of(fake, 6, 4)
    whole = Sweep([ServerClient(fake.url)], cells, packs, tmp_path / "whole", SETTINGS).run()
    blocks = len(fake.engine.scored) // 3
    # In the middle of the third evaluation.
    fake.engine.fault, fake.engine.faulty = "die", len(fake.engine.scored) + 2 * blocks + blocks // 2
    with pytest.raises(SoftpruneError):
        Sweep([ServerClient(fake.url)], cells, packs, tmp_path / "cut", SETTINGS).run()
    cut = json.loads((tmp_path / "cut" / "sweep.json").read_text())
    assert [one["label"] for one in cut["cells"]] == ["keep6"]
    assert "no answer" in cut["error"]
    assert "127.0.0.1" not in cut["error"]
    assert fake.api.in_force is not None
    assert fake.api.in_force.hash == mask_of(7, fake).hash
    fake.engine.fault, asked = "", len(fake.engine.scored)
    found = Sweep([ServerClient(fake.url)], cells, packs, tmp_path / "cut", SETTINGS).run()
    assert found["cells"] == whole["cells"]
    # A block of each of the three is scored again as well.
    assert 0 < len(fake.engine.scored) - asked - 3 < blocks


def test_other_rows_and_another_server(servers: Any, tmp_path: Path) -> None:
    """Each order of the rows has its own base; a second server is judged against the first, and its unmasked model too."""
    first, second = servers(), servers(top_k=1)
    cells = cells_of(first, 4)
    packs: dict[int | None, PackSet] = {seed: load([PACK], str(TINY / "tokenizer"), Sizes((32,), 12), data_seed=seed) for seed in (0, 1)}
    document = Sweep([ServerClient(first.url), ServerClient(second.url)], cells, packs, tmp_path, SETTINGS).run()
    assert [(one["label"], one["data_seed"], one["base"], one["top_k"], one["verdict"]) for one in document["cells"]] == [
        (label, seed, f"base.data{seed}.json", top_k, "PASS")
        for label, top_k in (("keep4", 2), ("unmasked on server 2 (top_k 1)", 1), ("keep4 on server 2 (top_k 1)", 1)) for seed in (0, 1)
    ]  # fmt: skip
    hashes = [json.loads((tmp_path / f"base.data{seed}.json").read_text())["packs"][0]["seq"]["32"]["rows_sha256"] for seed in (0, 1)]
    assert hashes[0] != hashes[1]
    for fake in (first, second):
        assert fake.api.in_force is not None
        assert fake.api.in_force.hash == mask_of(7, fake).hash


def test_speed_beside_quality(servers: Any, packs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed masks that nothing beats in both are marked."""
    fake, timed = servers(), []
    speeds = {"keep6": 1.3, "keep4": 1.2}

    def decode_beside(base: Any, server: Any, mask: Any, label: str, decode: Decode) -> dict[str, Any]:
        timed.append(label)
        ratio = {"median": speeds[label], "low": None, "high": None}
        row = {"batch": 8, "figure": "decode_tok_s", "b": {"decode_tok_s": {"median": 50.0}}, "ratio": {"decode_tok_s": ratio}}
        sizes = {"batches": [decode.batch], **{name: getattr(decode, name) for name in ("prompt_tokens", "max_new_tokens", "repeats")}}
        side = {"name": label, "softprune": {"mask_hash": mask.hash}}
        return {"format": "softprune.decode-comparison", "settings": sizes, "sides": {"b": side}, "results": [row], "error": None}

    monkeypatch.setattr(sweep_module, "decode_beside", decode_beside)
    settings = Settings(GATES, EvalSettings(), Decode())
    document = Sweep([ServerClient(fake.url)], cells_of(fake, 6, 4), packs, tmp_path, settings).run()
    by_label = {one["label"]: one for one in document["cells"]}
    assert {label: one["decode"]["over_base"] for label, one in by_label.items()} == speeds
    better = by_label["keep6"]["rel_ppl"] <= by_label["keep4"]["rel_ppl"]
    assert {label: one["pareto"] for label, one in by_label.items()} == {"keep6": True, "keep4": not better}  # both faster than the base
    Sweep([ServerClient(fake.url)], cells_of(fake, 6, 4), packs, tmp_path, settings).run()
    assert timed == ["keep6", "keep4"]  # once, as evaluations
    with pytest.raises(SweepError, match=r"keep6\.decode\.json: found decoding measured otherwise"):
        Sweep([ServerClient(fake.url)], cells_of(fake, 6, 4), packs, tmp_path, Settings(GATES, EvalSettings(), Decode(batch=9))).run()


def test_refused_before_anything_is_switched(servers: Any, packs: Any, tmp_path: Path) -> None:
    fake = servers()
    client = ServerClient(fake.url)
    fake.api.asked.clear()
    other = of_masks([("other", make_mask([list(range(4))] * LAYERS, make_model(seed=5)))])
    with pytest.raises(MaskError, match=r"other: model\.fingerprint"):
        Sweep([client], other, packs, tmp_path, SETTINGS)
    narrow = of_masks([("narrow", make_mask([list(range(4))] * LAYERS, fake.engine.ranks[0], top_k=1))])
    with pytest.raises(SweepError, match=f"top_k: found 1; expected null, or {TOP_K}"):
        Sweep([client], narrow, packs, tmp_path, SETTINGS)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "keep4.json").write_text("{}")
    with pytest.raises(SweepError, match="another mask"):
        Sweep([client], cells_of(fake, 4), packs, tmp_path, SETTINGS).run()
    assert fake.api.asked == []


def test_an_evaluation_of_something_else_is_not_taken(servers: Any, packs: Any, tmp_path: Path) -> None:
    fake = servers()
    Sweep([ServerClient(fake.url)], cells_of(fake, 4), packs, tmp_path, SETTINGS).run()
    (tmp_path / "base.json").write_text((tmp_path / "keep4.json").read_text())
    with pytest.raises(SweepError, match=r"base\.json: found an evaluation of something else"):
        Sweep([ServerClient(fake.url)], cells_of(fake, 4), packs, tmp_path, SETTINGS).run()


def test_the_command(servers: Any, tmp_path: Path) -> None:
    fake = servers()
    scores_file.write(scores("reap", 0, fake.engine.ranks[0].fingerprint), tmp_path / "reap.yaml")
    gates = tmp_path / "wide.json"
    gates.write_text(GATES.model_dump_json())
    arguments = [
        "sweep", "--url", fake.url, "--packs", PACK, "--scores", tmp_path / "reap.yaml", "--keep", "6,4", "--random-seeds", "3",
        "--seq-lens", "32", "--num-blocks", 12, "--tokenizer", TINY / "tokenizer", "--gates", gates, "--decode-batch", 0,
        "--out", tmp_path / "out",
    ]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "4 masks" in result.output
    names = [*(f"reap-keep-{keep}" for keep in (6, 4)), *(f"random-keep-{keep}-seed-3" for keep in (6, 4))]
    written = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert written == {"sweep.json", "base.json", *(f"{name}{end}.json" for name in names for end in ("", ".gate"))}
    for wrong, said in (
        (["--masks", "a.json"], "one of the two ways"),
        (["--grid", "x=1"], "together"),
        (["--keep", "a"], "whole numbers"),
    ):
        result = CliRunner(env={"COLUMNS": "300"}).invoke(app, list(map(str, [*arguments, *wrong])), catch_exceptions=False)
        assert result.exit_code == 2
        assert said in result.output
