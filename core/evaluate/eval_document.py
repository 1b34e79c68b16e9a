"""The evaluation file's document: the study's fields (spec/metrics.md 1.7), and what softprune adds."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from softprune import __version__
from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.evaluation import FORMAT, VERSION
from softprune.evaluate.metrics import MetricSettings
from softprune.evaluate.served import Served

_WHEN = ("run_id", "date", "softprune_version", "transformers_version")


def meta_of(served: Served, packs: PackSet, metrics: MetricSettings, label: str, concurrency: int) -> dict[str, Any]:
    """What "meta" says.

    Args:
        served, packs: what was asked, and of what.
        metrics: how it was measured.
        label: of the model.
        concurrency: requests at once.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    device = (served.status or {}).get("device")
    low, high = metrics.plane.x_range
    every = {length: len(blocks.ids) for by_length in packs.cells.values() for length, blocks in by_length.items()}
    own = {
        "format": FORMAT, "version": VERSION, "softprune_version": __version__, "date": now.isoformat(timespec="seconds"),
        "fingerprint": served.fingerprint, "mask": served.mask, "num_kept": served.num_kept,
        "tokenizer_sha256": packs.tokenizer_sha256, "block_form": packs.form, "data_seed": packs.data_seed,
        "vocabulary_size": packs.vocabulary,
    }  # fmt: skip
    return {
        "dataset_repo": None, "pack_files": list(packs.files), "model_id": label, "model_path": PurePath(served.path).name,
        "gpu_type": None, "gpu_name": None if device == "cpu" else device, "gpu_sm": None, "torch": None,
        f"{served.engine}_version": served.version, "transformers_version": version("transformers"), "engine": served.engine,
        "top_k": served.top_k, "entropy_topk": metrics.entropy_topk, "cc_quantile": metrics.cc_quantile,
        "num_blocks": max(every.values()), "batch_size": concurrency, "hist_xbins": metrics.xbins, "hist_ybins": metrics.ybins,
        "prob_scale": metrics.prob_scale, "logp_min": metrics.logp_min, "logp_max": metrics.logp_max,
        "sample_points": metrics.sample_points, "seq_lens": list(every),
        "axes": {"x": "p" if metrics.prob_scale == "linear" else "log10(p)", "y": "H_topK/ln(K)"}, "x_min": low, "x_max": high,
        "run_id": now.strftime("%Y%m%d_%H%M%S"), "softprune": own,
    }  # fmt: skip


def lasting(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Of "meta", what another run of the same would say as well."""
    own = {name: value for name, value in meta["softprune"].items() if name not in _WHEN}
    return {**{name: value for name, value in meta.items() if name not in _WHEN}, "softprune": own}


def document(meta: Mapping[str, Any], cells: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """All of it, JSON-ready; `cells` are the entries of "seq" by (pack, block length)."""
    names = dict.fromkeys(pack for pack, _ in cells)
    listed = [{"pack": name, "seq": {str(length): cell for (pack, length), cell in cells.items() if pack == name}} for name in names]
    return {"meta": dict(meta), "packs": listed}
