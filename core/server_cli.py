"""`softprune server …` and `softprune selftest`: running servers, asked and switched over their control API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softprune import mask as mask_file
from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError
from softprune.mask import ExpertMask
from softprune.server_client import ServerCallError, ServerClient, apply_to_all, wait_until_crossed

server_app = typer.Typer(help="Ask running servers, and switch their masks live.", no_args_is_help=True, rich_markup_mode="rich")
console = Console(highlight=False)


class InFlight(str, Enum):
    """What becomes of requests that are running when a mask is switched."""

    continue_ = "continue"
    drain = "drain"
    retract = "retract"


Urls = Annotated[list[str], typer.Option("--url", help="The server, e.g. http://127.0.0.1:30000; once for each replica.")]
Key = Annotated[str | None, typer.Option(help="softprune's key; else SOFTPRUNE_KEY, else the one that a server on this machine left.")]
EngineKey = Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key, if it was started with one.")]
Going = Annotated[
    InFlight,
    typer.Option(help="Running requests: go on under the new mask, end first, or (where the engine can) start anew."),
]
Wait = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Then wait until no request in flight ran under an earlier mask; exits with 2 if some do."),
]


@server_app.command("status")
def server_status(
    urls: Urls, key: Key = None, engine_key: EngineKey = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show what servers serve; exits with 2 if one cannot be asked."""
    rows = [_status(client) for client in _clients(urls, key, engine_key)]
    served = [row for row in rows if "error" not in row]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif served:
        table = Table("server", "engine", "model", "experts kept", "mask", "top_k", "epoch", "crossed", box=None)
        for row in served:
            table.add_row(*map(escape, _cells(row)))
        console.print(table)
        for row in served:
            if row["state_file"] is None and (row["mask"] or {}).get("hash") != row["launch_mask"]:
                console.print(f"{row['url']}: a restart returns to the launch mask (no --expert-mask-state)", soft_wrap=True, markup=False)
    for row in rows:
        if "error" in row and not as_json:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(row['error']['text'])}", highlight=False, soft_wrap=True)
    if len(served) < len(rows):
        raise typer.Exit(2)


@server_app.command("apply")
def server_apply(
    file: Annotated[Path, typer.Argument(metavar="MASK", help="Expert mask file.")],
    urls: Urls,
    key: Key = None,
    engine_key: EngineKey = None,
    in_flight: Going = InFlight.continue_,
    wait: Wait = None,
) -> None:
    """Put a mask in force, on every replica or on none."""
    _switch(mask_file.load(file), _clients(urls, key, engine_key), in_flight, wait)


@server_app.command("clear")
def server_clear(
    urls: Urls, key: Key = None, engine_key: EngineKey = None, in_flight: Going = InFlight.continue_, wait: Wait = None
) -> None:
    """Back to the unpruned router, on every replica or on none."""
    _switch(None, _clients(urls, key, engine_key), in_flight, wait)


def selftest(
    url: Annotated[str, typer.Option(help="The server, e.g. http://127.0.0.1:30000.")],
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="Mask to test with; else half of each layer, at random.")] = None,
    key: Key = None,
    engine_key: EngineKey = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once, for the speed.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Length of their answers.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the random mask.")] = 0,
    token_ids: Annotated[str, typer.Option(metavar="FIRST-LAST", help="Range of the prompts' token ids.")] = "100-999",
) -> None:
    """Prove on a running server that a mask is obeyed, leaves no trace, and what it gains; exits with 1 if it is not.

    Masks are switched live, so let no one else's requests run meanwhile. The mask that was in force is put back at the end.
    """
    from softprune.selftest import Check, SelfTest  # aiohttp, without which the other commands start

    try:
        first, last = (int(part) for part in token_ids.split("-"))
    except ValueError:
        raise typer.BadParameter(f"found {token_ids!r}; expected e.g. 100-999", param_hint="--token-ids") from None
    given = None if mask is None else mask_file.load(mask)
    test = SelfTest(ServerClient(url, key, engine_key=engine_key), given, batch, tokens, seed, (first, last + 1))
    verdict = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]", None: "-"}

    def show(check: Check) -> None:
        console.print(f"{verdict[check.passed]:<4} {check.name:<22} {escape(check.detail)}", soft_wrap=True)

    if not test.run(show):
        raise typer.Exit(1)


def _clients(urls: Sequence[str], key: str | None, engine_key: str | None) -> list[ServerClient]:
    clients = [ServerClient(url, key, engine_key=engine_key) for url in urls]
    if len({client.url for client in clients}) < len(clients):
        raise InputError("--url", "", "the same server twice", "each replica once")
    return clients


def _switch(mask: ExpertMask | None, clients: Sequence[ServerClient], in_flight: InFlight, wait: float | None) -> None:
    for client, answer in zip(clients, apply_to_all(clients, mask, in_flight.value), strict=True):
        kept = "all experts" if mask is None else mask.summary
        console.print(f"{client.url}: epoch {answer['epoch']}, {answer['ms']:.1f} ms, {kept}", soft_wrap=True, markup=False)
    if wait is not None:
        wait_until_crossed(clients, wait)
        console.print("no request in flight ran under an earlier mask")


def _status(client: ServerClient) -> dict[str, Any]:
    try:
        return {"url": client.url, **client.status()}
    except ServerCallError as error:
        return {"url": client.url, "error": {"status": error.status, "type": error.kind, "text": str(error)}}


def _cells(row: dict[str, Any]) -> list[str]:
    mask, experts = row["mask"], row["num_experts"]
    counts = mask["num_kept"] if mask else [experts]
    kept = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    name = f"{mask['hash'][:15]}…" if mask else "none"
    numbers = (row["top_k"], row["mask_epoch"], row["crossed_requests"])
    return [row["url"], row["engine"], Path(row["model"]).name, f"{kept} of {experts}", name, *map(str, numbers)]
