"""What the measures mean, exactly. Pure: sequences of numbers in, numbers out.

All of it is seen from the clients. `deliveries` are (time in s, tokens) of all streams together, sorted by time.

**Outage.** After a fault tokens that were on their way still arrive, and a healthy system too is silent between two
steps. So the outage is the longest silence (no token for any client) that begins between the fault and the `grace`
after it; the grace is the longest silence in the `HEALTHY_S` before the fault: a step that was under way ends in it.

**TFS**, time to first success: from the fault to the end of the outage. None if no token came after it.

**TTP**, time to peak: from the first success to the first moment from which on the throughput, as a mean over the
`PEAK_WINDOW_S` that follow, is at least `PEAK_SHARE` of the stable peak. The stable peak is the level that such means
reach for a quarter of the time (their 75th percentile) until the next fault, or until the load runs out: the last
request has been sent and fewer are open than systems run at a time. A maximum would be that of the noise. The mean
looks ahead, so that a system which is at its peak at once has a TTP of 0. None if less than one window is left.

**Gap**: between two tokens of one stream, retries included: the client waits for the next token, whoever makes it.
Tokens that arrive together count as one arrival.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HEALTHY_S = 20.0
PEAK_WINDOW_S = 5.0
PEAK_SHARE = 0.9
PEAK_LEVEL = 0.75
PEAK_STEP_S = 0.1

Deliveries = Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """The silence from `began_s` (the last token before it, or the fault) to `ended_s` (the first success)."""

    began_s: float
    ended_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """`tokens_per_s`, reached (as defined above) at `at_s`."""

    at_s: float
    tokens_per_s: float


def outage(deliveries: Deliveries, fault_s: float) -> Outage:
    times = [t for t, _ in deliveries]
    first = bisect.bisect_left(times, fault_s)
    grace_s = longest_silence(times[:first], fault_s - HEALTHY_S)
    begins = [fault_s, *itertools.takewhile(lambda t: t <= fault_s + grace_s, times[first:])]
    best = Outage(began_s=begins[0], ended_s=None)
    longest_s = -1.0
    for offset, began_s in enumerate(begins):
        if first + offset == len(times):  # nothing ever came after it
            return Outage(began_s=began_s, ended_s=None)
        ended_s = times[first + offset]
        if ended_s - began_s > longest_s:
            best, longest_s = Outage(began_s=began_s, ended_s=ended_s), ended_s - began_s
    return best


def longest_silence(times: Sequence[float], since_s: float = -math.inf) -> float:
    """Between two neighbours at or after `since_s`; 0 if there are no two."""
    recent = times[bisect.bisect_left(times, since_s) :]
    return max((b - a for a, b in itertools.pairwise(recent)), default=0.0)


def peak(deliveries: Deliveries, first_success_s: float, end_s: float) -> Peak | None:
    """The stable peak between the first success and `end_s` (the next fault, or the end of the load)."""
    curve = Cumulative(deliveries)
    starts = []
    while (start_s := first_success_s + len(starts) * PEAK_STEP_S) + PEAK_WINDOW_S <= end_s:
        starts.append(start_s)
    rates = [curve.between(start_s, start_s + PEAK_WINDOW_S) / PEAK_WINDOW_S for start_s in starts]
    level = percentile(rates, PEAK_LEVEL)
    if level is None:
        return None
    reached = next(start_s for start_s, rate in zip(starts, rates, strict=True) if rate >= PEAK_SHARE * level)
    return Peak(at_s=reached, tokens_per_s=level)


class Cumulative:
    """Tokens delivered up to a time."""

    def __init__(self, deliveries: Deliveries):
        self._times = [t for t, _ in deliveries]
        self._sums = [0, *itertools.accumulate(count for _, count in deliveries)]

    def between(self, start_s: float, stop_s: float) -> int:
        """Tokens in [start_s, stop_s)."""
        return (
            self._sums[bisect.bisect_left(self._times, stop_s)] - self._sums[bisect.bisect_left(self._times, start_s)]
        )

    def rate(self, start_s: float, stop_s: float) -> float | None:
        """Tokens per second; None for an empty range."""
        return self.between(start_s, stop_s) / (stop_s - start_s) if stop_s > start_s else None


def histogram(deliveries: Deliveries, start_s: float, bin_s: float) -> list[int]:
    """Tokens per bin, from `start_s` to the last delivery."""
    bins: list[int] = []
    for at_s, count in deliveries:
        index = int((at_s - start_s) / bin_s)
        bins += [0] * (index + 1 - len(bins))
        bins[index] += count
    return bins


def gaps(times: Iterable[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all are not above (nearest rank); None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def distribution(values: Sequence[float]) -> dict[str, float | int | None]:
    return {
        "median": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
        "max": max(values, default=None),
        "n": len(values),
    }
