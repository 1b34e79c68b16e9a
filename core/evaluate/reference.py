"""What a model says of given tokens, by Transformers: the reference that servers are compared with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.families import family_of, read_config
from softprune.evaluate.errors import EvaluationError
from softprune.evaluate.metrics import MAX_MEAN_NLL


@dataclass(frozen=True)
class Scores:
    """Teacher-forced scores of blocks; entry [b, t] is about token t, predicted from the tokens before it in the block.

    Attributes:
        log_p: float32 [num_blocks, seq_len], natural log-probability of the token; NaN in the first column.
        entropy: float32, same shape, of the whole predicted distribution in nats; None if not asked for.
        top_entropy: float32, same shape, of the `top` likeliest tokens, renormalised to 1, over ln `top`, so within [0, 1]
            (spec/metrics.md 1.4); None if not asked for.
    """

    log_p: NDArray[np.float32]
    entropy: NDArray[np.float32] | None = None
    top_entropy: NDArray[np.float32] | None = None


def load_reference(model_dir: str | Path, experts: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint as a Transformers model on the CPU, ready to be evaluated; MXFP4 experts are dequantised first.

    Args:
        model_dir: checkpoint folder of a known family.
        experts: Transformers' `experts_implementation`. On a CPU the plain loop, "eager", is as quick as "grouped_mm" (2,000 tokens a
            second on one core, 28 M parameters; log-probabilities equal to 1e-6), and "batched_mm" copies experts for each token.
        dtype: of weights and arithmetic; the stored BF16 values fit into float32 unchanged.

    Raises:
        CheckpointError: unknown architecture or storage.
    """
    from transformers import AutoModelForCausalLM

    def load(folder: str | Path) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation=experts)
        return loaded.eval().requires_grad_(False)

    if family_of(read_config(model_dir), str(Path(model_dir) / "config.json")).storage != "mxfp4":
        return load(model_dir)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "bf16"
        dequantize_checkpoint(model_dir, plain)
        return load(plain)


@torch.inference_mode()
def score(
    model: Any, ids: NDArray[np.int32], batch_size: int = 1, entropies: bool = False, top: int = 20,
    progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """Run a Transformers causal model over blocks, without a mask between conversations.

    Args:
        model: from `load_reference`, or any model that answers with `logits`.
        ids: [num_blocks, seq_len].
        batch_size: blocks in one pass; it bounds memory and changes no number beyond rounding. On a CPU, 1 is the quickest.
        entropies: also fill `entropy` and `top_entropy`.
        top: tokens in `top_entropy`, at least 2.
        progress: called with the number of blocks done in each pass.
    """
    names = ["log_p", "entropy", "top_entropy"] if entropies else ["log_p"]
    scores = {name: np.full(ids.shape, np.nan, np.float32) for name in names}
    for begin in range(0, len(ids), batch_size):
        batch = torch.from_numpy(ids[begin : begin + batch_size].astype(np.int64)).to(model.device)
        log_probs = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found = [log_probs.gather(-1, batch[:, 1:, None])[..., 0]]
        if entropies:
            found += [_entropy(log_probs), _entropy(log_probs.topk(top, -1).values.log_softmax(-1)) / math.log(top)]
        for name, values in zip(names, found, strict=True):
            scores[name][begin : begin + batch_size, 1:] = values.cpu().numpy()
        if progress:
            progress(len(batch))
    return Scores(**scores)


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    # 0 * -inf is 0 here: an impossible token adds nothing.
    return -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1)


def mean_nll(log_p: NDArray[np.floating[Any]], keep: NDArray[np.bool_]) -> float:
    """Mean negative log-probability in nats over the tokens that count, in float64.

    Raises:
        EvaluationError: no token counts, or one that does has no finite log-probability.
    """
    kept = log_p[keep].astype(np.float64)
    if not kept.size:
        raise EvaluationError("no completion tokens: no message of the assistant lies in these blocks")
    if not np.isfinite(kept).all():
        raise EvaluationError(f"{int((~np.isfinite(kept)).sum())} of {kept.size} completion tokens have no finite log-probability")
    return float(-kept.mean())


def perplexity(log_p: NDArray[np.floating[Any]], keep: NDArray[np.bool_]) -> float:
    """exp of `mean_nll`, cut as the study does; raises as that."""
    return math.exp(min(MAX_MEAN_NLL, mean_nll(log_p, keep)))
