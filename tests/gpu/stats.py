"""Statistics of an engine on a GPU: are they exact, and what do they cost?

    python -m tests.gpu.stats reference CHECKPOINT OUT.safetensors --blocks REFERENCE.npz
    python -m tests.gpu.stats ENGINE WORK_DIR OUT.json --checkpoint CHECKPOINT --blocks REFERENCE.npz --reference FILE [--cpu]

The first adds up the statistics of a Transformers model in float32 over the blocks that `tests.gpu.tiny reference` wrote, where softprune's
own dependencies are. The second boots the engine on the small trained model as it is (MXFP4), asks for the same blocks' log-probabilities
while it collects, and compares both; samples 1 token in 16 of them; asks SGLang's own recorder what it sees of the model; then boots the
20B shape three times (unpatched, with softprune but without statistics, with `--softprune-stats eaft`) and measures decoding and prefill in
turns; sends 2,000,000 tokens, and measures again with `--softprune-stats router`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.bench.decode import measure
from softprune.bench.options import LATE_S
from softprune.bench.prompts import Workload
from softprune.bench.server import Server, ServerError, free_port
from softprune.bench.tiny import PACKS
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.synth import synth_checkpoint
from softprune.evaluate.replay import spans_text
from softprune.runtime.tags import SPANS_KEY, TAG_KEY
from softprune.server_client import ServerClient
from softprune.stats.file import Statistics, read, write
from tests.gpu.engines import ENGINES, Engine, Row, versions
from tests.gpu.memory import used_mib
from tests.gpu.tiny import figures

KEEPS = (24, 16, 8)
GROWN_TOKENS = 2_000_000
Answers = list[list[float]]


def make_reference(checkpoint: Path, blocks: Path, out: Path) -> None:
    """Transformers' statistics of the blocks, every token counted by `reap`."""
    from softprune.evaluate.packing import Blocks
    from softprune.evaluate.reference import load_reference
    from softprune.evaluate.reference_stats import collect
    from softprune.ranking.api import model_of_checkpoint

    shape = model_of_checkpoint(checkpoint)
    with np.load(blocks, allow_pickle=False) as arrays:
        packs = {pack: Blocks(arrays[f"{pack}.ids"], arrays[f"{pack}.keep"], arrays[f"{pack}.ids"] * 0, 1, "0" * 64) for pack in PACKS}
    found, _ = collect(load_reference(checkpoint), shape, packs, reap_everywhere=True)
    write(found, out)


