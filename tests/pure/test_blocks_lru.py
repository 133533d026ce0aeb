"""Eviction is that of an ideal LRU cache of blocks: the same multi-turn trace finds the same tokens."""

from __future__ import annotations

from random import Random

import pytest

from anchortp.engine.api import EngineRequest, SampledToken, SamplingParams
from anchortp.engine.blocks import BlockPool
from anchortp.engine.scheduler import Scheduler

BLOCK_SIZE = 4
ANSWER = 7  # tokens


class IdealLRU:
    """A cache of `capacity` block contents, known by their whole prefix of tokens; it has no block ids.

    Whoever runs keeps what it uses, and room for what it is about to write.
    """

    def __init__(self, capacity):
        self.capacity = capacity
        self.last_use = {}
        self.in_use = []  # prefixes, once for each user
        self.num_private = 0
        self.clock = 0
        self.num_hit_tokens = 0

    def use(self, prefixes):
        for prefix in reversed(prefixes):
            self.clock += 1
            self.last_use[prefix] = self.clock

    def make_room(self, num_blocks):
        self.num_private += num_blocks
        while len(self.last_use) + self.num_private > self.capacity:
            idle = set(self.last_use) - set(self.in_use)
            del self.last_use[min(idle, key=self.last_use.get)]


class IdealRun:
    def __init__(self, cache, token_ids):
        self.cache = cache
        self.shared = []
        for prefix in prefixes_of(token_ids[:-1]):
            if prefix not in cache.last_use:
                break
            self.shared.append(prefix)
        cache.num_hit_tokens += len(self.shared) * BLOCK_SIZE
        cache.in_use += self.shared
        cache.use(self.shared)
        self.num_private = 0
        self.grow(token_ids)

    def grow(self, token_ids):
        more = -(-len(token_ids) // BLOCK_SIZE) - len(self.shared) - self.num_private
        self.num_private += more
        self.cache.make_room(more)

    def computed(self, token_ids):
        """What it wrote is known now; where somebody wrote the same, one of the two is enough."""
        full = prefixes_of(token_ids)[len(self.shared) :]
        self.num_private -= len(full)
        self.cache.num_private -= len(full)
        self.shared += full
        self.cache.in_use += full
        self.cache.use(full)

    def end(self):
        for prefix in self.shared:
            self.cache.in_use.remove(prefix)
        self.cache.num_private -= self.num_private
        self.cache.use(self.shared)


def prefixes_of(token_ids):
    return [tuple(token_ids[:stop]) for stop in range(BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE)]


class Trace:
    """Conversations of several turns, chosen by popularity, all under one system prompt.

    The scheduler decides who runs when; the ideal cache is told, and nothing else.
    """

    def __init__(self, seed, *, num_blocks, num_sessions, num_side_by_side):
        self.rng = Random(seed)
        system = [self.rng.randrange(100) for _ in range(11)]
        self.sessions = [list(system) for _ in range(num_sessions)]
        self.num_side_by_side = num_side_by_side
        self.scheduler = Scheduler(
            BlockPool(num_blocks, BLOCK_SIZE),
            max_num_seqs=8,
            max_batch_tokens=1000,
            max_model_len=1000,
            max_waiting=8,
        )
        self.ideal = IdealLRU(num_blocks)
        self.runs = {}
        self.talking = {}
        self.last_prompts = {}

    def run(self, num_turns):
        for turn in range(num_turns):
            while len(self.talking) >= self.num_side_by_side:
                self.step()
            self.speak(f"turn {turn}")
        while self.scheduler.has_work():
            self.step()
        assert self.scheduler.num_preempted == 0
        assert self.ideal.num_private == 0 and not self.ideal.in_use

    def speak(self, request_id):
        quiet = [i for i in range(len(self.sessions)) if i not in self.talking.values()]
        index = self.rng.choices(quiet, [1 / (i + 1) for i in quiet])[0]
        if self.rng.random() < 0.2 and index in self.last_prompts:
            self.sessions[index] = list(self.last_prompts[index])  # the same again, for another answer
        else:
            if len(self.sessions[index]) > 120:
                self.sessions[index] = self.sessions[index][:11]  # a new conversation
            self.sessions[index] += [self.rng.randrange(100) for _ in range(self.rng.randint(1, 9))]
        self.last_prompts[index] = tuple(self.sessions[index])
        self.talking[request_id] = index
        params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        prompt = tuple(self.sessions[index])
        self.scheduler.add(EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params))

    def step(self):
        batch = self.scheduler.schedule()
        for seq in sorted(batch.seqs, key=lambda seq: int(seq.request_id.split()[1])):
            token_ids = self.sessions[self.talking[seq.request_id]]
            if seq.request_id in self.runs:
                self.runs[seq.request_id].grow(token_ids)
            else:
                self.runs[seq.request_id] = IdealRun(self.ideal, token_ids)
        sampled = {}
        for seq in batch.seqs:
            token_id = self.rng.randrange(100)
            sampled[seq.request_id] = SampledToken(token_id=token_id)
            token_ids = self.sessions[self.talking[seq.request_id]]
            self.runs[seq.request_id].computed(token_ids)
            token_ids.append(token_id)
            if seq.position - len(self.scheduler._find(seq.request_id).request.prompt_token_ids) == ANSWER - 1:
                self.runs.pop(seq.request_id).end()
                del self.talking[seq.request_id]
        self.scheduler.postprocess(batch, sampled, ())


@pytest.mark.parametrize("num_side_by_side", [1, 3])
@pytest.mark.parametrize("num_blocks", [110, 160, 240])
@pytest.mark.parametrize("seed", range(3))
def test_the_pool_finds_what_an_ideal_lru_cache_finds(seed, num_blocks, num_side_by_side):
    trace = Trace(seed, num_blocks=num_blocks, num_sessions=20, num_side_by_side=num_side_by_side)
    trace.run(150)
    pool = trace.scheduler.pool
    assert pool.num_hit_tokens == trace.ideal.num_hit_tokens
    assert pool.num_cached == len(trace.ideal.last_use)
    # Neither finds all nor nothing: the cache is about half of what the sessions hold.
    assert pool.num_evicted_blocks > 100 and 0.2 < pool.num_hit_tokens / pool.num_queried_tokens < 0.95
