"""What the proof makes of two servers' answers: routed experts token by token, log-probabilities, and what a mask pruned."""

from __future__ import annotations

from typing import Any

from softprune.mask import ExpertMask

Result = dict[str, Any]


def routes(result: Result, mask: ExpertMask, top_k: int) -> dict[str, Any]:
    """Correctness line (a): selections of experts that a mask prunes, and whether every selection is accounted for."""
    counts, tokens = result["routes"]["counts"], result["routes"]["tokens"]
    pruned = [counts[layer][i] for layer in range(mask.model.num_layers) for i in mask.pruned(layer)]
    return {
        "tokens": tokens[0], "selections": sum(map(sum, counts)), "expected": sum(tokens) * top_k, "sent": result["sent"],
        "pruned": sum(pruned), "pruned_experts_selected_share": sum(count > 0 for count in pruned) / max(1, len(pruned)),
        "moe_backend": result["status"]["moe_backend"],
    }  # fmt: skip


def routed_ids(masked: Result, sliced: Result, mask: ExpertMask) -> dict[str, Any]:
    """Correctness line (b): experts of the masked server and of the sliced checkpoint, token by token.

    A sliced checkpoint's expert i is the mask's i-th kept one. Rows are compared as sets, per layer and token.
    """
    kept = [mask.kept(layer) for layer in range(mask.model.num_layers)]
    ids = masked["routes"]["ids"], sliced["routes"]["ids"]
    equal = [
        sum(row == [kept[layer][i] for i in other] for row, other in zip(one, two, strict=True))
        for layer, (one, two) in enumerate(zip(*ids, strict=True))
    ]
    rows = [len(one) for one in ids[0]]
    return {
        "rows": sum(rows),
        "equal_share": sum(equal) / sum(rows),
        "equal_share_by_layer": [a / b for a, b in zip(equal, rows, strict=True)],
    }


def logprobs(one: Result, two: Result, key_one: str = "logprobs", key_two: str = "logprobs", tokens: int = 127) -> dict[str, Any]:
    """Teacher-forced log-probabilities side by side: the mean absolute difference of each prompt, and its maximum.

    Args:
        one, two: results.
        key_one, key_two: "logprobs" (prompts alone) or "batched".
        tokens: of each prompt.
    """
    means, largest, equal, total = [], 0.0, 0, 0
    for first, second in zip(one[key_one], two[key_two], strict=False):
        gaps = [abs(a - b) for a, b in zip(first[:tokens], second[:tokens], strict=True)]
        means.append(sum(gaps) / len(gaps))
        largest, equal, total = max(largest, *gaps), equal + sum(gap == 0 for gap in gaps), total + len(gaps)
    return {"prompts": len(means), "max_of_mean": max(means), "mean": sum(means) / len(means), "max": largest, "equal_share": equal / total,
            "same_generated": one["tokens"] == two["tokens"] if key_one == key_two else None}  # fmt: skip


def gap(one: dict[Any, float], two: dict[Any, float]) -> float | None:
    """Mean absolute difference of the log-probabilities that two answers share; None if they share fewer than 10 of 20."""
    both = set(one) & set(two)
    return sum(abs(one[token] - two[token]) for token in both) / len(both) if len(both) >= 10 else None
