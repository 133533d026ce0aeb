"""Hugging Face safetensors as a source of units: checked up front, read as views of the page cache.

Runs in a worker (loading its own units) or in a tool. Nothing is copied until `Checkpoint.read` writes into an
arena, and then only the rows or columns that the unit owns are touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchortp.errors import CheckpointError
from anchortp.layout import PANEL_ROWS, ModelUnits, ReplicatedTensor, Source, UnitTensor
from anchortp.transfer.fingerprint import weight_files

STORED_DTYPES = ("BF16", "F16", "F32")
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
        """Copies units `[first_unit, first_unit + num_units)` of `tensor` in `layer` into `out`.

        `out`: `[num_units * rows, hidden]` of the model's dtype, contiguous; per unit its parts are stacked
        (kv: rows of k, then of v; gate_up: rows of gate, then of up), columns become rows, and what lies
        beyond the end of the checkpoint's tensor becomes zeros. A packed tensor is packed after that.
        """
        assert out.shape == (num_units * tensor.rows, self.units.config.hidden_size), out.shape
        if self.units.is_packed(tensor):
            plain = torch.empty_like(out)
            self._read_plain(tensor, layer, first_unit, num_units, plain)
            _pack(plain, out)
        else:
            self._read_plain(tensor, layer, first_unit, num_units, out)

    def _read_plain(self, tensor: UnitTensor, layer: int, first_unit: int, num_units: int, out: Tensor) -> None:
        blocks = out.view(num_units, tensor.rows, -1)
        first_row = 0
        for part in tensor.parts:
            stored = self.tensor(part.name.format(layer=layer))
            stop = min((first_unit + num_units) * part.extent, stored.shape[part.axis])
            start = min(first_unit * part.extent, stop)
            source = stored[start:stop] if part.axis == 0 else stored[:, start:stop].t()
            _copy_units(blocks[:, first_row : first_row + part.extent], source)
            first_row += part.extent

    def read_replicated(self, tensor: ReplicatedTensor, layer: int, out: Tensor) -> None:
        """Copies a whole replicated tensor into `out` (its shape, the model's dtype)."""
        out.copy_(self.tensor(tensor.name.format(layer=layer)))


class _File:
    """One mapped safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # On CPU `get_tensor` of this handle is a view of the mapping (no byte is read before it is used).
            self._handle = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing. Download the model again.") from None
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size if path.is_file() else 0
            raise CheckpointError(
                f"{path} ({size} bytes) is not a whole safetensors file: {error}. Download it again."
            ) from None
        self.names = frozenset(self._handle.keys())

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


def _copy_units(blocks: Tensor, source: Tensor) -> None:
    """`source` `[n, hidden]` into the rows of `blocks` `[units, extent, hidden]`, zeros after its end."""
    num_units, extent = blocks.shape[:2]
    whole, rest = divmod(source.shape[0], extent)
    _copy_rows(blocks[:whole], source[: whole * extent])
    if whole < num_units:
        blocks[whole, :rest].copy_(source[whole * extent :])
        blocks[whole, rest:].zero_()
        blocks[whole + 1 :].zero_()


def _copy_rows(blocks: Tensor, source: Tensor) -> None:
    """`source` `[units * extent, hidden]` into `blocks` `[units, extent, hidden]`; fast if source is transposed."""
    if source.is_contiguous():
        blocks.copy_(source.view(blocks.shape))
    elif blocks.is_contiguous():
        _transpose(blocks.view(source.shape), source.t())
    else:
        for block, rows in zip(blocks, source.split(blocks.shape[1]), strict=True):
            _transpose(block, rows.t())


def _pack(plain: Tensor, out: Tensor) -> None:
    """Writes `plain` `[rows, hidden]`, bfloat16, into `out`, of the same shape, in panels (`layout.units`)."""
    num_pairs = plain.shape[1] // 2
    sources = plain.view(torch.int32).view(-1, PANEL_ROWS, num_pairs)
    panels = out.view(torch.int32).view(-1, num_pairs, PANEL_ROWS)
    for source, panel in zip(sources, panels, strict=True):  # one by one: torch's fast transpose is for matrices
        panel.copy_(source.t())


def _transpose(out: Tensor, source: Tensor) -> None:
    """`out` `[columns, rows]` = `source` `[rows, columns]` transposed, converted to out's dtype."""
    for start in range(0, out.shape[0], PANEL_COLUMNS):
        panel = source[:, start : start + PANEL_COLUMNS].contiguous().to(out.dtype)
        out[start : start + PANEL_COLUMNS].copy_(panel.t())
