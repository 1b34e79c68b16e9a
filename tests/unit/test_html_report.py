"""`softprune report`: the page as a parser sees it, for everything that it can be made of."""

from __future__ import annotations

import functools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from softprune.evaluate import gates
from softprune.report.chart import Axis, steps
from softprune.report.documents import ReportError
from softprune.report.html import report
from softprune.stats.file import write
from tests.unit import report_of
from tests.unit.stats_of import MODEL, collected
from tests.unit.test_cli import run

EVIL = "<script>alert('x')</script>\"&{{ 7 * 7 }}"
SMALL: dict[str, Any] = {"rows": (("UNION", 1024), ("UNION", 2048), (EVIL, 1024)), "blocks": 8, "tokens": 40}
LIMITS = ("abs_delta_ppl", "rel_delta_ppl", "abs_delta_cc_rate", "abs_delta_mean_prob", "js2d")
VOID = {"meta", "link", "br", "hr", "img", "input"}
DRAWN = {"path", "rect", "line", "circle", "image", "stop"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text, and rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.rows, self.open = "", [], []  # type: str, list[list[str]], list[str]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of the elements of a kind that have certain ones."""
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    @property
    def badges(self) -> list[str]:
        """Verdicts, by their classes."""
        return [found["class"].split()[1].upper() for found in self.all("strong") if found.get("class", "").startswith("badge ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind, and a candidate for each verdict."""
    root = tmp_path_factory.mktemp("report")
    base = report_of.written(root / "base.json", "tiny", **SMALL)
    report_of.written(root / "pass.json", f"same {EVIL}", mask="sha256:" + "c" * 64, kept=12, **SMALL)
    report_of.written(root / "fail.json", "worse", 0.5, 1, **SMALL)
    report_of.written(root / "incomplete.json", "a part", **{**SMALL, "rows": SMALL["rows"][1:]})
    report_of.written(root / "invalid.json", "other data", data="b", **SMALL)
    report_of.gate_file(base, root / "fail.json", root / "fail.gate.json")
    write(collected("run-1", ("default", "code", EVIL), seed=1), root / "stats.safetensors")
    report_of.mask().save(root / "mask.json")
    report_of.sweep(root / "sweep", (24, 16), ("reap", "random"), 2, **{**SMALL, "rows": SMALL["rows"][:1]})
    return root


GIVEN = [
    ("base.json", "pass.json"), ("base.json", "fail.json", "fail.gate.json"), ("base.json", "incomplete.json"),
    ("base.json", "invalid.json"), ("base.json",), ("fail.gate.json",), ("sweep",), ("sweep/sweep.json",), ("stats.safetensors",),
    ("mask.json", "stats.safetensors"), ("mask.json",), ("sweep", "base.json", "fail.json", "mask.json", "stats.safetensors"),
]  # fmt: skip


@functools.cache
def page_of(folder: Path, *names: str) -> Page:
    return Page(report([folder / name for name in names]))


@pytest.mark.parametrize("names", GIVEN, ids="+".join)
def test_it_stands_alone_and_is_well_formed(folder: Path, names: tuple[str, ...]) -> None:
    page = page_of(folder, *names)
    assert "http" not in page.source.replace("http-equiv", "")
    assert "@import" not in page.source
    assert page.source.count("url(") == page.source.count("url(#bar-")
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for tag, found in page.elements:
        assert tag not in ("script", "iframe", "img", "object", "embed", "form", "base")
        assert not any(name.startswith("on") or name in ("src", "srcset", "action", "style") for name in found)
        href = found.get("href", "#")
        assert href.startswith("data:") or href[1:] in ["", *ids]
    assert page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"].startswith("default-src 'none'")


@pytest.mark.parametrize("names", GIVEN, ids="+".join)
def test_it_can_be_read_without_eyes(folder: Path, names: tuple[str, ...]) -> None:
    page = page_of(folder, *names)
    assert page.all("html", lang="en")
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) - len(_tooltips(page)) == 1
    drawings = [found for found in page.all("svg") if "aria-hidden" not in found]
    assert all(found["role"] == "img" and len(found["aria-label"]) > 10 for found in drawings)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(found["scope"] in ("col", "row") for found in page.all("th"))
    scrolled = page.all("div", **{"class": "scroll"})
    assert all(found["tabindex"] == "0" and found["aria-label"] for found in scrolled)
    assert len(scrolled) == len(page.all("table"))


def _tooltips(page: Page) -> list[dict[str, str]]:
    return page.all("title")[1:]


def test_what_users_named_stays_text(folder: Path) -> None:
    page = page_of(folder, "base.json", "pass.json", "stats.safetensors", "mask.json")
    assert page.source.count("<script") == 0
    assert f"same {EVIL} against tiny" in page.text
    assert any(row[0].startswith(f"{EVIL}@1024") for row in page.rows)
    assert sum(row[0] == EVIL for row in page.rows) >= 3
    assert "<b>bold</b>" in page.text
    assert "49" not in {word for row in page.rows for word in row}


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        ("pass.json", "PASS", "all 8 checks of near-lossless-v1 hold"),
        ("fail.json", "FAIL", "of 8 checks of near-lossless-v1 fail"),
        ("incomplete.json", "INCOMPLETE", "cannot be judged yet"),
        ("invalid.json", "INVALID", "cannot be compared: they differ in rows_sha256, blocks_sha256"),
    ],
)
def test_verdicts(folder: Path, name: str, verdict: str, words: str) -> None:
    page = page_of(folder, "base.json", name)
    assert page.badges == [verdict]
    assert words in page.text
    assert f"{verdict} " in page.text
    assert str(folder) not in page.source
    differences = [found for found in page.all("svg") if " less base: " in found.get("aria-label", "")]
    assert bool(differences) == (verdict != "INVALID")
    assert any(row[0] == "weights' fingerprint" for row in page.rows)


