"""softprune inside SGLang.

| file | role |
|---|---|
| `flags` | the command line flags, and what they do to the server's arguments |
| `proven` | modes and MoE backends that masks are known to work with; all else is refused |
| `seams` | the only names of SGLang's internals |
| `hooks` | what is registered with SGLang's hook registry, and the check that it took effect |
| `routers` | finding the routers of a loaded model |
| `collector` | statistics: every router's logits into the slab, and which requests a step's rows are of |
| `worker` | masking them in every scheduler process, keeping them masked, and answering for them |
| `scheduler` | switching masks between two steps, and keeping requests and caches of different masks apart |
| `routes` | the control API on the engine's own HTTP port |
"""

from softprune.sglang_ext.flags import engine_args
from softprune.sglang_ext.hooks import register

__all__ = ["engine_args", "register"]
