"""`softprune plan`, `softprune rewrite` and `softprune verify`: a smaller checkpoint from a mask."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softprune import mask as mask_file
from softprune.checkpoint.copying import BUFFER_BYTES, WORKERS
from softprune.checkpoint.estimate import Estimate, estimate
from softprune.checkpoint.plan import RewritePlan, plan_rewrite
from softprune.checkpoint.rewrite import MARGIN_BYTES, check_room, execute
from softprune.checkpoint.verify import verify_checkpoint
from softprune.options import whole_numbers
from softprune.report.progress import tensor_progress
from softprune.report.sizes import readable

console = Console(highlight=False)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder: gpt-oss (MXFP4 or BF16), Qwen3-MoE or Mixtral.")]
MaskFile = Annotated[Path, typer.Argument(metavar="MASK", help="Expert mask file.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")]
ShardSize = Annotated[str, typer.Option(help="Largest shard: bytes, or with KB, MB, GB (decimal), KiB, MiB, GiB.")]
PadTo = Annotated[
    int | None, typer.Option(metavar="N", help="Fill each layer up to N experts with some that no token can reach; gpt-oss only.")
]
Layers = Annotated[str | None, typer.Option(help="Only these decoder layers, e.g. 0,18: a dry run that can be verified but not served.")]
Workers = Annotated[int, typer.Option(min=1, help="Shards handled at a time; each takes a core.")]
Force = Annotated[bool, typer.Option("--expert-mask-force", help="Accept a mask made for other weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def rewrite_command(
    model: Model,
    mask: MaskFile,
    out: Out,
    max_shard_size: ShardSize = "5GB",
    pad_to: PadTo = None,
    layers: Layers = None,
    workers: Workers = WORKERS,
    recipe: Annotated[Path | None, typer.Option(help="Recipe to take along, as recipe.yaml.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base model's Hub name, for the card; else guessed from MODEL's path.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare every byte with the source before the folder gets its name.")] = True,
    force: Force = False,
) -> None:
    """Write a checkpoint with only the experts that a mask keeps, byte for byte.

    The folder appears when it is whole, and not before. Weights in other forms, such as original/, are not taken along.
    """
    plan = _plan(model, mask, max_shard_size, pad_to, layers, force)
    begun = time.monotonic()
    with tensor_progress(plan.bytes_written * (2 if verify else 1), console) as progress:
        execute(plan, out, workers, recipe, base_model, verify, progress)
    seconds = time.monotonic() - begun
    what = f"{readable(plan.bytes_written)} in {_count(len(plan.shards), 'shard')}, {plan.mask.summary}"
    console.print(f"{out}: {what}, {'verified, ' if verify else ''}{seconds:.1f} s", markup=False, soft_wrap=True)
    _tell_left_out(plan)


def verify_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint that was rewritten.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What it was rewritten to.")],
    workers: Workers = WORKERS,
) -> None:
    """Prove that a rewritten checkpoint holds the source's bytes and nothing else; exits with 1 if it does not."""
    total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    with tensor_progress(total, console) as progress:
        found = verify_checkpoint(source, out, workers, progress)
    for problem in found.problems[:20]:
        console.print(f"[bold red]wrong:[/] {escape(str(problem))}", soft_wrap=True)
    if found.problems:
        more = len(found.problems) - 20
        console.print(f"{out}: not a rewrite of {source}{f', and {more} problems more' if more > 0 else ''}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    padding = f", {found.num_padding} of padding out of reach" if found.num_padding else ""
    what = f"{found.num_tensors} tensors, {found.num_experts} experts kept{padding}, {readable(found.num_bytes)}"
    console.print(f"{out}: {what}: every byte is that of {source}, and every file has its hash", markup=False, soft_wrap=True)


def plan_command(
    model: Model,
    mask: MaskFile,
    out: Annotated[Path | None, typer.Option(help="Where it would be written, for the probe and the free space; else here.")] = None,
    max_shard_size: ShardSize = "5GB",
    pad_to: PadTo = None,
    layers: Layers = None,
    workers: Workers = WORKERS,
    probe: Annotated[bool, typer.Option(help="Write and delete 128 MB a worker, to estimate the time.")] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say what a rewrite would read, write and take, without doing it."""
    plan = _plan(model, mask, max_shard_size, pad_to, layers, force)
    if out is not None:
        check_room(plan, out)
    place = Path.cwd() if out is None else next(folder for folder in out.absolute().parents if folder.is_dir())
    found = estimate(plan, place, workers) if probe else None
    free = shutil.disk_usage(place).free
    if as_json:
        console.print_json(json.dumps(_document(plan, workers, found, free)))
        return
    _show(plan, workers, found, free)
    _tell_left_out(plan)


def _plan(model: Path, mask: Path, max_shard_size: str, pad_to: int | None, layers: str | None, force: bool) -> RewritePlan:
    chosen = None if layers is None else whole_numbers("--layers", layers, "0,18")
    plan = plan_rewrite(model, mask_file.load(mask), str(mask), _bytes(max_shard_size), pad_to, chosen, force)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    return plan


def _document(plan: RewritePlan, workers: int, found: Estimate | None, free: int) -> dict[str, Any]:
    shards = {info.shard.name for info in plan.index.tensors.values()}
    return {
        "family": plan.family.name,
        "experts": [plan.spec.num_experts, plan.num_experts],
        "top_k": [plan.spec.top_k, plan.top_k],
        "kept": plan.mask.num_kept,
        "source_bytes": plan.index.num_bytes,
        "source_shards": len(shards),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "router_and_expert_bytes": plan.pruned_bytes(),
        "shards_written": [sum(tensor.num_bytes for tensor in shard) for shard in plan.shards],
        "other_files": [name for name, _ in plan.side.copied],
        "left_out": list(plan.side.left_out),
        "shards_touched": {str(layer): plan.shards_touched(layer) for layer in plan.moe_layers},
        "buffer_bytes": BUFFER_BYTES * min(workers, len(plan.shards)),
        "free_bytes": free,
        "fits": free >= plan.bytes_written + MARGIN_BYTES,
        "estimate": found and {"probed_bytes": found.probed_bytes, "probed_seconds": found.probed_seconds, "seconds": found.seconds},
    }


def _show(plan: RewritePlan, workers: int, found: Estimate | None, free: int) -> None:
    spec, facts = plan.spec, _document(plan, workers, found, free)
    padding = "" if plan.pad_to is None else f", filled up to {plan.pad_to}"
    source, new = _count(facts["source_shards"], "shard"), _count(len(plan.shards), "shard")
    time_text = "not probed"
    if found:
        speed, tried = readable(found.bytes_per_second), readable(found.probed_bytes)
        time_text = f"about {found.seconds:.0f} s at {speed}/s, from {tried} that were tried"
    rows = {
        "source": f"{plan.family.name}, {spec.num_layers} MoE layers of {spec.num_experts} experts, {readable(plan.index.num_bytes)}",
        "mask": f"{plan.mask.summary}{padding}, top_k {plan.top_k}",
        "reads": f"{readable(plan.bytes_read)} of {source} and {_count(len(plan.side.copied), 'other file')}",
        "writes": f"{readable(plan.bytes_written)} in {new}, {readable(plan.pruned_bytes())} of it routers and experts",
        "memory": f"{readable(facts['buffer_bytes'])} of buffers beside the interpreter, {_count(workers, 'worker')}",
        "time": time_text,
        "disk": f"{readable(free)} free, {'enough' if facts['fits'] else 'too little'}",
    }
    for name, value in rows.items():
        console.print(f"{name:<7} {value}", soft_wrap=True, markup=False)
    table = Table("layer", "kept", "source shards that hold its experts", box=None)
    for layer, shards in facts["shards_touched"].items():
        table.add_row(layer, str(len(plan.kept(int(layer)))), ", ".join(shards))
    console.print(table)


def _tell_left_out(plan: RewritePlan) -> None:
    if plan.side.left_out:
        console.print(f"left out: {', '.join(plan.side.left_out)}", markup=False, soft_wrap=True)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise typer.BadParameter(f"found {text!r}; expected a size such as 5GB, 500MB or 2GiB", param_hint="--max-shard-size")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