def test_a_pair_shows_every_row_and_check(folder: Path) -> None:
    page = page_of(folder, "base.json", "fail.json", "fail.gate.json")
    gate = json.loads((folder / "fail.gate.json").read_text())
    for row in gate["rows"]:
        name = f"{row['pack']}@{row['seq_len']}"
        assert sum(found[0].startswith(name) for found in page.rows) == 2
        assert f"Planes of {name}" in page.text
    checks = [found for found in page.rows if found[1:2] in (["pass"], ["FAIL"], ["not judged"])]
    assert len(checks) == sum(len(row["checks"]) for row in gate["rows"]) == 12
    assert (
        sum(found[1] == "FAIL" for found in checks) == sum(check["passed"] is False for row in gate["rows"] for check in row["checks"]) > 0
    )
    assert sum(found[1] == "not judged" for found in checks) == 3
    interval = gate["rows"][0]["delta"]["ppl"]
    assert f"{interval['low']:+.3f} to {interval['high']:+.3f}" in page.text
    assert page.text.count("share of tokens in a cell") == 2 * len(gate["rows"])


def test_planes_of_other_axes_stand_side_by_side_and_are_not_subtracted(folder: Path, tmp_path: Path) -> None:
    log = report_of.written(tmp_path / "log.json", "other axes", scale="log", **SMALL)
    page = Page(report([folder / "base.json", log]))
    assert page.badges == ["INVALID"]
    assert "they differ in prob_scale" in page.text
    assert page.text.count("log10 p of the reference token") == page.text.count("share of tokens in a cell") / 2 == 3
    assert ["scale of p", "linear", "log"] in page.rows
    assert "candidate less base" not in page.text
    assert "log10 p of the reference token" in Page(report([log])).text


def test_a_gate_given_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    gate = json.loads((folder / "fail.gate.json").read_text())
    gate["gates"]["name"] = "my own gates"
    (tmp_path / "gate.json").write_text(json.dumps(gate))
    page = Page(report([folder / "fail.json", tmp_path / "gate.json"], folder / "base.json"))
    assert "of my own gates fail" in page.text
    with pytest.raises(Exception, match=r"gate.json: base, candidate: found tiny, worse; expected two of the evaluations given: tiny"):
        report([folder / "base.json", folder / "incomplete.json", tmp_path / "gate.json"])


