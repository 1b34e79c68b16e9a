"""Outputs that are read of the engine's kernels: of both generations of them, and only where they are what experts make one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softprune.runtime.gated_outputs import GatedOutputs
from softprune.runtime.sample_slab import STEP_ROWS
from tests.unit.fake_control import LAYERS, TOP_K
from tests.unit.sampled_engine import SCALES, Request, SampledEngine

MODULE = "triton_kernels.matmul_ogs"
TOKENS, WIDTH = 6, 5


def reduce(x: torch.Tensor, dim: int, mask: Any = None) -> torch.Tensor:
    """As triton_kernels 3.6: sums over the experts of a token."""
    return x.sum(dim)


def reduce_grouped(x: torch.Tensor, indx: torch.Tensor | None, out: Any = None) -> torch.Tensor:
    """As triton_kernels 3.5: sums rows that stand in the order of experts, over parts and tokens."""
    return x.sum(0)[0] if indx is None else x[:, 0].sum(0)[indx.long()].sum(1)


@pytest.fixture(params=[reduce, reduce_grouped])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = SimpleNamespace(**{request.param.__name__: request.param})
    monkeypatch.setitem(sys.modules, MODULE, module)  # type: ignore[arg-type]
    return module


def add_up(kernels: Any, gated: torch.Tensor) -> torch.Tensor:
    """What an engine does with [tokens, top_k, width]."""
    tokens, top_k, width = gated.shape
    if hasattr(kernels, "reduce"):
        kernels.reduce(gated.transpose(0, 1), 0)  # parts of a sum, which are something else
        return kernels.reduce(gated, dim=1, mask=None)  # type: ignore[no-any-return]
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(1))
    rows = torch.empty(2, 1, tokens * top_k, width)
    rows[:, 0, order] = gated.reshape(-1, width) / 2
    kernels.reduce_grouped(rows, None)
    return kernels.reduce_grouped(rows, order.view(tokens, top_k).int(), out=None)  # type: ignore[no-any-return]


def test_outputs_of_the_rows_that_were_asked_for(kernels: Any) -> None:
    outputs, found = GatedOutputs(), []
    assert outputs.watch()
    gated = torch.randn(TOKENS, TOP_K, WIDTH, generator=torch.Generator().manual_seed(0))
    outputs.ask(torch.tensor([4, 0, 4]), found.append)
    assert torch.allclose(add_up(kernels, gated), gated.sum(1))
    assert len(found) == 1
    assert torch.allclose(found[0], gated[[4, 0, 4]])
    add_up(kernels, gated)  # not asked for
    outputs.ask(torch.tensor([1]), found.append)
    outputs.forget()
    add_up(kernels, gated)
    assert len(found) == 1


def test_other_kernels_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    assert not GatedOutputs().watch()
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(matmul_ogs=print))  # type: ignore[arg-type]
    assert not GatedOutputs().watch()


def by_kernels(kernels: Any, order: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Experts whose outputs go through the kernels, slots in this order of ids; one expert a row goes past them, as in the engines."""

    def experts(layer: int, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        gated = hidden.float()[:, None] * (SCALES[layer][ids] * gates.bfloat16().float())[..., None]
        slots = order(ids)[..., None].expand_as(gated)
        return gated[:, 0] if ids.shape[1] == 1 else add_up(kernels, gated.gather(1, slots))

    return experts


def test_only_what_agrees_is_read(kernels: Any) -> None:
    sampler = SampledEngine("reap").sampler
    assert sampler.outputs.watch()
    assert sampler._agrees(by_kernels(kernels, lambda ids: ids.argsort(-1)))
    assert not sampler._agrees(by_kernels(kernels, lambda ids: ids.argsort(-1, descending=True)))
    assert not sampler._agrees(lambda layer, hidden, ids, gates: hidden.float())  # which no such kernel adds up


@pytest.mark.parametrize("shadow", [False, True])
def test_what_is_read_gives_the_sums_of_what_is_computed_again(shadow: bool, kernels: Any, tmp_path: Path) -> None:
    """Long prompts, whose steps end or fail, with short steps between."""
    files = []
    for reads in (True, False):
        engine = SampledEngine(shadow=shadow)
        engine.sampler.reads_outputs = reads
        if reads:
            assert engine.sampler.outputs.watch()
            engine.adds_up = lambda gated: add_up(kernels, gated)
            engine.sampler.experts = None if not shadow else engine.sampler.experts
        engine.start()
        long = Request("long", 0, 4 * STEP_ROWS, asked=True)
        engine.step((long, 0, 2 * STEP_ROWS), fails=True)
        engine.step((long, 0, 3 * STEP_ROWS), padding=7)
        engine.step((long, 3 * STEP_ROWS, STEP_ROWS + 3))
        files.append(engine.file(tmp_path))
        assert engine.collector.status()["lost_samples"] == 2 * STEP_ROWS
        assert engine.collector.status()["reads_outputs"] is reads
    read, again = files
    assert read["reap.count"].sum() == (4 * STEP_ROWS + 3) * LAYERS * TOP_K
    for name in again.tensors:
        if name.startswith(("reap", "eaft.grid", "router.shadow")):
            assert np.allclose(read[name], again[name], rtol=1e-5, atol=1e-4), name


def test_a_step_whose_outputs_were_not_seen_is_lost(tmp_path: Path) -> None:
    engine = SampledEngine("reap")
    engine.sampler.reads_outputs = True
    engine.start()
    engine.step((Request("a", 0, 2 * STEP_ROWS), 0, 2 * STEP_ROWS))
    engine.step((Request("b", 0, 10), 0, 10))
    found = engine.file(tmp_path)
    assert found["reap.count"].sum() == 10 * LAYERS * TOP_K
    assert engine.collector.status()["lost_samples"] == 2 * STEP_ROWS
