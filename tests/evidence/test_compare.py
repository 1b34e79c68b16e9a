"""`bench compare` over HTTP: a server whose speed drifts and stalls, against itself and against its own second port that is 3 % faster.

Run alone: pytest tests/evidence/test_compare.py
Each of 20 trials is a whole comparison with a server and a noise of its own; they run at once, since a fake server only waits.
`tests/unit/test_intervals.py` has thousands of trials without a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from softprune.bench.compare import Urls, compare
from softprune.bench.prompts import Workload
from tests.conftest import Evidence
from tests.unit.fake_server import Behaviour, FakeServer

TRIALS = 20


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(TRIALS)]


def trial(server: FakeServer, seed: int, truth: float, pairs: int) -> dict[str, Any]:
    """What a comparison finds; a pass takes two seconds, so that a busy machine's own noise is small beside the planted one."""
    server.behave(Behaviour("vllm", 0.16, 0.16, noise=seed, second=truth))
    document = compare(Urls(server.url, server.second), Workload(8, 13, seed), [1], repeats=pairs, warmup=1)
    return dict(document["results"][0]["ratio"]["decode_tok_s"])


@pytest.mark.parametrize(("truth", "pairs"), [(1.0, 8), (1.03, 12)])
def test_twenty_comparisons(servers: list[FakeServer], truth: float, pairs: int, evidence: Evidence) -> None:
    """The interval holds the truth in at least 19 of 20, so the same server is called faster in one at most; and 3 % are found."""
    with ThreadPoolExecutor(TRIALS) as pool:
        found = list(pool.map(trial, servers, range(TRIALS), [truth] * TRIALS, [pairs] * TRIALS))
    holds = sum(one["low"] <= truth <= one["high"] for one in found)
    verdicts = {verdict: sum(one["verdict"] == verdict for one in found) for verdict in ("faster", "slower", "within noise")}
    widths = sorted((one["high"] / one["low"]) ** 0.5 - 1 for one in found)
    evidence(
        f"bench.compare.http.truth_{truth}",
        {"trials": TRIALS, "pairs": pairs, "holds": holds, **verdicts, "median_half_width": widths[TRIALS // 2]},
    )
    assert holds >= 0.95 * TRIALS, found
    if truth == 1.0:
        assert verdicts["within noise"] == holds
    else:
        assert verdicts["slower"] == 0
        assert verdicts["faster"] >= 0.65 * TRIALS, found