def test_a_gate_of_other_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    """The same labels, mask and weights; another run, other blocks, fewer rows."""
    passing = tmp_path / "gate.json"
    report_of.gate_file(folder / "base.json", folder / "fail.json", passing)
    verdict = json.loads(passing.read_text())
    changes: list[tuple[str, str, Any]] = [
        (side, name, value)
        for side in ("base", "candidate")
        for name, value in (("ppl", 1.5), ("mean_prob", 0.5), ("tokens", 319), ("blocks_sha256", "0" * 64))
    ]
    for side, name, value in changes:
        other = json.loads(json.dumps(verdict))
        other["rows"][2][side][name] = value
        passing.write_text(json.dumps({**other, "verdict": "PASS"}))
        with pytest.raises(ReportError, match=r"found tiny, worse with other rows or numbers; expected two of the evaluations given"):
            report([folder / "base.json", folder / "fail.json", passing])
    passing.write_text(json.dumps({**verdict, "verdict": "PASS", "rows": verdict["rows"][:2]}))
    with pytest.raises(ReportError, match="with other rows or numbers"):
        report([folder / "base.json", folder / "fail.json", passing])
    for row in verdict["rows"]:
        del row["base"]["blocks_sha256"], row["candidate"]["blocks_sha256"]
    passing.write_text(json.dumps(verdict))
    assert Page(report([folder / "base.json", folder / "fail.json", passing])).badges == ["FAIL"]


def test_a_gate_of_a_file_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    code, _ = run("gate", folder / "base.json", tmp_path / "broken.json", "--out", tmp_path / "gate.json")
    assert code == 3
    page = Page(report([tmp_path / "gate.json"]))
    assert page.badges == ["INVALID"]
    assert "broken.json against base.json" in page.text
    assert ["mask", "unknown", "unknown"] in page.rows
    assert str(tmp_path) not in page.source + (tmp_path / "gate.json").read_text()
    assert str(folder) not in page.source


def test_what_nobody_knows_is_not_called_none(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "base.json").read_text())
    document["meta"]["softprune"] |= {"fingerprint": None, "mask": None, "num_kept": None}
    (tmp_path / "bare.json").write_text(json.dumps(document))
    page = Page(report([folder / "base.json", tmp_path / "bare.json"]))
    for name, known in (("mask", "none"), ("experts kept a layer", "all")):
        assert [name, known, "unknown"] in page.rows
    lone = Page(report([tmp_path / "bare.json"])).text
    assert "unknown" in lone
    assert "Masknone" not in lone.replace("\n", "").replace(" ", "")
    code, output = run("gate", folder / "base.json", tmp_path / "bare.json")
    assert code == 0
    assert ("base: tiny, mask none" in output, "candidate: tiny, mask unknown" in output) == (True, True)


def test_the_same_files_give_the_same_page(folder: Path) -> None:
    assert page_of(folder, "sweep").source == report([folder / "sweep"])
    assert page_of(folder, "base.json", "fail.json").source == report([folder / "base.json", folder / "fail.json"])


def test_several_candidates(folder: Path) -> None:
    page = Page(report([folder / "pass.json", folder / "fail.json"], folder / "base.json"))
    assert page.badges == ["PASS", "FAIL"] * 2
    assert len(page.all("section")) == 2


def test_the_studys_files_have_no_intervals(folder: Path, tmp_path: Path) -> None:
    for name in ("base.json", "fail.json"):
        document = json.loads((folder / name).read_text())
        del document["meta"]["softprune"]
        for pack in document["packs"]:
            for cell in pack["seq"].values():
                del cell["model"]["softprune"]
        (tmp_path / name).write_text(json.dumps(document))
    page = page_of(tmp_path, "base.json", "fail.json")
    assert page.badges in (["FAIL"], ["INVALID"])
    assert " to +" not in page.text


def test_a_sweep_shows_every_cell(folder: Path) -> None:
    page = page_of(folder, "sweep")
    sweep = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert len(sweep["cells"]) == 6
    for cell in sweep["cells"]:
        row = next(row for row in page.rows if row[0] == cell["label"])
        assert row[1:3] == [cell["verdict"], str(cell["keep"])]
        assert f"{cell['ppl']['UNION@1024']:.3f}" in row[3]
        assert ("on it" in row) == cell["pareto"]
        assert f"{cell['label']}: {cell['verdict']}" in page.text
        assert page.source.count(f"{cell['label']}: PPL, UNION@1024 {cell['ppl']['UNION@1024']:.3f}") == 2
    assert len([found for found in page.all("svg") if "PPL, UNION@1024, against" in found.get("aria-label", "")]) == 2
    assert page.source.count("band c1") == 1


