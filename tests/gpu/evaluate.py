"""The trained small gpt-oss, as MXFP4, in an engine on a GPU: the sweep of tests/evidence/test_sweep.py, and its verdicts.

    python -m tests.gpu.evaluate prepare WORK_DIR                    where PyArrow is; JSON Lines of both halves, 3 MB
    python -m tests.gpu.evaluate ENGINE WORK_DIR OUT.json [--checkpoint bench/tiny/weights] [--stats STATS.safetensors[.xz]]
        [--beside CPU_EVIDENCE.json] [--cpu]

The second boots the engine as users do, with CUDA graphs, and runs softprune's own commands against it. `--beside` names evidence that was
recorded on a CPU; the verdicts of both stand side by side then, and have to be the same. Masks are the same if `--stats` is what that run
ranked (else some are collected).
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from pathlib import Path
from typing import Any

from softprune.bench.server import free_port
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.server_client import ServerClient
from tests.gpu.engines import ENGINES, Engine, Row, versions
from tests.sweeping import prepare, sweeps


def measure(engine: Engine, work: Path, checkpoint: Path) -> dict[str, Any]:
    """Boot, sweep, and say what was found."""
    served = work / "tiny"
    if engine.on_gpu:
        served.unlink(missing_ok=True)
        served.symlink_to(checkpoint.resolve())
    elif not served.exists():
        dequantize_checkpoint(checkpoint, served)
    began = time.monotonic()
    server = engine.start(Row("sweep", "tiny", args=("--softprune-stats", "eaft"), graphs=engine.on_gpu), work, {}, free_port())
    try:
        server.wait_ready(400)
        booted = time.monotonic()
        client = ServerClient(f"http://127.0.0.1:{server.port}", server.key)
        _, cells = sweeps(client.url, server.key or "", work, checkpoint, ["--decode-batch", 32, "--decode-tokens", 256])
        status = client.status()
        assert status["mask"] is None, status
    finally:
        server.stop()
    return {
        "what": "tests/gpu/evaluate.py", **versions(engine), "boot_s": booted - began, "sweep_s": time.monotonic() - booted,
        "cells": cells,
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["prepare", *ENGINES])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--checkpoint", type=Path, default=Path("bench/tiny/weights"))
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.engine == "prepare":
        prepare(arguments.work)
        return
    if arguments.stats is not None:
        read = lzma.open if arguments.stats.suffix == ".xz" else open
        with read(arguments.stats, "rb") as file:
            (arguments.work / "stats.safetensors").write_bytes(file.read())
    result = measure(ENGINES[arguments.engine](not arguments.cpu), arguments.work, arguments.checkpoint)
    if arguments.beside is not None:
        cpu = json.loads(arguments.beside.read_text())["figures"]["sweep.vllm_cpu"]["cells"]
        result["verdicts"] = {label: [cell["verdict"], cpu[label]["verdict"]] for label, cell in result["cells"].items()}
        result["same_verdicts"] = all(own == other for own, other in result["verdicts"].values())
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result.get("same_verdicts", True) else 1)


if __name__ == "__main__":
    main()
