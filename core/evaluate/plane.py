"""The plane that tokens lie on: x, from the probability of the reference token, by H, the entropy of the top tokens.

x is p itself, or log10 p; both axes have equal bins, and values outside fall into the outermost ones (spec/metrics.md 1.5, and 1.4:
dropping them, as the study does, biases every mean).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softprune.stats.grid import bin_of

Scale = Literal["linear", "log"]
MIN_PROB = 1e-12
"""Smallest p whose logarithm is taken."""
COARSE = 4
"""Bins a side that one bin of the coarser plane is made of: 160 x 120 becomes 40 x 30."""


@dataclass(frozen=True)
class Plane:
    """The axes.

    Attributes:
        xbins, ybins: bins of x and of H; at most 65,536 cells.
        scale: x is p ("linear", from 0 to 1) or log10 p ("log", from `logp_min` to `logp_max`).
        logp_min, logp_max: of log10 p.
    """

    xbins: int = 160
    ybins: int = 120
    scale: Scale = "linear"
    logp_min: float = -12.0
    logp_max: float = 0.0

    @property
    def x_range(self) -> tuple[float, float]:
        """First and last edge of x."""
        return (0.0, 1.0) if self.scale == "linear" else (self.logp_min, self.logp_max)

    @property
    def x_edges(self) -> NDArray[np.float64]:
        """[xbins + 1]."""
        return np.linspace(*self.x_range, self.xbins + 1)

    @property
    def y_edges(self) -> NDArray[np.float64]:
        """[ybins + 1]."""
        return np.linspace(0.0, 1.0, self.ybins + 1)

    def x_of(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """x of probabilities, moved to the plane's border where they lie outside."""
        x = p if self.scale == "linear" else np.log10(np.maximum(MIN_PROB, p))
        return np.clip(x, *self.x_range)

    def p_of(self, x: float) -> float:
        """The probability at x."""
        return x if self.scale == "linear" else float(10.0**x)

    def cells_of(self, x: NDArray[np.float64], entropy: NDArray[np.float64]) -> NDArray[np.uint16]:
        """Flat cell index ix * ybins + iy of each token.

        Args:
            x: [n], from `x_of`.
            entropy: [n], in [0, 1].
        """
        return (bin_of(x, self.x_edges) * self.ybins + bin_of(entropy, self.y_edges)).astype(np.uint16)

    def low_bins(self, x_threshold: float, h_threshold: float) -> tuple[int, int]:
        """Last bins of x and of H that are low: those whose middle does not lie above the threshold."""
        found = [
            int(np.searchsorted((edges[:-1] + edges[1:]) / 2, threshold, "right")) - 1
            for edges, threshold in ((self.x_edges, x_threshold), (self.y_edges, h_threshold))
        ]
        return found[0], found[1]

    def coarse(self, cells: NDArray[np.integer[Any]], by: int = COARSE) -> NDArray[np.int64]:
        """Flat index of the cells' places on the plane of `by` times fewer bins a side."""
        ix, iy = np.divmod(np.asarray(cells, np.int64), self.ybins)
        return np.asarray(ix // by * -(-self.ybins // by) + iy // by, np.int64)


def quantile_bin(counts: NDArray[np.int64] | NDArray[np.float64], q: float) -> NDArray[np.int64]:
    """Index of the first bin where the cumulative count reaches q of the total (spec/metrics.md 1.6).

    Args:
        counts: [..., bins]; one histogram, or several.
        q: share of the tokens, in (0, 1].
    """
    cumulative = np.cumsum(counts, -1)
    return np.asarray((cumulative >= q * cumulative[..., -1:]).argmax(-1), np.int64)


def quantile(counts: NDArray[np.int64], edges: NDArray[np.float64], q: float) -> float:
    """Upper edge of `quantile_bin`, without interpolation; the first edge of an empty histogram."""
    return float(edges[int(quantile_bin(counts, q)) + 1] if counts.any() else edges[0])


def confident_conflict(counts: NDArray[np.int64], bins: tuple[int, int]) -> dict[str, int]:
    """Tokens in the four quadrants of two thresholds.

    Args:
        counts: [xbins, ybins].
        bins: from `Plane.low_bins`.

    Returns:
        LL, LH, HL and HH: first p, then H, Low or High; LL are the confident conflicts.
    """
    x, height = bins[0] + 1, bins[1] + 1
    parts = {"LL": counts[:x, :height], "LH": counts[:x, height:], "HL": counts[x:, :height], "HH": counts[x:, height:]}
    return {name: int(part.sum()) for name, part in parts.items()}


def encode_cells(cells: NDArray[np.uint16]) -> str:
    """Cell indices as an evaluation file holds them: base64 of zlib of little-endian uint16."""
    return base64.b64encode(zlib.compress(cells.astype("<u2").tobytes(), 9)).decode("ascii")


def decode_cells(text: str, number: int) -> NDArray[np.uint16]:
    """The reverse of `encode_cells`.

    Args:
        text: from a file.
        number: tokens that it has to hold; no more memory than they take is used.

    Raises:
        ValueError: it holds something else.
    """
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), 2 * number + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"no base64 of zlib ({error})") from None
    if len(data) != 2 * number or unpacker.unconsumed_tail:
        raise ValueError(f"{'more' if len(data) > 2 * number else 'fewer'} than {number} cells")
    return np.frombuffer(data, "<u2").astype(np.uint16)
