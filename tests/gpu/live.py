"""Switching masks live on a GPU: what the CPU tests claim, on fused kernels, graphs and asynchronous scheduling, and how long it takes.

    python -m tests.gpu.live ENGINE WORK_DIR OUT.json [--seconds 560] [--cpu]

Four servers side by side: one with CUDA graphs that is switched, an eager one whose routers are watched, and of each kind one that
was started with the mask (its log-probabilities are what a live mask must give). Every part writes its figures as soon as it has them.
`--cpu` is the same with a tiny model on this machine's CPU, to try the script itself.
"""

from __future__ import annotations

import http.client
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune.bench.server import Server, free_port
from softprune.checkpoint.synth import synth_checkpoint
from softprune.control import KEY_HEADER
from softprune.mask import ExpertMask
from tests.conftest import random_mask, random_prompts, saved
from tests.gpu.compare import gap
from tests.gpu.engines import ENGINES, Engine, Row
from tests.gpu.memory import used_mib
from tests.gpu.prove import arguments, versions

API = "/softprune/v1"


@dataclass
class Sizes:
    """How much is done; less on a CPU."""

    switches: int = 300
    speed_switches: int = 1000
    seconds: float = 5.0
    streams: int = 32
    load_tokens: int = 1200
    crossing_tokens: int = 700
    speed_tokens: int = 256
    long_prompt: int = 4000


CPU = Sizes(switches=40, speed_switches=60, seconds=3, streams=8, load_tokens=400, crossing_tokens=400, speed_tokens=32, long_prompt=1000)


class Switcher:
    """Puts masks through one kept connection, and times every round trip."""

    def __init__(self, server: Server, masks: list[ExpertMask]) -> None:
        self.server, self.bodies = server, [mask.dump().encode() for mask in masks]
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)

    def put(self, turn: int) -> tuple[int, float]:
        """(epoch, milliseconds) of putting mask `turn` modulo their number."""
        return self._send("PUT", self.bodies[turn % len(self.bodies)])

    def reconnect(self) -> None:
        """Servers close connections that were idle for some seconds."""
        self._connection.close()

    def delete(self) -> tuple[int, float]:
        return self._send("DELETE", b"")

    def _send(self, method: str, body: bytes) -> tuple[int, float]:
        began = time.perf_counter()
        self._connection.request(method, API + "/mask", body, {KEY_HEADER: self.server.key})
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        ms = 1000 * (time.perf_counter() - began)
        assert response.status == 200, answer
        return int(answer["epoch"]), ms


def quantiles(samples: list[float]) -> dict[str, Any]:
    """p50, p99 and all samples, in the samples' unit."""
    ordered = sorted(samples)
    return {
        "p50": round(statistics.median(ordered), 3), "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "max": round(ordered[-1], 3), "samples": [round(sample, 3) for sample in samples],
    }  # fmt: skip


