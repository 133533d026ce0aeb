"""Where every byte of a shard lies in its arena. Pure arithmetic; the same on every device.

Each copy of a tensor has a region large enough for *all* units of the model. Address space costs nothing: an
arena commits pages only where slots are filled. So a shard can grow up to the whole model, and no slot that is
in use ever changes its address.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from anchortp.config import ModelConfig
from anchortp.layout.layout import Shard
from anchortp.layout.units import ModelUnits, ReplicatedTensor, UnitTensor

ALIGN_BYTES = 4096  # a page of host memory; a device may commit in larger steps

Range = tuple[int, int]  # bytes, half-open


@dataclass(frozen=True, kw_only=True)
class WeightAddresses:
    """Byte offsets in the weights arena of one device.

    A region begins on a page (of `page_bytes`, the step in which the engine's devices commit memory), so that
    committing it never touches another.
    """

    units: ModelUnits
    page_bytes: int = ALIGN_BYTES

    @cached_property
    def _table(self) -> tuple[dict[tuple[str, int], int], int, int]:
        offsets: dict[tuple[str, int], int] = {}
        end = 0
        for replicated in self.units.replicated:
            size = self.replicated_bytes(replicated)
            for layer in range(self.units.num_copies(replicated)):
                offsets[replicated.key, layer] = end
                end += -(-size // 64) * 64  # a cache line each; they are few and small
        replicated_end = end
        for tensor in self.units.tensors:
            capacity = self.units.num_units[tensor.family] * self.units.block_bytes(tensor)
            for copy in range(self.units.num_copies(tensor)):
                end = _align(end, self.page_bytes)
                offsets[tensor.key, copy] = end
                end += capacity
        return offsets, replicated_end, _align(end, self.page_bytes)

    @property
    def reserved_bytes(self) -> int:
        return self._table[2]

    @property
    def replicated_range(self) -> Range:
        return (0, self._table[1])

    def replicated_bytes(self, tensor: ReplicatedTensor) -> int:
        elements = 1
        for extent in tensor.shape:
            elements *= extent
        return elements * self.units.config.dtype_bytes

    def offset(self, key: str, copy: int = 0) -> int:
        """Byte offset of the region of one copy of tensor `key` (`ModelUnits.num_copies`; mostly the layer)."""
        return self._table[0][key, copy]

    def block(self, tensor: UnitTensor, copy: int, slot: int) -> Range:
        """The bytes of one unit's block."""
        size = self.units.block_bytes(tensor)
        start = self.offset(tensor.key, copy) + slot * size
        return (start, start + size)

    def slot_ranges(self, family: str, start: int, stop: int) -> Iterator[Range]:
        """All bytes of slots `[start, stop)` of a family: one range per copy of a tensor."""
        if start == stop:
            return
        for tensor in self.units.tensors:
            if tensor.family == family:
                for copy in range(self.units.num_copies(tensor)):
                    yield (self.block(tensor, copy, start)[0], self.block(tensor, copy, stop - 1)[1])

    def committed_bytes(self, shard: Shard) -> int:
        """Bytes of the pages that the shard's slots and the replicated tensors touch: what a budget counts."""
        total = _align(self.replicated_range[1], self.page_bytes)
        for tensor in self.units.tensors:
            used = len(shard[tensor.family]) * self.units.block_bytes(tensor)
            total += _align(used, self.page_bytes) * self.units.num_copies(tensor)
        return total


@dataclass(frozen=True, kw_only=True)
class KVAddresses:
    """Byte offsets in the KV arena of one device.

    Layer-major, then slot (KV head), then keys before values, each `[num_tokens, head_dim]`: a plane of one
    head and layer is contiguous, and appending a slot moves nothing. Capacity is in blocks of `block_size`
    tokens; a block has the same number on every device.
    """

    config: ModelConfig
    block_size: int
    num_blocks: int
    page_bytes: int = ALIGN_BYTES

    @property
    def num_tokens(self) -> int:
        return self.block_size * self.num_blocks

    @property
    def half_bytes(self) -> int:
        """Keys (or values) of one head in one layer."""
        return self.num_tokens * self.config.head_dim * self.config.dtype_bytes

    @property
    def layer_bytes(self) -> int:
        return _align(self.config.num_kv_heads * 2 * self.half_bytes, self.page_bytes)

    @property
    def reserved_bytes(self) -> int:
        return self.config.num_layers * self.layer_bytes

    @property
    def block_bytes(self) -> int:
        """One block of one KV head, all layers, keys and values."""
        c = self.config
        return 2 * c.num_layers * self.block_size * c.head_dim * c.dtype_bytes

    def blocks_that_fit(self, num_heads: int, room_bytes: int) -> int:
        """How many blocks of `num_heads` KV heads fit in `room_bytes`, page rounding included; at most all."""
        if num_heads == 0:
            return self.num_blocks
        room_bytes -= self.room_for(num_heads, 0)
        return max(0, min(self.num_blocks, room_bytes // (num_heads * self.block_bytes)))

    def room_for(self, num_heads: int, num_blocks: int) -> int:
        """Bytes in which that many blocks fit, wherever they begin and end."""
        # A range of blocks may touch one page more than it fills, at both ends of keys and values alike.
        rounding = 2 * 2 * self.page_bytes * self.config.num_layers
        return num_heads * (rounding + num_blocks * self.block_bytes)

    def layer_offset(self, layer: int) -> int:
        return layer * self.layer_bytes

    def slot_ranges(self, start: int, stop: int, first_block: int, last_block: int) -> Iterator[Range]:
        """The bytes of blocks `[first_block, last_block)` of slots `[start, stop)`, all layers."""
        if start == stop or first_block == last_block:
            return
        token_bytes = self.config.head_dim * self.config.dtype_bytes * self.block_size
        whole = first_block == 0 and last_block == self.num_blocks
        for layer in range(self.config.num_layers):
            base = self.layer_offset(layer)
            if whole:
                yield (base + start * 2 * self.half_bytes, base + stop * 2 * self.half_bytes)
                continue
            for half in range(2 * start, 2 * stop):
                at = base + half * self.half_bytes
                yield (at + first_block * token_bytes, at + last_block * token_bytes)


def _align(offset: int, page_bytes: int) -> int:
    return -(-offset // page_bytes) * page_bytes
