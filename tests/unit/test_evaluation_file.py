"""Evaluation files: what is written is read, the study's are read, and what is wrong with one is named."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprune.evaluate import evaluation
from softprune.evaluate.errors import EvaluationFileError
from softprune.evaluate.evaluation import of, read, write
from softprune.evaluate.metrics import MetricSettings
from softprune.evaluate.plane import encode_cells
from tests.unit.evaluations import document, of_the_study

OURS = document(num_blocks=8, tokens=20, rows=(("UNION", 1024), ("code", 2048)))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    write(OURS, path)
    assert json.loads(path.read_text()) == OURS
    found = read(path)
    assert list(found.cells) == [("UNION", 1024), ("code", 2048)]
    cell, model = found.cell("UNION", 1024), OURS["packs"][0]["seq"]["1024"]["model"]
    assert (cell.tokens, cell.metrics["ppl"], cell.counts.shape) == (model["kept_tokens"], model["ppl"], (160, 120))
    assert cell.counts.reshape(-1).tolist() == model["hist2d_x_H"]["counts"]
    assert cell.blocks is not None
    assert cell.blocks.tokens.tolist() == model["softprune"]["blocks"]["tokens"]
    assert (found.label, found.own["block_form"]) == ("shifted by 0", "L")
    with pytest.raises(EvaluationFileError, match=r"packs: found UNION@1024, code@2048; expected code@1024 among them"):
        found.cell("code", 1024)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_studys_own_files_are_read(scale: Any) -> None:
    ours = document(num_blocks=8, tokens=20, settings=MetricSettings(prob_scale=scale, logp_min=-8.0))
    found = of(of_the_study(ours), "study.json")
    assert all(cell.blocks is None for cell in found.cells.values())
    assert found.cell("UNION", 1024).metrics == of(ours, "ours.json").cell("UNION", 1024).metrics
    assert (found.own, found.plane.x_range) == ({}, (0.0, 1.0) if scale == "linear" else (-8.0, 0.0))


def model(document: Any) -> Any:
    return document["packs"][0]["seq"]["1024"]["model"]


def put(place: Callable[[Any], Any], name: Any, value: Any) -> Callable[[Any], None]:
    return lambda document: place(document).__setitem__(name, value)


def drop(place: Callable[[Any], Any], name: Any) -> Callable[[Any], None]:
    return lambda document: place(document).__delitem__(name)


def meta(document: Any) -> Any:
    return document["meta"]


def own(document: Any) -> Any:
    return document["meta"]["softprune"]


def row(document: Any) -> Any:
    return document["packs"][0]["seq"]["1024"]


def hist(document: Any) -> Any:
    return model(document)["hist2d_x_H"]


def blocks(document: Any) -> Any:
    return model(document)["softprune"]["blocks"]


AT = "packs[0].seq.1024"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.__delitem__("meta"), "meta: found nothing; expected an object"),
        (lambda d: d.update(packs=[]), "packs: found none; expected at least one pack"),
        (put(meta, "hist_xbins", 0), "meta.hist_xbins: found 0 x 120 bins"),
        (put(meta, "hist_xbins", True), "meta.hist_xbins: found True; expected a whole number"),
        (put(meta, "prob_scale", "root"), "meta.prob_scale: found 'root'; expected linear or log"),
        (put(meta, "cc_quantile", "0.15"), "meta.cc_quantile: found '0.15'; expected a finite number"),
        (drop(meta, "entropy_topk"), "meta.entropy_topk: found nothing"),
        (put(own, "format", "other"), "meta.softprune.format: found 'other'; expected \"softprune.evaluation\""),
        (put(own, "version", 2), "meta.softprune.version: found 2; expected 1, the only one"),
        (put(own, "block_form", "L+2"), "meta.softprune.block_form: found 'L+2'; expected L or L+1"),
        (drop(own, "tokenizer_sha256"), "meta.softprune.tokenizer_sha256: found nothing"),
        (drop(row, "rows_sha256"), f"{AT}.rows_sha256: found nothing; expected a text"),
        (drop(row, "blocks_sha256"), f"{AT}.blocks_sha256: found nothing"),
        (put(row, "num_blocks", 9), f"{AT}.model.softprune.blocks.tokens: found 8 values; expected 9 finite numbers"),
        (lambda d: d["packs"][0]["seq"].update({"1k": {}}), "packs[0].seq: found '1k'; expected a block length"),
        (lambda d: d["packs"][1].update(pack="UNION", seq=d["packs"][0]["seq"]), "packs[1].seq.1024: found UNION@1024 a second time"),
        *((drop(model, name), f"{AT}.model.{name}: found nothing; expected a finite number") for name in evaluation.METRICS),
        (put(model, "ppl", math.nan), f"{AT}.model.ppl: found nan; expected a finite number"),
        (put(model, "kept_tokens", 0), f"{AT}.model.kept_tokens: found 0; expected at least one completion token"),
        (put(model, "kept_tokens", 1), f"{AT}.model.hist2d_x_H.counts: found"),
        (lambda d: hist(d)["counts"].pop(), f"{AT}.model.hist2d_x_H.counts: found 19199 values; expected 19200"),
        (lambda d: hist(d)["counts"].__setitem__(0, -1), "found negative numbers, fractions"),
        (lambda d: hist(d)["counts"].__setitem__(0, 0.5), "found negative numbers, fractions"),
        (lambda d: hist(d)["counts"].__setitem__(0, "1"), "found values that are no numbers"),
        (lambda d: hist(d)["counts"].__setitem__(0, 10**400), "found a number that is too large"),
        (lambda d: hist(d)["x_edges"].__setitem__(3, 0.5), f"{AT}.model.hist2d_x_H.x_edges: found other edges"),
        (lambda d: model(d)["hist1d_H"]["counts"].reverse(), f"{AT}.model.hist1d_H.counts: found other numbers"),
        (drop(model, "softprune"), f"{AT}.model.softprune: found nothing; expected an object"),
        (lambda d: blocks(d)["nll"].__setitem__(0, 1e3), f"{AT}.model.softprune.blocks.nll: found"),
        (lambda d: blocks(d)["p"].__setitem__(0, math.inf), f"{AT}.model.softprune.blocks.p: found NaN or infinity"),
        (lambda d: blocks(d)["tokens"].__setitem__(0, 0), f"{AT}.model.softprune.blocks.tokens: found"),
        (put(blocks, "cells", "AAAA"), f"{AT}.model.softprune.blocks.cells: found no base64 of zlib"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: Callable[[Any], object], message: str) -> None:
    broken = copy.deepcopy(OURS)
    change(broken)
    with pytest.raises(EvaluationFileError) as caught:
        of(broken, "e.json")
    assert str(caught.value).startswith("e.json: ")
    assert message in str(caught.value)


def test_cells_of_other_tokens() -> None:
    broken = copy.deepcopy(OURS)
    blocks(broken)["cells"] = encode_cells(np.zeros(model(broken)["kept_tokens"], np.uint16))
    with pytest.raises(EvaluationFileError, match="cells of other tokens; expected those that hist2d_x_H counts"):
        of(broken, "e.json")


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"meta": NaN}', "[" * 10**5])
def test_no_evaluation_at_all(text: str, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(EvaluationFileError, match=r"e\.json"):
        read(path)


def test_a_file_with_nan_as_python_writes_it(tmp_path: Path) -> None:
    broken = copy.deepcopy(OURS)
    model(broken)["mean_prob"] = math.nan
    path = tmp_path / "e.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(EvaluationFileError, match=r"mean_prob: found nan"):
        read(path)
    with pytest.raises(EvaluationFileError, match=r"none\.json: found No such file"):
        read(tmp_path / "none.json")


def test_what_is_wrong_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    write(OURS, path)
    broken = copy.deepcopy(OURS)
    model(broken)["ppl"] = math.inf
    with pytest.raises(EvaluationFileError, match="ppl: found inf"):
        write(broken, path)
    assert json.loads(path.read_text()) == OURS
