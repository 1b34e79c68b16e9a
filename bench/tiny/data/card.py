"""The data card bench/tiny/DATA.md, made from bench/tiny/data.json and the list of sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprune.bench.tiny.data.source_list import SOURCES
from softprune.bench.tiny.data.split import HELDOUT_PER_MILLE, SEED

_SPLIT = f"""\
By document: a document is held out when a number made from SHA-256 of the seed {SEED} and its name is below {HELDOUT_PER_MILLE} of 1000.
Documents are man pages, pages of documentation, sections of the Debian Reference, speeches, chapters, dictionary headwords and Python
files. For the generated packs a document is a problem or a tool call in canonical form (operation and numbers, whatever the wording;
tool and arguments), so the two parts share templates and wordings but no problem and no call; none comes twice in a part either.
Passages and functions whose word 5-grams are near-duplicates of others (MinHash, 64 permutations, estimated Jaccard similarity of at
least 0.5) are left out, within the parts and across them. Man pages whose licence asks for a notice on every copy
(Linux-man-pages-copyleft) are in the training part only, which is not committed."""

_LICENCES = """\
The held-out packs are data: each row stays under the licence of its source (column `source`), not under this repository's. The
sources' own notices are in NOTICES.txt, as their packages carry them. Debian's dictionary, man pages and reference are copyleft."""


def card(data: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        data: what data.json holds.
    """
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        "# The data of the tiny model",
        "",
        "Made by `python -m softprune.bench.tiny.packs --update`; nothing here is written by hand.",
    ]
    lines += [f"`make tiny-data` rebuilds it and compares the hashes. Built with {versions}.", ""]
    lines += ["| pack | part | conversations | documents | characters | tokens | completion tokens |", "|---|---|---|---|---|---|---|"]
    for pack, parts in data["packs"].items():
        for name, part in parts.items():
            sizes = (f"{part[key]:,}" for key in ("conversations", "documents", "characters", "tokens", "completion_tokens"))
            lines.append(f"| {pack} | {name} | {' | '.join(sizes)} |")
    lines += ["", "Tokens include one EOS a row. Completion tokens are those that the assistant writes, in all channels.", ""]
    lines += [
        "Hashes are SHA-256: of rows, over every text and a zero byte; of tokens, over the uint16 ids (little-endian).",
        "",
    ]
    lines += ["| pack | part | rows | tokens |", "|---|---|---|---|"]
    for pack, parts in data["packs"].items():
        lines += [f"| {pack} | {name} | `{part['rows_sha256']}` | `{part['tokens_sha256']}` |" for name, part in parts.items()]
    lines += ["", f"Tokenizer (`tokenizer.json`): `{data['tokenizer_sha256']}`", "", "## Split", "", _SPLIT, "", "## Sources", ""]
    lines += ["| source | version | registry | licence | training | held out | SHA-256 of the file |", "|---|---|---|---|---|---|---|"]
    lines[-2:-2] = [_LICENCES, ""]
    used = data["conversations_by_source"]
    for source in SOURCES:
        counts = used.get(source.name, {"train": 0, "heldout": 0})
        origin = f"{source.name} | {source.version} | {source.registry} | {source.licence}"
        lines.append(f"| {origin} | {counts['train']:,} | {counts['heldout']:,} | `{source.sha256}` |")
    for name, counts in used.items():
        if name.startswith("generated:"):
            lines.append(f"| {name} | | this repository | as this repository | {counts['train']:,} | {counts['heldout']:,} | |")
    return "\n".join([*lines, ""])
