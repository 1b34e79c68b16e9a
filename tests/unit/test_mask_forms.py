"""Foreign forms of masks and rankings become the same mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from softprune.checkpoint.families import ModelSpec
from softprune.errors import MaskError
from softprune.mask_forms import convert

SPEC = ModelSpec("GptOssForCausalLM", (0, 1), 6, 2)
KEEP = [[0, 2, 5], [1, 3, 4]]
RANKING = [[5, 0, 2, 1, 3, 4], [3, 4, 1, 0, 2, 5]]


def write(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data) if path.suffix == ".yaml" else json.dumps(data))
    return path


def reap(**changes: Any) -> dict[str, Any]:
    scores = [
        {"layer": layer, "experts": [{"expert": expert, "score": 10.0 - place, "count": 3} for place, expert in enumerate(row)]}
        for layer, row in enumerate(RANKING)
    ]
    return {"schema_version": 1, "kind": "reap_scores", "method": "reap", "ranking_by_layer": RANKING, "layer_scores": scores, **changes}


TOPICAL = {
    "think_expert_analytics": {f"layer_{i}": row for i, row in enumerate(RANKING)},
    "answer_expert_analytics": {f"layer_{i}": row[::-1] for i, row in enumerate(RANKING)},
}


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("m.json", {"keep_by_layer": {"0": [5, 0, 2], "1": [1, 3, 4]}}, {}),
        ("m.json", KEEP, {}),
        ("m.json", {"0": {"0": 0, "2": 1, "5": 2}, "1": {"4": 0, "1": 2, "3": 1}}, {}),
        ("m.yaml", {0: {0: 0, 2: 1, 5: 2}, 1: {4: 0, 1: 2, 3: 1}}, {}),
        ("m.yaml", reap(), {"keep_n": 3}),
        ("m.yaml", reap(ranking_by_layer=None), {"keep_n": 3}),
        ("m.json", TOPICAL, {"keep_n": 3}),
    ],
    ids=["keep_by_layer", "list", "expert_mapping", "expert_mapping in YAML", "reap", "reap scores only", "topical"],
)
def test_all_forms_give_the_same_mask(tmp_path: Path, name: str, data: Any, options: dict[str, Any]) -> None:
    mask = convert(write(tmp_path / name, data), SPEC, None, **options)
    assert mask.keep == KEEP
    assert mask.provenance["method"] == "convert"


def test_topical_sections_differ(tmp_path: Path) -> None:
    mask = convert(write(tmp_path / "m.json", TOPICAL), SPEC, None, keep_n=3, section="answer")
    assert mask.keep == [[1, 3, 4], [0, 2, 5]]


def test_ties_in_scores_go_to_the_smaller_id(tmp_path: Path) -> None:
    tied = [{"layer": layer, "experts": [{"expert": e, "score": 1.0} for e in (5, 4, 3, 2, 1, 0)]} for layer in (0, 1)]
    mask = convert(write(tmp_path / "m.yaml", reap(ranking_by_layer=None, layer_scores=tied)), SPEC, None, keep_n=2)
    assert mask.keep == [[0, 1], [0, 1]]


def test_a_mask_passes_through(tmp_path: Path) -> None:
    mask = convert(write(tmp_path / "a.json", KEEP), SPEC, None)
    mask.save(tmp_path / "b.json")
    assert convert(tmp_path / "b.json", SPEC, None) == mask


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("m.json", {"some": "thing"}, {}, "no known form"),
        ("m.json", 3, {}, "no known form"),
        ("m.json", {}, {}, "no known form"),
        ("m.json", {"keep_by_layer": {"0": [0, 1], "2": [0, 1]}}, {}, "none named '1'"),
        ("m.json", {"keep_by_layer": [[0, 1]]}, {}, "an object with one entry a layer"),
        ("m.json", {"keep_by_layer": {"0": [0, 1]}}, {}, "found 1 layers"),
        ("m.json", [[0, 1], "x"], {}, "a list of expert ids"),
        ("m.json", [[0, 1], [0, 9]], {}, "expert id 9"),
        ("m.json", {"0": {"0": 0, "2": 2}, "1": {"0": 0}}, {}, "the numbers from 0 to 1"),
        ("m.yaml", reap(schema_version=2), {"keep_n": 3}, "schema_version: found 2"),
        ("m.yaml", reap(ranking_by_layer=None, layer_scores=None), {"keep_n": 3}, "ranking_by_layer"),
        ("m.yaml", reap(ranking_by_layer=None, layer_scores=[{"layer": 0}]), {"keep_n": 3}, "not readable"),
        ("m.yaml", reap(), {}, "--keep-n N"),
        ("m.yaml", reap(), {"keep_n": 7}, "a ranking of 6 experts"),
        ("m.json", KEEP, {"keep_n": 2}, "only a ranking"),
        ("m.yaml", reap(), {"keep_n": -1}, "--keep-n: found -1"),
        ("m.json", {"answer_expert_analytics": {}}, {"keep_n": 2}, "think_expert_analytics"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        convert(write(tmp_path / name, data), SPEC, None, **options)


def test_yaml_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("a: [1,")
    with pytest.raises(MaskError, match="no valid YAML"):
        convert(tmp_path / "m.yaml", SPEC, None, keep_n=2)
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(MaskError, match="no valid YAML"):
        convert(tmp_path / "evil.yaml", SPEC, None, keep_n=2)
    (tmp_path / "deep.yaml").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(MaskError, match="nested too deep"):
        convert(tmp_path / "deep.yaml", SPEC, None, keep_n=2)
