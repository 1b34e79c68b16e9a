"""A recipe carried out on a running server: from statistics to a checkpoint that was gated as a mask first, and as a checkpoint after.

Everything lies beside the checkpoint, and what is there and is the same is not made again: OUT.stats.safetensors, OUT.scores.yaml,
OUT.mask.json, OUT.base.json and OUT.masked.json with OUT.masked.gate.json, OUT, OUT.rewritten.json with OUT.rewritten.gate.json, and
OUT.rewritten.stats.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.eval_shown import evaluated
from softprune.evaluate.evaluate import EvalSettings
from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.gate_result import GateResult
from softprune.evaluate.gates import Gates
from softprune.evaluate.packing import Blocks
from softprune.evaluate.pair import compare
from softprune.files import write_whole
from softprune.ranking.criterion import FromStatistics
from softprune.ranking.registry import criterion
from softprune.recipe.collect import check_collected, installed_engine, servable, serving
from softprune.recipe.errors import RecipeError
from softprune.recipe.recipe import Recipe
from softprune.recipe.run import Places, Tell, choose, make
from softprune.report.progress import count_progress, tensor_progress
from softprune.server_client import ServerClient
from softprune.server_mask import mask_put_back, switch_obeyed
from softprune.signals import ended_in_order
from softprune.stats.collect import Collection, Options
from softprune.stats.header import Mode


@dataclass(frozen=True)
class Live:
    """What a recipe is carried out with.

    Attributes:
        client: of the server, which runs with `--softprune-stats`.
        calibration: blocks by pack that statistics are collected from.
        scored: what the gates are judged on.
        settings: of evaluations.
        gates: thresholds.
        rewritten: of a server of the rewritten checkpoint; None to have one started here.
        engine, engine_args: which is started, and further arguments of its command line; engine None for the one that is installed.
        rewrite_anyway: also if the mask does not PASS.
    """

    client: ServerClient
    calibration: dict[str, Blocks]
    scored: PackSet
    settings: EvalSettings
    gates: Gates
    rewritten: ServerClient | None = None
    engine: str | None = None
    engine_args: Sequence[str] = ()
    rewrite_anyway: bool = False


def run_live(recipe: Recipe, places: Places, live: Live, tell: Tell, console: Console) -> list[GateResult]:
    """Collect, rank, select, put the mask in force, gate, rewrite, verify, gate the checkpoint, and collect its router statistics.

    The mask stays in force if it passes, whatever becomes of the checkpoint; else, and after an error until then, the one before is put
    back.

    Args:
        recipe, places: as `softprune.recipe.run.run` takes them.
        live: see `Live`.
        tell: told in words what each step did, or that it was skipped.
        console: where bars are drawn.

    Returns:
        The mask's gate, and the checkpoint's; only the first where nothing was rewritten.

    Raises:
        SoftpruneError: a step failed.
    """
    places.out.parent.mkdir(parents=True, exist_ok=True)
    with ended_in_order():
        return _run_live(recipe, places, live, tell, console)


def _run_live(recipe: Recipe, places: Places, live: Live, tell: Tell, console: Console) -> list[GateResult]:
    with mask_put_back(live.client) as restore:
        live.client.switch(None)
        places = replace(places, statistics=places.statistics or _collected(recipe, places, live, tell, console))
        with tensor_progress(None, console) as progress:
            chosen = choose(recipe, places, tell, progress)
        base = _evaluation(live.client, live, places.beside(".base.json"), "base", tell, console)
        switch_obeyed(live.client, chosen.mask, "mask")
        masked = _gated(base, _evaluation(live.client, live, places.beside(".masked.json"), "masked", tell, console), places, live, tell)
        if masked.verdict == "PASS":
            restore.forget()
    tell(f"mask: {chosen.mask.hash[:19]}… {'stays in force' if masked.verdict == 'PASS' else 'was taken back'}")
    if masked.verdict != "PASS" and not live.rewrite_anyway:
        tell("rewrite: left out, since the mask does not pass")
        return [masked]
    with tensor_progress(None, console) as progress:
        make(recipe, places, chosen, tell, progress)
    with _serving_rewritten(places.out, live, tell) as client:
        found = _evaluation(client, live, places.beside(".rewritten.json"), "rewritten", tell, console)
        rewritten = _gated(base, found, places, live, tell)
        _collect(client, live.calibration, places.beside(".rewritten.stats.safetensors"), "router", tell, console)
    return [masked, rewritten]


def _collected(recipe: Recipe, places: Places, live: Live, tell: Tell, console: Console) -> tuple[Path, ...]:
    """Statistics for the recipe's method; none for one that ranks by something else."""
    chosen = None if recipe.method is None else criterion(recipe.method, recipe.parameters)
    if not isinstance(chosen, FromStatistics):
        return ()
    path = places.beside(".stats.safetensors")
    _collect(live.client, live.calibration, path, chosen.mode, tell, console)
    return (path,)


def _collect(client: ServerClient, blocks: dict[str, Blocks], path: Path, mode: Mode, tell: Tell, console: Console) -> None:
    if path.is_file():
        check_collected(path, blocks, mode, client.status()["fingerprint"])
        tell(f"collect: skipped, {path} is there and holds these packs")
        return
    collection = Collection(client, blocks, path, Options(mode, None if mode == "router" else 1))
    with count_progress("blocks", collection.num_blocks, console, collection.num_done) as advance:
        collection.run(advance)
    tell(f"collect: {path}, {mode} of {sum(one.ids.size for one in blocks.values()):,} tokens")


def _evaluation(client: ServerClient, live: Live, path: Path, label: str, tell: Tell, console: Console) -> Evaluation:
    found = evaluated(client, live.scored, path, replace(live.settings, label=label), console, tell, once=True)
    tell(f"evaluate: {path}, " + ", ".join(f"{pack}@{length} PPL {one.metrics['ppl']:.4g}" for (pack, length), one in found.cells.items()))
    return found


def _gated(base: Evaluation, candidate: Evaluation, places: Places, live: Live, tell: Tell) -> GateResult:
    result = compare(base, candidate, live.gates)
    path = places.beside(f".{candidate.label}.gate.json")
    write_whole(path, result.dump())
    tell(f"gate: {path}, {result.verdict}{': ' + '; '.join(result.problems) if result.problems else ''}")
    return result


@contextmanager
def _serving_rewritten(out: Path, live: Live, tell: Tell) -> Iterator[ServerClient]:
    if live.rewritten is not None:
        found, expected = live.rewritten.status()["fingerprint"], fingerprint_of_checkpoint(out)
        if found != expected:
            raise RecipeError(live.rewritten.url, "fingerprint", found, f"{expected}, that of {out}")
        yield live.rewritten
        return
    name = live.engine or installed_engine()
    longest = max(one.ids.shape[1] for by_length in live.scored.cells.values() for one in by_length.values())
    longest = max(longest, *(one.ids.shape[1] for one in live.calibration.values()))
    flags = ["--softprune-stats", "router", "--softprune-max-tags", str(len(live.calibration) + 1), *live.engine_args]
    with servable(out) as folder, serving(name, folder, longest, flags) as client:
        tell(f"serve: {out} by {name}")
        yield client
