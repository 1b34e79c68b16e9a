"""One rewrite in a process of its own: how long it took, and its peak memory above what the interpreter and its imports hold.

python -m softprune.bench.rewrite_once SOURCE MASK OUT MAX_SHARD_BYTES LAYERS|all
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from softprune import mask as mask_file
from softprune.bench.process_memory import status_mib
from softprune.checkpoint.rewrite import rewrite


def main() -> None:
    """Print {"seconds", "cpu_seconds", "bytes", "shards", "interpreter_mib", "peak_mib"}; without verification, ending in fsync."""
    source, path, out, shard, layers = sys.argv[1:]
    mask = mask_file.load(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = status_mib("VmRSS")
    begun, used = time.monotonic(), time.process_time()
    chosen = None if layers == "all" else [int(layer) for layer in layers.split(",")]
    plan = rewrite(source, mask, out, max_shard_bytes=int(shard), layers=chosen, verify=False)
    seconds, used = time.monotonic() - begun, time.process_time() - used
    figures = {"seconds": seconds, "cpu_seconds": used, "bytes": plan.bytes_written, "shards": len(plan.shards)}
    print(json.dumps({**figures, "interpreter_mib": before, "peak_mib": status_mib("VmHWM") - before}))  # noqa: T201 - read by the caller


if __name__ == "__main__":
    main()
