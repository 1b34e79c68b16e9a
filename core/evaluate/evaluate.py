"""Evaluating a running server: packs, teacher-forced, in blocks that are sent several at a time; metrics of each pack at each length.

Scores lie beside the output as they arrive (see `eval_state`), so an interruption loses no more than the blocks under way, and memory
does not grow with their number. Metrics are made of them at the end, in the blocks' order, whatever order they arrived in. Blocks in
which no token counts are not sent.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from softprune.evaluate import evaluation
from softprune.evaluate.errors import EvaluationFileError
from softprune.evaluate.eval_document import document, lasting, meta_of
from softprune.evaluate.eval_packs import PackSet
from softprune.evaluate.eval_state import Asked, CellAsked, ScoreStore
from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.metrics import Accumulator, MetricSettings
from softprune.evaluate.packing import block_hashes, blocks_sha256
from softprune.evaluate.prompt_scores import NO_SCORES, PromptScorer
from softprune.evaluate.served import ask_served, check_context, check_tokenizer
from softprune.server_client import ServerClient

SAME_SCORES = 0.05
"""How far log p of a block's tokens may lie off on the mean when it is scored again, in another batch; other weights differ by more."""
SAME_NLL = 0.02
"""How far their sum may, as a share; half of it in nats a token, where all are likely."""


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate.

    Attributes:
        metrics: what is made of the scores.
        concurrency: requests at once.
        label: what the file calls the model; None for the last part of its path.
        order: seed of the order in which blocks are sent; None for the packs' own, one after another.
    """

    metrics: MetricSettings = field(default_factory=MetricSettings)
    concurrency: int = 8
    label: str | None = None
    order: int | None = None


class Evaluating:
    """One evaluation; a context manager within which OUT.parts is open.

    Args:
        client: of the server.
        packs: what is scored.
        out: the file to write.
        settings: see `EvalSettings`.
        tell: told warnings.

    Raises:
        ServerCallError: the server does not answer, or has no room for a block.
        InputError: its tokenizer is another than the packs'.
    """

    store: ScoreStore

    def __init__(
        self, client: ServerClient, packs: PackSet, out: Path, settings: EvalSettings, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self._packs, self._out, self._settings = packs, out, settings
        self._served = ask_served(client)
        every = [blocks.ids for by_length in packs.cells.values() for blocks in by_length.values()]
        check_context(self._served, client.url, max(ids.shape[1] for ids in every))
        if (warning := check_tokenizer(client, self._served, *packs.sample, max(int(ids.max()) for ids in every))) is not None:
            tell(f"warning: {warning}")
        self._scorer = PromptScorer(client, self._served, settings.metrics.entropy_topk)
        # A block that two cells share, as UNION and its only pack do, is scored once.
        self._jobs: list[tuple[str, int, int]] = []
        self._cells: dict[tuple[str, int], list[int]] = {}
        self._digests: dict[tuple[str, int], str] = {}
        known: dict[str, int] = {}
        for pack, by_length in packs.cells.items():
            for seq_len, blocks in by_length.items():
                hashes = block_hashes(blocks)
                for number, digest in enumerate(hashes):
                    if known.setdefault(digest, len(self._jobs)) == len(self._jobs):
                        self._jobs.append((pack, seq_len, number))
                self._cells[pack, seq_len] = [known[digest] for digest in hashes]
                self._digests[pack, seq_len] = blocks_sha256(hashes)
        served = self._served
        self._asked = Asked(
            engine=f"{served.engine} {served.version}", model=served.model, path=Path(served.path).name,
            tokenizer=Path(served.tokenizer).name, context=served.context, computes=dict(served.computes),
            fingerprint=served.fingerprint, mask=served.mask, top_k=served.top_k,
            entropy_topk=settings.metrics.entropy_topk, block_form=packs.form, order=settings.order,
            cells=[CellAsked(pack=pack, seq_len=length, blocks_sha256=digest) for (pack, length), digest in self._digests.items()],
        )  # fmt: skip
        self._kept = [int(self._block(job)[1].sum()) for job in range(len(self._jobs))]
        self._clock = _Clock()

    def __enter__(self) -> Evaluating:
        """Begin, or go on.

        Raises:
            EvaluationFileError: what lies beside the output is of another evaluation, or the server gives other scores than it did; or the
                output is a file that is no evaluation, which is not written over.
            ServerCallError, EvaluationError: a block that was scored cannot be scored again.
        """
        if self._out.exists():
            evaluation.read(self._out)
        self.store = ScoreStore(self._out, self._asked, self._kept)
        try:
            self._check_scores()
        except BaseException:
            self.store.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.store.__exit__()

    @property
    def num_tokens(self) -> int:
        """Of all blocks that are sent: those with a token that counts."""
        return sum(len(self._block(job)[0]) for job, kept in enumerate(self._kept) if kept)

    @property
    def num_done(self) -> int:
        """Tokens of blocks that have their scores."""
        return self.num_tokens - sum(len(self._block(job)[0]) for job in self._missing)

    @property
    def _missing(self) -> list[int]:
        return [job for job in self.store.missing if self._kept[job]]

    def run(self, advance: Callable[[int], None] = lambda tokens: None) -> Evaluation:
        """Score what has no scores yet, and write the output.

        Args:
            advance: told of tokens that were scored.

        Raises:
            ServerCallError, EvaluationError: a block cannot be scored; those before it stay.
            KeyboardInterrupt: blocks under way were waited for, and stay as well.
        """
        jobs = self._missing
        if self._settings.order is not None:
            random.Random(self._settings.order).shuffle(jobs)
        self._clock.start()
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            sent = [pool.submit(self._score, job) for job in jobs]
            try:
                for one in as_completed(sent):
                    advance(one.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        evaluation.write(document(self._meta(), self._measured()), self._out)
        self.store.remove()
        return evaluation.read(self._out)

    def _check_scores(self) -> None:
        """Score a block again that has its scores: names and routers' fingerprints do not tell of other weights."""
        job = next((job for job in self.store.present if self._kept[job]), None)
        if job is None:
            return
        kept, again = self.store.get(job)[0].log_p, self._scorer.score(*self._block(job)).log_p
        if (apart := float(np.abs(again - kept).mean())) > SAME_SCORES:
            anew = f"at most {SAME_SCORES}, as the same weights give; to begin anew, move {self.store.path} away"
            raise EvaluationFileError(
                str(self.store.path), f"block {job}", f"log p that is {apart:.3g} off on the mean, scored again", anew
            )

    def known(self) -> Evaluation | None:
        """The output, if it is there already and is what `run` would write; None as well if nobody knows what is served.

        One block is scored again, and has to have the log p that it has in the file.

        Raises:
            EvaluationFileError: it is there, and no evaluation.
            ServerCallError, EvaluationError: the block cannot be scored.
        """
        if self._served.fingerprint is None or not self._out.is_file():
            return None
        found = evaluation.read(self._out)
        digests = {key: cell.identity["blocks_sha256"] for key, cell in found.cells.items()}
        same = found.own and (lasting(found.meta), digests) == (lasting(self._meta()), self._digests)
        return found if same and self._scores_again(found) else None

    def _scores_again(self, found: Evaluation) -> bool:
        key, at, job = next((key, i, job) for key, jobs in self._cells.items() for i, job in enumerate(jobs) if self._kept[job])
        blocks = found.cells[key].blocks
        if blocks is None or blocks.tokens[at] != self._kept[job]:
            return False
        nll = -float(self._scorer.score(*self._block(job)).log_p.sum(dtype=np.float64))
        return math.isclose(nll, blocks.nll[at], rel_tol=SAME_NLL, abs_tol=SAME_NLL / 2 * self._kept[job])

    def _meta(self) -> dict[str, Any]:
        settings = self._settings
        label = settings.label or Path(self._served.path).name
        return meta_of(self._served, self._packs, settings.metrics, label, settings.concurrency)

    def _block(self, job: int) -> tuple[Any, Any]:
        """Ids and mask of a block."""
        pack, seq_len, number = self._jobs[job]
        blocks = self._packs.cells[pack][seq_len]
        return blocks.ids[number], blocks.keep[number]

    def _score(self, job: int) -> int:
        ids, keep = self._block(job)
        scores = self._scorer.score(ids, keep)
        self.store.add(job, scores, self._clock.lap())
        return len(ids)

    def _measured(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Each cell, as the file has it."""
        cells: dict[tuple[str, int], dict[str, Any]] = {}
        for (pack, seq_len), jobs in self._cells.items():
            accumulator, seconds, predicted = Accumulator(self._settings.metrics), 0.0, 0
            blocks = self._packs.cells[pack][seq_len]
            for job in jobs:
                scores, lap = self.store.get(job) if self._kept[job] else (NO_SCORES, 0.0)
                accumulator.add_block(scores.log_p, scores.entropy)
                seconds, predicted = seconds + lap, predicted + (blocks.ids.shape[1] - 1) * (self._kept[job] > 0)
            model = {**accumulator.cell(), "tok_s_pred": predicted / max(seconds, 1e-9)}
            cells[pack, seq_len] = {
                "rows_seen": blocks.rows_seen, "rows_sha256": blocks.rows_sha256, "pack_wall_s": seconds, "num_blocks": len(jobs),
                "blocks_sha256": self._digests[pack, seq_len], "model": model,
            }  # fmt: skip
        return cells


def evaluate(
    client: ServerClient, packs: PackSet, out: Path, settings: EvalSettings | None = None,
    advance: Callable[[int], None] = lambda tokens: None, tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:  # fmt: skip
    """Evaluate what a server serves now, and write the file; goes on where an interrupted call with the same arguments was.

    Args:
        client: of the server, SGLang or vLLM, with softprune or without.
        packs: from `eval_packs.load`.
        out: the file to write; OUT.parts lies beside it meanwhile.
        settings: see `EvalSettings`.
        advance: told of tokens that were scored.
        tell: told warnings.

    Raises:
        SoftpruneError: as `Evaluating` and its `run`.
    """
    with Evaluating(client, packs, out, settings or EvalSettings(), tell) as run:
        return run.run(advance)


class _Clock:
    """Shares the time that passes among the blocks that end in it, so that seconds add up whatever runs side by side."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), 0.0

    def start(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        with self._lock:
            now = time.monotonic()
            passed, self._last = now - self._last, now
            return passed
