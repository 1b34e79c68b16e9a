"""A mask drawn as a map: one row a layer, one cell an expert."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from softprune.mask import ExpertMask

KEPT, PRUNED = "█", "·"
MARGIN = 16
"""Columns beside the cells: the layer, and the number kept."""


def keep_map(mask: ExpertMask, columns: int = 80) -> Group:
    """The map of a mask, for a terminal.

    Each row shows the layer, a cell per expert (a block for kept, a dot for pruned) and the number kept; a
    header marks every eighth expert. Layers with more experts than fit take several lines.

    Args:
        mask: the mask.
        columns: width of the terminal.
    """
    experts = mask.model.num_experts
    width = min(experts, max(8, (columns - MARGIN) // 8 * 8))
    ruler = "".join(f"{i:<8}" for i in range(0, width, 8))[:width]
    lines = [Text(f"{'layer':>6}  {ruler}  kept", style="bold")]
    for layer in range(mask.model.num_layers):
        kept = set(mask.kept(layer))
        for start in range(0, experts, width):
            row = Text(f"{layer:>6}  " if start == 0 else " " * 8)
            for expert in range(start, min(start + width, experts)):
                row.append(KEPT, "green") if expert in kept else row.append(PRUNED, "dim")
            if start + width >= experts:
                row.append(f"  {len(kept)}")
            lines.append(row)
    counts = mask.num_kept
    share = sum(counts) / (experts * len(counts))
    top_k = "the model's own" if mask.top_k is None else str(mask.top_k)
    lines.append(Text(f"{mask.summary} a layer, {share:.1%} in all; top_k: {top_k} ({mask.model.top_k})"))
    return Group(*lines)
