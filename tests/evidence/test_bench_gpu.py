"""The GPU benchmark's scripts from end to end, on the CPU: a run that is killed, one that goes on, one without time, figures and a report.

Run alone: pytest tests/evidence/test_bench_gpu.py. Real vLLM servers with the small trained model, two at once; about two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softprune.bench.gpu.plan import VARIANTS, tiny
from softprune.bench.gpu.session import PIDS, row_files
from softprune.bench.report import write_report
from tests.conftest import Evidence

pytestmark = pytest.mark.engine


def command(folder: Path, *options: str) -> list[str]:
    places = (str(folder / "work"), str(folder / "out"))
    return [sys.executable, "-m", "softprune.bench.gpu", "vllm", *places, "--preset", "tiny", "--limit-s", "300", *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=310)
    print(found.stdout, found.stderr[-2000:])
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that run; a killed process whose parent is gone may stay as a zombie where nobody reaps."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, stat in states.items() if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"]


@pytest.mark.timeout(900)
def test_from_a_kill_to_the_figures(tmp_path: Path, evidence: Evidence) -> None:
    out, few = tmp_path / "out", tiny()[0].rows
    first = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 280
    while len(row_files(out)) < 4 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    pids = json.loads((tmp_path / "work" / PIDS).read_text())
    first.kill()
    first.wait()
    before = {path.name: path.read_bytes() for path in row_files(out)}
    assert 4 <= len(before) < len(few)
    assert alive(pids) == pids  # nobody could end them
    assert "expected an empty folder, or --resume" in run(tmp_path).stderr

    only = [option for row in few for option in ("--only", row.name)]
    second = run(tmp_path, "--resume", *only)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("of a run that was killed") == 2
    assert alive(pids) == []
    assert "left: none" in second.stdout
    assert {name: (out / name).read_bytes() for name in before} == before
    assert {path.name for path in out.iterdir()} == {f"{row.name}.json" for row in few} | {"run.json"}
    assert not (tmp_path / "work" / PIDS).exists()

    began = time.monotonic()
    third = run(tmp_path, "--resume", "--limit-s", "20")
    assert third.returncode == 0
    assert "top_k: 45 s and a first round of" in third.stdout
    assert "left: top2.bs4.new16.r1, keep24_top2.bs4.new16.r1, keep24_started.bs4.new16.r1" in third.stdout
    assert time.monotonic() - began < 20

    started = "keep24_started.bs4.new16.r1"
    fourth = run(tmp_path, "--resume", "--only", started)
    assert "started24: up after" in fourth.stdout, fourth.stderr
    assert json.loads((out / f"{started}.json").read_text())["softprune"]["num_kept"] == [24] * 4
    (out / f"{started}.json").unlink()  # so that what follows is of the first phase

    documents = [json.loads((out / f"{row.name}.json").read_text()) for row in few]
    for row, document in zip(few, documents, strict=True):
        served, keep = document["softprune"], VARIANTS[row.variant].keep
        assert (served is None) == (not VARIANTS[row.variant].server.is_patched)
        assert served is None or served["num_kept"] == (None if keep is None else [keep] * 4)
        (request, _) = document["results"][0]["repeats"][0]["streams"]
        assert (request["prompt_tokens"], request["completion_tokens"]) == (32, 96)
    results = tmp_path / "results"
    results.mkdir()
    made = subprocess.run(
        [sys.executable, "-m", "softprune.bench.gpu", "figures", str(out), "--results", str(results)], check=True, capture_output=True,
        text=True, env=os.environ,
    )  # fmt: skip
    assert made.stdout.splitlines() == ["vllm_decode_gpu.json", "vllm_decode_ratios.svg"]  # answers of 96 tokens are no headlines
    assert not (results / "headline.json").exists()
    text = write_report([results / "vllm_decode_gpu.json"], tmp_path / "report")
    assert text.count("| base | keep24 | 2 |") == 1
    assert "| rewritten24 | keep24_rewritten | 2 |" in text
    ratios = {
        f"{one['b']} / {one['a']}": one["ratio"]["pairs"] for one in json.loads((results / "vllm_decode_gpu.json").read_text())["compared"]
    }
    assert set(ratios) == {"keep24 / keep24_rewritten", "keep24 / unmasked", "keep24_rewritten / unmasked"}
    # The round that the kill fell into was measured by two boots; its rows are compared only where one boot had both.
    assert all(2 <= len(pairs) <= 3 for pairs in ratios.values())
    evidence("bench.gpu.tiny", {"rows_before_the_kill": len(before), "rows": len(few), "ratios": ratios})
