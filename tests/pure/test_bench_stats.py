"""The measures of the benchmarks on synthetic curves, where what they must say is known."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp.bench import measures, stats
from anchortp.bench.client import Attempt
from anchortp.bench.faults import Fault, Struck
from anchortp.bench.load import Sent


def steady(start_s, stop_s, rate, batch=1):
    """`rate` tokens per second in [start_s, stop_s), `batch` of them at a time."""
    every_s = batch / rate
    count = math.ceil((stop_s - start_s) / every_s - 1e-9)
    return [(start_s + i * every_s, batch) for i in range(count)]


def ramp(start_s, stop_s, rate):
    """From 0 to `rate` tokens per second, in a line: the n-th token comes when the area under the line is n."""
    seconds = stop_s - start_s
    total = int(rate * seconds / 2)
    return [(start_s + seconds * math.sqrt(n / total), 1) for n in range(1, total + 1)]


# ---------------------------------------------------------------------------------------------- outage and TFS


@pytest.mark.parametrize("down_s", [0.3, 4.0, 45.0])
def test_the_outage_is_the_silence_after_the_fault(down_s):
    curve = steady(0, 100, 50) + steady(100 + down_s, 200, 50)
    found = stats.outage(curve, 99.995)
    assert found.ended_s == pytest.approx(100 + down_s)
    assert found.began_s == pytest.approx(100, abs=0.03)


def test_tokens_that_were_on_their_way_are_no_success():
    """Steps of 100 ms; the fault strikes in one whose tokens still arrive, and those of the step before straggle."""
    curve = [*steady(0, 10, 160, batch=16), (10.03, 5), (10.06, 2), *steady(12, 20, 160, batch=16)]
    assert stats.outage(curve, 10.01).ended_s == 12


def test_a_later_and_longer_silence_is_another_matter():
    """After the recovery long prefills make longer pauses than the outage was."""
    curve = steady(0, 10, 100) + steady(10.4, 14, 100) + steady(16, 20, 100)
    assert stats.outage(curve, 10.0).ended_s == pytest.approx(10.4)


def test_no_token_after_the_fault():
    assert stats.outage(steady(0, 10, 100), 10.5).ended_s is None
    assert stats.outage([], 1.0).ended_s is None
    straggler = [*steady(0, 10, 10), (10.05, 1)]
    assert stats.outage(straggler, 9.95).ended_s is None


def test_a_system_that_does_not_notice_has_the_silence_of_one_step():
    curve = steady(0, 20, 160, batch=16)
    assert 0 < stats.outage(curve, 10.02).ended_s - 10.02 <= 0.2


@given(st.floats(0.05, 60), st.floats(0.01, 0.2), st.integers(1, 32), st.integers(0, 10_000))
def test_tfs_of_any_outage_longer_than_a_few_steps(down_s, step_s, batch, seed):
    """With steps that jitter by 20 %."""
    if down_s < 3 * step_s:
        down_s = 3 * step_s
    rng = random.Random(seed)
    times, at_s = [], 0.0
    while at_s < 5:
        times.append(at_s)
        at_s += step_s * rng.uniform(0.8, 1.2)
    fault_s = times[-1] + 0.5 * step_s
    again_s = fault_s + down_s
    after = [again_s + i * step_s for i in range(20)]
    curve = [(t, batch) for t in (*times, *after)]
    assert stats.outage(curve, fault_s).ended_s == pytest.approx(again_s)


# ------------------------------------------------------------------------------------------------ peak and TTP


def test_at_once_at_the_peak():
    found = stats.peak(steady(10, 60, 200), 10, 60)
    assert found.at_s == 10 and found.tokens_per_s == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize("seconds", [10, 20, 30])
def test_a_ramp_is_at_its_peak_where_the_mean_that_follows_is(seconds):
    """Rate t/T for t < T, then 1: the mean over [t, t + W) is 0.9 at a t that can be worked out: while the window is
    inside of the ramp it is (t + W/2)/T; later 1 - (T - t)^2 / (2 T W)."""
    window = stats.PEAK_WINDOW_S
    curve = ramp(0, seconds, 1000) + steady(seconds, seconds + 30, 1000)
    inside = 0.9 * seconds - window / 2
    expected = inside if inside + window <= seconds else seconds - math.sqrt(0.2 * seconds * window)
    assert stats.peak(curve, 0, seconds + 30).at_s == pytest.approx(expected, abs=3 * stats.PEAK_STEP_S)


def test_a_second_stall_before_the_peak_counts():
    """Two seconds of tokens, six of silence, then for good."""
    curve = steady(0, 2, 100) + steady(8, 60, 100)
    assert stats.peak(curve, 0, 60).at_s == pytest.approx(8 - 0.1 * stats.PEAK_WINDOW_S, abs=3 * stats.PEAK_STEP_S)


def test_a_short_spike_is_no_peak():
    """One second at five times the rate, of a backlog: a mean over the window is what counts."""
    curve = sorted([*steady(0, 60, 100), *steady(30, 31, 400)])
    found = stats.peak(curve, 0, 60)
    assert found.at_s == 0 and found.tokens_per_s == pytest.approx(100, rel=0.02)


def test_noise_does_not_put_the_peak_off():
    """Every second at a rate of its own, around 100: the first windows are as good as any."""
    rng = random.Random(5)
    curve = [delivery for s in range(200) for delivery in steady(s, s + 1, rng.uniform(60, 140))]
    assert stats.peak(curve, 0, 200).at_s < stats.PEAK_WINDOW_S


def test_what_comes_after_the_end_does_not_count():
    curve = steady(0, 20, 100) + steady(20, 40, 300)
    assert stats.peak(curve, 0, 20).tokens_per_s == pytest.approx(100, rel=0.01)
    assert stats.peak(curve, 0, stats.PEAK_WINDOW_S - 0.1) is None


@given(st.floats(1, 40), st.floats(20, 1000))
def test_ttp_of_a_step_in_the_rate(later_s, rate):
    """Half the rate at first, then all of it: the mean is at 90 % when a fifth of the window is still at half."""
    curve = steady(0, later_s, rate / 2) + steady(later_s, later_s + 30, rate)
    found = stats.peak(curve, 0, later_s + 30)
    tolerance_s = 3 * stats.PEAK_STEP_S + 5 / rate
    assert found.at_s == pytest.approx(max(0.0, later_s - 0.2 * stats.PEAK_WINDOW_S), abs=tolerance_s)


# --------------------------------------------------------------------------------------------- small statistics


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_percentile_is_the_smallest_that_enough_are_not_above(values, share):
    found = stats.percentile(values, share)
    enough = [v for v in values if sum(w <= v for w in values) >= share * len(values)]
    assert found == min(enough)


def test_percentile_of_nothing_is_nothing():
    assert stats.percentile([], 0.5) is None
    assert stats.distribution([]) == {"median": None, "p90": None, "p99": None, "max": None, "n": 0}


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 9))), st.floats(0.1, 5))
def test_no_token_is_lost_in_the_curve(deliveries, bin_s):
    deliveries.sort()
    assert sum(stats.histogram(deliveries, 0.0, bin_s)) == sum(count for _, count in deliveries)
    curve = stats.Cumulative(deliveries)
    edges = [0.0, 3.0, 17.5, 51.0]
    assert sum(itertools.starmap(curve.between, itertools.pairwise(edges))) == sum(c for _, c in deliveries)


# ----------------------------------------------------------------------------------------------- measures of a run


def answered(sent_s, times_s, *, said=None, error="", exact=True):
    """An attempt that got one token at each time."""
    return Attempt(
        sent_s=sent_s,
        times_s=list(times_s),
        counts=[1] * len(times_s),
        exact=exact,
        num_said=(len(times_s) if said is None else said) if not error else 0,
        finish_reason=None if error else "length",
        ended_s=times_s[-1] if times_s else sent_s,
        error=error,
    )


def request(*attempts, tokens):
    return Sent(due_s=attempts[0].sent_s, max_tokens=tokens, attempts=list(attempts))


def struck(at_s):
    return Struck(fault=Fault(at=0.5, devices=("cpu:0",)), fault_s=at_s)


def test_a_retry_begins_with_tokens_that_the_client_has():
    first = answered(0, [1, 2, 3], error="gone")
    again = answered(10, [11, 11.1, 11.2, 11.3, 11.4])
    sent = request(first, again, tokens=5)
    assert sent.news_s() == [1, 2, 3, 11.3, 11.4]
    found = measures.measure([sent], [struck(3.5)], 0.0)
    assert found["gap_s"]["max"] == pytest.approx(8.3)
    assert found["requests"] == {"sent": 1, "finished": 1, "failed": 0, "retried": 1}
    assert (found["tokens"]["delivered"], found["tokens"]["thrown_away"]) == (5, 3)
    (fault,) = found["faults"]
    assert fault["tfs_s"] == pytest.approx(7.5), "any token that reaches a client is a success"
    assert fault["streams_hit"]["max"] == pytest.approx(7.8), "but this client waited for a new one"


def test_lost_and_repeated_tokens():
    short = request(answered(0, [1, 2, 3]), tokens=5)
    double = request(answered(0, [1, 2, 3, 4], said=3), tokens=3)
    given_up = request(answered(0, [1], error="gone"), tokens=3)
    found = measures.measure([short, double, given_up], [], 0.0)
    assert (found["tokens"]["lost"], found["tokens"]["repeated"]) == (2, 1)
    assert found["requests"]["failed"] == 1
    blind = measures.measure([request(answered(0, [1], exact=False), tokens=3)], [], 0.0)
    assert blind["tokens"]["lost"] is None, "pieces of text are no tokens"


def test_several_faults_have_a_time_each():
    times = [
        *(t for t, _ in steady(0, 10, 10)),
        *(t for t, _ in steady(11, 30, 10)),
        *(t for t, _ in steady(33, 60, 10)),
    ]
    sent = request(answered(0, times), tokens=len(times))
    found = measures.measure([sent], [struck(10.0), struck(30.0)], 0.0)
    assert [fault["tfs_s"] for fault in found["faults"]] == pytest.approx([1, 3], abs=0.2)
    assert found["throughput"]["before"] == pytest.approx(10, rel=0.05)
    assert found["faults"][0]["ttp_s"] == 0


def test_the_load_ends_when_a_batch_is_no_longer_full():
    """40 requests sent at once, done one a second: from the 25th on fewer than 16 are open."""
    sent = [request(answered(0, [1.0 + i]), tokens=1) for i in range(40)]
    assert measures.load_ends_s(sent) == 25
    late = [*sent, request(answered(30, [30.5]), tokens=1)]
    assert measures.load_ends_s(late) == 30


def test_nothing_was_sent():
    found = measures.measure([], [], 0.0)
    assert found["requests"]["sent"] == 0 and found["took_s"] == 0 and found["curve"]["tokens"] == []
