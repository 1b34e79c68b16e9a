"""`eaft_reap`: gate times output norm, each token weighted by how well and how surely it was predicted (spec/metrics.md 3.1).

The study took two passes, since its thresholds are quantiles of all tokens; the grid keeps the sums by (p, H), so that regions,
quantiles and weights are chosen here, without a GPU. Which position's activations a token's p and H were counted with
(`attribution`) was decided when the statistics were collected, and is only reported.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from softprune.ranking.columns import TENSORS, columns
from softprune.ranking.criterion import PARAMETERS, FromStatistics, Scored, Source
from softprune.ranking.eaft_regions import REGIONS, Axis, shares
from softprune.ranking.errors import RankError
from softprune.ranking.tags import TagWeights, by_tag, combine
from softprune.stats.file import Statistics
from softprune.stats.header import KINDS, Mode

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, config=PARAMETERS)
class EaftReap(FromStatistics):
    """The defaults are the study's.

    Attributes:
        rule: "code" or "policy", see `softprune.ranking.eaft_regions`.
        form: "sum", which the study's fixed version ranks by, or "mean" over the tokens that chose the expert.
        kind: p of given tokens, or of tokens that the model drew.
        cc_quantile: p_lo and h_lo are the values below which this share of the tokens lies.
        uncertain_quantile: so for h_hi.
        p_lo, h_lo, h_hi: instead of the quantiles.
        w_good, w_uncertain, w_conflict: weights.
    """

    about: ClassVar[str] = "gate x output norm, summed with weights by probability and entropy (EAFT-REAP)"
    mode: ClassVar[Mode] = "eaft"
    rule: Literal["code", "policy"] = "code"
    form: Literal["sum", "mean"] = "sum"
    kind: Literal["teacher_forced", "sampled"] = "teacher_forced"
    cc_quantile: Share = 0.15
    uncertain_quantile: Share = 0.85
    p_lo: Share | None = None
    h_lo: float | None = None
    h_hi: float | None = None
    w_good: float = 1.0
    w_uncertain: float = 0.25
    w_conflict: float = -2.0

    def tensors(self) -> tuple[str, ...]:
        return (*TENSORS, "eaft.grid_count", "eaft.grid_gate_norm")

    def score(self, source: Source) -> Scored:
        statistics = self.statistics(source)
        count, mass = (statistics[f"eaft.grid_{name}"][:, KINDS.index(self.kind)] for name in ("count", "gate_norm"))
        share, found = self._regions(statistics, source.tags, count)
        weights = dict(zip(REGIONS, (self.w_good, self.w_uncertain, self.w_conflict), strict=True))
        weight = sum(weights[name] * cells for name, cells in share.items())
        signed, chosen = _over_cells(mass, np.asarray(weight)), count.sum((-2, -1))
        denominator = chosen if self.form == "mean" else None
        plain = TagWeights(source.tags.weights)
        extra = {"eaft_saliency_mean": combine(plain, statistics, signed, chosen)}
        for name, sign in (("pos", 1), ("neg", -1)):
            part = np.asarray(sum(cells for region, cells in share.items() if np.sign(weights[region]) == sign) + np.zeros_like(weight))
            extra[f"{name}_count"] = combine(plain, statistics, _over_cells(count, part))
            extra[f"{name}_gate_norm_sum"] = combine(plain, statistics, _over_cells(mass, part))
        return Scored(
            combine(source.tags, statistics, signed, denominator),
            "eaft_gate_norm_sum" if self.form == "sum" else "eaft_saliency_mean",
            f"{self.form.capitalize()} over the tokens that chose the expert of w * g(x) * ||f(x)||_2, w by the token's region "
            f"(rule {self.rule!r}): {', '.join(f'{name} {value:g}' for name, value in weights.items())}.",
            by_tag(source.tags, statistics, signed, denominator), {**columns(statistics, source.tags), **extra}, found,
        )  # fmt: skip

    def _regions(
        self, statistics: Statistics, tags: TagWeights, count: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
        """Share of each cell in each region, and thresholds and numbers of tokens."""
        assert statistics.header.eaft is not None
        eaft, top_k = statistics.header.eaft, statistics.header.epochs[0].top_k[0]
        # Every layer saw the same tokens, top_k experts each; tags weigh as if their tokens had been given that often.
        tokens = np.einsum("p,pexy->xy", tags.of(statistics), count[:, 0].astype(np.float64)) / top_k
        if not tokens.any():
            other = next(kind for kind in KINDS if kind != self.kind)
            expected = f"some, to rank by, or kind={other}"
            raise RankError(statistics.source, "eaft.grid_count", f"no {self.kind} tokens in the tags that count", expected)
        p = Axis(np.array(eaft.grid.log10_p), tokens.sum(1))
        h = Axis(np.array(eaft.grid.entropy), tokens.sum(0))
        q_p = self.cc_quantile if self.p_lo is None else p.quantile(float(np.log10(self.p_lo)))
        q_low = self.cc_quantile if self.h_lo is None else h.quantile(self.h_lo)
        q_high = self.uncertain_quantile if self.h_hi is None else h.quantile(self.h_hi)
        share = shares(self.rule, p.below(q_p), h.below(q_low), 1 - h.below(q_high))
        return share, {
            "p_lo": 10 ** p.threshold(q_p) if self.p_lo is None else self.p_lo,
            "h_lo": h.threshold(q_low) if self.h_lo is None else self.h_lo,
            "h_hi": h.threshold(q_high) if self.h_hi is None else self.h_hi,
            "region_counts": {name: round(float((tokens * cells).sum())) for name, cells in share.items()},
            "samples": round(float(tokens.sum())),
            "attribution": eaft.attribution,
            "entropy": eaft.grid.entropy_form,
            "grid": [len(eaft.grid.log10_p) - 1, len(eaft.grid.entropy) - 1],
        }


def _over_cells(cells: NDArray[Any], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """[num_tags, num_layers, num_experts] from [..., X, Y] and [X, Y]."""
    return np.asarray(np.einsum("plexy,xy->ple", cells, weight), np.float64)
