"""A report holds what raw files hold and nothing else, keeps apart what cannot be compared, and marks what was measured too seldom."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from softprune.bench.decode import measure
from softprune.bench.packed import packed, unpacked
from softprune.bench.prompts import Workload
from softprune.bench.report import write_report
from softprune.bench.report_plot import plot_ratios
from softprune.bench.report_read import read_rows
from softprune.bench.report_rows import Compared, Setting
from softprune.cli import app
from softprune.errors import InputError
from tests.unit.fake_server import Behaviour, FakeServer

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"
HEAD: dict[str, Any] = {
    "engine": {"name": "SGLang", "version": "0.5.17"}, "model": "base", "gpu": "NVIDIA H100", "server_flags": {},
    "softprune": {"mask_hash": None, "num_kept": [32, 32], "top_k": 4},
}  # fmt: skip
KEEP24 = {"mask_hash": "sha256:ab", "num_kept": [24, 24], "top_k": 4}


def row(batch: int, *speeds: float, stream: bool = True) -> dict[str, Any]:
    shown = {"median": 1.0} if stream else None
    passes = [{"total_tok_s": speed - 1, "decode_tok_s": speed if stream else None} for speed in speeds]
    return {"batch": batch, "decode_tok_s": shown, "ttft_p50_s": shown, "inter_token_p50_ms": shown, "repeats": passes}


def decode(*rows: dict[str, Any], new: int = 512, **head: Any) -> dict[str, Any]:
    settings = {"prompt_tokens": 256, "max_new_tokens": new}
    return {"format": "softprune.decode-benchmark", "version": 1, "notes": {}, **HEAD, **head, "settings": settings, "results": list(rows)}


def comparison(pairs: int = 3, **b: Any) -> dict[str, Any]:
    low, high = (1.07, 1.09) if pairs >= 3 else (None, None)
    ratio = {"pairs": [1.08] * pairs, "median": 1.08, "low": low, "high": high, "verdict": "faster"}
    speeds = [float(100 + i) for i in range(pairs)]
    result = {
        "batch": 8, "a": row(8, *speeds), "b": row(8, *speeds), "ratio": {"total_tok_s": ratio, "decode_tok_s": ratio},
        "figure": "decode_tok_s", "says": "B is 8.0 % faster", "roofline": {"a": {"share": 0.5}, "b": {"share": 0.61}},
    }  # fmt: skip
    sides = {"a": {"name": "none", **HEAD}, "b": {"name": "keep24.json", **HEAD, "softprune": KEEP24, **b}}
    settings = {"prompt_tokens": 256, "max_new_tokens": 512}
    return {"format": "softprune.decode-comparison", "version": 1, "notes": {}, "settings": settings, "sides": sides, "results": [result]}


def max_batch(*speeds: float, **notes: str) -> dict[str, Any]:
    result = row(10, *speeds) if speeds else None
    return {
        "format": "softprune.max-batch", "version": 1, "notes": notes, **HEAD, "settings": {"prompt_tokens": 256, "max_new_tokens": 512},
        "memory": {"weights_gib": 12.8, "kv_gib": 1.1, "graphs_gib": 0.9, "kv_tokens": 24_000}, "max_batch": 10 if speeds else None,
        "limit": "preempted", "result": result,
    }  # fmt: skip


def report(folder: Path, *documents: dict[str, Any]) -> str:
    raw = []
    for number, document in enumerate(documents):
        raw.append(folder / f"{number}.json")
        raw[-1].write_text(json.dumps(document))
    return write_report(raw, folder / "out")


def lines(text: str, part: str) -> list[str]:
    """Table rows under the headings that hold a text."""
    return [line for section in text.split("\n## ") if part in section.split("\n")[0] for line in section.split("\n") if line[:1] == "|"][
        2:
    ]


def test_speeds_of_one_thing_are_pooled_and_few_are_marked(tmp_path: Path) -> None:
    masked = {"softprune": KEEP24}
    text = report(
        tmp_path, decode(row(8, 100.0, 104.0), row(1, 20.0)), decode(row(8, 102.0)), decode(row(8, 110.0, 120.0), **masked),
    )  # fmt: skip
    assert lines(text, "256 + 512 tokens") == [
        "| base | unmasked, top_k 4 | 1 | 20.0 † | | 1 | 1.000 | 1.00 |",
        "| base | unmasked, top_k 4 | 8 | 102.0 | 3.9% | 3 | 1.000 | 1.00 |",
        "| base | keep 24, top_k 4 | 8 | 115.0 † | 8.7% | 2 | 1.000 | 1.00 |",
    ]
    assert "†: fewer than 3 repeats" in text
    assert "†" not in report(tmp_path, decode(row(8, 100.0, 104.0, 102.0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu": "NVIDIA H200"}, "Measured on NVIDIA H100, NVIDIA H200 with SGLang 0.5.17"),
        ({"engine": {"name": "vLLM", "version": "0.26.0"}}, "Measured on NVIDIA H100 with SGLang 0.5.17, vLLM 0.26.0"),
        ({"new": 2048}, "256 + 2,048 tokens"),
    ],
)
def test_other_settings_have_pictures_of_their_own(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    text = report(tmp_path, decode(row(8, 1.0, 1.0, 1.0)), decode(row(8, 9.0, 9.0, 9.0), **change))
    assert said in text
    assert text.count("\n## ") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "tok_s_1.svg", "tok_s_2.svg"]
    report(tmp_path, decode(row(8, 1.0)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "tok_s_1.svg"]


def test_whole_answers_and_streams_are_not_mixed(tmp_path: Path) -> None:
    text = report(tmp_path, decode(row(8, 10.0)), decode(row(8, 20.0, stream=False)))
    assert [line.split(" | ")[3] for line in lines(text, "while all streams decode")] == ["10.0 †"]
    assert [line.split(" | ")[3] for line in lines(text, "whole answers")] == ["19.0 †"]


def test_other_models_and_flags_are_said(tmp_path: Path) -> None:
    text = report(tmp_path, decode(row(8, 10.0)), decode(row(8, 20.0), model="base-keep24"))
    assert len(lines(text, "tokens")) == 2
    assert "Curves are of different models" in text
    text = report(tmp_path, decode(row(8, 10.0)), decode(row(8, 20.0), server_flags={"max_total_tokens": 5}))
    assert "Repeats of servers with different flags are in one row: base, unmasked, top_k 4, batch 8." in text
    seeds = [decode(row(8, 10.0), server_flags={"random_seed": seed}) for seed in (1, 2)]
    assert "different flags" not in report(tmp_path, *seeds)


def test_ratios(tmp_path: Path) -> None:
    text = report(tmp_path, comparison())
    assert lines(text, "Compared") == ["| keep24.json / none | 8 | 1.080 | 1.070 to 1.090 | 3 | B is 8.0 % faster | 50% | 61% |"]
    assert len(lines(text, "SGLang")) > 2
    text = report(tmp_path, comparison(2, model="rewritten"))
    assert lines(text, "Compared") == ["| rewritten, keep24.json / base, none | 8 | 1.080 † | | 2 | B is 8.0 % faster | 50% | 61% |"]
    assert "ran on" in report(tmp_path, comparison(gpu="NVIDIA H200"))


def served(text: str) -> list[str]:
    """What the speed tables say is served, and the speeds."""
    return [" | ".join((line.split(" | ")[1], line.split(" | ")[3])) for line in lines(text, "SGLang") if line.startswith("| base")]


def test_sides_are_never_pooled(tmp_path: Path) -> None:
    """Two masks that keep as many experts, and two servers that say the same of themselves."""
    document = comparison()
    document["results"][0]["b"] = row(8, 200.0, 201.0, 202.0)
    other = {**KEEP24, "mask_hash": "sha256:0123456789ef"}
    for name, mask in (("a", {**KEEP24, "mask_hash": "sha256:fedcba9876"}), ("b", other)):
        document["sides"][name]["softprune"] = mask
    assert served(report(tmp_path, document)) == [
        "keep 24, top_k 4, mask fedcba98 | 101.0", "keep 24, top_k 4, mask 01234567 | 201.0",
    ]  # fmt: skip
    # And over files: B once more is the same row, a largest batch under the other mask is told apart.
    text = report(tmp_path, document, decode(row(8, 203.0), softprune=other), {**max_batch(50.0), "softprune": other})
    assert served(text)[1] == "keep 24, top_k 4, mask 01234567 | 201.5"
    assert "mask " not in "".join(served(report(tmp_path, comparison())))
    for name in ("a", "b"):
        document["sides"][name] |= {"softprune": None, "name": {"a": "first server", "b": "second server"}[name]}
    expected = ["without softprune, first server | 101.0", "without softprune, second server | 201.0"]
    assert served(report(tmp_path, document)) == expected
    document["sides"]["b"]["name"] = "first server"
    assert [text.split(" | ")[0] for text in served(report(tmp_path, document))] == ["without softprune, A", "without softprune, B"]
    one, two = (decode(row(8, 1.0), softprune={**KEEP24, "fingerprint": f"sha256:{digit * 9}"}) for digit in "12")
    assert served(report(tmp_path, one, two)) == ["keep 24, top_k 4, model 11111111 | 1.0 †", "keep 24, top_k 4, model 22222222 | 1.0 †"]


def test_flags_of_a_comparison_are_known(tmp_path: Path) -> None:
    assert "different flags" in report(tmp_path, comparison(), decode(row(8, 1.0), server_flags={"max_total_tokens": 5}))
    assert "different flags" not in report(tmp_path, comparison(), decode(row(8, 1.0), server_flags={"random_seed": 5}))


def test_largest_batch_and_memory(tmp_path: Path) -> None:
    text = report(tmp_path, max_batch(50.0, 51.0, 52.0), max_batch())
    assert lines(text, "Largest batch: SGLang 0.5.17, NVIDIA H100, 256 + 512 tokens, while") == [
        "| base | unmasked, top_k 4 | 24,000 | 10 | preempted | 51.0 | 3 |"
    ]
    assert "| base, unmasked, top_k 4, NVIDIA H100, 24000 KV tokens | 12.80 | 1.10 | 0.90 |" in text
    assert (tmp_path / "out" / "memory.svg").exists()
    usage = {"weight": 41.4, "kvcache": 4.9, "graph": {"prefill": 3.2, "decode": -0.7}}
    shared = decode(row(8, 1.0), server_flags={"memory_usage": usage}, notes={"servers_on_gpu": "3"})
    text = report(tmp_path, shared, max_batch(50.0, servers_on_gpu="3"))
    assert "Memory of servers that shared a GPU while they booted is left out" in text
    assert not (tmp_path / "out" / "memory.svg").exists()
    assert "| 41.40 | 4.90 | 3.20 |" in report(tmp_path, decode(row(8, 1.0), server_flags={"memory_usage": usage}))
    assert "| 41.40 | 4.90 | 0.90 |" in report(tmp_path, decode(row(8, 1.0), server_flags={"memory_usage": {**usage, "graph": 0.9}}))
    assert "| 10 | preempted" in report(tmp_path, {**max_batch(50.0), "next_failed": 11})
    assert "| at least 10 | preempted" in report(tmp_path, {**max_batch(50.0), "next_failed": 13})


def test_same_rows_same_bytes_and_small_pictures(tmp_path: Path) -> None:
    variants = [{"softprune": {**KEEP24, "num_kept": [keep]}} for keep in range(18, 32, 2)]
    documents = [decode(*(row(batch, 9.0 * batch, 9.5 * batch, 9.2 * batch) for batch in (1, 8, 64, 256)), **one) for one in variants]
    found = []
    for _ in range(2):
        report(tmp_path, *documents, *(comparison() for _ in range(20)), max_batch(50.0))
        found.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"report.md", "tok_s_1.svg", "ratio_1.svg", "memory.svg"}
    assert max(map(len, found[0].values())) < 60_000
    picture = found[0]["tok_s_1.svg"].decode()
    assert all(text in picture for text in ("tokens / s", "batch (requests at once)", "keep 18, top_k 4", "256 + 512 tokens"))
    assert not re.search(r"\d{4}-\d\d-\d\d", picture)


def test_ratios_at_several_batch_sizes_are_curves(tmp_path: Path) -> None:
    """A panel for each divisor, the one with most ratios first; of one or two sizes, rows."""
    setting = Setting("SGLang 1", "G", 256, 512, False)
    found = [Compared(setting, "rewritten", "masked", batch, 3, 1.0, 0.9, 1.1, "") for batch in (1, 8)]
    plot_ratios(found, tmp_path / "rows.svg")
    assert "masked / rewritten, batch 8" in (tmp_path / "rows.svg").read_text()
    found += [Compared(setting, "unmasked", b, batch, 1, 1.2, None, None, "") for batch in (1, 8, 64) for b in ("masked", "top2")]
    plot_ratios(found, tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert [text for text in texts if text in ("unmasked", "rewritten")] == ["unmasked", "rewritten"]
    assert [texts.count(text) for text in ("masked", "top2", "batch (requests at once)")] == [2, 1, 1]


def test_packed_documents_come_back(tmp_path: Path) -> None:
    one, two = decode(row(8, 1.0, 2.0, 3.0)), decode(row(8, 4.0), model="rewritten")
    whole = deepcopy(one)
    whole["results"][0]["repeats"][0]["streams"] = [{"stream": 0}]
    document = packed([whole, one, two], "a matrix", [])
    assert unpacked(json.loads(json.dumps(document))) == [one, one, two]
    assert len(document["servers"]) == 2
    assert len(lines(report(tmp_path, document), "tokens")) == 2


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format": "x", "version": 1}, "found 'x', 1; expected one of softprune.decode-benchmark"),
        ({**decode(row(8, 1.0)), "version": 2}, "found 'softprune.decode-benchmark', 2"),
        ({"format": "softprune.decode-benchmark", "version": 1}, "0.json: model: found nothing; expected this field"),
        (decode(), "results: found none; expected at least one measured row"),
        ([1], "found [1]; expected a JSON object"),
        ({"format": [], "version": 1}, "0.json: format, version: found []"),
        ({**decode(row(8, 1.0)), "results": [None]}, "0.json: found a field of another type"),
        ({**decode(row(8, 1.0)), "server_flags": None}, "0.json: found a field of another type"),
        (decode(row(8)), "0.json: found a field of another type (no repeats)"),
        (packed([{**decode(row(8, 1.0)), "settings": 5}], "a matrix", []), "0.json: a matrix: found a field of another type"),
    ],
)
def test_files_that_are_no_raw_files(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        report(tmp_path, document)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_as_a_module(tmp_path: Path) -> None:
    """Errors are lines, not tracebacks."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench/results/headline.json").write_text("{}")
    for arguments in (["missing.json", "-o", "out"], ["--readme", "missing.md"]):
        command = [sys.executable, "-m", "softprune.bench.report", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert (found.returncode, found.stderr.startswith("error: ")) == (1, True), found.stderr
        assert "missing." in found.stderr
        assert "Traceback" not in found.stderr


def test_command_on_what_decode_writes(tmp_path: Path) -> None:
    with FakeServer() as server:
        server.behave(Behaviour("vllm", 0.01, 0.001))
        (tmp_path / "raw.json").write_text(json.dumps(measure(server.url, Workload(8, 6), [1, 2], 1, 0, api="openai")))
    result = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "raw.json"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "vLLM" in result.output
    assert [speed.batch for speed in read_rows([tmp_path / "raw.json"]).speeds] == [1, 2]
    assert CliRunner().invoke(app, ["bench", "report"]).exit_code == 2
    assert "expected a raw JSON file" in CliRunner().invoke(app, ["bench", "report", str(tmp_path), "-o", str(tmp_path)]).output
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench/results/headline.json").write_text(
        '{"a.b": {"value": 3, "unit": "ms", "raw": "headline.json", "date": "2025-01-31"}}'
    )
    (tmp_path / "README.md").write_text("nothing")
    result = CliRunner().invoke(app, ["bench", "report", "--readme", str(tmp_path / "README.md")])
    assert "nothing changed" in result.output
    assert "shown nowhere: a.b" in result.output
