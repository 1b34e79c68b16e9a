"""An evaluation with a bar while it runs, and a table of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.evaluate import EvalSettings, Evaluating
from softprune.evaluate.evaluation import Evaluation
from softprune.report.progress import token_progress
from softprune.server_client import ServerClient


def evaluated(
    client: ServerClient,
    packs: PackSet,
    out: Path,
    settings: EvalSettings,
    errors: Console,
    tell: Callable[[str], None],
    once: bool = False,
) -> Evaluation:
    """As `evaluate`; interrupted, it says how to go on.

    Args:
        client, packs, out, settings: as `evaluate` takes them.
        errors: where the bar is drawn.
        tell: told warnings.
        once: skip what is there already.

    Raises:
        typer.Exit: by Ctrl-C.
        SoftpruneError: as `evaluate`.
    """
    run = Evaluating(client, packs, out, settings, tell)
    if once and (known := run.known()) is not None:
        tell(f"{out}: skipped, it is there and was made of the same")
        return known
    with run:
        try:
            with token_progress(out.name, run.num_tokens, errors, run.num_done) as advance:
                return run.run(advance)
        except BaseException as error:
            done = f"{run.num_done:,} of {run.num_tokens:,} tokens are in {run.store.path}"
            errors.print(f"{done}; the same command goes on from there", soft_wrap=True, markup=False)
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(130) from None
            raise


def shown(evaluation: Evaluation) -> Table:
    """A row for each pack and length."""
    table = Table("pack", "L", "tokens", "PPL", "mean p", "mean H", "conflict %", box=None)
    for (pack, seq_len), cell in evaluation.cells.items():
        values = cell.metrics
        table.add_row(
            pack, str(seq_len), f"{cell.tokens:,}", f"{values['ppl']:.3f}", f"{values['mean_prob']:.4f}", f"{values['mean_entropy']:.4f}",
            f"{100 * values['cc_rate']:.3f}",
        )  # fmt: skip
    return table
