"""An arena's memory as a tensor, whatever it is made of. Nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from anchortp.arena import MemfdArena, PinnedMapping, VmmMapping
from anchortp.arena.pages import map_shared


def tensor_of(arena: MemfdArena | PinnedMapping | VmmMapping) -> Tensor:
    """1-D uint8 over all `reserved_bytes`, on the device that the memory is on; it outlives the arena object.

    On an arena of chunks only what is attached may be touched (`AnchorClient.refresh`); chunks that are attached
    later appear in the same tensor. Of a pinned mapping only what is pinned may be touched.
    """
    if isinstance(arena, MemfdArena):
        return torch.frombuffer(map_shared(arena.fd, arena.reserved_bytes, writable=True), dtype=torch.uint8)
    return from_dlpack(arena.dlpack())
