"""`softprune …`: the command line."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softprune import __version__
from softprune import mask as mask_file
from softprune.bench.cli import bench_app
from softprune.checkpoint import cli as rewrite_cli
from softprune.checkpoint import synth as synth_module
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.families import ModelSpec, family_of, read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.presets import PRESETS
from softprune.errors import CheckpointError, MaskError, SoftpruneError, of_system
from softprune.evaluate import cli as evaluate_cli
from softprune.evaluate.gate_cli import GateCommand, gate_command
from softprune.mask import ExpertMask
from softprune.mask_forms import SECTIONS, build, convert
from softprune.options import whole_numbers
from softprune.ranking.cli import rank_command
from softprune.recipe import cli as recipe_cli
from softprune.report.cli import report_command
from softprune.report.keep_map import keep_map
from softprune.report.progress import tensor_progress
from softprune.report.sizes import readable
from softprune.selection.cli import select_command
from softprune.server_cli import selftest, server_app
from softprune.stats.cli import stats_app
from softprune.sweep.cli import sweep_command


class _Group(typer.core.TyperGroup):
    """Shows softprune's own errors as one line, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SoftpruneError as error:
            _fail(ctx, str(error))
        except OSError as error:
            if error.filename is None:
                raise
            _fail(ctx, of_system(error))
        except ModuleNotFoundError as error:
            # Beside an engine, softprune is installed without what it depends on; engines bring most of it, but not plots and Parquet.
            if (error.name or "softprune").startswith("softprune"):
                raise
            _fail(ctx, f"Python package {error.name}: found none here; expected it beside softprune, for this command")


def _fail(ctx: Any, text: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    ctx.exit(2)


_OPTIONS: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "rich"}
app = typer.Typer(
    cls=_Group, add_completion=False, help="Prune the experts of Mixture-of-Experts models while SGLang and vLLM serve them.", **_OPTIONS
)
mask_app = typer.Typer(help="Make, show, check, convert and compare expert masks.", **_OPTIONS)
checkpoint_app = typer.Typer(help="Look at checkpoints, make random ones, dequantise MXFP4.", **_OPTIONS)
app.add_typer(mask_app, name="mask")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")
app.add_typer(server_app, name="server")
app.add_typer(stats_app, name="stats")
app.command("selftest")(selftest)
app.command("rank")(rank_command)
app.command("select")(select_command)
app.command("gate", cls=GateCommand)(gate_command)
app.command("prune")(recipe_cli.prune_command)
app.command("run", cls=GateCommand)(recipe_cli.run_command)
app.command("lock")(recipe_cli.lock_command)
app.command("rewrite")(rewrite_cli.rewrite_command)
app.command("verify")(rewrite_cli.verify_command)
app.command("plan")(rewrite_cli.plan_command)
app.command("eval")(evaluate_cli.eval_command)
app.command("sweep")(sweep_command)
app.command("noise-floor", cls=GateCommand)(evaluate_cli.noise_floor_command)
app.command("no-op", cls=GateCommand)(evaluate_cli.no_op_command)
app.command("report")(report_command)
console = Console(highlight=False)

