"""The compiled kernels, as Python calls them, and what they take. Free of torch.

Pointers are addresses (`Tensor.data_ptr`); a call holds no lock of the interpreter.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

from anchortp.errors import ConfigError

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

DONE, ABORTED, TIMED_OUT, MISMATCH = range(4)  # how a collective ends


class GroupMemory(ctypes.Structure):
    """`Group` in group.h: one rank's view of a region. It does not keep the memory alive."""

    _fields_ = (
        ("words", _POINTER),
        ("slots", _POINTER),
        ("slot_bytes", _INT),
        ("size", _INT),
        ("rank", _INT),
        ("two_phase_from", _INT),
        ("timeout_ns", _INT),
        ("avoid_yield_until_ns", _INT),
    )


class Layer(ctypes.Structure):
    """`Layer` in layers.h: where the weights and the cache of one layer are."""

    _fields_ = tuple(
        (name, _POINTER)
        for name in ("input_norm", "post_norm", "q_norm", "k_norm", "q", "kv", "o", "gate_up", "down", "cache")
    )


class Shapes(ctypes.Structure):
    """`Shapes` in layers.h."""

    _fields_ = (
        *((name, _INT) for name in ("hidden", "num_q", "num_kv", "head_dim", "num_columns", "block", "block_size")),
        ("plane_tokens", _INT),
        *((name, _POINTER) for name in ("readers", "reader_starts", "cos", "sin")),
        ("eps", _FLOAT),
    )


class Rows(ctypes.Structure):
    """`Rows` in layers.h: one step's tokens."""

    _fields_ = (
        ("num", _INT),
        ("num_sequences", _INT),
        *((name, _POINTER) for name in ("positions", "cache_slots", "rows", "starts", "blocks", "last_tokens")),
    )


_KERNELS = {
    "add_norm": [_POINTER] * 4 + [_INT] * 2 + [_FLOAT],
    "silu_mul": [_POINTER] * 2 + [_INT] * 2,
    "rotate_store": [_POINTER] * 10 + [_INT] * 5 + [_FLOAT],
    "attend": [_POINTER] * 9 + [_INT] * 6,
    "all_reduce": [ctypes.POINTER(GroupMemory), _POINTER, _INT],
}
# For bfloat16, where the CPU multiplies pairs of it.
_FOR_PAIRS = {
    "linear": [_POINTER] * 3 + [_INT] * 3,
    "times": [_POINTER] * 3 + [_INT] * 3,
    "run_layers": [
        ctypes.POINTER(Layer),
        _INT,
        _INT,
        ctypes.POINTER(Shapes),
        ctypes.POINTER(Rows),
        ctypes.POINTER(GroupMemory),
        _POINTER,
    ],
}
_WITH_OUTCOME = ("all_reduce", "run_layers")


class Library(SimpleNamespace):
    """The kernels for one dtype, by name; those that this CPU has not, or this dtype, are None."""

    def __init__(self, path: str, dtype: str):
        """Raises ConfigError if `path` is no library of ours that this process can load."""
        try:
            loaded = ctypes.CDLL(path)
            found = {name: getattr(loaded, f"{name}_{dtype}") for name in _KERNELS}
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the kernels in {path} cannot be loaded ({error}); use --kernels torch.") from error
        found |= {name: getattr(loaded, f"{name}_{dtype}", None) for name in _FOR_PAIRS}
        for name, arguments in (_KERNELS | _FOR_PAIRS).items():
            if (function := found[name]) is not None:
                function.argtypes = arguments
                function.restype = ctypes.c_int if name in _WITH_OUTCOME else None
        super().__init__(**found)
        self.dtype = dtype
