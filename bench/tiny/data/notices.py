"""The sources' own licence texts and copyright notices, which go with the excerpts in the held-out packs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from softprune.bench.tiny.data.sources import Source, members

_NOTICE = re.compile(r"(\.dist-info/.*|share/doc/[^/]*/|^package/)(LICEN[CS]E|COPYING|NOTICE|copyright)[^/]*$", re.I)


def notices(sources: Sequence[Source], folder: Path) -> str:
    """Every notice in the files of the fetched sources; one that several share stands once."""
    shared: dict[str, list[str]] = {}
    for source in sources:
        for name, content in members(folder / source.file):
            if _NOTICE.search(name):
                text = "\n".join(line.rstrip() for line in content.decode("utf-8", "replace").strip().splitlines())
                shared.setdefault(text, []).append(f"{source.name} {source.version}: {name.rsplit('/', 1)[1]}")
    blocks = ("\n".join(("=" * 100, *names, "=" * 100, "", text, "")) for text, names in shared.items())
    return "\n".join(blocks)
