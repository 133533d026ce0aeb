"""A shard's KV cache as tensors. Views of the arena: nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from anchortp.layout import KV, KVAddresses, Shard


class KVCache:
    """Typed views of one device's KV arena: a plane of keys and one of values per layer and KV slot.

    `buffer`: 1-D uint8 over the whole arena. Token t of a sequence lies in row
    `block_ids[t // block_size] * block_size + t % block_size` of every plane.
    """

    def __init__(self, buffer: Tensor, addresses: KVAddresses, shard: Shard):
        config = addresses.config
        self.shard = shard
        self.block_size = addresses.block_size
        self.num_blocks = addresses.num_blocks
        self.num_slots = len(shard[KV])
        elements = buffer[: addresses.reserved_bytes].view(getattr(torch, config.dtype))
        self.address = elements.data_ptr()
        block_elements = addresses.block_size * config.head_dim
        layer_elements = addresses.layer_bytes // config.dtype_bytes
        self._blocks = elements.as_strided(
            (config.num_layers, 2 * self.num_slots, self.num_blocks, block_elements),
            (layer_elements, addresses.num_tokens * config.head_dim, block_elements, 1),
        )
        shape = (2 * self.num_slots, addresses.num_tokens, config.head_dim)
        strides = (addresses.num_tokens * config.head_dim, config.head_dim, 1)
        self._layers = tuple(
            elements.as_strided(
                shape,
                strides,
                elements.storage_offset() + addresses.layer_offset(layer) // config.dtype_bytes,
            )
            for layer in range(config.num_layers)
        )

    def clear(self, blocks: Tensor) -> None:
        """Zeroes these blocks (int64), all planes of all layers."""
        self._blocks.index_fill_(2, blocks.to(self._blocks.device), 0)

    def layer(self, index: int) -> Tensor:
        """`[2 * slots, num_tokens, head_dim]`: keys of slot 0, values of slot 0, keys of slot 1, ..."""
        return self._layers[index]
