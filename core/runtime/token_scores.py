"""How sure a model was of a token: its log-probability, and the entropy of the distribution that it came from."""

from __future__ import annotations

import math

import torch

TOP = 20
"""Likeliest tokens that the study's form of the entropy looks at."""
LOG_P, ENTROPY, ENTROPY_TOP = range(3)
"""Columns of what `token_scores` returns."""


def token_scores(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Scores of tokens under their logits: on a GPU by kernels of its own, elsewhere by plain PyTorch.

    Args:
        logits: [n, vocabulary], of any float dtype; also log-probabilities, which are logits too. Not changed.
        tokens: integers [n].

    Returns:
        float32 [n, 3], in nats: the log-probability of the token; the entropy over the whole vocabulary; and the study's form, the entropy
        of the 20 likeliest tokens, renormalised, over ln 20, from 0 to 1 (spec/metrics.md 1.4). A vocabulary of fewer tokens has
        as many likeliest ones.
    """
    if logits.is_cuda:
        from softprune.runtime import token_scores_kernel

        return token_scores_kernel.token_scores(logits, tokens)
    return reference(logits, tokens)


def reference(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`token_scores` in PyTorch; what the kernels are compared with."""
    log_p = torch.log_softmax(logits.float(), -1)
    chosen = log_p.gather(1, tokens.long()[:, None])[:, 0]
    top = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1).values
    return torch.stack([chosen, _entropy(log_p), _entropy(top.log_softmax(-1)) / math.log(max(2, top.shape[-1]))], -1)


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Of log-probabilities [n, m] that add up to 1; what cannot be, -inf, adds nothing."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)
