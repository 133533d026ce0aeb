"""Weights kept as arenas hold them: a file beside the checkpoint, unit by unit.

A checkpoint has the columns of a row-parallel weight (attention output, MLP down) strided: a few bytes of every page
belong to a unit, so that reading one unit maps (or reads from disk) the whole tensor, and then it has to be
transposed. Weights that lie in panels (`layout.units`) have to be rearranged as well. Here a unit's block is
contiguous and as the arena wants it. Workers fill the file from their arenas when they have nothing better to do, and
every later load, of any layout, reads from it; what is not there is read from the checkpoint. Tensors that are the
same in both are left out. It takes a third of the model's size on disk, with panels all of it, and can be deleted at
any time. It has the fingerprint of what the arenas hold for a name, whatever lies in the model's folder by now.

The file ends with the xxh3_64 of every segment (`transfer.work`), 0 where there is none. It is written after its
segment, and believed only if the segment adds up to it: processes share the file without locks, and a segment that
was torn by a crash counts as missing.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from anchortp.arena import IntervalSet
from anchortp.arena.intervals import Range
from anchortp.arena.pages import MappedPages
from anchortp.errors import CheckpointError
from anchortp.layout import ModelUnits, ReplicatedTensor, Shard
from anchortp.transfer.checkpoint import ask_ahead, is_cached
from anchortp.transfer.checksum import digest, fill_summed
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.work import Chunk, Geometry, Region

MAP_BYTES = 8 << 20  # that are made ready at once, within a millisecond
LOOK_EVERY_S = 0.005
_WORD_BYTES = 8


class PackedWeights:
    """The file of one model, for any number of threads and processes. `close` it."""

    def __init__(self, path: Path, geometry: Geometry):
        """Opens the file, or makes it: sparse, so it takes what was written. Raises OSError."""
        self._geometry = geometry
        self._bases: dict[tuple[str, int], tuple[int, int]] = {}  # (key, copy) -> first byte, first segment
        num_bytes = num_segments = 0
        self._regions = [r for regions in geometry.regions.values() for r in regions if is_packed(geometry.units, r)]
        for region in self._regions:
            self._bases[region.tensor.key, region.copy] = num_bytes, num_segments
            count = geometry.units.num_units[region.family]
            num_bytes += count * region.block_bytes
            num_segments += count * region.num_segments
        table_at = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        table_bytes = max(1, num_segments) * _WORD_BYTES
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The table is written through a mapping: its pages must exist, or a full disk would end the process.
            os.posix_fallocate(self._fd, table_at, table_bytes)
            self._map = mmap.mmap(self._fd, table_bytes, offset=table_at)
        except BaseException:
            os.close(self._fd)
            raise
        self._table = memoryview(self._map).cast("Q")
        self._size_bytes = table_at + table_bytes
        self._stream: Streamer | None = None
        self._pages: MappedPages | None = None  # from `map_ahead` on
        self._looked_s = -math.inf  # when the file was last found to be as long as it should
        self._mapped = IntervalSet()  # the ranges whose pages are in it

    def read(self, chunk: Chunk, out: Tensor, check: Callable[[], None]) -> list[int] | None:
        """Fills `out` (uint8, the chunk's bytes), if all of them are here and right: then it returns the digests of
        the chunk's segments. `check` is called now and then, and may raise (neither OSError nor CheckpointError)."""
        numbers = self._numbers(chunk)
        if not (numbers and self._is_whole()):
            return None
        kept = self._table[numbers.start : numbers.stop].tolist()
        if 0 in kept:
            return None
        start = self._at(chunk.region, chunk.unit) + chunk.first_byte
        try:
            digests = self._streamed(start, chunk, out)
            if digests is None:
                digests = fill_summed(self._fd, start, chunk, memoryview(out.numpy()), check)
        except (CheckpointError, OSError):
            return None
        assert digests is not None, "only whole segments are kept here"
        if digests == kept:
            return digests
        for number, wanted, found in zip(numbers, kept, digests, strict=True):
            if wanted != found:
                self._table[number] = 0
        return None

    def _streamed(self, start: int, chunk: Chunk, out: Tensor) -> list[int] | None:
        """As `fill_summed`, through the mapping; None where its pages are not ready."""
        if self._stream is None or not self._mapped.covers(start, start + chunk.num_bytes):
            return None
        assert self._pages is not None
        return self._stream.chunk(chunk, self._pages.address + start, out)

    def map_ahead(self, stream: Streamer) -> Iterator[None]:
        """Makes pages of the file ready to be read by `stream`, some at each step: those that are kept here and in the
        page cache. One thread at a time; others may read meanwhile.

        Where none are ready, chunks are read through the descriptor, at two thirds of the speed.
        """
        if not self._is_whole():
            return
        if self._pages is None:
            self._pages, self._stream = MappedPages(self._fd, self._size_bytes), stream
        for start, stop in self._kept():
            if self._mapped.covers(start, stop) or not is_cached(self._fd, start):
                continue
            if self._pages.make_ready(start, stop):
                mapped = self._mapped.copy()
                mapped.add(start, stop)
                self._mapped = mapped
            yield

    def _kept(self) -> Iterator[Range]:
        """Where segments are that are here, up to `MAP_BYTES` of them at a time."""
        start = stop = 0
        for first, last in self._segments():
            if first != stop or last - start > MAP_BYTES:
                if start < stop:
                    yield start, stop
                start = first
            stop = last
        if start < stop:
            yield start, stop

    def _segments(self) -> Iterator[Range]:
        """Where each segment is that is here, in rising order."""
        for region in self._regions:
            for unit in range(self._geometry.units.num_units[region.family]):
                block, number = self._at(region, unit), self._first_number(region, unit)
                for index, start in enumerate(range(0, region.block_bytes, region.segment_bytes)):
                    if self._table[number + index]:
                        yield block + start, block + min(start + region.segment_bytes, region.block_bytes)

    def prefetch(self, chunk: Chunk) -> bool:
        """The chunk will be read soon. False if it is not here, as far as can be said at no cost."""
        numbers = self._numbers(chunk)
        if not numbers:
            return False
        start = self._at(chunk.region, chunk.unit) + chunk.first_byte
        if self._mapped.covers(start, start + chunk.num_bytes):
            return True
        if not self._is_whole() or 0 in self._table[numbers.start : numbers.stop]:
            return False
        ask_ahead(self._fd, start, start + chunk.num_bytes)
        return True

    def write(self, region: Region, unit: int, index: int, data: memoryview) -> None:
        """Puts in the `index`-th segment of a unit's block, if it is not there. Raises OSError (the disk is full)."""
        if not self._is_whole():
            raise OSError(errno.ENODATA, "the file of packed weights has been cut off")
        number = self._first_number(region, unit) + index
        if self._table[number]:
            return
        start, done = self._at(region, unit) + index * region.segment_bytes, 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], start + done)
        self._table[number] = digest(data)

    def close(self) -> None:
        if self._fd >= 0:
            self._stream = self._pages = None
            self._table.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def _is_whole(self) -> bool:
        """False where the file has been cut off: to touch its mappings beyond the end would end the process."""
        now_s = time.monotonic()
        if now_s >= self._looked_s + LOOK_EVERY_S:  # to look takes as long as to copy 100 KB
            if os.fstat(self._fd).st_size < self._size_bytes:
                return False
            self._looked_s = now_s
        return True

    def _numbers(self, chunk: Chunk) -> range:
        """The chunk's segments in the table; none unless it is whole segments of a tensor that is kept here."""
        if not chunk.is_whole or (chunk.region.tensor.key, chunk.region.copy) not in self._bases:
            return range(0)
        start = self._first_number(chunk.region, chunk.unit) + chunk.first_byte // chunk.region.segment_bytes
        return range(start, start + chunk.num_segments)

    def _at(self, region: Region, unit: int) -> int:
        return self._bases[region.tensor.key, region.copy][0] + unit * region.block_bytes

    def _first_number(self, region: Region, unit: int) -> int:
        return self._bases[region.tensor.key, region.copy][1] + unit * region.num_segments


