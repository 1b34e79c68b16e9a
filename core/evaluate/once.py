"""An evaluation that is made unless it is there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprune.errors import shortened
from softprune.evaluate import evaluation
from softprune.evaluate.errors import EvaluationFileError
from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.evaluate import EvalSettings, evaluate
from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.packing import blocks_sha256
from softprune.evaluate.served import Served, ask_served
from softprune.server_client import ServerClient


def evaluate_once(
    client: ServerClient, packs: PackSet, out: Path, settings: EvalSettings, advance: Callable[[int], None] = lambda tokens: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:  # fmt: skip
    """`evaluate`, or the file that it wrote before.

    Args:
        client, packs, out, settings, advance, tell: see `evaluate`.

    Raises:
        EvaluationFileError: the file is of another model, mask, `top_k` or data.
        SoftpruneError: as `evaluate`.
    """
    if not out.exists():
        return evaluate(client, packs, out, settings, advance, tell)
    found = evaluation.read(out)
    for name, (there, expected) in _identity(found, ask_served(client), packs, settings).items():
        if there != expected:
            raise EvaluationFileError(str(out), name, shortened(there), f"{shortened(expected)}, or no such file")
    tell(f"{found.label}: skipped, {out.name} is there and is of the same")
    return found


def _identity(found: Evaluation, served: Served, packs: PackSet, settings: EvalSettings) -> dict[str, tuple[Any, Any]]:
    """What the file says, and what is asked for."""
    blocks = {f"{pack}@{length}": blocks_sha256(one) for pack, by_length in packs.cells.items() for length, one in by_length.items()}
    return {
        "meta.softprune.fingerprint": (found.own.get("fingerprint"), served.fingerprint),
        "meta.softprune.mask": (found.own.get("mask"), served.mask),
        "meta.top_k": (found.meta.get("top_k"), served.top_k),
        "meta.entropy_topk": (found.meta["entropy_topk"], settings.metrics.entropy_topk),
        "blocks_sha256": ({f"{pack}@{length}": one.identity["blocks_sha256"] for (pack, length), one in found.cells.items()}, blocks),
    }
