"""Who computes when after KV was lost, by simulation: each step takes a while that depends on its tokens.

The policy's promises (`scheduler.py`): the first answer comes early; streams whose KV is whole go on at almost
the pace of before; the last replay is done not much later than with full steps; replays and new requests do
not starve each other.
"""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.engine.api import EngineRequest, SampledToken, SamplingParams
from anchortp.engine.blocks import BlockPool
from anchortp.engine.scheduler import REPLAY_CHUNK_TOKENS, Scheduler

STEP_S = 0.040  # of a step with no token
TOKEN_S = 0.0006
MAX_BATCH_TOKENS = 512
BLOCK_SIZE = 16


def duration_s(num_tokens):
    return STEP_S + TOKEN_S * num_tokens


def full_steps_s(num_tokens):
    """How long so many tokens take at the best, in steps as large as they may be."""
    return num_tokens / MAX_BATCH_TOKENS * STEP_S + num_tokens * TOKEN_S


class Clock:
    """Runs a scheduler and notes when each request speaks."""

    def __init__(self, *, replay_chunk_tokens=REPLAY_CHUNK_TOKENS, max_num_seqs=32):
        self.scheduler = Scheduler(
            BlockPool(4096, BLOCK_SIZE),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_model_len=8192,
            max_waiting=1000,
            replay_chunk_tokens=replay_chunk_tokens,
        )
        self.now_s = 0.0
        self.spoken_s = {}
        self.asked_s = {}
        self.num_asked = 0

    def ask(self, name, num_tokens, *, max_tokens=100_000):
        first = 10_000 * self.num_asked  # nobody's prefix is another's
        self.num_asked += 1
        prompt = tuple(range(first, first + num_tokens))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
        self.asked_s[name] = self.now_s
        self.spoken_s[name] = []

    def step(self):
        batch = self.scheduler.schedule()
        self.now_s += duration_s(batch.num_tokens)
        sampled = {seq.request_id: SampledToken(token_id=1) for seq in batch.seqs if seq.sample}
        self.scheduler.postprocess(batch, sampled, ())
        self.scheduler.validate()
        for name in sampled:
            self.spoken_s[name].append(self.now_s)
        return batch

    def until(self, is_done, *, max_steps=2000):
        for _ in range(max_steps):
            if is_done():
                return
            self.step()
        raise AssertionError("it does not come to pass")

    def start(self, lengths):
        for name, length in lengths.items():
            self.ask(name, length)
        self.until(lambda: all(self.spoken_s[name] for name in lengths))

    def lose(self, names):
        """These lose all they have, everybody else nothing. What was spoken until now is forgotten."""
        whole = {
            block_id for name, seq in self.scheduler._running.items() if name not in names for block_id in seq.block_ids
        }
        self.scheduler.on_kv_lost(whole)
        self.recover()

    def recover(self):
        self.scheduler.on_recovered()
        self.now_s = 0.0
        self.spoken_s = {name: [] for name in self.spoken_s}

    def first_s(self, name):
        return self.spoken_s[name][0]

    def worst_gap_s(self, name):
        times = [0.0, *self.spoken_s[name]]
        return max(later - earlier for earlier, later in pairwise(times))


def lengths(count, num_tokens, prefix="stream"):
    return {f"{prefix} {i}": num_tokens for i in range(count)}


def spoke(clock, names):
    return lambda: all(clock.spoken_s[name] for name in names)


def test_streams_whose_kv_is_whole_go_on_while_others_replay():
    whole, lost = lengths(6, 1000, "whole"), lengths(10, 1000, "lost")
    clock = Clock()
    clock.start(whole | lost)
    clock.lose(lost)
    clock.until(spoke(clock, lost))
    # Three times a bare step and no more, whatever the others have to replay.
    assert all(clock.worst_gap_s(name) <= 3.25 * STEP_S for name in whole)
    # They answer one after the other, the first as soon as its own tokens can be computed.
    times = sorted(clock.first_s(name) for name in lost)
    assert times[0] <= 1.5 * full_steps_s(1000)
    assert all(times[i] <= 1.5 * full_steps_s(1000) * (i + 1) for i in range(10))


def test_who_was_speaking_speaks_again_before_newcomers_are_let_in():
    streams = lengths(8, 200)
    clock = Clock()
    clock.start(streams)
    clock.ask("half read", 5000)
    clock.step()
    clock.ask("newcomer", 400)
    clock.recover()
    batch = clock.step()
    assert {seq.request_id for seq in batch.seqs} == set(streams) and clock.now_s == duration_s(8)
    assert clock.step().num_tokens == MAX_BATCH_TOKENS
    clock.until(spoke(clock, ["half read", "newcomer"]))


def test_nobody_waits_for_a_step_where_nobody_speaks():
    clock = Clock()
    clock.ask("newcomer", 400)
    clock.recover()
    clock.step()
    assert clock.first_s("newcomer") == duration_s(400)


def test_without_the_policy_they_would_wait():
    """A test of the test: with full steps the same streams stand still for a third of a second, time and again."""
    whole, lost = lengths(6, 1000, "whole"), lengths(10, 1000, "lost")
    clock = Clock(replay_chunk_tokens=MAX_BATCH_TOKENS)
    clock.start(whole | lost)
    clock.lose(lost)
    clock.until(spoke(clock, lost))
    assert all(clock.worst_gap_s(name) > 8 * STEP_S for name in whole)


