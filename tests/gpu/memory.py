"""What is in use on the GPU that servers are started on."""

from __future__ import annotations

import os
import subprocess


def used_mib() -> int | None:
    """MiB in use by all processes on the first GPU that this one sees; None if its driver does not tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
