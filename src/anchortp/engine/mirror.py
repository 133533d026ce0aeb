"""What the host's copy of the KV cache holds: contents, by block hash, in slots. No tensor, no clock.

A slot has room for one block, every plane of it. A content counts as mirrored only when its copy is whole: a
copy that a fault cuts off leaves nothing behind that could be found. Contents, not block ids, are what is
mirrored, so a block that was evicted or moved on the devices is still found here.

Runs in the engine process. One thread at a time.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Mirror:
    """Slots `[0, num_slots)`, each in exactly one of three places.

    whole    its content can be found; least recently used goes first
    copying  on its way from a block; neither found nor evicted
    blank    contents meaningless; lowest slot goes first, so that a mirror commits only what it needs

    The order of use should follow the pool's: feed `touch` from the pool's `on_change`.
    """

    def __init__(self, num_slots: int):
        assert num_slots > 0, num_slots
        self.num_slots = num_slots
        self.num_evicted = 0  # whole contents given up for others
        self._whole: OrderedDict[bytes, int] = OrderedDict()  # hash -> slot, next to go first
        self._copying: dict[int, bytes] = {}  # slot -> hash, in order of start
        self._blank: list[int] = list(range(num_slots))  # a heap

    @property
    def num_whole(self) -> int:
        return len(self._whole)

    @property
    def num_copying(self) -> int:
        return len(self._copying)

    def find(self, block_hash: bytes) -> int | None:
        """The slot that holds this content whole, if any. Counts as a use."""
        self.touch(block_hash)
        return self._whole.get(block_hash)

    def touch(self, block_hash: bytes) -> None:
        """Says that the content was used just now. Unknown contents are ignored."""
        if block_hash in self._whole:
            self._whole.move_to_end(block_hash)

    def start(self, sealed: Sequence[tuple[int, bytes]]) -> list[tuple[int, int]]:
        """Which of these blocks to copy, and where to: pairs of block id and slot.

        Contents that are mirrored or being copied are left out; so are those for which there is no room, since
        neither a copy under way nor a content named in this call is evicted. Each pair must be answered by
        `done`, or `abandon`; the block must not be written to before that.
        """
        named = {block_hash for _, block_hash in sealed}
        copying = set(self._copying.values())
        for _, block_hash in reversed(sealed):  # the beginning of a prefix outlives its end
            self.touch(block_hash)
        copies = []
        for block_id, block_hash in sealed:
            if block_hash in self._whole or block_hash in copying:
                continue
            slot = self._take(named)
            if slot is None:
                break
            self._copying[slot] = block_hash
            copying.add(block_hash)
            copies.append((block_id, slot))
        return copies

    def done(self, slots: Sequence[int]) -> None:
        """These copies are whole, on every device. Answers of an epoch that is over must not come here."""
        for slot in reversed(slots):
            assert slot in self._copying, f"slot {slot} is not being copied to"
            self._whole[self._copying.pop(slot)] = slot

    def abandon(self, slots: Iterable[int] | None = None) -> list[bytes]:
        """These copies under way, all by default, are void. Returns their contents, in order of start.

        To have them copied again, where still sealed: `pool.offer(mirror.abandon())`.
        """
        void = list(self._copying) if slots is None else sorted(slots, key=list(self._copying).index)
        for slot in void:
            heapq.heappush(self._blank, slot)
        return [self._copying.pop(slot) for slot in void]

    def clear(self) -> None:
        """The host's memory is gone, and everything in it."""
        self._whole.clear()
        self._copying.clear()
        self._blank = list(range(self.num_slots))

    def validate(self) -> None:
        """Asserts that the books agree."""
        slots = [*self._whole.values(), *self._copying, *self._blank]
        assert sorted(slots) == list(range(self.num_slots)), "a slot is in no place, or in two"
        copying = list(self._copying.values())
        assert len(set(copying)) == len(copying), "a content is copied twice"
        assert self._whole.keys().isdisjoint(copying), "a content is copied that is there"

    def _take(self, keep: set[bytes]) -> int | None:
        """A slot to write to; evicts the least recently used content if it is none of `keep`."""
        if self._blank:
            return heapq.heappop(self._blank)
        oldest = next(iter(self._whole), None)
        # Whole contents of `keep` were touched just now: if the oldest is one of them, so are all.
        if oldest is None or oldest in keep:
            return None
        self.num_evicted += 1
        return self._whole.pop(oldest)
