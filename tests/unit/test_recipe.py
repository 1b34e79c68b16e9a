"""The study's recipes are read in both shapes and run; ours come back as written; locks are obeyed; what is there is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import softprune
from softprune import mask as mask_file
from softprune.checkpoint.families import read_config
from softprune.checkpoint.manifest import read_manifest
from softprune.checkpoint.verify import verify_checkpoint
from softprune.cli import app
from softprune.errors import CheckpointError, SoftpruneError
from softprune.mask import MaskModel
from softprune.ranking import scores_file
from softprune.ranking.api import model_of_checkpoint, rank
from softprune.recipe.errors import RecipeError
from softprune.recipe.lock import lock_path
from softprune.recipe.prune import prune
from softprune.recipe.read import read_recipe
from softprune.recipe.recipe import Recipe
from softprune.recipe.run import Outcome, Places, lock, run
from softprune.selection.select import Protect, Union, select
from softprune.stats.file import write
from softprune.stats.header import MaskEpoch
from tests.unit.stats_of import header
from tests.unit.study_files import FLAT, KEEP20, KEEP24

STUDY_EAFT = {"cc_quantile": 0.15, "uncertain_quantile": 0.85, "w_good": 1.0, "w_uncertain": 0.25, "w_conflict": -2.0}


def file_of(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_the_studys_first_shape(tmp_path: Path) -> None:
    recipe = read_recipe(file_of(tmp_path, KEEP24))
    assert (recipe.name, recipe.base_model) == ("eaftreap_keepfrac075_keep24_uniform", "openai/gpt-oss-20b")
    assert recipe.description == "EAFT-REAP at keep_frac=0.75, with a few core experts."
    assert (recipe.method, dict(recipe.parameters)) == ("eaft_reap", STUDY_EAFT)
    assert dict(recipe.budget) == {"keep": 24, "keep_multiple": 4}
    assert recipe.protect == Protect(top_mass=4)
    assert (recipe.num_experts, recipe.top_k, recipe.max_shard_bytes) == (32, 4, 5_000_000_000)
    assert recipe.notes["profiling_data"]["sampling"]["seed"] == 3407
    assert (recipe.statistics, recipe.model, recipe.union) == ((), None, None)


def test_numbers_that_stand_elsewhere(tmp_path: Path) -> None:
    recipe = read_recipe(file_of(tmp_path, KEEP20))
    assert (recipe.method, dict(recipe.parameters)) == ("eaft_reap", STUDY_EAFT)
    assert dict(recipe.budget) == {"keep": 20, "keep_multiple": 4}
    # Without a number, the share is what was asked for, rounded up to the multiple: 20 of 32.
    asked = read_recipe(file_of(tmp_path, KEEP20.replace("keep_n: 20", "keep_n: null")))
    assert dict(asked.budget) == {"keep_frac": 0.6, "keep_multiple": 4}


def test_the_studys_second_shape(tmp_path: Path) -> None:
    file = file_of(tmp_path, FLAT)
    with pytest.raises(
        RecipeError, match="variants: found calib_union_keep24of32_k75_eaftreap, calib_union_keep20of32_k62_eaftreap; expected one"
    ):
        read_recipe(file)
    recipe = read_recipe(file, "calib_union_keep24of32_k75_eaftreap")
    assert (recipe.method, dict(recipe.budget)) == ("eaft_reap", {"keep": 24, "keep_multiple": 4})
    assert dict(recipe.parameters) == {**STUDY_EAFT, "w_conflict": -1.0}
    assert read_recipe(file, "calib_union_keep20of32_k62_eaftreap").budget == {"keep_frac": 0.6, "keep_multiple": 4}
    with pytest.raises(RecipeError, match="no variant 'x'"):
        read_recipe(file, "x")
    with pytest.raises(RecipeError, match="--variant"):
        read_recipe(file_of(tmp_path, KEEP24), "x")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("schema_version: 1", "schema_version: true", "schema_version: found True; expected 1"),
        ("kind: reap_recipe", "kind: reap_scores", "kind: found 'reap_scores'"),
        ("w_good: 1.0", "w_god: 1.0", r"scoring\.weights\.w_god: found an unknown key"),
        ("cc_quantile: 0.15", "cc_quantil: 0.15", r"scoring\.cc_quantil: found an unknown key"),
        ("entropy_topk: 20", "entropy_topk: 50", r"scoring\.entropy_topk: found 50; expected 20"),
        ("keep_n: 24", "keep_m: 24", r"model\.keep_m: found an unknown key"),
        ("top_k_unchanged: true", "top_k_unchanged: false", r"model\.top_k_unchanged: found False; expected true"),
        (
            "  keep_n: 24\n",
            "  keep_n: null\n  constraints: {keep_n_multiple_of: 8}\n",
            "keep_n_multiple_of: found 4 in selection_cons.*, 8 in model",
        ),
        ("writer: safetensors", "writer: torch", "structural_rewrite: found torch"),
        ("model:\n", "other: 1\nmodel:\n", "other: found an unknown key"),
        ("core_experts:", "core_expert:", r"selection_constraints\.core_expert: found an unknown key"),
        ("method: eaftreap", "method: eaft", r"recipe\.yaml: scoring\.method: found 'eaft'; expected one of "),
        ("keep_n: 24", 'keep_n: "24"', r"model\.keep_n: found '24'; expected a whole number"),
        ("keep_n: 24", "keep_n: 24.5", r"model\.keep_n: found 24.5; expected a whole number"),
        ("keep_n: 24", "keep_n: null\n  compression_ratio: [1]", r"model\.compression_ratio: found \[1\]; expected a share"),
        ("core_pos_top_m: 4", "core_pos_top_m: -3", r"core_experts\.core_pos_top_m: found -3; expected a whole number from 0 on"),
        ("core_count_top_m: 0", "core_count_top_m: x", r"core_experts\.core_count_top_m: found 'x'"),
        ("max_shard_size_gb: 5.0", "max_shard_size_gb: -1", r"max_shard_size_gb: found -1; expected a number of gigabytes"),
        ("max_shard_size_gb: 5.0", "max_shard_size_gb: much", r"max_shard_size_gb: found 'much'"),
        ("source:\n", "source:\n  statistics: 5\n", r"source\.statistics: found 5; expected a file, or a list of files"),
        ("source:\n", "source:\n  scores_yaml: 5\n", r"source\.scores_yaml: found 5; expected a path"),
        ("scoring:\n", "scoring:\n  tags: 5\n", r"tags: found 5; expected a mapping"),
        ("scoring:\n", "scoring:\n  tags: {code: much}\n", r"scoring\.tags\.code: found 'much'; expected a weight"),
        ("scoring:\n", "scoring:\n  normalise_tags: maybe\n", r"scoring\.normalise_tags: found 'maybe'; expected true or false"),
    ],
)
def test_misspelt_recipes_are_refused(tmp_path: Path, old: str, new: str, match: str) -> None:
    with pytest.raises(SoftpruneError, match=match):
        read_recipe(file_of(tmp_path, KEEP24.replace(old, new, 1)))


def test_ours_come_back_as_written(tmp_path: Path) -> None:
    recipe = Recipe(
        name="half", description="a test", base_model="some/model", method="eaft_reap", parameters={"rule": "policy", "w_conflict": -1.5},
        tags={"math": 2.0, "a: b": 1.0}, normalise_tags=True, budget={"keep_frac": 0.75, "rounding": "floor", "keep_multiple": 4},
        protect=Protect(2, 1, "none", 1), union=Union(0.95, 3, False), max_shard_gb=1.5, model="../model",
        statistics=("a.safetensors", "b.safetensors"), ranking="r.json", num_experts=32, top_k=4, notes={"evaluation": {"gates_json": "g"}},
    )  # fmt: skip
    file = file_of(tmp_path, recipe.dump())
    assert read_recipe(file) == recipe
    assert read_recipe(file).dump() == recipe.dump()
    # Ours is the study's first shape.
    assert yaml.safe_load(recipe.dump())["kind"] == "reap_recipe"


@pytest.fixture(scope="module")
def stats(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the synthetic model, as random as it is."""
    return made_stats(model_of_checkpoint(models["gpt-oss-mxfp4"]), tmp_path_factory.mktemp("stats") / "stats.safetensors")