class Live:
    """The parts, each a figure in the result."""

    def __init__(self, engine: Engine, work: Path, out: Path, deadline: float) -> None:
        self.engine, self.work, self.out, self.deadline = engine, work, out, deadline
        self.sizes = Sizes() if engine.on_gpu else CPU
        self.result: dict[str, Any] = {"what": "tests/gpu/live.py", **versions(engine)}

    def run(self) -> None:
        base = self.work / "base"
        if not base.exists():
            synth_checkpoint("gpt-oss-20b" if self.engine.on_gpu else "tiny", base, "mxfp4" if self.engine.on_gpu else "bf16", seed=0)
        self.masks = [random_mask(base, keep, seed=seed) for keep, seed in ((24, 1), (16, 2), (20, 3))]
        files = {"a": saved(self.masks[0], self.work / "live_a.json")}
        rows = [
            Row("live", args=("--softprune-control", *self.engine.cached_args), graphs=True),
            Row("live probe", args=("--softprune-control",), probe=True),
            Row("live launch", mask="a", args=self.engine.cached_args, graphs=True),
            Row("live launch eager", mask="a"),
        ]
        servers = []
        try:
            # The launched ones afterwards: vLLM servers that boot together with an empty compile cache each make kernels of their own.
            for pair in (rows[:2], rows[2:]):
                booting = [self.engine.start(row, self.work, files, free_port()) for row in pair]
                servers += booting
                for row, server in zip(pair, booting, strict=True):
                    server.wait_ready(max(1.0, self.deadline - time.monotonic()))
                    print(f"{row.name}: up, {self.left():.0f} s left", flush=True)
            self.server, self.probed, *self.launched = servers
            self.switcher = Switcher(self.server, self.masks)
            for part in (self.idle, self.equals_launch, self.decoding, self.speed, self.cache, self.prefilling, self.watched):
                if self.left() < 15:
                    print(f"no time for {part.__name__}", flush=True)
                    continue
                self._do(part)
        finally:
            for server in servers:
                server.stop(grace=0)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def _do(self, part: Callable[[], Any]) -> None:
        began = time.monotonic()
        self.switcher.reconnect()
        try:
            self.result[part.__name__] = part()
        except Exception as error:  # noqa: BLE001 - the other parts go on
            self.result[part.__name__] = {"error": f"{type(error).__name__}: {error}"}
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        shown = _bare(self.result[part.__name__])
        print(f"{part.__name__}: {time.monotonic() - began:.1f} s, {shown}", flush=True)

    def idle(self) -> dict[str, Any]:
        """Switch time of a server that does nothing else."""
        return quantiles([self.switcher.put(turn)[1] for turn in range(self.sizes.switches)])

    def equals_launch(self) -> dict[str, Any]:
        """A mask put live gives what the same mask gives at launch; without it the first values are back."""
        pairs = {"graphs": (self.server, self.launched[0]), "eager": (self.probed, self.launched[1])}
        return {name: self._equals_launch(*pair) for name, pair in pairs.items()}

    def _equals_launch(self, server: Server, launched: Server) -> dict[str, Any]:
        prompts = random_prompts(8, 128, seed=31)

        def ask(one: Server) -> Any:
            return [answer for prompt in prompts for answer in self.engine.ask(one, [prompt], 4)]

        Switcher(server, self.masks).delete()
        unmasked = ask(server)
        Switcher(server, self.masks).put(0)
        live, at_launch = ask(server), ask(launched)
        Switcher(server, self.masks).delete()
        again = ask(server)
        return {
            "live_equals_launch": live == at_launch, "restored": unmasked == again, "differs_from_unmasked": live != unmasked,
            "largest_gap_to_launch": _largest_gap(live, at_launch), "largest_gap_restored": _largest_gap(unmasked, again),
            "share_equal_to_launch": _share_equal(live, at_launch),
        }  # fmt: skip

    def decoding(self) -> dict[str, Any]:
        """Switch time under decoding streams, for as long as they decode."""
        self._warm_up(self.sizes.streams, 64)
        with self._load(self.sizes.streams, 64, self.sizes.load_tokens) as process:
            self.switcher.reconnect()
            samples = self._switch_while(lambda: process.poll() is None)
        step_ms = 1000 * self.sizes.streams / statistics.median(self._speeds("load.json"))
        return {"streams": self.sizes.streams, "step_ms": round(step_ms, 3), "bar_ms": round(2 * step_ms + 5, 3), **quantiles(samples)}

    def prefilling(self) -> dict[str, Any]:
        """Switch time under long prefills."""
        self._warm_up(4, self.sizes.long_prompt)
        with self._load(4, self.sizes.long_prompt, 8, passes=100):
            self.switcher.reconnect()
            until = time.monotonic() + self.sizes.seconds
            samples = self._switch_while(lambda: time.monotonic() < until)
        return {"prompt_tokens": self.sizes.long_prompt, **quantiles(samples)}

    def speed(self) -> dict[str, Any]:
        """Decode speed and device memory before and after many switches."""
        self.switcher.put(0)
        self._measure(1)
        before, memory = self._measure(3), self._memory()
        self.switcher.reconnect()
        began = time.monotonic()
        for turn in range(1, self.sizes.speed_switches + 1):
            self.switcher.put(turn)
        seconds = time.monotonic() - began
        self.switcher.put(0)
        after, memory_after = self._measure(3), self._memory()
        return {
            "tok_s": {"before": before, "after": after}, "switches": self.sizes.speed_switches, "seconds": round(seconds, 2),
            "after_over_before": round(statistics.median(after) / statistics.median(before), 4),
            "memory_mib": [memory, memory_after], "memory_grown_mib": memory_after - memory,
        }  # fmt: skip

    def cache(self) -> dict[str, Any]:
        """Prefix caches never mix masks: as in tests/engines."""
        prompt = random_prompts(1, 300, seed=71)[0]
        self.switcher.put(0)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.engine.generate, self.server, prompt, self.sizes.crossing_tokens)
            for turn in (1, 0):
                time.sleep(0.6)
                self.switcher.put(turn)
            answer = running.result(120)
        whole = [*prompt, *answer["tokens"]]
        found, hits = self.engine.first_token(self.server, whole)
        fresh, none = self.engine.first_token(self.server, whole, "never seen")
        again, hits_again = self.engine.first_token(self.server, whole)
        self.switcher.put(1)
        under_b, hits_b = self.engine.first_token(self.server, whole)
        self.switcher.put(0)
        back, hits_back = self.engine.first_token(self.server, whole)
        return {
            "tokens": len(whole), "epochs": answer["epochs"],
            "cached": {"after crossing": hits, "salted": none, "again": hits_again, "under b": hits_b, "back under a": hits_back},
            "gap_to_uncached": {"after crossing": gap(found, fresh), "again": gap(again, fresh), "back under a": gap(back, fresh)},
            "gap_of_b_to_a": gap(under_b, fresh),
        }  # fmt: skip

    def watched(self) -> dict[str, Any]:
        """200 switches among 3 masks under concurrent streams: each step ran under the mask of the epoch that its requests name."""
        server, switcher = self.probed, Switcher(self.probed, self.masks)
        server.request("DELETE", API + "/routes")
        first = switcher.put(0)[0]
        hashes, stop = {first: self.masks[0].hash}, threading.Event()
        prompts, lengths = iter(random_prompts(5000, 64, seed=61)), itertools.cycle((24, 40, 56))

        def client() -> list[tuple[int, dict[str, Any]]]:
            answers = []
            while not stop.is_set():
                length = next(lengths)
                answers.append((length, self.engine.generate(server, next(prompts), length, stream=True)))
            return answers

        with ThreadPoolExecutor(self.sizes.streams) as pool:
            clients = [pool.submit(client) for _ in range(self.sizes.streams)]
            try:
                for turn in range(1, 201):
                    hashes[switcher.put(turn)[0]] = self.masks[turn % 3].hash
                    time.sleep(0.02)
            finally:
                stop.set()
            answers = [answer for one in clients for answer in one.result()]
        routes = server.request("GET", API + "/routes")[1]
        by_hash = {mask.hash: mask for mask in self.masks}
        pruned = selections = disagree = 0
        for epoch, mask_hash in hashes.items():
            found, mask = routes["epochs"].get(str(epoch)), by_hash[mask_hash]
            if found is None:
                disagree += 1
                continue
            disagree += any(tokens != routes["scheduled_tokens"][epoch] for tokens in found["tokens"])
            selections += sum(map(sum, found["counts"]))
            pruned += sum(counts[i] for layer, counts in enumerate(found["counts"]) for i in mask.pruned(layer))
        return {
            "switches": 200, "responses": len(answers), "failed_or_short": sum(len(one["tokens"]) != length for length, one in answers),
            "without_epochs": sum(not one["epochs"] for _, one in answers), "crossed": sum(len(one["epochs"]) > 1 for _, one in answers),
            "selections": selections, "pruned": pruned, "epochs_whose_tokens_disagree": disagree,
        }  # fmt: skip

    def _switch_while(self, going: Callable[[], bool]) -> list[float]:
        samples = []
        for turn in itertools.count():
            samples.append(self.switcher.put(turn)[1])
            time.sleep(0.015)
            if not going():
                return samples[:-1]  # the last may have met an idle server
        raise AssertionError

    @contextmanager
    def _load(self, streams: int, prompt: int, new: int, passes: int = 1) -> Iterator[subprocess.Popen[bytes]]:
        """Requests from another process meanwhile."""
        process = subprocess.Popen(self._bench("load.json", streams, prompt, new, passes))
        time.sleep(2.5 if self.engine.on_gpu else 4)  # until it has started up and every prompt is prefilled
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _warm_up(self, streams: int, prompt: int) -> None:
        """vLLM compiles kernels for each new number of prefilled rows, for seconds: once before anything is timed."""
        subprocess.run(self._bench("warm.json", streams, prompt, 4, 3), check=True, timeout=120)

    def _measure(self, passes: int) -> list[float]:
        subprocess.run(self._bench("speed.json", self.sizes.streams, 64, self.sizes.speed_tokens, passes), check=True, timeout=120)
        return self._speeds("speed.json")

    def _bench(self, out: str, streams: int, prompt: int, new: int, passes: int) -> list[str]:
        return [
            sys.executable, "-c", "from softprune.bench.cli import bench_app; bench_app()", "decode",
            "--url", f"http://127.0.0.1:{self.server.port}", "--out", str(self.work / out), "--batch", str(streams),
            "--prompt-tokens", str(prompt), "--max-new-tokens", str(new), "--repeats", str(passes), "--warmup", "0",
            "--stream" if self.engine.streams else "--no-stream", "--token-ids", "0-480", "--seed", str(time.time_ns() % 100_000),
        ]  # fmt: skip

    def _speeds(self, out: str) -> list[float]:
        """Tokens per second of every pass: while decoding if they streamed, else in all."""
        (result,) = json.loads((self.work / out).read_text())["results"]
        return [repeat["decode_tok_s"] or repeat["total_tok_s"] for repeat in result["repeats"]]

    def _memory(self) -> int:
        """MiB in use on the GPU; 0 where there is none."""
        if not self.engine.on_gpu:
            return 0
        found = used_mib()
        assert found is not None, "the GPU's driver does not tell what memory is in use"
        return found


def _largest_gap(one: Any, two: Any) -> float:
    return max(abs(a - b) for (_, first), (_, second) in zip(one, two, strict=True) for a, b in zip(first, second, strict=True))


def _share_equal(one: Any, two: Any) -> float:
    """Of the log-probabilities, those that are the same to the last bit."""
    same = [a == b for (_, first), (_, second) in zip(one, two, strict=True) for a, b in zip(first, second, strict=True)]
    return sum(same) / len(same)


def _bare(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key != "samples"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--python", default=sys.executable, help="the engine's, if it has an environment of its own")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    Live(ENGINES[args.engine](not args.cpu, args.python), args.work.resolve(), args.out, time.monotonic() + args.seconds).run()


if __name__ == "__main__":
    main()
