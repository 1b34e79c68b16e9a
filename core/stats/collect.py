"""`softprune stats collect`: packs replayed through a running server, teacher-forced, and the statistics of it.

Blocks are sent in parts. After each part the server stops, its statistics are fetched, held against what was sent and written beside the
output, and the server forgets them. So an interruption loses no more than the part under way, and the sum of the parts is the whole.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune.errors import InputError
from softprune.evaluate.packing import Blocks, block_hashes, blocks_sha256, completion_ranges
from softprune.evaluate.replay import Replay
from softprune.runtime.tags import check_tag
from softprune.server_client import ServerCallError, ServerClient
from softprune.stats.collect_state import Asked, PackAsked, Part, StateFolder
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, read, write
from softprune.stats.header import DEFAULT_TAG, DataSet, Header, Mode
from softprune.stats.merge import merge_files

_OTHERS = "nothing counted yet; fetch what is there and forget it by `softprune stats stop` and `softprune stats reset`"


@dataclass(frozen=True)
class Options:
    """How to collect.

    Attributes:
        mode, sample, attribution: as `ServerClient.start_stats` takes them.
        blocks_a_part: drained together.
        concurrency: requests at once.
    """

    mode: Mode = "router"
    sample: int | None = None
    attribution: str | None = None
    blocks_a_part: int = 64
    concurrency: int = 8


class Collection:
    """One collection.

    Args:
        client: of the server.
        packs: by tag; all blocks have one length.
        out: the file to write.
        options: see `Options`.

    Raises:
        InputError: a pack's name is no tag.
        ServerCallError: the server does not answer.
        StatisticsError: the server's statistics, or those beside `out`, are not this collection's.
    """

    def __init__(self, client: ServerClient, packs: Mapping[str, Blocks], out: Path, options: Options) -> None:
        self._client, self._packs, self._out, self._options = client, packs, out, options
        for tag in packs:
            check_tag(tag)
            if tag == DEFAULT_TAG:
                raise InputError("--packs", "", f"a pack named {tag}", f"another name: requests without a tag are counted as {tag}")
        status = client.status()
        served = status.get("statistics")
        if served is None:
            raise ServerCallError(client.url, 409, "statistics_are_off", "start the server with --softprune-stats")
        self._replay = Replay.of(client, status["engine"])
        hashes = {tag: block_hashes(blocks) for tag, blocks in packs.items()}
        # Packs take turns, so that what was drained holds about as much of each.
        longest = max(len(one) for one in hashes.values())
        self._jobs = [(tag, i) for i in range(longest) for tag in packs if i < len(hashes[tag])]
        self._hashes = hashes
        self._asked = Asked(
            fingerprint=status["fingerprint"], mask=(status["mask"] or {}).get("hash"), mode=options.mode, sample=options.sample,
            attribution=options.attribution, seq_len=next(iter(packs.values())).ids.shape[1],
            packs=[PackAsked(tag=tag, num_blocks=len(one), sha256=blocks_sha256(one)) for tag, one in hashes.items()],
        )  # fmt: skip
        self.folder = StateFolder(out)
        self._state = self.folder.begin(self._asked)
        self._take_over(served)

    @property
    def num_blocks(self) -> int:
        """Of all packs."""
        return len(self._jobs)

    @property
    def num_done(self) -> int:
        """Blocks that were drained, by this command or one that was interrupted."""
        return self._state.done

    @property
    def lost_samples(self) -> int:
        """Tokens in drained blocks that were to be sampled, and could not be."""
        return sum(part.lost_samples for part in self._state.parts)

    def run(self, advance: Callable[[int], None]) -> Statistics:
        """Replay what is not done, and write the output.

        Args:
            advance: called with the number of blocks that were computed.

        Returns:
            What was written.

        Raises:
            ServerCallError, StatisticsError: the part under way is lost; those before it lie in `folder`.
            KeyboardInterrupt: the blocks under way were waited for, and all that was computed lies in `folder`.
        """
        while self._state.done < len(self._jobs):
            self._collect_part(advance)
        total = merge_files(self.folder.files(self._state))
        write(total, self._out)
        self.folder.remove()
        return total

    @property
    def _mask(self) -> str:
        """As `GET stats` takes it."""
        return self._asked.mask or "none"

    def _take_over(self, served: dict[str, Any]) -> None:
        """See that the server holds no statistics but this collection's own, which it is told to forget.

        Raises:
            StatisticsError: it holds others, or has no room for the tags.
        """
        new = [tag for tag in self._packs if tag not in served["tags"]]
        if len(served["tags"]) + len(new) > served["max_tags"]:
            expected = f"room for {', '.join(new)} (--softprune-max-tags is {served['max_tags']})"
            raise StatisticsError(self._client.url, "tags", f"tags {', '.join(served['tags'])}", expected)
        if not served["collecting"] and not served["masks"]:
            return
        routed = sum(tokens["prefill"] + tokens["decode"] for one in served["masks"] for tokens in one["tokens"].values())
        runs = {run.id for one in served["masks"] for run in self._fetch(one["mask"] or "none").header.runs}
        being_started = self._state.run == "" and not routed
        if not being_started and not runs <= self._state.runs:
            found = f"statistics of {routed:,} tokens, {'still' if served['collecting'] else 'no longer'} being collected"
            raise StatisticsError(self._client.url, "statistics", found, _OTHERS)
        if served["collecting"]:
            self._client.stop_stats()
        self._client.reset_stats()

    def _collect_part(self, advance: Callable[[int], None]) -> None:
        first = self._state.done
        self._start()
        interrupted: KeyboardInterrupt | None = None
        try:
            (run,) = self._fetch(self._mask).header.runs
            self._state = self.folder.save(self._state.model_copy(update={"run": run.id}))
            stop, interrupted = self._send(first, min(first + self._options.blocks_a_part, len(self._jobs)), advance)
        finally:
            stopped = self._client.stop_stats()
        if stop > first:
            self._drain(first, stop, stopped.get("lost_samples", 0))
        self._client.reset_stats()
        if interrupted is not None:
            raise interrupted

    def _start(self) -> None:
        """Have the server collect.

        Raises:
            ServerCallError: it refuses.
            StatisticsError: another mask is in force than at the start.
        """
        options = self._options
        self._state = self.folder.save(self._state.model_copy(update={"run": ""}))
        try:
            started = self._client.start_stats(options.mode, options.sample, options.attribution)
        except ServerCallError as error:
            if error.status is not None and not self._state.parts:
                self.folder.remove()
            raise
        found = [one["mask"] or "none" for one in started["masks"]]
        if found != [self._mask]:
            self._client.stop_stats()
            raise StatisticsError(self._client.url, "mask", f"{' and '.join(found)} in force", f"{self._mask}, as at the start")

    def _send(self, first: int, stop: int, advance: Callable[[int], None]) -> tuple[int, KeyboardInterrupt | None]:
        """Have blocks computed: how far that went, and what interrupted it; blocks under way are waited for."""
        with ThreadPoolExecutor(self._options.concurrency) as pool:
            sent = [pool.submit(self._send_one, *job) for job in self._jobs[first:stop]]
            interrupted = None
            try:
                for one in sent:
                    one.result()
                    advance(1)
            except BaseException as error:
                pool.shutdown(cancel_futures=True)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                interrupted = error
        # They were begun in order, so those that were not cancelled come before those that were.
        return first + sum(not one.cancelled() and one.result() is None for one in sent), interrupted

    def _send_one(self, tag: str, block: int) -> None:
        blocks = self._packs[tag]
        spans = None if self._options.mode == "router" else completion_ranges(blocks.keep[block])
        self._replay.send(blocks.ids[block].tolist(), tag, spans)

    def _drain(self, first: int, stop: int, lost: int) -> None:
        """Write what the server counted of blocks [first, stop).

        Raises:
            StatisticsError: it is not what was sent, or cannot be written.
        """
        jobs, statistics = self._jobs[first:stop], self._fetch(self._mask)
        self._check(statistics.header, Counter(tag for tag, _ in jobs))
        hashes = {tag: [self._hashes[tag][i] for one, i in jobs if one == tag] for tag in self._packs}
        data_sets = [DataSet(id=tag, hashes=[f"sha256:{digest}" for digest in some]) for tag, some in sorted(hashes.items()) if some]
        header = statistics.header.model_copy(update={"data_sets": data_sets})
        file = self.folder.part(len(self._state.parts) + 1)
        write(Statistics(header, statistics.tensors, str(file)), file)
        part = Part(file=file.name, first=first, stop=stop, runs=[run.id for run in header.runs], lost_samples=lost)
        self._state = self.folder.save(self._state.model_copy(update={"parts": [*self._state.parts, part], "run": None}))

    def _check(self, header: Header, sent: Counter[str]) -> None:
        url, seq_len = self._client.url, self._asked.seq_len
        if header.model.fingerprint != self._asked.fingerprint:
            raise StatisticsError(url, "model.fingerprint", str(header.model.fingerprint), self._asked.fingerprint)
        for tag, blocks in sent.items():
            tokens = header.tokens[tag]
            # An engine may launch one step more of a request than it needs.
            if tokens.prefill != blocks * seq_len or tokens.cached or tokens.decode > blocks:
                found = f"{tokens.prefill} tokens routed in prefill, {tokens.decode} in decoding, {tokens.cached} cached"
                why = "the mask was switched meanwhile, or others sent requests under this tag"
                expected = f"{blocks * seq_len} in prefill and none cached ({why})"
                raise StatisticsError(url, f"tokens.{tag}", found, expected)

    def _fetch(self, mask: str) -> Statistics:
        data = self._client.stats_file(mask)
        try:
            with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
                file.write(data)
                file.flush()
                return read(file.name)
        except OSError as error:
            raise StatisticsError(tempfile.gettempdir(), "", error.strerror or str(error), "room for a temporary file") from None