def test_a_speed_that_is_noise_is_not_called_fast(tmp_path: Path) -> None:
    report_of.sweep(tmp_path, (24,), ("reap", "ean"), 1, **{**SMALL, "rows": SMALL["rows"][:1]})
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    for lows, said in (((0.9, 0.9), "No decode speed of those that pass"), ((0.9, 1.01), "Fastest that passes: ean keep 24, 1.2")):
        for cell, over, low in zip(sweep["cells"], (1.3, 1.2), lows, strict=True):
            cell["decode"] |= {"over_base": over, "low": low, "high": 1.5}
            cell["verdict"] = "PASS"
        (tmp_path / "sweep.json").write_text(json.dumps(sweep))
        assert said in Page(report([tmp_path / "sweep.json"])).text


def test_a_sweep_over_several_draws_of_the_data_and_two_servers(tmp_path: Path) -> None:
    size = {**SMALL, "rows": (("code", 1024), ("UNION", 1024))}
    for seed, data in ((1, "a"), (2, "b")):
        report_of.written(tmp_path / f"base.data{seed}.json", "tiny", data=data, **size)
        report_of.written(tmp_path / f"cell.data{seed}.json", "worse", 0.1 * seed, seed, data=data, **size)
        report_of.gate_file(*(tmp_path / f"{name}.data{seed}.json" for name in ("base", "cell")), tmp_path / f"{seed}.gate.json")
    cell = {"label": "reap keep 24", "method": "reap", "keep": 24, "mask": "m.json", "top_k": 4, "verdict": "INCOMPLETE"}
    ppl = {"code@1024": 9.0, "UNION@1024": 2.0}
    cells = [
        {**cell, "data_seed": i, "base": f"base.data{i}.json", "evaluation": f"cell.data{i}.json", "gate": f"{i}.gate.json", "ppl": ppl}
        for i in (1, 2)
    ]
    other = {**cells[0], "label": "unmasked on server 2", "method": None, "mask": None, "top_k": 2, "keep": None}
    sweep = {"format": "softprune.sweep", "version": 1, "base": "base.data1.json", "cells": [*cells, other], "error": None}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    page = page_of(tmp_path, "sweep.json")
    names = ["base.data1", "base.data2", "reap keep 24, data 1", "reap keep 24, data 2", "unmasked on server 2, data 1"]
    assert [row[0] for row in page.rows[1:6]] == names
    assert page.rows[0][3] == "PPL, UNION@1024"
    chart = "PPL over its base's, UNION@1024, against experts kept, by method; filled points pass"
    assert len([found for found in page.all("svg") if found.get("aria-label") == chart]) == 1
    assert "reap, top_k 4" in page.text
    assert page.text.count("difference, total variation") == 3


def test_a_sweep_whose_files_are_gone_or_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    sweep = json.loads((folder / "sweep" / "sweep.json").read_text())
    sweep["cells"][0]["gate"] = "../secret.json"
    sweep["cells"][1] |= {"method": None, "keep": None, "decode": None, "verdict": None, "ppl": {}, "rel_ppl": None}
    (tmp_path / "secret.json").write_text((folder / "fail.gate.json").read_text())
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({**sweep, "error": f"server died {EVIL}"}))
    page = page_of(tmp_path, "sweep")
    assert "../secret.json lies outside the sweep's folder" in page.text
    assert f"The sweep ended early: server died {EVIL}" in page.text
    assert "base.json: found No such file or directory" in page.text
    assert sum(row[0] == cell["label"] for row in page.rows for cell in sweep["cells"]) == 6


def test_a_sweep_of_twelve_cells_stays_small(tmp_path: Path) -> None:
    size = {"rows": report_of.ROWS[:2], "blocks": 8, "tokens": 2000}
    report_of.sweep(tmp_path, (16,), ("reap",), **size)
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    cells = [{**sweep["cells"][0], "label": f"cell {i}", "keep": 16 + i} for i in range(12)]
    (tmp_path / "sweep.json").write_text(json.dumps({**sweep, "cells": cells}))
    assert 200_000 < len(report([tmp_path]).encode()) < 2_000_000


def test_statistics_show_every_tag_and_layer(folder: Path) -> None:
    page = page_of(folder, "stats.safetensors")
    tokens = collected("run-1", ("default", "code", EVIL), seed=1).header.tokens
    for tag, number in tokens.items():
        assert [tag, *(f"{value:,}" for value in (number.prefill, number.decode, number.routed, number.cached))] in page.rows
    assert [row[0] for row in page.rows if len(row) == 9 and row[0].isdigit()] == [str(layer) for layer in range(MODEL.num_layers)]
    labels = [found["aria-label"] for found in page.all("svg") if "aria-label" in found]
    for words in (
        "selections over an even share",
        "mean gate",
        "REAP mean",
        "Concentration curve",
        "given tokens: plane",
        f"{EVIL}, selections",
    ):
        assert sum(words in label for label in labels) == 1
    assert page.source.count("<title>layer 2, expert 11: ") == 3
    assert "reap (1 token in 16)" in page.text


