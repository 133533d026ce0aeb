"""Matrices in panels (`layout.units`), computed with by oneDNN where they lie in the arena.

A matmul over few rows takes as long as its weights take to be read. Of plain bf16 weights oneDNN makes panels anew
at every call, which takes longer than the reading; of panels it makes nothing. The result is the same, bit for bit.

torch offers such matrices as opaque tensors over memory of their own. Its C interface for compiled models also
makes them over memory that is given to it: that is what is used here. `check_panels` finds out, by computing
something, whether this torch on this CPU takes what we make for panels.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from anchortp.errors import CheckpointError
from anchortp.layout import PANEL_COLUMNS, PANEL_ROWS

_MKLDNN_LAYOUT = "aoti_torch_layout__mkldnn"
_linear = torch.ops.mkldnn._linear_pointwise.default


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A matrix `[rows, columns]` in panels: `memory`, of that shape, has no row where a plain
    matrix has it; `opaque` is oneDNN's view of it."""

    memory: Tensor
    opaque: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.memory.shape


Matrix = Tensor | Panels


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """`x @ weight.T`, for plain matrices and for those in panels."""
    if isinstance(weight, Panels):
        return _linear(x, weight.opaque, None, "none", [], "")
    return F.linear(x, weight)


def take_rows(panels: Tensor, rows: Tensor) -> Tensor:
    """Rows (int64 `[n]`) of a matrix `[.., hidden]` in panels -> plain `[n, hidden]`."""
    pairs = panels.view(torch.int32).view(-1, panels.shape[1] // 2, PANEL_ROWS)
    return pairs[rows // PANEL_ROWS, :, rows % PANEL_ROWS].view(panels.dtype)


def panel_matrix(memory: Tensor) -> Panels:
    """`memory`: `[rows, columns]` of whole panels."""
    rows, columns = memory.shape
    return Panels(memory=memory, opaque=_opaque(memory.data_ptr(), (rows, columns), _descriptor(rows, columns)))


@lru_cache(maxsize=8)
def check_panels(hidden: int) -> None:
    """Raises CheckpointError if torch computes something else with panels than with plain weights."""
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        plain = torch.randn(3 * PANEL_ROWS, hidden, generator=generator).bfloat16()
        x = torch.randn(3, hidden, generator=generator).bfloat16()
        try:
            panels = plain.view(torch.int32).view(3, PANEL_ROWS, -1).transpose(1, 2).contiguous()
            panels = panels.view(torch.bfloat16).view(plain.shape)
            same = torch.allclose(linear(x, panel_matrix(panels)), F.linear(x, plain), rtol=2e-2, atol=1e-1)
        except (AttributeError, RuntimeError, NotImplementedError, _Refused) as error:
            raise CheckpointError(
                f"this torch has no matrices in panels ({error}); start with --weights plain."
            ) from error
    if not same:
        raise CheckpointError("this torch has weights in other panels than AnchorTP; start with --weights plain.")


def warm_up() -> None:
    """[zygote] Learns once, for all workers, what describes weights in panels; where there are none, nothing."""
    with contextlib.suppress(*_ABSENT):
        _pattern()


class _Refused(Exception):
    """torch does not make the tensor."""


_ABSENT = (AttributeError, RuntimeError, _Refused)


@lru_cache(maxsize=64)
def _descriptor(num_rows: int, hidden: int) -> bytes:
    """oneDNN's description of weights in panels of that size.

    Its words are constant, or grow evenly with the rows or with the columns, so it is extrapolated from small
    ones: to ask for it would mean to make a matrix of that size.
    """
    first, per_panel, per_columns = _pattern()
    panels, columns = num_rows // PANEL_ROWS - 1, hidden // PANEL_COLUMNS - 2
    words = [w + panels * p + columns * c for w, p, c in zip(first, per_panel, per_columns, strict=True)]
    return struct.pack(f"<{len(words)}i", *words)


@lru_cache(maxsize=1)
def _pattern() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The description of one panel with two columns' worth of `PANEL_COLUMNS`, and what one more of each adds."""
    first, taller, wider, both = (_words(r, c) for r, c in ((1, 2), (2, 2), (1, 3), (3, 4)))
    per_panel = tuple(b - a for a, b in zip(first, taller, strict=True))
    per_columns = tuple(b - a for a, b in zip(first, wider, strict=True))
    if both != tuple(w + 2 * p + 2 * c for w, p, c in zip(first, per_panel, per_columns, strict=True)):
        raise _Refused("its descriptions of weights in panels do not grow evenly")
    return first, per_panel, per_columns


def _words(num_panels: int, num_columns: int) -> tuple[int, ...]:
    plain = torch.zeros(num_panels * PANEL_ROWS, num_columns * PANEL_COLUMNS, dtype=torch.bfloat16)
    opaque = torch.ops.mkldnn._reorder_linear_weight(plain, 1)
    if torch.ops.mkldnn._nbytes(opaque) != plain.nbytes:
        raise _Refused("its weights in panels are larger than plain ones")
    serialized = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(opaque).tolist())
    return struct.unpack(f"<{len(serialized) // 4}i", serialized)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    int64s, int32 = ctypes.POINTER(ctypes.c_int64), ctypes.c_int32
    create = library.aoti_torch_create_tensor_from_blob_v2
    create.restype = int32
    create.argtypes = [
        ctypes.c_void_p,  # data
        ctypes.c_int64,  # dimensions
        int64s,  # sizes
        int64s,  # strides
        ctypes.c_int64,  # storage offset
        int32,  # dtype
        int32,  # device type
        int32,  # device index
        ctypes.POINTER(ctypes.c_void_p),  # the tensor
        int32,  # layout
        ctypes.c_char_p,  # opaque metadata
        ctypes.c_int64,  # its size
    ]
    return library


def _opaque(data: int, shape: tuple[int, int], descriptor: bytes) -> Tensor:
    library, handle = _library(), ctypes.c_void_p()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        data,
        2,
        (ctypes.c_int64 * 2)(*shape),
        (ctypes.c_int64 * 2)(shape[1], 1),
        0,
        library.aoti_torch_dtype_bfloat16(),
        library.aoti_torch_device_type_cpu(),
        0,
        ctypes.byref(handle),
        getattr(library, _MKLDNN_LAYOUT)(),
        descriptor,
        len(descriptor),
    )
    if failed:
        raise _Refused("its C interface refuses weights in panels")
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(handle))


def _capsule(handle: ctypes.c_void_p) -> object:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(handle.value, None, None)
