"""Bookkeeping of the paged KV cache: which block is whose, and what it holds. No tensor, no clock.

A block is `block_size` token positions of every layer and every KV head. One block id is valid on all
devices: each stores the planes of its own KV heads under the same id, so a change of layout changes no table.

Runs in the engine process. One thread at a time.
"""

from __future__ import annotations

import heapq
import struct
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b

_ROOT_HASH = blake2b(b"anchortp kv block v1", digest_size=16).digest()


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Appends to `hashes` those of the full blocks of `token_ids` that it does not cover yet.

    hash[i] = blake2b-128(hash[i - 1] + the tokens of block i as little-endian uint32): equal hashes mean
    equal whole prefixes, not just equal blocks. Stable between processes and machines, unlike `hash()`.
    """
    for i in range(len(hashes), len(token_ids) // block_size):
        parent = hashes[-1] if hashes else _ROOT_HASH
        block = token_ids[i * block_size : (i + 1) * block_size]
        hashes.append(blake2b(parent + struct.pack(f"<{block_size}I", *block), digest_size=16).digest())


class BlockPool:
    """Block ids `[0, num_blocks)`, each in exactly one of three places.

    held    reference count > 0; several sequences may hold a block that is full and cached
    cached  free, but its contents are known by hash and can be taken again; least recently freed goes first
    blank   free, contents meaningless; lowest id goes first, so that high pages stay uncommitted and a later
            shrink finds them empty

    A held block is cached too once it is registered. After a shrink, held ids at or above `num_blocks` are
    retired: they cannot be found any more and vanish when their last holder frees them.
    """

    def __init__(self, num_blocks: int, block_size: int):
        assert num_blocks > 0 and block_size > 0, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_queried_tokens = 0  # tokens of all sequences admitted
        self.num_hit_tokens = 0  # those of them found in the cache
        self.num_evicted_blocks = 0  # cached blocks given to somebody else
        self._refs: dict[int, int] = {}
        self._blank: list[int] = list(range(num_blocks))  # a heap
        self._lru: OrderedDict[int, None] = OrderedDict()  # free cached blocks, next to go first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    # --- asking (nothing changes) ---

    @property
    def num_free(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return len(self._blank) + len(self._lru)

    @property
    def num_held(self) -> int:
        return len(self._refs)

    @property
    def num_cached(self) -> int:
        """Blocks whose contents are known, held or free."""
        return len(self._hash_of)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def is_cached(self, block_id: int) -> bool:
        """Whether the block is full of KV that was computed and registered, and not lost since."""
        return block_id in self._hash_of

    def match(self, block_hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        """The longest cached prefix of a sequence of `num_tokens` tokens, as block ids.

        At least one token is left to compute, since logits come from computing a token: a sequence that is
        cached to its end matches one block less.
        """
        hit: list[int] = []
        for block_hash in block_hashes[: (num_tokens - 1) // self.block_size]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            hit.append(block_id)
        return hit

    def can_allocate(self, num_blocks: int, hit: Sequence[int] = (), *, reserve: int = 0) -> bool:
        """Whether `allocate(num_blocks, hit)` would succeed and leave `reserve` blocks free."""
        num_taken = num_blocks - sum(block_id in self._refs for block_id in hit)
        return num_taken + reserve <= self.num_free

    # --- doing ---

    def allocate(self, num_blocks: int, hit: Sequence[int] = ()) -> list[int]:
        """A table of `num_blocks` blocks: those of `hit` (from `match`, shared), then blank ones.

        Requires `can_allocate`. Evicts cached blocks when no blank one is left.
        """
        assert self.can_allocate(num_blocks, hit), f"{num_blocks} blocks asked for, {self.num_free} free"
        assert len(hit) <= num_blocks, (len(hit), num_blocks)
        for block_id in hit:
            assert block_id in self._hash_of, f"block {block_id} is not cached"
            self._lru.pop(block_id, None)
            self._refs[block_id] = self._refs.get(block_id, 0) + 1
        return [*hit, *(self._take() for _ in range(num_blocks - len(hit)))]

    def count_query(self, num_tokens: int, num_hit_tokens: int) -> None:
        """Adds one admission to the hit-rate counters."""
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_hit_tokens

    def free(self, block_ids: Sequence[int]) -> None:
        """Drops one reference to each block of a table. What is cached stays to be found, until evicted.

        The end of the table is the first to be evicted: a prefix is worth nothing without its beginning.
        """
        for block_id in reversed(block_ids):
            assert block_id in self._refs, f"block {block_id} is not held"
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                del self._refs[block_id]
                self._release(block_id)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Says that a held block is now full of the KV of this hash, so that others may share it.

        Where another block holds the same already, that one stays the one to be found.
        """
        assert block_id in self._refs, f"block {block_id} is not held"
        assert self._hash_of.get(block_id, block_hash) == block_hash, f"block {block_id} was overwritten"
        if block_id < self.num_blocks and block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id

    def invalidate_all(self) -> None:
        """The contents of the cache are gone. Nothing is found any more; held blocks stay held."""
        self._hash_of.clear()
        self._block_of.clear()
        self._blank.extend(self._lru)
        self._lru.clear()
        heapq.heapify(self._blank)

    def shrink(self, num_blocks: int) -> set[int]:
        """Gives up the ids `[num_blocks, self.num_blocks)`. Returns those of them that are still held.

        The caller must free these before their memory is given back. They cannot be matched any more.
        """
        assert 0 < num_blocks <= self.num_blocks, (num_blocks, self.num_blocks)
        for block_id in [b for b in self._hash_of if b >= num_blocks]:
            self._forget(block_id)
            self._lru.pop(block_id, None)
        self._blank = [b for b in self._blank if b < num_blocks]
        heapq.heapify(self._blank)
        self.num_blocks = num_blocks
        return {b for b in self._refs if b >= num_blocks}

    def grow(self, num_blocks: int) -> None:
        """Adds the ids `[self.num_blocks, num_blocks)` as blank ones. No retired block may be left."""
        assert num_blocks >= self.num_blocks, (num_blocks, self.num_blocks)
        assert all(b < self.num_blocks for b in self._refs), "blocks of the last shrink are still held"
        self._blank.extend(range(self.num_blocks, num_blocks))
        heapq.heapify(self._blank)
        self.num_blocks = num_blocks

    def validate(self, tables: Iterable[Collection[int]] | None = None) -> None:
        """Asserts that the books agree; with `tables`, also that these are all the references there are."""
        held, blank, lru = set(self._refs), set(self._blank), set(self._lru)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not (held & blank or held & lru or blank & lru), "a block is in two places"
        retired = {b for b in held if b >= self.num_blocks}
        assert (held - retired) | blank | lru == set(range(self.num_blocks)), "a block is in no place"
        assert all(count > 0 for count in self._refs.values()), "a held block has no holder"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "the hash maps differ"
        assert lru <= set(self._hash_of) <= (held - retired) | lru, "a hash is missing, or on a block that is gone"
        if tables is not None:
            counts = Counter(block_id for table in tables for block_id in table)
            assert counts == self._refs, "reference counts differ from the tables"

    # --- inside ---

    def _take(self) -> int:
        if self._blank:
            block_id = heapq.heappop(self._blank)
        else:
            block_id, _ = self._lru.popitem(last=False)
            self._forget(block_id)
            self.num_evicted_blocks += 1
        self._refs[block_id] = 1
        return block_id

    def _release(self, block_id: int) -> None:
        if block_id >= self.num_blocks:
            return  # retired
        if block_id in self._hash_of:
            self._lru[block_id] = None
        else:
            heapq.heappush(self._blank, block_id)

    def _forget(self, block_id: int) -> None:
        del self._block_of[self._hash_of.pop(block_id)]
