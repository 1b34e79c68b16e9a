"""Recipes of evaluations, in the study's shapes: what they say, what they extend, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprune.errors import SoftpruneError
from softprune.evaluate.eval_packs import Sizes
from softprune.evaluate.eval_recipe import EvalRecipeError, read_eval_recipe
from softprune.evaluate.metrics import MetricSettings

BASE = """\
schema_version: 1
kind: eval_base
name: eaft_parity_base
paths:
  gates_json: pruning/near_lossless_gates.json
  collector_entrypoint: modal/collect.py
calib_packs:
  dataset_repo: somebody/packs
  text_column: text
  pack_files:
    - packs/a.parquet
    - packs/b.parquet
  derived_union_name: UNION
eaft:
  entropy_topk: 20
  cc_quantile: 0.15
  prob_scale: linear
  logp_min: -8
  logp_max: 0.0
collector_defaults:
  top_k: 4
  sample_points: 200000
  batch_size: 1
  num_blocks: 512
  seq_lens_csv: "1024,2048"
engine_defaults:
  env:
    EAFT_MAX_NEW_TOKENS: "0"
"""
PAIR = """\
schema_version: 1
kind: eval_recipe
extends: ../base.yaml
name: keep24
pair:
  left:
    label: base
    model_id: openai/gpt-oss-20b
    model_path: /nowhere
  right:
    model_id: somebody/keep24
    model_path_from_manifest:
      manifest_json: manifest.json
      field: variants.keep24
collector_overrides:
  batch_size: 4
execution_notes:
  command: rm -rf everything
expected_outputs:
  parity_summary_md: reports/x.md
"""
MATRIX = """\
extends: ../base.yaml
name: token_budget
model:
  label: base
run_matrix:
  - name: budget-1m
    collector_overrides:
      token_budget: 1000000
      seq_lens_csv: "4096,8192"
      block_form: L+1
    engine_overrides:
      context_length: 8192
  - name: one
    collector_overrides:
      seq_lens_csv: 131072
      num_blocks: 8
