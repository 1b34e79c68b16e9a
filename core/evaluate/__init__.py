"""Evaluation of quality: Harmony spans, packing, reference log-probabilities."""
