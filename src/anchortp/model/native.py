"""The forward pass with kernels of ours (`anchortp.native`), on CPUs [worker].

torch takes some twenty small kernels a layer for what lies between two matmuls, each of a few microseconds, and
attention copies what it reads. Here a layer is five matmuls, two collectives, and one pass each for: adding to the
residual stream and its norm; norms of heads, rotation and the cache's new rows; attention over the cache where it lies;
the MLP's gate.

With few rows Python would take longer than all these: then a dense model's layers are one call, collectives included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from anchortp.layout import MLP, Layout
from anchortp.model.batch import ForwardBatch
from anchortp.model.decoder import Decoder, Gate, ReduceGroup, Step
from anchortp.model.kernels import TorchKernels
from anchortp.model.kv_cache import KVCache
from anchortp.model.paged import Pages
from anchortp.model.panels import Matrix, Panels
from anchortp.model.weights import LayerWeights, WeightViews
from anchortp.native import Layer, Library, Rows, Shapes

# Of activations that a matrix meets in our kernels. For one row oneDNN's call alone takes as long as ours with all its
# work; for more than these it is as fast.
FEW_ROWS = 64
PANEL_ROWS_OF_OUTPUT = 64  # `times` makes so many columns at once


class NativeKernels(TorchKernels):
    """The functions of a library, over contiguous tensors of its dtype in the host's memory: of those that are given to
    `norm` torch makes what is asked for, as it does of matrices that meet many rows."""

    def __init__(self, library: Library):
        self.library = library

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        if not self._takes_panels(x, weight):
            return super().linear(x, weight)
        out = x.new_empty(x.shape[0], weight.shape[0])
        self.linear_into(out, x, weight)
        return out

    def linear_into(self, out: Tensor, x: Tensor, weight: Matrix) -> None:
        if not self._takes_panels(x, weight):
            return super().linear_into(out, x, weight)
        assert isinstance(weight, Panels)
        at = (x.data_ptr(), weight.memory.data_ptr(), out.data_ptr())
        self.library.linear(*at, x.shape[0], weight.shape[1], weight.shape[0])

    def times_into(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        if not self._takes_plain(x, weight):
            return super().times_into(out, x, weight)
        at = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
        self.library.times(*at, x.shape[0], weight.shape[0], weight.shape[1])

    def _takes_panels(self, x: Tensor, weight: Matrix) -> bool:
        return self.library.linear is not None and isinstance(weight, Panels) and x.shape[0] <= FEW_ROWS

    def _takes_plain(self, x: Tensor, weight: Tensor) -> bool:
        fits = weight.shape[0] % 2 == 0 and weight.shape[1] % PANEL_ROWS_OF_OUTPUT == 0
        return self.library.times is not None and fits and x.shape[0] <= FEW_ROWS

    def gate(self, both: Tensor, block: int) -> Tensor:
        num_columns = both.shape[1] // 2
        out = both.new_empty(both.shape[0], num_columns)
        self.library.silu_mul(both.data_ptr(), out.data_ptr(), both.shape[0] * num_columns // block, block)
        return out

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        more_at = None if more is None else more.data_ptr()
        self.library.add_norm(x.data_ptr(), more_at, weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out


@runtime_checkable
class KernelGroup(Protocol):
    """A group in whose sums a kernel can take part for itself; `comm.ShmGroup` is one."""

    def memory_for(self, num: int) -> Any: ...

    def check(self, outcome: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _NativeStep(Step):
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
        self._in_one_call = self._can_run_layers()
        if self._in_one_call:
            self._layers = (Layer * self.config.num_layers)(*map(self._layer, range(self.config.num_layers)))
            self._shapes = self._describe_shapes()

    def _can_run_layers(self) -> bool:
        """Whether this model's layers can be one call (of few rows)."""
        in_panels = all(self.units.in_panels(t) for t in self.units.tensors if t.key in ("q", "kv", "gate_up"))
        fits = self.config.hidden_size % PANEL_ROWS_OF_OUTPUT == 0
        return self.kernels.library.run_layers is not None and self.config.moe is None and in_panels and fits

    def _layer(self, index: int) -> Layer:
        weights = self.weights.layers[index]
        names = [name for name, _ in Layer._fields_ if name != "cache"]
        return Layer(*(_address(getattr(weights, name)) for name in names), self.kv_cache.layer(index).data_ptr())

    def _describe_shapes(self) -> Shapes:
        return Shapes(
            hidden=self.config.hidden_size,
            num_q=self._heads.num_q,
            num_kv=self._heads.num_kv,
            head_dim=self.config.head_dim,
            num_columns=len(self.weights.shard[MLP]) * self.units.mlp_block,
            block=self.units.mlp_block,
            block_size=self.kv_cache.block_size,
            plane_tokens=self.kv_cache.layer(0).shape[1],
            readers=self._readers.data_ptr(),
            reader_starts=self._reader_starts.data_ptr(),
            cos=self._rope.cos.data_ptr(),
            sin=self._rope.sin.data_ptr(),
            eps=self.config.rms_eps,
        )

    def layers(self, x: Tensor, step: Step, group: ReduceGroup, gate: Gate | None) -> Tensor:
        assert isinstance(step, _NativeStep)
        memory = None
        if self._in_one_call and x.shape[0] <= FEW_ROWS:
            memory = group.memory_for(x.numel()) if isinstance(group, KernelGroup) else None
        if memory is None:
            return super().layers(x, step, group, gate)
        pages = step.pages
        rows = Rows(
            num=x.shape[0],
            num_sequences=len(pages.last_tokens),
            positions=step.positions.data_ptr(),
            cache_slots=step.cache_slots.data_ptr(),
            rows=pages.rows.data_ptr(),
            starts=pages.starts.data_ptr(),
            blocks=pages.blocks.data_ptr(),
            last_tokens=pages.last_tokens.data_ptr(),
        )
        run, num_layers = self.kernels.library.run_layers, self.config.num_layers
        for first, last in ((i, i + 1) for i in range(num_layers)) if gate else ((0, num_layers),):
            if gate:
                gate(first)
            group.check(run(self._layers, first, last, self._shapes, rows, memory, x.data_ptr()))
        return x

    def prepare(self, batch: ForwardBatch, attend: object = None) -> _NativeStep:
        assert attend is None, "attention is ours"
        return _NativeStep(
            positions=batch.positions,
            cache_slots=batch.cache_slots,
            cos=self._rope.cos,
            sin=self._rope.sin,
            attend=None,
            groups=(),
            chunks=(),
            pages=Pages.of_batch(batch),
        )

    def _rotate_store(self, layer: LayerWeights, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        """q of every q slot, turned, `[rows, num_q, head_dim]`; k and v go to the cache."""
        heads, hd = self._heads, self.config.head_dim
        q, kv = self.kernels.linear(x, layer.q), self.kernels.linear(x, layer.kv)
        out = x.new_empty(x.shape[0], heads.num_q, hd)
        self.kernels.library.rotate_store(
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

    def _attend(self, queries: Tensor, cache: Tensor, step: Step) -> Tensor:
        """As `queries`: what they find in the cache."""
        assert isinstance(step, _NativeStep)
        pages = step.pages
        out = torch.empty_like(queries)
        self.kernels.library.attend(
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


def _address(weight: Matrix | None) -> int | None:
    if weight is None:
        return None
    return (weight.memory if isinstance(weight, Panels) else weight).data_ptr()


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
