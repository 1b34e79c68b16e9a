"""How rewriting grows, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softprune.files import replaced_after

LABELS = {
    "layers": "layers, 24 of 32 experts kept",
    "experts": "experts kept of 32, in 4 layers",
    "shards": "shards written, 4 layers, 24 of 32 experts kept",
}


def plot(document: dict[str, Any], path: Path) -> None:
    """Seconds and peak MiB over layers, experts and shards, from what `softprune.bench.rewrite` measured, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "softprune"}):
        figure = Figure(figsize=(12, 4), layout="constrained")
        for panel, (what, label) in zip(figure.subplots(1, 3), LABELS.items(), strict=True):
            rows = document["growth"][what]
            numbers = [row["number"] for row in rows]
            for row in rows:
                seconds = [sample["seconds"] for sample in row["samples"]]
                panel.plot([row["number"]] * len(seconds), seconds, ".", color="C0", alpha=0.4)
            panel.plot(numbers, [row["seconds"] for row in rows], "-", color="C0", label="seconds, median of 3")
            panel.set(xlabel=label, ylim=(0, None), xlim=(0, None))
            memory = panel.twinx()
            memory.plot(numbers, [row["peak_mib"] for row in rows], "s--", color="C1", label="peak MiB above the interpreter")
            memory.set(ylim=(0, 2 * max(row["peak_mib"] for row in rows)))
            if what == "layers":
                panel.set_ylabel("seconds")
                panel.legend(handles=[*panel.get_lines()[-1:], *memory.get_lines()], loc="upper left", fontsize=8)
            if what == "shards":
                memory.set_ylabel("MiB")
        figure.suptitle(f"softprune rewrite, layers of {document['preset']} (MXFP4), page cache warm, ending in fsync", fontsize=10)
        with replaced_after(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