def made_stats(model: MaskModel, path: Path, seed: int = 0) -> Path:
    import numpy as np

    from softprune.stats.file import Statistics
    from softprune.stats.header import Tokens
    from softprune.stats.layout import SPECS, shapes

    tags, rng = ("default", "math", "chat"), np.random.default_rng(seed)
    tokens = {tag: Tokens(prefill=1000, decode=0, cached=0) for tag in tags}
    head = header(f"run-{seed}", tags, ("reap", "eaft"), tokens, model=model, epochs=[MaskEpoch.of(f"run-{seed}", 0, None, model)])
    raw = {name: np.zeros(shape, SPECS[name].dtype) for name, shape in shapes(head).items()}
    raw["reap.count"][:] = rng.integers(1, 100, raw["reap.count"].shape)
    raw["eaft.grid_count"][:] = rng.integers(1, 100, raw["eaft.grid_count"].shape)
    for name in ("reap.norm_sum", "reap.gate_norm_sum", "eaft.grid_gate_norm"):
        raw[name][:] = rng.lognormal(3, 1, raw[name].shape)
    write(Statistics.of(head, raw), path)
    return path


def run_told(recipe: Path, **places: Any) -> tuple[Outcome, list[str]]:
    told: list[str] = []
    read = read_recipe(recipe)
    return run(read, Places.of(read, recipe, **places), told.append), told


