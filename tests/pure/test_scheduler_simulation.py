"""Random histories: arrivals, aborts, full caches, cut-off batches, lost KV, memory that shrinks and grows.

The fake worker keeps a KV memory of its own, by block and slot, and derives every token from what it reads
there and from nothing else. So a wrong table, a false prefix hit, a block shared too early or a replay that
leaves a gap shows as a wrong token. The oracle derives the tokens from the request alone.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.engine.api import EngineRequest, SampledToken, SamplingParams
from anchortp.engine.blocks import BlockPool
from anchortp.engine.scheduler import Scheduler
from anchortp.errors import EngineFull

VOCAB = 40
EOS = frozenset({0})
MASK = (1 << 61) - 1
ROOT = 12345


def mix(state, value):
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & MASK
    return state ^ (state >> 29)


def next_token(kv_entries):
    """The model: every position's KV counts, as in attention."""
    state = ROOT
    for entry in kv_entries:
        state = mix(state, entry)
    return state % VOCAB


class FakeWorker:
    def __init__(self, scheduler, rng):
        self.pool = scheduler.pool
        self.rng = rng
        self.memory: dict[tuple[int, int], int] = {}

    def slot(self, entry, position):
        return entry.block_ids[position // self.pool.block_size], position % self.pool.block_size

    def run(self, batch, *, cut_off=False):
        """Computes the entries in any order; a batch that is cut off has written any part of its KV."""
        written = Counter()
        sampled = {}
        for entry in self.rng.sample(batch.seqs, len(batch.seqs)):
            positions = range(entry.start, entry.position)
            written.update({self.slot(entry, p)[0] for p in positions})
            if cut_off:
                positions = range(entry.start, self.rng.randint(entry.start, entry.position))
            self.compute(entry, positions)
            if entry.sample and not cut_off:
                seen = [self.memory[self.slot(entry, p)] for p in range(entry.position)]
                sampled[entry.request_id] = SampledToken(token_id=next_token(seen))
        assert all(count == 1 for count in written.values()), "two entries write to one block"
        assert not any(self.pool.is_cached(block) for block in written), "shared contents are written over"
        return sampled

    def compute(self, entry, positions):
        for p in positions:
            before = self.memory[self.slot(entry, p - 1)] if p else ROOT
            self.memory[self.slot(entry, p)] = mix(before, entry.token_ids[p - entry.start])

    def lose_all_but(self, whole):
        for slot in self.memory:
            if slot[0] not in whole:
                self.memory[slot] = self.rng.getrandbits(60)

    def move(self, moves):
        """In any order. A block has what was written to it, which may be less than all its slots."""
        for source, to in self.rng.sample(moves, len(moves)):
            for offset in range(self.pool.block_size):
                self.memory.pop((to, offset), None)
                if (source, offset) in self.memory:
                    self.memory[to, offset] = self.memory[source, offset]

    def give_back(self, num_blocks):
        self.memory = {slot: value for slot, value in self.memory.items() if slot[0] < num_blocks}


def oracle(request, max_model_len):
    tokens, kv, out = list(request.prompt_token_ids), [], []
    while True:
        for token in tokens[len(kv) :]:
            kv.append(mix(kv[-1] if kv else ROOT, token))
        token = next_token(kv)
        tokens.append(token)
        out.append(token)
        if token in request.params.stop_token_ids or (token in EOS and not request.params.ignore_eos):
            return out, "stop"
        if len(out) == request.params.max_tokens or len(tokens) == max_model_len:
            return out, "length"


class Simulation:
    """One random history. `events` counts what happened, so that a test can assert that it did."""

    def __init__(self, rng, *, num_blocks, block_size, max_num_seqs, max_batch_tokens):
        self.rng = rng
        self.num_blocks = num_blocks
        self.scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_model_len=48,
            max_waiting=6,
        )
        self.worker = FakeWorker(self.scheduler, rng)
        self.events = Counter()
        self.requests: dict[str, EngineRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.prefixes = [[rng.randrange(3) for _ in range(rng.randint(4, 20))] for _ in range(3)]

    def arrive(self):
        rng = self.rng
        prefix = rng.choice(self.prefixes)[: rng.randint(1, 20)]
        prompt = [*prefix, *(rng.randrange(3) for _ in range(rng.randint(0, 8)))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 16),
            stop_token_ids=(rng.randrange(VOCAB),),
            ignore_eos=rng.random() < 0.3,
        )
        request = EngineRequest(request_id=f"r{len(self.requests)}", prompt_token_ids=tuple(prompt), params=params)
        try:
            self.scheduler.add(request)
        except EngineFull:
            self.events["refused"] += 1
            return
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []

    def abort(self):
        open_ids = [r for r in self.requests if r not in self.reasons]
        if open_ids:
            request_id = self.rng.choice(open_ids)
            self.scheduler.abort(request_id)
            self.reasons[request_id] = "abort"
            self.events["aborted"] += 1

    def lose_kv(self):
        """All of it, or all but what some blocks kept or got back."""
        share = self.rng.choice([0.0, 0.5, 0.9])
        whole = {block_id for block_id in range(self.num_blocks) if self.rng.random() < share}
        computed = sum(seq.num_computed_tokens for seq in self.scheduler._running.values())
        self.worker.lose_all_but(whole)
        self.scheduler.on_kv_lost(whole)
        kept = sum(seq.num_computed_tokens for seq in self.scheduler._running.values())
        self.events["tokens kept"] += kept
        assert kept + self.scheduler.num_tokens_to_replay >= computed
        self.events["replayed"] += self.scheduler.num_running

    def resize(self):
        """Whether the batch in flight is still valid."""
        before, num_before = self.scheduler.num_preempted, self.scheduler.pool.num_blocks
        num_blocks = self.rng.randint(max(1, self.num_blocks // 2), self.num_blocks)
        moves = self.scheduler.resize(num_blocks)
        self.worker.move(moves)
        self.worker.give_back(num_blocks)
        self.events["moved"] += len(moves)
        self.events["preempted by shrinking"] += self.scheduler.num_preempted - before
        return num_blocks >= num_before

    def deliver(self, outputs):
        for output in outputs:
            assert output.request_id not in self.reasons, "something came after the end"
            self.tokens[output.request_id] += [token.token_id for token in output.tokens]
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason

    def deliver_failures(self):
        for failure in self.scheduler.take_failures():
            request = self.requests[failure.request_id]
            num_tokens = len(request.prompt_token_ids) + len(self.tokens[failure.request_id])
            pool = self.scheduler.pool
            assert num_tokens > pool.num_blocks * pool.block_size, "it would have fitted"
            self.deliver([failure])
            self.events["failed"] += 1

    def step(self, *, faults):
        batch = self.scheduler.schedule()
        self.scheduler.validate()
        self.deliver_failures()
        if batch is None:
            return
        assert 0 < batch.num_tokens <= self.scheduler.max_batch_tokens
        event = self.rng.random() if faults else 1.0
        if event < 0.08:
            self.worker.run(batch, cut_off=True)
            self.events["cut off"] += 1
            return
        if event < 0.16:
            self.worker.run(batch, cut_off=True)
            self.lose_kv()
            return
        sampled = self.worker.run(batch)
        if event < 0.24:
            self.abort()
        elif event < 0.28 and not self.resize():
            return
        self.deliver(self.scheduler.postprocess(batch, sampled, EOS))
        self.scheduler.validate()

    def run(self, num_steps):
        for _ in range(num_steps):
            for _ in range(self.rng.randint(0, 2)):
                self.arrive()
            if self.rng.random() < 0.05:
                self.resize()
            if self.rng.random() < 0.05:
                self.lose_kv()
            self.step(faults=True)
        self.drain()
        self.check()

    def drain(self):
        # Even one sequence at a time and one token a step, with every preemption replayed, this is plenty.
        for _ in range(5_000):
            if not self.scheduler.has_work():
                break
            self.step(faults=False)
        assert not self.scheduler.has_work(), "somebody starves"

    def check(self):
        scheduler = self.scheduler
        self.events["preempted"] += scheduler.num_preempted
        self.events["tokens replayed"] += scheduler.num_replayed_tokens
        self.events["tokens recomputed"] += scheduler.num_recomputed_tokens
        assert scheduler.num_tokens_to_replay == 0
        self.events["hit"] += scheduler.pool.num_hit_tokens
        self.events["evicted"] += scheduler.pool.num_evicted_blocks
        scheduler.pool.validate([])
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        for request_id, request in self.requests.items():
            tokens, reason = oracle(request, scheduler.max_model_len)
            got = self.tokens[request_id]
            if self.reasons[request_id] in ("abort", "error"):
                assert got == tokens[: len(got)]
            else:
                assert (got, self.reasons[request_id]) == (tokens, reason)
                self.events["finished"] += 1


@settings(max_examples=60, deadline=None)
@given(
    rng=st.randoms(use_true_random=False),
    num_blocks=st.integers(3, 30),
    block_size=st.integers(1, 6),
    max_num_seqs=st.integers(1, 6),
    more_batch_tokens=st.integers(0, 20),
)
def test_tokens_equal_the_oracle_whatever_happens(rng, num_blocks, block_size, max_num_seqs, more_batch_tokens):
    Simulation(
        rng,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_seqs + more_batch_tokens,
    ).run(num_steps=25)


@pytest.fixture(scope="module")
def history():
    """Events of 120 long histories with a cache that is too small; each was checked against the oracle."""
    events = Counter()
    for seed in range(120):
        simulation = Simulation(Random(seed), num_blocks=14, block_size=4, max_num_seqs=5, max_batch_tokens=12)
        simulation.run(num_steps=80)
        events += simulation.events
    return events


@pytest.mark.parametrize(
    "event",
    [
        "finished",
        "preempted",
        "preempted by shrinking",
        "replayed",
        "tokens kept",
        "tokens replayed",
        "tokens recomputed",
        "moved",
        "cut off",
        "aborted",
        "failed",
        "refused",
        "hit",
        "evicted",
    ],
)
def test_the_histories_hold_every_kind_of_event(history, event):
    assert history[event] >= 20, history


def test_the_simulation_notices_a_replay_that_is_left_out():
    """A test of the test: KV that is lost and not recomputed gives wrong tokens."""
    simulation = Simulation(Random(1), num_blocks=40, block_size=4, max_num_seqs=4, max_batch_tokens=32)
    for _ in range(4):
        simulation.arrive()
    simulation.step(faults=False)
    simulation.worker.lose_all_but(())  # and the scheduler is not told
    simulation.drain()
    with pytest.raises(AssertionError):
        simulation.check()
