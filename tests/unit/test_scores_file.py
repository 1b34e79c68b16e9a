"""Scores come back as they were written; the study's readers find what they look for; a damaged file is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from softprune.mask import MaskModel
from softprune.mask_forms import ranking_of
from softprune.ranking import scores_file
from softprune.ranking.api import rank
from softprune.ranking.errors import RankError
from softprune.ranking.scores import Scores
from softprune.selection.select import select
from softprune.yaml_file import read_yaml
from tests.unit.stats_of import collected
from tests.unit.study_files import SCORES

SMALL = MaskModel(architecture="GptOssForCausalLM", num_layers=2, num_experts=4, top_k=2)


@pytest.fixture(scope="module")
def scores() -> Scores:
    return rank(collected("r", ("default", "a: tag"), num_tokens=200), "eaft_reap")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "reap-scores.yaml").write_text(SCORES)
    return tmp_path / "reap-scores.yaml"


def test_round_trip(scores: Scores, tmp_path: Path) -> None:
    written = scores_file.write(scores, tmp_path / "s.yaml")
    read = scores_file.read(tmp_path / "s.yaml")
    for name in ("method", "model", "score_key", "definition", "digest"):
        assert getattr(read, name) == getattr(written, name)
    for name in ("parameters", "inputs", "found"):
        assert dict(getattr(read, name)) == dict(getattr(written, name))
    assert np.array_equal(read.values, scores.values)
    assert set(read.columns) == set(scores.columns)
    for name, column in scores.columns.items():
        assert np.array_equal(read.columns[name], column)
    assert set(read.by_tag) == {"default", "a: tag"}
    assert np.array_equal(read.by_tag["a: tag"], scores.by_tag["a: tag"])
    assert scores_file.dump(read) == (tmp_path / "s.yaml").read_text()
    assert scores_file.is_current(tmp_path / "s.yaml")


def test_the_studys_readers_find_what_they_look_for(scores: Scores, tmp_path: Path) -> None:
    scores_file.write(scores, tmp_path / "s.yaml")
    data = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert (data["schema_version"], data["kind"], data["score_key"]) == (1, "reap_scores", "eaft_gate_norm_sum")
    assert data["summary"] == {"num_layers": 3, "num_experts": 12}
    assert data["ranking_by_layer"] == scores.ranking.tolist()
    for layer, entry in enumerate(data["layer_scores"]):
        assert entry["layer"] == layer
        assert [e["expert"] for e in entry["experts"]] == data["ranking_by_layer"][layer]
        for e in entry["experts"]:
            assert isinstance(e["score"], float)
            names = ("count", "gate_mean", "norm_mean", "saliency_mean", "eaft_saliency_mean", "pos_count", "neg_count")
            assert all(isinstance(e[name], (int, float)) for name in names)
    form, rows = ranking_of(tmp_path / "s.yaml", scores.model)
    assert (form, rows) == ("reap_scores", scores.ranking.tolist())


def test_tiny_and_huge_numbers_stay_numbers(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-05 and 1e+22 for text."""
    values = np.array([[1e-05, 1e22, 2.5e-300, 0.0], [-1e-07, 1.0, 123456789.125, 3e15]])
    scores_file.write(Scores("reap", SMALL, values, "k", "d", found={"y": 1e-05, "no": None}), tmp_path / "s.yaml")
    read = scores_file.read(tmp_path / "s.yaml")
    assert np.array_equal(read.values, values)
    assert dict(read.found) == {"y": 1e-05, "no": None}


