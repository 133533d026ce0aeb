"""From the moves of a plan to the chunks that one device copies, in the order in which it computes with them. Pure.

A *region* is where one copy of a tensor lies (mostly: that of one layer). A unit has a block in each region of its
family, and the bytes of a unit are its blocks one after the other: its tensors in the order of `ModelUnits.tensors`,
in each its copies. A *segment* is up to `SEGMENT_BYTES` of a block, whole rows or panels; what arrives is checked a
segment at a time. A *chunk* is copied in one go: whole segments (of several units, if they are small), or a part of
one segment where a unit comes in parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from anchortp.layout import EVERY_FAMILY, EXPERT, VOCAB, ReplicatedTensor, Shard, UnitTensor, WeightAddresses
from anchortp.plan.plan import REPLICATED, FromHost, FromPeer, Move

EMBED_POSITION = 1
HOST = ""  # the name of the host's checkpoint among the sources; the others are devices
SEGMENT_BYTES = 1 << 20
# Large enough that a chunk's own cost (some 50 us of Python, under one lock with all other threads of the process) does
# not show, small enough that a load ends within about a millisecond of being told to.
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """`copy`: of the tensor, mostly the layer. `position`: when a forward pass comes to it, see `Geometry`.
    `first_byte`, `first_segment`: where a block begins among the bytes of its unit, and in the unit's sum."""

    tensor: UnitTensor | ReplicatedTensor
    copy: int
    family: str
    position: int
    block_bytes: int
    segment_bytes: int
    first_byte: int = 0
    first_segment: int = 0

    @property
    def num_segments(self) -> int:
        """Per block."""
        return -(-self.block_bytes // self.segment_bytes)

    @property
    def shortest_segment_bytes(self) -> int:
        return self.block_bytes % self.segment_bytes or self.segment_bytes


@dataclass(frozen=True, kw_only=True)  # without slots: it keeps its segments
class Chunk:
    """What is copied in one go: bytes `[first_byte, first_byte + num_bytes)` of the blocks that the units `[unit,
    unit + num_units)`, in slots from `slot` on, have in one region; blocks of consecutive slots are contiguous.

    `source`: `HOST` or a device, whose slots are `source_slot` and on. `start`, `source_start`: the first byte in
    the arena here and, from a device, there.
    """

    region: Region
    unit: int
    num_units: int
    slot: int
    first_byte: int
    num_bytes: int
    source: str
    source_slot: int
    link: str
    start: int
    source_start: int

    @property
    def stop(self) -> int:
        return self.start + self.num_bytes

    @property
    def position(self) -> int:
        return self.region.position

    @cached_property
    def spans(self) -> list[Span]:
        """The segments that it touches, unit by unit."""
        region, begin, found = self.region, self.first_byte // self.region.segment_bytes, []
        stop = self.first_byte + self.num_bytes  # from the first block's start on, then from the next one's
        for number in range(self.num_units):
            end = -(-min(stop, region.block_bytes) // region.segment_bytes)
            first = region.first_segment
            found.append(Span(self.unit + number, self.slot + number, first + begin, first + end))
            begin, stop = 0, stop - region.block_bytes
        return found

    @cached_property
    def segments(self) -> list[Segment]:
        """All segments that it touches, of which the first and the last may reach beyond it."""
        region, block, found = self.region, self.start - self.first_byte, []
        for unit, slot, begin, end in self.spans:
            for index in range(begin, end):
                start = block + (index - region.first_segment) * region.segment_bytes
                stop = min(start + region.segment_bytes, block + region.block_bytes)
                found.append(Segment(region.family, unit, slot, index, start, stop))
            block += region.block_bytes
        return found

    @property
    def num_segments(self) -> int:
        return sum(span.end - span.begin for span in self.spans)

    @property
    def first_segment_start(self) -> int:
        return self.start - self.first_byte % self.region.segment_bytes

    @property
    def is_whole(self) -> bool:
        """Whole segments, not a part of one."""
        size, end = self.region.segment_bytes, (self.first_byte + self.num_bytes) % self.region.block_bytes
        return self.first_byte % size == 0 == end % size

    def pieces(self, num_bytes: int) -> Iterator[list[Segment]]:
        """Its segments in runs of up to `num_bytes`, or of one; nothing if it is a part of a segment."""
        if not self.is_whole:
            return
        piece: list[Segment] = []
        for segment in self.segments:
            if piece and segment.stop - piece[0].start > num_bytes:
                yield piece
                piece = []
            piece.append(segment)
        yield piece

    def part(self, piece: Sequence[Segment]) -> Chunk:
        """Of a chunk of whole segments: some that follow one another, as a chunk."""
        first, last = piece[0], piece[-1]
        skipped = first.unit - self.unit
        return replace(
            self,
            unit=first.unit,
            num_units=last.unit - first.unit + 1,
            slot=first.slot,
            first_byte=first.start - (self.start - self.first_byte + skipped * self.region.block_bytes),
            num_bytes=last.stop - first.start,
            source_slot=self.source_slot + skipped if self.source != HOST else 0,
            start=first.start,
            source_start=self.source_start + first.start - self.start if self.source != HOST else 0,
        )

    def __str__(self) -> str:
        units = f"{self.unit}" if self.num_units == 1 else f"{self.unit} to {self.unit + self.num_units - 1}"
        return f"{self.region.tensor.key} (copy {self.region.copy}) of {self.region.family} {units}"


class Span(NamedTuple):
    """Segments `[begin, end)` of a unit's sum, next to each other in one block."""

    unit: int
    slot: int
    begin: int
    end: int


class Segment(NamedTuple):
    """One segment of one unit's block: `[start, stop)` in the arena, the `index`-th of the unit's sum.

    A tuple, since a large load makes a hundred thousand of them.
    """

    family: str
    unit: int
    slot: int
    index: int
    start: int
    stop: int


class Geometry:
    """All regions of a model, by family (`REPLICATED` is one, with a single unit in slot 0).

    Positions: 0 the replicated tensors, 1 the embedding, then each layer, last lm_head.
    """

    def __init__(self, addresses: WeightAddresses):
        self.addresses = addresses
        self.units = addresses.units

    @property
    def num_positions(self) -> int:
        return self.units.config.num_layers + 3

    @staticmethod
    def position_of_layer(layer: int) -> int:
        """Of what follows the last layer, lm_head, too: its number is the number of layers."""
        return EMBED_POSITION + 1 + layer

    @cached_property
    def regions(self) -> dict[str, tuple[Region, ...]]:
        """Per family, in the order of a unit's bytes. (Of experts see `regions_of`.)"""
        found: dict[str, list[Region]] = defaultdict(list)
        for tensor in (*self.units.replicated, *self.units.tensors):
            family = REPLICATED if isinstance(tensor, ReplicatedTensor) else tensor.family
            num_bytes, piece_bytes = self._block(tensor)
            for copy in range(self.units.num_copies(tensor)):
                region = Region(
                    tensor=tensor,
                    copy=copy,
                    family=family,
                    position=self._position(tensor, copy),
                    block_bytes=num_bytes,
                    segment_bytes=max(1, SEGMENT_BYTES // piece_bytes) * piece_bytes,
                )
                found[family].append(_following(region, found[family]))
        return {family: tuple(regions) for family, regions in found.items()}

    def regions_of(self, family: str, unit: int) -> tuple[Region, ...]:
        """Where a unit has blocks. All experts share the regions, but each is of one layer."""
        if family != EXPERT:
            return self.regions[family]
        layer = unit // (self.units.num_units[EXPERT] // self.units.config.num_layers)
        position = self.position_of_layer(layer)
        return tuple(replace(region, position=position) for region in self.regions[EXPERT])

    @cached_property
    def num_segments(self) -> dict[str, int]:
        """How many segments all blocks of a unit have together, by family."""
        return {f: regions[-1].first_segment + regions[-1].num_segments for f, regions in self.regions.items()}

    def unit_bytes(self, family: str) -> int:
        return self.units.replicated_bytes if family == REPLICATED else self.units.unit_bytes[family]

    def start(self, region: Region, slot: int) -> int:
        """Where the block of a slot begins in the arena."""
        if isinstance(region.tensor, ReplicatedTensor):
            return self.addresses.offset(region.tensor.key, region.copy)
        return self.addresses.block(region.tensor, region.copy, slot)[0]

    def chunks(self, moves: Iterable[Move]) -> tuple[Chunk, ...]:
        """The moves of one device cut into chunks, in the order in which a forward pass needs them."""
        found = [chunk for move in moves for chunk in self._cut(move)]
        return tuple(sorted(found, key=lambda c: (c.position, c.region.family, c.region.first_byte, c.start)))

    def _cut(self, move: Move) -> Iterator[Chunk]:
        whole = move.num_bytes == move.num_units * self.unit_bytes(move.family)
        assert whole or move.num_units == 1, f"{move}: only a single unit comes in parts"
        alone = move.family == EXPERT  # a run of experts may be of several layers
        for first in range(move.num_units if alone else 1):
            num_units = 1 if alone else move.num_units
            for region in self.regions_of(move.family, move.unit + first):
                low, high = 0, num_units * region.block_bytes
                if not whole:
                    low = max(low, move.first_byte - region.first_byte)
                    high = min(high, move.first_byte + move.num_bytes - region.first_byte)
                for start, stop in pairwise(_cuts(region, low, high)):
                    yield self._chunk(move, region, first, start, stop)

    def _chunk(self, move: Move, region: Region, first: int, start: int, stop: int) -> Chunk:
        """Bytes `[start, stop)` of the run of blocks that begins with unit `first` of the move."""
        skipped, last = first + start // region.block_bytes, first + (stop - 1) // region.block_bytes
        slot = move.slot + skipped
        first_byte = start - (skipped - first) * region.block_bytes
        peer = move.source if isinstance(move.source, FromPeer) else None
        source_slot = peer.slot + skipped if peer else 0
        return Chunk(
            region=region,
            unit=move.unit + skipped,
            num_units=last - skipped + 1,
            slot=slot,
            first_byte=first_byte,
            num_bytes=stop - start,
            source=peer.device if peer else HOST,
            source_slot=source_slot,
            link=" ".join(move.route) or (peer.device if peer else "host"),
            start=self.start(region, slot) + first_byte,
            source_start=self.start(region, source_slot) + first_byte if peer else 0,
        )

    def _position(self, tensor: UnitTensor | ReplicatedTensor, copy: int) -> int:
        if isinstance(tensor, ReplicatedTensor):
            return 0
        if tensor.family == VOCAB:
            return EMBED_POSITION if tensor.key == "embed" else self.num_positions - 1
        return self.position_of_layer(copy * self.units.config.num_layers // self.units.num_copies(tensor))

    def _block(self, tensor: UnitTensor | ReplicatedTensor) -> tuple[int, int]:
        """Bytes of a block, and of the smallest part of it that is read by itself."""
        if isinstance(tensor, ReplicatedTensor):
            size = self.addresses.replicated_bytes(tensor)
            return size, size
        return self.units.block_bytes(tensor), self.units.piece_bytes(tensor)


def _following(region: Region, before: Sequence[Region]) -> Region:
    """The region as the next of its family."""
    if not before:
        return region
    last = before[-1]
    first_segment = last.first_segment + last.num_segments
    return replace(region, first_byte=last.first_byte + last.block_bytes, first_segment=first_segment)


def _cuts(region: Region, low: int, high: int) -> list[int]:
    """Where to cut bytes `[low, high)` of a run of blocks: a chunk is whole segments, or a part of one."""
    block, segment = region.block_bytes, region.segment_bytes

    def edge(at: int) -> int:
        """The last between two segments up to there."""
        return at - at % block % segment

    cuts = [low]
    while (at := cuts[-1]) < high:
        stop = edge(min(at + CHUNK_BYTES, high))
        if stop <= at or at != edge(at):
            stop = min(edge(at) + segment, at - at % block + block, high)
        cuts.append(stop)
    return cuts


def complete(
    geometry: Geometry, device: str, before: Shard, after: Shard, moves: Sequence[Move], fresh: bool
) -> tuple[Move, ...]:
    """`moves`, and a read from the host for every byte that is wanted and that none of them brings.

    Wanted is each slot in which `after` has another unit than `before`; with `fresh` the replicated tensors too.
    Moves that write elsewhere are kept: the later stages of a plan fill holes.
    """
    wanted = {(REPLICATED, 0): 0} if fresh else {}
    for family in EVERY_FAMILY:
        for slot, unit in enumerate(after[family]):
            if slot >= len(before[family]) or before[family][slot] != unit:
                wanted[family, slot] = unit
    brought = _brought(geometry, moves)
    rest = []
    for (family, slot), unit in wanted.items():
        edges = [0, *(edge for part in sorted(brought[family, slot]) for edge in part), geometry.unit_bytes(family)]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            assert start <= stop, f"{device}: two moves write the same bytes of {family} slot {slot}"
            if start < stop:
                rest.append(_from_host(device, family, unit, slot, start, stop))
    return (*moves, *_runs(geometry, rest))


def _brought(geometry: Geometry, moves: Iterable[Move]) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Per family and slot the byte ranges of its unit that the moves bring."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for move in moves:
        unit_bytes = geometry.unit_bytes(move.family)
        part = (move.first_byte, move.first_byte + move.num_bytes) if move.num_units == 1 else (0, unit_bytes)
        assert part[1] <= unit_bytes, f"{move} goes beyond the unit's {unit_bytes} bytes"
        for number in range(move.num_units):
            found[move.family, move.slot + number].append(part)
    return found


def _from_host(device: str, family: str, unit: int, slot: int, start: int, stop: int) -> Move:
    return Move(
        device=device,
        family=family,
        unit=unit,
        slot=slot,
        source=FromHost(),
        first_byte=start,
        num_bytes=stop - start,
    )


def _runs(geometry: Geometry, moves: Iterable[Move]) -> Iterator[Move]:
    """Whole units that are consecutive in unit and slot become one move."""
    last: Move | None = None
    for move in moves:
        size = geometry.unit_bytes(move.family)
        joins = (
            last is not None
            and last.family == move.family
            and last.num_bytes == last.num_units * size
            and move.num_bytes == size
            and (move.unit, move.slot) == (last.unit + last.num_units, last.slot + last.num_units)
        )
        if joins:
            assert last is not None
            move = Move(
                device=move.device,
                family=move.family,
                unit=last.unit,
                slot=last.slot,
                source=move.source,
                num_bytes=last.num_bytes + size,
                num_units=last.num_units + 1,
            )
        elif last is not None:
            yield last
        last = move
    if last is not None:
        yield last
