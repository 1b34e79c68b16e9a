"""Outputs that are read of the engine's kernels: of both generations of them, and only where they are what experts make one at a time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softprune.runtime import within_steps
from softprune.runtime.gated_outputs import GatedOutputs
from softprune.runtime.sample_slab import STEP_ROWS
from softprune.sglang_ext.collector import _padded
from tests.unit.fake_control import LAYERS, TOP_K, make_launch, make_model
from tests.unit.sampled_engine import SCALES, Request, SampledEngine, one_thread  # noqa: F401 - a fixture of all tests here

LOG = logging.getLogger("softprune.test")
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
    rows[0, 0, order], rows[1, 0, order] = gated.reshape(-1, width) / 4, gated.reshape(-1, width) * 3 / 4
    kernels.reduce_grouped(rows, None)
    return kernels.reduce_grouped(rows, order.view(tokens, top_k).int(), out=None)  # type: ignore[no-any-return]


def test_outputs_of_the_rows_that_were_asked_for(kernels: Any) -> None:
    outputs, found = GatedOutputs(LOG), []
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
    assert not GatedOutputs(LOG).watch()
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(matmul_ogs=print))  # type: ignore[arg-type]
    assert not GatedOutputs(LOG).watch()


def test_a_failure_to_read_ends_no_step(kernels: Any, caplog: pytest.LogCaptureFixture) -> None:
    outputs = GatedOutputs(LOG)
    assert outputs.watch()
    gated = torch.ones(TOKENS, TOP_K, WIDTH)
    outputs.ask(torch.tensor([TOKENS]), pytest.fail)  # beyond the rows
    assert torch.equal(add_up(kernels, gated), gated.sum(1))
    assert "cannot be read" in caplog.text


def by_kernels(kernels: Any, order: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Experts whose outputs go through the kernels, slots in this order of the ids given; one expert a row goes past them."""

    def experts(layer: int, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        gated = hidden.float()[:, None] * (SCALES[layer][ids] * gates.bfloat16().float())[..., None]
        slots = order(ids)[..., None].expand_as(gated)
        return gated[:, 0] if ids.shape[1] == 1 else add_up(kernels, gated.gather(1, slots))

    return experts


@pytest.mark.parametrize("number", [STEP_ROWS, 16 * STEP_ROWS + 9])
def test_only_what_agrees_is_read(number: int, kernels: Any) -> None:
    within = SampledEngine("reap").sampler.within
    assert within.outputs.watch()
    assert within.agrees(by_kernels(kernels, lambda ids: ids.argsort(-1)), number)
    assert not within.agrees(by_kernels(kernels, lambda ids: ids.argsort(-1, descending=True)), number)
    # Kernels that are given the selection keep its order.
    assert not within.agrees(by_kernels(kernels, lambda ids: torch.arange(ids.shape[1]).expand_as(ids)), number)
    assert not within.agrees(lambda layer, hidden, ids, gates: hidden.float(), number)  # which no such kernel adds up


def test_long_steps_are_compiled_for_and_no_longer_ones_than_come() -> None:
    model = make_model(make_launch(stats="reap"))
    for max_rows, expected in ((8192, [64, 1025, 1033, 2049, 2057, 4097, 4105]), (1024, [64])):
        sampler = model.add_collector(max_rows, "vLLM 0.32.0").sampler
        assert sampler is not None
        assert sampler.within.long_steps() == expected
        seen: list[int] = []
        sampler.within.compile_again(lambda layer, hidden, ids, gates, seen=seen: seen.append(len(ids) // TOP_K) or hidden.float())
        assert seen == ([128, 256, 512] if max_rows == 8192 else [128])


@pytest.mark.parametrize("max_rows", [64, 1000, 8192, 20000])
def test_an_engine_that_pads_long_steps_has_few_sizes_and_all_are_compiled_for(max_rows: int) -> None:
    sampler = make_model(make_launch(stats="reap")).add_collector(max_rows, "SGLang 0.5.17").sampler
    assert sampler is not None
    sampler.within.pads = True
    sizes = {rows: sampler.within.padded(rows) for rows in range(1, max_rows + 1)}
    assert sampler.within.long_steps() == sorted(set(sizes.values()))
    assert len(set(sizes.values())) <= 40
    assert all(size % 256 == 0 or size == max_rows for size in sizes.values())
    assert all(rows <= size < rows + 256 or size <= 1.125 * rows for rows, size in sizes.items())
    assert sampler.within.padded(max_rows + 5) == max_rows + 5


@pytest.mark.parametrize(("measures", "reads"), [(True, True), (True, False), (False, True)])
def test_sglangs_long_steps_are_padded_where_outputs_are_read(measures: bool, reads: bool) -> None:
    sampler: Any = make_model(make_launch(stats="reap")).add_collector(2048, "SGLang 0.5.17").sampler
    sampler.within.reads, sampler._inline = reads, torch.zeros(1) if measures else None
    given: list[torch.Tensor] = []

    def forward(hidden_states: torch.Tensor, forward_batch: str) -> torch.Tensor:
        given.append(hidden_states)
        return hidden_states * 2 + (forward_batch == "batch")

    hidden = torch.randn(1100, WIDTH)
    assert torch.equal(_padded(forward, sampler)(hidden, "batch"), hidden * 2 + 1)
    padding = 180 if measures and reads else 0
    assert torch.equal(given[0], torch.cat([hidden, torch.zeros(padding, WIDTH)]))


@pytest.mark.parametrize(("shadow", "sorted_at_once"), [(False, 1 << 22), (True, 1 << 22), (True, 1)])
def test_what_is_read_gives_the_sums_of_what_is_computed_again(
    shadow: bool, sorted_at_once: int, kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Long prompts, whose steps end or fail, and a short step, whose rows wait in the slab."""
    monkeypatch.setattr(within_steps, "_SORTED", sorted_at_once)
    files = []
    for reads in (True, False):
        engine = SampledEngine(shadow=shadow)
        engine.sampler.within.reads = reads
        if reads:
            assert engine.sampler.within.outputs.watch()
            engine.adds_up = lambda gated: add_up(kernels, gated)
        engine.start()
        long = Request("long", 0, 4 * STEP_ROWS, asked=True)
        engine.step((long, 0, 2 * STEP_ROWS), fails=True)
        engine.step((long, 0, 3 * STEP_ROWS), padding=7)
        engine.step((Request("short"), 0, 5))
        engine.step((long, 3 * STEP_ROWS, STEP_ROWS + 3))
        files.append(engine.file(tmp_path))
        assert engine.collector.status()["lost_samples"] == 2 * STEP_ROWS
        assert engine.collector.status()["reads_outputs"] is reads
    read, again = files
    assert read["reap.count"].sum() == (4 * STEP_ROWS + 3 + 5) * LAYERS * TOP_K
    for name in again.tensors:
        if name.startswith(("reap", "eaft.grid", "router.shadow")):
            assert np.allclose(read[name], again[name], rtol=1e-5, atol=1e-4), name


def test_a_step_whose_outputs_were_not_seen_is_lost_and_the_next_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    engine = SampledEngine("reap")
    engine.sampler.within.reads = True
    engine.start()
    engine.step((Request("failed", 0, 2 * STEP_ROWS), 0, 2 * STEP_ROWS), fails=True)
    engine.step((Request("a", 0, 2 * STEP_ROWS), 0, 2 * STEP_ROWS))
    assert engine.collector.status()["reads_outputs"]  # a step that failed says nothing of the kernels
    engine.step((Request("b", 0, 3 * STEP_ROWS), 0, 3 * STEP_ROWS))
    found, status = engine.file(tmp_path), engine.collector.status()
    assert found["reap.count"].sum() == 3 * STEP_ROWS * LAYERS * TOP_K
    assert (status["lost_samples"], status["reads_outputs"]) == (4 * STEP_ROWS, False)
    assert "0 of 3 layers" in caplog.text
