"""Hugging Face safetensors as a source of units: checked up front, read as views of the page cache.

Runs in a worker (loading its own units) or in a tool. Nothing is copied until `Checkpoint.read` writes into an
arena, and then only the rows or columns that the unit owns are touched.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchortp.arena import IntervalSet
from anchortp.arena.pages import pages_to_read
from anchortp.errors import CheckpointError
from anchortp.layout import EXPERT, PANEL_ROWS, ModelUnits, ReplicatedTensor, UnitTensor
from anchortp.transfer.experts import fused_place
from anchortp.transfer.fingerprint import fingerprint, weight_files
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.work import Chunk

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED_DTYPES = tuple(TORCH_DTYPES)
INDEX_NAME = "model.safetensors.index.json"

_MAX_IOVECS = 1024  # IOV_MAX of Linux

# What one call asks the disk for. Of a larger range the kernel reads no more than the device's read-ahead
# (`read_ahead_kb`), of which this is the usual size, and forgets the rest.
ASK_BYTES = 128 << 10
LOOK_BYTES = 1 << 20  # whether so many bytes are cached is told by one in the middle
NUM_LOOKS = 8  # of a larger range, and if they find all of it cached the rest is believed to be

# Columns transposed at a time. torch's blocked transpose wants a dense source and one that stays in the L2
# cache; on one thread this ran at 3 to 5 GB/s, against 0.4 to 2.5 GB/s for a plain copy of a transposed view.
STRIP_COLUMNS = 128
STREAMED_BYTES = 2 << 20  # of columns, by our kernels: the more of a row at a time the better, up to all of it

# Panels (`layout.units`) that are read before they are turned, one at least: they stay in the L2 cache.
PANELS_BYTES = 512 << 10


class Checkpoint:
    """The tensors of one model folder that its units need. Open with `Checkpoint.open`."""

    def __init__(self, units: ModelUnits, places: dict[str, _Place], stream: Streamer | None = None):
        self.units = units
        self._stream = stream
        self._places = places  # by tensor name
        self._views: dict[str, Tensor] = {}
        self._ready = IntervalSet()  # addresses in the files' mappings: pages that were mapped ahead
        self._zeros = torch.zeros(units.config.hidden_size, dtype=getattr(torch, units.config.dtype))  # beyond the end

    @classmethod
    def open(
        cls, folder: str | Path, units: ModelUnits, expected: str | None = None, stream: Streamer | None = None
    ) -> Checkpoint:
        """Maps the weight files and checks every tensor that `units` needs: there, of the right shape, of a
        dtype that can be converted. Tensors that are not needed (a tied lm_head) are ignored. Experts may come
        one by one or fused (`transfer.experts`). `stream`: what rearranges weights; else torch does,
        more slowly.

        `expected`: the folder's fingerprint (`transfer.fingerprint`) as it was when its weights were first served.
        What has changed since is refused, however well it would fit.

        Raises CheckpointError, which names the file and the tensor, what was expected and what was found.
        """
        files = _open_files(Path(folder))
        # Not before: a file that is replaced in between would pass.
        if expected is not None and fingerprint(folder, units.config) != expected:
            raise CheckpointError(
                f"the checkpoint in {folder} was changed since it was first served. Restore its files, with their "
                f"times, or restart with the new weights."
            )
        places = {}
        for name, shape in units.stored_tensors():
            place = _find(files, units, name, shape)
            if place is None:
                raise CheckpointError(
                    f"{folder}: tensor {name} of shape {shape} is missing from the weight files. "
                    f"Download the model again, or check that config.json belongs to it."
                )
            places[name] = place
        return cls(units, places, stream)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor as stored: a view of the mapped file, not to be written to."""
        if name not in self._views:
            self._views[name] = self._places[name].tensor()
        return self._views[name]

    def read(self, tensor: UnitTensor, copy: int, first_unit: int, num_units: int, out: Tensor) -> None:
        """Copies units `[first_unit, first_unit + num_units)` of one copy of `tensor` into `out`, all their rows."""
        assert out.shape[0] == num_units * tensor.rows, out.shape
        self.read_rows(tensor, copy, first_unit, 0, out)

    def read_rows(
        self,
        tensor: UnitTensor,
        copy: int,
        first_unit: int,
        first_row: int,
        out: Tensor,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Copies rows of one copy of `tensor` into `out`, from row `first_row` of unit `first_unit` on.

        `out`: `[rows, hidden]` of the model's dtype, contiguous, over any number of units. In each unit its parts
        are stacked (kv: rows of k, then of v; gate_up: rows of gate, then of up), columns become rows, and what
        lies beyond the end of the checkpoint's tensor becomes zeros. Rows of a tensor in panels (`layout.units`) must
        be whole panels. `check` is called now and then, and may raise.

        Raises CheckpointError when the file has become shorter, OSError when it cannot be read.
        """
        assert out.is_contiguous() and out.shape[1] == self.units.config.hidden_size, out.shape
        if not self.units.in_panels(tensor):
            self._read_plain(tensor, copy, first_unit, first_row, out, check)
            return
        assert first_row % PANEL_ROWS == 0 and out.shape[0] % PANEL_ROWS == 0, (first_row, out.shape)
        panels_at_once = max(1, PANELS_BYTES // self.units.piece_bytes(tensor))
        plain = out.new_empty(panels_at_once * PANEL_ROWS, out.shape[1])
        for start in range(0, out.shape[0], plain.shape[0]):
            panels = out[start : start + plain.shape[0]]
            rows = plain[: panels.shape[0]]
            self._read_plain(tensor, copy, first_unit, first_row + start, rows, check)
            (self._stream.panels if self._stream else _to_panels)(rows, panels)

    def _read_plain(
        self, tensor: UnitTensor, copy: int, first_unit: int, first_row: int, out: Tensor, check: Callable[[], None]
    ) -> None:
        check()
        pending: dict[str, list[_Stretch]] = {}
        for stretch in self._stretches(tensor, copy, first_unit, first_row, out.shape[0]):
            shape = self._places[stretch.name].shape
            if stretch.index + stretch.count > shape[stretch.axis]:
                present = max(0, shape[stretch.axis] - stretch.index)
                out[stretch.row + present : stretch.row + stretch.count].zero_()
                stretch.count = present
            if stretch.count:
                pending.setdefault(stretch.name, []).append(stretch)
        for name, stretches in pending.items():
            place = self._places[name]
            if stretches[0].axis == 0 and place.read_rows(stretches, out):
                continue
            place.file.check_size()
            for x in stretches:
                rows = out[x.row : x.row + x.count]
                if x.axis == 1:
                    _transpose(rows, self.tensor(name)[:, x.index : x.index + x.count], check, self._stream)
                else:
                    rows.copy_(self.tensor(name)[x.index : x.index + x.count])  # it is converted

    def read_replicated(self, tensor: ReplicatedTensor, layer: int, out: Tensor) -> None:
        """Copies a whole replicated tensor into `out` (its shape, the model's dtype)."""
        name = tensor.name.format(layer=layer)
        self._places[name].file.check_size()
        out.copy_(self.tensor(name))

    def prefetch(self, tensor: UnitTensor, copy: int, first_unit: int, first_row: int, num_rows: int) -> None:
        """Asks the system to read those rows from disk soon, where they are not in the page cache. Of a tensor that
        is cut along its columns that means all of it: each of its pages holds a few bytes of every unit."""
        spans: dict[int, IntervalSet] = defaultdict(IntervalSet)  # by descriptor
        for x in self._stretches(tensor, copy, first_unit, first_row, num_rows):
            place = self._places[x.name]
            start, stop = place.span(x.index, x.count) if x.axis == 0 else place.span(0, place.shape[0])
            spans[place.file.fd].add(start, stop)
        for fd, ranges in spans.items():
            for start, stop in ranges:
                ask_ahead(fd, start, stop)

    def stream_rows(self, chunk: Chunk, out: Tensor) -> list[int] | None:
        """Fills `out` (uint8, the bytes of a chunk) as `read_rows` would, in one pass over pages that were mapped
        ahead, and returns the digests of the chunk's segments. None, and nothing is done, where that cannot be."""
        tensor, hidden = chunk.region.tensor, self.units.config.hidden_size
        if self._stream is None or not isinstance(tensor, UnitTensor) or tensor.parts[0].axis or not chunk.is_whole:
            return None
        row_bytes = hidden * self.units.config.dtype_bytes
        rows = np.full(chunk.num_bytes // row_bytes, self._zeros.data_ptr(), np.int64)
        for x in self._stretches(tensor, chunk.region.copy, chunk.unit, chunk.first_byte // row_bytes, len(rows)):
            stored = self.tensor(x.name)
            start, count = stored.data_ptr() + x.index * row_bytes, max(0, min(x.count, len(stored) - x.index))
            if not count:
                continue
            if stored.dtype != self._zeros.dtype or not self._ready.covers(start, start + count * row_bytes):
                return None
            self._places[x.name].file.check_size()
            rows[x.row : x.row + count] = np.arange(start, start + count * row_bytes, row_bytes)
        return self._stream.rows(chunk, rows, row_bytes, self.units.in_panels(tensor), out)

    def map_ahead(self) -> Iterator[None]:
        """Maps the pages of the files where they are in the page cache, some at each step, so that loads need not: of
        a unit's columns there are a few bytes on each page of a tensor. One thread at a time; others may read
        meanwhile."""
        for name, place in self._places.items():
            if len(place.shape) == 2:  # norms are small
                yield from self._map_tensor(name)

    def _map_tensor(self, name: str) -> Iterator[None]:
        place, stored = self._places[name], self.tensor(name)
        rows = max(1, LOOK_BYTES // (stored.stride(0) * stored.itemsize))
        for first in range(0, stored.shape[0], rows):
            start, stop = place.span(first, rows)
            part = stored[first : first + rows]
            if is_cached(place.file.fd, (start + stop) // 2):
                if not pages_to_read(part.data_ptr(), part.nbytes):
                    return
                ready = self._ready.copy()
                ready.add(part.data_ptr(), part.data_ptr() + part.nbytes)
                self._ready = ready
            yield

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a weight file was written to since it was opened."""
        for file in {place.file for place in self._places.values()}:
            file.check_unchanged()

    def _stretches(
        self, tensor: UnitTensor, copy: int, first_unit: int, first_row: int, num_rows: int
    ) -> Iterator[_Stretch]:
        """The longest runs of rows that lie together in the checkpoint, in order."""
        if len(tensor.parts) == 1 and tensor.family != EXPERT:  # those of all units do
            name, index = self.units.stored_at(tensor, tensor.parts[0], copy, first_unit)
            yield _Stretch(name=name, axis=tensor.parts[0].axis, index=index + first_row, row=0, count=num_rows)
            return
        last: _Stretch | None = None
        row = 0
        while row < num_rows:
            unit, inside = divmod(first_row + row, tensor.rows)
            for part in tensor.parts:
                if inside < part.extent:
                    break
                inside -= part.extent
            name, index = self.units.stored_at(tensor, part, copy, first_unit + unit)
            count = min(part.extent - inside, num_rows - row)
            if last is not None and last.name == name and last.index + last.count == index + inside:
                last.count += count
            else:
                if last is not None:
                    yield last
                last = _Stretch(name=name, axis=part.axis, index=index + inside, row=row, count=count)
            row += count
        if last is not None:
            yield last


@dataclass(slots=True, kw_only=True)
class _Stretch:
    """`count` indices from `index` on of an axis of a stored tensor; they become rows from `row` on."""

    name: str
    axis: int
    index: int
    row: int
    count: int


class _File:
    """One safetensors file: its header, a mapping and a descriptor."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # On CPU `get_tensor` of this handle is a view of the mapping (no byte is read before it is used).
            self._handle = safe_open(path, framework="pt", device="cpu")
            self._reader = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing. Download the model again.") from None
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size if path.is_file() else 0
            raise CheckpointError(
                f"{path} ({size} bytes) is not a whole safetensors file: {error}. Download it again."
            ) from None
        self.names = frozenset(self._handle.keys())
        self.fd = self._reader.fileno()
        self._opened = os.fstat(self.fd)
        (header_bytes,) = struct.unpack("<Q", self._reader.read(8))
        self._header = json.loads(self._reader.read(header_bytes))
        self._data_at = 8 + header_bytes

    def where(self, name: str) -> tuple[torch.dtype, int]:
        """Of a tensor that was checked: its dtype, and where its bytes begin in the file."""
        entry = self._header[name]
        return TORCH_DTYPES[entry["dtype"]], self._data_at + entry["data_offsets"][0]

    def check_size(self) -> None:
        """Before bytes are read through the mapping, which would end the process where the file has been cut off.
        Raises CheckpointError."""
        size = os.fstat(self.fd).st_size
        if size < self._opened.st_size:
            raise CheckpointError(f"{self.path} now ends after {size} bytes. Download the model again.")

    def check_unchanged(self) -> None:
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise CheckpointError(
                f"{self.path} was written to while it was being served. Restore it, or restart with the new weights."
            )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.names:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {shape} is missing, though {INDEX_NAME} says that it is "
                f"there. Download the model again."
            )
        stored = self._handle.get_slice(name)
        found, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if found != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {found}, expected {shape} from config.json. "
                f"Check that config.json belongs to these weights."
            )
        if dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {dtype}, expected one of {', '.join(STORED_DTYPES)}. "
                f"Convert the checkpoint to bfloat16."
            )

    def tensor(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor of `shape` is: under `name` in `file`; of a fused one, rows from `start` on of `expert`."""

    file: _File
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    expert_rows: int = 0
    start: int = 0

    def tensor(self) -> Tensor:
        stored = self.file.tensor(self.name)
        return stored if self.expert is None else stored[self.expert, self.start : self.start + self.shape[0]]

    def read_rows(self, stretches: Sequence[_Stretch], out: Tensor) -> bool:
        """Reads rows, which follow one another here, straight into their places in `out`; False if they are stored
        in another dtype.

        This costs no page faults on the file's side, and tells of a file that has become short.
        """
        dtype, start = self._row_at(stretches[0].index)
        if dtype != out.dtype:
            return False
        view, row_bytes = memoryview(out.view(torch.uint8).numpy()).cast("B"), out.shape[1] * dtype.itemsize
        fill(self.file.fd, start, [view[x.row * row_bytes : (x.row + x.count) * row_bytes] for x in stretches])
        return True

    def span(self, first_row: int, num_rows: int) -> tuple[int, int]:
        """Where rows are, as far as there are so many: the first byte in the file, and the one after the last."""
        start, stop = (self._row_at(min(row, self.shape[0]))[1] for row in (first_row, first_row + num_rows))
        return start, stop

    def _row_at(self, row: int) -> tuple[torch.dtype, int]:
        dtype, start = self.file.where(self.name)
        before = row + self.start + (self.expert or 0) * self.expert_rows
        return dtype, start + before * self.shape[1] * dtype.itemsize


def _find(files: dict[str, _File], units: ModelUnits, name: str, shape: tuple[int, ...]) -> _Place | None:
    """Where the tensor called `name` is stored, checked; None if it is not. Raises CheckpointError."""
    if name in files:
        files[name].check(name, shape)
        return _Place(file=files[name], name=name, shape=shape)
    fused = fused_place(name, shape, units.config)
    if fused is None or fused.name not in files:
        return None
    file = files[fused.name]
    file.check(fused.name, fused.shape)
    rows = fused.shape[1] if fused.expert is not None else 0
    return _Place(file=file, name=fused.name, shape=shape, expert=fused.expert, expert_rows=rows, start=fused.start)


def _open_files(folder: Path) -> dict[str, _File]:
    """Tensor name -> the file that holds it, by the index if there is one, else by the files' own headers."""
    if (folder / INDEX_NAME).exists():
        return _open_indexed(folder)
    paths = weight_files(folder)
    if not paths:
        raise CheckpointError(
            f"{folder} holds no *.safetensors file. Give a folder with safetensors weights; convert others first "
            f"(transformers: save_pretrained)."
        )
    if len(paths) > 1 and folder / "model.safetensors" in paths:
        paths = (folder / "model.safetensors",)  # others beside it are adapters or copies in other formats
    return {name: file for file in map(_File, paths) for name in file.names}


def _open_indexed(folder: Path) -> dict[str, _File]:
    path = folder / INDEX_NAME
    try:
        weight_map: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no usable weight_map: {error!r}. Download it again.") from None
    opened: dict[str, _File] = {}
    for file in sorted(set(names.values())):
        opened[file] = _File(folder / file)
    return {name: opened[file] for name, file in names.items()}


def fill(fd: int, start: int, out: list[memoryview]) -> None:
    """Reads from `start` of a file until all of `out`, in order, is full. Raises CheckpointError if the file ends."""
    while out:
        count = num_bytes = os.preadv(fd, out[:_MAX_IOVECS], start)
        if num_bytes == 0:
            raise CheckpointError(f"a weight file ends at byte {start}, {sum(map(len, out))} too early")
        start += num_bytes
        while out and count >= len(out[0]):
            count -= len(out[0])
            out = out[1:]
        if count:
            out = [out[0][count:], *out[1:]]


def is_cached(fd: int, at: int) -> bool:
    """Whether a byte of a file can be had without waiting for the disk."""
    try:
        return os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return False
        raise


def ask_ahead(fd: int, start: int, stop: int) -> None:
    """Asks the system to read bytes `[start, stop)` of a file from disk soon, where they are not in the page cache."""
    pieces = range(start & -mmap.PAGESIZE, stop, LOOK_BYTES)
    first_looks = pieces[:: max(1, len(pieces) // NUM_LOOKS)]
    if any([_ask_for_piece(fd, at, stop) for at in first_looks]):
        for at in pieces:
            if at not in first_looks:
                _ask_for_piece(fd, at, stop)


def _ask_for_piece(fd: int, start: int, stop: int) -> bool:
    """Whether the piece of a range that begins at `start` was not there. To look makes the kernel read some pages, so
    nobody looks twice: it would be taken for all of the piece."""
    stop = min(start + LOOK_BYTES, stop)
    if is_cached(fd, (start + stop) // 2):
        return False
    for at in range(start, stop, ASK_BYTES):
        os.posix_fadvise(fd, at, min(ASK_BYTES, stop - at), os.POSIX_FADV_WILLNEED)
    return True


def _to_panels(plain: Tensor, out: Tensor) -> None:
    """Writes `plain` `[rows, hidden]`, bfloat16, into `out`, of the same shape, in panels (`layout.units`)."""
    num_pairs = plain.shape[1] // 2
    sources = plain.view(torch.int32).view(-1, PANEL_ROWS, num_pairs)
    panels = out.view(torch.int32).view(-1, num_pairs, PANEL_ROWS)
    for source, panel in zip(sources, panels, strict=True):  # one by one: torch's fast transpose is for matrices
        panel.copy_(source.t())


def _transpose(
    out: Tensor, source: Tensor, check: Callable[[], None] = lambda: None, stream: Streamer | None = None
) -> None:
    """`out` `[columns, rows]` = `source` `[rows, columns]` transposed, converted to out's dtype."""
    columns = STRIP_COLUMNS
    if stream is not None and source.dtype == out.dtype:
        columns = max(columns, STREAMED_BYTES // out[0].nbytes // STRIP_COLUMNS * STRIP_COLUMNS)
    for start in range(0, out.shape[0], columns):
        check()
        strip, rows = source[:, start : start + columns], out[start : start + columns]
        if stream is None or not stream.columns(strip, rows):
            rows.copy_(strip.contiguous().to(out.dtype).t())
