"""Two sides, A and B, measured in turns (A B B A A B B A …) so that what changes with time changes both.

The sides are two masks of one server, switched live, or two servers. Passes are those of `softprune.bench.decode`: every pass has prompts
of its own, so that no prefix cache helps the side that comes second. What the ratios mean: `softprune.bench.intervals`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

from softprune.bench import intervals
from softprune.bench.client import DecodeClient
from softprune.bench.decode import Step, about, check_sizes, head
from softprune.bench.errors import BenchmarkError
from softprune.bench.figures import summary
from softprune.bench.prompts import Api, Workload
from softprune.bench.sides import Side, masked_sides
from softprune.bench.step_limits import StepLimits
from softprune.errors import InputError, SoftpruneError
from softprune.mask import ExpertMask
from softprune.server_client import ServerClient, without_address
from softprune.server_mask import mask_put_back
from softprune.signals import ended_in_order, run_async

FORMAT, VERSION = "softprune.decode-comparison", 1
FIGURES = ("decode_tok_s", "total_tok_s")
NAMES: tuple[Literal["a"], Literal["b"]] = ("a", "b")


@dataclass(frozen=True)
class Masks:
    """Two masks of one server that runs with `--softprune-control`; None is the unpruned router.

    Attributes:
        url: the server.
        a, b: what is put in force.
        names: what to call them.
    """

    url: str
    a: ExpertMask | None
    b: ExpertMask | None
    names: tuple[str, str] = ("a", "b")


@dataclass(frozen=True)
class Urls:
    """Two servers, each as it is.

    Attributes:
        a, b: the servers.
        names: what to call them.
        keys: softprune's keys of A and B; None for the `key` of `compare`.
    """

    a: str
    b: str
    names: tuple[str, str] = ("a", "b")
    keys: tuple[str | None, str | None] = (None, None)


def compare(
    sides: Masks | Urls, workload: Workload, batches: Sequence[int], repeats: int = 8, warmup: int = 1, stream: bool = True, *,
    api: Api | Literal["auto"] = "auto", key: str | None = None, engine_key: str | None = None, gpu: str | None = None,
    limits: StepLimits | None = None, notes: Mapping[str, str] | None = None, stall_seconds: float = 60.0,
    progress: Callable[[str, Step], None] | None = None, into: dict[str, Any] | None = None, client: ServerClient | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure B against A at every batch size; not for callers inside an event loop.

    Args:
        sides: what to compare. The mask that was in force before is put back at the end, whatever ends it.
        workload, batches, warmup, stream, api, key, engine_key, gpu, notes, stall_seconds: as for `decode.measure`.
        repeats: pairs of passes of each batch size; fewer than `intervals.ENOUGH` give no interval.
        limits: what a step could be at best, for the roofline column.
        progress: called with the side, "a" or "b", after every pass.
        into: filled with the document while it grows, so that it is there whatever happens.
        client: of the server whose masks are switched, for a caller that switches them as well; else one is made.

    Returns:
        The raw document, JSON-ready, without host names and paths.

    Raises:
        InputError: no or repeated batch sizes, a number out of range, no bandwidth to be found, or statistics that do not fit.
        ServerCallError: the server has no control API, or refuses a mask, before anything is measured.
        BenchmarkError: a pass failed, or the mask was switched by someone else; `partial` holds the document.
    """
    check_sizes(batches, repeats, warmup)
    document = {} if into is None else into
    document.update(head(FORMAT, VERSION, notes))
    settings = {**asdict(workload), "batches": list(batches), "repeats": repeats, "warmup": warmup, "stream": stream}
    settings |= {"stall_seconds": stall_seconds, "way": "masks" if isinstance(sides, Masks) else "urls"}
    settings |= {"confidence": intervals.CONFIDENCE, "resamples": intervals.RESAMPLES}
    total = len(batches) * (2 * warmup + 2 * repeats)
    done = 0

    async def run(control: ServerClient | None) -> None:
        nonlocal done
        async with AsyncExitStack() as stack:
            options: dict[str, Any] = {"api": api, "stream": stream, "engine_key": engine_key, "stall_seconds": stall_seconds}
            if isinstance(sides, Masks):
                assert control is not None
                asked = [(sides.url, control.key)]
            else:
                asked = [(url, own or key) for url, own in zip((sides.a, sides.b), sides.keys, strict=True)]
            clients = []
            for url, own in asked:
                try:
                    clients.append(await stack.enter_async_context(DecodeClient(url, workload, key=own, **options)))
                except BenchmarkError as error:
                    raise InputError(url, "", error.found, error.expected) from None
            if isinstance(sides, Masks):
                assert control is not None
                pair = masked_sides(clients[0], control, (sides.a, sides.b), probed=limits is not None)
            else:
                pair = (Side(clients[0]), Side(clients[1]))
            facts = {}
            for name, side, called in zip(NAMES, pair, sides.names, strict=True):
                side.enter()
                facts[name] = {"name": called, **await about(side.client, gpu)}
            if len({client.api for client in clients}) > 1:
                raise InputError("--api", "", "auto, and two servers of different engines", "sglang or openai, one for both")
            local = all(client.loopback for client in clients)
            speed = limits.find_bandwidth(facts["a"]["gpu"], local) if limits else None
            document.update(settings={**settings, "api": clients[0].api}, sides=facts, bandwidth=asdict(speed) if speed else None)
            document.update(results=[], error=None)
            if limits:  # what is wrong with them is found now, not after the first pass
                for batch, (name, side) in itertools.product(batches, zip(NAMES, pair, strict=True)):
                    limits.of(name, facts[name], side.mask, None, batch, workload)
            for batch in batches:
                row = _Row(batch, workload, dict(zip(NAMES, pair, strict=True)), limits, facts)
                letters = "A" * warmup + "B" * warmup + intervals.order(repeats)
                for place, letter in enumerate(letters, 1 - 2 * warmup):
                    side = row.sides[letter.lower()]
                    result = await side.measured(batch, place)
                    done += 1
                    if place > 0:
                        row.add(letter.lower(), result.figures())
                        document["results"][len(document["results"]) - (place > 1) :] = [row.record()]
                    if progress:
                        progress(letter.lower(), Step(result, done, total))

    try:
        with ExitStack() as after:
            control = None
            if isinstance(sides, Masks):
                control = client or ServerClient(sides.url, key, engine_key=engine_key)
                after.enter_context(ended_in_order())
                after.enter_context(mask_put_back(control))
            run_async(run(control))
    except SoftpruneError as error:
        if "results" in document:
            servers = {"the server": sides.url} if isinstance(sides, Masks) else {"server A": sides.a, "server B": sides.b}
            document["error"] = without_address(str(error), servers)
        if "results" in document and isinstance(error, BenchmarkError):
            error.partial = document
        raise
    except (KeyboardInterrupt, SystemExit):
        if "results" in document:
            document["error"] = f"interrupted after {done} of {total} passes"
        raise
    return document


