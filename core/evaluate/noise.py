"""How much of a difference is noise: one model against itself, and against a checkpoint that was rewritten and lost nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.plan import plan_rewrite
from softprune.checkpoint.rewrite import execute
from softprune.checkpoint.verify import verify_checkpoint
from softprune.errors import InputError
from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.eval_shown import evaluated
from softprune.evaluate.evaluate import EvalSettings
from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.gate_result import GateResult
from softprune.evaluate.gates import Gates
from softprune.evaluate.pair import compare
from softprune.files import write_whole
from softprune.mask_forms import build
from softprune.recipe.collect import installed_engine, servable, serving
from softprune.report.progress import tensor_progress
from softprune.server_client import ServerClient

Tell = Callable[[str], None]
_SHUFFLE = 1


def noise_floor(
    client: ServerClient, packs: PackSet, folder: Path, settings: EvalSettings, gates: Gates, second: int, errors: Console, tell: Tell
) -> GateResult:
    """Evaluate what a server serves twice, so that its blocks meet other blocks in the engine's batches, and gate one against the other.

    Args:
        client, packs, settings: as `evaluate` takes them.
        folder: gets first.json, second.json and gate.json; what an interrupted call left there is gone on with.
        gates: thresholds.
        second: requests at once the second time, when blocks come in another order as well.
        errors: where bars are drawn.
        tell: told warnings, and what was there already.

    Raises:
        SoftpruneError: as `evaluate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    label = settings.label or "served"
    first = replace(settings, label=f"{label}, {settings.concurrency} at once")
    other = replace(settings, label=f"{label}, {second} at once, in another order", concurrency=second, order=_SHUFFLE)
    made = (("first", first), ("second", other))
    pair = [evaluated(client, packs, folder / f"{name}.json", one, errors, tell, once=True) for name, one in made]
    return _gated(pair, gates, folder)


def no_op(
    model: Path, packs: PackSet, folder: Path, settings: EvalSettings, gates: Gates, engine: str | None, engine_args: Sequence[str],
    errors: Console, tell: Tell,
) -> GateResult:  # fmt: skip
    """Rewrite a checkpoint with all of its experts, serve both by the engine that is installed, and gate one against the other.

    Args:
        model: checkpoint folder.
        packs, settings: as `evaluate` takes them.
        folder: gets rewritten/, base.json, rewritten.json and gate.json; what an interrupted call left there is gone on with.
        gates: thresholds.
        engine: "vllm" or "sglang"; None for the one that is installed.
        engine_args: further arguments of its command line.
        errors: where bars are drawn.
        tell: told what is done.

    Raises:
        SoftpruneError: a step failed.
    """
    name, rewritten = engine or installed_engine(), folder / "rewritten"
    folder.mkdir(parents=True, exist_ok=True)
    _rewrite_whole(model, rewritten, errors, tell)
    longest = max(blocks.ids.shape[1] for by_length in packs.cells.values() for blocks in by_length.values())
    pair = []
    for label, place in (("base", model), ("rewritten", rewritten)):
        with servable(place) as served, serving(name, served, longest, ["--softprune-control", *engine_args]) as client:
            tell(f"{label}: served by {name}")
            pair.append(evaluated(client, packs, folder / f"{label}.json", replace(settings, label=label), errors, tell, once=True))
    return _gated(pair, gates, folder)


def _rewrite_whole(model: Path, rewritten: Path, errors: Console, tell: Tell) -> None:
    spec = spec_of(read_config(model), str(model / "config.json"))
    rows = [list(range(spec.num_experts))] * spec.num_layers
    mask = build(spec, rows, fingerprint_of_checkpoint(model), {"method": "keep all"}, "keep all")
    with tensor_progress(None, errors) as progress:
        if not rewritten.exists():
            execute(plan_rewrite(model, mask, "keep all"), rewritten, progress=progress)
            tell(f"rewrite: {rewritten}, {mask.summary}; verified byte for byte")
            return
        if problems := verify_checkpoint(model, rewritten, progress=progress).problems:
            raise problems[0]
    config = read_config(rewritten)
    if spec_of(config, str(rewritten / "config.json")) != spec:
        raise InputError(str(rewritten), "", "a checkpoint with fewer experts", f"all of {model}'s, or no such folder")
    tell(f"rewrite: skipped, {rewritten} is there; verified again, byte for byte")


def _gated(pair: Sequence[Evaluation], gates: Gates, folder: Path) -> GateResult:
    result = compare(pair[0], pair[1], gates)
    write_whole(folder / "gate.json", result.dump())
    return result
