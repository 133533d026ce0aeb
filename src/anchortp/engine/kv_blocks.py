"""Copies of KV blocks: to and from the mirror, from a peer's arena, and within one arena.

A block of one head is `2 * num_layers` rows of consecutive bytes. In an arena and in the mirror alike, the steps
from row to row, head to head and block to block are constants. So blocks that follow one another on both sides
are one strided copy, and the loop over layers is torch's. The rows are copied as integers: no value is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchortp.engine.mirror_addresses import MirrorAddresses
from anchortp.layout import KVAddresses

Pair = tuple[int, int]
Run = tuple[int, int, int]

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # widest first: fewer elements, same bytes


class KVBlocks:
    """[worker] Moves whole blocks into and out of the KV arena of one device.

    `buffer`: the arena from its first byte, 1-D uint8. `heads`: the device's KV heads in slot order.

    Every method copies all layers, keys and values, returns how many bytes that were, and touches no other byte
    of its destination. When it returns, the bytes are there; on a GPU, where the mirror is host memory that the device
    reaches itself (`arena.pinned`), the copies are in the current stream. Pairs may come in any order; those that run
    in step on both sides are the cheapest. Writing to a page that was never touched commits it, which takes the kernel
    about nine times as long as the copy itself. In and outside of inference mode alike.
    """

    def __init__(self, buffer: Tensor, addresses: KVAddresses, heads: tuple[int, ...]):
        assert len(set(heads)) == len(heads), f"a head twice: {heads}"
        self.addresses = addresses
        self.heads = heads
        self._slot_of = {head: slot for slot, head in enumerate(heads)}
        self._arena = _arena_planes(buffer, addresses, len(heads))

    def save(self, mirror: Tensor, pairs: Sequence[Pair], heads: Sequence[int]) -> int:
        """Copies those `heads` of each block into the mirror, given `(block id, mirror slot)`.

        `mirror`: 1-D uint8 as `MirrorAddresses` says. A slot is whole once every head has been saved into it,
        by whichever devices hold them.
        """
        blocks = _runs((slot, block) for block, slot in pairs)
        slots = _runs((head, self._slot(head)) for head in heads)
        _copy(_mirror_planes(mirror, self.addresses), self._arena, blocks, slots)
        return self._num_bytes(pairs, heads)

    def restore(self, mirror: Tensor, pairs: Sequence[Pair], heads: Sequence[int]) -> int:
        """The other way: from the mirror into those `heads` of the blocks, given `(block id, mirror slot)`."""
        slots = _runs((self._slot(head), head) for head in heads)
        _copy(self._arena, _mirror_planes(mirror, self.addresses), _runs(pairs), slots)
        return self._num_bytes(pairs, heads)

    def copy_from(
        self, peer_buffer: Tensor, peer_heads: tuple[int, ...], blocks: Sequence[int], heads: Sequence[int]
    ) -> int:
        """Copies those `heads` of `blocks` from another device's KV arena, whose slot order is `peer_heads`."""
        peer = _arena_planes(peer_buffer, self.addresses, len(peer_heads))
        slots = _runs((self._slot(head), peer_heads.index(head)) for head in heads)
        _copy(self._arena, peer, _runs((block, block) for block in blocks), slots)
        return self._num_bytes(blocks, heads)

    def move(self, pairs: Sequence[Pair]) -> int:
        """Copies blocks within this arena, all heads, given `(from, to)`.

        No block is both a source and a destination, so that the order of the pairs does not matter.
        """
        sources = {source for source, _ in pairs}
        assert not any(target in sources for _, target in pairs), f"a chain of moves: {pairs}"
        slots = [(0, 0, len(self.heads))] if self.heads else []
        _copy(self._arena, self._arena, _runs((target, source) for source, target in pairs), slots)
        return self._num_bytes(pairs, self.heads)

    def _slot(self, head: int) -> int:
        assert head in self._slot_of, f"KV head {head} is not here; these are: {self.heads}"
        return self._slot_of[head]

    def _num_bytes(self, blocks: Sequence[object], heads: Sequence[int]) -> int:
        return len(blocks) * len(heads) * self.addresses.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planes:
    """A buffer of words as `extent` = (blocks, heads), each entry `inner` = (layers, 2, words of a row).

    `strides`, in words: from block to block, head to head, layer to layer, keys to values.
    """

    words: Tensor
    extent: tuple[int, int]
    inner: tuple[int, int, int]
    strides: tuple[int, int, int, int]

    def box(self, block: int, head: int, num_blocks: int, num_heads: int) -> Tensor:
        """A view `[num_blocks, num_heads, *inner]` of the entries from `(block, head)` on."""
        assert 0 <= block <= self.extent[0] - num_blocks, f"blocks {block}+{num_blocks} of {self.extent[0]}"
        assert 0 <= head <= self.extent[1] - num_heads, f"heads {head}+{num_heads} of {self.extent[1]}"
        return self.words.as_strided(
            (num_blocks, num_heads, *self.inner),
            (*self.strides, 1),
            self.words.storage_offset() + block * self.strides[0] + head * self.strides[1],
        )


