"""Tiles of the experts' kernels: the rule against what was measured on a GPU, and that the kernels are told only what is theirs."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softprune.runtime import masked_model
from softprune.runtime.tiles import fit_tiles, rows_of_tile, told
from tests.unit.fake_control import EXPERTS, make_launch, make_mask, make_model

MEASURED = Path("bench/results/tiles_gpu.json")


@pytest.mark.parametrize("kernels", ["3.5", "3.6"])
def test_the_rule_chooses_the_fastest_tile_or_one_near_it(kernels: str) -> None:
    document = json.loads(MEASURED.read_text())[kernels]
    ours, own = [], []
    for row in document["rows"]:
        times = row["us"]
        best = min(times.values())
        ours.append(times[str(rows_of_tile(row["rows"] * document["top_k"] / row["keep"]))] / best)
        own.append(times[str(row["own"])] / best)
    assert len(ours) == 90
    assert statistics.fmean(ours) < 1.01 < 1.04 < statistics.fmean(own)
    assert max(ours) < 1.16


@pytest.mark.parametrize("kernels", ["3.5", "3.6"])
def test_with_one_tile_a_mask_costs_what_a_rewritten_layer_does(kernels: str) -> None:
    rows = json.loads(MEASURED.read_text())[kernels]["rows"]
    times = {(row["experts"], row["keep"], row["rows"]): row["us"] for row in rows if row["skew"] == 0}
    batches = sorted(batch for experts, keep, batch in times if (experts, keep) == (24, 24))
    ratios = [times[32, 24, batch][tile] / times[24, 24, batch][tile] for batch in batches for tile in ("16", "32", "64")]
    assert 0.98 < statistics.median(ratios) < 1.02


@pytest.mark.parametrize(
    ("tokens", "tile"), [(0.1, 16), (13.3, 16), (13.4, 32), (26.6, 32), (26.7, 64), (64, 64), (64.1, 128), (9000, 128)]
)
def test_rule(tokens: float, tile: int) -> None:
    assert rows_of_tile(tokens) == tile


@dataclass
class Routing:
    """As triton_kernels' RoutingData."""

    n_expts_tot: int = 32
    expt_hist: Any = 1
    expected_tokens_per_expt: int | None = None


def chosen_by_old(out: Any, lhs: Any, rhs: Any, precision: Any, m: int, n: int, k: int, routing_data: Routing | None) -> Any:
    """As triton_kernels 3.5, what its rule makes of the tokens of an expert."""
    return None if routing_data is None else routing_data.expected_tokens_per_expt


def chosen_by_new(out: Any, lhs: Any, rhs: Any, precision: Any, batch: int, m: int, n: int, k: int, routing_data: Routing | None) -> Any:
    """As triton_kernels 3.6."""
    return None if routing_data is None else routing_data.expected_tokens_per_expt


@pytest.fixture(params=["3.5", "3.6"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "3.5":
        module = SimpleNamespace(make_opt_flags=chosen_by_old, reduce_grouped=None, before=(0, 0, 0, 0), doubles=False)
    else:
        module = SimpleNamespace(make_opt_flags=chosen_by_new, reduce=None, before=(0, 0, 0, 0, 1), doubles=True)
    monkeypatch.setitem(sys.modules, "triton_kernels.matmul_ogs", module)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return module


def chosen(kernels: Any, m: int, routing: Routing | None) -> Any:
    return kernels.make_opt_flags(*kernels.before, m, 5760, 2880, routing)


@pytest.mark.parametrize(("m", "tile"), [(4, 16), (128 * 4, 32), (256 * 4, 64), (8192 * 4, 128)])
def test_kernels_are_told(kernels: Any, m: int, tile: int) -> None:
    assert chosen(kernels, m, Routing()) is None
    assert fit_tiles(24, 32)
    routing = Routing()
    assert chosen(kernels, m, routing) == told(tile, kernels.doubles)
    assert chosen(kernels, m, routing) == told(tile, kernels.doubles)


def test_other_uses_are_left_alone(kernels: Any) -> None:
    assert fit_tiles(24, 32)
    assert chosen(kernels, 512, None) is None
    assert chosen(kernels, 512, Routing(n_expts_tot=8)) is None
    assert chosen(kernels, 512, Routing(expt_hist=None)) is None
    assert chosen(kernels, 512, Routing(expected_tokens_per_expt=5)) == 5


def test_elsewhere_nothing_changes(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels.make_opt_flags
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not fit_tiles(24, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not fit_tiles(24, 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels.make_opt_flags = lambda *arguments: None
    assert not fit_tiles(24, 32)
    assert before not in (kernels.make_opt_flags, None)
    monkeypatch.delitem(sys.modules, "triton_kernels.matmul_ogs")
    assert not fit_tiles(24, 32)


@pytest.mark.parametrize(("keep", "kept"), [([[0, 1, 2], [0, 1, 2, 3], None], 5.0), ([None, None, None], None), (None, None)])
def test_the_mask_of_the_start_decides(
    keep: list[list[int] | None] | None, kept: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(masked_model, "fit_tiles", lambda *numbers: told.append(numbers) is None)
    launch = make_launch()
    if keep is not None:
        mask, path = make_mask(keep), tmp_path / "mask.json"
        path.write_text(mask.dump())
        launch = make_launch(expert_mask=str(path), mask_hash=mask.hash)
    make_model(launch).fit_kernels()
    assert told == ([] if kept is None else [(kept, EXPERTS)])
