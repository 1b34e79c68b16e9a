"""On the trained small model, what the study ranks by prunes better than chance, in a real masked vLLM.

Frequency is measured and not asserted: the model's routers were trained to be balanced, in a layer no expert is chosen 1.6 times as
often as another, and ranking by what is left of a difference is found to be worse than chance at 16.

Run alone: pytest tests/evidence/test_methods.py (about six minutes)
All criteria, numbers kept and variants: `make tiny-methods`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.progress import Progress

from softprune.bench.tiny.measure_packs import load_tokenizer
from softprune.bench.tiny.methods import MIN_TOKENS, TOKENIZER, all_cells, measure, records, scored_blocks, statistics_of
from softprune.bench.tiny.methods_figures import cells
from tests.conftest import Evidence

pytestmark = pytest.mark.engine
BETTER, KEEPS = ("reap_sum", "eaft_reap"), (24, 16)


@pytest.mark.timeout(1500)
def test_they_beat_random_pruning(tmp_path: Path, evidence: Evidence) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    blocks = scored_blocks(tokenizer)
    assert blocks.num_kept >= MIN_TOKENS
    with Progress(disable=True) as progress:
        stats = statistics_of(tmp_path, tokenizer, progress)
        wanted = all_cells(stats, KEEPS, ("frequency", *BETTER))
        figures = cells(records(wanted, measure(tmp_path, blocks, wanted, None, progress)), blocks.keep.sum(1).tolist())
    evidence("tiny.methods", figures)
    for method in BETTER:
        for keep in KEEPS:
            low, high = figures["methods"][method][str(keep)]["minus_random_interval"]
            assert high < 0, f"{method}, keep {keep}: perplexity less random pruning's lies in [{low:.4f}, {high:.4f}]"