class Trial:
    """One engine in one working folder, with a bound on time.

    Attributes:
        seeds: one for each pass, so that no prefix cache knows its prompts.
    """

    def __init__(self, engine: Engine, work: Path, seconds: float) -> None:
        self.engine, self.work, self.deadline = engine, work, time.monotonic() + seconds
        self.seeds = itertools.count()
        self.result: dict[str, Any] = {"what": "tests/gpu/stats.py", **versions(engine)}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(f"{self.left:.0f} s left: {text}", flush=True)

    def start(self, name: str, model: str, *args: str, patched: bool = True) -> Server:
        row = Row(name, model, args=args, patched=patched, graphs=self.engine.on_gpu)
        env = {"SGLANG_ENABLE_LOGPROB_CHUNK": "1", "SGLANG_LOGPROB_CHUNK_SIZE": "1024"}  # else 8,192 rows of 201,088 float32 at once
        return self.engine.start(row, self.work, {}, free_port(), env)

    def send(self, server: Server, prompt: Sequence[int], tag: str, spans: str | None = None, logprobs: bool = False) -> list[float]:
        """One prompt, one token of answer; the log-probabilities of the prompt's tokens but the first, if asked for."""
        parameters = {TAG_KEY: tag} | ({} if spans is None else {SPANS_KEY: spans})
        if self.engine.name == "sglang":
            sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True, "custom_params": parameters}
            body: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": sampling}
            body |= {"return_logprob": True, "logprob_start_len": 0} if logprobs else {}
            status, answer = server.request("POST", "/generate", body, timeout=200)
            assert status == 200, answer
            return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]] if logprobs else []
        body = {"model": "model", "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "ignore_eos": True, "vllm_xargs": parameters}
        status, answer = server.request("POST", "/v1/completions", body | ({"prompt_logprobs": 0} if logprobs else {}), timeout=200)
        assert status == 200, answer
        if not logprobs:
            return []
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, prompt[1:], strict=True)]

    def together(self, server: Server, prompts: Sequence[Sequence[int]], at_once: int, **more: Any) -> float:
        """Seconds until all prompts are answered."""
        began = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda prompt: self.send(server, prompt, "default", **more), prompts))
        return time.monotonic() - began

    def fetch(self, server: Server) -> Statistics:
        path = self.work / "fetched.safetensors"
        path.write_bytes(ServerClient(f"http://127.0.0.1:{server.port}", server.key).stats_file())
        return read(path)

    def collecting(self, server: Server, mode: str | None, sample: int = 16, reset: bool = True) -> dict[str, Any]:
        """Collect in this mode from now on, or not at all."""
        server.request("POST", "/softprune/v1/stats/stop")
        if reset:
            server.request("POST", "/softprune/v1/stats/reset")
        if mode is None:
            return {}
        status, answer = server.request("POST", "/softprune/v1/stats/start", {"mode": mode, "sample": sample})
        assert status == 200, answer
        return dict(answer)

    def exact(self, checkpoint: Path, blocks: Path, reference: Path) -> None:
        """The small model: its log-probabilities and its statistics against Transformers'."""
        served = self.work / "tiny"
        if self.engine.on_gpu:
            served.unlink(missing_ok=True)
            served.symlink_to(checkpoint.resolve())
        elif not served.exists():
            dequantize_checkpoint(checkpoint, served)
        server = self.start("tiny", "tiny", "--softprune-stats", "eaft")
        try:
            server.wait_ready(max(1.0, self.left - 60))
            self.say("the small model is up")
            status = server.request("GET", "/softprune/v1/status")[1]
            self.result["reads_outputs"] = status["statistics"]["reads_outputs"]
            with np.load(blocks, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            same = status["fingerprint"] == str(arrays["fingerprint"])
            self.collecting(server, "eaft", sample=1)
            packs, found = {}, {}
            for pack in PACKS:
                ids, keep, log_p = (arrays[f"{pack}.{name}"] for name in ("ids", "keep", "log_p"))
                found[pack] = [
                    self.send(server, block.tolist(), pack, spans_text(_spans(kept)), logprobs=True)
                    for block, kept in zip(ids, keep, strict=True)
                ]
                packs[pack] = figures(np.asarray(found[pack]), log_p[:, 1:], keep[:, 1:])
                self.say(f"{pack}: {packs[pack]}")
            self.result["tiny"] = {
                "moe_backend": status["moe_backend"], "fingerprint_is_the_references": same, "packs": packs,
                "passed": same and all(one["passed"] for one in packs.values()),
            }  # fmt: skip
            collected, lost = self.fetch(server), server.request("GET", "/softprune/v1/status")[1]["statistics"]["lost_samples"]
            self.result["exact"] = {**compared(collected, read(reference), arrays, found), "lost_samples": lost}
            self.say(json.dumps(self.result["exact"]))
            self.result["sampled"] = self.sampled(server, arrays)
            self.say(json.dumps(self.result["sampled"]))
        finally:
            server.stop(grace=0)

    def sampled(self, server: Server, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Some 200,000 tokens, once all of them and once 1 in 16: do both keep the same experts?"""
        prompts = [block.tolist() for pack in PACKS for block in arrays[f"{pack}.ids"]]
        if self.engine.on_gpu:
            # Cut at other places, the same text is other prompts, which no prefix cache knows.
            prompts = [prompt[shift:] + prompt[:shift] for shift in (0, 200, 400, 600) for prompt in prompts]
        sums = {}
        for sample in (1, 16):
            self.collecting(server, "reap", sample)
            salted = [[sample, *prompt] for prompt in prompts]
            self.together(server, salted, 8)
            sums[sample] = self.fetch(server)
        result: dict[str, Any] = {
            "tokens": sum(map(len, prompts)),
            "rows": {n: int(one["reap.count"][0, 0].sum()) for n, one in sums.items()},
        }
        for criterion in ("reap_sum", "reap"):
            scores = [_scores(one, criterion) for one in (sums[1], sums[16])]
            result[criterion] = {f"top {keep}": _overlap(*scores, keep) for keep in KEEPS}
        return result

    def boot(self, **kinds: tuple[str, ...] | None) -> dict[str, Server]:
        """Servers of the 20B shape, not yet ready.

        Args:
            kinds: of each its further arguments; None for an engine without softprune.
        """
        gpu = self.engine.on_gpu
        base = self.work / "base"
        if not base.exists():
            synth_checkpoint("gpt-oss-20b" if gpu else "tiny", base, "mxfp4" if gpu else "bf16", seed=0)
        vllm = ("--max-model-len", "9000", "--kv-cache-memory-bytes", str(4 << 30), "--gpu-memory-utilization", "0.2")
        # Chunks of 32 tokens: one for every token would cost SGLang a tenth.
        sglang = ("--max-total-tokens", "80000", "--stream-interval", "32", "--decode-log-interval", "10")
        args = () if not gpu else sglang if self.engine.name == "sglang" else vllm
        return {name: self.start(name, "base", *args, *(more or ()), patched=more is not None) for name, more in kinds.items()}

    def wait(self, servers: dict[str, Server]) -> None:
        """Until they are up; those that are not are left out, and the result says why."""
        for name, server in list(servers.items()):
            try:
                server.wait_ready(max(1.0, self.left - 100))
                self.say(f"{name} is up")
            except ServerError as error:
                self.result.setdefault("errors", {})[name] = str(error)[-1500:]
                self.say(f"{name}: {str(error)[-1500:]}")
                servers.pop(name).stop(grace=0)

    def cost(self, servers: dict[str, Server], trace: Path | None) -> None:
        """Decoding and prefill in turns, and the growth of memory.

        Args:
            servers: "unpatched", "without" and "collecting", booting; to be stopped by the caller, as is "router", which is added.
            trace: where SGLang's profiler is to write what steps of `reap`, and a prefill with log-probabilities of `eaft`, are made of.
        """
        self.wait(servers)
        collecting = servers["collecting"]
        rows = [(name, servers[name], None) for name in ("unpatched", "without") if name in servers]
        rows += [("off", collecting, None), *((mode, collecting, mode) for mode in ("reap", "eaft"))]
        self.result["decode"] = self.turns(rows, self.decode, rounds=5, need=45)
        self.result["prefill"] = self.turns(rows, self.prefill, rounds=5, need=25)
        if trace is not None and self.engine.name == "sglang":
            self.collecting(collecting, "reap")
            self.profile(collecting, trace, 110)
            self.decode(collecting, "profiled")
        if "without" in servers:
            servers.pop("without").stop(grace=0)
        servers |= self.boot(router=("--softprune-stats", "router"))
        try:
            # Not timed, so the other server may boot meanwhile.
            self.result["memory"] = self.growth(collecting)
        except Exception as error:  # noqa: BLE001 - what follows does not rest on it
            self.result["memory"] = {"error": f"{type(error).__name__}: {error}"}
        self.say(json.dumps(self.result["memory"]))
        self.router(servers)
        self.logprobs(servers, trace)

    def router(self, servers: dict[str, Server]) -> None:
        """Decoding and prefill of the server "router", which is stopped, beside "unpatched"."""
        self.wait(servers)
        if (router := servers.get("router")) is not None:
            rows = [("unpatched", servers["unpatched"], None), ("off", router, None), ("router", router, "router")]
            self.result["prefill_router"] = self.turns(rows, self.prefill, rounds=16, need=15)
            self.result["decode_router"] = self.turns(rows, self.decode, rounds=4, need=45)
            # Log-probabilities of 8,192 tokens take vLLM 20 GB on either side.
            servers.pop("router").stop(grace=0)

    def prefills(self, servers: dict[str, Server], trace: Path | None) -> None:
        """Only prefill, with and without log-probabilities."""
        collecting = servers["collecting"]
        rows = [("unpatched", servers["unpatched"], None), *((mode or "off", collecting, mode) for mode in (None, "reap", "eaft"))]
        self.result["prefill"] = self.turns(rows, self.prefill, rounds=8, need=25)
        self.logprobs(servers, trace)

    def logprobs(self, servers: dict[str, Server], trace: Path | None) -> None:
        """Prefill whose log-probabilities are asked for, on both sides."""
        collecting = servers["collecting"]
        rows = [("unpatched", servers["unpatched"], None), ("off", collecting, None), ("eaft", collecting, "eaft")]
        self.result["prefill_logprobs"] = self.turns(rows, self.prefill_logprobs, rounds=4, need=12)
        if trace is not None and self.engine.name == "sglang":
            self.collecting(collecting, "eaft")
            self.profile(collecting, trace, 4)
            self.prefill_logprobs(collecting, "profiled")

    def profile(self, server: Server, trace: Path, steps: int) -> None:
        """Have SGLang write what its next steps are made of."""
        _post(
            server, "/start_profile", {"output_dir": str(trace), "num_steps": str(steps), "activities": ["CPU", "GPU"], "with_stack": False}
        )

    def recorder(self) -> None:
        """What SGLang's own recorder sees of the model."""
        folder = self.work / "recorded"
        folder.mkdir(exist_ok=True)
        row = Row("recorder", "tiny", args=("--expert-distribution-recorder-mode", "stat"), patched=False, graphs=self.engine.on_gpu)
        server = self.engine.start(row, self.work, {}, free_port(), {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(folder)})
        try:
            server.wait_ready(max(1.0, self.left - 20))
            started = _post(server, "/start_expert_distribution_record")
            for prompt in np.random.default_rng(0).integers(0, 480, (8, 512)).tolist():
                self.send(server, prompt, "default")
            dumped = _post(server, "/dump_expert_distribution_record")
            files = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
            seen = {name: int(found["logical_count"].sum()) for name, found in files.items()}
            self.result["recorder"] = {"started": started, "dumped": dumped, "tokens": 8 * 512, "selections seen": seen}
        except Exception as error:  # noqa: BLE001 - that it does not run is a finding
            self.result["recorder"] = {"error": f"{type(error).__name__}: {error}"[-1500:]}
        finally:
            server.stop(grace=0)
        self.say(json.dumps(self.result["recorder"]))

    def turns(
        self, rows: list[tuple[str, Server, str | None]], once: Callable[[Server, str], float], rounds: int, need: float
    ) -> dict[str, Any]:
        """Tokens per second of every row in each round, first an unmeasured one, and their ratios round by round."""
        speeds: dict[str, list[float]] = {name: [] for name, _, _ in rows}
        for number in range(rounds + 1):
            for name, server, mode in rows if number % 2 else rows[::-1]:
                if self.left < need:
                    break
                self.collecting(server, mode) if name not in ("unpatched", "without") else None
                speed = once(server, f"{name} {number}")
                if number:
                    speeds[name].append(round(speed, 1))
            self.say(f"{once.__name__} {number}: { ({name: found[-1:] for name, found in speeds.items()}) }")
        first = {name: found for name, found in speeds.items() if found}
        return {
            "tok_s": first,
            "ratios": {f"{name} / {other}": _ratio(first, name, other) for name in first for other in first if name != other},
        }

    def decode(self, server: Server, name: str) -> float:
        gpu = self.engine.on_gpu
        work = Workload(256 if gpu else 32, 512 if gpu else 16, seed=next(self.seeds), token_ids=(0, 480))
        document = measure(
            f"http://127.0.0.1:{server.port}", work, [32 if gpu else 4], repeats=1, warmup=0, stream=True, key=server.key, stall_seconds=100
        )  # fmt: skip
        result = document["results"][0]
        self.result.setdefault("total_tok_s", {}).setdefault(name, []).append(round(result["total_tok_s"]["median"], 1))
        if (late := result["repeats"][0]["client_late_s"]) > LATE_S:
            self.say(f"{name}: the client was kept from running for {late:.2f} s")
        return float((result["decode_tok_s"] or result["total_tok_s"])["median"])

    def prefill(self, server: Server, name: str, logprobs: bool = False) -> float:
        number, length = (8, 8192) if self.engine.on_gpu else (4, 256)
        rng = np.random.default_rng(next(self.seeds))
        prompts = rng.integers(0, 480, (number, length)).tolist()
        return number * length / self.together(server, prompts, number, logprobs=logprobs)

    def prefill_logprobs(self, server: Server, name: str) -> float:
        return self.prefill(server, name, logprobs=True)

    def growth(self, server: Server) -> dict[str, Any]:
        """Device memory before and after many tokens."""
        state = self.collecting(server, "eaft")
        self.prefill(server, "before")
        before, tokens, began = used_mib(), 0, time.monotonic()
        while tokens < (GROWN_TOKENS if self.engine.on_gpu else 2000) and self.left > 20:
            self.prefill(server, f"growth {tokens}")
            tokens += 8 * 8192 if self.engine.on_gpu else 4 * 256
        found = self.fetch(server)
        assert (
            int(found["router.count"].sum())
            == sum(one.routed for one in found.header.tokens.values()) * state_top_k(found) * found.header.model.num_layers
        )
        status = server.request("GET", "/softprune/v1/status")[1]["statistics"]
        return {
            "tokens": tokens, "seconds": round(time.monotonic() - began, 1), "gpu_mib_before": before, "gpu_mib_after": used_mib(),
            "device_bytes_before": state["device_bytes"], "device_bytes_after": status["device_bytes"],
            "device_mib": round(status["device_bytes"] / 2**20, 1),
            **{name: status[name] for name in ("missed_tokens", "lost_samples")},
        }  # fmt: skip


def _post(server: Server, path: str, body: dict[str, Any] | None = None) -> str:
    """One of SGLang's calls that answer with a sentence."""
    data = json.dumps(body or {}).encode()
    call = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=100) as response:
        return str(response.read().decode()).strip()


def state_top_k(found: Statistics) -> int:
    return found.header.epochs[0].top_k[0]


def compared(found: Statistics, reference: Statistics, arrays: dict[str, NDArray[Any]], log_p: dict[str, Answers]) -> dict[str, Any]:
    """An engine's sums of the packs and the reference's: relative differences, and the largest of any expert."""
    result: dict[str, Any] = {}
    places = [(found.tag_index(pack), reference.tag_index(pack)) for pack in PACKS]
    for name in ("router.count", "reap.count", "reap.norm_sum", "reap.gate_norm_sum", "eaft.grid_gate_norm"):
        ours, theirs = (
            sum(one[name][place].astype(np.float64) for place in side)
            for one, side in zip((found, reference), zip(*places, strict=True), strict=True)
        )
        if name.startswith("eaft"):
            ours, theirs = ours[0].sum((-1, -2)), theirs[0].sum((-1, -2))
        if name == "router.count":
            ours, theirs = ours[0], theirs[0]
        result[name] = {"total": float(ours.sum() / theirs.sum() - 1), "largest of an expert": float(np.abs(ours / theirs - 1).max())}
    norms = [
        sum(one["reap.norm_sum"][p] for p in side) / sum(one["reap.count"][p] for p in side)
        for one, side in zip((found, reference), zip(*places, strict=True), strict=True)
    ]
    result["mean norm"] = {"largest of an expert": float(np.abs(norms[0] / norms[1] - 1).max())}
    kept = {pack: arrays[f"{pack}.keep"] for pack in PACKS}
    planes = {pack: int(found["eaft.hist"][found.tag_index(pack), 0].sum()) for pack in PACKS}
    result["plane is all completion tokens"] = planes == {pack: int(keep.sum()) for pack, keep in kept.items()}
    sums = {pack: float(found["eaft.nll_sum"][found.tag_index(pack), 0]) for pack in PACKS}
    answered = {pack: -float(np.asarray(log_p[pack])[keep[:, 1:]].sum()) for pack, keep in kept.items()}
    result["nll over what the server answered"] = {pack: sums[pack] / answered[pack] for pack in PACKS}
    result["perplexity over the reference's"] = {
        pack: math.exp((sums[pack] - float(reference["eaft.nll_sum"][reference.tag_index(pack), 0])) / kept[pack].sum()) for pack in PACKS
    }
    for name in ("p_sum", "entropy_sum", "entropy_top_sum"):
        pairs = [(float(found[f"eaft.{name}"][a, 0]), float(reference[f"eaft.{name}"][b, 0])) for a, b in places]
        result[name] = {pack: ours / theirs - 1 for pack, (ours, theirs) in zip(PACKS, pairs, strict=True)}
    return result


def _scores(found: Statistics, criterion: str) -> NDArray[np.float64]:
    total, count = found["reap.gate_norm_sum"].sum(0), found["reap.count"].sum(0)
    return total if criterion == "reap_sum" else total / np.maximum(count, 1)


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64], keep: int) -> dict[str, float]:
    """Share of the top experts that both have, mean and least over layers."""
    tops = [[set(np.argsort(-layer)[:keep]) for layer in scores] for scores in (one, other)]
    shares = [len(a & b) / keep for a, b in zip(*tops, strict=True)]
    return {"mean": float(np.mean(shares)), "least": min(shares)}