Model = Annotated[Path, typer.Option("--model", "-m", help="Checkpoint folder (config.json and safetensors).")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
MaskPath = Annotated[Path, typer.Argument(metavar="FILE", help="Expert mask file.")]


def _version(value: bool) -> None:
    if value:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@mask_app.command("new")
def mask_new(
    model: Model,
    out: Out,
    keep_random: Annotated[int | None, typer.Option(help="Keep this many experts a layer, chosen at random.")] = None,
    keep_first: Annotated[int | None, typer.Option(help="Keep the first so many experts of each layer.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep what a file says: a list of lists of ids, or any form that `convert` reads.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for --keep-random.")] = 0,
    top_k: Annotated[int | None, typer.Option(help="Experts per token; without it, the model's own.")] = None,
) -> None:
    """Make a mask for a model, by exactly one of --keep-random, --keep-first and --keep."""
    spec, fingerprint = _model(model)
    if sum(option is not None for option in (keep_random, keep_first, keep)) != 1:
        raise typer.BadParameter("give exactly one of --keep-random, --keep-first and --keep")
    if keep is not None:
        mask = convert(keep, spec, fingerprint, top_k=top_k)
    else:
        number = keep_first if keep_random is None else keep_random
        assert number is not None
        flag = "--keep-first" if keep_random is None else "--keep-random"
        if not 1 <= number <= spec.num_experts:
            raise MaskError(flag, "", str(number), f"from 1 to the model's {spec.num_experts} experts")
        rng = random.Random(seed)
        choose: Callable[[], list[int]] = (
            (lambda: list(range(number))) if keep_random is None else (lambda: rng.sample(range(spec.num_experts), number))
        )
        provenance = {"method": "first"} if keep_random is None else {"method": "random", "seed": seed}
        # With a smaller top_k fewer experts may stay, so it has to be known when the rules are checked.
        mask = build(spec, [choose() for _ in spec.moe_layers], fingerprint, provenance, flag, top_k)
    mask.save(out)
    console.print(f"{out}: {_kept(mask)}, {mask.hash[:19]}…")


@mask_app.command("show")
def mask_show(file: MaskPath) -> None:
    """Draw a mask: one row a layer, one cell an expert."""
    mask = mask_file.load(file)
    console.print(keep_map(mask, console.width))
    fingerprint = "none" if mask.model.fingerprint is None else f"{mask.model.fingerprint[:19]}…"
    console.print(f"{mask.model.architecture}, fingerprint {fingerprint}, mask {mask.hash[:19]}…")
    if mask.provenance:
        console.print(f"provenance: {mask.provenance}", markup=False)


@mask_app.command("check")
def mask_check(
    file: MaskPath, model: Model, force: Annotated[bool, typer.Option(help="Accept a mask made for other weights.")] = False
) -> None:
    """Check a mask against every rule, and against a model's shape and fingerprint."""
    mask = mask_file.load(file)
    spec, fingerprint = _model(model)
    mask.check_model(spec, str(file))
    warning = mask.check_fingerprint(fingerprint, str(file), force)
    if warning:
        console.print(f"[yellow]warning:[/] {escape(str(warning))}")
    console.print(f"{file}: fits {model}; {_kept(mask)}")


@mask_app.command("convert")
def mask_convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A mask or ranking in another form.")],
    model: Model,
    out: Out,
    keep_n: Annotated[int | None, typer.Option(help="Experts to keep a layer; for rankings.")] = None,
    section: Annotated[str, typer.Option(help=f"Part of a topical ranking: {' or '.join(SECTIONS)}.")] = "think",
) -> None:
    """Turn another form of mask or ranking into an expert mask.

    Reads keep_by_layer JSON, a list of lists, a rewritten checkpoint's expert_mapping.json, REAP scores YAML, and the
    topical rankings of GPT-OSS-MoE-ExpertFingerprinting.
    """
    if section not in SECTIONS:
        raise typer.BadParameter(f"found {section!r}; expected {' or '.join(SECTIONS)}", param_hint="--section")
    spec, fingerprint = _model(model)
    mask = convert(file, spec, fingerprint, keep_n, section)
    mask.save(out)
    console.print(f"{out}: {_kept(mask)}, {mask.hash[:19]}…")