def test_when_all_is_lost_the_shortest_answers_first_and_the_last_not_much_later_than_with_full_steps():
    streams = {f"stream {i}": 100 + 60 * (i * 7 % 16) for i in range(16)}
    clock = Clock()
    clock.start(streams)
    clock.lose(streams)
    num_tokens = clock.scheduler.num_tokens_to_replay
    clock.until(spoke(clock, streams))
    assert sorted(streams, key=streams.get) == sorted(streams, key=clock.first_s)
    assert clock.first_s("stream 0") <= 1.1 * duration_s(110)
    assert max(map(clock.first_s, streams)) <= 1.5 * full_steps_s(num_tokens)
    assert clock.scheduler.num_replayed_tokens == num_tokens and clock.scheduler.num_tokens_to_replay == 0


def test_what_replays_do_not_need_goes_to_prefills():
    clock = Clock()
    clock.start({"whole": 1000, "lost": 20})
    clock.lose({"lost"})
    clock.ask("new", 1000)
    assert [seq.request_id for seq in clock.step().seqs] == ["whole"]
    batch = clock.step()
    assert {seq.request_id: len(seq.token_ids) for seq in batch.seqs} == {"whole": 1, "lost": 21, "new": 107}
    assert clock.step().num_tokens == MAX_BATCH_TOKENS


def test_while_nobody_speaks_steps_double():
    clock = Clock()
    clock.start({"one": 4000, "another": 4001})
    clock.lose({"one", "another"})
    clock.scheduler._slow_start = 64  # as if a short one had been lost too, and was aborted since
    assert [clock.step().num_tokens for _ in range(5)] == [64, 128, 256, 512, 512]


def test_what_a_mirror_leaves_to_replay_is_done_in_a_few_steps():
    streams = lengths(16, 1000)
    clock = Clock()
    clock.start(streams)
    running = clock.scheduler._running
    clock.scheduler.on_kv_lost({block_id for seq in running.values() for block_id in seq.block_ids[:-2]})
    clock.scheduler.on_recovered()
    assert 16 * 16 <= clock.scheduler.num_tokens_to_replay <= 16 * 32
    clock.now_s, clock.spoken_s = 0.0, {name: [] for name in streams}
    clock.until(spoke(clock, streams))
    assert min(map(clock.first_s, streams)) <= 3 * STEP_S
    assert all(clock.worst_gap_s(name) <= 0.6 for name in streams)


def test_who_asks_during_replays_is_served_soon():
    whole, lost = lengths(2, 1000, "whole"), lengths(10, 3000, "lost")
    clock = Clock()
    clock.start(whole | lost)
    clock.lose(lost)
    for number in range(4):
        clock.ask(f"new {number}", 100)
    clock.until(spoke(clock, [f"new {number}" for number in range(4)]))
    # A quarter of each step is theirs: 400 tokens at 32 a step, while 30,000 are being replayed.
    assert clock.now_s <= 14 * duration_s(REPLAY_CHUNK_TOKENS + 6)
    assert clock.scheduler.num_tokens_to_replay > 25_000
    assert all(clock.worst_gap_s(name) <= 3.25 * STEP_S for name in whole)


def test_a_flood_of_newcomers_leaves_replays_three_quarters_of_every_step():
    whole, lost = lengths(2, 1000, "whole"), lengths(4, 2000, "lost")
    clock = Clock(max_num_seqs=20)
    clock.start(whole | lost)
    clock.lose(lost)
    num_tokens, num_steps = clock.scheduler.num_tokens_to_replay, 0
    while not spoke(clock, lost)():
        while clock.scheduler.num_waiting < 3:
            clock.ask(f"new {clock.num_asked}", 30, max_tokens=2)
        clock.step()
        num_steps += 1
    assert num_steps <= num_tokens / (0.75 * REPLAY_CHUNK_TOKENS) + len(lost)
    served = [name for name, times in clock.spoken_s.items() if name.startswith("new") and times]
    assert len(served) >= 0.9 * num_steps * REPLAY_CHUNK_TOKENS / 4 / 30
    waits = [clock.first_s(name) - clock.asked_s[name] for name in served]
    assert max(waits) <= 5 * duration_s(REPLAY_CHUNK_TOKENS + 20)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=8),
    newcomers=st.lists(st.integers(1, 300), max_size=6),
    replay_chunk_tokens=st.integers(4, 200),
)
def test_everybody_speaks_in_bounded_time_whatever_is_lost(num_tokens, newcomers, replay_chunk_tokens):
    clock = Clock(replay_chunk_tokens=replay_chunk_tokens)
    streams = {f"stream {i}": length for i, (length, _) in enumerate(num_tokens)}
    clock.start(streams)
    clock.lose({f"stream {i}" for i, (_, is_lost) in enumerate(num_tokens) if is_lost})
    for i, length in enumerate(newcomers):
        clock.ask(f"new {i}", length)
    due = clock.scheduler.num_tokens_to_replay + sum(newcomers)
    names = [*streams, *(f"new {i}" for i in range(len(newcomers)))]
    # No step but the last of a sequence leaves anything of the budget unused while there is work.
    clock.until(spoke(clock, names), max_steps=due // replay_chunk_tokens + len(names) + 8)
    largest_step = duration_s(replay_chunk_tokens + len(names))
    for i, (_, is_lost) in enumerate(num_tokens):
        if not is_lost and clock.scheduler.num_replayed_tokens and not newcomers:
            assert clock.worst_gap_s(f"stream {i}") <= largest_step
