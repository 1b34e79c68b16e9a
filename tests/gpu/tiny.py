"""The trained small gpt-oss, as MXFP4, in an engine on a GPU: does it say what Transformers says?

    python -m tests.gpu.tiny reference CHECKPOINT REFERENCE.npz [--blocks 12]
    python -m tests.gpu.tiny ENGINE WORK_DIR OUT.json --checkpoint CHECKPOINT --reference REFERENCE.npz [--blocks N] [--seconds 400] [--cpu]

The first makes teacher-forced log-probabilities of the first blocks of the committed held-out packs, by Transformers in float32, where
softprune's own dependencies are; the second boots the engine on the checkpoint as it is, next to nothing but the engine's packages, and
asks it for the same. `--cpu` serves a dequantised copy on this machine's CPU.
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
from numpy.typing import NDArray

from softprune.bench.server import free_port
from softprune.bench.tiny import PACKS
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate.reference import load_reference, perplexity, score
from tests.gpu.engines import ENGINES, Engine, Row, versions

MEAN_DIFFERENCE, RELATIVE_PERPLEXITY = 0.03, 0.01
"""Bars of a pack: the mean absolute difference of log-probabilities, and the relative difference of the perplexity of completion tokens."""


def make_reference(checkpoint: Path, out: Path, blocks: int) -> None:
    """Write ids int32, keep bool and log_p float32 [blocks, 1024] of each pack, and the checkpoint's fingerprint."""
    # Reading packs takes PyArrow, which engines don't bring along.
    from softprune.bench.tiny.batches import HERE
    from softprune.bench.tiny.measure_packs import load_tokenizer, pack_blocks

    model = load_reference(checkpoint)
    arrays: dict[str, NDArray[Any]] = {"fingerprint": np.array(fingerprint_of_checkpoint(checkpoint))}
    for pack, heldout in pack_blocks(HERE / "packs", load_tokenizer(HERE / "tokenizer"), blocks).items():
        log_p = score(model, heldout.ids).log_p
        arrays |= {f"{pack}.ids": heldout.ids, f"{pack}.keep": heldout.keep, f"{pack}.log_p": log_p}
        print(f"{pack}: {heldout.num_kept} completion tokens, perplexity {perplexity(log_p, heldout.keep)}", flush=True)
    np.savez_compressed(out, allow_pickle=False, **arrays)


def compare(engine: Engine, work: Path, checkpoint: Path, reference: Path, blocks: int | None, seconds: float) -> dict[str, Any]:
    """Boot, ask for the first blocks or all, and put the figures beside the reference's."""
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
                ids, log_p, keep = (arrays[f"{pack}.{name}"][:blocks] for name in ("ids", "log_p", "keep"))
                found = [engine.ask(server, [block.tolist()], 1)[0][1][:-1] for block in ids]
                result["packs"][pack] = figures(np.asarray(found), log_p[:, 1:], keep[:, 1:])
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
    parser.add_argument("--blocks", type=int, help="of each pack; 12 in a reference, and all of it in a comparison")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="for booting")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.what == "reference":
        make_reference(args.folder, args.out, args.blocks or 12)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    engine = ENGINES[args.what](not args.cpu)
    result = compare(engine, args.folder.resolve(), args.checkpoint, args.reference, args.blocks, args.seconds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