def open_packed(path: Path, geometry: Geometry) -> PackedWeights | None:
    """None, and a line in the log, where the file cannot be had: everything works without it, slower."""
    try:
        return PackedWeights(path, geometry)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s cannot be used (%s): all weights are read from the checkpoint", path, error
        )
        return None


def is_packed(units: ModelUnits, region: Region) -> bool:
    """Whether the region's tensor lies otherwise in an arena than in the checkpoint."""
    tensor = region.tensor
    if isinstance(tensor, ReplicatedTensor):
        return False
    return units.in_panels(tensor) or all(part.axis == 1 for part in tensor.parts)


def pack(
    packed: PackedWeights,
    geometry: Geometry,
    shard: Shard,
    view: Callable[[int, int], memoryview],
    stream: Streamer | None = None,
) -> Iterator[None]:
    """Fills the file with what a shard holds, then makes all of it ready to be read, a little at each step.

    `view`: `[start, stop)` of the weights arena in host memory, until the next call; its slots of the shard stay as
    they are until the last step. `stream`: how it will be read; without one nothing has to be ready.
    """
    try:
        for region, unit, slot in _blocks(geometry, shard):
            block = geometry.start(region, slot)
            for index, begin in enumerate(range(0, region.block_bytes, region.segment_bytes)):
                end = min(begin + region.segment_bytes, region.block_bytes)
                packed.write(region, unit, index, view(block + begin, block + end))
                yield
        if stream is not None:
            yield from packed.map_ahead(stream)
    except OSError:
        return  # the disk is full: loads read the checkpoint, as they would without the file


def _blocks(geometry: Geometry, shard: Shard) -> Iterator[tuple[Region, int, int]]:
    for family, regions in geometry.regions.items():
        for region in regions:
            if not is_packed(geometry.units, region):
                continue
            for slot, unit in enumerate(shard[family]):
                yield region, unit, slot
