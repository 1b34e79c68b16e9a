"""SVG elements, escaped. Colours are those of the page's style sheet, so that a drawing follows light and dark."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

Value = str | float | int | None


def element(name: str, *children: str | Markup, **attributes: Value) -> Markup:
    """One element.

    Args:
        name: e.g. "path".
        children: markup as it stands; other text is escaped.
        attributes: by their SVG names, with "_" for "-" and a trailing "_" for Python's keywords; None leaves one out.
    """
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _text(value)) for key, value in attributes.items() if value is not None
    ]
    head = Markup("<{}{}").format(Markup(name), Markup("").join(parts))
    return head + Markup("/>") if not children else head + Markup(">") + joined(children) + Markup("</{}>").format(Markup(name))


def joined(children: Iterable[str | Markup]) -> Markup:
    """Elements one after another."""
    return Markup("").join(escape(child) for child in children)


def titled(mark: Markup, title: str) -> Markup:
    """A mark that shows a text under the mouse."""
    return element("g", element("title", title), mark)


def path(points: Iterable[tuple[float, float]], closed: bool = False, **attributes: Value) -> Markup:
    """Straight lines from point to point."""
    data = "M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in points) + "Z" * closed
    return element("path", d=data, **attributes)


def picture(width: float, height: float, label: str, *marks: Markup, class_: str = "chart") -> Markup:
    """A drawing; `label` says in words what it shows, for those who cannot see it."""
    return element(
        "svg", *marks, viewBox=f"0 0 {_text(width)} {_text(height)}", role="img",
        aria_label=label, class_=class_,
    )  # fmt: skip


def _text(value: Value) -> str:
    return f"{round(value, 2):g}" if isinstance(value, float) else str(value)
