"""From what the clients saw to the figures of a run. The definitions are in `stats`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anchortp.bench import stats
from anchortp.bench.faults import Struck
from anchortp.bench.load import Sent
from anchortp.bench.systems import MAX_NUM_SEQS

CURVE_BIN_S = 0.25


def measure(sent: Sequence[Sent], struck: Sequence[Struck], began_s: float) -> dict[str, Any]:
    """Times in the result are seconds after `began_s`."""
    deliveries = sorted(
        (at_s - began_s, count)
        for request in sent
        for attempt in request.attempts
        for at_s, count in zip(attempt.times_s, attempt.counts, strict=True)
    )
    news = [[at_s - began_s for at_s in request.news_s()] for request in sent]
    return {
        "requests": _requests(sent),
        "tokens": _tokens(sent),
        "gap_s": stats.distribution([gap for times in news for gap in stats.gaps(times)]),
        "first_token_s": stats.distribution(
            [times[0] - (request.due_s - began_s) for request, times in zip(sent, news, strict=True) if times]
        ),
        "faults": _faults(sent, news, struck, deliveries, began_s),
        "throughput": _throughput(deliveries, struck, began_s, load_ends_s(sent) - began_s),
        "curve": {"bin_s": CURVE_BIN_S, "tokens": stats.histogram(deliveries, 0.0, CURVE_BIN_S)},
        "took_s": deliveries[-1][0] if deliveries else 0.0,
    }


def _requests(sent: Sequence[Sent]) -> dict[str, int]:
    """`failed`: never answered in full. `retried`: sent again by the client since an attempt failed."""
    return {
        "sent": len(sent),
        "finished": sum(request.finished for request in sent),
        "failed": sum(not request.finished for request in sent),
        "retried": sum(len(request.attempts) > 1 for request in sent),
    }


def _tokens(sent: Sequence[Sent]) -> dict[str, int | None]:
    """`delivered`: of whole answers. `thrown_away`: arrived in attempts that failed, and had to be made again.
    `lost`, `repeated`: in whole answers, fewer or more arrived than were asked for, or than the server says it made;
    None if a server told no token ids, so that pieces of text stand for tokens.
    """
    whole = [request for request in sent if request.finished]
    differences = [
        request.attempts[-1].num_tokens - max(request.attempts[-1].num_said, request.max_tokens) for request in whole
    ]
    exact = all(request.attempts[-1].exact for request in whole)
    return {
        "delivered": sum(request.attempts[-1].num_tokens for request in whole),
        "thrown_away": sum(a.num_tokens for request in sent for a in request.attempts if not a.finished),
        "lost": sum(-d for d in differences if d < 0) if exact else None,
        "repeated": sum(d for d in differences if d > 0) if exact else None,
        "prompt": sum(request.attempts[-1].num_prompt_tokens for request in whole),
        "cached": sum(request.attempts[-1].num_cached_tokens for request in whole),
    }


def _faults(
    sent: Sequence[Sent],
    news: Sequence[Sequence[float]],
    struck: Sequence[Struck],
    deliveries: stats.Deliveries,
    began_s: float,
) -> list[dict[str, Any]]:
    found = []
    last_s = load_ends_s(sent) - began_s
    for index, event in enumerate(struck):
        fault_s = event.fault_s - began_s
        end_s = struck[index + 1].fault_s - began_s if index + 1 < len(struck) else last_s
        outage = stats.outage(deliveries, fault_s)
        success_s = outage.ended_s
        peak = None if success_s is None else stats.peak(deliveries, success_s, end_s)
        found.append(
            {
                "kind": event.fault.kind,
                "devices": list(event.fault.devices),
                "at_s": fault_s,
                "tfs_s": None if success_s is None else success_s - fault_s,
                "ttp_s": None if peak is None or success_s is None else peak.at_s - success_s,
                "peak_at_s": None if peak is None else peak.at_s,
                "peak_tokens_per_s": None if peak is None else peak.tokens_per_s,
                "streams_hit": _streams_hit(sent, news, event.fault_s, began_s),
            }
        )
    return found


def load_ends_s(sent: Sequence[Sent]) -> float:
    """When the last request has been sent and, for good, fewer than `MAX_NUM_SEQS` are open."""
    if not sent:
        return 0.0
    last_due_s = max(request.due_s for request in sent)
    ends = sorted(request.attempts[-1].ended_s or last_due_s for request in sent if request.attempts)
    return max([last_due_s, *ends[-MAX_NUM_SEQS:][:1]])


def _streams_hit(
    sent: Sequence[Sent], news: Sequence[Sequence[float]], fault_s: float, began_s: float
) -> dict[str, float | int | None]:
    """The requests that were open at the fault: how long each waited for its next new token. A stream whose token
    was on its way shows a short wait, so look at the upper end."""
    waits = []
    for request, times in zip(sent, news, strict=True):
        first, last = request.attempts[0], request.attempts[-1]
        if first.sent_s <= fault_s and (last.ended_s is None or last.ended_s > fault_s):
            waits += [at_s + began_s - fault_s for at_s in times if at_s + began_s > fault_s][:1]
    return stats.distribution(waits)


def _throughput(
    deliveries: stats.Deliveries, struck: Sequence[Struck], began_s: float, end_s: float
) -> dict[str, float | None]:
    """Tokens per second: before the first fault, from it to the first success, and from there until the load runs out.
    Without a fault all of it is `before`."""
    curve = stats.Cumulative(deliveries)
    if not struck:
        return {"before": curve.rate(0.0, end_s), "during": None, "after": None}
    fault_s = struck[0].fault_s - began_s
    success_s = stats.outage(deliveries, fault_s).ended_s
    return {
        "before": curve.rate(0.0, fault_s),
        "during": curve.rate(fault_s, fault_s if success_s is None else success_s),
        "after": None if success_s is None else curve.rate(success_s, end_s),
    }
