"""Hugging Face safetensors as a source of units: checked up front, read as views of the page cache.

Runs in a worker (loading its own units) or in a tool. Nothing is copied until `Checkpoint.read` writes into an
arena, and then only the rows or columns that the unit owns are touched.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchortp.errors import CheckpointError
from anchortp.layout import ModelUnits, ReplicatedTensor, Source, UnitTensor
from anchortp.transfer.fingerprint import weight_files

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED_DTYPES = tuple(TORCH_DTYPES)
INDEX_NAME = "model.safetensors.index.json"

# Columns transposed at a time. torch's blocked transpose wants a dense source and one that stays in the L2
# cache; on one thread this ran at 3 to 5 GB/s, against 0.4 to 2.5 GB/s for a plain copy of a transposed view.
PANEL_COLUMNS = 128


class Checkpoint:
    """The tensors of one model folder that its units need. Open with `Checkpoint.open`."""

    def __init__(self, units: ModelUnits, files: dict[str, _File]):
        self.units = units
        self._files = files  # by tensor name
        self._views: dict[str, Tensor] = {}

    @classmethod
    def open(cls, folder: str | Path, units: ModelUnits) -> Checkpoint:
        """Maps the weight files and checks every tensor that `units` needs: there, of the right shape, of a
        dtype that can be converted. Tensors that are not needed (a tied lm_head) are ignored.

        Raises CheckpointError, which names the file and the tensor, what was expected and what was found.
        """
        files = _open_files(Path(folder))
        needed: dict[str, _File] = {}
        for name, shape in _expected_shapes(units):
            if name not in files:
                raise CheckpointError(
                    f"{folder}: tensor {name} of shape {shape} is missing from the weight files. "
                    f"Download the model again, or check that config.json belongs to it."
                )
            files[name].check(name, shape)
            needed[name] = files[name]
        return cls(units, needed)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor as stored: a view of the mapped file, not to be written to."""
        if name not in self._views:
            self._views[name] = self._files[name].tensor(name)
        return self._views[name]

    def read(self, tensor: UnitTensor, layer: int, first_unit: int, num_units: int, out: Tensor) -> None:
        """Copies units `[first_unit, first_unit + num_units)` of `tensor` in `layer` into `out`, all their rows."""
        assert out.shape[0] == num_units * tensor.rows, out.shape
        self.read_rows(tensor, layer, first_unit, 0, out)

    def read_rows(self, tensor: UnitTensor, layer: int, first_unit: int, first_row: int, out: Tensor) -> None:
        """Copies rows of `tensor` in `layer` into `out`, from row `first_row` of unit `first_unit` on.

        `out`: `[rows, hidden]` of the model's dtype, contiguous, over any number of units. In each unit its parts
        are stacked (kv: rows of k, then of v; gate_up: rows of gate, then of up), columns become rows, and what
        lies beyond the end of the checkpoint's tensor becomes zeros.

        Raises CheckpointError when the file has become shorter, OSError when it cannot be read.
        """
        assert out.is_contiguous() and out.shape[1] == self.units.config.hidden_size, out.shape
        for part, index, row, count in _stretches(tensor, first_unit, first_row, out.shape[0]):
            file, name = self._file(part.name.format(layer=layer))
            present = max(0, min(count, file.shape(name)[part.axis] - index))
            out[row + present : row + count].zero_()
            rows = out[row : row + present]
            if not present:
                continue
            if part.axis == 1:
                file.check_size()
                _transpose(rows, self.tensor(name)[:, index : index + present])
            elif not file.read_rows(name, index, rows):
                rows.copy_(self.tensor(name)[index : index + present])  # it has to be converted

    def read_replicated(self, tensor: ReplicatedTensor, layer: int, out: Tensor) -> None:
        """Copies a whole replicated tensor into `out` (its shape, the model's dtype)."""
        file, name = self._file(tensor.name.format(layer=layer))
        file.check_size()
        out.copy_(self.tensor(name))

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a weight file was written to since it was opened."""
        for file in set(self._files.values()):
            file.check_unchanged()

    def prefetch(self, tensor: UnitTensor, layer: int, first_unit: int, first_row: int, num_rows: int) -> None:
        """Asks the system to read those rows from disk soon. Of a tensor that is cut along its columns that means
        all of it: each of its pages holds a few bytes of every unit."""
        for part, index, _, count in _stretches(tensor, first_unit, first_row, num_rows):
            file, name = self._file(part.name.format(layer=layer))
            file.prefetch(name, *((index, index + count) if part.axis == 0 else (0, file.shape(name)[0])))

    def _file(self, name: str) -> tuple[_File, str]:
        return self._files[name], name


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
        self._opened = os.fstat(self._reader.fileno())
        (header_bytes,) = struct.unpack("<Q", self._reader.read(8))
        header = json.loads(self._reader.read(header_bytes))
        data_at = 8 + header_bytes
        # Per tensor: dtype, shape, where its bytes begin in the file.
        self._where: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: (entry["dtype"], tuple(entry["shape"]), data_at + entry["data_offsets"][0])
            for name, entry in header.items()
            if name in self.names
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][1]

    def read_rows(self, name: str, first_row: int, out: Tensor) -> bool:
        """Reads rows of a tensor straight into `out`; False if they are stored in another dtype.

        A read costs no page faults on the file's side, and tells of a file that has become short (a mapping would
        end the process).
        """
        dtype, shape, start = self._where[name]
        if TORCH_DTYPES[dtype] != out.dtype:
            return False
        row_bytes = shape[1] * out.element_size()
        fill(self._reader.fileno(), start + first_row * row_bytes, memoryview(out.view(torch.uint8).numpy()).cast("B"))
        return True

    def prefetch(self, name: str, first_row: int, last_row: int) -> None:
        dtype, shape, start = self._where[name]
        row_bytes = shape[1] * TORCH_DTYPES[dtype].itemsize
        os.posix_fadvise(
            self._reader.fileno(),
            start + first_row * row_bytes,
            (last_row - first_row) * row_bytes,
            os.POSIX_FADV_WILLNEED,
        )

    def check_size(self) -> None:
        """Before bytes are read through the mapping. Raises CheckpointError if the file has been cut off."""
        size = os.fstat(self._reader.fileno()).st_size
        if size < self._opened.st_size:
            raise CheckpointError(f"{self.path} now ends after {size} bytes. Download the model again.")

    def check_unchanged(self) -> None:
        now = os.fstat(self._reader.fileno())
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


def _expected_shapes(units: ModelUnits) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every checkpoint tensor that the units need, with its shape in elements."""
    for tensor in units.tensors:
        for part in tensor.parts:
            shape = _stored_shape(units, tensor, part)
            for layer in range(units.num_copies(tensor)):
                yield part.name.format(layer=layer), shape
    for replicated in units.replicated:
        for layer in range(units.num_copies(replicated)):
            yield replicated.name.format(layer=layer), replicated.shape


