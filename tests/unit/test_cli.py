"""`softprune …` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softprune import mask as mask_file
from softprune.cli import app
from tests.conftest import random_mask, saved

COMMANDS = ["", "mask", "mask new", "mask show", "mask check", "mask convert", "mask diff", "checkpoint", "checkpoint info",
            "checkpoint synth", "checkpoint dequantize"]  # fmt: skip


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    code, output = run(*command.split(), "--help")
    assert code == 0
    assert "Usage:" in output
    assert len(output.splitlines()) > 8


def test_new_random_is_seeded(models: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("mask", "new", "-m", models["gpt-oss"], "--keep-random", 24, "--seed", seed, "-o", tmp_path / name)[0] == 0
    a, b, c = (mask_file.load(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a.num_kept == [24] * 4
    assert a.provenance == {"method": "random", "seed": 1}


def test_new_first_and_from_a_file(models: dict[str, Path], tmp_path: Path) -> None:
    assert run("mask", "new", "-m", models["gpt-oss"], "--keep-first", 2, "--top-k", 2, "-o", tmp_path / "first.json")[0] == 0
    first = mask_file.load(tmp_path / "first.json")
    assert (first.keep, first.top_k) == ([[0, 1]] * 4, 2)
    (tmp_path / "keep.json").write_text(json.dumps([[3, 1, 2, 0], [4, 5, 6, 7], list(range(32)), [0, 9, 8, 7]]))
    assert run("mask", "new", "-m", models["gpt-oss"], "--keep", tmp_path / "keep.json", "-o", tmp_path / "kept.json")[0] == 0
    assert mask_file.load(tmp_path / "kept.json").num_kept == [4, 4, 32, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "exactly one of"),
        (("--keep-random", 8, "--keep-first", 8), "exactly one of"),
        (("--keep-random", 33), "--keep-random: found 33; expected from 1 to the model's 32 experts"),
        (("--keep-first", 3), "--keep-first: keep[0]: found 3 experts kept; expected at least top_k = 4"),
        (("--keep-first", 8, "--top-k", 5), "top_k: found 5; expected from 1 to the model's own top_k = 4"),
        (("--keep", "missing.json"), "missing.json: found No such file"),
    ],
)
def test_new_refuses(models: dict[str, Path], tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    code, output = run("mask", "new", "-m", models["gpt-oss"], *options, "-o", tmp_path / "m.json")
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_show_draws_a_row_a_layer(models: dict[str, Path], tmp_path: Path) -> None:
    code, output = run("mask", "show", saved(random_mask(models["gpt-oss"], [24, 4, 32, 8]), tmp_path / "m.json"))
    rows = [line for line in output.splitlines() if "█" in line]
    assert code == 0
    assert [row.count("█") for row in rows] == [24, 4, 32, 8]
    assert [row.count("·") for row in rows] == [8, 28, 0, 24]
    assert "4 to 32 of 32 experts kept a layer, 53.1% in all" in output


def test_check(models: dict[str, Path], tmp_path: Path) -> None:
    mask = saved(random_mask(models["gpt-oss"], 8), tmp_path / "m.json")
    assert run("mask", "check", mask, "--model", models["gpt-oss"])[0] == 0
    assert run("mask", "check", mask, "--model", models["gpt-oss-mxfp4"])[0] == 0
    code, output = run("mask", "check", mask, "--model", models["qwen3-moe"])
    assert (code, "model.architecture" in output) == (2, True)
    assert run("mask", "check", mask, "--model", tmp_path / "none")[0] == 2


def test_diff(models: dict[str, Path], tmp_path: Path) -> None:
    a = saved(random_mask(models["gpt-oss"], 8, seed=1), tmp_path / "a.json")
    b = saved(random_mask(models["gpt-oss"], 8, seed=2), tmp_path / "b.json")
    q = saved(random_mask(models["qwen3-moe"], 8), tmp_path / "q.json")
    assert run("mask", "diff", a, a) == (0, "both masks route alike\n")
    code, output = run("mask", "diff", a, b)
    assert code == 1
    assert "4 of 4 layers keep different experts" in output
    assert run("mask", "diff", a, q)[0] == 2


def test_convert(models: dict[str, Path], tmp_path: Path) -> None:
    ranking = {"think_expert_analytics": {f"layer_{i}": list(range(31, -1, -1)) for i in range(4)}}
    (tmp_path / "math.json").write_text(json.dumps(ranking))
    code, _ = run("mask", "convert", tmp_path / "math.json", "-m", models["gpt-oss"], "--keep-n", 8, "-o", tmp_path / "m.json")
    assert code == 0
    assert mask_file.load(tmp_path / "m.json").keep == [list(range(24, 32))] * 4
    code, _output = run("mask", "convert", tmp_path / "math.json", "-m", models["gpt-oss"], "--section", "x", "-o", tmp_path / "n.json")
    assert code == 2


def test_checkpoint_commands(tmp_path: Path) -> None:
    assert run("checkpoint", "synth", "tiny", "--storage", "mxfp4", "--seed", 5, "-o", tmp_path / "a")[0] == 0
    assert run("checkpoint", "dequantize", tmp_path / "a", "-o", tmp_path / "b")[0] == 0
    code, output = run("checkpoint", "info", tmp_path / "b")
    assert code == 0
    for part in ("gpt-oss-bf16", "GptOssForCausalLM", "32, top_k 4", "sha256:"):
        assert part in output
    assert run("checkpoint", "synth", "tiny", "--layers", "0,2", "-o", tmp_path / "part")[0] == 0
    assert "a part: 0, 2 present" in run("checkpoint", "info", tmp_path / "part")[1]
    assert run("checkpoint", "synth", "tiny", "--layers", "a", "-o", tmp_path / "c")[0] == 2
    assert run("checkpoint", "synth", "tiny", "-o", tmp_path / "b")[0] == 2
    assert run("checkpoint", "info", tmp_path / "missing")[0] == 2


def test_errors_show_names_as_they_are(tmp_path: Path) -> None:
    """Rich takes words in brackets for styles, and a lone closing one for a mistake."""
    for name in ("ma[bold]sk.json", "[/x].json"):
        code, output = run("mask", "show", tmp_path / name)
        assert code == 2
        assert name in output.replace("\n", "")


def test_a_package_that_engines_do_not_bring_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "softprune.stats.export", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, output = run("stats", "export", tmp_path / "a", "--parquet", tmp_path / "b")
    assert code == 2
    assert "Python package pyarrow: found none here" in " ".join(output.split())


def test_a_module_of_its_own_that_is_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "softprune.stats.export", None)
    with pytest.raises(ModuleNotFoundError):
        run("stats", "export", tmp_path / "a", "--parquet", tmp_path / "b")


def test_places_that_cannot_be_read_or_written_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    model, file = models["gpt-oss"], tmp_path / "mask.json"
    assert run("mask", "new", "-m", model, "--keep-first", 24, "-o", file)[0] == 0
    for out in (tmp_path, file / "below"):
        code, output = run("mask", "new", "-m", model, "--keep-first", 24, "-o", out)
        assert code == 2
        assert f"{out if out == tmp_path else file}: found" in output.replace("\n", ""), output
    for command in (("checkpoint", "info"), ("prune", "--method", "random", "--keep", 4, "--out", tmp_path / "pruned")):
        code, output = run(*command, model / "config.json")
        assert code == 2
        assert "config.json/config.json: found no such file; expected a checkpoint folder" in output.replace("\n", ""), output
    assert not list(tmp_path.glob(".mask*"))


def test_a_mask_takes_no_number_to_keep(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    run("mask", "new", "-m", models["gpt-oss"], "--keep-first", 24, "-o", file)
    code, output = run("mask", "convert", file, "-m", models["gpt-oss"], "--keep-n", 20, "-o", tmp_path / "out.json")
    assert code == 2
    assert "found an expert mask; expected no --keep-n" in output


@pytest.mark.parametrize(
    "command",
    ["rank IN -o IN", "select IN --keep 4 -o IN", "report IN -o IN", "gate IN OTHER -o IN", "stats merge OTHER IN -o IN",
     "stats export IN --parquet IN"],
)  # fmt: skip
def test_nothing_is_written_over_what_is_read(tmp_path: Path, command: str) -> None:
    (tmp_path / "in").write_text("kept")
    names = {"IN": tmp_path / "in", "OTHER": tmp_path / "other"}
    code, output = run(*(names.get(word, word) for word in command.split()))
    assert code == (3 if command.startswith("gate") else 2)
    assert "which is read; expected another file" in output.replace("\n", " "), output
    assert (tmp_path / "in").read_text() == "kept"


@pytest.mark.parametrize(
    "command",
    ["gate", "gate only.json", "gate a b --packs code", "gate --bogus", "gate no.json no.json -o none/x", "noise-floor --url U",
     "no-op MODEL", "no-op missing --out x", "run"],
)  # fmt: skip
def test_wrong_arguments_are_no_verdict(command: str) -> None:
    """2 is INCOMPLETE."""
    assert run(*command.split())[0] == 3
