"""The tensors of a statistics file: names, dtypes, axes, and what their values must obey.

DESIGN names `router.count` [P, L, E]; here it, the gates and the confidence have a phase axis too, since prefill and decode are told
apart, and the EAFT grid has a kind axis, since p of a given token and p of a drawn one are never added to each other.

Sums of floats are whole multiples of a power of two (`TensorSpec.quantum`), so float64 adds them without rounding, and in any
order to the same bits, while a sum is below 2**53 of them: pre-rounding, as in Demmel and Nguyen, "Fast Reproducible
Floating-Point Summation" (2013). Sums beyond that are right to the last place of a float64, but no longer to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.stats.errors import StatisticsError
from softprune.stats.header import KINDS, PHASES, Header

PLANE_BINS = (160, 120)
"""Bins of p and of H in `eaft.hist` (spec/metrics.md 1.5)."""
MAX_COUNT = 2**53
"""Largest count that is read: up to here a float64 holds it, and a thousand such do not overflow an int64."""
FINE, COARSE = 2.0**-24, 2.0**-20
"""Quanta: of sums of gates, probabilities and nats, exact to 5e8; and of norms, exact to 8e9."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor.

    Attributes:
        name: in the file.
        mode: the mode, or "shadow", that it belongs to.
        axes: names of its axes; sizes follow from the header.
        quantum: of a float64 sum; None for int64 counts.
        counted_by: the count of the same shape whose zeros must be zeros here.
    """

    name: str
    mode: str
    axes: tuple[str, ...]
    quantum: float | None = None
    counted_by: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """int64 for counts, float64 for sums."""
        return np.dtype(np.int64 if self.quantum is None else np.float64)


_ROUTED = ("tag", "phase", "layer", "expert")
_EXPERT = ("tag", "layer", "expert")
_TOKEN = ("tag", "kind")
_GRID = ("tag", "kind", "layer", "expert", "log10_p", "entropy")

SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("router.count", "router", _ROUTED),
        TensorSpec("router.gate_sum", "router", _ROUTED, FINE, "router.count"),
        TensorSpec("router.confidence", "router", ("tag", "phase", "layer", "confidence")),
        # Tokens that chose both i and j, for i < j; zero below the diagonal, and the diagonal is router.count of both phases.
        TensorSpec("router.coactivation", "router", ("tag", "layer", "expert", "expert")),
        TensorSpec("router.shadow_count", "shadow", _EXPERT),
        # Tokens of REAP are sampled, so it has its own count.
        TensorSpec("reap.count", "reap", _EXPERT),
        TensorSpec("reap.norm_sum", "reap", _EXPERT, COARSE, "reap.count"),
        TensorSpec("reap.gate_norm_sum", "reap", _EXPERT, COARSE, "reap.count"),
        TensorSpec("eaft.hist", "eaft", ("tag", "kind", "plane_p", "plane_entropy")),
        TensorSpec("eaft.nll_sum", "eaft", _TOKEN, FINE),
        TensorSpec("eaft.nll_square_sum", "eaft", _TOKEN, COARSE),
        TensorSpec("eaft.p_sum", "eaft", _TOKEN, FINE),
        TensorSpec("eaft.entropy_sum", "eaft", _TOKEN, FINE),
        TensorSpec("eaft.entropy_top_sum", "eaft", _TOKEN, FINE),
        TensorSpec("eaft.grid_count", "eaft", _GRID),
        TensorSpec("eaft.grid_gate_norm", "eaft", _GRID, COARSE, "eaft.grid_count"),
    )
}


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file with this header has."""
    grid = header.eaft.grid if header.eaft else None
    sizes = {
        "tag": len(header.tags), "phase": len(PHASES), "kind": len(KINDS),
        "layer": header.model.num_layers, "expert": header.model.num_experts, "confidence": header.confidence_bins or 0,
        "plane_p": PLANE_BINS[0], "plane_entropy": PLANE_BINS[1],
        "log10_p": len(grid.log10_p) - 1 if grid else 0, "entropy": len(grid.entropy) - 1 if grid else 0,
    }  # fmt: skip
    present = {*header.modes, *(["shadow"] if "shadow" in header.sampling else [])}
    return {name: tuple(sizes[axis] for axis in spec.axes) for name, spec in SPECS.items() if spec.mode in present}


