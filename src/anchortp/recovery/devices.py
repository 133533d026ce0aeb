"""What the coordinator knows of each device, and whether a layout fits into their memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from anchortp.devices import parse_device
from anchortp.errors import DoesNotFit, in_words
from anchortp.layout import KV, KVAddresses, Layout, ModelUnits, Shard, WeightAddresses


@dataclass(slots=True, kw_only=True)
class Device:
    """`shard`: what is whole in its arena. `fresh`: nothing is, not even the replicated tensors. `arranging`: its
    units are being moved to these slots; if its worker dies meanwhile, nothing in it can be believed.
    `planes`: KV heads whose planes are as good as the coordinator says the cache is. `fenced_s`: clock time since when
    its worker has been told to end and has not.
    """

    budget_bytes: int
    shard: Shard
    fresh: bool
    has_anchor: bool = True
    has_worker: bool = False
    failures: int = 0
    planes: frozenset[int] = frozenset()
    arranging: Shard | None = None
    fenced_s: float | None = None


def fitting_kv_blocks(
    units: ModelUnits, devices: Mapping[str, Device], layout: Layout, *, block_size: int, wanted: int, least: int
) -> int:
    """As many KV blocks as `wanted`, or as fit beside the weights of `layout` on the fullest device.

    Raises DoesNotFit, with the numbers, where the weights alone do not fit or fewer than `least` blocks would.
    """
    page_bytes = max(parse_device(device).page_bytes for device in layout.devices)
    weights = WeightAddresses(units=units, page_bytes=page_bytes)
    kv = KVAddresses(config=units.config, block_size=block_size, num_blocks=wanted, page_bytes=page_bytes)
    best = wanted
    for shard in layout.shards:
        budget, need = devices[shard.device].budget_bytes, weights.committed_bytes(shard)
        if need > budget:
            raise DoesNotFit(
                f"{shard.device} would hold {in_words(need)} of weights, its budget is {in_words(budget)}. "
                f"Give it more memory or use more devices."
            )
        fitting = kv.blocks_that_fit(len(shard[KV]), budget - need)
        if fitting < least:
            raise DoesNotFit(
                f"{shard.device} has {in_words(budget - need)} left for KV cache beside {in_words(need)} of weights: "
                f"{fitting} block(s) of {block_size} tokens, but at least {least} are needed. "
                f"Give it more memory or use more devices."
            )
        best = min(best, fitting)
    return best


def slots_after_a_loss(units: ModelUnits, layout: Layout, speeds: Mapping[str, float]) -> dict[str, Counter[str]]:
    """By device and family: how many slots it is likely to need when any one of the others has been lost.

    That is what it holds, or its even share, by speed, of all units among those that are left without the fastest other
    device. Nothing rests on it but which pages are made ready ahead of a loss.
    """
    weight = {device: speeds.get(device, 1.0) for device in layout.devices}
    slots = {}
    for shard in layout.shards if len(weight) > 1 else ():
        left = sum(weight.values()) - max(w for device, w in weight.items() if device != shard.device)
        share = weight[shard.device] / left
        slots[shard.device] = Counter(
            {family: max(len(shard[family]), ceil(units.num_units[family] * share)) for family in units.families}
        )
    return slots
