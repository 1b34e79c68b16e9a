"""Measure the trained small model: every figure that it is judged by, in one document.

    .venv/bin/python -m softprune.bench.tiny.measure --parent BF16_FOLDER [--second-seed FOLDER]

The model is run by Transformers in float32 on the values that the checkpoint stores. `softprune.bench.tiny.baseline` comes first.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from softprune.bench.tiny import CONTEXT, PACKS
from softprune.bench.tiny.baseline import perplexity_on
from softprune.bench.tiny.measure_bars import CALL_PROMPTS, SAMPLES, bars, table
from softprune.bench.tiny.measure_curve import plot_curve, read_curve
from softprune.bench.tiny.measure_packs import heldout_blocks, load_tokenizer, pack_files
from softprune.bench.tiny.measure_routing import Selections, random_mask, recorded, routers
from softprune.bench.tiny.measure_samples import Prompt, cut_prompt, generate, judge_calls
from softprune.checkpoint.families import ModelSpec, read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.errors import InputError, SoftpruneError
from softprune.evaluate.harmony import parse_messages
from softprune.evaluate.packing import UNION, Blocks, read_rows
from softprune.evaluate.reference import load_reference, perplexity, score
from softprune.files import write_whole
from softprune.runtime.router_mask import RouterMask
from softprune.stats.figures import js_divergence

FORMAT, VERSION = "softprune.tiny-measure", 1
NUM_KEPT, SEEDS = 16, range(5)
TOOLS = "tool_agentic"
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Measurer:
    """One model and what it is measured on.

    Attributes:
        model, spec: a Transformers model, and its shape.
        blocks: of each pack and UNION.
        batch_size: blocks in one pass.
        advance: called with the number of blocks done.
    """

    model: Any
    spec: ModelSpec
    blocks: dict[str, Blocks]
    batch_size: int
    advance: Advance

    def perplexity(self, pack: str) -> float:
        """Over the completion tokens of one pack."""
        blocks = self.blocks[pack]
        return perplexity(score(self.model, blocks.ids, self.batch_size, progress=self.advance).log_p, blocks.keep)

    def perplexities_and_routing(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Perplexity of each pack and UNION, and the figures of its routers."""
        found: dict[str, float] = {}
        chosen: dict[str, Selections] = {}
        for pack in self.blocks:
            with recorded(self.model) as selections:
                found[pack] = self.perplexity(pack)
            chosen[pack] = selections
        return found, self._routing(chosen)

    def _routing(self, chosen: dict[str, Selections]) -> dict[str, Any]:
        every = {pack: selections.histogram(self.spec.num_experts) for pack, selections in chosen.items()}
        written = {pack: selections.histogram(self.spec.num_experts, self.blocks[pack].keep) for pack, selections in chosen.items()}
        share = every[UNION] / every[UNION].sum(-1, keepdims=True)
        pairs = {}
        for a, b in itertools.combinations(PACKS, 2):
            layers = js_divergence(every[a], every[b])
            completion = js_divergence(written[a], written[b]).mean()
            pairs[f"{a} and {b}"] = {
                "mean": float(layers.mean()),
                "layers": layers.tolist(),
                "mean_of_completion_tokens": float(completion),
            }
        histograms = {pack: counts.tolist() for pack, counts in every.items()}
        return {"min_share": share.min(-1).tolist(), "max_share": share.max(-1).tolist(), "js": pairs, "selections": histograms}

    def pruning(self, unmasked: float) -> dict[str, Any]:
        """UNION perplexity with random experts kept, against the unmasked one."""
        mask = RouterMask(routers(self.model))
        found = []
        try:
            for seed in SEEDS:
                mask.apply(random_mask(self.spec, NUM_KEPT, seed))
                mask.verify(self.model.config.hidden_size, self.model.dtype)
                found.append(self.perplexity(UNION))
        finally:
            mask.apply(None)
        mean = statistics.mean(found)
        return {
            "num_kept": NUM_KEPT,
            "seeds": list(SEEDS),
            "ppl": found,
            "mean_ppl": mean,
            "unmasked_ppl": unmasked,
            "rise": mean / unmasked - 1,
        }


def prompts_of(packs: Path, pack: str) -> list[Prompt]:
    """All conversations of a pack that can be cut into a prompt and a reference, in order."""
    cut = (cut_prompt(text, row) for row, text in enumerate(read_rows(pack_files(packs)[pack])))
    return [prompt for prompt in cut if prompt is not None]