def test_the_studys_recipe_makes_a_verified_checkpoint(models: dict[str, Path], stats: Path, tmp_path: Path) -> None:
    """One command; the second time all is there; a flipped byte and a changed statistics file are found."""
    model, file, out = models["gpt-oss-mxfp4"], file_of(tmp_path, KEEP24), tmp_path / "out"
    places = {"model": model, "statistics": (stats,), "out": out}
    outcome, told = run_told(file, **places)
    assert [text.split(":")[0] for text in told] == ["rank", "select", "rewrite", "lock"]
    assert not any("skipped" in text for text in told)
    assert verify_checkpoint(model, out).problems == []
    assert read_config(out)["num_local_experts"] == 24
    assert read_manifest(out).mask_hash == outcome.mask.hash
    assert (out / "recipe.yaml").read_text() == KEEP24
    # The mask is what rank and select give by themselves, and tells of its core experts.
    by_hand = select(rank(stats, "eaft_reap"), 24, protect=Protect(top_mass=4))
    assert outcome.mask.keep == by_hand.keep == mask_file.load(tmp_path / "out.mask.json").keep
    assert len(outcome.mask.provenance["layers"][0]["core by mass"]) == 4
    assert outcome.mask.provenance["recipe"] == "eaftreap_keepfrac075_keep24_uniform"
    pinned = json.loads(lock_path(file).read_text())
    assert pinned["model"]["fingerprint"] == model_of_checkpoint(model).fingerprint
    assert pinned["inputs"]["statistics"][0]["sha256"].startswith("sha256:")
    assert [(one["id"], one["num_hashes"]) for one in pinned["inputs"]["data_sets"]] == [("UNION", 1)]
    assert "datasets:\n- somebody/packs" in (out / "README.md").read_text()
    assert pinned["inputs"]["sampling"]["prompt_hash"] == "462c003d9956eb2223db203402fbe55b"
    assert pinned["parameters"]["w_conflict"] == -2.0
    assert set(pinned["outputs"]["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}

    before = {path: path.stat().st_mtime_ns for path in (*out.iterdir(), *tmp_path.glob("out.*"))}
    _, again = run_told(file, **places)
    assert all("skipped" in text for text in again[:3])
    assert again[3] == f"lock: {lock_path(file)} holds"
    assert {path: path.stat().st_mtime_ns for path in before} == before

    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError):
        run_told(file, **places)
    data[-1] ^= 1
    shard.write_bytes(data)
    other = made_stats(model_of_checkpoint(model), tmp_path / "stats.safetensors", seed=1)
    with pytest.raises(RecipeError, match=r"recipe\.lock\.json: inputs\.data_sets: found .* now; expected .*, as locked"):
        run_told(file, **{**places, "statistics": (other,)})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.*")} == {
        path: time for path, time in before.items() if path.parent == tmp_path
    }


def test_a_changed_recipe_is_refused_until_it_is_locked_anew(models: dict[str, Path], stats: Path, tmp_path: Path) -> None:
    model, file = models["gpt-oss-mxfp4"], file_of(tmp_path, KEEP24)
    places = {"model": model, "statistics": (stats,)}
    read = read_recipe(file)
    told = lock(read, Places.of(read, file, **places))
    assert told["outputs"]["manifest"] is None
    outcome, _ = run_told(file, **places)
    # What was not there yet is pinned now.
    assert json.loads(lock_path(file).read_text())["outputs"]["manifest"] == outcome.lock["outputs"]["manifest"] is not None
    assert outcome.out == tmp_path / "eaftreap_keepfrac075_keep24_uniform"
    file.write_text(KEEP24.replace("keep_n: 24", "keep_n: 20"))
    with pytest.raises(RecipeError, match=r"recipe\.sha256"):
        run_told(file, **places)
    lock_path(file).unlink()
    with pytest.raises(RecipeError, match="manifest.json: mask: found sha256:.*which this recipe makes; another place with --out"):
        run_told(file, **places)
    assert run_told(file, **places, out=tmp_path / "other")[0].mask.num_kept == [20] * 4


