"""Sums of the modes `reap` and `eaft`, on the host: sampled rows and scored tokens, as they arrive from the device.

Some hundred rows at a time are added, two milliseconds for 192 rows of the 20B shape (`softprune.runtime.arrivals`); sums are multiples of
the file's quanta from the first addend on, so they are the same in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.runtime.expert_norms import Routed
from softprune.runtime.token_scores import ENTROPY, ENTROPY_TOP, LOG_P
from softprune.stats.grid import DEFAULT_GRID, bin_of
from softprune.stats.header import KINDS, Eaft, Plane
from softprune.stats.layout import COARSE, FINE, PLANE_BINS

PLANE = Plane()
GRID = DEFAULT_GRID

_Ints = NDArray[np.integer[Any]]


class SampledSums:
    """Sums under one mask.

    Args:
        num_tags, num_layers, num_experts: sizes of the axes.
        eaft: also have the sums of `eaft`.
    """

    def __init__(self, num_tags: int, num_layers: int, num_experts: int, eaft: bool) -> None:
        routed, token = (num_tags, num_layers, num_experts), (num_tags, len(KINDS))
        grid = (*token, num_layers, num_experts, len(GRID.log10_p) - 1, len(GRID.entropy) - 1)
        counts: dict[str, tuple[int, ...]] = {"reap.count": routed}
        sums: dict[str, tuple[int, ...]] = {"reap.norm_sum": routed, "reap.gate_norm_sum": routed}
        self._shadow = np.zeros(routed, np.int64)
        if eaft:
            counts |= {"eaft.hist": (*token, *PLANE_BINS), "eaft.grid_count": grid}
            sums |= {f"eaft.{name}": token for name in ("nll_sum", "nll_square_sum", "p_sum", "entropy_sum", "entropy_top_sum")}
            sums["eaft.grid_gate_norm"] = grid
        # Memory is taken up where something is added.
        self._tensors: dict[str, NDArray[Any]] = {
            **{name: np.zeros(shape, np.int64) for name, shape in counts.items()},
            **{name: np.zeros(shape, np.float64) for name, shape in sums.items()},
        }

    def tensors(self, num_tags: int, reap: bool, shadow: bool) -> dict[str, NDArray[Any]]:
        """By name in the file, of the first `num_tags` tags: without those of `reap`, where only shadow counts were collected."""
        named = {**(self._tensors if reap else {}), **({"router.shadow_count": self._shadow} if shadow else {})}
        return {name: values[:num_tags] for name, values in named.items()}

    def add_tokens(self, tags: _Ints, kinds: _Ints, scores: NDArray[np.float32]) -> int:
        """Add tokens to the plane and its sums; returns how many of them had no finite scores and were left out.

        Args:
            tags, kinds: [n]; tokens with tag -1 are not meant to count.
            scores: [n, 3]; see `token_scores`.
        """
        meant = tags >= 0
        counted = meant & np.isfinite(scores).all(-1)
        tags, kinds, scores = tags[counted], kinds[counted], scores[counted]
        log_p = np.minimum(scores[:, LOG_P].astype(np.float64), 0.0)
        p, entropy = np.exp(log_p), np.maximum(scores[:, ENTROPY].astype(np.float64), 0.0)
        top = np.clip(scores[:, ENTROPY_TOP].astype(np.float64), 0.0, 1.0)
        np.add.at(self._tensors["eaft.hist"], (tags, kinds, bin_of(p, _PLANE_P), bin_of(top, _PLANE_ENTROPY)), 1)
        for name, values, quantum in (
            ("nll_sum", -log_p, FINE), ("nll_square_sum", log_p**2, COARSE), ("p_sum", p, FINE), ("entropy_sum", entropy, FINE),
            ("entropy_top_sum", top, FINE),
        ):  # fmt: skip
            np.add.at(self._tensors[f"eaft.{name}"], (tags, kinds), _rounded(values, quantum))
        return int(meant.sum() - counted.sum())

    def add_rows(self, routed: Routed, tags: _Ints, kinds: _Ints, scores: NDArray[np.float32]) -> int:
        """Add sampled rows of all layers; returns how many of them had no finite norms and were left out.

        Args:
            routed: on the host, [num_layers, n, top_k].
            tags: [n]; rows with tag -1 are left out.
            kinds, scores: [n] and [n, 3], of the token that the row is counted with; rows without finite scores are counted by `reap` only.
        """
        meant = tags >= 0
        layers = np.arange(routed.ids.shape[0])[:, None, None]
        if routed.shadow is not None:
            _add((self._shadow,), (tags[meant][None, :, None], layers, routed.shadow.numpy()[:, meant]), (1,))
        if routed.norms is None:
            return 0
        finite = np.isfinite(routed.norms.numpy()).all((0, 2))
        lost = int((meant & ~finite).sum())
        meant &= finite
        ids, gates, norms = (tensor.numpy()[:, meant] for tensor in (routed.ids, routed.gates, routed.norms))
        tags, kinds, scores = tags[meant], kinds[meant], scores[meant]
        gate_norms = _rounded(gates.astype(np.float64) * norms, COARSE)
        of_norms = [self._tensors[f"reap.{name}"] for name in ("count", "norm_sum", "gate_norm_sum")]
        _add(of_norms, (tags[None, :, None], layers, ids), (1, _rounded(norms.astype(np.float64), COARSE), gate_norms))
        known = np.isfinite(scores).all(-1)
        if "eaft.grid_count" in self._tensors and known.any():
            p = bin_of(scores[known, LOG_P].astype(np.float64) / np.log(10.0), GRID.log10_p)
            entropy = bin_of(scores[known, ENTROPY_TOP].astype(np.float64), GRID.entropy)
            of_token = (of_rows[known][None, :, None] for of_rows in (tags, kinds))
            cell = (*of_token, layers, ids[:, known], p[None, :, None], entropy[None, :, None])
            _add([self._tensors[f"eaft.grid_{name}"] for name in ("count", "gate_norm")], cell, (1, gate_norms[:, known]))
        return lost


def eaft_header(attribution: Any) -> Eaft:
    """How this process collects `eaft`, for a file's header."""
    return Eaft(attribution=attribution, plane=PLANE, grid=GRID)


_PLANE_P = np.linspace(PLANE.p_min, PLANE.p_max, PLANE_BINS[0] + 1)
_PLANE_ENTROPY = np.linspace(PLANE.entropy_min, PLANE.entropy_max, PLANE_BINS[1] + 1)


def _add(to: Sequence[NDArray[Any]], at: tuple[NDArray[Any], ...], values: Sequence[Any]) -> None:
    """Add values at the same places of arrays of one shape; by one index, which takes NumPy a fraction of the time that several take."""
    places = np.ravel_multi_index(tuple(np.broadcast_arrays(*at)), to[0].shape).ravel()
    for sums, added in zip(to, values, strict=True):
        np.add.at(sums.reshape(-1), places, added if np.isscalar(added) else added.ravel())


def _rounded(values: NDArray[np.float64], quantum: float) -> NDArray[np.float64]:
    return np.rint(values / quantum) * quantum
