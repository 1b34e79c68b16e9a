"""Figures in README and docs that come from headline.json: whole tables, and numbers in the text.

Between `<!-- headline:NAME -->` and `<!-- /headline -->` stands what this module makes of headline.json. NAME is one of `TABLES`, or a
figure with the format that its number is to have: `<!-- headline:sglang.mask.switch_ms.p50 .1f -->5.5<!-- /headline -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from softprune.bench.headline import NAME, Figure
from softprune.errors import InputError

_OPEN, _CLOSE = "<!-- headline:", "<!-- /headline -->"
_BLOCK = re.compile(rf"({_OPEN}(\S+)(?: (\S+))? -->)(.*?){_CLOSE}", re.DOTALL)
_FORMS = {"ratio": ".3f", "tok/s": ",.0f", "requests": ",.0f", "ms": ".1f", "MiB": ".1f"}
"""How a table shows a figure, by its unit."""


@dataclass(frozen=True)
class Table:
    """A table's texts.

    Attributes:
        columns: the header.
        rows: cells; one that is a figure's name stands for its number, or for nothing while it is not measured. A row whose figures
            are all missing is left out.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> set[str]:
        """Figures that it shows."""
        return {cell for row in self.rows for cell in row if NAME.fullmatch(cell)}

    def markdown(self, figures: Mapping[str, Figure]) -> str:
        """The table, with a line feed before and after."""
        rows = []
        for row in self.rows:
            named = [cell for cell in row if NAME.fullmatch(cell)]
            if any(name in figures for name in named):
                rows.append([_cell(figures, cell) if cell in named else cell for cell in row])
        return "\n" + markdown_table(self.columns, rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    head, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|\n" for row in (columns, *rows))
    return head + "|---" * len(columns) + "|\n" + "".join(body)


def _cell(figures: Mapping[str, Figure], name: str) -> str:
    return format(figures[name]["value"], _FORMS.get(figures[name]["unit"], "g")) if name in figures else ""


def _speed(engine: str, title: str) -> Table:
    columns = (
        f"{title}, batch",
        "unpatched",
        "keep-all / unpatched",
        "keep 24 / unpatched",
        "top_k 2 / 4",
        "second boot / first, unpatched",
    )
    figures = (
        "mask.unpatched_tok_s",
        "mask.keep_all_over_unpatched",
        "mask.keep24_over_unmasked",
        "top_k.2_over_4",
        "mask.boot_2_over_boot_1",
    )
    return Table(columns, tuple((str(batch), *(f"{engine}.{figure}.bs{batch}" for figure in figures)) for batch in (1, 8, 32, 64)))


def _statistics() -> Table:
    columns = ("router", "reap", "eaft", "idle", "without")

    def row(engine: str, what: str, text: str) -> tuple[str, ...]:
        return (text, *(f"{engine}.stats.{column}_over_off.{what}" for column in columns))

    return Table(
        ("over unpatched", "`router`", "`reap`", "`eaft`", "off", "without"),
        (
            row("sglang", "decode_bs32", "SGLang, decoding, 32 streams"),
            row("sglang", "prefill_8x8192", "SGLang, prefill of 8 x 8,192"),
            row("sglang", "prefill_8x8192_logprobs", "the same with prompt log-probabilities on both sides"),
            row("vllm", "decode_bs32", "vLLM, decoding, 32 streams"),
            row("vllm", "prefill_8x8192", "vLLM, prefill of 8 x 8,192"),
            row("vllm", "prefill_8x8192_logprobs", "the same with prompt log-probabilities on both sides"),
        ),
    )


def _decode(engine: str, title: str) -> Table:
    variants = {
        "keep24": "masked, keep 24",
        "keep16": "masked, keep 16",
        "keep24_rewritten": "rewritten, keep 24",
        "keep16_rewritten": "rewritten, keep 16",
        "top2": "top_k 2",
        "keep24_top2": "masked, keep 24, top_k 2",
    }
    rows = tuple(
        (
            text,
            f"{engine}.decode.{name}_over_unmasked.bs32",
            f"{engine}.decode.{name}_masked_over_rewritten.bs32" if name in ("keep24", "keep16") else "",
        )
        for name, text in variants.items()
    )
    return Table((f"{title}, batch 32, 2,048 new tokens", "over unmasked", "masked over rewritten"), rows)


def _started() -> Table:
    engines = {"SGLang": (64, 128), "vLLM": (128,)}
    rows = tuple(
        (
            f"{title}, keep {keep}, batch {batch}",
            *(f"{title.lower()}.decode.keep{keep}_started_over_{other}.bs{batch}" for other in ("rewritten", "live")),
        )
        for title, batches in engines.items()
        for keep in (24, 16)
        for batch in batches
    )
    return Table(("masked at start, 2,048 new tokens", "over rewritten", "over switched live"), rows)


def _max_batch() -> Table:
    variants = {"unmasked": "unmasked", "keep24": "rewritten, keep 24", "keep16": "rewritten, keep 16"}
    rows = []
    for gib in (16, 24):
        stem = f"sglang.max_batch_{gib}gib"
        for name, text in variants.items():
            ratios = ("", "") if name == "unmasked" else (f"{stem}.{name}_over_unmasked", f"{stem}.{name}_over_unmasked_tok_s")
            rows.append((f"{gib} GiB, {text}", f"{stem}.{name}", f"{stem}.{name}_tok_s", *ratios))
    return Table(("SGLang, KV room of", "largest batch", "tok/s there", "batch over unmasked", "tok/s over unmasked"), tuple(rows))


TABLES = {
    "speed.sglang": _speed("sglang", "SGLang"),
    "speed.vllm": _speed("vllm", "vLLM"),
    "statistics": _statistics(),
    "decode.sglang": _decode("sglang", "SGLang"),
    "decode.vllm": _decode("vllm", "vLLM"),
    "started": _started(),
    "max_batch": _max_batch(),
}


def filled(text: str, figures: Mapping[str, Figure], source: str = "README.md") -> str:
    """A text with every block rewritten.

    Raises:
        InputError: a block names nothing that is there, has a format that fits no number, or does not end; `source` is the file it names.
    """
    if (opened := text.count(_OPEN)) != (closed := len(_BLOCK.findall(text))) or text.count(_CLOSE) != closed:
        raise InputError(source, "headline blocks", f"{opened} that begin, {text.count(_CLOSE)} that end", "a begin and an end for each")

    def one(match: re.Match[str]) -> str:
        head, name, form = match[1], match[2], match[3]
        if form is None and name in TABLES:
            return head + TABLES[name].markdown(figures) + _CLOSE
        if form is None or name not in figures:
            known = f"one of {', '.join(TABLES)}, or a figure of headline.json with a format"
            raise InputError(source, name, "a block of this name" if form is None else "no such figure", known)
        try:
            return head + format(figures[name]["value"], form) + _CLOSE
        except ValueError:
            raise InputError(source, name, f"the format {form}", "one for a number, e.g. .2f") from None

    return _BLOCK.sub(one, text)


def shown(text: str) -> Iterator[str]:
    """Names of the figures that a text's blocks show; with repeats."""
    for _, name, form, _ in _BLOCK.findall(text):
        yield from TABLES[name].names if not form and name in TABLES else [name]
