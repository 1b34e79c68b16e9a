"""Templates, and the page that sections are put into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from softprune import __version__
from softprune.report.image import gradients


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: anchor, unique in the page.
        title: heading.
        body: markup.
        badge: a verdict, or "".
    """

    id: str
    title: str
    body: Markup
    badge: str = ""


@dataclass(frozen=True)
class Summary:
    """What the page says first.

    Attributes:
        badge: a verdict, or "" where nothing was judged.
        sentence: what was found and why, in words.
    """

    badge: str
    sentence: str


@dataclass(frozen=True)
class Source:
    """A file that the report was made of: its name, what it is, and its SHA-256."""

    name: str
    kind: str
    digest: str


def render(template: str, **context: Any) -> Markup:
    """A template's markup; all text in it is escaped."""
    return Markup(_environment().get_template(template).render(**context))


def page(title: str, summaries: Sequence[Summary], sections: Sequence[Section], sources: Sequence[Source]) -> str:
    """The whole file: it asks nothing of a network, and its policy tells browsers so."""
    return str(
        render(
            "page.html", title=title, summaries=summaries, sections=sections, sources=sources, version=__version__, gradients=gradients()
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("softprune.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
