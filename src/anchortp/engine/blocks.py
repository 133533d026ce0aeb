"""Bookkeeping of the paged KV cache: which block is whose, and what it holds. No tensor, no clock.

A block is `block_size` token positions of every layer and every KV head. One block id is valid on all
devices: each stores the planes of its own KV heads under the same id, so a change of layout changes no table.

Runs in the engine process. One thread at a time.
"""

from __future__ import annotations

import heapq
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice

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

    A held block is cached too once it is registered.

    No content is kept twice: whoever completes a block that another one holds already takes that one instead
    (`register`). So what is evicted is exactly what an ideal LRU cache of blocks would evict.

    `on_change(block_id, hash)` is called when a block gets a content, and again each time that it is used
    (found, or freed by its last holder); `on_change(block_id, None)` when it loses it, before anybody can be
    told to write to it. In this order a persistent index (`KVIndex.update`) gives the order of eviction back.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        on_change: Callable[[int, bytes | None], None] | None = None,
    ):
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
        self._fresh: dict[int, bytes] = {}  # registered, and not yet taken by `take_sealed`
        self._on_change = on_change or _ignore

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

    def block_of(self, block_hash: bytes) -> int | None:
        """The block that holds this content, if any."""
        return self._block_of.get(block_hash)

    def sealed(self) -> list[tuple[int, bytes]]:
        """Block id and hash of all whose contents are known: least recently used first, held ones last."""
        held = [block_id for block_id in self._refs if block_id in self._hash_of]
        return [(block_id, self._hash_of[block_id]) for block_id in [*self._lru, *held]]

    def occupied(self, max_cached: int | None = None) -> list[int]:
        """Ids that are not blank, so that their planes mean something: all that are held, and of the free cached ones
        the `max_cached` that were used last (by default all)."""
        skipped = 0 if max_cached is None else max(0, len(self._lru) - max_cached)
        return [*islice(self._lru, skipped, None), *self._refs]

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
        for block_id in reversed(hit):
            self._hold(block_id)
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

    def register(self, block_id: int, block_hash: bytes) -> int:
        """Says that a held block is now full of the KV of this hash, so that others may share it.

        Returns the block to hold from now on. Where another block holds the same already, it is that one: the
        caller's reference has moved there, and its own block is free if nobody else holds it.
        """
        assert block_id in self._refs, f"block {block_id} is not held"
        assert self._hash_of.get(block_id, block_hash) == block_hash, f"block {block_id} was overwritten"
        known = self._block_of.get(block_hash)
        if known is not None:
            return self.exchange(block_id, known)
        self._hash_of[block_id] = self._fresh[block_id] = block_hash
        self._block_of[block_hash] = block_id
        self._on_change(block_id, block_hash)
        return block_id

    def exchange(self, block_id: int, known: int) -> int:
        """Moves one reference from a held block to the cached block `known`. Returns `known`."""
        if known != block_id:
            self._hold(known)
            self.free((block_id,))
        return known

    def take_sealed(self, max_blocks: int | None = None) -> list[tuple[int, bytes]]:
        """Block id and hash of blocks registered and not yet taken, at most `max_blocks`, oldest first.

        Blocks that lost their contents meanwhile are not among them.
        """
        taken = list(islice(self._fresh.items(), max_blocks))
        for block_id, _ in taken:
            del self._fresh[block_id]
        return taken

    def offer(self, block_hashes: Iterable[bytes]) -> None:
        """`take_sealed` gives these contents once more, as far as they are still there."""
        for block_hash in block_hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is not None:
                self._fresh[block_id] = block_hash

    def adopt(self, entries: Sequence[tuple[int, bytes]]) -> None:
        """Takes over a cache that somebody else filled: block id and hash, least recently used first.

        [warm restart] The pool must be as new. Entries of ids that the pool has not are reported gone.
        """
        assert not self._refs and not self._hash_of, "only an empty pool can take over a cache"
        for block_id, block_hash in entries:
            if block_id >= self.num_blocks:
                self._on_change(block_id, None)
                continue
            assert block_id not in self._hash_of and block_hash not in self._block_of, "an entry came twice"
            self._hash_of[block_id] = self._fresh[block_id] = block_hash
            self._block_of[block_hash] = block_id
            self._lru[block_id] = None
            self._on_change(block_id, block_hash)
        self._set_blank(block_id for block_id in range(self.num_blocks) if block_id not in self._lru)

    def keep_only(self, block_ids: Collection[int]) -> None:
        """The contents of all other blocks are lost: they are not found any more. Held blocks stay held."""
        for block_id in [b for b in self._hash_of if b not in block_ids]:
            self._forget(block_id)
        gone = [block_id for block_id in self._lru if block_id not in self._hash_of]
        for block_id in gone:
            del self._lru[block_id]
        self._set_blank([*self._blank, *gone])

    def compact(self, num_blocks: int) -> list[tuple[int, int]]:
        """Gives up the ids `[num_blocks, self.num_blocks)`, but of the contents no more than must go.

        Blank blocks go first, then cached ones, least recently used first. What survives at or above
        `num_blocks` moves to blank ids below: returns these moves, (from, to), in any order, since no `to` is a
        `from`. The caller changes its tables, and has the contents moved before the memory is given back and
        before anybody computes. Until then `on_change` has reported more than is true: an index that outlives a
        crash must not be believed meanwhile (`KVIndex.set_epoch`).

        Requires `num_held <= num_blocks`.
        """
        assert 0 < num_blocks <= self.num_blocks, (num_blocks, self.num_blocks)
        assert self.num_held <= num_blocks, f"{self.num_held} blocks are held, only {num_blocks} are left"
        for _ in range(self.num_held + len(self._lru) - num_blocks):
            heapq.heappush(self._blank, self._evict())
        sources = sorted(b for b in [*self._refs, *self._lru] if b >= num_blocks)
        below = sorted(b for b in self._blank if b < num_blocks)
        moves = list(zip(sources, below, strict=False))
        assert len(moves) == len(sources), "blocks are in no place"
        self.num_blocks = num_blocks
        self._set_blank(below[len(moves) :])
        self._move(dict(moves))
        return moves

    def grow(self, num_blocks: int) -> None:
        """Adds the ids `[self.num_blocks, num_blocks)` as blank ones."""
        assert num_blocks >= self.num_blocks, (num_blocks, self.num_blocks)
        self._set_blank([*self._blank, *range(self.num_blocks, num_blocks)])
        self.num_blocks = num_blocks

    def validate(self, tables: Iterable[Collection[int]] | None = None) -> None:
        """Asserts that the books agree; with `tables`, also that these are all the references there are."""
        held, blank, lru = set(self._refs), set(self._blank), set(self._lru)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not (held & blank or held & lru or blank & lru), "a block is in two places"
        assert held | blank | lru == set(range(self.num_blocks)), "a block is in no place"
        assert all(count > 0 for count in self._refs.values()), "a held block has no holder"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "the hash maps differ"
        assert self._fresh.items() <= self._hash_of.items(), "a block to be mirrored has lost its contents"
        assert lru <= set(self._hash_of) <= held | lru, "a hash is missing, or on a block that is blank"
        if tables is not None:
            counts = Counter(block_id for table in tables for block_id in table)
            assert counts == self._refs, "reference counts differ from the tables"

    # --- inside ---

    def _take(self) -> int:
        block_id = heapq.heappop(self._blank) if self._blank else self._evict()
        self._refs[block_id] = 1
        return block_id

    def _evict(self) -> int:
        block_id, _ = self._lru.popitem(last=False)
        self._forget(block_id)
        self.num_evicted_blocks += 1
        return block_id

    def _hold(self, block_id: int) -> None:
        """One more reference to a cached block."""
        assert block_id in self._hash_of, f"block {block_id} is not cached"
        self._lru.pop(block_id, None)
        self._refs[block_id] = self._refs.get(block_id, 0) + 1
        self._on_change(block_id, self._hash_of[block_id])

    def _release(self, block_id: int) -> None:
        if block_id in self._hash_of:
            self._lru[block_id] = None
            self._on_change(block_id, self._hash_of[block_id])
        else:
            heapq.heappush(self._blank, block_id)

    def _forget(self, block_id: int) -> None:
        del self._block_of[self._hash_of.pop(block_id)]
        self._fresh.pop(block_id, None)
        self._on_change(block_id, None)

    def _move(self, moves: Mapping[int, int]) -> None:
        """Gives blocks other ids, in every book; nobody's place in the order of eviction changes."""
        self._refs = {moves.get(block_id, block_id): count for block_id, count in self._refs.items()}
        self._lru = OrderedDict((moves.get(block_id, block_id), None) for block_id in self._lru)
        self._hash_of = {moves.get(block_id, block_id): h for block_id, h in self._hash_of.items()}
        self._block_of = {h: block_id for block_id, h in self._hash_of.items()}
        self._fresh = {moves.get(block_id, block_id): h for block_id, h in self._fresh.items()}
        moved = {source for source, to in moves.items() if to in self._hash_of}
        for block_id in moved:
            self._on_change(block_id, None)
        if moved:  # in the order of use, all of them: a block reported later counts as used later
            for block_id, block_hash in self.sealed():
                self._on_change(block_id, block_hash)

    def _set_blank(self, block_ids: Iterable[int]) -> None:
        self._blank = list(block_ids)
        heapq.heapify(self._blank)


def _ignore(block_id: int, block_hash: bytes | None) -> None:
    pass
