"""`bench compare` and `bench max-batch` of a real server: what they find is what the server was started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softprune.bench.compare import Masks, compare
from softprune.bench.max_batch import max_batch
from softprune.bench.prompts import Workload
from softprune.bench.server import Server
from softprune.bench.step_limits import StepLimits
from softprune.mask import ExpertMask
from softprune.server_client import ServerClient


def check_comparison(server: Server, model: Path, mask: ExpertMask) -> None:
    """Passes, interval and roofline are there, the probe saw the mask at work, and the mask of before is in force again."""
    url = f"http://127.0.0.1:{server.port}"
    client = ServerClient(url, server.key)
    client.put_mask(mask)
    limits = StepLimits({"a": model, "b": model})
    document = compare(Masks(url, None, mask, ("none", "mask")), Workload(16, 32), [4], 3, key=server.key, limits=limits)
    (row,) = document["results"]
    assert row["order"] == "ABBAAB"
    assert all(one["completion_tokens"] == 32 for side in "ab" for passed in row[side]["repeats"] for one in passed["streams"])
    ratio = row["ratio"][row["figure"]]
    assert ratio["low"] < ratio["median"] < ratio["high"]
    sides = document["sides"]
    assert [sides[side]["softprune"]["mask_hash"] for side in "ab"] == [None, mask.hash]
    assert document["bandwidth"]["how"].startswith("PyTorch copy in this machine's memory")
    a, b = (row["roofline"][side] for side in "ab")
    assert (a["routing"], b["routing"]) == ("probe", "probe")
    assert mask.layer_top_k(0) <= b["distinct_experts"] < a["distinct_experts"]
    assert b["bytes"]["experts"] < a["bytes"]["experts"]
    assert 0 < b["share"] < 1
    in_force = client.mask()
    assert in_force is not None
    assert in_force.hash == mask.hash


def check_largest(server: Server, workload: Workload, expected: int, why: str, **options: Any) -> dict[str, Any]:
    """The largest batch is the one that the server's own settings allow."""
    document = max_batch(f"http://127.0.0.1:{server.port}", workload, key=server.key, repeats=2, **options)
    assert document["max_batch"] == expected, document["tries"]
    assert why in document["limit"]
    assert document["result"]["total_tok_s"]["median"] > 0
    return document
