"""Plain text from a man page's roff source: its paragraphs, and the terms that it explains."""

from __future__ import annotations

import re
from collections.abc import Iterator

_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\[&/,|^]|\\m\[[^\]]*\]")
_ESCAPES = {
    r"\-": "-", r"\(aq": "'", r"\[aq]": "'", r"\(bu": "*", r"\[bu]": "*", r"\(em": " -- ", r"\[em]": " -- ", r"\(en": "-", r"\(dq": '"',
    r"\e": "\\", r"\ ": " ", r"\(ti": "~", r"\[ti]": "~", r"\(ha": "^", r"\[ha]": "^", r"\(co": "(c)", r"\(lq": '"', r"\(rq": '"',
    r"\~": " ", r"\[char46]": ".", r"\(+-": "+/-", r"\(rs": "\\", r"\.": ".",
}  # fmt: skip


def manpage_paragraphs(text: str) -> Iterator[str]:
    """Prose paragraphs in the order of the page; displays and tables are left out."""
    for kind, content in _blocks(text):
        if kind == "paragraph" and re.match(r"[A-Z(]", content) and len(content) > 60:
            yield content


def manpage_items(text: str) -> Iterator[tuple[str, str]]:
    """(term, explanation) of tagged paragraphs: options, error codes, flags."""
    term = ""
    for kind, content in _blocks(text):
        if kind == "term":
            term = content
        elif term:
            if 1 < len(term) < 60 and 20 < len(content) < 400:
                yield term, content
            term = ""


def _plain(text: str) -> str:
    text = _FONT.sub("", text)
    for escape, plain in _ESCAPES.items():
        text = text.replace(escape, plain)
    return re.sub(r"\\\(..|\\\[[^\]]*\]|\\\*\S", "", text)


def _arguments(line: str, alternating: bool) -> str:
    words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', line)
    return ("" if alternating else " ").join(quoted.replace('""', '"') or bare for quoted, bare in words)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """("paragraph" | "term", plain text), in order."""
    gathered: list[str] = []
    skipping, tag_next = "", False
    for line in text.splitlines():
        if skipping:
            if line.startswith(skipping):
                skipping = ""
            continue
        if line.startswith(('.\\"', "'\\\"")):
            continue
        macro = re.match(r"\.\s*([A-Za-z]+)\s*(.*)", line)
        name, rest = (macro[1], macro[2]) if macro else ("", "")
        if name in ("TH", "SH", "SS", "PP", "P", "LP", "TP", "IP", "RS", "RE", "nf", "EX", "TS", "HP", "fi", "EE", "TQ"):
            if gathered:
                yield "paragraph", re.sub(r"\s+", " ", _plain(" ".join(gathered))).strip()
            gathered = []
            skipping = {"nf": ".fi", "EX": ".EE", "TS": ".TE"}.get(name, "")
            tag_next = name in ("TP", "TQ")
            continue
        if name in ("B", "I", "SM", "SB"):
            piece = _arguments(rest, alternating=False)
        elif name in ("BR", "RB", "BI", "IB", "IR", "RI"):
            piece = _arguments(rest, alternating=True)
        elif line.startswith((".", "'")):
            continue
        else:
            piece = line
        if tag_next:
            yield "term", re.sub(r"\s+", " ", _plain(piece)).strip()
            tag_next = False
        else:
            gathered.append(piece)
    if gathered:
        yield "paragraph", re.sub(r"\s+", " ", _plain(" ".join(gathered))).strip()
