"""From the runs of `tests.gpu.stats` to the committed raw file and the headline figures.

    python -m tests.gpu.stats_figures ENGINE RUN.json [LATER_RUN.json …]

What a later run measured takes the place of an earlier one's; all runs are in the raw file. "off" in a headline's name is an
unpatched engine, "idle" one that was started with `eaft` and collects nothing, "without" one with softprune but without statistics;
`router` is of an engine that was started with `router`.
Passes are left out of medians, and ratios of too few passes out of the headlines, as in `tests.gpu.figures`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from softprune.bench.headline import record
from tests.gpu.figures import ENOUGH, RESULTS, undisturbed

MEASURED = {
    "decode": "decode_bs32", "prefill": "prefill_8x8192", "prefill_logprobs": "prefill_8x8192_logprobs",
    "decode_router": "decode_bs32", "prefill_router": "prefill_8x8192",
}  # fmt: skip
MODES = {"router": "router", "reap": "reap", "eaft": "eaft", "off": "idle", "without": "without"}
"""A row of the raw file, and its name in a headline."""
OTHERS = ("unpatched", "without", "off")


def ratios(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Median speed of each row over each other row that collects nothing; of passes that no stall fell into."""
    kept = {name: undisturbed(values) for name, values in speeds.items() if values}
    return {
        f"{name} / {other}": round(statistics.median(kept[name]) / statistics.median(kept[other]), 4)
        for name in kept
        for other in OTHERS
        if other in kept and name != other and min(len(kept[name]), len(kept[other])) >= ENOUGH
    }


def main(engine: str, sources: list[Path]) -> None:
    runs: list[dict[str, Any]] = [json.loads(source.read_text()) for source in sources]
    raw = RESULTS / f"{engine}_stats_gpu.json"
    for run in runs:
        for name in MEASURED:
            if name in run:
                run[name] = {"tok_s": run[name]["tok_s"], "ratios": ratios(run[name]["tok_s"])}
    raw.write_text(json.dumps({"what": runs[0]["what"], "runs": runs}, indent=1) + "\n")
    for run in runs:
        for measured, suffix in MEASURED.items():
            found = run.get(measured, {}).get("ratios", {})
            for mode, name in MODES.items():
                if f"{mode} / unpatched" in found and not (mode == "off" and measured.endswith("_router")):
                    record(
                        RESULTS / "headline.json",
                        f"{engine}.stats.{name}_over_off.{suffix}",
                        found[f"{mode} / unpatched"],
                        "ratio",
                        raw.name,
                    )
        print(json.dumps({name: run[name]["ratios"] for name in MEASURED if name in run}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], [Path(source) for source in sys.argv[2:]])
