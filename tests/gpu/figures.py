"""From a proof's results to the committed raw file and the headline figures.

    python -m tests.gpu.figures ENGINE RESULTS.json

A ratio is the median over rounds of one server's speed over another's in the same round; the unpatched server is booted
twice, and the mean of both is what others are compared with.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from softprune.bench.headline import record

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"
BATCHES = (1, 8, 32, 64)
RATIOS = {"mask.keep_all_over_unpatched": "all", "mask.keep24_over_unmasked": "keep24", "top_k.2_over_4": "top2"}
"""Headline name -> the server whose speed is divided by the unpatched ones'."""


def speeds(decode: dict[str, Any], row: str, batch: int) -> list[float]:
    """Total tokens per second of a server, by round."""
    rounds = sorted(name for name in decode if name.startswith(f"{row} round "))
    return [result["total_tok_s"]["median"] for name in rounds for result in decode[name]["results"] if result["batch"] == batch]


def ratios(decode: dict[str, Any], batch: int) -> dict[str, Any]:
    """Each ratio with its rounds, and what two boots of the same server differ by."""
    first, second = speeds(decode, "plain 1", batch), speeds(decode, "plain 2", batch)
    unpatched = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    rows = {name: [a / b for a, b in zip(speeds(decode, row, batch), unpatched, strict=True)] for name, row in RATIOS.items()}
    rows["unpatched.boot_2_over_boot_1"] = [b / a for a, b in zip(first, second, strict=True)]
    return {name: {"median": statistics.median(values), "rounds": values} for name, values in rows.items()}


def main(engine: str, source: Path) -> None:
    document = json.loads(source.read_text())
    decode = document["decode"]
    document["ratios"] = {f"bs{batch}": ratios(decode, batch) for batch in BATCHES}
    document["tok_s"] = {
        row: {f"bs{batch}": statistics.median(speeds(decode, row, batch)) for batch in BATCHES}
        for row in ("plain 1", "plain 2", "all", "keep24", "top2")
    }  # fmt: skip
    for one in decode.values():
        for result in one["results"]:
            for repeat in result["repeats"]:
                repeat.pop("streams", None)  # one line a stream; the figures above them are made of these
    raw = RESULTS / f"{engine}_gpu.json"
    raw.write_text(json.dumps(document, indent=1) + "\n")
    for name in RATIOS:
        for batch in BATCHES:
            record(
                RESULTS / "headline.json",
                f"{engine}.{name}.bs{batch}",
                round(document["ratios"][f"bs{batch}"][name]["median"], 4),
                "ratio",
                raw.name,
            )
    print(json.dumps({"tok_s": document["tok_s"], "ratios": document["ratios"]}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
