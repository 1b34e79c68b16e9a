"""The parts of sampling by themselves: which rows, where they are kept, tokens' records, and sums against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softprune.runtime.expert_norms import Routed, routed
from softprune.runtime.sample_slab import SLAB_ROWS, STEP_ROWS, SampleSlab
from softprune.runtime.sampled_sums import GRID, PLANE, SampledSums
from softprune.runtime.sampling import Sampling
from softprune.runtime.token_records import TokenRecords
from softprune.runtime.token_scores import reference
from softprune.stats.layout import PLANE_BINS


@pytest.mark.parametrize("every", [1, 3, 16, 1000])
def test_exactly_one_of_each_window(every: int) -> None:
    """Whatever the steps; and each place of a window about as often as any other, whatever the size of a batch."""
    rng, sampling, seen, found = np.random.default_rng(every), Sampling(every), 0, []
    for rows in (0, 1, 5000, *rng.integers(0, 40, 500).tolist(), 7 * every, *[16] * 4000):
        places = sampling.of(rows)
        assert np.array_equal(places, np.unique(places))
        assert not len(places) or 0 <= places[0] <= places[-1] < rows
        found.append(seen + places)
        seen += rows
    places = np.concatenate(found)
    whole = seen // every
    assert np.array_equal(places[:whole] // every, np.arange(whole))
    assert len(places) in (whole, whole + 1)
    if every == 16:
        expected = whole / every
        assert abs(np.bincount(places % every, minlength=every) - expected).max() < 5 * math.sqrt(expected)


def test_some_of_too_many() -> None:
    sampling, rows = Sampling(1), np.arange(100, 300)
    counts = np.zeros(300)
    for _ in range(400):
        some = sampling.some(rows, 50)
        assert np.array_equal(some, np.unique(some))
        assert len(some) == 50
        counts[some] += 1
    assert counts[:100].sum() == 0
    assert abs(counts[100:] - 100).max() < 5 * math.sqrt(75)


def test_the_slab_keeps_the_rows_that_it_was_told_of() -> None:
    slab = SampleSlab(2, 4, 6, "cpu", torch.bfloat16)
    kept: list[torch.Tensor] = []
    for step, sampled in enumerate(([3], [], [0, 5, 8], list(range(STEP_ROWS)))):
        hidden = torch.randn(STEP_ROWS + 3, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        slab.describe(np.array(sampled, np.int64))
        for layer in range(2):
            slab.take(layer, hidden + layer, hidden[:, 4:])
        kept += [hidden[row] for row in sampled]
    assert slab.used == len(kept)
    for layer in range(2):
        assert torch.equal(slab.hidden[layer, : slab.used], torch.stack(kept)[:, :6] + layer)
        assert torch.equal(slab.logits[layer, : slab.used], torch.stack(kept)[:, 4:])
    before = slab.hidden.clone()
    slab.describe(np.empty(0, np.int64))
    slab.take(0, torch.ones(5, 6).bfloat16(), torch.ones(5, 4).bfloat16())
    assert torch.equal(slab.hidden, before)
    while slab.has_room(STEP_ROWS):
        slab.describe(np.arange(STEP_ROWS))
    left = SLAB_ROWS - slab.used
    assert 0 <= left < STEP_ROWS
    assert slab.has_room(left)
    assert not slab.has_room(left + 1)
    slab.clear()
    assert slab.has_room(SLAB_ROWS)


def test_records_have_numbers_that_go_on() -> None:
    records = TokenRecords(10, "cpu")
    values = torch.arange(60.0).view(20, 3)
    assert (records.add(values[:4]), records.add(values[4:10]), records.add(values[10:11])) == (0, 4, None)
    first = records.fetch()
    assert records.add(values[10:20]) == 10
    second = records.fetch()
    found = np.full((5, 3), np.nan, np.float32)
    numbers = np.array([12, -1, 3, 10, 99])
    first.look_up(numbers, found)
    second.look_up(numbers, found)
    assert np.array_equal(found[[0, 2, 3]], values.numpy()[[12, 3, 10]])
    assert np.isnan(found[[1, 4]]).all()


LAYERS, EXPERTS, TOP_K, ROWS = 2, 8, 3, 40


def test_sums_against_loops() -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    sums = SampledSums(3, LAYERS, EXPERTS, eaft=True)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(LAYERS * ROWS)]).view(LAYERS, ROWS, TOP_K)
    gates = torch.rand(ids.shape, generator=generator).softmax(-1)
    norms = torch.rand(ids.shape, generator=generator) * 50
    found = Routed(ids.to(torch.int16), gates, norms, ids.flip(0).to(torch.int16))
    tags, kinds = rng.integers(-1, 3, ROWS), rng.integers(0, 2, ROWS)
    scores = np.stack([-rng.exponential(3, ROWS), rng.uniform(0, 9, ROWS), rng.uniform(0, 1, ROWS)], 1).astype(np.float32)
    scores[5], scores[6, 0] = np.nan, 1e-7  # p may round to more than 1
    assert sums.add_rows(found, tags, kinds, scores) == 0
    tensors = sums.tensors(3, reap=True, shadow=True)
    expected = {name: np.zeros_like(values) for name, values in tensors.items() if name.startswith(("reap", "router", "eaft.grid"))}
    for layer in range(LAYERS):
        for row in range(ROWS):
            for place in range(TOP_K if tags[row] >= 0 else 0):
                expert, gate, norm = int(ids[layer, row, place]), float(gates[layer, row, place]), float(norms[layer, row, place])
                at = tags[row], layer, expert
                expected["router.shadow_count"][tags[row], 1 - layer, expert] += 1
                expected["reap.count"][at] += 1
                expected["reap.norm_sum"][at] += norm
                expected["reap.gate_norm_sum"][at] += gate * norm
                if row != 5:
                    x = bin_at(scores[row, 0] / math.log(10), GRID.log10_p)
                    cell = tags[row], kinds[row], layer, expert, x, bin_at(scores[row, 2], GRID.entropy)
                    expected["eaft.grid_count"][cell] += 1
                    expected["eaft.grid_gate_norm"][cell] += gate * norm
    for name, values in expected.items():
        assert np.allclose(tensors[name], values, rtol=1e-6, atol=1e-4), name
    assert not any(tensors[name].any() for name in tensors if name not in expected)
    check_tokens(sums, tags, kinds, scores)


def check_tokens(sums: SampledSums, tags: NDArray[np.int64], kinds: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
    meant = tags >= 0
    assert sums.add_tokens(tags, kinds, scores) == int(meant[5])
    tensors = sums.tensors(3, reap=True, shadow=False)
    assert "router.shadow_count" not in tensors
    p = [min(math.exp(value), 1.0) for value in scores[:, 0]]
    edges = [np.linspace(low, high, bins + 1) for low, high, bins in zip((PLANE.p_min, 0), (PLANE.p_max, 1), PLANE_BINS, strict=True)]
    for tag in range(3):
        for kind in range(2):
            rows = [row for row in range(ROWS) if tags[row] == tag and kinds[row] == kind and row != 5]
            assert tensors["eaft.hist"][tag, kind].sum() == len(rows)
            for row in rows:
                assert tensors["eaft.hist"][tag, kind, bin_at(p[row], edges[0]), bin_at(scores[row, 2], edges[1])]
            for name, value in (
                ("nll_sum", sum(-min(float(scores[row, 0]), 0) for row in rows)), ("p_sum", sum(p[row] for row in rows)),
                ("nll_square_sum", sum(float(scores[row, 0]) ** 2 for row in rows)),
                ("entropy_sum", sum(float(scores[row, 1]) for row in rows)),
                ("entropy_top_sum", sum(float(scores[row, 2]) for row in rows)),
            ):  # fmt: skip
                assert tensors[f"eaft.{name}"][tag, kind] == pytest.approx(value, abs=1e-4)


def bin_at(value: float, edges: object) -> int:
    """The bin [e_i, e_i+1) of a value; the outermost ones take what lies beyond."""
    inner = list(edges)[1:-1]  # type: ignore[call-overload]
    return sum(value >= edge for edge in inner)


def test_the_order_of_rows_does_not_matter() -> None:
    ids = torch.zeros(1, 1000, 1, dtype=torch.int16)
    norms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) * 1000
    nothing = np.zeros(1000, np.int64), np.zeros(1000, np.int64), np.full((1000, 3), np.nan, np.float32)
    totals = []
    for order in (slice(None), torch.randperm(1000, generator=torch.Generator().manual_seed(2))):
        sums = SampledSums(1, 1, 2, eaft=False)
        sums.add_rows(Routed(ids[:, order], norms[:, order] / 1000, norms[:, order]), *nothing)
        totals.append(sums.tensors(1, reap=True, shadow=False))
    assert all(np.array_equal(totals[0][name], totals[1][name]) for name in totals[0])


def test_norms_are_those_of_each_chosen_expert() -> None:
    """Each row is given to the experts once for each that was chosen; ties go to the smaller id."""
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([[1.0, 3, 2, 0], [0, 0, 0, 0], [4, -math.inf, 5, -math.inf], [0, 1, 2, 3], [9, 0, 9, 0]])
    found = routed(1, hidden, logits, 2, lambda layer, rows, ids, gates: rows * (ids + layer) * gates)
    assert found.ids.tolist() == [[1, 2], [0, 1], [2, 0], [3, 2], [0, 2]]
    assert found.norms is not None
    for row in range(5):
        assert found.gates[row].tolist() == pytest.approx(logits[row][found.ids[row].long()].softmax(-1).tolist())
        assert found.norms[row].tolist() == pytest.approx([float(hidden[row].norm() * (expert + 1)) for expert in found.ids[row].tolist()])
    assert routed(0, hidden[:0], logits[:0], 2, lambda layer, rows, ids, gates: rows).norms.shape == (0, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("vocabulary", [3, 20, 300])
def test_scores_against_loops(vocabulary: int) -> None:
    """Log-probabilities give the scores that logits give; what cannot be is nothing."""
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.0], [1], [3], [10], [30], [2]])
    logits[5, 1:] = -math.inf
    tokens = torch.tensor([0, 1, 2, 0, 1, 0])
    found = reference(logits, tokens)
    assert torch.allclose(found, reference(logits.log_softmax(-1), tokens), atol=1e-5)
    for row in range(6):
        p = logits[row].double().softmax(-1)
        top = sorted(p.tolist(), reverse=True)[:20]
        assert float(found[row, 0]) == pytest.approx(math.log(float(p[tokens[row]])), abs=1e-4)
        assert float(found[row, 1]) == pytest.approx(-sum(x * math.log(x) for x in p.tolist() if x > 0), abs=1e-4)
        shares = [x / sum(top) for x in top]
        entropy = -sum(x * math.log(x) for x in shares if x > 0) / math.log(min(20, vocabulary))
        assert float(found[row, 2]) == pytest.approx(entropy, abs=1e-4)
