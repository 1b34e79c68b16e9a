"""`softprune plan`, `rewrite` and `verify` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softprune.bench.hollow import hollow_checkpoint
from softprune.bench.tiny.weights import TRAINED
from tests.conftest import random_mask, saved
from tests.unit.test_cli import run
from tests.unit.test_rewrite import first_mask


@pytest.fixture
def mask(tmp_path: Path) -> str:
    return saved(random_mask(TRAINED, 24), tmp_path / "mask.json")


@pytest.mark.parametrize("command", ["plan", "rewrite", "verify"])
def test_help(command: str) -> None:
    code, output = run(command, "--help")
    assert code == 0
    assert "Usage:" in output


def test_rewrite_and_verify(mask: str, tmp_path: Path) -> None:
    code, output = run("rewrite", TRAINED, mask, tmp_path / "out", "--max-shard-size", "4MB")
    assert (code, "out: 16.1 MB in 6 shards, 24 of 32 experts kept, verified, " in output) == (0, True), output
    code, output = run("verify", TRAINED, tmp_path / "out")
    assert (code, "79 tensors, 96 experts kept, 16.0 MB: every byte is that of" in output) == (0, True), output
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    code, output = run("verify", TRAINED, tmp_path / "out")
    assert code == 1
    assert "wrong:" in output
    assert "tokenizer.json: found SHA-256" in output
    assert "not a rewrite of" in output
    code, output = run("rewrite", TRAINED, mask, tmp_path / "out")
    assert (code, "out: found a folder that exists already; expected a new name" in output) == (2, True)


def test_without_verification(mask: str, tmp_path: Path) -> None:
    code, output = run("rewrite", TRAINED, mask, tmp_path / "out", "--no-verify", "--workers", 1)
    assert (code, "verified" in output) == (0, False)
    assert run("verify", TRAINED, tmp_path / "out")[0] == 0


def test_plan(mask: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, output = run("plan", TRAINED, mask, "--out", tmp_path / "out")
    assert code == 0
    for text in ("gpt-oss-mxfp4, 4 MoE layers of 32 experts, 19.4 MB", "reads   16.1 MB of 2 shards and 3 other files",
                 "writes  16.1 MB in 1 shard, 10.2 MB of it routers and experts", "memory  0.5 MB", "time    about"):  # fmt: skip
        assert text in output
    assert sorted(tmp_path.iterdir()) == before


def test_plan_of_the_120b_shape_as_json(tmp_path: Path) -> None:
    source = hollow_checkpoint("gpt-oss-120b", tmp_path / "120b", 4_200_000_000)
    path = saved(first_mask(source, 64), tmp_path / "mask.json")
    code, output = run("plan", source, path, "--json", "--no-probe")
    assert code == 0
    found = json.loads(output[output.index("{") :])
    assert found["router_and_expert_bytes"] == 36 * 847_503_488
    assert found["bytes_written"] == found["bytes_read"] == sum(found["shards_written"])
    assert max(found["shards_written"]) <= 5_000_000_000
    assert found["source_shards"] > 12
    assert found["estimate"] is None
    assert found["buffer_bytes"] <= 4 << 20
    assert {len(shards) for shards in found["shards_touched"].values()} <= {1, 2, 3}
    code, output = run("plan", source, path, "--json", "--no-probe", "--layers", "0,18")
    assert json.loads(output[output.index("{") :])["router_and_expert_bytes"] == 2 * 847_503_488


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-shard-size", "five"), "expected a size such as 5GB"),
        (("--max-shard-size", "0"), "--max-shard-size: found 0; expected a positive number of bytes"),
        (("--layers", "a"), "expected whole numbers, e.g. 0,18"),
        (("--layers", "9"), "--layers: found 9; expected decoder layers with experts, of 0 to 3"),
        (("--pad-to", "20"), "--pad-to: found 20; expected from 24"),
        (("--workers", "0"), "greater than or equal to 1"),
    ],
)
def test_bad_options(mask: str, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, output = run("rewrite", TRAINED, mask, tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2.5 MB", 2_500_000), ("1GiB", 2**30), ("512kb", 512_000), ("4096", 4096)])
def test_sizes(text: str, size: int) -> None:
    from softprune.checkpoint.cli import _bytes

    assert _bytes(text) == size
