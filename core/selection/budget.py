"""How many experts stay in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softprune.errors import MaskError
from softprune.stats.figures import effective_number

Rounding = Literal["ceil", "floor", "round"]
_MODES = {"ceil": ROUND_CEILING, "floor": ROUND_FLOOR, "round": ROUND_HALF_EVEN}
BACKEND_MULTIPLES = {"flashinfer_mxfp4": 4}
"""Number that the kept experts have to be a multiple of, by MoE backend; 1 for all others. Said by the study of SGLang's MXFP4 routing
(spec/metrics.md 5.1), not proven by us."""


@dataclass(frozen=True)
class Budget:
    """How many experts stay, as a user says it: exactly one of the first three.

    Attributes:
        keep: in each layer.
        keep_frac: share of them; a decimal number as written, so that 0.6 of 35 is 21 and not a hair more.
        compression_ratio: share that goes, as in REAP: int(num_experts * ratio) are removed (spec/metrics.md 4).
        rounding: of keep_frac.
        multiple: keep_frac and compression_ratio are rounded up to a multiple of this (down, where there are not as many experts);
            `keep` has to be one.
        by_layer: "uniform", or "neff": the same total, but more for layers that spread their mass over more experts.
        minimum, maximum: in any layer, for "neff".
    """

    keep: int | None = None
    keep_frac: float | str | None = None
    compression_ratio: float | str | None = None
    rounding: Rounding = "ceil"
    multiple: int = 1
    by_layer: Literal["uniform", "neff"] = "uniform"
    minimum: int | None = None
    maximum: int | None = None

    def uniform(self, num_experts: int) -> int:
        """The number that stays in each layer if all keep the same.

        Raises:
            MaskError: not exactly one number given, or one that no layer can keep.
        """
        given = {
            name: value
            for name, value in (("keep", self.keep), ("keep_frac", self.keep_frac), ("compression_ratio", self.compression_ratio))
            if value is not None
        }
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise MaskError("budget", "", found, "exactly one of keep, keep_frac and compression_ratio")
        if not 1 <= self.multiple <= num_experts:
            raise MaskError("budget", "multiple", str(self.multiple), f"from 1 to the model's {num_experts} experts")
        number = self.keep if self.keep is not None else self._of_share(*next(iter(given.items())), num_experts)
        if not 1 <= number <= num_experts:
            raise MaskError("budget", *next((name, str(value)) for name, value in given.items()), f"1 to {num_experts} experts kept")
        if self.keep is not None and number % self.multiple:
            raise MaskError("budget", "keep", str(number), f"a multiple of {self.multiple}")
        return number

    def _of_share(self, name: str, value: Any, num_experts: int) -> int:
        share = _decimal(name, value)
        if name == "compression_ratio":
            number = num_experts - int(share * num_experts)
        else:
            number = int((share * num_experts).to_integral_value(_MODES[self.rounding]))
        highest = num_experts // self.multiple * self.multiple
        return min(-(-number // self.multiple) * self.multiple, highest)

    def of_layers(self, masses: NDArray[np.float64]) -> tuple[list[int], dict[str, Any]]:
        """The number that stays in each layer, and what it was made of.

        Args:
            masses: non-negative [num_layers, num_experts].

        Raises:
            MaskError: as `uniform`, or limits that no numbers meet.
        """
        num_layers, num_experts = masses.shape
        uniform = self.uniform(num_experts)
        if self.by_layer == "uniform":
            if self.minimum is not None or self.maximum is not None:
                raise MaskError(
                    "budget", "minimum, maximum", f"{self.minimum}, {self.maximum}", "none, where all layers keep the same number"
                )
            return [uniform] * num_layers, {"by_layer": "uniform", "keep": uniform}
        if self.multiple != 1:
            raise MaskError("budget", "multiple", str(self.multiple), "1 where layers keep different numbers")
        low, high = 1 if self.minimum is None else self.minimum, num_experts if self.maximum is None else self.maximum
        if not 1 <= low <= high <= num_experts:
            raise MaskError("budget", "minimum, maximum", f"{low}, {high}", f"1 <= minimum <= maximum <= {num_experts}")
        neff = effective_number(masses)
        total = uniform * num_layers if self.keep_frac is None else round(_decimal("keep_frac", self.keep_frac) * num_layers * num_experts)
        if not low * num_layers <= total <= high * num_layers:
            found = f"{low}, {high}, which {total} experts in {num_layers} layers cannot meet"
            raise MaskError(
                "budget", "minimum, maximum", found, f"minimum at most {total // num_layers}, maximum at least {-(-total // num_layers)}"
            )
        counts = spread(neff.tolist(), total, low, high)
        return counts, {"by_layer": "neff", "neff": [round(float(n), 4) for n in neff], "keep": counts}


def spread(neff: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """Share a total among layers by their effective number of experts (spec/metrics.md 3.5, `_budgeted_keep_counts`).

    The total is cut to what `low` and `high` allow; shares are rounded and cut; then single experts are given to the layers with the
    largest effective number first, or taken from those with the smallest first, cyclically, until the sum is right.
    """
    total = min(max(total, low * len(neff)), high * len(neff))
    floored = [max(value, 1e-6) for value in neff]
    mean = sum(floored) / len(floored)
    counts = [min(max(round(total / len(floored) * value / mean), low), high) for value in floored]
    order = sorted(range(len(floored)), key=lambda layer: (-floored[layer], layer))
    while missing := total - sum(counts):
        step = 1 if missing > 0 else -1
        # The total lies between the limits, so that some layer can always take the step.
        movable = [layer for layer in order[::step] if low <= counts[layer] + step <= high]
        for layer in movable[: abs(missing)]:
            counts[layer] += step
    return counts


def _decimal(name: str, value: float | str) -> Decimal:
    """The decimal number that was written: of a float, its shortest form."""
    try:
        share = Decimal(str(value))
    except ArithmeticError:
        share = Decimal(-1)
    ends = {"keep_frac": 1, "compression_ratio": 0}
    if not (share.is_finite() and (0 < share < 1 or share == ends[name])):
        raise MaskError("budget", name, str(value), "a share between 0 and 1")
    return share
