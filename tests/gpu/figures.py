"""From a proof's results to the committed raw file and the headline figures.

    python -m tests.gpu.figures ENGINE RESULTS.json

RESULTS.json is what `tests.gpu.prove` (also with --speed-only) or `tests.gpu.live` wrote.

A ratio is the median speed of one server over the median of the unpatched ones, which are booted twice so that the noise
between boots is known. A pass is left out of the medians (never out of the raw file) if it was slower than 0.9 of its
server's best at that batch size: an engine that compiles a kernel for a new shape in the middle of a pass loses a second or two,
whatever its mask. A ratio that fewer than three passes on either side are left for is no headline.
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
UNPATCHED = ("plain 1", "plain 2")
RATIOS = {"all": "mask.keep_all_over_unpatched", "keep24": "mask.keep24_over_unmasked", "top2": "top_k.2_over_4"}
"""Server whose speed is divided by the unpatched ones' -> name of the headline. Others are in the raw file only."""
BESIDE = (("unpatched_tok_s", "unpatched_tok_s", "tok/s"), ("unpatched_boot_2_over_boot_1", "boot_2_over_boot_1", "ratio"))
"""What else of a batch size is a headline: its name in the table, in the headline, and its unit."""
DISTURBED, ENOUGH = 0.9, 3


def passes(decode: dict[str, Any], row: str, batch: int) -> list[float]:
    """Tokens per second of a server's passes, by round: while decoding if they streamed, else in all."""
    rounds = sorted(name for name in decode if name.startswith(f"{row} round "))
    results = [result for name in rounds for result in decode[name]["results"] if result["batch"] == batch]
    return [(result["decode_tok_s"] or result["total_tok_s"])["median"] for result in results]


def undisturbed(values: list[float]) -> list[float]:
    """Those passes that no stall fell into."""
    return [value for value in values if value >= DISTURBED * max(values)]


def table(decode: dict[str, Any]) -> dict[str, Any]:
    """Per batch size: every server's passes and median, and the ratios that can be told."""
    rows = sorted({name.rpartition(" round ")[0] for name in decode if " round " in name})
    result: dict[str, Any] = {}
    for batch in BATCHES:
        found = {row: passes(decode, row, batch) for row in rows}
        kept = {row: undisturbed(values) for row, values in found.items()}
        unpatched = [value for row in UNPATCHED for value in kept.get(row, [])]
        speeds = {row: {"median": statistics.median(kept[row]), "kept": len(kept[row]), "passes": found[row]} for row in rows}
        ratios = {
            RATIOS.get(row, f"{row} / unpatched"): round(speeds[row]["median"] / statistics.median(unpatched), 4)
            for row in rows
            if row not in UNPATCHED and min(len(kept[row]), len(unpatched)) >= ENOUGH
        }
        result[f"bs{batch}"] = {"tok_s": speeds, "ratios": ratios}
        if len(unpatched) >= ENOUGH:
            result[f"bs{batch}"]["unpatched_tok_s"] = round(statistics.median(unpatched), 2)
        if all(row in rows for row in UNPATCHED):
            boots = [speeds[row]["median"] for row in UNPATCHED]
            result[f"bs{batch}"]["unpatched_boot_2_over_boot_1"] = round(boots[1] / boots[0], 4)
    return result


def main(engine: str, source: Path) -> None:
    document = json.loads(source.read_text())
    if "idle" in document:
        raw = RESULTS / f"{engine}_live_gpu.json"
        raw.write_text(json.dumps(document, indent=1) + "\n")
        record(RESULTS / "headline.json", f"{engine}.mask.switch_ms.p50", document["idle"]["p50"], "ms", raw.name)
        return
    for one in document["decode"].values():
        for result in one["results"]:
            for repeat in result["repeats"]:
                repeat.pop("streams", None)  # one record for each request; the figures are made of these
    document["speed"] = table(document["decode"])
    collecting = any(name.startswith("collect ") for name in document["decode"])
    kind = "" if document["routes"] else "_collect" if collecting else "_speed"
    raw = RESULTS / f"{engine}{kind}_gpu.json"
    raw.write_text(json.dumps(document, indent=1) + "\n")
    for batch, row in document["speed"].items():
        for name, value in row["ratios"].items():
            if name not in RATIOS.values():
                continue
            record(RESULTS / "headline.json", f"{engine}.{name}.{batch}", value, "ratio", raw.name)
        for name, headline, unit in BESIDE:
            if not collecting and name in row:
                record(RESULTS / "headline.json", f"{engine}.mask.{headline}.{batch}", row[name], unit, raw.name)
    print(json.dumps(document["speed"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