class _Row:
    """The passes of one batch size, and what is known of them so far."""

    def __init__(
        self, batch: int, workload: Workload, sides: dict[str, Side], limits: StepLimits | None, facts: dict[str, dict[str, Any]]
    ) -> None:
        self.batch, self.workload, self.sides, self.limits, self.facts = batch, workload, sides, limits, facts
        self.passes: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        self.order = ""
        for side in sides.values():
            side.forget()

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """One more measured pass of a side."""
        self.passes[name].append(figures)
        self.order += name.upper()

    def record(self) -> dict[str, Any]:
        """As it stands in the document."""
        a, b = (self.passes[name] for name in NAMES)
        pairs = list(zip(a, b, strict=False))
        figure = next(name for name in FIGURES if all(one[name] is not None for one in a + b))
        ratios: dict[str, dict[str, Any] | None] = {name: None for name in FIGURES}
        says = None
        for name in FIGURES[FIGURES.index(figure) :] if pairs else ():
            found = intervals.ratio([one[name] for one, _ in pairs], [other[name] for _, other in pairs], self.workload.seed)
            ratios[name] = found.record()
            says = found.says if name == figure else says
        rows: dict[str, Any] = {name: summary(self.batch, passes) if passes else None for name, passes in self.passes.items()}
        record = {"batch": self.batch, "order": self.order, **rows, "ratio": ratios, "figure": figure, "says": says}
        return {**record, "roofline": self._roofline(rows, figure) if self.limits else None}

    def _roofline(self, rows: dict[str, Any], figure: str) -> dict[str, Any]:
        assert self.limits is not None
        found: dict[str, Any] = {}
        for name, side in self.sides.items():
            limit = self.limits.of(name, self.facts[name], side.mask, side.counts, self.batch, self.workload)
            reached = rows[name][figure]["median"] / limit["tok_s"] if rows[name] else None
            found[name] = {"tok_s": limit.pop("tok_s"), "share": reached, **limit}
        return found
