"""`softprune eval`, `softprune noise-floor` and `softprune no-op`: what a running server's model is worth, and how much of it is noise."""

from __future__ import annotations

import shlex
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError
from softprune.server_client import ServerClient

if TYPE_CHECKING:  # pyarrow, without which the other commands start
    from softprune.evaluate.eval_packs import PackSet
    from softprune.evaluate.eval_recipe import EvalRun
    from softprune.evaluate.evaluate import EvalSettings
    from softprune.evaluate.gates import Gates

console = Console(highlight=False)


class Side(str, Enum):
    """Of a recipe's pair."""

    left = "left"
    right = "right"


class Form(str, Enum):
    """Of blocks."""

    plain = "L"
    one_more = "L+1"


Url = Annotated[str, typer.Option(help="The server, SGLang or vLLM, with softprune or without; e.g. http://127.0.0.1:30000.")]
Packs = Annotated[list[Path] | None, typer.Option(metavar="PACK.parquet …", help="Harmony conversations, one a row of the column text.")]
MorePacks = Annotated[list[Path] | None, typer.Argument(metavar="PACK.parquet", hidden=True)]
Recipe = Annotated[Path | None, typer.Option(metavar="YAML", help="Recipe of an evaluation; what options say goes before it.")]
Run = Annotated[str | None, typer.Option(help="Only this run of the recipe's matrix; else all, each in OUT with its name.")]
OfPair = Annotated[Side | None, typer.Option(help="Which model of the recipe's pair the server serves.")]
SeqLens = Annotated[str | None, typer.Option(metavar="L,L…", help="Tokens in a block; 1024,2048 if nothing is said.")]
NumBlocks = Annotated[int | None, typer.Option(min=1, help="Blocks of each pack at each length; 512 if nothing is said.")]
Budget = Annotated[int | None, typer.Option(min=1, metavar="N", help="Instead, tokens of each pack at each length: N // L blocks.")]
BlockForm = Annotated[Form | None, typer.Option(help="Blocks of L ids, or of L+1, of which L are predicted; never comparable.")]
NoUnion = Annotated[bool, typer.Option("--no-union", help="Leave out UNION, one conversation of each pack in turn.")]
Tokenizer = Annotated[str | None, typer.Option(metavar="DIR", help="Else the server's, as it names it.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests at once; 8 if nothing is said.")]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder for both evaluations and the verdict; what is there is gone on with.")]
Thresholds = Annotated[str | None, typer.Option("--gates", help="Thresholds, as `softprune gate` takes them.")]
Label = Annotated[str | None, typer.Option(help="What the file calls the model; else the last part of its path.")]
Key = Annotated[str | None, typer.Option(help="softprune's key; else SOFTPRUNE_KEY, else the one that a server on this machine left.")]
EngineKey = Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key, if it was started with one.")]


def eval_command(
    url: Url,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; OUT.parts is kept beside it meanwhile.")],
    packs: Packs = None,
    more_packs: MorePacks = None,
    recipe: Recipe = None,
    run: Run = None,
    side: OfPair = None,
    seq_lens: SeqLens = None,
    num_blocks: NumBlocks = None,
    token_budget: Budget = None,
    block_form: BlockForm = None,
    data_seed: Annotated[int | None, typer.Option(help="Take the packs' rows in this seed's order; else in the files' own.")] = None,
    no_union: NoUnion = False,
    tokenizer: Tokenizer = None,
    concurrency: Concurrency = None,
    label: Label = None,
    key: Key = None,
    engine_key: EngineKey = None,
) -> None:
    """Score packs through a running server, teacher-forced, and write perplexity, confidence and entropy of each pack at each length.

    Interrupted, the same command goes on where it was. A mask that is switched in the middle is an error.
    """
    from softprune.evaluate.eval_recipe import EvalRun, read_eval_recipe
    from softprune.evaluate.eval_shown import evaluated, shown
    from softprune.evaluate.served import ask_served, mask_name

    errors, client = Console(stderr=True), ServerClient(url, key, engine_key=engine_key)
    runs = [EvalRun()] if recipe is None else read_eval_recipe(recipe, None if side is None else side.value)
    if run is not None and run not in (names := [one.name for one in runs]):
        raise InputError("--run", "", run, f"one of {', '.join(filter(None, names)) or 'none: the recipe has no run_matrix'}")
    chosen = [one for one in runs if run in (None, one.name)]
    for one in chosen:
        one = _overridden(one, [*(packs or []), *(more_packs or [])], seq_lens, num_blocks, token_budget, block_form, concurrency, label)
        served = ask_served(client)
        if one.top_k is not None and served.top_k not in (None, one.top_k):
            raise InputError(client.url, "top_k", str(served.top_k), f"{one.top_k}, as {recipe} says")
        blocks = _packs(one, tokenizer or served.tokenizer, not no_union, errors, data_seed)
        place = out if len(chosen) == 1 else out.with_name(f"{out.stem}.{one.name}{out.suffix}")
        found = evaluated(client, blocks, place, _settings(one), errors, _tell)
        console.print(shown(found))
        _tell(f"{place}: {found.label}, mask {mask_name(found.own['mask'], found.own['fingerprint'])}")


