"""README and docs name commands, options and places that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from softprune.bench.report import pages
from softprune.cli import app

ROOT = Path(__file__).parent.parent.parent
PAGES = pages(ROOT / "README.md")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> list[str]:
    """`softprune …` as lines of blocks begin, and between backticks."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", text)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines() if line.startswith("softprune ")]
    spans = re.findall(r"`(softprune [^`]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
    return lines + spans


@by_page
def test_commands_and_their_options_are_there(page: Path) -> None:
    for line in commands(page.read_text()):
        command: Any = typer.main.get_command(app)
        words = line.split()[1:]
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        if hasattr(command, "commands"):  # all of a group's, as in `softprune stats start|stop`
            assert not words or re.search(r"[|…*]", words[0]), line
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", line)) <= known, line


def test_commands_are_found_in_the_pages() -> None:
    assert sum(len(commands(page.read_text())) for page in PAGES) > 60


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    """To files that are there, and headings in them, by GitHub's names."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
