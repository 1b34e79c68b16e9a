"""What Prometheus reads of live switches and of statistics, beside the engine's own metrics on its /metrics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal


class MaskMetrics:
    """The mask in force and its switches.

    `softprune:mask_epoch`; `softprune:mask_switches_total`, by result ("done", "refused"); `softprune:mask_switch_seconds`, from the
    request's last byte to the answer; `softprune:kept_experts`, by MoE layer.
    """

    def __init__(self) -> None:
        # Here and not above: it decides when it is imported whether several processes share a folder of figures.
        from prometheus_client import Counter, Gauge, Histogram

        self._epoch = Gauge("softprune:mask_epoch", "Mask switches since the start.", multiprocess_mode="mostrecent")
        self._kept = Gauge("softprune:kept_experts", "Experts kept, by MoE layer.", ["layer"], multiprocess_mode="mostrecent")
        self._switches = Counter("softprune:mask_switches_total", "Live mask switches.", ["result"])
        buckets = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)
        self._seconds = Histogram("softprune:mask_switch_seconds", "Time of a live mask switch.", buckets=buckets)
        self.in_force(0, [])

    def in_force(self, epoch: int, num_kept: Sequence[int]) -> None:
        """A mask with so many experts kept in each MoE layer is in force."""
        self._epoch.set(epoch)
        for layer, count in enumerate(num_kept):
            self._kept.labels(layer=str(layer)).set(count)

    def switched(self, seconds: float) -> None:
        """A switch took effect."""
        self._switches.labels(result="done").inc()
        self._seconds.observe(seconds)

    def refused(self) -> None:
        """A switch was refused; the old mask stays."""
        self._switches.labels(result="refused").inc()


@functools.cache
def mask_metrics() -> MaskMetrics:
    """The one set of this process."""
    return MaskMetrics()


class StatsMetrics:
    """What statistics have counted since they were last reset, under all masks together.

    `softprune:stats_tokens`, by tag and phase ("prefill", "decode", "cached"): at most 3 x `--softprune-max-tags` series, none by layer or
    expert; `softprune:stats_collecting`, 1 or 0; `softprune:stats_missed_tokens`, of steps that could not be counted. Gauges, since a
    reset sets them back, and a process that does not count cannot add to counters.
    """

    def __init__(self) -> None:
        from prometheus_client import Gauge  # here, as above

        mode: Literal["mostrecent"] = "mostrecent"
        self._tokens = Gauge("softprune:stats_tokens", "Tokens counted, by tag and phase.", ["tag", "phase"], multiprocess_mode=mode)
        self._collecting = Gauge("softprune:stats_collecting", "Whether statistics are being collected.", multiprocess_mode=mode)
        self._missed = Gauge("softprune:stats_missed_tokens", "Tokens of steps that could not be counted.", multiprocess_mode=mode)

    def counted(self, state: dict[str, Any]) -> None:
        """Tell what has been counted.

        Args:
            state: a `Collector.status`.
        """
        self._collecting.set(state["collecting"])
        self._missed.set(state["missed_tokens"])
        for tag in state["tags"]:
            under_masks = [one["tokens"][tag] for one in state["masks"] if tag in one["tokens"]]
            for phase in ("prefill", "decode", "cached"):
                self._tokens.labels(tag=tag, phase=phase).set(sum(tokens[phase] for tokens in under_masks))


@functools.cache
def stats_metrics() -> StatsMetrics:
    """The one set of this process."""
    return StatsMetrics()