def answers(model: Any, tokenizer: Any, packs: Path, max_new_tokens: int, advance: Advance) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tool calls, samples): both JSON-ready."""
    prompts = {pack: prompts_of(packs, pack) for pack in PACKS}
    calling = [
        prompt for prompt in prompts[TOOLS] if any(message.recipient for message in parse_messages(prompt.reference, f"row {prompt.row}"))
    ][:CALL_PROMPTS]  # fmt: skip
    asked = {pack: some[:SAMPLES] for pack, some in prompts.items()}
    flat = [*calling, *itertools.chain.from_iterable(asked.values())]
    texts = iter(generate(model, tokenizer, [prompt.text for prompt in flat], max_new_tokens, progress=advance))
    calls = judge_calls(calling, list(itertools.islice(texts, len(calling))))
    samples = {
        pack: [{"row": prompt.row, "prompt": prompt.text, "generated": next(texts), "reference": prompt.reference} for prompt in some]
        for pack, some in asked.items()
    }
    return calls, samples


def measure(
    child: Path, parent: Path | None, second: Path | None, packs: Path, tokenizer: Path, ngram: Path | None, num_blocks: int,
    batch_size: int, max_new_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """All figures; a part whose input is None is None in the document.

    Args:
        child, parent, second: checkpoint folders: MXFP4, its BF16 parent, and one of another seed.
        packs, tokenizer: folders.
        ngram: the document of `baseline`.
        num_blocks: blocks of each pack, the first ones.
        batch_size: blocks in one pass.
        max_new_tokens: of a sample.
        progress: where the bar goes.

    Raises:
        SoftpruneError: an input is not what it should be.
    """
    tok = load_tokenizer(tokenizer)
    blocks = heldout_blocks(packs, tok, num_blocks)
    known = None if ngram is None else json.loads(ngram.read_text(encoding="utf-8"))
    reference = {} if known is None else {pack: perplexity_on(known, pack, some, str(ngram)) for pack, some in blocks.items()}
    passes = len(blocks) + len(SEEDS) + (parent is not None) + (second is not None) * len(PACKS)
    task = progress.add_task("blocks", total=num_blocks * passes)

    def measurer(folder: Path) -> Measurer:
        config = read_config(folder)
        if config.get("vocab_size", 0) < len(tok):
            raise InputError(str(folder / "config.json"), "vocab_size", str(config.get("vocab_size")), f"the {len(tok)} of {tokenizer}")
        spec = spec_of(config, str(folder / "config.json"))
        return Measurer(load_reference(folder), spec, blocks, batch_size, lambda done: progress.update(task, advance=done))

    subject = measurer(child)
    ppl, routing = subject.perplexities_and_routing()
    pruning = subject.pruning(ppl[UNION])
    storage = None
    if parent is not None:
        bf16 = measurer(parent).perplexity(UNION)
        storage = {"bf16_ppl": bf16, "mxfp4_ppl": ppl[UNION], "relative": ppl[UNION] / bf16 - 1}
    seed = None
    if second is not None:
        other = measurer(second)
        others = {pack: other.perplexity(pack) for pack in PACKS}
        orders = [sorted(PACKS, key=lambda pack: found[pack]) for found in (ppl, others)]
        seed = {"ppl": others, "order": orders[1], "first_order": orders[0], "same_order": orders[0] == orders[1]}
    generating = progress.add_task("answers", total=None)
    calls, samples = answers(subject.model, tok, packs, max_new_tokens, lambda done: progress.update(generating, advance=done))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "settings": {"seq_len": CONTEXT, "num_blocks": num_blocks, "dtype": "float32", "max_new_tokens": max_new_tokens},
        "fingerprint": fingerprint_of_checkpoint(child),
        "ngram": known and {"model": known["model"], "library": known["library"], "training": known["training"]},
        "perplexity": {
            pack: {
                "ppl": ppl[pack], "ngram_ppl": reference.get(pack), "ratio": ppl[pack] / reference[pack] if reference else None,
                "kept_tokens": some.num_kept, "rows_seen": some.rows_seen, "rows_sha256": some.rows_sha256,
            }
            for pack, some in blocks.items()
        },
        "routing": routing, "pruning": pruning, "storage": storage, "second_seed": seed, "tool_calls": calls, "samples": samples,
    }  # fmt: skip
    return {**document, "bars": [bar.record() for bar in bars(document)]}


def main(
    child: Annotated[Path, typer.Option(help="MXFP4 checkpoint.")] = Path("bench/tiny/weights"),
    parent: Annotated[Path | None, typer.Option(help="Its BF16 parent.")] = None,
    second_seed: Annotated[Path | None, typer.Option(help="A checkpoint of another seed.")] = None,
    packs: Annotated[Path, typer.Option(help="Folder of the held-out packs.")] = Path("bench/tiny/packs"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = Path("bench/tiny/tokenizer"),
    ngram: Annotated[Path | None, typer.Option(help="Document of softprune.bench.tiny.baseline.")] = None,
    curve: Annotated[Path | None, typer.Option(help="curve.json of training; drawn beside the document.")] = None,
    out: Annotated[Path, typer.Option(help="The document.")] = Path("bench/results/tiny.json"),
    num_blocks: Annotated[int, typer.Option(help="Blocks of each pack, the first ones.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Blocks in one pass.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    threads: Annotated[int, typer.Option(help="Of PyTorch; more than one only on a machine that does nothing else.")] = 1,
) -> None:
    """Measure, write the document, and show the bars; exit status 1 if one is not cleared."""
    console = Console(stderr=True)
    # On a busy machine, small products wait for each other's threads a hundred times longer than they take.
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        points = None if curve is None else read_curve(curve)
        with Progress(*columns, console=console) as progress:
            document = measure(child, parent, second_seed, packs, tokenizer, ngram, num_blocks, batch_size, max_new_tokens, progress)
    except SoftpruneError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(2) from None
    write_whole(out, json.dumps(document, ensure_ascii=False) + "\n")
    if points is not None:
        plot_curve(
            points,
            {pack: entry["ngram_ppl"] for pack, entry in document["perplexity"].items() if entry["ngram_ppl"]},
            out.with_suffix(".svg"),
        )
    found = bars(document)
    console.print(table(found))
    raise typer.Exit(0 if all(bar.passed for bar in found) else 1)


if __name__ == "__main__":
    typer.run(main)
