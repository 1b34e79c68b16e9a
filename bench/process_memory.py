"""What memory this process holds, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path


def status_mib(field: str) -> float:
    """A field of this process's status, e.g. "VmHWM", the largest resident size so far; files in the page cache are not in it.

    Unlike getrusage's ru_maxrss, it has nothing in it of what the process held that started this one.
    """
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024
