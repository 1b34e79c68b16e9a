"""Checkpoints on disk: where each architecture keeps its routers and experts, and what can be done to them."""