def _arena_planes(buffer: Tensor, addresses: KVAddresses, num_heads: int) -> _Planes:
    row_bytes = _row_bytes(addresses)
    steps = (row_bytes, 2 * addresses.half_bytes, addresses.layer_bytes, addresses.half_bytes)
    assert buffer.numel() >= addresses.reserved_bytes, (buffer.numel(), addresses.reserved_bytes)
    return _planes(buffer[: addresses.reserved_bytes], addresses, (addresses.num_blocks, num_heads), steps)


def _mirror_planes(mirror: Tensor, addresses: KVAddresses) -> _Planes:
    """Its number of slots follows from its size."""
    row_bytes = _row_bytes(addresses)
    slots = MirrorAddresses.of(addresses, mirror.numel())
    steps = (slots.slot_bytes, slots.head_bytes, 2 * row_bytes, row_bytes)
    extent = (slots.num_slots, addresses.config.num_kv_heads)
    return _planes(mirror[: slots.num_slots * slots.slot_bytes], addresses, extent, steps)


def _planes(
    buffer: Tensor, addresses: KVAddresses, extent: tuple[int, int], steps: tuple[int, int, int, int]
) -> _Planes:
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1, (buffer.dtype, buffer.shape)
    row_bytes = _row_bytes(addresses)
    # Layers begin on a page and all other steps are multiples of a row: what divides a row divides every step.
    word = next(word for word in _WORDS if row_bytes % word.itemsize == 0)
    block, head, layer, half = (step // word.itemsize for step in steps)
    return _Planes(
        words=buffer.view(word),
        extent=extent,
        inner=(addresses.config.num_layers, 2, row_bytes // word.itemsize),
        strides=(block, head, layer, half),
    )


def _row_bytes(addresses: KVAddresses) -> int:
    """The keys (or values) of one block, head and layer."""
    return addresses.block_size * addresses.config.head_dim * addresses.config.dtype_bytes


def _runs(pairs: Iterable[Pair]) -> list[Run]:
    """`(target, source)` pairs as runs `(target, source, length)` that step by one on both sides.

    In rising order of targets, each of which occurs once; runs are as long as can be.
    """
    runs: list[Run] = []
    for target, source in sorted(pairs):
        if runs:
            first_target, first_source, length = runs[-1]
            assert target >= first_target + length, f"{target} is a target twice"
            if (target, source) == (first_target + length, first_source + length):
                runs[-1] = (first_target, first_source, length + 1)
                continue
        runs.append((target, source, 1))
    return runs


@torch.inference_mode()
def _copy(targets: _Planes, sources: _Planes, blocks: Sequence[Run], heads: Sequence[Run]) -> None:
    """One strided copy per run of blocks and run of heads.

    Measured and left out: gathering scattered blocks through a buffer that fits the cache saves a fifth where no
    two blocks are neighbours, and nothing elsewhere; committing the pages ahead (MADV_POPULATE_WRITE, fallocate,
    pwrite) costs here what the page faults cost, to within a tenth.
    """
    for block, source_block, num_blocks in blocks:
        for head, source_head, num_heads in heads:
            source = sources.box(source_block, source_head, num_blocks, num_heads)
            targets.box(block, head, num_blocks, num_heads).copy_(source)
