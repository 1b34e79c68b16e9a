"""A report in a real browser: nothing wider than a phone's screen, nothing asked of a network, both colour schemes obeyed.

Run alone: pytest tests/evidence/test_report_browser.py (half a minute; needs Debian's chromium)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from softprune.report.html import report
from softprune.stats.file import write
from tests.conftest import Evidence
from tests.evidence.browser import BROWSER, SCHEMES, SIZES, browser, look
from tests.unit import report_of
from tests.unit.stats_of import collected

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")

LONG = "a label of a user that is much longer than any screen of a phone is wide " + "and-has-no-place-to-break-" * 6
OPEN_ALL = "document.querySelectorAll('details').forEach(part => { part.open = true })"
GROUND = "getComputedStyle(document.body).backgroundColor"
CONTRAST = """(() => {
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const ground = part => { for (; part; part = part.parentElement) { const c = getComputedStyle(part).backgroundColor;
    if (!c.endsWith(', 0)')) return c } };
  const parts = [...document.querySelectorAll('p, dt, dd, th, td, small, summary, figcaption, li, a, strong, caption, svg text')];
  return Math.min(...parts.map(part => { const style = getComputedStyle(part);
    const a = light(part.closest('svg') ? style.fill : style.color), b = light(ground(part.closest('svg')?.parentElement ?? part));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) }));
})()"""
"""The least contrast of a text with its ground, as WCAG 2.2 (1.4.3) defines it, which asks for 4.5."""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('svg text')].map(text => {
  const svg = text.closest('svg'); return parseFloat(getComputedStyle(text).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width }))"""


@pytest.fixture(scope="module")
def devtools() -> Iterator[str]:
    with browser() as address:
        yield address


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of every kind, with names that are too long."""
    root = tmp_path_factory.mktemp("report")
    rows = ((("UNION", 1024), ("UNION", 2048), (LONG, 1024)), 8, 60)
    size = dict(zip(("rows", "blocks", "tokens"), rows, strict=True))
    report_of.written(root / "base.json", "tiny", **size)
    report_of.written(root / "worse.json", LONG, 0.3, 1, **size)
    report_of.written(root / "other.json", "other data", data="b", **size)
    write(collected("run-1", ("default", "code", LONG[:120]), seed=1), root / "stats.safetensors")
    report_of.mask().save(root / "mask.json")
    report_of.sweep(root / "sweep", (24, 16), ("reap", "random"), 2, **{**size, "rows": size["rows"][:1]})
    made = {
        "pair": ("base.json", "worse.json"), "invalid": ("base.json", "other.json"), "one": ("base.json",),
        "statistics": ("stats.safetensors", "mask.json"), "sweep": ("sweep",),
    }  # fmt: skip
    for name, files in made.items():
        (root / f"{name}.html").write_text(report([root / file for file in files]))
    return {name: root / f"{name}.html" for name in made}


@pytest.mark.parametrize("kind", ["pair", "invalid", "one", "statistics", "sweep"])
def test_it_fits_a_phone_and_asks_for_nothing(devtools: str, pages: dict[str, Path], kind: str, evidence: Evidence) -> None:
    figures = {}
    for size in SIZES:
        for scheme in SCHEMES:
            found = look(devtools, pages[kind], size, scheme, (OPEN_ALL, GROUND, CONTRAST, SMALLEST_TEXT))
            _, ground, contrast, smallest = found.values
            assert found.width <= found.inner_width == SIZES[size][0]
            assert [url for url in found.requests if not url.startswith("data:")] == [pages[kind].as_uri()]
            assert found.errors == []
            assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
            assert contrast >= 4.5
            assert smallest is None or smallest >= 8.5
            figures[f"{size} {scheme}"] = {"contrast": round(contrast, 2), "smallest text in charts, px": round(smallest, 1)}
    evidence(f"report.{kind}", figures)


def test_links_open_a_cells_pair(devtools: str, pages: dict[str, Path]) -> None:
    script = "(async () => { document.querySelector('td a, th a').click(); await new Promise(r => setTimeout(r, 200)) })()"
    state = "[...document.querySelectorAll('#sweep-0 > details')].map(part => part.open)"
    found = look(devtools, pages["sweep"], "phone", "light", (script, "new Promise(r => setTimeout(r, 300))", state))
    assert found.values[-1][0] is True
    assert not any(found.values[-1][1:])
