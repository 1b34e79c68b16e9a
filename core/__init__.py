"""softprune: prune the experts of Mixture-of-Experts models while an inference server serves them.

This package is engine-free. What hooks into an engine lives in `softprune.vllm_ext` and
`softprune.sglang_ext`; neither is imported from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprune.checkpoint.rewrite import rewrite as rewrite
    from softprune.ranking.api import rank as rank
    from softprune.recipe.prune import prune as prune
    from softprune.selection.select import select as select

__version__ = "0.1.0"

_API = {
    "prune": "softprune.recipe.prune",
    "rank": "softprune.ranking.api",
    "rewrite": "softprune.checkpoint.rewrite",
    "select": "softprune.selection.select",
}
"""Functions of the package itself; imported when asked for, since a server imports this package and needs none of them."""


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
