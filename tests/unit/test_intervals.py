"""The interval of a median of paired ratios holds the truth as often as it says, of few pairs and in the noise that machines have."""

from __future__ import annotations

import math
from itertools import islice

import pytest

from softprune.bench.intervals import ENOUGH, Ratio, order, ratio
from softprune.few_samples import LEAST, widening
from tests.unit.noise import Noise

NOISES = {
    "quiet": Noise(drift=0.003, own=0.003, slow=0.0),
    "drift and stalls": Noise(),
    "many stalls": Noise(drift=0.01, memory=0.7, slow=0.1),
    "growing warm": Noise(drift=0.005, own=0.003, slow=0.03, trend=-0.004),
}
TRIALS = 200


def measured(noise: Noise, pairs: int, truth: float, seed: int) -> Ratio:
    """What a comparison finds of a server whose B is `truth` times as fast."""
    speeds = list(islice(noise.factors(seed), 2 * pairs))
    a = [speed for speed, letter in zip(speeds, order(pairs), strict=True) if letter == "A"]
    b = [speed * truth for speed, letter in zip(speeds, order(pairs), strict=True) if letter == "B"]
    return ratio(a, b, seed)


def holds(found: Ratio, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


@pytest.mark.parametrize("pairs", [3, 5, 8])
@pytest.mark.parametrize("name", NOISES)
def test_the_interval_holds_the_truth(name: str, pairs: int) -> None:
    """In at least 19 of 20 trials, which also bounds how often no difference is called one."""
    found = [measured(NOISES[name], pairs, 1.0, seed) for seed in range(TRIALS)]
    share = sum(holds(one, 1.0) for one in found) / TRIALS
    assert share >= 0.95, share
    assert sum(one.verdict == "within noise" for one in found) / TRIALS == share


@pytest.mark.parametrize(("name", "pairs", "least"), [("quiet", 5, 0.99), ("drift and stalls", 8, 0.85), ("growing warm", 8, 0.9)])
def test_three_percent_are_found(name: str, pairs: int, least: float) -> None:
    for truth, verdict in ((1.03, "faster"), (1 / 1.03, "slower")):
        found = [measured(NOISES[name], pairs, truth, seed) for seed in range(TRIALS)]
        assert sum(holds(one, truth) for one in found) / TRIALS >= 0.95
        assert sum(one.verdict == verdict for one in found) / TRIALS >= least


def test_a_constant_drift_cancels() -> None:
    speeds = [math.exp(0.01 * number) for number in range(8)]
    a = [speed for speed, letter in zip(speeds, order(4), strict=True) if letter == "A"]
    b = [speed for speed, letter in zip(speeds, order(4), strict=True) if letter == "B"]
    assert ratio(a, b).median == pytest.approx(1.0)


def test_few_pairs_tell_nothing() -> None:
    for number in range(1, ENOUGH):
        found = ratio([1.0] * number, [1.5] * number)
        assert (found.median, found.low, found.high, found.verdict) == (pytest.approx(1.5), None, None, "too few pairs")
    assert found.says == "not told of 2 pairs: at least 3 are needed"
    with pytest.raises(ValueError, match="0 and 0 passes are no pairs"):
        ratio([], [])


def test_by_hand() -> None:
    """Of three pairs, 2.5 % of resampled medians are the smallest or the largest: the distance is the larger one, times 2.19 x 1.22."""
    logs = [0.0, 0.01, 0.03]
    found = ratio([1.0] * 3, [math.exp(value) for value in logs])
    reach = 0.02 * 4.303 / 1.96 * math.sqrt(1.5)
    assert (found.low, found.median, found.high) == pytest.approx([math.exp(0.01 + sign * reach) for sign in (-1, 0, 1)])
    assert found.verdict == "within noise"
    assert found == ratio([1.0] * 3, [math.exp(value) for value in logs])
    assert found.says == f"no difference larger than the noise (±{math.exp(0.01 + reach) - 1:.1%})"


def test_sentences() -> None:
    assert ratio([1.0] * 4, [1.05] * 4).says == "B is 5.0 % faster (5.0 % to 5.0 %)".replace(" %", "%")
    assert ratio([1.0] * 4, [0.9] * 4).says == "B is 10.0% slower (10.0% to 10.0%)"


def test_order() -> None:
    assert [order(n) for n in (1, 2, 5)] == ["AB", "ABBA", "ABBAABBAAB"]


@pytest.mark.parametrize(("n", "t"), [(3, 4.3027), (8, 2.3646), (31, 2.0423), (32, 2.0395), (101, 1.9840), (512, 1.9646)])
def test_widening_is_by_students_t(n: int, t: float) -> None:
    """Quantiles of its tables; the last of ours and the first of the expansion are neighbours."""
    assert widening(n) == pytest.approx(t / 1.96 * math.sqrt(n / (n - 1)), rel=0.002)


def test_widening_of_too_few() -> None:
    with pytest.raises(ValueError, match="no interval of 2 samples; at least 3"):
        widening(LEAST - 1)