def _ratio(speeds: dict[str, list[float]], name: str, other: str) -> float | None:
    """Median over rounds of one row's speed over another's in the same round."""
    pairs = list(zip(speeds[name], speeds[other], strict=False))
    return round(median(a / b for a, b in pairs), 4) if pairs else None


def _spans(keep: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", *ENGINES])
    parser.add_argument("folder", type=Path, help="the checkpoint, or the working folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--blocks", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--only", choices=["exact", "cost", "prefill", "router"], help="prefill: exact, and prefill's cost")
    parser.add_argument("--trace", type=Path, help="folder for SGLang's profiles")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.what == "reference":
        make_reference(args.folder, args.blocks, args.out)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    trial = Trial(ENGINES[args.what](not args.cpu), args.folder.resolve(), args.seconds)
    servers: dict[str, Server] = {}
    try:
        if args.only == "router":
            servers |= trial.boot(unpatched=None, router=("--softprune-stats", "router"))
        elif args.only != "exact":
            without = {} if args.only == "prefill" else {"without": ("--softprune-control",)}
            servers |= trial.boot(unpatched=None, **without, collecting=("--softprune-stats", "eaft"))
        if args.only not in ("cost", "router"):
            trial.exact(args.checkpoint, args.blocks, args.reference)
            if args.what == "sglang" and args.only != "prefill":
                trial.recorder()
        if args.only == "router":
            trial.router(servers)
        elif args.only == "prefill":
            trial.wait(servers)
            trial.prefills(servers, args.trace)
        elif servers:
            trial.cost(servers, args.trace)
    except Exception as error:
        trial.result["error"] = f"{type(error).__name__}: {error}"[-3000:]
        raise
    finally:
        for server in servers.values():
            server.stop(grace=0)
        args.out.write_text(json.dumps(trial.result, indent=1) + "\n")
        trial.say("written")


if __name__ == "__main__":
    sys.exit(main())
