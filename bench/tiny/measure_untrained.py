"""How far the packs' expert histograms lie apart in the model that training begins with: what the trained one's are compared with.

    .venv/bin/python -m softprune.bench.tiny.measure_untrained

Same shape, same tokens, random weights: the differences that are there because the packs are made of different tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from rich.console import Console

from softprune.bench.tiny import CONTEXT
from softprune.bench.tiny.measure import Measurer
from softprune.bench.tiny.measure_packs import heldout_blocks, load_tokenizer
from softprune.bench.tiny.train import fresh_model
from softprune.bench.tiny.weights import HERE, config
from softprune.checkpoint.families import spec_of
from softprune.files import write_whole
from softprune.report.progress import count_progress

SEED, NUM_BLOCKS = 0, 48
"""Those of the committed weights' training, and of bench/results/tiny.json."""


def main(out: Path = Path("bench/results/tiny_untrained.json")) -> None:
    """Measure and write the document."""
    torch.set_num_threads(1)  # as measure.py does
    console = Console(stderr=True)
    blocks = heldout_blocks(HERE / "packs", load_tokenizer(HERE / "tokenizer"), NUM_BLOCKS)
    model = fresh_model(SEED, "eager", "eager").eval().requires_grad_(False)
    with count_progress("blocks", NUM_BLOCKS * len(blocks), console) as advance:
        found, routing = Measurer(model, spec_of(config()), blocks, 1, advance).perplexities_and_routing()
    document = {
        "what": "bench/tiny/measure_untrained.py: the model of the committed weights' shape before training",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {"seq_len": CONTEXT, "num_blocks": NUM_BLOCKS, "dtype": "float32", "seed": SEED},
        "perplexity": found,
        "min_share": routing["min_share"],
        "js": routing["js"],
    }
    write_whole(out, json.dumps(document, indent=1) + "\n")
    console.print({pair: entry["mean"] for pair, entry in routing["js"].items()})


if __name__ == "__main__":
    main()
