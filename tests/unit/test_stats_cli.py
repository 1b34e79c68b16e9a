"""`softprune stats …` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from softprune.mask import MaskModel
from softprune.stats.file import Statistics, read, write
from softprune.stats.header import MaskEpoch
from tests.unit.stats_of import collected, header
from tests.unit.test_cli import run

TAGS = ("default", "code", "tool $x_1$")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"}
    write(collected("run-1", TAGS, seed=1), paths["a"])
    write(collected("run-2", ("default",), ("router",), seed=2), paths["b"])
    return paths


def flat(output: str) -> str:
    return " ".join(output.split())


@pytest.mark.parametrize("command", ["", "merge", "show", "diff", "export"])
def test_help(command: str) -> None:
    code, output = run("stats", *command.split(), "--help")
    assert code == 0
    assert "Usage:" in output


def test_merge(files: dict[str, Path], tmp_path: Path) -> None:
    for out, order in (("ab", ("a", "b")), ("ba", ("b", "a"))):
        code, output = run("stats", "merge", *(files[name] for name in order), "-o", tmp_path / out)
        assert code == 0
        assert "2 files, 2 runs, 3 tags" in flat(output)
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "ba").read_bytes()
    total = read(tmp_path / "ab")
    assert total["router.count"].sum() == sum(int(read(path)["router.count"].sum()) for path in files.values())


def test_merge_refuses(files: dict[str, Path], tmp_path: Path) -> None:
    for given, message in (
        (("a", "a"), "runs: found run run-1"),
        (("a", "missing"), "found No such file or directory; expected a statistics file"),
    ):
        code, output = run("stats", "merge", *(files.get(name, tmp_path / name) for name in given), "-o", tmp_path / "out")
        assert code == 2
        assert message in flat(output)
    assert not (tmp_path / "out").exists()
    code, output = run("stats", "merge", files["a"], "-o", tmp_path / "no" / "out")
    assert code == 2
    assert "No such file or directory; expected a place that can be written" in flat(output)


def test_show(files: dict[str, Path]) -> None:
    code, output = run("stats", "show", files["a"])
    tokens = read(files["a"]).header.tokens["code"]
    assert code == 0
    assert f"code {tokens.prefill} {tokens.decode} {tokens.routed} 3" in flat(output)
    assert "3 layers x 12 experts, top_k 4" in output
    assert "reap (1 token in 16)" in output
    assert "tool $x_1$" in output
    assert "Jensen-Shannon" in output
    assert "warning" not in output


def test_show_warns_of_what_was_not_counted(files: dict[str, Path]) -> None:
    statistics = read(files["b"])
    tokens = {"default": statistics.header.tokens["default"].model_copy(update={"prefill": 9999})}
    write(Statistics(statistics.header.model_copy(update={"tokens": tokens}), statistics.tensors), files["b"])
    assert "warning: selections are not routed tokens x top_k" in flat(run("stats", "show", files["b"])[1])


def test_show_says_what_the_mask_was(files: dict[str, Path]) -> None:
    epoch = MaskEpoch(run="run-1", epoch=2, mask="sha256:" + "5" * 64, num_kept=[6, 7, 8], top_k=[4] * 3)
    write(Statistics.zeros(header("run-1", ["default"], ("router",), epochs=[epoch])), files["a"])
    code, output = run("stats", "show", files["a"])
    assert code == 0
    assert "mask sha256:55555555…, 6 to 8 of 12 experts kept (1 epoch)" in output


def test_show_json(files: dict[str, Path]) -> None:
    code, output = run("stats", "show", files["a"], "--json", "--tag", "code")
    data = json.loads(output)
    assert code == 0
    assert data["tag"] == "code"
    assert data["complete"] is True
    assert len(data["layers"]) == 3
    assert data["header"]["runs"][0]["id"] == "run-1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tag", "nobody"), "tags: found no tag 'nobody'; expected one of default, code, tool $x_1$"),
        (("--plot", "plot.pdf"), "plot.pdf: found the suffix '.pdf'; expected .svg or .png"),
        (("--plot", "no-such-folder/plot.svg"), "no-such-folder/plot.svg: found No such file or directory"),
    ],
)
def test_show_refuses(files: dict[str, Path], options: tuple[str, str], message: str) -> None:
    code, output = run("stats", "show", files["a"], *options)
    assert code == 2
    assert message in flat(output)


@pytest.mark.parametrize(("name", "options", "images"), [("a", (), 4), ("a", ("--tag", "code"), 4), ("b", (), 2)])
def test_drawings(files: dict[str, Path], tmp_path: Path, name: str, options: tuple[str, ...], images: int) -> None:
    for out in ("plot.svg", "again.svg"):
        assert run("stats", "show", files[name], *options, "--plot", tmp_path / out)[0] == 0
    drawing = ElementTree.parse(tmp_path / "plot.svg").getroot()
    # The heatmap and its bar, and with more than one tag the matrix and its bar.
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}image"))) == images
    assert (tmp_path / "plot.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_a_picture_is_not_empty(files: dict[str, Path], tmp_path: Path) -> None:
    from matplotlib.image import imread

    assert run("stats", "show", files["a"], "--plot", tmp_path / "plot.PNG")[0] == 0
    green = imread(tmp_path / "plot.PNG")[..., 1]
    assert len(np.unique(green)) > 50
    assert (green < 1).mean() > 0.2


def test_a_plot_of_nothing(tmp_path: Path) -> None:
    write(Statistics.zeros(header("run-1", ["default", "code"])), tmp_path / "s")
    assert run("stats", "show", tmp_path / "s", "--plot", tmp_path / "s.svg")[0] == 0


def test_diff(files: dict[str, Path], tmp_path: Path) -> None:
    code, output = run("stats", "diff", files["a"], files["b"], "--tag", "default")
    assert code == 0
    assert "top 8 in common" in flat(output)
    assert "top 16" not in output
    data = json.loads(run("stats", "diff", files["a"], files["b"], "--json")[1])
    assert 0 < data["layers"][2]["js_divergence"] < 0.7
    assert set(data["layers"][2]["overlap"]) == {"8"}
    model = MaskModel(architecture="GptOssForCausalLM", num_layers=3, num_experts=32, top_k=4, fingerprint="sha256:" + "c" * 64)
    write(Statistics.zeros(header("run-3", ["default"], model=model, epochs=[MaskEpoch.of("run-3", 0, None, model)])), tmp_path / "c")
    code, output = run("stats", "diff", files["a"], tmp_path / "c")
    assert code == 2
    assert "model.num_experts: found 32; expected 12, as in" in flat(output)


def test_diff_of_other_weights(files: dict[str, Path], tmp_path: Path) -> None:
    statistics = read(files["b"])
    model = statistics.header.model.model_copy(update={"fingerprint": "sha256:" + "c" * 64})
    write(Statistics(statistics.header.model_copy(update={"model": model}), statistics.tensors), tmp_path / "c")
    code, output = run("stats", "diff", files["b"], tmp_path / "c")
    assert code == 0
    assert "different weights" in output
    assert "0.0000" in output


def test_export(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    code, output = run("stats", "export", files["a"], "--parquet", out)
    assert code == 0
    assert "324 rows" in flat(output)
    statistics, rows = read(files["a"]), pq.read_table(out).to_pylist()
    assert len(rows) == 3 * 3 * 3 * 12
    for column, name in (("router_count", "router.count"), ("reap_norm_sum", "reap.norm_sum"), ("router_gate_sum", "router.gate_sum")):
        assert sum(row[column] or 0 for row in rows) == pytest.approx(statistics[name].sum())
    by_key = {(row["layer"], row["expert"], row["tag"], row["phase"]): row for row in rows}
    row = by_key[1, 5, "code", "decode"]
    assert (row["router_count"], row["reap_count"]) == (statistics["router.count"][1, 1, 1, 5], None)
    row = by_key[2, 7, "code", None]
    assert (row["router_count"], row["reap_gate_norm_sum"]) == (None, statistics["reap.gate_norm_sum"][1, 2, 7])
    assert row["eaft_grid_gate_norm_sampled"] == pytest.approx(statistics["eaft.grid_gate_norm"][1, 1, 2, 7].sum())
    assert json.loads(pq.read_schema(out).metadata[b"softprune.statistics"])["tags"] == list(TAGS)


def test_export_of_one_mode(tmp_path: Path) -> None:
    modes: tuple[Any, ...]
    for modes, rows in ((("router",), 3 * 36), (("reap",), 36), (("eaft",), 36)):
        write(collected("run-1", modes=modes), tmp_path / "s")
        code, output = run("stats", "export", tmp_path / "s", "--parquet", tmp_path / "p")
        assert code == 0
        assert f"{rows} rows" in flat(output)
    assert run("stats", "export", tmp_path / "s", "--parquet", tmp_path / "no" / "p")[0] == 2