def noise_floor_command(
    url: Url,
    out: Folder,
    packs: Packs = None,
    more_packs: MorePacks = None,
    recipe: Recipe = None,
    seq_lens: SeqLens = None,
    num_blocks: NumBlocks = None,
    token_budget: Budget = None,
    block_form: BlockForm = None,
    no_union: NoUnion = False,
    tokenizer: Tokenizer = None,
    concurrency: Concurrency = None,
    second_concurrency: Annotated[int, typer.Option(min=1, help="Requests at once the second time.")] = 1,
    thresholds: Thresholds = None,
    label: Label = None,
    key: Key = None,
    engine_key: EngineKey = None,
) -> None:
    """Evaluate what a server serves twice, in other batches, and gate one against the other: how much of a difference is noise.

    Exits as `softprune gate` does.
    """
    from softprune.evaluate.gate_cli import exits_as_gate, show
    from softprune.evaluate.noise import noise_floor
    from softprune.evaluate.served import ask_served

    files, errors = [*(packs or []), *(more_packs or [])], Console(stderr=True)
    with exits_as_gate(errors):
        gates, client = _gates(thresholds), ServerClient(url, key, engine_key=engine_key)
        run = _overridden(_only_run(recipe), files, seq_lens, num_blocks, token_budget, block_form, concurrency, label)
        blocks = _packs(run, tokenizer or ask_served(client).tokenizer, not no_union, errors)
        result = noise_floor(client, blocks, out, _settings(run), gates, second_concurrency, errors, _tell)
    show(result)
    raise typer.Exit(result.exit_code)


def no_op_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder with a tokenizer.")],
    out: Folder,
    packs: Packs = None,
    more_packs: MorePacks = None,
    recipe: Recipe = None,
    seq_lens: SeqLens = None,
    num_blocks: NumBlocks = None,
    token_budget: Budget = None,
    block_form: BlockForm = None,
    no_union: NoUnion = False,
    concurrency: Concurrency = None,
    thresholds: Thresholds = None,
    engine: Annotated[str | None, typer.Option(help="vllm or sglang; else the one that is installed.")] = None,
    engine_args: Annotated[str, typer.Option(help="Further arguments of the engine's command line.")] = "",
) -> None:
    """Rewrite a checkpoint with all of its experts, serve both, and gate one against the other: rewriting alone changes nothing.

    Exits as `softprune gate` does.
    """
    from softprune.checkpoint.families import read_config
    from softprune.evaluate.gate_cli import exits_as_gate, show
    from softprune.evaluate.noise import no_op

    files, errors = [*(packs or []), *(more_packs or [])], Console(stderr=True)
    with exits_as_gate(errors):
        gates = _gates(thresholds)
        run = _overridden(_only_run(recipe), files, seq_lens, num_blocks, token_budget, block_form, concurrency, None)
        read_config(model)  # else the Hub is asked for a tokenizer of this name
        blocks = _packs(run, str(model), not no_union, errors)
        result = no_op(model, blocks, out, _settings(run), gates, engine, shlex.split(engine_args), errors, _tell)
    show(result)
    raise typer.Exit(result.exit_code)


def _packs(run: EvalRun, tokenizer: str, with_union: bool, errors: Console, data_seed: int | None = None) -> PackSet:
    from softprune.evaluate import eval_packs

    with errors.status("packs") as status:
        return eval_packs.load(run.packs, tokenizer, run.sizes, with_union, run.column, run.union_name, status.update, data_seed)


def _settings(run: EvalRun) -> EvalSettings:
    from softprune.evaluate.evaluate import EvalSettings

    return EvalSettings(run.metrics, label=run.label, **_given(concurrency=run.concurrency))


def _only_run(recipe: Path | None) -> EvalRun:
    from softprune.evaluate.eval_recipe import EvalRun, read_eval_recipe

    runs = [EvalRun()] if recipe is None else read_eval_recipe(recipe)
    if len(runs) > 1:
        raise InputError(str(recipe), "run_matrix", f"{len(runs)} runs", "one")
    return runs[0]


def _gates(thresholds: str | None) -> Gates:
    from softprune.evaluate import gates

    return gates.read(thresholds or gates.NEAR_LOSSLESS)


def _overridden(
    run: EvalRun, packs: list[Path], lengths: str | None, num_blocks: int | None, token_budget: int | None, form: Form | None,
    concurrency: int | None, label: str | None,
) -> EvalRun:  # fmt: skip
    """The run with what options say instead."""
    from softprune.evaluate.eval_recipe import seq_lens_of

    if num_blocks is not None and token_budget is not None:
        raise InputError("--token-budget", "", "--num-blocks as well", "one of the two")
    sizes = _given(
        seq_lens=None if lengths is None else seq_lens_of(lengths), num_blocks=num_blocks, token_budget=token_budget,
        form=None if form is None else form.value,
    )  # fmt: skip
    if num_blocks is not None:
        sizes["token_budget"] = None
    changes = _given(packs=tuple(packs) or None, concurrency=concurrency, label=label)
    return replace(run, sizes=replace(run.sizes, **sizes), **changes)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _tell(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)
