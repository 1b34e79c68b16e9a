"""What the commands of `softprune bench` have in common: options, their checks, progress and the file that is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError
from softprune.files import write_whole
from softprune.options import whole_numbers

if TYPE_CHECKING:
    from softprune.bench.prompts import Workload

LATE_S, LATE_SHARE = 0.05, 0.01
"""A client that ran later than this, in seconds and as a share of the pass, is told of."""


class ApiChoice(str, Enum):
    """Which API to measure."""

    auto = "auto"
    sglang = "sglang"
    openai = "openai"


Url = Annotated[str, typer.Option(help="The server, e.g. http://127.0.0.1:30000.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="JSON file to write, with every sample.")]
Batches = Annotated[str, typer.Option(help="Requests at once; several sizes with commas.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Length of every prompt.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of every answer; forced.")]
Seed = Annotated[int, typer.Option(help="Same seed, same prompts; a server's prefix cache knows those of an earlier run.")]
TokenIds = Annotated[str, typer.Option(metavar="FIRST-LAST", help="Range of the prompts' token ids.")]
ApiOption = Annotated[ApiChoice, typer.Option(help="API to measure; auto asks the server what it is.")]
Streamed = Annotated[bool, typer.Option(help="Without streaming, throughput only, and none of streaming's cost.")]
Key = Annotated[str | None, typer.Option(help="softprune's key on that server, if it is not on this machine.")]
EngineKey = Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key.")]
Gpu = Annotated[str | None, typer.Option(metavar="NAME", help="Recorded if nothing else tells which GPU this is.")]
Notes = Annotated[list[str] | None, typer.Option("--note", metavar="KEY=VALUE", help="Recorded as it is; may be repeated.")]
Stall = Annotated[float, typer.Option(min=0.1, help="Longest silence; without streaming, longest answer.")]


def batch_sizes(text: str) -> list[int]:
    """Those of --batch."""
    return whole_numbers("--batch", text, "1,8,32")


def workload(prompt_tokens: int, max_new_tokens: int, seed: int, token_ids: str) -> Workload:
    """What the options ask to send."""
    from softprune.bench.prompts import Workload

    ids = whole_numbers("--token-ids", token_ids, "100-999", "-")
    if len(ids) != 2:
        raise typer.BadParameter(f"found {token_ids!r}; expected e.g. 100-999", param_hint="--token-ids")
    return Workload(prompt_tokens, max_new_tokens, seed, (ids[0], ids[1] + 1))


def notes(texts: Sequence[str] | None) -> dict[str, str]:
    """Those of --note."""
    return dict(_pair(text) for text in texts or [])


def check_out(out: Path) -> None:
    """Find out before the measurement, not after it, that there is no place for its file."""
    if not out.absolute().parent.is_dir():
        raise InputError(str(out), "", "no such folder", "a file in a folder that exists")


def write(out: Path, document: Mapping[str, Any]) -> None:
    """Write a document; whatever goes wrong, the old file stays."""
    try:
        write_whole(out, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise InputError(str(out), "", error.strerror or str(error), "a file that can be written") from None


@contextmanager
def passes_progress(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar over passes; the yielded function takes what was found, passes finished, and passes in all if that is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("connecting", total=None)
        yield lambda text, done, total: bar.update(task, completed=done, total=total, description=text)


def warn_of_cache(console: Console, rows: Sequence[Mapping[str, Any]], prompt_tokens: int) -> None:
    """Say so if a prefix cache knew prompts of some rows' passes, which makes them faster than they are."""
    cached = [request["cached_tokens"] or 0 for row in rows for one in row["repeats"] for request in one["streams"]]
    if sum(cached) > 0.05 * prompt_tokens * len(cached):
        console.print(f"[yellow]warning:[/] {sum(cached)} prompt tokens came from the server's prefix cache; use another --seed")


def warn_of_client(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Say so if this process was kept from running in some rows' passes, so long that their figures are its own machine's."""
    passes = [one for row in rows for one in row["repeats"]]
    late = [one["client_late_s"] for one in passes if one["client_late_s"] > max(LATE_S, LATE_SHARE * one["wall_s"])]
    if late:
        found = f"in {len(late)} of {len(passes)} passes, this client was kept from running for up to {max(late):.2f} s"
        console.print(f"[yellow]warning:[/] {found}; measure from a machine, or on cores, that nothing else uses", soft_wrap=True)


def median(figure: Mapping[str, float] | None, form: str) -> str:
    """A figure's median over repeats as a table shows it."""
    return "-" if figure is None else format(figure["median"], form)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"found {text!r}; expected KEY=VALUE", param_hint="--note")
    return name, value
