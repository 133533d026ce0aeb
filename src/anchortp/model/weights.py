"""A shard's weights as matrices. Views of the arena: nothing is copied, a family may be empty (0 rows)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchortp.layout import ModelUnits, ReplicatedTensor, Shard, UnitTensor, WeightAddresses
from anchortp.model.packed import check_panels, packed_matrix, take_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer, units in slot order. Every matrix has the hidden axis last: q, kv and gate_up, which may be packed,
    are used as `x @ W.T` (`packed.linear`), o and down, stored transposed, as `x @ W`."""

    input_norm: Tensor  # [hidden]
    post_norm: Tensor  # [hidden]
    q: Tensor  # [q heads * head_dim, hidden]
    kv: Tensor  # [kv heads * 2 * head_dim, hidden]: per head the rows of k, then of v
    o: Tensor  # [q heads * head_dim, hidden]
    gate_up: Tensor  # [blocks * 2 * mlp_block, hidden]: per block the rows of gate, then of up
    down: Tensor  # [blocks * mlp_block, hidden]
    q_norm: Tensor | None = None  # [head_dim], Qwen3
    k_norm: Tensor | None = None


def check_weights(units: ModelUnits) -> None:
    """Raises CheckpointError if torch cannot compute with weights as `units` packs them."""
    if any(units.is_packed(tensor) for tensor in units.tensors):
        check_panels(units.config.hidden_size)


class WeightViews:
    """Typed views of one device's weights arena.

    `buffer`: 1-D uint8 over the whole arena. Only the slots of `shard` are ever touched through the views.
    """

    def __init__(self, buffer: Tensor, addresses: WeightAddresses, shard: Shard):
        units = addresses.units
        self.shard = shard
        self._addresses = addresses
        self._elements = buffer[: addresses.reserved_bytes].view(getattr(torch, units.config.dtype))
        self._tensors = {tensor.key: tensor for tensor in (*units.tensors, *units.replicated)}
        layered = [tensor.key for tensor in self._tensors.values() if tensor.per_layer]
        self.embed = self._view("embed")  # [vocabulary units * vocab_block, hidden]
        self.lm_head = self._matrix("embed" if units.config.tie_embeddings else "lm_head")
        self.final_norm = self._view("final_norm")
        self.layers = tuple(
            LayerWeights(**{key: self._matrix(key, layer) for key in layered})
            for layer in range(units.config.num_layers)
        )

    def embedding(self, rows: Tensor) -> Tensor:
        """`[n, hidden]`: the embeddings in local rows (int64 `[n]`), of which there must be some."""
        embed = self._tensors["embed"]
        if self._addresses.units.is_packed(embed):
            return take_rows(self.embed, rows)
        return self.embed.index_select(0, rows)

    def _matrix(self, key: str, layer: int = 0) -> Tensor:
        """As `_view`, for `packed.linear`: opaque if it is packed."""
        view, tensor = self._view(key, layer), self._tensors[key]
        packed = isinstance(tensor, UnitTensor) and self._addresses.units.is_packed(tensor)
        return packed_matrix(view) if packed and view.shape[0] else view

    def _view(self, key: str, layer: int = 0) -> Tensor:
        units = self._addresses.units
        tensor = self._tensors[key]
        start = self._addresses.offset(key, layer) // units.config.dtype_bytes
        shape = self._shape(tensor)
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        return self._elements.as_strided(shape, strides, self._elements.storage_offset() + start)

    def _shape(self, tensor: UnitTensor | ReplicatedTensor) -> tuple[int, ...]:
        if isinstance(tensor, ReplicatedTensor):
            return tensor.shape
        num_units = len(self.shard[tensor.family])
        return (num_units * tensor.rows, self._addresses.units.config.hidden_size)