def test_scores_that_are_given(models: dict[str, Path], stats: Path, tmp_path: Path) -> None:
    scores_file.write(rank(stats, "reap_sum"), tmp_path / "given.yaml")
    text = KEEP20.replace("scores_yaml: null", "scores_yaml: given.yaml").replace("manifest_json: artifacts/manifest.json", "model_path: m")
    (tmp_path / "m").symlink_to(models["gpt-oss-mxfp4"])
    outcome, told = run_told(file_of(tmp_path, text))
    assert told[0] == f"rank: skipped, scores are given ({tmp_path / 'given.yaml'})"
    assert outcome.mask.keep == select(rank(stats, "reap_sum"), 20).keep


def test_wrong_models_and_folders(models: dict[str, Path], stats: Path, tmp_path: Path) -> None:
    file = file_of(tmp_path, KEEP24.replace("num_experts: 32", "num_experts: 128"))
    with pytest.raises(RecipeError, match=r"model\.num_experts: found 128; expected 32"):
        run_told(file, model=models["gpt-oss-mxfp4"], statistics=(stats,))
    file_of(tmp_path, KEEP24)
    with pytest.raises(RecipeError, match=r"source\.model_path: found nothing"):
        run_told(file)
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="found something that no rewrite made"):
        run_told(file, model=models["gpt-oss-mxfp4"], statistics=(stats,), out=tmp_path / "out")
    foreign = made_stats(MaskModel(**{**stats_model(stats), "fingerprint": "sha256:" + "0" * 64}), tmp_path / "s")
    with pytest.raises(SoftpruneError, match="fingerprint"):
        run_told(file, model=models["gpt-oss-mxfp4"], statistics=(foreign,))


def stats_model(stats: Path) -> dict[str, Any]:
    from softprune.stats.file import read_header

    return read_header(stats).model.model_dump()


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss-mxfp4", "qwen3-moe"])
def test_prune_in_one_go(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    model = models[name]
    outcome = softprune.prune(model, tmp_path / "out", "weights", compression_ratio=0.25)
    experts = outcome.mask.model.num_experts
    assert outcome.mask.num_kept == [experts - experts // 4] * outcome.mask.model.num_layers
    assert verify_checkpoint(model, tmp_path / "out").problems == []
    # No path of this machine goes along.
    for path in (tmp_path / "out").glob("*"):
        if path.suffix != ".safetensors":
            assert str(tmp_path) not in path.read_text(), path


def test_prune_again_and_otherwise(models: dict[str, Path], stats: Path, tmp_path: Path) -> None:
    model, told = models["gpt-oss-mxfp4"], []
    first = prune(model, tmp_path / "out", stats=stats)
    assert (first.mask.num_kept, first.scores.method) == ([16] * 4, "reap")
    prune(model, tmp_path / "out", stats=stats, tell=told.append)
    assert all("skipped" in text for text in told[:3])
    with pytest.raises(RecipeError, match="found a folder that other settings made"):
        prune(model, tmp_path / "out", stats=stats, keep=24)
    # The recipe that was left runs by itself.
    _, again = run_told(tmp_path / "out.recipe.yaml", model=model, statistics=(stats,), out=tmp_path / "out")
    assert all("skipped" in text for text in again[:3])
    with pytest.raises(RecipeError, match="--stats: found no statistics; expected statistics files, by which reap ranks"):
        prune(model, tmp_path / "x")


def test_command_line(models: dict[str, Path], stats: Path, tmp_path: Path) -> None:
    runner, model = CliRunner(), str(models["gpt-oss-mxfp4"])

    def call(*args: str | Path) -> str:
        result = runner.invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.output

    output = call(
        "rank", stats, "--method", "eaft_reap", "-p", "rule=policy", "-p", "w_conflict=-1", "--tag", "math=2", "-o", tmp_path / "s.yaml"
    )
    assert "eaft_gate_norm_sum" in output
    found = scores_file.read(tmp_path / "s.yaml")
    assert (found.parameters["rule"], found.parameters["w_conflict"], found.parameters["tags"]) == ("policy", -1, {"math": 2.0})
    call("select", tmp_path / "s.yaml", "--keep-frac", "0.60", "--keep-multiple", "4", "--core-mass", "4", "-o", tmp_path / "m.json")
    assert mask_file.load(tmp_path / "m.json").num_kept == [20] * 4
    call("prune", model, "--stats", stats, "--method", "reap", "--compression-ratio", "0.5", "--out", tmp_path / "out")
    assert "byte for byte" in call("run", tmp_path / "out.recipe.yaml", "-m", model, "--stats", stats, "-o", tmp_path / "out")
    assert "checkpoint and all" in call("lock", tmp_path / "out.recipe.yaml", "-m", model, "--stats", stats, "-o", tmp_path / "out")
    assert "every byte" in call("verify", model, tmp_path / "out")
    result = runner.invoke(app, ["rank", str(stats), "--method", "frequency"])
    assert result.exit_code == 2