"""


def written(folder: Path, text: str, base: str = BASE) -> Path:
    """The recipe in a folder of its own, above which lies what it extends."""
    (folder / "base.yaml").write_text(base)
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "eval.yaml").write_text(text)
    return folder / "recipes" / "eval.yaml"


def test_a_base_by_itself(tmp_path: Path) -> None:
    written(tmp_path, PAIR)
    (run,) = read_eval_recipe(tmp_path / "base.yaml")
    assert run.packs == (tmp_path / "packs/a.parquet", tmp_path / "packs/b.parquet")
    assert (run.column, run.union_name, run.top_k, run.concurrency, run.label, run.name) == ("text", "UNION", 4, 1, None, "")
    assert run.sizes == Sizes((1024, 2048), 512)
    assert run.metrics == MetricSettings(logp_min=-8.0, sample_points=200_000)


def test_a_pair_extends_it(tmp_path: Path) -> None:
    """Packs are relative to the file that names them; the server serves one side; nothing is run."""
    file = written(tmp_path, PAIR)
    left, right = (read_eval_recipe(file, side) for side in ("left", "right"))  # type: ignore[arg-type]
    assert [path.resolve() for path in left[0].packs] == [tmp_path / "packs/a.parquet", tmp_path / "packs/b.parquet"]
    assert (left[0].label, right[0].label) == ("base", "somebody/keep24")
    assert (left[0].concurrency, left[0].sizes.num_blocks) == (4, 512)


def test_a_matrix_of_runs(tmp_path: Path) -> None:
    budget, one = read_eval_recipe(written(tmp_path, MATRIX))
    assert (budget.name, one.name, budget.label) == ("budget-1m", "one", "base")
    assert [budget.sizes.blocks_at(length) for length in budget.sizes.seq_lens] == [244, 122]
    assert [budget.sizes.length_of(length) for length in budget.sizes.seq_lens] == [4097, 8193]
    assert one.sizes == Sizes((131072,), 8)


@pytest.mark.parametrize(
    ("base", "over", "run", "blocks"),
    [
        ("token_budget: 4096", None, None, 4), ("token_budget: 4096", "num_blocks: 3", None, 3),
        ("num_blocks: 3", "token_budget: 4096", None, 4),
        ("token_budget: 4096", "batch_size: 2", "num_blocks: 5", 5), ("num_blocks: 7", "token_budget: 4096", "num_blocks: 5", 5),
        ("num_blocks: 7", "token_budget: 4096", "batch_size: 2", 4), ("token_budget: 4096", "num_blocks:", None, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("section", ["collector_defaults", "collector_overrides"])
def test_the_later_of_two_sizes_holds(tmp_path: Path, base: str, over: str | None, run: str | None, blocks: int, section: str) -> None:
    """Whether it stands in another section, or in the same one of the recipe that extends the other."""
    (tmp_path / "base.yaml").write_text(f'schema_version: 1\ncollector_defaults:\n  seq_lens_csv: "1024"\n  {base}\n')
    text = "extends: base.yaml\n" + (f"{section}:\n  {over}\n" if over else "")
    text += f"run_matrix:\n  - name: a\n    collector_overrides:\n      {run}\n" if run else ""
    (tmp_path / "eval.yaml").write_text(text)
    (found,) = read_eval_recipe(tmp_path / "eval.yaml")
    assert found.sizes.blocks_at(1024) == blocks


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "batch_size: 4",
            "batch_sise: 4",
            r"eval\.yaml: collector_overrides\.batch_sise: found an unknown key; expected one of batch",
        ),
        ("batch_size: 4", "batch_size: many", r"collector_overrides\.batch_size: found 'many'; expected a whole number"),
        ("batch_size: 4", "batch_size: 0", r"collector_overrides\.batch_size: found 0"),
        ("batch_size: 4", "num_blocks: 1.5", r"collector_overrides\.num_blocks: found 1\.5; expected a whole number"),
        ("batch_size: 4", "seq_lens_csv: a,b", "seq_lens_csv: found 'a,b'; expected lengths and commas"),
        ("batch_size: 4", "block_form: L+2", "--block-form: found 'L\\+2'; expected L or L\\+1"),
        ("batch_size: 4", "token_budget: 100", "expected at least one block of 2048"),
        (
            "batch_size: 4",
            "batch_size: 4\n  num_blocks: 2\n  token_budget: 9000",
            r"eval\.yaml: collector_overrides\.token_budget: found num_blocks as well; expected one of the two",
        ),
        ("    label: base", "    lable: base", r"pair\.left\.lable: found an unknown key"),
        ("pair:", "pears:", "eval.yaml: pears: found an unknown key"),
        ("extends: ../base.yaml", "extends: eval.yaml", r"extends: found a file that extends itself"),
        ("extends: ../base.yaml", "extends: ../nowhere.yaml", r"nowhere\.yaml: found No such file"),
        ("extends: ../base.yaml", "extends: [1]", r"extends: found \[1\]; expected the path of a recipe"),
        ("schema_version: 1", "schema_version: 2", "schema_version: found 2; expected 1"),
        (PAIR, "- a", r"eval\.yaml: found list; expected a recipe of an evaluation"),
        (PAIR, "eaft: {entropy_topk: 1}", "entropy_topk, sample_points: found 1, 2000; expected at least 2"),
        (PAIR, "eaft: {prob_scale: cubic}", "prob_scale: found 'cubic'; expected linear or log"),
        (PAIR, "calib_packs: {pack_files: x}", r"calib_packs\.pack_files: found 'x'; expected a list of Parquet files"),
        (PAIR, "collector_defaults: 3", "collector_defaults: found 3; expected a mapping"),
        (PAIR, "run_matrix: []", r"run_matrix: found \[\]; expected a list of runs"),
        (PAIR, "run_matrix: [{name: ../x}]", r"run_matrix\[0\]\.name: found '\.\./x'; expected a name of its own"),
        (PAIR, "run_matrix: [{name: a}, {name: a}]", r"run_matrix\[1\]\.name: found 'a'"),
        (PAIR, "run_matrix: [{name: a, overrides: {}}]", r"run_matrix\[0\]\.overrides: found an unknown key"),
        (PAIR, "name: x", r"--side: found left; expected none: .*eval\.yaml has no pair\.left"),
    ],
)
def test_refusals(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PAIR
    side = "left" if "pair:" in PAIR.replace(old, new) or new == "name: x" else None
    with pytest.raises(SoftpruneError, match=message):
        read_eval_recipe(written(tmp_path, PAIR.replace(old, new)), side)  # type: ignore[arg-type]


def test_a_pair_without_a_side(tmp_path: Path) -> None:
    with pytest.raises(EvalRecipeError, match="pair: found left and right; expected --side left or --side right"):
        read_eval_recipe(written(tmp_path, PAIR))