def test_statistics_of_one_mode(tmp_path: Path) -> None:
    write(collected("run-1", modes=("router",)), tmp_path / "router.safetensors")
    page = page_of(tmp_path, "router.safetensors")
    assert "mean gate" in page.source
    assert "REAP mean:" not in page.source
    assert "plane" not in page.text


def test_a_mask_beside_statistics(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder, "mask.json", "stats.safetensors")
    assert "mask.json keeps 77.8 % of the experts: 8 to 12 of 12 experts kept in 3 layers; they had" in page.text
    assert len(page.all("path", **{"class": "cross"})) == 1
    assert [row[1] for row in page.rows if len(row) == 5 and row[0].isdigit()] == ["8", "12", "8"]
    other = report_of.mask().model_copy(update={"model": MODEL.model_copy(update={"num_experts": 16})})
    other.save(tmp_path / "other.json")
    page = Page(report([tmp_path / "other.json", folder / "stats.safetensors"]))
    assert "is of another model (3 layers × 12 experts; the mask has 3 × 16)" in page.text
    assert not page.all("path", **{"class": "cross"})


def test_thresholds_of_ones_own(folder: Path, tmp_path: Path) -> None:
    thresholds = json.loads(gates.read(gates.NEAR_LOSSLESS).model_dump_json()) | {"name": "loose", "primary_seq_lens": [2048]}
    (tmp_path / "loose.json").write_text(json.dumps(thresholds | {f"max_{name}": 9.0 for name in LIMITS}))
    page = Page(report([folder / "base.json", folder / "fail.json"], thresholds=str(tmp_path / "loose.json")))
    assert page.badges == ["PASS"]
    assert "all 4 checks of loose hold. PPL on UNION@2048" in page.text


def test_command(folder: Path, tmp_path: Path) -> None:
    code, output = run("report", folder / "base.json", folder / "pass.json", "-o", tmp_path / "report.html")
    assert code == 0
    assert "report.html: 0." in output
    assert Page((tmp_path / "report.html").read_text()).badges == ["PASS"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n{", "a file that begins with b'\\x89PNG"),
        (b"[1, 2]", "JSON without a known format"),
        (b'{"format": "softprune.scores"}', "JSON of the format 'softprune.scores'"),
        (b'{"format": 5}', "JSON of the format 5"),
        (b'{"format": "softprune.gate", "version": 1}', "verdict: found nothing; expected field required"),
        (b'{"format": "softprune.sweep", "version": 1, "cells": [{"label": 5}]}', "cells[0].label: found 5; expected input should be a"),
        (b'{"meta":{}, "packs": []}', "meta.model_id: found nothing"),
        (None, "found No such file or directory"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, content: bytes | None, found: str) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    code, output = run("report", tmp_path / "file", "-o", tmp_path / "out.html")
    assert code == 2
    assert found in " ".join(output.split())
    assert not (tmp_path / "out.html").exists()


def test_refusals_of_places(folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path, "-o", tmp_path / "out.html"), "found a folder without sweep.json; expected statistics (.safetensors), an evaluation"),
        (
            (folder / "base.json", "--base", folder / "mask.json", "-o", tmp_path / "out.html"),
            "found mask; expected an evaluation, as --base",
        ),
        ((folder / "mask.json", "-o", tmp_path / "no" / "out.html"), "expected a place that can be written"),
    ):
        code, output = run("report", *arguments)
        assert code == 2
        assert words in " ".join(output.split())


def test_axes() -> None:
    assert Axis("x", 0, 1).ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Axis("x", 1e-5, 1, True).ticks == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    assert len(Axis.around("PPL", [1.28, 4.5]).ticks) >= 4
    assert Axis.around("PPL", [1.28, 4.5]).log
    assert not Axis.around("PPL", [1.28, 1.3]).log
    one = Axis.around("PPL", [1.3])
    assert 0 < one.part(1.3) < 1
    assert steps([0, 1, 2, 3], [5, 5, 6]) == [(0, 5), (2, 5), (2, 6), (3, 6)]