def rounded(spec: TensorSpec, values: NDArray[Any]) -> NDArray[Any]:
    """Values in the tensor's dtype; sums rounded to the nearest multiple of its quantum."""
    if spec.quantum is None:
        return values.astype(np.int64)
    scaled = values.astype(np.float64) / spec.quantum
    # Adding 0.0 turns -0.0 into 0.0, whose bits differ.
    return np.asarray(np.rint(scaled) * spec.quantum + 0.0, np.float64)


def check_names(found: Mapping[str, object], header: Header, source: str, subset: bool = False) -> None:
    """Refuse tensors that the header does not call for, or that are missing (unless `subset`).

    Raises:
        StatisticsError: names the tensor.
    """
    expected = shapes(header)
    for name in sorted(found):
        if name not in expected:
            raise StatisticsError(source, name, "a tensor that the header does not call for", f"the tensors of {', '.join(header.modes)}")
    for name in expected:
        if name not in found and not subset:
            raise StatisticsError(source, name, "no such tensor", "it, since the header says that its mode was collected")


def check_form(name: str, dtype: object, shape: tuple[int, ...], header: Header, source: str) -> None:
    """Refuse a tensor of another dtype or shape.

    Raises:
        StatisticsError: names the tensor.
    """
    spec, expected = SPECS[name], shapes(header)[name]
    if dtype != spec.dtype:
        raise StatisticsError(source, name, f"dtype {dtype}", str(spec.dtype))
    if shape != expected:
        axes = ", ".join(f"{axis} {size}" for axis, size in zip(spec.axes, expected, strict=True))
        raise StatisticsError(source, name, f"shape {list(shape)}", f"{list(expected)} ({axes})")


def check_values(tensors: Mapping[str, NDArray[Any]], source: str) -> None:
    """Refuse values that no collection gives; of those tensors that are there, in the right dtype and shape.

    Raises:
        StatisticsError: a negative or absurd count, a sum that is negative, not finite or not a multiple of its quantum, a sum without
            a count, a co-activation below the diagonal or whose diagonal is not the count.
    """
    for name, values in tensors.items():
        spec = SPECS[name]
        if spec.quantum is None:
            # Read as unsigned, a negative count is above 2**63: one pass finds both.
            if np.ascontiguousarray(values).view(np.uint64).max(initial=0) > MAX_COUNT:
                bad = values[(values < 0) | (values > MAX_COUNT)][0]
                raise StatisticsError(source, name, f"a count of {bad}", "counts from 0 to 2^53")
            continue
        if not np.isfinite(values).all():
            raise StatisticsError(source, name, f"{values[~np.isfinite(values)][0]}", "finite sums")
        if values.min(initial=0.0) < 0:
            raise StatisticsError(source, name, f"a sum of {values.min()}", "sums from 0 on")
        scaled = values / spec.quantum
        if not np.array_equal(np.rint(scaled), scaled):
            raise StatisticsError(
                source, name, repr(float(values[np.rint(scaled) != scaled][0])), f"multiples of 2^{np.log2(spec.quantum):.0f}"
            )
        count = None if spec.counted_by is None else tensors.get(spec.counted_by)
        if count is not None and np.any(values[count == 0]):
            raise StatisticsError(source, name, "a sum where nothing was counted", f"0 wherever {spec.counted_by} is 0")
    if "router.coactivation" in tensors:
        _check_coactivation(tensors["router.coactivation"], tensors.get("router.count"), source)


def _check_coactivation(pairs: NDArray[Any], count: NDArray[Any] | None, source: str) -> None:
    name = "router.coactivation"
    if np.tril(pairs.max((0, 1), initial=0), -1).any():
        raise StatisticsError(source, name, "a pair (i, j) with i > j", "pairs with i < j, and the experts' counts on the diagonal")
    if count is not None and not np.array_equal(np.diagonal(pairs, axis1=-2, axis2=-1), count.sum(1)):
        raise StatisticsError(source, name, "a diagonal that differs from router.count", "router.count, both phases added")
