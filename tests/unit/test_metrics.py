"""Metrics of scored tokens are what spec/metrics.md 1.4 to 1.6 say: compared with loops over single tokens."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any, Literal

import numpy as np
import pytest

from softprune.evaluate.errors import EvaluationError
from softprune.evaluate.metrics import Accumulator, MetricSettings
from softprune.evaluate.plane import Plane, confident_conflict, decode_cells, encode_cells, quantile
from tests.unit.evaluations import Blocks, scored

SMALL = {"xbins": 7, "ybins": 5, "cc_quantile": 0.3, "sample_points": 25, "logp_min": -1.5}


def slow_bin(value: float, edges: list[float]) -> int:
    """[e_i, e_i+1), the last one closed; what lies outside falls into the outermost."""
    for i in range(len(edges) - 2, -1, -1):
        if value >= edges[i]:
            return i
    return 0


def slow_quantile(counts: list[int], edges: list[float], q: float) -> float:
    running = 0
    for i, count in enumerate(counts):
        running += count
        if running >= q * sum(counts):
            return edges[i + 1]
    raise AssertionError


def slow_cell(blocks: Blocks, settings: MetricSettings) -> dict[str, Any]:
    """All metrics, token by token."""
    low, high = (0.0, 1.0) if settings.prob_scale == "linear" else (settings.logp_min, settings.logp_max)
    x_edges, y_edges = np.linspace(low, high, settings.xbins + 1).tolist(), np.linspace(0, 1, settings.ybins + 1).tolist()
    counts = [[0] * settings.ybins for _ in range(settings.xbins)]
    nll, square, probability, height, kept = 0.0, 0.0, 0.0, 0.0, 0
    rng, samples = np.random.default_rng(settings.seed), []
    for log_p, entropy in blocks:
        for one, h in zip(log_p.tolist(), entropy.tolist(), strict=True):
            p = min(1.0, math.exp(one))
            h = min(1.0, max(0.0, h))
            x = min(high, max(low, p if settings.prob_scale == "linear" else math.log10(max(1e-12, p))))
            counts[slow_bin(x, x_edges)][slow_bin(h, y_edges)] += 1
            nll, square, probability, height, kept = nll - min(0.0, one), square + one * one, probability + p, height + h, kept + 1
            if len(samples) < settings.sample_points:
                samples.append([x, h])
            elif (drawn := int(rng.integers(0, kept))) < settings.sample_points:
                samples[drawn] = [x, h]
    hist_x, hist_h = [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]
    x_thr, h_thr = slow_quantile(hist_x, x_edges, settings.cc_quantile), slow_quantile(hist_h, y_edges, settings.cc_quantile)
    quadrants = dict.fromkeys(("LL", "LH", "HL", "HH"), 0)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            low_x, low_h = (x_edges[i] + x_edges[i + 1]) / 2 <= x_thr, (y_edges[j] + y_edges[j + 1]) / 2 <= h_thr
            quadrants[("L" if low_x else "H") + ("L" if low_h else "H")] += count
    p_of = (lambda x: x) if settings.prob_scale == "linear" else (lambda x: 10**x)
    found = {
        "ppl": math.exp(nll / kept), "mean_nll": nll / kept, "var_nll": square / kept - (nll / kept) ** 2, "kept_tokens": kept,
        "mean_prob": probability / kept, "mean_entropy": height / kept, "x_thr": x_thr, "p_thr": p_of(x_thr), "h_thr": h_thr,
        "cc_count": quadrants["LL"], "cc_rate": quadrants["LL"] / kept,
    }  # fmt: skip
    for name, q in (("05", 0.05), ("50", 0.5), ("95", 0.95)):
        found |= {f"p_q{name}": p_of(slow_quantile(hist_x, x_edges, q)), f"h_q{name}": slow_quantile(hist_h, y_edges, q)}
    flat = [count for row in counts for count in row]
    return {"numbers": found, "quadrants": quadrants, "counts": flat, "hist_x": hist_x, "hist_h": hist_h, "samples": samples}


def added(blocks: Blocks, settings: MetricSettings) -> dict[str, Any]:
    accumulator = Accumulator(settings)
    for log_p, entropy in blocks:
        accumulator.add_block(log_p, entropy)
    return accumulator.cell()


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_loop_over_tokens(scale: Literal["linear", "log"], seed: int) -> None:
    settings = MetricSettings(prob_scale=scale, seed=seed, **SMALL)  # type: ignore[arg-type]
    # On edges, on both ends, beyond the axis of log p, and a block without completion tokens.
    edges = np.log(np.maximum(1e-9, np.linspace(0, 1, settings.xbins + 1))).astype(np.float32)
    special = (edges, np.linspace(0, 1, len(edges)).astype(np.float32))
    empty = (np.zeros(0, np.float32), np.zeros(0, np.float32))
    blocks = [*scored(seed=seed, num_blocks=4), special, empty, *scored(seed=seed + 10, num_blocks=3)]
    cell, slow = added(blocks, settings), slow_cell(blocks, settings)
    for name, expected in slow["numbers"].items():
        assert cell[name] == pytest.approx(expected, rel=1e-12, abs=1e-12), name
    assert cell["quadrants"] == slow["quadrants"]
    assert cell["hist2d_x_H"]["counts"] == slow["counts"]
    assert (cell["hist1d_x"]["counts"], cell["hist1d_H"]["counts"]) == (slow["hist_x"], slow["hist_h"])
    assert sum(slow["counts"]) == cell["kept_tokens"] == sum(len(log_p) for log_p, _ in blocks)
    np.testing.assert_allclose(cell["samples"], slow["samples"], rtol=1e-12)
    own = cell["softprune"]["blocks"]
    assert own["tokens"] == [len(log_p) for log_p, _ in blocks]
    np.testing.assert_allclose(own["nll"], [-log_p.astype(np.float64).sum() for log_p, _ in blocks], rtol=1e-12)
    np.testing.assert_allclose(own["entropy"], [entropy.astype(np.float64).sum() for _, entropy in blocks], rtol=1e-12)
    cells = decode_cells(own["cells"], cell["kept_tokens"])
    assert np.bincount(cells, minlength=35).tolist() == slow["counts"]


def test_the_study_drops_what_lies_outside_and_we_count_it() -> None:
    settings = MetricSettings(prob_scale="log", logp_min=-2.0)
    cell = added([(np.array([-20.0, -0.1, 1e-6], np.float32), np.array([0.5, 1.0 + 1e-6, -1e-6], np.float32))], settings)
    assert cell["kept_tokens"] == 3
    assert cell["mean_nll"] == pytest.approx(20.1 / 3)
    assert cell["hist1d_x"]["counts"][0] == 1
    assert cell["hist1d_x"]["counts"][-1] == 1
    assert (cell["hist1d_H"]["counts"][0], cell["hist1d_H"]["counts"][-1]) == (1, 1)


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ([15, 85], 0.15, 0.5),  # reached exactly: the first bin
        ([14, 86], 0.15, 1.0),
        ([0, 0, 3, 0], 0.15, 0.75),
        ([0, 0, 0, 0], 0.5, 0.0),  # nothing at all: the first edge
        ([1, 1, 1, 1], 1.0, 1.0),
        ([100, 1], 0.01, 0.5),
    ],
)
def test_a_quantile_is_the_upper_edge_of_its_bin(counts: list[int], q: float, expected: float) -> None:
    assert quantile(np.array(counts), np.linspace(0, 1, len(counts) + 1), q) == expected


def test_quadrants_take_whole_bins() -> None:
    counts = np.array([[1, 2, 4], [8, 16, 32]])
    plane = Plane(2, 3)
    assert confident_conflict(counts, plane.low_bins(0.5, 1 / 3)) == {"LL": 1, "LH": 6, "HL": 8, "HH": 48}
    # A threshold inside a bin takes it from its middle on; one below the first middle takes none.
    assert confident_conflict(counts, plane.low_bins(0.75, 0.5))["LL"] == 27
    assert confident_conflict(counts, plane.low_bins(0.2, 0.5))["LL"] == 0


def test_samples_do_not_depend_on_how_the_stream_is_cut() -> None:
    log_p = np.concatenate([one for one, _ in scored(num_blocks=10)])
    entropy = np.concatenate([one for _, one in scored(num_blocks=10)])
    settings = MetricSettings(sample_points=40)
    whole = added([(log_p, entropy)], settings)["samples"]
    for sizes in (1, 7, 40, 41):
        parts = [(log_p[i : i + sizes], entropy[i : i + sizes]) for i in range(0, len(log_p), sizes)]
        assert added(parts, settings)["samples"] == whole
    assert added([(log_p, entropy)], MetricSettings(sample_points=40, seed=1))["samples"] != whole
    assert len(added([(log_p, entropy)], MetricSettings(sample_points=10**5))["samples"]) == len(log_p)
    assert added([(log_p, entropy)], MetricSettings(sample_points=0))["samples"] == []


@pytest.mark.parametrize(
    ("log_p", "entropy", "message"),
    [
        ([-1.0, math.nan], [0.1, 0.1], "block 0: log p of 1 of 2 tokens is not finite"),
        ([-math.inf, -1.0], [0.1, 0.1], "log p of 1 of 2 tokens is not finite"),
        ([-1.0, -1.0], [0.1, math.nan], "H of 1 of 2 tokens is not finite"),
        ([0.1, -1.0], [0.1, 0.1], "found log p from -1 to 0.1; expected -inf to 0"),
        ([-1.0, -1.0], [0.1, 1.5], "found H from 0.1 to 1.5; expected 0 to 1"),
        ([-1.0, -1.0], [-0.5, 0.1], "found H from -0.5"),
        ([-1.0], [0.1, 0.1], "expected one of each token"),
    ],
)
def test_no_number_is_made_up(log_p: list[float], entropy: list[float], message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        added([(np.array(log_p, np.float32), np.array(entropy, np.float32))], MetricSettings())
    assert message in str(caught.value)
    with pytest.raises(EvaluationError, match="no completion tokens"):
        added([(np.zeros(0, np.float32), np.zeros(0, np.float32))], MetricSettings())


def test_perplexity_is_cut() -> None:
    assert added([(np.full(3, -50, np.float32), np.zeros(3, np.float32))], MetricSettings())["ppl"] == math.exp(30)


@pytest.mark.parametrize(
    "wrong",
    [
        {"xbins": 300, "ybins": 300}, {"xbins": 0}, {"prob_scale": "root"}, {"logp_min": 0.0}, {"cc_quantile": 0.0}, {"entropy_topk": 1},
        {"sample_points": -1},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="found"):
        MetricSettings(**wrong)


def test_cells_as_text() -> None:
    cells = np.array([0, 1, 19_199, 65_535], np.uint16)
    text = encode_cells(cells)
    assert decode_cells(text, 4).tolist() == cells.tolist()
    for wrong in (3, 5):
        with pytest.raises(ValueError, match="cells"):
            decode_cells(text, wrong)
    with pytest.raises(ValueError, match="no base64"):
        decode_cells("%%%", 4)
    with pytest.raises(ValueError, match="no base64"):
        decode_cells(base64.b64encode(b"not zlib").decode(), 4)
    bomb = base64.b64encode(zlib.compress(bytes(10**7))).decode()
    with pytest.raises(ValueError, match="more than 4 cells"):
        decode_cells(bomb, 4)


def test_the_coarse_plane_adds_4_by_4_bins() -> None:
    plane = Plane()
    fine = np.random.default_rng(0).integers(0, 9, (160, 120))
    coarse = np.bincount(plane.coarse(np.arange(160 * 120)), fine.reshape(-1)).reshape(40, 30)
    assert (coarse == fine.reshape(40, 4, 30, 4).sum((1, 3))).all()
    assert Plane(5, 5).coarse(np.array([0, 4, 20, 24])).tolist() == [0, 1, 2, 3]
