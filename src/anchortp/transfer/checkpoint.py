"""Hugging Face safetensors as a source of units: checked up front, read as views of the page cache.

Runs in a worker (loading its own units) or in a tool. Nothing is copied until `Checkpoint.read` writes into an
arena, and then only the rows or columns that the unit owns are touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchortp.errors import CheckpointError
from anchortp.layout import EXPERT, ModelUnits, ReplicatedTensor, UnitTensor
from anchortp.transfer.experts import fused_place
from anchortp.transfer.fingerprint import weight_files

STORED_DTYPES = ("BF16", "F16", "F32")
INDEX_NAME = "model.safetensors.index.json"

# Columns transposed at a time. torch's blocked transpose wants a dense source and one that stays in the L2
# cache; on one thread this ran at 3 to 5 GB/s, against 0.4 to 2.5 GB/s for a plain copy of a transposed view.
PANEL_COLUMNS = 128


class Checkpoint:
    """The tensors of one model folder that its units need. Open with `Checkpoint.open`."""

    def __init__(self, units: ModelUnits, places: dict[str, _Place]):
        self.units = units
        self._places = places  # by tensor name
        self._views: dict[str, Tensor] = {}

    @classmethod
    def open(cls, folder: str | Path, units: ModelUnits) -> Checkpoint:
        """Maps the weight files and checks every tensor that `units` needs: there, of the right shape, of a
        dtype that can be converted. Tensors that are not needed (a tied lm_head) are ignored. Experts may come
        one by one or fused (`transfer.experts`).

        Raises CheckpointError, which names the file and the tensor, what was expected and what was found.
        """
        files = _open_files(Path(folder))
        places = {}
        for name, shape in units.stored_tensors():
            place = _find(files, units, name, shape)
            if place is None:
                raise CheckpointError(
                    f"{folder}: tensor {name} of shape {shape} is missing from the weight files. "
                    f"Download the model again, or check that config.json belongs to it."
                )
            places[name] = place
        return cls(units, places)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor as stored: a view of the mapped file, not to be written to."""
        if name not in self._views:
            self._views[name] = self._places[name].tensor()
        return self._views[name]

    def read(self, tensor: UnitTensor, copy: int, first_unit: int, num_units: int, out: Tensor) -> None:
        """Copies units `[first_unit, first_unit + num_units)` of one copy of `tensor` into `out`.

        `out`: `[num_units * rows, hidden]` of the model's dtype, contiguous; per unit its parts are stacked
        (kv: rows of k, then of v; gate_up: rows of gate, then of up), columns become rows, and what lies
        beyond the end of the checkpoint's tensor becomes zeros.
        """
        assert out.shape == (num_units * tensor.rows, self.units.config.hidden_size), out.shape
        blocks = out.view(num_units, tensor.rows, -1)
        if tensor.family == EXPERT:  # each has checkpoint tensors of its own
            for index in range(num_units):
                self._read_run(tensor, copy, first_unit + index, blocks[index : index + 1])
        else:
            self._read_run(tensor, copy, first_unit, blocks)

    def _read_run(self, tensor: UnitTensor, copy: int, first_unit: int, blocks: Tensor) -> None:
        """Into `blocks` `[units, rows, hidden]`."""
        first_row = 0
        for part in tensor.parts:
            name, start = self.units.stored_at(tensor, part, copy, first_unit)
            stored = self.tensor(name)
            stop = min(start + blocks.shape[0] * part.extent, stored.shape[part.axis])
            start = min(start, stop)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor is: under `name` in `file`; of a fused one, rows `[start, stop)` of `expert`."""

    file: _File
    name: str
    expert: int | None = None
    start: int = 0
    stop: int = 0

    def tensor(self) -> Tensor:
        stored = self.file.tensor(self.name)
        return stored if self.expert is None else stored[self.expert, self.start : self.stop]


def _find(files: dict[str, _File], units: ModelUnits, name: str, shape: tuple[int, ...]) -> _Place | None:
    """Where the tensor called `name` is stored, checked; None if it is not. Raises CheckpointError."""
    if name in files:
        files[name].check(name, shape)
        return _Place(file=files[name], name=name)
    fused = fused_place(name, shape, units.config)
    if fused is None or fused.name not in files:
        return None
    file = files[fused.name]
    file.check(fused.name, fused.shape)
    return _Place(file=file, name=fused.name, expert=fused.expert, start=fused.start, stop=fused.start + shape[0])


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


def _transpose(out: Tensor, source: Tensor) -> None:
    """`out` `[columns, rows]` = `source` `[rows, columns]` transposed, converted to out's dtype."""
    for start in range(0, out.shape[0], PANEL_COLUMNS):
        panel = source[:, start : start + PANEL_COLUMNS].contiguous().to(out.dtype)
        out[start : start + PANEL_COLUMNS].copy_(panel.t())
