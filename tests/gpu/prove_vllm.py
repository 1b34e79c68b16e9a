"""Masked gpt-oss, 20B shape, MXFP4, in vLLM on a GPU: what the CPU tests claim, on the fused kernels.

    python -m tests.gpu.prove_vllm WORK_DIR OUT.json

Needs a GPU with 80 GB, vLLM and softprune installed, 30 GB of disk; takes about 10 minutes. Makes its own
random checkpoint (`WORK_DIR/base`) and the one sliced to the kept experts (`WORK_DIR/sliced`) unless they are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from softprune import mask as mask_file
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.synth import synth_checkpoint
from softprune.mask_forms import build
from tests.conftest import random_mask, random_prompts, saved
from tests.engines.harness import BASE_ENV, HERE
from tests.slicing import slice_checkpoint

PROMPTS = random_prompts(16, 128, seed=31)
MANY = random_prompts(12, 1000, seed=32)
MAX_TOKENS = 16
TRIAL = "mxfp4/TRITON,mxfp4/MARLIN,mxfp4/TRITON_UNFUSED,unquantized/TRITON,unquantized/FLASHINFER_CUTLASS,unquantized/FLASHINFER_TRTLLM"
PAIRS = (
    ("plain", "plain again"), ("plain", "all"), ("masked", "sliced"), ("marlin plain", "marlin all"),
    ("graphs plain", "graphs plain again"), ("graphs plain", "graphs all"), ("graphs masked", "masked"),
    ("graphs masked", "graphs plain"), ("graphs plain", "plain"),
    ("qwen masked", "qwen graphs masked"), ("qwen graphs plain", "qwen graphs masked"),
)  # fmt: skip
"""Runs whose log-probabilities are compared."""
ARGS = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 4 << 30, "max_num_seqs": 32}


def prepare(work: Path) -> dict[str, str]:
    """Checkpoints and masks; the masks' paths by name."""
    base = work / "base"
    if not base.exists():
        synth_checkpoint("gpt-oss-20b", base, "mxfp4", seed=0)
    spec, fingerprint = spec_of(read_config(base)), fingerprint_of_checkpoint(base)
    masks = {
        "keep24": random_mask(base, 24, seed=1),
        "uneven": random_mask(base, [19 + 13 * (layer % 2) for layer in range(24)], seed=2),
        "top2": random_mask(base, 20, seed=3, top_k=2),
        "all": build(spec, [None] * spec.num_layers, fingerprint, {}, "keep all"),
    }
    if not (work / "qwen").exists():
        synth_checkpoint("qwen3-moe-tiny", work / "qwen", seed=0)
    masks["qwen"] = random_mask(work / "qwen", 9, seed=4)
    if not (work / "sliced").exists():
        slice_checkpoint(base, masks["keep24"], work / "sliced")
    return {name: saved(mask, work / f"{name}.json") for name, mask in masks.items()}


