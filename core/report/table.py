"""A table as data; `templates/table.html` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what stands there; markup is taken as it is, other text escaped.
        note: a second line, smaller: an interval, a unit.
        mark: a class of the style sheet: "pass", "fail", "changed".
    """

    text: str | Markup
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row is its header.

    Attributes:
        caption: what it shows.
        columns: names, with units.
        rows: cells, or just their text.
        words: places of columns that hold words and not numbers, besides the first.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[int] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        """All rows as cells.

        Raises:
            ValueError: a row is longer or shorter than the columns.
        """
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(row)} cells under {len(self.columns)} columns of {self.caption!r}")
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]
