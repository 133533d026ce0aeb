"""BlockPool against a slow model that keeps nothing but a list of facts per block."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp.engine.blocks import BlockPool, extend_block_hashes
from anchortp.engine.kv_index import KVIndex

BLOCK_SIZE = 4
MAX_BLOCKS = 16
INDEX_KIND = {"num_blocks": MAX_BLOCKS, "block_size": BLOCK_SIZE, "model": b"a model"}


def hashes_of(token_ids, block_size=BLOCK_SIZE):
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size)
    return hashes


def hash_of(prefix):
    return hashes_of(list(prefix))[-1]


@dataclass
class Fact:
    num_holders: int = 0
    prefix: tuple[int, ...] | None = None  # the whole token prefix that the block ends, where registered
    freed_at: int = -1


class SlowPool:
    """The same promises, by search through all blocks. Prefixes are compared as tokens, not as hashes."""

    def __init__(self, num_blocks):
        self.facts = {i: Fact() for i in range(num_blocks)}
        self.num_blocks = num_blocks
        self.clock = 0
        self.num_evicted = 0
        self.fresh = []  # to be mirrored

    def free_ids(self):
        return [i for i, fact in self.facts.items() if fact.num_holders == 0]

    def registered(self):
        return {i: fact.prefix for i, fact in self.facts.items() if fact.prefix is not None}

    def lru(self):
        """Free cached blocks, next to go first."""
        return sorted(set(self.free_ids()) & set(self.registered()), key=lambda i: self.facts[i].freed_at)

    def match(self, token_ids):
        hit = []
        for stop in range(BLOCK_SIZE, len(token_ids), BLOCK_SIZE):
            found = [i for i, prefix in self.registered().items() if prefix == tuple(token_ids[:stop])]
            if not found:
                break
            hit += found
        return hit

    def allocate(self, num_blocks, hit):
        table = list(hit)
        for i in hit:
            self.facts[i].num_holders += 1
        for _ in range(num_blocks - len(hit)):
            # Blank ones by id, then cached ones by the time at which they were freed.
            i = min(self.free_ids(), key=lambda i: (self.facts[i].prefix is not None, self.facts[i].freed_at, i))
            self.num_evicted += self.facts[i].prefix is not None
            self.forget(i)
            self.facts[i].num_holders = 1
            table.append(i)
        return table

    def free(self, table):
        for i in reversed(table):
            fact = self.facts[i]
            fact.num_holders -= 1
            self.clock += 1
            if fact.num_holders == 0:
                fact.freed_at = self.clock if fact.prefix is not None else -1

    def register(self, i, prefix):
        for known in (i for i, other in self.registered().items() if other == prefix):
            if known != i:
                self.facts[known].num_holders += 1
                self.free([i])
            return known
        self.facts[i].prefix = prefix
        self.fresh.append(i)
        return i

    def forget(self, i):
        self.facts[i].prefix, self.facts[i].freed_at = None, -1
        self.fresh = [j for j in self.fresh if j != i]

    def keep_only(self, ids):
        for i in set(self.facts) - set(ids):
            self.forget(i)

    def compact(self, num_blocks):
        while sum(fact.num_holders > 0 or fact.prefix is not None for fact in self.facts.values()) > num_blocks:
            self.forget(self.lru()[0])
            self.num_evicted += 1
        moves = []
        for i in sorted(i for i in self.facts if i >= num_blocks):
            fact = self.facts.pop(i)
            if fact.num_holders or fact.prefix is not None:
                to = min(j for j in self.free_ids() if j < num_blocks and self.facts[j].prefix is None)
                self.facts[to] = fact
                self.fresh = [to if j == i else j for j in self.fresh]
                moves.append((i, to))
        self.num_blocks = num_blocks
        return moves

    def restart(self, num_blocks, by_use):
        """Nobody holds anything any more; `by_use` is in which order blocks were used last."""
        lru, known = self.lru(), self.registered()
        assert set(by_use) == set(known) and [i for i in by_use if i in lru] == lru
        self.facts = {i: Fact() for i in range(num_blocks)}
        for i in set(known) & set(self.facts):
            self.facts[i] = Fact(prefix=known[i], freed_at=by_use.index(i))
        self.num_blocks = num_blocks
        self.num_evicted = 0
        self.clock = len(by_use)
        self.fresh = self.lru()

    def grow(self, num_blocks):
        self.facts |= {i: Fact() for i in range(self.num_blocks, num_blocks)}
        self.num_blocks = num_blocks


OPERATIONS = {
    "admit": 30,
    "compute": 30,
    "free": 16,
    "take_sealed": 5,
    "offer": 3,
    "compact": 4,
    "grow": 6,
    "lose_some": 2,
    "lose_everything": 1,
    "restart": 2,
}  # and how often


class History:
    """Random use of a pool, with a persistent index that listens and a memory that keeps the contents.

    `events` counts what happened, so that a test can assert that it did.
    """

    def __init__(self, seed):
        self.rng = Random(seed)
        num_blocks = self.rng.randint(1, MAX_BLOCKS)
        self.index_memory = bytearray(KVIndex.bytes_needed(MAX_BLOCKS))
        self.index = KVIndex.format(self.index_memory, **INDEX_KIND)
        self.index.set_epoch(1)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, on_change=self.index.update)
        self.slow = SlowPool(num_blocks)
        self.memory = {}
        self.holders = []  # (token_ids, table) of those who hold blocks
        self.events = Counter()

    def run(self, num_operations):
        names, weights = zip(*OPERATIONS.items(), strict=True)
        for name in self.rng.choices(names, weights, k=num_operations):
            getattr(self, name)()
            self.agree()
        self.events["evicted"] += self.slow.num_evicted
        for holder in list(self.holders):
            self.release(holder)
        self.pool.validate([])
        assert self.pool.num_free == self.pool.num_blocks

    def prompt(self):
        """Of two tokens, by runs: prefixes collide all the time."""
        runs = self.rng.choices([[0] * 4, [1] * 4, [0, 1, 0, 1], [0], [1, 1]], k=self.rng.randint(1, 5))
        return [token for run in runs for token in run]

    def admit(self):
        token_ids = self.prompt()
        hit = self.pool.match(hashes_of(token_ids), len(token_ids))
        assert hit == self.slow.match(token_ids)
        num_blocks = self.pool.num_blocks_for(len(token_ids))
        fits = num_blocks - len(hit) <= len(set(self.slow.free_ids()) - set(hit))
        assert self.pool.can_allocate(num_blocks, hit) == fits
        if fits:
            table = self.pool.allocate(num_blocks, hit)
            assert table == self.slow.allocate(num_blocks, hit)
            self.memory |= dict.fromkeys(table[len(hit) :], "being written")
            self.holders.append((token_ids, table))
            self.events["found"] += len(hit)

    def compute(self):
        if self.holders:
            token_ids, table = self.rng.choice(self.holders)
            hashes = hashes_of(token_ids)
            for index in range(self.rng.choice([len(hashes), self.rng.randint(0, len(hashes))])):
                prefix = tuple(token_ids[: (index + 1) * BLOCK_SIZE])
                self.memory[table[index]] = prefix
                block_id = self.pool.register(table[index], hashes[index])
                assert block_id == self.slow.register(table[index], prefix)
                self.events["merged"] += block_id != table[index]
                table[index] = block_id

    def free(self):
        if self.holders:
            self.release(self.rng.choice(self.holders))

    def release(self, holder):
        self.pool.free(holder[1])
        self.slow.free(holder[1])
        self.holders = [other for other in self.holders if other is not holder]

    def take_sealed(self):
        max_blocks = self.rng.choice([None, 0, 1, 3])
        num_taken = len(self.slow.fresh) if max_blocks is None else max_blocks
        wanted, self.slow.fresh = self.slow.fresh[:num_taken], self.slow.fresh[num_taken:]
        assert self.pool.take_sealed(max_blocks) == [(i, hash_of(self.slow.facts[i].prefix)) for i in wanted]
        self.events["taken"] += len(wanted)

    def offer(self):
        prefixes = [self.prompt()[:BLOCK_SIZE] for _ in range(3)]
        prefixes = [prefix for prefix in prefixes if len(prefix) == BLOCK_SIZE]
        self.pool.offer(hash_of(prefix) for prefix in prefixes)
        for prefix in prefixes:
            found = [i for i, known in self.slow.registered().items() if known == tuple(prefix)]
            self.slow.fresh += [i for i in found if i not in self.slow.fresh]

    def lose_some(self):
        whole = {i for i in self.slow.facts if self.rng.random() < 0.8}
        self.events["kept"] += len(whole & set(self.slow.registered()))
        self.pool.keep_only(whole)
        self.slow.keep_only(whole)

    def lose_everything(self):
        self.pool.keep_only(())
        self.slow.keep_only(())

    def compact(self):
        num_blocks = self.rng.randint(max(1, self.pool.num_held, self.pool.num_blocks - 4), self.pool.num_blocks)
        moves = self.pool.compact(num_blocks)
        assert moves == self.slow.compact(num_blocks)
        for source, to in self.rng.sample(moves, len(moves)):
            assert source >= num_blocks > to
            self.memory[to] = self.memory.pop(source)
        self.events["moved"] += sum(self.pool.is_cached(to) for _, to in moves)
        for _, table in self.holders:
            table[:] = [dict(moves).get(i, i) for i in table]

    def grow(self):
        num_blocks = min(MAX_BLOCKS, self.pool.num_blocks + 3)
        self.pool.grow(num_blocks)
        self.slow.grow(num_blocks)

    def restart(self):
        """The engine is killed; the next one has the index alone, and perhaps not quite as many blocks."""
        self.index = KVIndex.open(self.index_memory, **INDEX_KIND)
        entries = self.index.entries()
        num_blocks = max(1, self.pool.num_blocks - self.rng.randint(0, 2))
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, on_change=self.index.update)
        self.pool.adopt(entries)
        self.slow.restart(num_blocks, [i for i, _ in entries])
        self.holders = []
        self.events["adopted"] += self.pool.num_cached
        self.events["left behind"] += len(entries) - self.pool.num_cached

    def agree(self):
        self.pool.validate([table for _, table in self.holders])
        registered = self.slow.registered()
        assert self.pool.num_free == len(self.slow.free_ids())
        assert self.pool.num_held == len(self.slow.facts) - len(self.slow.free_ids())
        assert self.pool.num_cached == len(registered)
        assert self.pool.num_evicted_blocks == self.slow.num_evicted
        for i, fact in self.slow.facts.items():
            assert self.pool.is_cached(i) == (fact.prefix is not None)
        sealed, lru = self.pool.sealed(), self.slow.lru()
        assert dict(sealed) == {i: hash_of(prefix) for i, prefix in registered.items()}
        assert [i for i, _ in sealed][: len(lru)] == lru
        assert set(self.pool.occupied()) == {i for i, fact in self.slow.facts.items() if fact.num_holders} | set(lru)
        for most in (0, 1, 5):
            kept = lru[max(0, len(lru) - most) :]
            assert self.pool.occupied(most) == [*kept, *(i for i in self.pool.occupied() if i not in lru)]
        assert all(self.pool.block_of(block_hash) == i for i, block_hash in sealed)
        assert {i: self.memory[i] for i in registered} == registered
        indexed = self.index.entries()
        assert dict(indexed) == dict(sealed)
        assert [i for i, _ in indexed if i in lru] == lru


@pytest.fixture(scope="module")
def events():
    """Of 300 random histories, each of which agreed with the slow model after every operation."""
    total = Counter()
    for seed in range(300):
        history = History(seed)
        history.run(100)
        total += history.events
    return total


@pytest.mark.parametrize(
    "event",
    ["found", "merged", "taken", "kept", "moved", "adopted", "left behind", "evicted"],
)
def test_the_pool_agrees_with_the_slow_model_whatever_happens(events, event):
    assert events[event] >= 40, events


@given(
    a=st.lists(st.integers(0, 2), max_size=24),
    b=st.lists(st.integers(0, 2), max_size=24),
    block_size=st.integers(1, 5),
)
def test_hashes_are_equal_exactly_where_whole_prefixes_are(a, b, block_size):
    for i, (x, y) in enumerate(zip(hashes_of(a, block_size), hashes_of(b, block_size), strict=False), start=1):
        assert (x == y) == (a[: i * block_size] == b[: i * block_size])


@given(token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=24), cut=st.integers(0, 24))
def test_hashes_can_be_extended_as_tokens_come(token_ids, cut):
    hashes = hashes_of(token_ids[:cut])
    extend_block_hashes(hashes, token_ids, BLOCK_SIZE)
    assert hashes == hashes_of(token_ids)


def test_hashes_are_the_same_in_every_process():
    # A literal: a manifest or a peer may hold hashes made by another process, or by another release.
    assert hashes_of([1, 2, 3, 4])[0].hex() == "9f4da9417b58495c47067e73471954a4"


def test_a_sequence_cached_to_its_end_leaves_a_token_to_compute():
    pool = BlockPool(4, BLOCK_SIZE)
    token_ids = list(range(2 * BLOCK_SIZE))
    table = pool.allocate(2)
    for block_id, block_hash in zip(table, hashes_of(token_ids), strict=True):
        pool.register(block_id, block_hash)
    assert pool.match(hashes_of(token_ids), len(token_ids)) == table[:1]
    assert pool.match(hashes_of([*token_ids, 7]), len(token_ids) + 1) == table
    pool.free(table)
    pool.validate([])


def test_the_same_block_in_another_place_is_not_a_hit():
    pool = BlockPool(4, BLOCK_SIZE)
    a, b = [1] * BLOCK_SIZE, [2] * BLOCK_SIZE
    table = pool.allocate(2)
    for block_id, block_hash in zip(table, hashes_of(a + b), strict=True):
        pool.register(block_id, block_hash)
    assert pool.match(hashes_of([*b, 9]), BLOCK_SIZE + 1) == []
    assert pool.match(hashes_of([*b, *b, 9]), 2 * BLOCK_SIZE + 1) == []
    pool.free(table)
    pool.validate([])


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool = BlockPool(3, BLOCK_SIZE)
    token_ids = list(range(3 * BLOCK_SIZE + 1))
    table = pool.allocate(3)
    for block_id, block_hash in zip(table, hashes_of(token_ids), strict=True):
        pool.register(block_id, block_hash)
    pool.free(table)
    other = pool.allocate(1)
    assert other == table[2:] and pool.num_evicted_blocks == 1
    assert pool.match(hashes_of(token_ids), len(token_ids)) == table[:2]
    pool.free(other)
    pool.validate([])


def test_a_reserve_is_left_free():
    pool = BlockPool(4, BLOCK_SIZE)
    assert pool.can_allocate(3, reserve=1)
    assert not pool.can_allocate(3, reserve=2)


@pytest.mark.parametrize(
    "misuse", ["too many", "double free", "foreign contents", "not held", "grow down", "held", "used"]
)
def test_misuse_is_caught(misuse):
    pool = BlockPool(2, BLOCK_SIZE)
    table = pool.allocate(2)
    first, second = hashes_of([1] * BLOCK_SIZE + [2] * BLOCK_SIZE)
    with pytest.raises(AssertionError):
        match misuse:
            case "too many":
                pool.allocate(1)
            case "double free":
                pool.free(table)
                pool.free(table)
            case "foreign contents":
                pool.register(table[0], first)
                pool.register(table[0], second)
            case "not held":
                pool.free(table)
                pool.register(table[0], first)
            case "grow down":
                pool.grow(1)
            case "held":
                pool.compact(1)
            case "used":
                pool.adopt([(0, first)])


@pytest.mark.parametrize("damage", ["lost block", "double block", "hash of nobody", "lost fresh", "foreign table"])
def test_validate_notices(damage):
    pool = BlockPool(3, BLOCK_SIZE)
    table = pool.allocate(1)
    pool.validate([table])
    with pytest.raises(AssertionError):
        match damage:
            case "lost block":
                pool._blank.pop()
                pool.validate()
            case "double block":
                pool._blank.append(table[0])
                pool.validate()
            case "hash of nobody":
                pool._hash_of[table[0]] = b"x"
                pool.validate()
            case "lost fresh":
                pool._fresh[table[0]] = b"x"
                pool.validate()
            case "foreign table":
                pool.validate([table, table])


def test_two_that_compute_the_same_end_up_with_one_block():
    reported = []
    pool = BlockPool(4, BLOCK_SIZE, on_change=lambda block_id, block_hash: reported.append((block_id, block_hash)))
    (block_hash,) = hashes_of([1] * BLOCK_SIZE)
    (first,), (second,) = pool.allocate(1), pool.allocate(1)
    assert pool.register(first, block_hash) == pool.register(second, block_hash) == first
    assert (pool.num_held, pool.num_free) == (1, 3)
    pool.free([first])
    assert pool.num_held == 1
    pool.free([first])
    assert set(reported) == {(first, block_hash)}
    pool.validate([])


def test_a_block_is_reported_gone_before_it_is_handed_out():
    handed_out = []
    events = []

    def on_change(block_id, block_hash):
        assert block_id not in handed_out
        events.append((block_id, block_hash))

    pool = BlockPool(1, BLOCK_SIZE, on_change=on_change)
    (block_hash,) = hashes_of([1] * BLOCK_SIZE)
    table = pool.allocate(1)
    pool.register(table[0], block_hash)
    pool.free(table)
    handed_out += pool.allocate(1)
    assert events == [(0, block_hash), (0, block_hash), (0, None)]


def test_compacting_keeps_what_was_used_last_and_the_order_of_eviction():
    pool = BlockPool(6, BLOCK_SIZE)
    tables = [pool.allocate(1) for _ in range(6)]
    for number, (block_id,) in enumerate(tables):
        pool.register(block_id, hash_of([number] * BLOCK_SIZE))
    for number in (5, 0, 4, 1, 3, 2):
        pool.free(tables[number])
    assert pool.compact(3) == [(3, 0)]
    assert [block_id for block_id, _ in pool.sealed()] == [1, 0, 2]  # used in the order 1, 3, 2
    assert pool.num_evicted_blocks == 3 and pool.block_of(hash_of([3] * BLOCK_SIZE)) == 0
    pool.validate([])


def test_a_successor_evicts_in_the_order_of_use_the_end_of_a_prefix_first():
    index = KVIndex.format(bytearray(KVIndex.bytes_needed(MAX_BLOCKS)), **INDEX_KIND)
    index.set_epoch(1)
    pool = BlockPool(6, BLOCK_SIZE, on_change=index.update)
    hot, cold = hashes_of([1] * 2 * BLOCK_SIZE), hashes_of([2] * 2 * BLOCK_SIZE)
    for hashes in (hot, cold):
        table = pool.allocate(2)
        for block_id, block_hash in zip(table, hashes, strict=True):
            pool.register(block_id, block_hash)
        pool.free(table)
    pool.allocate(2, pool.match(hot, 2 * BLOCK_SIZE + 1))  # still held when the engine is killed
    assert [block_hash for _, block_hash in index.entries()] == [*reversed(cold), *reversed(hot)]
    successor = BlockPool(6, BLOCK_SIZE)
    successor.adopt(index.entries())
    assert successor.allocate(4)[2:] == [3, 2]
    assert successor.match(hot, 2 * BLOCK_SIZE + 1) == [0, 1]


def test_compacting_does_not_make_what_moves_seem_used():
    index = KVIndex.format(bytearray(KVIndex.bytes_needed(MAX_BLOCKS)), **INDEX_KIND)
    index.set_epoch(1)
    pool = BlockPool(4, BLOCK_SIZE, on_change=index.update)
    tables = [pool.allocate(1) for _ in range(4)]
    for number in (3, 0, 1):
        pool.register(tables[number][0], hash_of([number] * BLOCK_SIZE))
        pool.free(tables[number])
    pool.free(tables[2])
    assert pool.compact(3) == [(3, 2)]
    assert index.entries() == pool.sealed() and [block_id for block_id, _ in pool.sealed()] == [2, 0, 1]


def test_what_a_smaller_successor_cannot_adopt_is_reported_gone():
    reported = []
    pool = BlockPool(2, BLOCK_SIZE, on_change=lambda *change: reported.append(change))
    first, second = hashes_of([1] * 2 * BLOCK_SIZE)
    pool.adopt([(2, second), (1, first)])
    assert reported == [(2, None), (1, first)]
    assert pool.sealed() == pool.take_sealed() == [(1, first)]
    pool.validate([])
