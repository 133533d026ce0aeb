"""Collectives of one epoch. A group is a value that is passed in, never a process global.

`ShmRegion` is the control block of an epoch (who arrived, who began a step, the abort flag) and the memory
that `ShmGroup` sums in. `GlooGroup` gives the same results over `torch.distributed`'s gloo, for comparison. On GPUs
`PeerGroup` sums in device memory that every rank maps, `StagedGroup` takes the way over the host, and `NcclGroup` that
of `torch.distributed`'s NCCL; `MixedGroup` is two of them, by the size of what is to be moved.

The controller needs the region alone, so importing this package does not import torch; the groups do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .group import Group
from .region import ShmRegion

if TYPE_CHECKING:
    from .gloo import GlooGroup
    from .mixed import MixedGroup
    from .nccl import Kept, NcclGroup
    from .peer import PeerGroup, StagedGroup
    from .shm import ShmGroup

__all__ = ["GlooGroup", "Group", "Kept", "MixedGroup", "NcclGroup", "PeerGroup", "ShmGroup", "ShmRegion", "StagedGroup"]

_NEED_TORCH = {
    "GlooGroup": ".gloo",
    "Kept": ".nccl",
    "MixedGroup": ".mixed",
    "NcclGroup": ".nccl",
    "PeerGroup": ".peer",
    "ShmGroup": ".shm",
    "StagedGroup": ".peer",
}


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEED_TORCH[name], __name__), name)
