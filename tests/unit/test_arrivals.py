"""What arrives on the host is added up in order, beside the thread that launches steps, which only waits where it asks to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprune.runtime import arrivals
from softprune.runtime.arrivals import Arrivals, Batch, Rows
from softprune.runtime.expert_norms import Routed
from softprune.runtime.sample_slab import STEP_ROWS
from softprune.runtime.sampled_sums import SampledSums
from softprune.runtime.token_records import Fetched
from tests.unit.fake_control import LAYERS as ENGINE_LAYERS
from tests.unit.fake_control import TOP_K as ENGINE_TOP_K
from tests.unit.sampled_engine import Request, SampledEngine, one_thread  # noqa: F401 - a fixture of all tests here

LAYERS, EXPERTS, TOP_K = 2, 4, 2


class Arriving:
    """Stands for an event of the device."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def synchronize(self) -> None:
        assert self.reached.wait(20)


def batch(sums: Any, record: int, arrived: Any = None, norm: float = 1.0) -> Batch:
    """One row, of the token before its own, and one token."""
    ids = torch.tensor([0, 1], dtype=torch.int16).expand(LAYERS, 1, TOP_K)
    found = Routed(ids, torch.full((LAYERS, 1, TOP_K), 0.5), torch.full((LAYERS, 1, TOP_K), norm))
    rows = Rows(np.zeros(1, np.int64), np.array([record - 1], np.int64))
    return Batch(
        sums, [(found, rows)], Fetched(record, torch.tensor([[-0.5, 1.0, 0.5]])), np.zeros(1, np.int64), np.zeros(1, np.int64), arrived
    )


def test_whoever_adds_does_not_wait_and_whoever_finishes_does() -> None:
    sums, first, second = SampledSums(1, LAYERS, EXPERTS, eaft=True), Arriving(), Arriving()
    added = Arrivals(torch.device("cpu"))
    assert added.add(batch(sums, 0, first)) == 0
    assert added.add(batch(sums, 1, second)) == 0
    second.reached.set()  # and yet it is the second
    assert not sums.tensors(1, reap=True, shadow=False)["reap.count"].any()
    threading.Timer(0.1, first.reached.set).start()
    assert added.finish() == 0
    found = sums.tensors(1, reap=True, shadow=False)
    assert (found["reap.count"][0, :, :2] == 2).all()
    # The second's row goes with the token that came in the first; the first's with none.
    assert (found["eaft.hist"].sum(), found["eaft.grid_count"].sum()) == (2, LAYERS * TOP_K)


def test_what_is_not_finite_is_counted_once() -> None:
    sums, added = SampledSums(1, LAYERS, EXPERTS, eaft=True), Arrivals(torch.device("cpu"))
    lost = sum(added.add(batch(sums, record, norm=float("nan") if record % 2 else 1.0)) for record in range(6))
    assert lost + added.finish() == 3
    assert added.finish() == 0


def test_no_more_wait_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_MOST", 2)
    sums, arriving, added = SampledSums(1, LAYERS, EXPERTS, eaft=True), Arriving(), Arrivals(torch.device("cpu"))
    added.add(batch(sums, 0, arriving))
    added.add(batch(sums, 1))
    threading.Timer(0.1, arriving.reached.set).start()
    added.add(batch(sums, 2))
    assert arriving.reached.is_set()
    added.finish()


def test_what_goes_wrong_is_told_once_and_the_next_is_added() -> None:
    sums, added = SampledSums(1, LAYERS, EXPERTS, eaft=True), Arrivals(torch.device("cpu"))

    def add_and_finish() -> None:  # it is told by either, as it comes
        added.add(batch(None, 0))
        added.finish()

    with pytest.raises(AttributeError):
        add_and_finish()
    added.add(batch(sums, 1))
    assert added.finish() == 0
    assert sums.tensors(1, reap=True, shadow=False)["reap.count"].sum() == LAYERS * TOP_K


def test_what_goes_wrong_is_not_counted_twice_and_can_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that could not be added up is lost; what comes after it is not mixed with it."""
    engine, add_rows, fails = SampledEngine(), SampledSums.add_rows, [True]

    def once(self: SampledSums, *arguments: Any) -> int:
        if fails and fails.pop():
            raise MemoryError
        return add_rows(self, *arguments)

    monkeypatch.setattr(SampledSums, "add_rows", once)
    engine.start()
    engine.step((Request("a", 0, 3 * STEP_ROWS, asked=True), 0, 3 * STEP_ROWS))
    with pytest.raises(MemoryError):
        engine.file(tmp_path)
    engine.step((Request("b", 0, 2 * STEP_ROWS, asked=True), 0, 2 * STEP_ROWS))
    engine.step((Request("c", 0, 5), 0, 5))
    found = engine.sampler.sums(None).tensors(1, reap=True, shadow=False)
    assert found["reap.count"].sum() == (2 * STEP_ROWS + 5) * ENGINE_LAYERS * ENGINE_TOP_K
    fails.append(True)
    engine.step((Request("d", 0, 3 * STEP_ROWS), 0, 3 * STEP_ROWS))
    engine.collector.call("reset")
    engine.step((Request("e", 0, 5), 0, 5))
    assert engine.file(tmp_path)["reap.count"].sum() == 5 * ENGINE_LAYERS * ENGINE_TOP_K
