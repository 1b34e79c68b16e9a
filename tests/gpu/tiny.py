"""The trained small gpt-oss, as MXFP4, in an engine on a GPU: does it say what Transformers says?

    python -m tests.gpu.tiny reference CHECKPOINT REFERENCE.npz --data DATA.npz.xz [--blocks 12] [--cpu]
    python -m tests.gpu.tiny ENGINE WORK_DIR OUT.json --checkpoint CHECKPOINT --reference REFERENCE.npz [--seconds 400] [--cpu]

The first makes teacher-forced log-probabilities of held-out blocks by Transformers in float32 (DATA is what training read); the second
boots the engine on the checkpoint as it is and asks it for the same. `--cpu` serves a dequantised copy on this machine's CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.bench.server import free_port
from softprune.bench.tiny import PACKS
from softprune.bench.tiny.batches import load
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate.reference import load_reference, score
from tests.gpu.engines import ENGINES, Engine, Row
from tests.gpu.prove import versions

MEAN_DIFFERENCE, RELATIVE_PERPLEXITY = 0.03, 0.01
"""Bars of a pack: the mean absolute difference of log-probabilities, and the relative difference of the perplexity of completion tokens."""


def make_reference(checkpoint: Path, data: Path, out: Path, blocks: int, device: str) -> None:
    """Write ids int32, keep bool and log_p float32 [blocks, 1024] of each pack, and the checkpoint's fingerprint."""
    model = load_reference(checkpoint).to(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    heldout = load(data)
    arrays: dict[str, NDArray[Any]] = {"fingerprint": np.array(fingerprint_of_checkpoint(checkpoint))}
    for pack in PACKS:
        ids = heldout.heldout_ids[pack][:blocks].astype(np.int32)
        arrays |= {f"{pack}.ids": ids, f"{pack}.keep": heldout.heldout_keep[pack][:blocks], f"{pack}.log_p": score(model, ids).log_p}
        print(pack, flush=True)
    np.savez_compressed(out, allow_pickle=False, **arrays)


def compare(engine: Engine, work: Path, checkpoint: Path, reference: Path, seconds: float) -> dict[str, Any]:
    """Boot, ask for every block, and put the figures beside the reference's."""
    served = work / "tiny"
    if engine.on_gpu:
        served.unlink(missing_ok=True)
        served.symlink_to(checkpoint.resolve())
    elif not served.exists():
        dequantize_checkpoint(checkpoint, served)
    began = time.monotonic()
    server = engine.start(Row("tiny served", "tiny", args=("--softprune-control",), graphs=True), work, {}, free_port())
    result: dict[str, Any] = {"what": "tests/gpu/tiny.py", **versions(engine), "packs": {}}
    try:
        server.wait_ready(seconds)
        result["boot_s"] = round(time.monotonic() - began, 1)
        status = server.request("GET", "/softprune/v1/status")[1]
        with np.load(reference, allow_pickle=False) as arrays:
            result |= {
                "moe_backend": status["moe_backend"],
                "fingerprint_is_the_references": status["fingerprint"] == str(arrays["fingerprint"]),
            }
            for pack in PACKS:
                found = [engine.ask(server, [ids.tolist()], 1)[0][1][:-1] for ids in arrays[f"{pack}.ids"]]
                result["packs"][pack] = figures(np.asarray(found), arrays[f"{pack}.log_p"][:, 1:], arrays[f"{pack}.keep"][:, 1:])
                print(pack, result["packs"][pack], flush=True)
    finally:
        server.stop(grace=0)
    result["passed"] = result["fingerprint_is_the_references"] and all(one["passed"] for one in result["packs"].values())
    return result


def figures(found: NDArray[np.float64], expected: NDArray[np.float32], keep: NDArray[np.bool_]) -> dict[str, Any]:
    """Of log-probabilities [blocks, tokens] of all tokens, and of the perplexity of those in `keep`."""
    gaps = np.abs(found - expected)
    perplexities = [math.exp(-float(scores[keep].mean())) for scores in (found, expected.astype(np.float64))]
    relative = perplexities[0] / perplexities[1] - 1
    return {
        "tokens": found.size, "completion_tokens": int(keep.sum()),
        "mean_difference": float(gaps.mean()), "largest_difference": float(gaps.max()),
        "perplexity": perplexities[0], "reference_perplexity": perplexities[1], "relative": float(relative),
        "passed": bool(gaps.mean() <= MEAN_DIFFERENCE and abs(relative) <= RELATIVE_PERPLEXITY),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", *ENGINES])
    parser.add_argument("folder", type=Path, help="the checkpoint, or the working folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="for booting")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.what == "reference":
        make_reference(args.folder, args.data, args.out, args.blocks, "cpu" if args.cpu else "cuda")
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    result = compare(ENGINES[args.what](not args.cpu), args.folder.resolve(), args.checkpoint, args.reference, args.seconds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
