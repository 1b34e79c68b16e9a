"""The whole story on a laptop: a small gpt-oss, a mask, and a real vLLM that never routes to a pruned expert.

    make demo

Takes the small trained gpt-oss of this repository (dequantised: CPUs have no kernels for MXFP4) and a mask that keeps 24 of its
32 experts, serves it without and with the mask, sends both the same requests over HTTP and prints what the routers selected. Then it
measures how fast the masked server decodes, without the probe that watched its routers, and prints the report.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from softprune import mask as mask_file
from softprune.bench.server import Server, free_port, vllm_command
from softprune.bench.tiny.weights import TRAINED
from softprune.control import PREFIX
from softprune.mask import ExpertMask

PROMPTS = [
    "A mixture of experts sends each token to a few of its experts.",
    "What is 7 times 8? It is",
    "def total(values): return",
    '{"name": "search", "arguments": {"query": "weather',
]
REQUESTS, MAX_TOKENS = 64, 48
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
console = Console(highlight=False)


def softprune(*arguments: str) -> None:
    """Run a softprune command, shown as a user would type it."""
    console.print(f"\n[bold]$ softprune {shlex.join(arguments)}[/]")
    subprocess.run([str(Path(sys.executable).parent / "softprune"), *arguments], check=True)


@contextmanager
def served(model: Path, log: Path, *flags: str) -> Iterator[Server]:
    """A vLLM that is ready, by a command that is shown."""
    port = free_port()
    command = vllm_command(model, port, "--enforce-eager", "--max-model-len", "1024", "--dtype", "bfloat16", *flags)
    console.print(f"\n[bold]$ python {shlex.join(command[1:])}[/]")
    start = time.monotonic()
    with Server(command, port, log, "demo", ENV) as server:
        server.wait_ready()
        console.print(f"ready after {time.monotonic() - start:.0f} s")
        yield server


def selected(model: Path, log: Path, *flags: str) -> list[list[int]]:
    """Start vLLM, send the requests, and return how often each router selected each expert."""
    with served(model, log, "--no-enable-prefix-caching", "--softprune-debug-routes", *flags) as server:
        console.print(f"sending {REQUESTS} requests of {MAX_TOKENS} new tokens")

        def complete(number: int) -> int:
            body = {
                "model": str(model),
                "prompt": PROMPTS[number % len(PROMPTS)],
                "max_tokens": MAX_TOKENS,
                "seed": number,
                "ignore_eos": True,
            }
            status, answer = server.request("POST", "/v1/completions", body)
            if status != 200:
                raise SystemExit(f"request {number}: {status} {answer}")
            return int(answer["usage"]["total_tokens"]) - 1  # the last token is sampled, never computed on

        server.request("DELETE", f"{PREFIX}/routes")
        with ThreadPoolExecutor(16) as pool:
            computed = sum(pool.map(complete, range(REQUESTS)))
        status, routes = server.request("GET", f"{PREFIX}/routes")
    if status != 200 or set(routes["tokens"]) != {computed}:
        raise SystemExit(f"the route probe saw {routes} but {computed} tokens were computed")
    return list(routes["counts"])


def report(mask: ExpertMask, runs: dict[str, list[list[int]]]) -> Table:
    """Selections of kept and pruned experts, per layer and run."""
    table = Table(title="Experts selected, by the route probe")
    table.add_column("layer")
    for run in runs:
        for kind in ("kept", "pruned"):
            table.add_column(f"{run}:\n{kind} experts", justify="right")
    sums = [0] * (2 * len(runs))
    for layer in range(mask.model.num_layers):
        pruned = set(mask.pruned(layer))
        cells = []
        for counts in runs.values():
            cells += [sum(n for i, n in enumerate(counts[layer]) if (i in pruned) == is_pruned) for is_pruned in (False, True)]
        sums = [a + b for a, b in zip(sums, cells, strict=True)]
        table.add_row(str(layer), *map(str, cells))
    table.add_section()
    table.add_row("all", *map(str, sums))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, default=Path(".cache/demo"), help="folder for the checkpoint, the mask and the logs")
    place = parser.parse_args().dir.absolute()
    place.mkdir(parents=True, exist_ok=True)
    model, mask_path = place / "trained", place / "keep24.json"
    if not model.exists():
        softprune("checkpoint", "dequantize", str(TRAINED), "--out", str(model))
    softprune("mask", "new", "--model", str(model), "--keep-random", "24", "--seed", "7", "--out", str(mask_path))
    softprune("mask", "show", str(mask_path))
    runs = {
        "unmasked": selected(model, place / "unmasked.log"),
        "masked": selected(model, place / "masked.log", "--expert-mask", str(mask_path)),
    }
    mask = mask_file.load(mask_path)
    console.print()
    console.print(report(mask, runs))
    pruned = sum(runs["masked"][layer][i] for layer in range(mask.model.num_layers) for i in mask.pruned(layer))
    if pruned:
        raise SystemExit(f"pruned experts were selected {pruned} times")
    console.print("[bold green]With the mask, pruned experts were never selected.[/]")
    with served(model, place / "speed.log", "--expert-mask", str(mask_path)) as server:
        sizes = ("--batch", "1,4", "--prompt-tokens", "64", "--max-new-tokens", "64", "--repeats", "3")
        url = ("--url", f"http://127.0.0.1:{server.port}", "--key", server.key)
        softprune("bench", "decode", *url, *sizes, "--out", str(place / "decode.json"))
    softprune("bench", "report", str(place / "decode.json"), "--out", str(place / "report"))


if __name__ == "__main__":
    main()
