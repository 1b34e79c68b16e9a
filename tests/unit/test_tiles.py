"""Tiles of the experts' kernels: the rule against what was measured on a GPU, and that the kernels are told only what is theirs."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softprune.runtime import masked_model
from softprune.runtime.tiles import fit_tiles, rows_of_tile
from tests.unit.fake_control import EXPERTS, make_launch, make_mask, make_model

MEASURED = Path("bench/results/tiles_gpu.json")


@pytest.mark.parametrize("kernels", ["3.5", "3.6"])
def test_the_rule_chooses_the_fastest_tile_or_one_near_it(kernels: str) -> None:
    document = json.loads(MEASURED.read_text())[kernels]
    masked = [row for row in document["rows"] if row["keep"] < row["experts"]]
    ours, own = [], []
    for row in masked:
        times = row["us"]
        best = min(times.values())
        tile = max(row["own"], rows_of_tile(row["rows"] * document["top_k"] / row["keep"]))
        ours.append(times[str(tile)] / best)
        own.append(times[str(row["own"])] / best)
    assert len(masked) == 54
    assert statistics.fmean(ours) < 1.005 < 1.07 < statistics.fmean(own)
    assert max(ours) < 1.16


@pytest.mark.parametrize("kernels", ["3.5", "3.6"])
def test_with_one_tile_a_mask_costs_what_a_rewritten_layer_does(kernels: str) -> None:
    rows = json.loads(MEASURED.read_text())[kernels]["rows"]
    times = {(row["experts"], row["keep"], row["rows"]): row["us"] for row in rows if row["skew"] == 0}
    batches = sorted(batch for experts, keep, batch in times if (experts, keep) == (24, 24))
    ratios = [times[32, 24, batch][tile] / times[24, 24, batch][tile] for batch in batches for tile in ("16", "32", "64")]
    assert 0.98 < statistics.median(ratios) < 1.02


@pytest.mark.parametrize("kernels", ["3.5", "3.6"])
def test_tiles_do_not_change_outputs(kernels: str) -> None:
    compared = [row["equal"] for row in json.loads(MEASURED.read_text())[kernels]["rows"] if "equal" in row]
    assert len(compared) == 16
    assert all(all(row.values()) for row in compared)


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


def power_of_two(number: float) -> int:
    return 1 << max(0, math.ceil(math.log2(number)))


def tokens_of(m: int, routing: Routing | None) -> int:
    if routing is None:
        return m
    return routing.expected_tokens_per_expt or max(1, m // routing.n_expts_tot)


def as_old(out: Any, lhs: Any, rhs: Any, precision: Any, m: int, n: int, k: int, routing_data: Routing | None) -> Any:
    """The rule of triton_kernels 3.5."""
    return SimpleNamespace(block_m=max(16, min(128, power_of_two(tokens_of(m, routing_data)))))


def as_new(out: Any, lhs: Any, rhs: Any, precision: Any, batch: int, m: int, n: int, k: int, routing_data: Routing | None) -> Any:
    """The rule of triton_kernels 3.6."""
    tokens = tokens_of(m, routing_data)
    if tokens <= 64 and routing_data is not None and routing_data.expt_hist is not None:
        return SimpleNamespace(block_m=max(16, min(64, power_of_two(2 * tokens))))
    return SimpleNamespace(block_m=max(16, min(128, power_of_two(tokens))))


def as_none(out: Any, lhs: Any, rhs: Any, precision: Any, m: int, n: int, k: int, routing_data: Routing | None) -> Any:
    """A generation that does not listen."""
    return SimpleNamespace(block_m=16)


class Kernels:
    """A module of kernels by one of these rules."""

    def __init__(self, rule: Any) -> None:
        self.make_opt_flags, self.before = rule, (0,) * (5 if rule is as_new else 4)

    def tile(self, m: int, routing: Routing | None) -> int:
        return int(self.make_opt_flags(*self.before, m, 5760, 2880, routing).block_m)


def installed(monkeypatch: pytest.MonkeyPatch, rule: Any) -> Kernels:
    kernels = Kernels(rule)
    monkeypatch.setitem(sys.modules, "triton_kernels.matmul_ogs", kernels)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return kernels


@pytest.fixture(params=[as_old, as_new])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return installed(monkeypatch, request.param)


@pytest.mark.parametrize("kept", [8, 16, 24, 28, 23.4])
def test_tiles_are_those_of_the_rule_and_never_smaller(kernels: Kernels, kept: float) -> None:
    steps = [4 * rows for rows in (*range(1, 300), 512, 600, 1024, 8192)]
    own = [kernels.tile(m, Routing()) for m in steps]
    assert fit_tiles(kept, 32)
    for _ in range(2):
        assert [kernels.tile(m, Routing()) for m in steps] == [
            max(tile, rows_of_tile(m / kept)) for tile, m in zip(own, steps, strict=True)
        ]


def test_what_is_told_stays_between_us(kernels: Kernels) -> None:
    assert fit_tiles(8, 32)
    routing = Routing()
    assert kernels.tile(4 * 64, routing) == 64
    assert routing == Routing()


def test_other_uses_are_left_alone(kernels: Kernels) -> None:
    others = [None, Routing(n_expts_tot=24), Routing(expt_hist=None), Routing(expected_tokens_per_expt=1)]
    own = [kernels.tile(4 * 64, routing) for routing in others]
    assert fit_tiles(8, 32)
    assert kernels.tile(4 * 64, Routing()) == 64
    assert [kernels.tile(4 * 64, routing) for routing in others] == own


def test_another_model_of_the_process_has_its_own(kernels: Kernels) -> None:
    engine = kernels.make_opt_flags
    own = kernels.tile(4 * 128, Routing())
    assert fit_tiles(8, 32)
    assert kernels.tile(4 * 128, Routing()) == 64
    assert fit_tiles(24, 32)
    assert kernels.tile(4 * 128, Routing()) == 32
    assert not fit_tiles(None, 32)
    assert kernels.tile(4 * 128, Routing()) == own
    assert kernels.make_opt_flags is engine


def test_kernels_that_do_not_listen_run_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = installed(monkeypatch, as_none)
    assert fit_tiles(8, 32)
    assert kernels.tile(4 * 256, Routing()) == 16


def test_elsewhere_nothing_changes(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = kernels.make_opt_flags
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not fit_tiles(24, 32)
    assert kernels.make_opt_flags is engine
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not fit_tiles(24, 32)
    assert kernels.make_opt_flags is engine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels.make_opt_flags = unknown = lambda *arguments: None
    assert not fit_tiles(24, 32)
    assert kernels.make_opt_flags is unknown
    monkeypatch.delitem(sys.modules, "triton_kernels.matmul_ogs")
    assert not fit_tiles(24, 32)


@pytest.mark.parametrize("are_triton", [True, False])
@pytest.mark.parametrize(("keep", "kept"), [([[0, 1, 2], [0, 1, 2, 3], None], 5.0), ([None, None, None], None), (None, None)])
def test_the_mask_of_the_start_decides(
    keep: list[list[int] | None] | None, kept: float | None, are_triton: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float | None, int]] = []

    def fit(kept: float | None, num_experts: int) -> bool:
        asked.append((kept, num_experts))
        return kept is not None

    monkeypatch.setattr(masked_model, "fit_tiles", fit)
    launch = make_launch()
    if keep is not None:
        mask, path = make_mask(keep), tmp_path / "mask.json"
        path.write_text(mask.dump())
        launch = make_launch(expert_mask=str(path), mask_hash=mask.hash)
    model = make_model(launch)
    model.fit_kernels(are_triton)
    expected = kept if are_triton else None
    assert asked == [(expected, EXPERTS)]
    assert model.status()["moe_tiles"] == ("engine" if expected is None else "mask")
    model.stage(None)
    model.commit()
    assert len(asked) == 1, "a live switch changes no tiles"