@mask_app.command("diff")
def mask_diff(a: Annotated[Path, typer.Argument(metavar="A")], b: Annotated[Path, typer.Argument(metavar="B")]) -> None:
    """Compare two masks layer by layer; exits with 1 if they route differently."""
    left, right = mask_file.load(a), mask_file.load(b)
    right.check_model(left.model.spec, str(b))
    table = Table("layer", f"only {a.name} keeps", f"only {b.name} keeps", box=None)
    layers = range(left.model.num_layers)
    for layer in layers:
        one, two = set(left.kept(layer)), set(right.kept(layer))
        if one != two:
            table.add_row(str(layer), _ids(one - two), _ids(two - one))
    if table.row_count:
        console.print(table)
    k_differs = [layer for layer in layers if left.layer_top_k(layer) != right.layer_top_k(layer)]
    if k_differs:
        console.print(f"top_k differs: {left.top_k} and {right.top_k}")
    if left.model.fingerprint != right.model.fingerprint:
        console.print("made for different weights (fingerprints differ)")
    if left.hash == right.hash:
        console.print("both masks route alike")
        return
    console.print(f"{table.row_count} of {len(layers)} layers keep different experts")
    raise typer.Exit(1)


@checkpoint_app.command("info")
def checkpoint_info(model: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.")]) -> None:
    """Show what a checkpoint is: family, shape, size, fingerprint."""
    config = read_config(model)
    source = str(model / "config.json")
    family, spec, index = family_of(config, source), spec_of(config, source), TensorIndex(model)
    present = [layer for layer in spec.moe_layers if family.router_weight.format(layer=layer) in index]
    part = "" if len(present) == spec.num_layers else f", a part: {_ids(set(present))} present"
    shards = {info.shard for info in index.tensors.values()}
    experts = sum(info.num_bytes for name, info in index.tensors.items() if ".experts." in name)
    rows = {
        "family": family.name,
        "architecture": spec.architecture,
        "MoE layers": f"{spec.num_layers}{part}",
        "experts": f"{spec.num_experts}, top_k {spec.top_k}",
        "tensors": f"{len(index.tensors)} in {len(shards)} shards, {readable(index.num_bytes)}",
        "experts' share": f"{readable(experts)}, {experts / index.num_bytes:.1%}",
        "fingerprint": "none, layers are missing" if part else fingerprint_of_checkpoint(model),
    }
    for name, value in rows.items():
        console.print(f"{name:<15} {value}", soft_wrap=True)


class Storage(str, Enum):
    """Form of the experts."""

    mxfp4 = "mxfp4"
    bf16 = "bf16"


@checkpoint_app.command("synth")
def checkpoint_synth(
    preset: Annotated[str, typer.Argument(help=f"One of {', '.join(PRESETS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    storage: Annotated[Storage, typer.Option(help="Form of the experts.")] = Storage.bf16,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    layers: Annotated[str | None, typer.Option(help="Only these decoder layers, e.g. 0,18: a part of a large model.")] = None,
) -> None:
    """Write a random but valid checkpoint, with a small tokenizer that knows the Harmony tokens."""
    chosen = None if layers is None else whole_numbers("--layers", layers, "0,18")
    with tensor_progress(None, console) as progress:
        synth_module.synth_checkpoint(preset, out, storage.value, seed, chosen, progress=progress)
    console.print(f"{out}: {preset}, {storage.value}, seed {seed}, {readable(TensorIndex(out).num_bytes)}")


@checkpoint_app.command("dequantize")
def checkpoint_dequantize(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="MXFP4 checkpoint folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
) -> None:
    """Turn MXFP4 experts into BF16, value for value as Transformers does, for machines without MXFP4 kernels."""
    with tensor_progress(None, console) as progress:
        dequantize_checkpoint(model, out, progress=progress)
    console.print(f"{out}: {readable(TensorIndex(out).num_bytes)}")


def _model(model: Path) -> tuple[ModelSpec, str]:
    if not model.is_dir():
        raise CheckpointError(str(model), "", "no such folder", "a checkpoint folder")
    return spec_of(read_config(model), str(model / "config.json")), fingerprint_of_checkpoint(model)


def _kept(mask: ExpertMask) -> str:
    top_k = "" if mask.top_k is None else f", top_k {mask.top_k}"
    return f"{mask.summary} in {mask.model.num_layers} layers{top_k}"


def _ids(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "-"
