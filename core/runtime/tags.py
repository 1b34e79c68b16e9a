"""Tags: names by which the statistics of some requests are kept apart from those of others."""

from __future__ import annotations

from typing import Any

from softprune.control import ControlError
from softprune.errors import shortened
from softprune.stats.header import DEFAULT_TAG, MAX_TAG_LENGTH

TAG_KEY = "softprune_tag"
"""Key of a request's tag among an engine's own free parameters."""
TAG_HEADER = "X-Softprune-Tag"
SPANS_KEY = "softprune_spans"
"""Key of the places of a prompt's completions, e.g. "12-40,55-90": [first, end) positions of the tokens that `eaft` counts; else all."""
Spans = tuple[tuple[int, int], ...]


def completions_of(text: Any) -> Spans | None:
    """Positions of completions as a client gave them; None for none given.

    Raises:
        ControlError: 400 invalid_spans; it is no text of ascending pairs.
    """
    if text is None:
        return None
    try:
        pairs = [tuple(int(end) for end in pair.split("-")) for pair in text.split(",")] if text != "" else []
        places = [place for begin, end in pairs for place in (begin, end)]
        if sorted(places) != places or any(begin >= end for begin, end in pairs):
            raise ValueError
    except (ValueError, AttributeError):
        message = f'{SPANS_KEY}: found {shortened(text)}; expected ascending positions such as "12-40,55-90"'
        raise ControlError(400, "invalid_spans", message) from None
    return tuple((begin, end) for begin, end in pairs)


def check_tag(tag: Any) -> str:
    """A tag as a client gave it.

    Raises:
        ControlError: 400 invalid_tag; it is no text of 1 to 128 printable characters.
    """
    if not isinstance(tag, str) or not 0 < len(tag) <= MAX_TAG_LENGTH or not tag.isprintable():
        found = f"{len(tag)} characters" if isinstance(tag, str) and len(tag) > MAX_TAG_LENGTH else shortened(tag)
        raise ControlError(400, "invalid_tag", f"{TAG_KEY}: found {found}; expected from 1 to {MAX_TAG_LENGTH} printable characters")
    return tag


class Tags:
    """The tags of a server, numbered as they came; "default", of requests that name none, is number 0.

    Args:
        room: tags at most, "default" among them.
    """

    def __init__(self, room: int) -> None:
        self.room, self.names = room, [DEFAULT_TAG]

    def number(self, tag: Any) -> int:
        """A tag's number, from 0; a new tag takes the next one.

        Args:
            tag: as a client gave it; None for none.

        Raises:
            ControlError: 400 invalid_tag, or too_many_tags.
        """
        if tag is None:
            return 0
        name = check_tag(tag)
        if name not in self.names:
            if len(self.names) >= self.room:
                message = f"{TAG_KEY}: found {shortened(name)}, one more than --softprune-max-tags; expected one of {', '.join(self.names)}"
                raise ControlError(400, "too_many_tags", message, {"tags": self.names, "max_tags": self.room})
            self.names.append(name)
        return self.names.index(name)
