"""Measure how fast a running SGLang or vLLM server decodes: the one benchmark client of this project.

A *pass* sends one batch: `batch` requests at once, each with its own prompt, each forced to the same length. Times are taken
when bytes arrive, tokens are counted by the server's own cumulative counts, and a count other than the one asked for is an
error. Passes of a batch are numbered: repeats from 1, warm-up passes 0, -1, ….

Running the same seed twice against one server finds the first run's prompts in its prefix cache; `cached_tokens` shows it.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from softprune import __version__
from softprune.bench.client import DecodeClient
from softprune.bench.errors import BenchmarkError, HttpStatusError, LengthError, ServerGoneError, ServerReportedError, StallError
from softprune.bench.figures import Repeat, Stream, quantiles, spread, summary
from softprune.bench.prompts import Api, Workload, pathless
from softprune.errors import InputError
from softprune.server_client import without_address
from softprune.signals import run_async

__all__ = [
    "BenchmarkError", "DecodeClient", "HttpStatusError", "LengthError", "Repeat", "ServerGoneError", "ServerReportedError",
    "StallError", "Step", "Stream", "Workload", "measure", "quantiles", "spread", "summary",
]  # fmt: skip

FORMAT, VERSION = "softprune.decode-benchmark", 1


@dataclass(frozen=True)
class Step:
    """A finished pass, as `measure` reports it.

    Attributes:
        result: the pass; its `repeat` is 0 or less for warm-up.
        done, total: passes finished, and passes in all.
    """

    result: Repeat
    done: int
    total: int


def measure(
    url: str, workload: Workload, batches: Sequence[int], repeats: int = 3, warmup: int = 1, stream: bool = True, *,
    api: Api | Literal["auto"] = "auto", key: str | None = None, engine_key: str | None = None, gpu: str | None = None,
    notes: Mapping[str, str] | None = None, stall_seconds: float = 60.0, progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every batch size; not for callers inside an event loop.

    Args:
        url, workload, stream, api, key, engine_key, stall_seconds: as for `DecodeClient`.
        batches, repeats, warmup: batch sizes in order; measured and unmeasured passes of each.
        gpu: recorded if neither softprune nor a server on this machine tells.
        notes: recorded as they are, paths shortened.
        progress: called after every pass.

    Returns:
        The raw document, JSON-ready, without host names and paths.

    Raises:
        InputError: no or repeated batch sizes, or a number out of range.
        BenchmarkError: a pass failed; `partial` holds the document with what was measured before it.
    """
    check_sizes(batches, repeats, warmup)
    document = head(FORMAT, VERSION, notes)
    settings = {**asdict(workload), "batches": list(batches), "warmup": warmup, "repeats": repeats, "stream": stream}

    async def run() -> None:
        total = len(batches) * (warmup + repeats)
        done = 0
        async with DecodeClient(url, workload, api, stream, key=key, engine_key=engine_key, stall_seconds=stall_seconds) as client:
            document.update(await about(client, gpu))
            document.update(settings={**settings, "api": client.api, "stall_seconds": stall_seconds}, results=[], error=None)
            for batch in batches:
                finished: list[dict[str, Any]] = []
                for repeat in range(1 - warmup, repeats + 1):
                    result = await client.run_batch(batch, repeat)
                    await client.check_epoch(batch, repeat)
                    done += 1
                    if repeat > 0:
                        finished.append(result.figures())
                        document["results"][len(document["results"]) - (len(finished) > 1) :] = [summary(batch, finished)]
                    if progress:
                        progress(Step(result, done, total))

    try:
        run_async(run())
    except BenchmarkError as error:
        if "results" in document:
            document["error"] = without_address(str(error), {"the server": url})
            error.partial = document
        raise
    return document


def check_sizes(batches: Sequence[int], repeats: int, warmup: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        InputError: no or repeated batch sizes, or a number out of range.
    """
    for name, found, least in (("batches", min(batches, default=0), 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if found < least:
            raise InputError("benchmark", name, str(found), f"at least {least}")
    if len(set(batches)) < len(batches):
        raise InputError("benchmark", "batches", str(list(batches)), "each size once, since a size decides its prompts")


def head(kind: str, version: int, notes: Mapping[str, str] | None) -> dict[str, Any]:
    """How a document of a benchmark begins."""
    return {
        "format": kind,
        "version": version,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "softprune_version": __version__,
        "notes": pathless(notes or {}),
    }


async def about(client: DecodeClient, gpu: str | None) -> dict[str, Any]:
    """What a server says of itself: {"engine", "model", "server_flags", "gpu", "softprune"}, as documents hold it.

    Args:
        client: entered.
        gpu: its device, if neither softprune nor a server on this machine tells.
    """
    status = await client.softprune_status()
    served: dict[str, Any] | None = None
    if status is not None:
        mask = status.get("mask") or {}
        served = {"fingerprint": status.get("fingerprint"), "mask_hash": mask.get("hash"), "num_kept": mask.get("num_kept")}
        served |= {"top_k": status.get("top_k"), "moe_backend": status.get("moe_backend"), "moe_tiles": status.get("moe_tiles")}
    gpu = (status or {}).get("device") or (local_gpus() if client.loopback else None) or gpu
    about = {"engine": client.engine, "model": client.model, "server_flags": client.flags}
    return {**about, "gpu": pathless(gpu), "softprune": pathless(served)}


def local_gpus() -> str | None:
    """Names of this machine's GPUs, as its driver tells them; None if there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(sorted({name.strip() for name in names if name.strip()})) or None