def test_the_studys_own_files(study: Path) -> None:
    with pytest.raises(RankError, match=r"softprune\.model: found nothing; expected the model's shape in it, or --model with it"):
        scores_file.read(study)
    found = scores_file.read(study, SMALL)
    assert found.values.tolist() == [[19022.34765625, 5.5, 34297.91015625, 5.5], [-10.5, 17367.662109375, 1.25, 17120.716796875]]
    assert found.columns["count"].tolist() == [[2535, 10, 3731, 12], [2380, 2040, 3, 2625]]
    assert found.found["p_lo"] == 0.01829039864242077
    assert found.definition.startswith("Total expert contribution mass accumulated over selected tokens. Summed")
    mask = select(found, 2)
    assert mask.keep == [[0, 2], [1, 3]]
    assert mask.provenance["scores"] == found.digest


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("kind: reap_scores", "kind: reap_recipe", "kind: found 'reap_recipe'; expected reap_scores"),
        ("schema_version: 1", "schema_version: 2", "schema_version: found 2; expected 1"),
        ("score: 5.5", "score: high", r"layer_scores\[0\]\.experts\[2\]\.score: found 'high'; expected a finite number"),
        ("score: 1.25", "score: .nan", r"experts\[2\]\.score: found nan; expected a finite number"),
        ("- expert: 3", "- expert: 2", r"layer_scores\[0\]\.experts\[2\]\.expert: found 2; expected each expert of a layer once"),
        ("- expert: 3", "- expert: 4", r"expert: found 4; expected from 0 to 3"),
        ("- layer: 1", "- layer: 2", r"layer_scores\[1\]\.layer: found 2; expected from 0 to 1"),
        ("    score: 1.25\n", "", r"experts\[2\]\.score: found nothing; expected a number"),
        ("- - 2\n  - 0", "- - 0\n  - 2", r"ranking_by_layer\[0\]: found expert 0 before 2, whose score is higher"),
        ("- - 2\n  - 0", "- - 0\n  - 0", r"ranking_by_layer: found .*; expected 2 lists of the ids from 0 to 3"),
        ("inputs:", "kind: other\ninputs:", r"the key 'kind' twice in one mapping in line 7"),
        ("inputs:", "inputs: [", "no valid YAML"),
        ("inputs:", "inputs: !!python/object/apply:os.system [x]\nmore:", "no valid YAML"),
    ],
)
def test_damaged_files_are_refused(study: Path, old: str, new: str, match: str) -> None:
    study.write_text(SCORES.replace(old, new, 1))
    with pytest.raises(RankError, match=match):
        scores_file.read(study, SMALL)


def test_a_layer_too_few(study: Path) -> None:
    study.write_text(SCORES[: SCORES.index("- layer: 1")])
    with pytest.raises(RankError, match="no score of expert 0 in layer 1; expected all 8 experts"):
        scores_file.read(study, SMALL)


def test_equal_scores_may_stand_in_any_order(study: Path) -> None:
    assert scores_file.read(study, SMALL).ranking[0].tolist() == [2, 0, 1, 3]


def test_another_models(scores: Scores, tmp_path: Path) -> None:
    scores_file.write(scores, tmp_path / "s.yaml")
    with pytest.raises(RankError, match=r"softprune\.model\.fingerprint: found sha256:a+; expected sha256:0+, as the model has"):
        scores_file.read(tmp_path / "s.yaml", scores.model.model_copy(update={"fingerprint": "sha256:" + "0" * 64}))
    with pytest.raises(RankError, match=r"softprune\.model\.num_experts: found 12; expected 8"):
        scores_file.read(tmp_path / "s.yaml", scores.model.model_copy(update={"num_experts": 8}))


@pytest.mark.parametrize("text", ["- " * 5000 + "a", "[" * 5000, "{a: " * 5000, "? " * 5000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(RankError, match="nested too deep"):
        read_yaml(tmp_path / "s.yaml", "a scores file", RankError)


def test_missing_file(tmp_path: Path) -> Any:
    with pytest.raises(RankError, match="No such file"):
        scores_file.read(tmp_path / "none.yaml")
    with pytest.raises(RankError, match="a place that can be written"):
        scores_file.write(Scores("reap", SMALL, np.ones((2, 4)), "k", "d"), tmp_path / "no" / "s.yaml")
