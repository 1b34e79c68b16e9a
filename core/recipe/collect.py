"""The engine that is installed, started and stopped for one purpose: statistics for `softprune prune --packs`."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from softprune.bench.server import Server, free_port, vllm_command
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.families import family_of, read_config
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate.packing import Blocks, block_hashes
from softprune.recipe.errors import RecipeError
from softprune.report.progress import count_progress
from softprune.server_client import ServerClient
from softprune.signals import ended_in_order
from softprune.stats.collect import Collection, Options
from softprune.stats.collect_packs import load
from softprune.stats.errors import StatisticsError
from softprune.stats.file import read_header
from softprune.stats.header import Mode

ENGINES = ("vllm", "sglang")
START_SECONDS = 900
"""For an engine to load a large model."""
_SPARE_TOKENS = 16
"""Room after a block: an engine may want to generate one token."""


def collect_from_packs(
    model: Path,
    packs: Sequence[Path],
    out: Path,
    mode: Mode,
    *,
    seq_len: int = 1024,
    num_blocks: int | None = None,
    engine: str | None = None,
    engine_args: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
    console: Console | None = None,
) -> None:
    """Replay packs through a server of the model, every token sampled, and write its statistics; skipped if they are there.

    Args:
        model: folder with a tokenizer.
        packs: Parquet files; each one's name is its tag.
        out: statistics file.
        mode: the most that is collected.
        seq_len, num_blocks: of each pack, as `softprune stats collect` takes them.
        engine: "vllm" or "sglang"; None for the one that is installed.
        engine_args: further arguments of the engine's command line.
        tell: told in words what is done.
        console: where a bar is drawn; None draws none.

    Raises:
        RecipeError: no engine is installed, or `out` holds something else.
        SoftpruneError: a pack cannot be read, the engine does not start, or what it counted is not what was sent.
    """
    blocks = load(packs, str(model), seq_len, num_blocks)
    if out.is_file():
        check_collected(out, blocks, mode, fingerprint_of_checkpoint(model))
        tell(f"collect: skipped, {out} is there and holds these packs")
        return
    name = engine or installed_engine()
    flags = ["--softprune-stats", mode, "--softprune-max-tags", str(len(blocks) + 1), *engine_args]
    with servable(model) as folder, serving(name, folder, seq_len, flags) as client:
        collection = Collection(client, blocks, out, Options(mode, None if mode == "router" else 1))
        with count_progress("blocks", collection.num_blocks, console or Console(quiet=True), collection.num_done) as advance:
            collection.run(advance)
    tokens = sum(one.ids.size for one in blocks.values())
    tell(f"collect: {out}, {mode} of {tokens:,} tokens by {name}")


def installed_engine() -> str:
    """The engine that is installed here, vLLM before SGLang.

    Raises:
        RecipeError: none is.
    """
    found = next((name for name in ENGINES if find_spec(name) is not None), None)
    if found is None:
        raise RecipeError("--packs", "", "no engine", f"{' or '.join(ENGINES)} installed beside softprune, or statistics with --stats")
    return found


def engine_command(engine: str, model: Path, port: int, max_tokens: int, flags: Sequence[str]) -> list[str]:
    """The command line that serves a model.

    Raises:
        RecipeError: no engine of this name.
    """
    if engine == "vllm":
        return vllm_command(model.absolute(), port, "--max-model-len", str(max_tokens), "--dtype", "bfloat16", *flags)
    if engine == "sglang":
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model.absolute()), "--host", "127.0.0.1"]
        return [*command, "--port", str(port), "--context-length", str(max_tokens), "--dtype", "bfloat16", *flags]
    raise RecipeError("--engine", "", engine, " or ".join(ENGINES))


@contextmanager
def serving(engine: str, model: Path, seq_len: int, flags: Sequence[str]) -> Iterator[ServerClient]:
    """A server of the model on this machine, with room for blocks of `seq_len` tokens; stopped at the end, whatever signal brings that.

    Raises:
        SoftpruneError: no engine of this name, or it does not start.
    """
    port = free_port()
    command = engine_command(engine, model, port, seq_len + _SPARE_TOKENS, flags)
    with (
        ended_in_order(),
        tempfile.TemporaryDirectory() as logs,
        Server(command, port, Path(logs) / "server.log", secrets.token_hex(16)) as server,
    ):
        server.wait_ready(START_SECONDS)
        yield ServerClient(f"http://127.0.0.1:{port}", server.key)


@contextmanager
def servable(model: Path) -> Iterator[Path]:
    """The model's folder, or on a machine without a GPU a dequantised copy of MXFP4, which CPUs have no kernels for."""
    if torch.cuda.is_available() or family_of(read_config(model), str(model / "config.json")).storage != "mxfp4":
        yield model
        return
    with ended_in_order(), tempfile.TemporaryDirectory() as folder:
        dequantize_checkpoint(model, Path(folder) / "bf16")
        yield Path(folder) / "bf16"


def check_collected(out: Path, blocks: Mapping[str, Blocks], mode: Mode, fingerprint: str) -> None:
    """Refuse statistics that were not collected from these packs, or not through this model's unpruned routers."""
    header = read_header(out)
    for field, there, expected in (("model.fingerprint", header.model.fingerprint, fingerprint), ("mask", header.mask, None)):
        if there != expected:
            raise StatisticsError(str(out), field, str(there), f"{expected}, or no such file")
    held = {data_set.id: sorted(data_set.hashes) for data_set in header.data_sets}
    wanted = {tag: sorted(f"sha256:{digest}" for digest in block_hashes(one)) for tag, one in blocks.items()}
    if held != wanted or mode not in header.modes:
        found = f"statistics of {', '.join(sorted(held))} ({', '.join(header.modes)})"
        raise StatisticsError(str(out), "data_sets", found, f"those of {', '.join(sorted(wanted))} ({mode}), or no such file")
