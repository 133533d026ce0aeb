"""Where things are: unit families, layouts, addresses. Pure: no torch, no IO, no clock."""

from anchortp.layout.addresses import KVAddresses, Range, WeightAddresses
from anchortp.layout.layout import (
    Layout,
    Shard,
    check_devices,
    empty_shard,
    initial_layout,
    shard_from_dict,
    widths,
)
from anchortp.layout.units import (
    ATTENTION,
    FAMILIES,
    KV,
    MLP,
    VOCAB,
    ModelUnits,
    ReplicatedTensor,
    Source,
    UnitTensor,
    model_units,
)

__all__ = [
    "ATTENTION",
    "FAMILIES",
    "KV",
    "MLP",
    "VOCAB",
    "KVAddresses",
    "Layout",
    "ModelUnits",
    "Range",
    "ReplicatedTensor",
    "Shard",
    "Source",
    "UnitTensor",
    "WeightAddresses",
    "check_devices",
    "empty_shard",
    "initial_layout",
    "model_units",
    "shard_from_dict",
    "widths",
]
