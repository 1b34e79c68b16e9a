"""The roofline column of a comparison: which checkpoint, which routing and which bandwidth each side is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.bench import roofline
from softprune.bench.bandwidth import Bandwidth, given, measured
from softprune.bench.prompts import Workload
from softprune.mask import ExpertMask
from softprune.stats.file import Statistics


@dataclass
class StepLimits:
    """What the sides' steps are held against.

    Attributes:
        models: checkpoint folder of each side, "a" and "b".
        statistics: how often experts were chosen, for sides without a route probe; None for uniform routing.
        gb_s: the memory's bandwidth in 10^9 bytes per second, read and written; None to measure it.
    """

    models: Mapping[str, Path]
    statistics: Statistics | None = None
    gb_s: float | None = None
    _bandwidth: Bandwidth | None = field(default=None, init=False)
    _sizes: dict[tuple[str, str | None], roofline.StepSizes] = field(default_factory=dict, init=False)

    def find_bandwidth(self, gpu: str | None, local: bool) -> Bandwidth:
        """As given, or measured; see `bandwidth.measured`."""
        self._bandwidth = given(self.gb_s) if self.gb_s is not None else measured(gpu, local)
        return self._bandwidth

    def of(
        self, name: str, facts: Mapping[str, Any], mask: ExpertMask | None, probe: NDArray[np.int64] | None, batch: int, workload: Workload
    ) -> dict[str, Any]:
        """One side's limit: {"tok_s", "bytes", "distinct_experts", "routing", "assumptions"}.

        Args:
            name: "a" or "b".
            facts: what the server says of itself.
            mask: in force, if it is known.
            probe: selections that were counted while it was measured.
            batch, workload: what was sent.
        """
        assert self._bandwidth is not None
        kv_dtype = facts["server_flags"].get("kv_cache_dtype")
        if (name, kv_dtype) not in self._sizes:
            self._sizes[name, kv_dtype] = roofline.step_sizes(self.models[name], kv_dtype)
        sizes = self._sizes[name, kv_dtype]
        chosen, routing, assumed = self._chosen(sizes, facts.get("softprune") or {}, mask, probe)
        lengths = (workload.prompt_tokens, workload.max_new_tokens)
        assumptions = ["weights are read as the checkpoint stores them", "tokens of a batch choose experts independently", *assumed]
        limit = roofline.limit(sizes, chosen, batch, lengths, self._bandwidth.gb_s)
        return {**limit, "routing": routing, "assumptions": assumptions}

    def _chosen(
        self, sizes: roofline.StepSizes, served: Mapping[str, Any], mask: ExpertMask | None, probe: NDArray[np.int64] | None
    ) -> tuple[roofline.Chosen, str, list[str]]:
        spec = sizes.spec
        top_k = int(served.get("top_k") or spec.top_k)
        if probe is not None:
            roofline.check_shape(probe, spec, "route probe")
            return roofline.counted(probe, top_k, "route probe"), "probe", ["prompts' tokens were counted with the answers'"]
        if self.statistics is not None:
            counts = roofline.decode_counts(self.statistics)
            roofline.check_shape(counts, spec, self.statistics.source)
            pruned = None if mask is None else [mask.pruned(layer) for layer in range(spec.num_layers)]
            assumed = [f"statistics of {sum(one.routed for one in self.statistics.header.tokens.values())} tokens of other prompts"]
            if pruned is not None and self.statistics.header.mask != getattr(mask, "hash", None):
                assumed.append("counted under another mask: experts that are kept take over in proportion")
            return roofline.counted(counts, top_k, self.statistics.source, pruned), "statistics", assumed
        kept = (served.get("num_kept") if mask is None else mask.num_kept) or [spec.num_experts] * spec.num_layers
        return roofline.uniform(kept, top_k, spec.num_experts), "uniform", ["every kept expert is as likely as any other"]
