"""README and docs say what headline.json says, and every figure there is shown; a block that says nothing true is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprune.bench import headline
from softprune.bench.headline import Figure
from softprune.bench.readme_figures import TABLES, Table, filled, shown
from softprune.bench.report import pages
from softprune.errors import InputError

ROOT = Path(__file__).parent.parent.parent
PAGES = pages(ROOT / "README.md")
AGAIN = "run `python -m softprune.bench.report --readme README.md`"


def figure(value: float, unit: str = "ratio") -> Figure:
    return {"value": value, "unit": unit, "raw": "a.json", "date": "2025-01-31"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_figures_give(page: Path) -> None:
    text = page.read_text()
    assert filled(text, headline.read(ROOT / "bench/results/headline.json")) == text, AGAIN


def test_every_figure_is_shown() -> None:
    every = {name for page in PAGES for name in shown(page.read_text())}
    missing = sorted(set(headline.read(ROOT / "bench/results/headline.json")) - every)
    assert not missing, f"no page shows {missing}: put a block <!-- headline:NAME --> into one, and {AGAIN}"


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (("one", "a.b", "a.c"), ("two", "a.d", "a.e"), ("no figures", "x", ""))
    monkeypatch.setitem(TABLES, "test", Table(("what", "ratio", "tok/s"), rows))
    figures = {"a.b": figure(0.98765), "a.e": figure(12345.6, "tok/s")}
    text = "before <!-- headline:test --> old <!-- /headline --> after"
    table = "| what | ratio | tok/s |\n|---|---|---|\n| one | 0.988 | |\n| two | | 12,346 |\n"
    new = f"before <!-- headline:test -->\n{table}<!-- /headline --> after"
    assert filled(text, figures) == new == filled(new, figures)
    assert set(shown(text)) == {"a.b", "a.c", "a.d", "a.e"}
    assert "| one" not in filled(text, {"a.d": figure(1)})


def test_numbers_in_the_text() -> None:
    text = "takes <!-- headline:a.b .2f -->0.5<!-- /headline --> times, at <!-- headline:a.c ,.0f --><!-- /headline --> tok/s"
    new = "takes <!-- headline:a.b .2f -->0.99<!-- /headline --> times, at <!-- headline:a.c ,.0f -->1,234<!-- /headline --> tok/s"
    assert filled(text, {"a.b": figure(0.987), "a.c": figure(1234.4)}) == new
    assert list(shown(text)) == ["a.b", "a.c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- headline:gone --><!-- /headline -->", "R: gone: found a block of this name; expected one of speed.sglang"),
        ("<!-- headline:a.c .2f --><!-- /headline -->", "R: a.c: found no such figure"),
        ("<!-- headline:a.b q --><!-- /headline -->", "R: a.b: found the format q"),
        ("<!-- headline:a.b .2f -->", "R: headline blocks: found 1 that begin, 0 that end"),
        ("<!-- /headline -->", "found 0 that begin, 1 that end"),
        ("<!-- headline:a.b .2f --> <!-- headline:a.b .2f --> <!-- /headline -->", "found 2 that begin, 1 that end"),
    ],
)
def test_blocks_that_cannot_be_filled(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        filled(text, {"a.b": figure(1)}, "R")
    assert message in str(caught.value)
