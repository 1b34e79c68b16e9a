"""The benchmark matrices on a GPU host, unattended.

    python -m softprune.bench.gpu sglang|vllm|headroom WORK_DIR OUT_DIR [--started] [--limit-s 570] [--only ROW …] [--resume]
    python -m softprune.bench.gpu plan sglang|vllm|headroom|sglang_started|vllm_started
    python -m softprune.bench.gpu figures OUT_DIR

One GPU of 80 GB or more, 45 GB of disk in WORK_DIR, and the engine installed beside softprune; nothing else runs on the GPU. Runs at the
same time, on several GPUs, have folders of their own. A run ends before its limit and prints what is left: run it again with --resume until
nothing is. Also after a kill: rows that are in OUT_DIR are not measured again, and servers that were left behind are ended. Rows of one
OUT_DIR are of one GPU, engine, checkpoint and softprune version (run.json there); a run with another is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from softprune.bench.gpu.figures import write_figures
from softprune.bench.gpu.headroom import Headroom, Shape
from softprune.bench.gpu.launchers import LAUNCHERS, Launcher, VllmCpu
from softprune.bench.gpu.matrix import Matrix
from softprune.bench.gpu.plan import PLANS
from softprune.bench.gpu.session import Budget, Store, alone
from softprune.errors import SoftpruneError
from softprune.signals import ended_in_order

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The benchmark matrices on a GPU host, unattended."
)
Work = Annotated[Path, typer.Argument(metavar="WORK_DIR", help="Folder for checkpoints, masks and logs.")]
Out = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for raw files, one a row.")]
Limit = Annotated[float, typer.Option("--limit-s", help="Seconds that the run may take, preparation and ending of servers included.")]
Only = Annotated[list[str] | None, typer.Option(help="Measure these rows only; may be repeated.")]
Started = Annotated[bool, typer.Option("--started", help="The rows of servers that start with their mask.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the rows that are in OUT_DIR.")]


class Preset(str, Enum):
    """What is measured."""

    full = "full"
    tiny = "tiny"


PresetOption = Annotated[Preset, typer.Option(help="tiny: the small trained model in a vLLM on this machine's CPU, to try the scripts.")]


@app.command()
def sglang(work: Work, out: Out, limit_s: Limit = 570, only: Only = None, resume: Resume = False, started: Started = False) -> None:
    """SGLang: unmasked, masked, rewritten and top_k 2, at batch 1 to 256."""
    _matrix("sglang_started" if started else "sglang", LAUNCHERS["sglang"](), work, out, limit_s, only, resume)


@app.command()
def vllm(
    work: Work, out: Out, limit_s: Limit = 570, only: Only = None, resume: Resume = False, started: Started = False,
    preset: PresetOption = Preset.full,
) -> None:  # fmt: skip
    """vLLM: unmasked, masked, rewritten and top_k 2, at batch 32 and 128."""
    if preset is Preset.tiny and started:
        raise typer.BadParameter("--started is of the full preset; tiny has such rows among its own")
    if preset is Preset.tiny:
        _matrix("tiny", VllmCpu(), work, out, limit_s, only, resume)
    else:
        _matrix("vllm_started" if started else "vllm", LAUNCHERS["vllm"](), work, out, limit_s, only, resume)


@app.command()
def headroom(work: Work, out: Out, limit_s: Limit = 570, only: Only = None, resume: Resume = False) -> None:
    """SGLang: the largest batch with the KV room of a 16 GiB and a 24 GiB card."""
    with ended_in_order(), alone(work, out):
        run = Headroom(LAUNCHERS["sglang"](), Shape(), work.resolve(), _opened(out, resume), Budget(limit_s), only)
        _said({name: run.rows[name] for name in run.run()}, out)


@app.command()
def plan(what: Annotated[str, typer.Argument(help="sglang, vllm, sglang_started, vllm_started, tiny or headroom.")]) -> None:
    """Print the rows, in order, with the seconds that they are thought to take."""
    if what == "headroom":
        rows = Headroom(LAUNCHERS["sglang"](), Shape(), Path(), Store(Path("none")), Budget(0)).rows
        for name, seconds in rows.items():
            typer.echo(f"{seconds:6.0f} s  {name}")
        typer.echo(f"{sum(rows.values()):6.0f} s  and a boot of {Shape().boot_s[1]:.0f} s before each card's searches")
        return
    if what not in PLANS:
        raise typer.BadParameter(f"found {what!r}; expected one of {', '.join(PLANS)}, headroom")
    total = 0.0
    for phase in PLANS[what]():
        names = [served.name for served in phase.servers]
        about = f"{len(names)} servers at once ({', '.join(names)}), {phase.kv_tokens:,} KV tokens each"
        typer.echo(f"{phase.boot_s:6.0f} s  phase {phase.name}: {about}")
        for row in phase.rows:
            typer.echo(f"{row.seconds:6.0f} s    {row.name}")
        total += phase.boot_s + sum(row.seconds for row in phase.rows)
    typer.echo(f"{total:6.0f} s  in all, with one boot of each phase")


@app.command()
def figures(
    out: Out, results: Annotated[Path, typer.Option(help="Folder of the committed files.")] = Path("bench/results")
) -> None:  # fmt: skip
    """Turn a run's raw files into the committed ones and headline figures."""
    for name in write_figures(out, results):
        typer.echo(name)


def _matrix(what: str, launcher: Launcher, work: Path, out: Path, limit_s: float, only: Sequence[str] | None, resume: bool) -> None:
    with ended_in_order(), alone(work, out):
        run = Matrix(launcher, PLANS[what](), work.resolve(), _opened(out, resume), Budget(limit_s), only)
        _said({row.name: row.seconds for row in run.run()}, out)


def _opened(out: Path, resume: bool) -> Store:
    store = Store(out.resolve())
    store.open(resume)
    return store


def _said(left: dict[str, float], out: Path) -> None:
    names = list(left)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    typer.echo(f"rows in {out}; left: {', '.join(names[:8]) or 'none'}{more} (about {sum(left.values()):.0f} s and boots)")


if __name__ == "__main__":
    try:
        app()
    except SoftpruneError as error:
        sys.exit(f"error: {error}")
