"""Masked gpt-oss of the 20B shape in MXFP4 on a GPU: what the CPU tests claim, on the fused kernels, and its speed.

    python -m tests.gpu.prove ENGINE WORK_DIR OUT.json [--seconds 560] [--parallel 5] [--cpu]

Starts real servers by the commands that users type, several at a time, each with its share of the GPU's memory; speed is
measured on one while the others idle, in turns. Goes on where an earlier run was cut off: what a server answered lies in
WORK_DIR/results. `--cpu` is the same with a tiny model on this machine's CPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from softprune import mask as mask_file
from softprune.bench.decode import Workload, measure
from softprune.bench.server import Server, ServerError, free_port
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.mask_forms import build
from tests.conftest import random_mask, random_prompts, saved
from tests.gpu import compare
from tests.gpu.engines import ENGINES, Engine, Row, versions

PROMPT_TOKENS, MAX_TOKENS, BATCH = 128, 4, 32
ROUNDS = 3
BOOT_SECONDS = 330
"""A server that is not up by then is not waited for: the others of its batch hold the GPU meanwhile."""


class Proof:
    """One engine's proof in one working folder."""

    def __init__(self, engine: Engine, work: Path, parallel: int, deadline: float) -> None:
        self.engine, self.work, self.parallel, self.deadline = engine, work, parallel, deadline
        self.results = work / "results" / engine.name
        self.results.mkdir(parents=True, exist_ok=True)
        self.prompts = random_prompts(96 if engine.on_gpu else 34, PROMPT_TOKENS, seed=31)
        self.need = 100 if engine.on_gpu else 40
        self.shape = ("gpt-oss-20b", "mxfp4") if engine.on_gpu else ("tiny", "bf16")

    def prepare(self, speed_only: str | None) -> None:
        """Checkpoints and masks."""
        base = self.work / "base"
        if not base.exists():
            synth_checkpoint(self.shape[0], base, self.shape[1], seed=0)
        if not (self.work / "qwen").exists():
            synth_checkpoint("qwen3-moe-tiny", self.work / "qwen", seed=0)
        spec, fingerprint = spec_of(read_config(base)), fingerprint_of_checkpoint(base)
        masks = {
            "keep24": random_mask(base, 24, seed=1),
            "keep19": random_mask(base, 19, seed=2),
            "keep16": random_mask(base, 16, seed=6),
            "keep20 top2": random_mask(base, 20, seed=3, top_k=2),
            "uneven": random_mask(base, [19 + (7 * layer) % 14 for layer in range(spec.num_layers)], seed=4),
            "all": build(spec, [None] * spec.num_layers, fingerprint, {}, "keep all"),
            "qwen": random_mask(self.work / "qwen", 9, seed=5),
        }
        for name, mask in (("sliced", "keep24"), ("sliced16", "keep16")):
            if not speed_only and not (self.work / name).exists():
                rewrite(base, masks[mask], self.work / name, verify=False)
        self.masks = {name: saved(mask, self.work / f"{name}.json") for name, mask in masks.items()}

    def rows(self) -> list[Row]:
        """Servers that have no result yet; first those that the property everything rests on needs."""
        flag = self.engine.backend_flag
        other = ("marlin", "flashinfer_mxfp4") if self.engine.name == "sglang" else ("marlin", "triton_unfused")
        native = () if not self.engine.on_gpu else other
        first = [
            Row("keep24 eager", mask="keep24", probe=True, batched=True),
            Row("sliced eager", "sliced", probe=True, command=1),
            Row("unmasked eager", probe=True, command=1),
            Row("all eager", mask="all"),
            Row("plain eager", patched=False, command=1, batched=True),
        ]
        # SGLang's kernel for small routers takes multiples of 16, so these two run the same one.
        sixteen = (Row("keep16 eager", mask="keep16", probe=True), Row("sliced16 eager", "sliced16", probe=True))
        rest = [
            *(Row(f"keep24 {name}", mask="keep24", args=(flag, name), probe=True) for name in native),
            *(sixteen if self.engine.name == "sglang" else ()),
            Row("keep19 eager", mask="keep19", probe=True),
            Row("uneven eager", mask="uneven", probe=True),
            Row("keep20 top2 eager", mask="keep20 top2", probe=True, command=1),
            Row("top1 eager", mask="keep24", args=("--expert-top-k", "1"), probe=True),
            Row("qwen keep9 eager", "qwen", mask="qwen", probe=True),
            Row("qwen unmasked eager", "qwen", probe=True),
            Row("qwen keep9 graphs", "qwen", mask="qwen", graphs=True),
        ]
        done = {path.stem for path in self.results.glob("*.json")}
        return [row for row in (*first, *rest) if row.name not in done]

    def run(self, speed_only: str | None) -> None:
        """All that time allows."""
        if not speed_only:
            self._serve(self.rows())
        self._speed(self.masked_rows() if speed_only != "collect" else self.collecting_rows())

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _serve(self, rows: list[Row]) -> None:
        """Check rows, as many side by side as fit."""
        for start in range(0, len(rows), self.parallel):
            if self._left() < self.need:
                print(f"{self._left():.0f} s left; {[row.name for row in rows[start:]]} wait for the next run", flush=True)
                return
            self._serve_together(rows[start : start + self.parallel])

    def _serve_together(self, rows: list[Row]) -> None:
        """Boot servers side by side and check those that came up, in threads of their own."""
        servers = [(row, self.engine.start(row, self.work, self.masks, free_port())) for row in rows]
        began = time.monotonic()

        def one(row: Row, server: Server) -> None:
            try:
                server.wait_ready(max(1.0, min(BOOT_SECONDS, self._left() - 20)))
                boot_s = time.monotonic() - began
                print(f"{row.name}: up after {boot_s:.0f} s", flush=True)
                self._check(row, server, boot_s)
            except Exception as error:  # noqa: BLE001 - a row that fails leaves its error; the others go on
                print(f"{row.name}: {type(error).__name__}: {str(error)[-1500:]}", flush=True)
                if self._left() > 25 or not isinstance(error, ServerError):
                    (self.results / f"{row.name}.error").write_text(f"{type(error).__name__}: {error}")

        try:
            with ThreadPoolExecutor(len(servers)) as pool:
                list(pool.map(lambda pair: one(*pair), servers))
        finally:
            for _, server in servers:
                server.stop(grace=0)

    def _check(self, row: Row, server: Server, boot_s: float) -> None:
        """Log-probabilities and routes of all prompts, one at a time; then some in batches."""
        prompts = self.prompts[:16] if row.graphs else self.prompts
        result = {"boot_s": boot_s, **self.engine.examine(row, server, prompts, 1, MAX_TOKENS)}
        if row.batched:
            result["batched"] = []
            for start in range(0, min(64, len(prompts)), BATCH):
                result["batched"] += [scores for _, scores in self.engine.ask(server, prompts[start : start + BATCH], MAX_TOKENS)]
        self._keep(row.name, result)
        print(f"{row.name}: checked, {self._left():.0f} s left", flush=True)

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        part = self.results / f"{name}.part"
        part.write_text(json.dumps(result))
        part.rename(self.results / f"{name}.json")

    def masked_rows(self) -> list[Row]:
        """What a mask and a smaller top_k gain."""
        return [
            Row("plain 1", patched=False, graphs=True),
            Row("all", mask="all", graphs=True),
            Row("plain 2", patched=False, graphs=True, command=1),
            Row("keep24", mask="keep24", graphs=True, command=1),
            Row("top2", args=("--expert-top-k", "2"), graphs=True),
        ]

    def collecting_rows(self) -> list[Row]:
        """What collecting router statistics would cost, by how the logits get into one place (issue 6)."""
        ways = ("copy", "copy+sums", "slab", "slab+sums") if self.engine.name == "sglang" else ("copy", "copy+sums")
        return [
            Row("plain 1", patched=False, graphs=True),
            *(Row(f"collect {way}", graphs=True, collect=way) for way in ways),
        ]  # fmt: skip

    def _speed(self, graphs: list[Row]) -> None:
        """Decode speed in turns: every server once, then again, so that what drifts hits all alike."""
        batches, new = ([1, 8, 32, 64], 512) if self.engine.on_gpu else ([1, 4], 16)
        todo = [(row, n) for n in range(1, ROUNDS + 1) for row in graphs if not (self.results / f"{row.name} round {n}.json").exists()]
        if not todo or self._left() < (200 if self.engine.on_gpu else 60):
            return
        rows = [row for row in graphs if any(row is other for other, _ in todo)]
        up: dict[str, Server] = {}
        servers = [(row, self.engine.start(row, self.work, self.masks, free_port())) for row in rows]
        try:
            began = time.monotonic()
            for row, server in servers:
                try:
                    server.wait_ready(max(1.0, self._left() - 30))
                except ServerError as error:
                    print(f"{row.name}: {str(error)[-1500:]}", flush=True)
                    continue
                up[row.name] = server
                print(f"{row.name}: up after {time.monotonic() - began:.0f} s", flush=True)
            for row in rows:
                if row.name in up and not (self.results / f"{row.name} graphs.json").exists():
                    self._check(Row(f"{row.name} graphs", graphs=True, patched=row.patched), up[row.name], 0.0)
            warm: set[str] = set()
            for row, n in todo:
                if row.name in up and self._left() > (45 if self.engine.on_gpu else 5):
                    self._measure(row, up[row.name], n, batches, new, warm)
            for row in () if self.engine.streams else (graphs[0], graphs[-2]):
                streamed = self.results / f"{row.name} streamed.json"
                if row.name in up and not streamed.exists() and self._left() > 45:
                    self._measure(row, up[row.name], 0, batches, new, warm)
        finally:
            for _, server in servers:
                server.stop(grace=0)

    def _measure(self, row: Row, server: Server, n: int, batches: list[int], new: int, warm: set[str]) -> None:
        """One round: every batch size once; round 0 streams, for the latencies."""
        work = Workload(256 if self.engine.on_gpu else 32, new, seed=n, token_ids=(0, 480))
        notes = {"row": row.name, "round": str(n), "others": "idle on the same GPU"}
        document = measure(
            f"http://127.0.0.1:{server.port}", work, batches, repeats=1, warmup=0 if row.name in warm else 1,
            stream=n == 0 or self.engine.streams, key=server.key, notes=notes, stall_seconds=100,
        )  # fmt: skip
        warm.add(row.name)
        name = f"{row.name} round {n}" if n else f"{row.name} streamed"
        self._keep(name, document)
        speeds = {result["batch"]: round(result["total_tok_s"]["median"], 1) for result in document["results"]}
        print(f"{name}: {speeds} tok/s, {self._left():.0f} s left", flush=True)

    def report(self) -> dict[str, Any]:
        """Everything that was found, without the answers themselves."""
        found = {path.stem: json.loads(path.read_text()) for path in sorted(self.results.glob("*.json"))}
        masks = {name: mask_file.load(path) for name, path in self.masks.items()}
        checked = {name: result for name, result in found.items() if "logprobs" in result}

        def pair(one: str, two: str, **keys: str) -> Any:
            return compare.logprobs(checked[one], checked[two], **keys) if one in checked and two in checked else "not run"

        probed = {
            "keep24 eager": ("keep24", 4), "keep16 eager": ("keep16", 4), "keep19 eager": ("keep19", 4), "uneven eager": ("uneven", 4),
            "keep20 top2 eager": ("keep20 top2", 2), "top1 eager": ("keep24", 1), "unmasked eager": ("keep24", 4),
            "qwen keep9 eager": ("qwen", 4), "qwen unmasked eager": ("qwen", 4),
            **{name: ("keep24", 4) for name in checked if name.startswith("keep24 ") and "routes" in checked[name]},
        }  # fmt: skip

        def ids(one: str, two: str, mask: str) -> Any:
            return compare.routed_ids(checked[one], checked[two], masks[mask]) if one in checked and two in checked else "not run"

        return {
            "what": f"{self.shape[0]} shape, random {self.shape[1]} weights, seed 0; tests/gpu/prove.py",
            **versions(self.engine),
            "boot_s": {name: round(result["boot_s"], 1) for name, result in checked.items() if result["boot_s"]},
            "routes": {name: compare.routes(checked[name], masks[mask], k) for name, (mask, k) in probed.items() if name in checked},
            "masked_and_sliced": {
                "ids": ids("keep24 eager", "sliced eager", "keep24"),
                "ids, keep 16": ids("keep16 eager", "sliced16 eager", "keep16"),
                "logprobs": pair("keep24 eager", "sliced eager"),
                "logprobs, keep 16": pair("keep16 eager", "sliced16 eager"),
                "noise: keep24, alone and in batches of 32": pair("keep24 eager", "keep24 eager", key_two="batched"),
                "noise: plain, alone and in batches of 32": pair("plain eager", "plain eager", key_two="batched"),
            },
            "keep_all_and_unpatched": {
                "eager": pair("all eager", "plain eager"),
                "graphs": pair("all graphs", "plain 1 graphs"),
                "graphs, unpatched twice": pair("plain 1 graphs", "plain 2 graphs"),
                "graphs, keep24 and unpatched": pair("keep24 graphs", "plain 1 graphs"),
            },
            "qwen3_moe": {"graphs and eager": pair("qwen keep9 graphs", "qwen keep9 eager")},
            "decode": {name: document for name, document in found.items() if "results" in document},
            "errors": {path.stem: path.read_text()[-1500:] for path in sorted(self.results.glob("*.error")) if path.stem not in found},
        }  # fmt: skip


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a script on a GPU host."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--cpu", action="store_true")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parallel", type=int, default=5, help="servers side by side; each takes about 22 GB")
    parser.add_argument("--speed-only", choices=["mask", "collect"], help="measure decoding and check nothing else")
    args = parser.parse_args()
    began = time.monotonic()
    proof = Proof(ENGINES[args.engine](not args.cpu), args.work.resolve(), args.parallel, began + args.seconds)
    proof.prepare(args.speed_only)
    print(f"prepared in {time.monotonic() - began:.0f} s", flush=True)
    try:
        proof.run(args.speed_only)
    finally:
        args.out.write_text(json.dumps(proof.report(), indent=1) + "\n")
    failed = [path.stem for path in proof.results.glob("*.error")]
    left = [row.name for row in proof.rows()]
    print(f"{time.monotonic() - began:.0f} s; errors: {failed or 'none'}; rows left: {left or 'none'}")


if __name__ == "__main__":
    main()
