"""What `tests.gpu.tiles` measured under masks, drawn: the kernels' own tiles and softprune's, against the fastest.

python -m tests.gpu.tiles_plot     # bench/results/tiles_gpu.json -> tiles.svg beside it
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from softprune.files import replaced_after
from softprune.runtime.tiles import rows_of_tile

MEASURED = Path("bench/results/tiles_gpu.json")
KERNELS = {"3.6": "triton_kernels 3.6, as in SGLang 0.5.17", "3.5": "triton_kernels 3.5, as in vLLM 0.26"}


def main() -> None:
    """Same figures, same bytes."""
    document = json.loads(MEASURED.read_text())
    with mpl.rc_context({"svg.hashsalt": "softprune"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        for panel, (kernels, title) in zip(figure.subplots(1, 2, sharey=True), KERNELS.items(), strict=True):
            rows, top_k = [row for row in document[kernels]["rows"] if row["keep"] < row["experts"]], document[kernels]["top_k"]
            tokens = [row["rows"] * top_k / row["keep"] for row in rows]
            over = {
                "the kernels' own tile": [row["us"][str(row["own"])] / min(row["us"].values()) for row in rows],
                "softprune's": [
                    row["us"][str(rows_of_tile(of_expert, row["own"]))] / min(row["us"].values())
                    for row, of_expert in zip(rows, tokens, strict=True)
                ],
            }
            for (label, values), style in zip(over.items(), ({"marker": "x", "color": "C3"}, {"marker": "o", "color": "C0"}), strict=True):
                panel.scatter(tokens, values, s=16, alpha=0.6, linewidths=1, label=label, **style)
            panel.set_xscale("log", base=2)
            panel.set(xlabel="tokens of a kept expert, mean", title=title)
            panel.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            panel.grid(alpha=0.25)
        figure.axes[0].set_ylabel("time of an MoE layer over the fastest tile's")
        figure.axes[0].legend(frameon=False, fontsize=9)
        with replaced_after(MEASURED.with_name("tiles.svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
