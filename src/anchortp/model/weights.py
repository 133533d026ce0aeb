"""A shard's weights as matrices. Views of the arena: nothing is copied, a family may be empty (0 rows)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchortp.layout import EXPERT, MLP, ModelUnits, ReplicatedTensor, Shard, UnitTensor, WeightAddresses
from anchortp.model.panels import Matrix, check_panels, panel_matrix, take_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer, units in slot order. Every matrix has the hidden axis last: q, kv and gate_up, used as `x @ W.T`
    (`TorchKernels.linear`), which may be in panels, and o and down, stored transposed, used as `x @ W` (`times`). A
    layer has an MLP, or a router to experts, which `WeightViews.experts` has."""

    input_norm: Tensor  # [hidden]
    post_norm: Tensor  # [hidden]
    q: Matrix  # [q heads * head_dim, hidden]
    kv: Matrix  # [kv heads * 2 * head_dim, hidden]: per head the rows of k, then of v
    o: Tensor  # [q heads * head_dim, hidden]
    gate_up: Matrix | None = None  # [blocks * 2 * mlp_block, hidden]: per block the rows of gate, then of up
    down: Tensor | None = None  # [blocks * mlp_block, hidden]
    router: Tensor | None = None  # [experts, hidden]
    q_norm: Tensor | None = None  # [head_dim], Qwen3
    k_norm: Tensor | None = None


def check_weights(units: ModelUnits) -> None:
    """Raises CheckpointError if torch cannot compute with weights as `units` lays them out."""
    if any(units.in_panels(tensor) for tensor in units.tensors):
        check_panels(units.config.hidden_size)


class WeightViews:
    """Typed views of one device's weights arena.

    `buffer`: 1-D uint8 over the whole arena. Only the slots of `shard` are ever touched through the views.

    Where weights lie in panels, o and down of the layers do not: a panel of theirs would have a part of every unit, so
    it could not grow in place.
    """

    def __init__(self, buffer: Tensor, addresses: WeightAddresses, shard: Shard):
        units = addresses.units
        self.shard = shard
        self._addresses = addresses
        self._elements = buffer[: addresses.reserved_bytes].view(getattr(torch, units.config.dtype))
        self.address = self._elements.data_ptr()
        self._tensors = {tensor.key: tensor for tensor in (*units.tensors, *units.replicated)}
        layered = [key for key, tensor in self._tensors.items() if tensor.per_layer and not _of_experts(units, tensor)]
        self.embed = self._view("embed")  # [vocabulary units * vocab_block, hidden]
        self.lm_head = self._matrix("embed" if units.config.tie_embeddings else "lm_head")
        self.final_norm = self._view("final_norm")
        self.layers = [
            LayerWeights(**{key: self._matrix(key, layer) for key in layered})
            for layer in range(units.config.num_layers)
        ]
        # gate_up [2 * columns, hidden] (maybe opaque), down [columns, hidden], by layer * num_experts + expert
        self.experts: dict[int, tuple[Matrix, Tensor]] = self._experts()

    def embedding(self, rows: Tensor) -> Tensor:
        """`[n, hidden]`: the embeddings in local rows (int64 `[n]`), of which there must be some."""
        embed = self._tensors["embed"]
        if self._addresses.units.in_panels(embed):
            return take_rows(self.embed, rows)
        return self.embed.index_select(0, rows)

    def _matrix(self, key: str, copy: int = 0) -> Matrix:
        """As `_view`, for `linear`."""
        return self._for_linear(key, self._view(key, copy))

    def _for_linear(self, key: str, view: Tensor) -> Matrix:
        """`view`: rows of whole blocks of the tensor called `key`."""
        tensor = self._tensors[key]
        in_panels = isinstance(tensor, UnitTensor) and self._addresses.units.in_panels(tensor)
        return panel_matrix(view) if in_panels and view.shape[0] else view

    def _experts(self) -> dict[int, tuple[Matrix, Tensor]]:
        units, shard = self._addresses.units, self.shard
        pool, columns = shard[EXPERT], shard[MLP]
        if units.config.moe is None or not (pool or columns):
            return {}
        gate_up, down = (self._tensors[key] for key in ("gate_up", "down"))
        if pool:
            views = (self._view(t.key).unflatten(0, (len(pool), t.rows)).unbind(0) for t in (gate_up, down))
            return {unit: (self._for_linear("gate_up", g), d) for unit, g, d in zip(pool, *views, strict=True)}
        copies = range(units.num_copies(gate_up))
        return {copy: (self._matrix("gate_up", copy), self._view("down", copy)) for copy in copies}

    def _view(self, key: str, copy: int = 0) -> Tensor:
        units = self._addresses.units
        tensor = self._tensors[key]
        start = self._addresses.offset(key, copy) // units.config.dtype_bytes
        shape = self._shape(tensor)
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        return self._elements.as_strided(shape, strides, self._elements.storage_offset() + start)

    def _shape(self, tensor: UnitTensor | ReplicatedTensor) -> tuple[int, ...]:
        if isinstance(tensor, ReplicatedTensor):
            return tensor.shape
        num_units = len(self.shard[tensor.family])
        return (num_units * tensor.rows, self._addresses.units.config.hidden_size)


def _of_experts(units: ModelUnits, tensor: UnitTensor | ReplicatedTensor) -> bool:
    return units.config.moe is not None and tensor.key in ("gate_up", "down")
