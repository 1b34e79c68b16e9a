"""softprune inside vLLM.

| file | role |
|---|---|
| `flags` | the command line flags, and what they do to the engine's configuration |
| `proven` | modes and MoE backends that masks are known to work with; all else is refused |
| `seams` | the only names of vLLM's internals |
| `routers` | finding the routers of a loaded model |
| `collector` | statistics: every router's logits into the slab, and which requests a step's rows are of |
| `worker` | masking them in every worker process, and keeping them masked |
| `scheduler` | live switches between two steps, mask epochs, and prefix caches named by mask |
| `routes` | the control API on the engine's own HTTP port |
"""

from softprune.vllm_ext.flags import llm_args, register

__all__ = ["llm_args", "register"]