def jobs(work: Path, masks: dict[str, str]) -> list[dict[str, Any]]:
    def job(
        name: str, mask: str | None = None, prompts: Any = PROMPTS, model: str = "base", probe: bool = False, **args: Any
    ) -> dict[str, Any]:
        softprune: dict[str, Any] = {"expert_mask": masks[mask]} if mask else {}
        if probe:
            softprune["debug_routes"] = True
        return {
            "name": name, "model": str(work / model), "softprune": softprune or None, "prompts": prompts, "max_tokens": MAX_TOKENS,
            "args": {**ARGS, **args},
        }  # fmt: skip

    graphs = {"enforce_eager": False}
    qwen = {"model": "qwen"}
    every = [
        job("masked", "keep24"),
        job("sliced", model="sliced"),
        job("graphs masked", "keep24", **graphs),
        job("graphs plain", **graphs),
        job("graphs plain again", **graphs),
        job("graphs all", "all", **graphs),
        job("graphs top2", "top2", **graphs),
        job("qwen routes", "qwen", MANY, probe=True, **qwen),
        job("qwen routes unmasked", None, MANY, probe=True, **qwen),
        job("qwen masked", "qwen", **qwen),
        job("qwen graphs masked", "qwen", **qwen, **graphs),
        job("qwen graphs plain", **qwen, **graphs),
        job("unfused routes", "keep24", MANY, probe=True, moe_backend="triton_unfused"),
        job("plain"),
        job("plain again"),
        job("all", "all"),
        job("routes", "keep24", MANY, probe=True),
        job("routes unmasked", None, MANY, probe=True),
        job("routes uneven", "uneven", MANY, probe=True),
        job("routes top2", "top2", MANY, probe=True),
        job("marlin routes", "keep24", MANY, probe=True, moe_backend="marlin"),
        job("marlin plain", moe_backend="marlin"),
        job("marlin all", "all", moe_backend="marlin"),
    ]
    done = work / "results.json"
    finished = {run["name"] for run in json.loads(done.read_text()) if "error" not in run} if done.exists() else set()
    return [one for one in every if one["name"] not in finished]


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Teacher-forced log-probabilities of prompt tokens, side by side."""
    if "error" in a or "error" in b:
        return {"error": a.get("error") or b.get("error")}
    pairs = [(x, y) for one, two in zip(a["logprobs"], b["logprobs"], strict=True) for x, y in zip(one[:127], two[:127], strict=True)]
    gaps = [abs(x - y) for x, y in pairs]
    return {"max": max(gaps), "mean": sum(gaps) / len(gaps), "equal_share": sum(gap == 0 for gap in gaps) / len(gaps),
            "same_tokens": a["tokens"] == b["tokens"]}  # fmt: skip


def routes(result: dict[str, Any], mask_path: str, top_k: int) -> dict[str, Any]:
    """Selections of kept and pruned experts, and what their sum should be."""
    if "error" in result:
        return {"error": result["error"]}
    mask = mask_file.load(mask_path)
    counts, tokens = result["routes"][0]["counts"], sum(len(prompt) + MAX_TOKENS - 1 for prompt in MANY)
    pruned = [counts[layer][i] for layer in range(mask.model.num_layers) for i in mask.pruned(layer)]
    return {
        "tokens": tokens, "selections": sum(map(sum, counts)), "expected": tokens * top_k * mask.model.num_layers, "pruned": sum(pruned),
        "pruned_experts_selected_share": sum(count > 0 for count in pruned) / max(1, len(pruned)),
        "moe_backend": result["status"][0]["moe_backend"],
    }  # fmt: skip


def main(work: Path, out: Path) -> None:
    import torch
    import vllm

    start = time.time()
    masks = prepare(work)
    print(f"prepared in {time.time() - start:.0f} s", flush=True)
    (work / "jobs.json").write_text(json.dumps(jobs(work, masks)))
    environment = {
        **os.environ, **BASE_ENV, "PYTHONPATH": f"{HERE / 'plugins'}:{os.environ.get('PYTHONPATH', '')}", "SOFTPRUNE_TEST_PROVEN": TRIAL,
    }  # fmt: skip
    left = float(os.environ.get("PROVE_TIMEOUT", 560)) - (time.time() - start)
    with open(work / "log.txt", "wb") as log, contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, str(HERE / "offline.py"), "jobs.json", "results.json"]
        subprocess.run(command, cwd=work, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=left, check=False)
    evaluate(work, masks, out, {"vllm": vllm.__version__, "torch": torch.__version__, "gpu": torch.cuda.get_device_name()})


def evaluate(work: Path, masks: dict[str, str], out: Path, versions: dict[str, str]) -> None:
    runs = {run["name"]: run for run in json.loads((work / "results.json").read_text())}
    missing = {"error": "did not run"}
    get = lambda name: runs.get(name, missing)  # noqa: E731
    report = {
        "what": "gpt-oss-20b shape, random MXFP4 weights, seed 0; tests/gpu/prove_vllm.py", **versions,
        "boot_s": {name: run.get("boot_s", run.get("error")) for name, run in runs.items()},
        "logprobs": {
            f"{a} / {b}": difference(get(a), get(b))
            for a, b in PAIRS
        },
        "routes": {
            "keep24": routes(get("routes"), masks["keep24"], 4),
            "unmasked, experts that keep24 prunes": routes(get("routes unmasked"), masks["keep24"], 4),
            "uneven 19/32": routes(get("routes uneven"), masks["uneven"], 4),
            "keep20 top2": routes(get("routes top2"), masks["top2"], 2),
            "keep24 marlin": routes(get("marlin routes"), masks["keep24"], 4),
            "keep24 triton_unfused": routes(get("unfused routes"), masks["keep24"], 4),
            "qwen3-moe keep9": routes(get("qwen routes"), masks["qwen"], 4),
            "qwen3-moe unmasked, experts that keep9 prunes": routes(get("qwen routes unmasked"), masks["qwen"], 4),
        },
    }  # fmt: skip
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
