"""Work on checkpoints of the real size: bounded memory, and how long it takes. Needs 14 GB of disk.

Run alone: pytest tests/evidence/test_20b_shape.py -s
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Evidence

SCRIPT = """
import json, sys, time
from softprune.bench.process_memory import status_mib
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
start = time.monotonic()
synth_checkpoint("gpt-oss-20b", sys.argv[1], "mxfp4", seed=0)
made = time.monotonic()
fingerprint = fingerprint_of_checkpoint(sys.argv[1])
peak = status_mib("VmHWM")
print(json.dumps({"synth_s": made - start, "fingerprint_s": time.monotonic() - made, "peak_mib": peak, "fingerprint": fingerprint}))
"""


@pytest.mark.timeout(1200)
def test_the_20b_shape_needs_under_4_gib(tmp_path: Path, evidence: Evidence) -> None:
    out = tmp_path / "gpt-oss-20b"
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(out)], capture_output=True, text=True, check=True)
    figures = json.loads(run.stdout)
    figures["bytes"] = sum(file.stat().st_size for file in out.iterdir())
    evidence("checkpoint.synth.gpt-oss-20b.mxfp4", figures)
    assert figures["bytes"] > 13_000_000_000
    assert figures["peak_mib"] < 4096
    for file in out.iterdir():
        file.unlink()
