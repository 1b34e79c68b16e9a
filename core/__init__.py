"""softprune: prune the experts of Mixture-of-Experts models while an inference server serves them.

This package is engine-free. What hooks into an engine lives in `softprune.vllm_ext` and
`softprune.sglang_ext`; neither is imported from here.
"""

__version__ = "0.1.0"
