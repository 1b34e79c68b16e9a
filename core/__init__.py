"""softprune: prune the experts of Mixture-of-Experts models while an inference server serves them.

This package is engine-free. What hooks into an engine lives in `softprune.vllm_ext` and
`softprune.sglang_ext`; neither is imported from here.

`rank`, `select`, `rewrite` and `prune` are imported when they are first used, so that `import softprune` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprune.ranking.api import rank as rank
    from softprune.selection.select import select as select

__version__ = "0.1.0"

_LAZY = {"rank": "softprune.ranking.api", "select": "softprune.selection.select"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
