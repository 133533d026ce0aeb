"""The forward pass with kernels of ours (`anchortp.native`) for all that lies between two matmuls, on CPUs [worker].

torch takes some twenty small kernels a layer for it, each of a few microseconds, and attention copies what it reads.
Here a layer is five matmuls, two collectives, and one pass each for: adding to the residual stream and its norm; norms
of heads, rotation and the cache's new rows; attention over the cache where it lies; the MLP's gate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from anchortp.errors import ConfigError
from anchortp.layout import Layout
from anchortp.model.batch import ForwardBatch
from anchortp.model.decoder import Decoder, Step
from anchortp.model.kernels import TorchKernels
from anchortp.model.kv_cache import KVCache
from anchortp.model.paged import Pages
from anchortp.model.panels import Matrix, Panels
from anchortp.model.weights import LayerWeights, WeightViews

# Of activations that a matrix in panels meets in our kernel. For one row oneDNN's call alone takes as long as ours with
# all its work; for more than these it is as fast.
FEW_ROWS = 64

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "add_norm": [_POINTER] * 4 + [_INT] * 2 + [_FLOAT],
    "silu_mul": [_POINTER] * 2 + [_INT] * 2,
    "rotate_store": [_POINTER] * 10 + [_INT] * 5 + [_FLOAT],
    "attend": [_POINTER] * 9 + [_INT] * 6,
}
_LINEAR_ARGUMENTS = [_POINTER] * 3 + [_INT] * 3


class NativeKernels(TorchKernels):
    """The functions of `native/kernels.cpp` for one dtype, over contiguous tensors in the host's memory: of those that
    are given to `norm` torch makes what is asked for, as it does of matrices that are plain or meet many rows."""

    def __init__(self, library: str, dtype: str):
        """Raises ConfigError if `library` is none that this process can load."""
        try:
            loaded = ctypes.CDLL(library)
            found = {name: getattr(loaded, f"{name}_{dtype}") for name in _ARGUMENTS}
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the kernels in {library} cannot be loaded ({error}); use --kernels torch.") from error
        optional = getattr(loaded, f"linear_{dtype}", None)  # where the CPU multiplies pairs
        for function, arguments in [(found[n], a) for n, a in _ARGUMENTS.items()] + [(optional, _LINEAR_ARGUMENTS)]:
            if function is not None:
                function.argtypes, function.restype = arguments, None
        self.call = SimpleNamespace(**found)
        self._linear: Callable[..., None] | None = optional

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        if self._linear is None or not isinstance(weight, Panels) or x.shape[0] > FEW_ROWS:
            return super().linear(x, weight)
        out = x.new_empty(x.shape[0], weight.memory.shape[0])
        self._call_linear(out, x, weight.memory)
        return out

    def linear_into(self, out: Tensor, x: Tensor, weight: Matrix) -> None:
        if self._linear is None or not isinstance(weight, Panels) or x.shape[0] > FEW_ROWS:
            super().linear_into(out, x, weight)
        else:
            self._call_linear(out, x, weight.memory)

    def _call_linear(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        assert self._linear is not None
        self._linear(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], weight.shape[1], weight.shape[0])

    def gate(self, both: Tensor, block: int) -> Tensor:
        num_columns = both.shape[1] // 2
        out = both.new_empty(both.shape[0], num_columns)
        self.call.silu_mul(both.data_ptr(), out.data_ptr(), both.shape[0] * num_columns // block, block)
        return out

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        more_at = None if more is None else more.data_ptr()
        self.call.add_norm(x.data_ptr(), more_at, weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _NativeStep(Step):
    positions: Tensor
    pages: Pages


class NativeDecoder(Decoder):
    """As `Decoder`, for matrices and caches in the host's memory."""

    kernels: NativeKernels

    def rebind(self, layout: Layout, rank: int, weights: WeightViews, kv_cache: KVCache) -> None:
        super().rebind(layout, rank, weights, kv_cache)
        heads = self._heads
        readers: list[list[int]] = [[] for _ in range(heads.num_kv)]
        places = range(heads.num_q) if heads.back is None else heads.back.tolist()
        for slot, place in enumerate(places):
            readers[place // heads.group].append(slot)
        self._readers = _int32([slot for slots in readers for slot in slots])  # q slots by the KV slot they read
        self._reader_starts = _int32([sum(map(len, readers[:kv])) for kv in range(heads.num_kv + 1)])

    def prepare(self, batch: ForwardBatch, attend: object = None) -> _NativeStep:
        assert attend is None, "attention is ours"
        return _NativeStep(
            cache_slots=batch.cache_slots,
            cos=self._rope.cos,
            sin=self._rope.sin,
            attend=None,
            groups=(),
            chunks=(),
            positions=batch.positions,
            pages=Pages.of_batch(batch),
        )

    def attention(self, index: int, layer: LayerWeights, x: Tensor, step: Step) -> Tensor:
        assert isinstance(step, _NativeStep)
        if not self._heads.num_q:
            return torch.zeros_like(x)
        cache = self.kv_cache.layer(index)
        attended = self._attend(self._rotate_store(layer, x, cache, step), cache, step.pages)
        return self.kernels.times(attended.view(x.shape[0], -1), layer.o)

    def _rotate_store(self, layer: LayerWeights, x: Tensor, cache: Tensor, step: _NativeStep) -> Tensor:
        """q of every q slot, turned, `[rows, num_q, head_dim]`; k and v go to the cache."""
        heads, hd = self._heads, self.config.head_dim
        q, kv = self.kernels.linear(x, layer.q), self.kernels.linear(x, layer.kv)
        out = x.new_empty(x.shape[0], heads.num_q, hd)
        self.kernels.call.rotate_store(
            q.data_ptr(),
            kv.data_ptr(),
            None if layer.q_norm is None else layer.q_norm.data_ptr(),
            None if layer.k_norm is None else layer.k_norm.data_ptr(),
            step.positions.data_ptr(),
            step.cos.data_ptr(),
            step.sin.data_ptr(),
            step.cache_slots.data_ptr(),
            cache.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            heads.num_q,
            heads.num_kv,
            hd,
            cache.shape[1],
            self.config.rms_eps,
        )
        return out

    def _attend(self, queries: Tensor, cache: Tensor, pages: Pages) -> Tensor:
        """As `queries`: what they find in the cache."""
        out = torch.empty_like(queries)
        self.kernels.call.attend(
            queries.data_ptr(),
            cache.data_ptr(),
            pages.rows.data_ptr(),
            pages.starts.data_ptr(),
            pages.blocks.data_ptr(),
            pages.last_tokens.data_ptr(),
            self._readers.data_ptr(),
            self._reader_starts.data_ptr(),
            out.data_ptr(),
            len(pages.last_tokens),
            self._heads.num_q,
            self._heads.num_kv,
            self.config.head_dim,
            self.kv_cache.block_size,
            cache.shape[1],
        )
        return out


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