def _stored_shape(units: ModelUnits, tensor: UnitTensor, part: Source) -> tuple[int, int]:
    hidden = units.config.hidden_size
    # Only the vocabulary may end within a unit; the rest of its last unit is padding.
    extent = units.config.vocab_size if not tensor.per_layer else units.num_units[tensor.family] * part.extent
    return (extent, hidden) if part.axis == 0 else (hidden, extent)


def _stretches(
    tensor: UnitTensor, first_unit: int, first_row: int, num_rows: int
) -> Iterator[tuple[Source, int, int, int]]:
    """The longest stretches of rows that lie together in the checkpoint: part, index along its axis, row in the
    output, number of rows. Rows count from the first of unit `first_unit`."""
    last: tuple[Source, int, int, int] | None = None
    row = 0
    while row < num_rows:
        unit, inside = divmod(first_row + row, tensor.rows)
        for part in tensor.parts:
            if inside < part.extent:
                break
            inside -= part.extent
        count = min(part.extent - inside, num_rows - row)
        index = (first_unit + unit) * part.extent + inside
        if last is not None and last[0] is part and last[1] + last[3] == index:
            last = (part, last[1], last[2], last[3] + count)
        else:
            if last is not None:
                yield last
            last = (part, index, row, count)
        row += count
    if last is not None:
        yield last


def fill(fd: int, start: int, out: memoryview) -> None:
    """Reads from `start` of a file until `out` is full. Raises CheckpointError if the file ends before."""
    done = 0
    while done < len(out):
        num_bytes = os.preadv(fd, [out[done:]], start + done)
        if num_bytes == 0:
            raise CheckpointError(f"a weight file ends at byte {start + done}, {len(out) - done} too early")
        done += num_bytes


def _transpose(out: Tensor, source: Tensor) -> None:
    """`out` `[columns, rows]` = `source` `[rows, columns]` transposed, converted to out's dtype."""
    for start in range(0, out.shape[0], PANEL_COLUMNS):
        panel = source[:, start : start + PANEL_COLUMNS].contiguous().to(out.dtype)
        out[start : start + PANEL_COLUMNS].copy_(panel.t())
