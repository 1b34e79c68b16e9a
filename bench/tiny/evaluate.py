"""An evaluation file of the trained small model by Transformers in float32: what `softprune eval` is compared with.

    .venv/bin/python -m softprune.bench.tiny.evaluate MODEL OUT.json --num-blocks 256

MODEL is a checkpoint folder; a mask is evaluated by rewriting the checkpoint with it.
"""

from __future__ import annotations

import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from softprune import __version__
from softprune.bench.tiny import CONTEXT, PACKS
from softprune.bench.tiny.measure_packs import load_tokenizer, pack_files
from softprune.checkpoint.families import read_config
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate import evaluation
from softprune.evaluate.metrics import Accumulator, MetricSettings
from softprune.evaluate.packing import UNION, block_hashes, blocks_sha256, pack_rows, read_rows, union
from softprune.evaluate.reference import load_reference, score
from softprune.files import digest_of_file
from softprune.report.progress import count_progress


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Evaluation file to write.")],
    num_blocks: Annotated[int, typer.Option(help="Blocks of UNION.")] = 256,
    label: Annotated[str | None, typer.Option(help="Of the model; without it, the folder's name.")] = None,
    packs: Annotated[Path, typer.Option(help="Folder of the packs.")] = Path("bench/tiny/packs"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = Path("bench/tiny/tokenizer"),
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
) -> None:
    """Score UNION's blocks and write the file."""
    torch.set_num_threads(threads)
    files = [pack_files(packs)[name] for name in PACKS]
    blocks = pack_rows(union([read_rows(path) for path in files]), load_tokenizer(tokenizer), CONTEXT, num_blocks, UNION)
    reference, settings = load_reference(model), MetricSettings()
    accumulator = Accumulator(settings)
    with count_progress("blocks", num_blocks, Console(stderr=True)) as advance:
        for ids, keep in zip(blocks.ids, blocks.keep, strict=True):
            scores = score(reference, ids[None], entropies=True, top=settings.entropy_topk)
            assert scores.top_entropy is not None
            accumulator.add_block(scores.log_p[0, keep], scores.top_entropy[0, keep])
            advance(1)
    plane = settings.plane
    meta = {
        "dataset_repo": None, "pack_files": [path.name for path in files], "model_id": label or model.name, "model_path": model.name,
        "gpu_type": None, "gpu_name": None, "gpu_sm": None, "torch": torch.__version__, "transformers_version": version("transformers"),
        "engine": "transformers", "top_k": read_config(model)["num_experts_per_tok"], "entropy_topk": settings.entropy_topk,
        "cc_quantile": settings.cc_quantile, "num_blocks": num_blocks, "batch_size": 1, "hist_xbins": plane.xbins,
        "hist_ybins": plane.ybins, "prob_scale": plane.scale, "logp_min": plane.logp_min, "logp_max": plane.logp_max,
        "sample_points": settings.sample_points, "seq_lens": [CONTEXT], "axes": {"x": "p", "y": f"H_top{settings.entropy_topk}/ln(K)"},
        "x_min": plane.x_range[0], "x_max": plane.x_range[1], "run_id": "reference",
        "softprune": {
            "format": evaluation.FORMAT, "version": evaluation.VERSION, "softprune_version": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "fingerprint": fingerprint_of_checkpoint(model), "mask": None, "num_kept": None,
            "tokenizer_sha256": digest_of_file(tokenizer / "tokenizer.json"), "block_form": "L",
            "vocabulary_size": read_config(model)["vocab_size"],
        },
    }  # fmt: skip
    seen = {
        "rows_seen": blocks.rows_seen, "rows_sha256": blocks.rows_sha256, "num_blocks": num_blocks,
        "blocks_sha256": blocks_sha256(block_hashes(blocks)),
    }  # fmt: skip
    cell = {**seen, "pack_wall_s": None, "model": accumulator.cell()}
    evaluation.write({"meta": meta, "packs": [{"pack": UNION, "seq": {str(CONTEXT): cell}}]}, out)


if __name__ == "__main__":
    typer.run(main)
