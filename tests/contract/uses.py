"""What softprune's extensions use of their engines, read from the extensions themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from softprune.bench import engine_metrics
from softprune.seams import Seam
from softprune.sglang_ext import proven as sglang_proven
from softprune.sglang_ext import routers as sglang_routers
from softprune.sglang_ext import seams as sglang_seams
from softprune.vllm_ext import proven as vllm_proven
from softprune.vllm_ext import routers as vllm_routers
from softprune.vllm_ext import seams as vllm_seams


def seams_in(module: ModuleType) -> list[Seam]:
    """Every seam that a module names, also inside tuples and dicts."""
    return list(dict.fromkeys(seam for value in vars(module).values() for seam in _seams(value)))


def _seams(value: Any) -> Iterator[Seam]:
    if isinstance(value, Seam):
        yield value
    elif isinstance(value, tuple | list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _seams(entry)


def imports_of(package: str, extension: ModuleType) -> list[str]:
    """Targets "module:name" that an extension imports from its engine, wherever the import stands."""
    found: set[str] = set()
    for file in Path(str(extension.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == package:
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(found)


SEAMS = {"vllm": seams_in(vllm_seams), "sglang": seams_in(sglang_seams)}

OPTIONAL_SEAMS = (sglang_seams.BEGIN_WEIGHT_UPDATE, sglang_seams.CACHE_UNFINISHED)
"""Those that not every supported version has."""

RESOLVING_VIEW = "sglang.srt.arg_groups.model_override_base:resolving_view"
"""How newer versions of SGLang show resolved settings; `sglang_ext.seams.setting` does without it where it is missing."""

IMPORTS = {
    "vllm": imports_of("vllm", vllm_seams),
    "sglang": [name for name in imports_of("sglang", sglang_seams) if name != RESOLVING_VIEW],
}

CONFIG_PATHS = sorted(
    {mode.path for mode in vllm_proven.UNPROVEN_MODES} | {"additional_config", "model_config.dtype", "model_config.hf_config"}
)
"""Attributes of vLLM's VllmConfig."""

SETTINGS = sorted(
    {mode.path for mode in sglang_proven.UNPROVEN_MODES} | {"json_model_override_args", "model_path", "revision", "port"}
)  # fmt: skip
"""Fields of SGLang's ServerArgs."""

BLOCK_ATTRIBUTES = {
    "vllm": [(site.block, name) for site in vllm_routers.SITES.values() for name in (site.router, "experts")],
    "sglang": [(site.block, name) for site in sglang_routers.SITES.values() for name in (site.router, "topk", "experts")],
}
"""What `routers.py` reads in an architecture's MoE block."""

REQUESTS = {"vllm": vllm_seams.REQUEST, "sglang": sglang_seams.REQUEST}
METRICS = {
    name.lower(): sorted({names.running, names.waiting, names.preempted, names.witness}) for name, names in engine_metrics.NAMES.items()
}
METRICS["vllm"].append(engine_metrics.CACHE_CONFIG)
"""Prometheus metrics that `bench max-batch` reads."""

REQUEST_FIELDS = {"vllm": list(vllm_seams.REQUEST_FIELDS), "sglang": list(sglang_seams.REQUEST_FIELDS)}
"""What `scheduler.py` reads of an engine's requests."""

KNOWN_CALLS = {
    "vllm": ("vllm.v1.worker.gpu_worker:Worker", {*vllm_seams.REFUSED_CALLS, *vllm_seams.OTHER_CALLS}),
    "sglang": (
        sglang_seams.WEIGHT_UPDATER.target,
        {*sglang_seams.WEIGHT_UPDATES, "begin_weight_update", *sglang_seams.OTHER_UPDATER_CALLS},
    ),
}
"""Class whose public methods can touch a model's weights -> those that softprune has looked at."""
