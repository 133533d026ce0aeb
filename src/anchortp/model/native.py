"""The forward pass with kernels of ours (`anchortp.native`) for all that lies between two matmuls, on CPUs [worker].

torch takes some twenty small kernels a layer for it, each of a few microseconds, and attention copies what it reads.
Here a layer is five matmuls, two collectives, and one pass each for: adding to the residual stream and its norm; norms
of heads, rotation and the cache's new rows; attention over the cache where it lies; the MLP's gate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anchortp.errors import ConfigError
from anchortp.layout import Layout
from anchortp.model.batch import ForwardBatch
from anchortp.model.decoder import Decoder, Step
from anchortp.model.kv_cache import KVCache
from anchortp.model.paged import Pages
from anchortp.model.panels import linear, times
from anchortp.model.weights import LayerWeights, WeightViews

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "add_norm": [_POINTER] * 4 + [_INT] * 2 + [_FLOAT],
    "silu_mul": [_POINTER] * 2 + [_INT] * 2,
    "rotate_store": [_POINTER] * 10 + [_INT] * 5 + [_FLOAT],
    "attend": [_POINTER] * 9 + [_INT] * 6,
}


class Kernels:
    """The functions of `native/kernels.cpp` for one dtype. Tensors are contiguous, and nobody checks that here."""

    def __init__(self, library: str, dtype: str):
        """Raises ConfigError if `library` is none that this process can load."""
        try:
            loaded = ctypes.CDLL(library)
            found = {name: getattr(loaded, f"{name}_{dtype}") for name in _ARGUMENTS}
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the kernels in {library} cannot be loaded ({error}); use --kernels torch.") from error
        for name, function in found.items():
            function.argtypes, function.restype = _ARGUMENTS[name], None
        self.add_norm: Callable[..., None] = found["add_norm"]
        self.silu_mul: Callable[..., None] = found["silu_mul"]
        self.rotate_store: Callable[..., None] = found["rotate_store"]
        self.attend: Callable[..., None] = found["attend"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _NativeStep(Step):
    positions: Tensor
    pages: Pages


class NativeDecoder(Decoder):
    """As `Decoder`, for matrices and caches in the host's memory."""

    def __init__(self, *args: Any, kernels: Kernels, **more: Any):
        self._kernels = kernels
        super().__init__(*args, **more)

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
        return times(attended.view(x.shape[0], -1), layer.o)

    def _rotate_store(self, layer: LayerWeights, x: Tensor, cache: Tensor, step: _NativeStep) -> Tensor:
        """q of every q slot, turned, `[rows, num_q, head_dim]`; k and v go to the cache."""
        heads, hd = self._heads, self.config.head_dim
        q, kv = linear(x, layer.q), linear(x, layer.kv)
        out = x.new_empty(x.shape[0], heads.num_q, hd)
        self._kernels.rotate_store(
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
        self._kernels.attend(
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

    def gate(self, both: Tensor) -> Tensor:
        num_columns = both.shape[1] // 2
        out = both.new_empty(both.shape[0], num_columns)
        block = self.units.mlp_block
        self._kernels.silu_mul(both.data_ptr(), out.data_ptr(), both.shape[0] * num_columns // block, block)
        return out

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._kernels.add_norm(
            x.data_ptr(),
            None if more is None else more.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            self.config.rms_eps,
        )
        return out


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
