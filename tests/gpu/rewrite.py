"""Is a masked engine on a GPU the same as one that serves the rewritten checkpoint?

    python -m tests.gpu.rewrite ENGINE WORK_DIR OUT.json [--seconds 240] [--cpu]

Rewrites the 20B shape to 24 of 32 experts, proves it, and serves it with no option beyond its path, beside the masked one. Teacher-forced
log-probabilities of both are compared, and set beside what batching alone does to one of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprune.bench.server import Server, free_port
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.verify import verify_checkpoint
from tests.conftest import random_mask, random_prompts, saved
from tests.gpu.engines import ENGINES, Engine, Row, versions
from tests.gpu.prove import arguments

PROMPTS, LENGTH, BATCH = 64, 128, 32


def scores(engine: Engine, server: Server, prompts: Sequence[list[int]], batch: int) -> np.ndarray:
    """Log-probabilities [prompts, LENGTH - 1] of the prompts' tokens but the first."""
    answers = [one for start in range(0, len(prompts), batch) for one in engine.ask(server, prompts[start : start + batch], 1)]
    return np.asarray([values[: LENGTH - 1] for _, values in answers])


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    gaps = np.abs(one - other)
    return {"equal": float((gaps == 0).mean()), "mean": float(gaps.mean()), "largest mean of a prompt": float(gaps.mean(1).max())}


def compare(engine: Engine, work: Path, seconds: float) -> dict[str, Any]:
    """Everything, as JSON."""
    base, deadline = work / "base", time.monotonic() + seconds
    if not base.exists():
        synth_checkpoint("gpt-oss-20b" if engine.on_gpu else "tiny", base, "mxfp4" if engine.on_gpu else "bf16", seed=0)
    mask, out = random_mask(base, 24, seed=1), work / "rewritten24"
    result: dict[str, Any] = {"what": "tests/gpu/rewrite.py", **versions(engine)}
    if not out.exists():
        began = time.monotonic()
        rewrite(base, mask, out, verify=False)
        result["rewrite_s"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    result["problems"] = [str(problem) for problem in verify_checkpoint(base, out).problems]
    result["verify_s"] = round(time.monotonic() - began, 1)
    print(result, flush=True)
    rows = [Row("masked", mask="keep24", graphs=True), Row("rewritten", "rewritten24", patched=False, graphs=True)]
    servers = [engine.start(row, work, {"keep24": saved(mask, work / "keep24.json")}, free_port()) for row in rows]
    try:
        for server in servers:
            server.wait_ready(max(1.0, deadline - time.monotonic() - 30))
        prompts = random_prompts(PROMPTS, LENGTH, seed=77)
        masked, rewritten = (scores(engine, server, prompts, 1) for server in servers)
        result["masked and rewritten"] = difference(masked, rewritten)
        for name, server, alone in zip(("masked", "rewritten"), servers, (masked, rewritten), strict=True):
            result[f"noise: {name}, alone and in batches of {BATCH}"] = difference(alone, scores(engine, server, prompts, BATCH))
    finally:
        for server in servers:
            server.stop(grace=0)
    noise = min(found["mean"] for name, found in result.items() if name.startswith("noise"))
    result["passed"] = not result["problems"] and result["masked and rewritten"]["mean"] <= noise
    return result


def main() -> None:
    args = arguments(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = compare(ENGINES[args.engine](not args.cpu), args.work.resolve(), args.seconds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
