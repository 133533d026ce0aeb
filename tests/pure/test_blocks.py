"""BlockPool against a slow model that keeps nothing but a list of facts per block."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from anchortp.engine.blocks import BlockPool, extend_block_hashes

BLOCK_SIZE = 4


def hashes_of(token_ids, block_size=BLOCK_SIZE):
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size)
    return hashes


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

    def free_ids(self):
        return [i for i, fact in self.facts.items() if fact.num_holders == 0]

    def match(self, token_ids):
        hit = []
        for stop in range(BLOCK_SIZE, len(token_ids), BLOCK_SIZE):
            found = [i for i, fact in self.facts.items() if fact.prefix == tuple(token_ids[:stop])]
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
            self.facts[i] = Fact(num_holders=1)
            table.append(i)
        return table

    def free(self, table):
        for i in reversed(table):
            fact = self.facts[i]
            fact.num_holders -= 1
            self.clock += 1
            if fact.num_holders == 0 and i >= self.num_blocks:
                del self.facts[i]
            elif fact.num_holders == 0:
                fact.freed_at = self.clock if fact.prefix is not None else -1

    def register(self, i, prefix):
        known = any(fact.prefix == prefix for fact in self.facts.values())
        if not known and i < self.num_blocks:
            self.facts[i].prefix = prefix

    def invalidate_all(self):
        for fact in self.facts.values():
            fact.prefix, fact.freed_at = None, -1

    def shrink(self, num_blocks):
        for i in [i for i in self.facts if i >= num_blocks]:
            self.facts[i].prefix = None
            if self.facts[i].num_holders == 0:
                del self.facts[i]
        self.num_blocks = num_blocks
        return {i for i in self.facts if i >= num_blocks}

    def grow(self, num_blocks):
        self.facts |= {i: Fact() for i in range(self.num_blocks, num_blocks)}
        self.num_blocks = num_blocks


class PoolMachine(RuleBasedStateMachine):
    held = Bundle("held")  # (token_ids, table) of somebody who holds blocks

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.slow = SlowPool(num_blocks)
        self.tables = []

    # Two token ids and short prompts: prefixes collide all the time.
    @rule(target=held, token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def admit(self, token_ids):
        hit = self.pool.match(hashes_of(token_ids), len(token_ids))
        assert hit == self.slow.match(token_ids)
        num_blocks = self.pool.num_blocks_for(len(token_ids))
        fits = num_blocks - len(hit) <= len(set(self.slow.free_ids()) - set(hit))
        assert self.pool.can_allocate(num_blocks, hit) == fits
        if not fits:
            return multiple()
        table = self.pool.allocate(num_blocks, hit)
        assert table == self.slow.allocate(num_blocks, hit)
        self.tables.append(table)
        return token_ids, table

    @rule(item=held, data=st.data())
    def compute(self, item, data):
        token_ids, table = item
        hashes = hashes_of(token_ids)
        for index in range(data.draw(st.integers(0, len(hashes)))):
            self.pool.register(table[index], hashes[index])
            self.slow.register(table[index], tuple(token_ids[: (index + 1) * BLOCK_SIZE]))

    @rule(item=consumes(held))
    def free(self, item):
        self.release(item[1])

    def release(self, table):
        self.pool.free(table)
        self.slow.free(table)
        self.tables = [other for other in self.tables if other is not table]

    @rule()
    def lose_everything(self):
        self.pool.invalidate_all()
        self.slow.invalidate_all()

    @rule(data=st.data())
    def shrink(self, data):
        num_blocks = data.draw(st.integers(1, self.pool.num_blocks))
        assert self.pool.shrink(num_blocks) == self.slow.shrink(num_blocks)

    @precondition(lambda self: all(i < self.pool.num_blocks for table in self.tables for i in table))
    @rule(more=st.integers(0, 4))
    def grow(self, more):
        num_blocks = self.pool.num_blocks + more
        self.pool.grow(num_blocks)
        self.slow.grow(num_blocks)

    @invariant()
    def agree(self):
        if not hasattr(self, "pool"):
            return
        self.pool.validate(self.tables)
        assert self.pool.num_free == len(self.slow.free_ids())
        assert self.pool.num_held == len(self.slow.facts) - len(self.slow.free_ids())
        assert self.pool.num_cached == sum(fact.prefix is not None for fact in self.slow.facts.values())
        assert self.pool.num_evicted_blocks == self.slow.num_evicted
        for i, fact in self.slow.facts.items():
            assert self.pool.is_cached(i) == (fact.prefix is not None)

    def teardown(self):
        if hasattr(self, "pool"):
            for table in list(self.tables):
                self.release(table)
            self.pool.validate([])
            assert self.pool.num_free == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolAgainstSlowModel = PoolMachine.TestCase


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


@pytest.mark.parametrize("misuse", ["too many", "double free", "foreign contents", "not held", "grow too early"])
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
            case "grow too early":
                pool.shrink(1)
                pool.grow(2)


@pytest.mark.parametrize("damage", ["lost block", "double block", "hash of nobody", "foreign table"])
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
            case "foreign table":
                pool.validate([table, table])
