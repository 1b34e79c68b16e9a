"""Statistics as an engine would have collected them: random routing of random tokens, added up one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.mask import MaskModel
from softprune.stats.file import Statistics
from softprune.stats.header import DataSet, Eaft, Grid, Header, MaskEpoch, Mode, Plane, Run, Tokens
from softprune.stats.layout import SPECS, shapes

MODEL = MaskModel(architecture="GptOssForCausalLM", num_layers=3, num_experts=12, top_k=4, fingerprint="sha256:" + "a" * 64)
ALL: tuple[Mode, ...] = ("router", "reap", "eaft")
EAFT = Eaft(plane=Plane(), grid=Grid(log10_p=[-8.0, -4.0, -1.0, 0.0], entropy=[0.0, 0.5, 1.0]))
BINS = 20


def header(
    run: str,
    tags: Sequence[str],
    modes: Sequence[Mode] = ALL,
    tokens: dict[str, Tokens] | None = None,
    shadow: bool = False,
    **changes: Any,
) -> Header:
    """A header of one run."""
    sampling = {**{mode: 16 for mode in modes if mode != "router"}, **({"shadow": 64} if shadow else {})}
    stands = {"started": "2026-11-01T00:00:00Z", "ended": "2026-11-01T01:00:00.5Z"}
    sampled = {"reap": "tokens of prefill"} if "reap" in modes else {}
    fields: dict[str, Any] = {
        "model": MODEL,
        "runs": [Run(id=run, engine="vLLM", engine_version="0.32.0", modes=list(modes), sampled=sampled, **stands)],
        "epochs": [MaskEpoch.of(run, 0, None, MODEL)],
        "tags": list(tags),
        "modes": list(modes),
        "tokens": tokens or {tag: Tokens(prefill=0, decode=0, cached=0) for tag in tags},
        "sampling": sampling,
        "confidence_bins": BINS if "router" in modes else None,
        "eaft": EAFT if "eaft" in modes else None,
        "data_sets": [DataSet(id="UNION", hashes=[f"sha256:{run.encode().hex():0>64}"])],
    }
    return Header(**{**fields, **changes})


def collected(run: str, tags: Sequence[str] = ("default",), modes: Sequence[Mode] = ALL, seed: int = 0, num_tokens: int = 40) -> Statistics:
    """What a run collected of about so many tokens a tag, with a shadow; each tag prefers experts of its own."""
    rng = np.random.default_rng(seed)
    tokens = {tag: Tokens(prefill=int(rng.integers(1, num_tokens)), decode=int(rng.integers(1, num_tokens)), cached=3) for tag in tags}
    head = header(run, tags, modes, tokens, shadow="router" in modes)
    raw = {name: np.zeros(shape, SPECS[name].dtype) for name, shape in shapes(head).items()}
    for i, tag in enumerate(tags):
        liking = np.random.default_rng(list(tag.encode())).normal(size=MODEL.num_experts)
        for phase, number in enumerate((tokens[tag].prefill, tokens[tag].decode)):
            for _ in range(number):
                _token(raw, i, phase, liking, rng)
    return Statistics.of(head, raw, f"{run}.safetensors")


def _token(raw: dict[str, NDArray[Any]], tag: int, phase: int, liking: NDArray[Any], rng: np.random.Generator) -> None:
    kind, p, h = phase, rng.uniform(1e-6, 1), rng.uniform()
    x, y = int(rng.integers(3)), int(rng.integers(2))
    for layer in range(MODEL.num_layers):
        logits = liking + rng.normal(size=MODEL.num_experts)
        chosen = np.sort(np.argsort(-logits)[: MODEL.top_k])
        gates = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        norms = rng.uniform(1, 50, MODEL.top_k)
        if "router.count" in raw:
            raw["router.count"][tag, phase, layer, chosen] += 1
            raw["router.gate_sum"][tag, phase, layer, chosen] += gates
            raw["router.confidence"][tag, phase, layer, min(BINS - 1, int(gates.max() * BINS))] += 1
            raw["router.shadow_count"][tag, layer, chosen] += 1
            for i, first in enumerate(chosen):
                raw["router.coactivation"][tag, layer, first, chosen[i:]] += 1
        if "reap.count" in raw and phase == 0:
            raw["reap.count"][tag, layer, chosen] += 1
            raw["reap.norm_sum"][tag, layer, chosen] += norms
            raw["reap.gate_norm_sum"][tag, layer, chosen] += gates * norms
        if "eaft.hist" in raw:
            raw["eaft.grid_count"][tag, kind, layer, chosen, x, y] += 1
            raw["eaft.grid_gate_norm"][tag, kind, layer, chosen, x, y] += gates * norms
    if "eaft.hist" in raw:
        raw["eaft.hist"][tag, kind, min(159, int(p * 160)), min(119, int(h * 120))] += 1
        for name, value in (
            ("nll", -np.log(p)), ("nll_square", np.log(p) ** 2), ("p", p), ("entropy", 9 * h), ("entropy_top", h),
        ):  # fmt: skip
            raw[f"eaft.{name}_sum"][tag, kind] += value
