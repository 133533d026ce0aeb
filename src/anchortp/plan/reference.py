"""Slow and obvious counterparts of the planner, for tests: what a plan does, and the best that one could do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product

from anchortp.layout import ATTENTION, FAMILIES, KV, Layout, ModelUnits, Shard
from anchortp.plan.plan import FromPeer, Plan


def apply(plan: Plan) -> Layout:
    """Plays the moves one by one on a picture of the devices' memory and reads the layout off it.

    Asserts that no move overwrites a slot in use and that a peer really holds what is copied from it.
    """
    memory = {
        shard.device: {family: dict(enumerate(shard[family])) for family in FAMILIES}
        for shard in plan.before.shards
        if shard.device in plan.after.devices
    }
    for move in plan.moves:
        slots = memory[move.device][move.family]
        assert move.slot not in slots, f"{move} overwrites {slots[move.slot]}"
        if isinstance(move.source, FromPeer):
            assert memory[move.source.device][move.family][move.source.slot] == move.unit
        slots[move.slot] = move.unit
    shards = []
    for device in plan.after.devices:
        filled = []
        for family in FAMILIES:
            slots = memory[device][family]
            assert set(slots) == set(range(len(slots))), f"{device}: {family} has holes"
            filled.append(tuple(slots[i] for i in range(len(slots))))
        shards.append(Shard(device=device, slots=tuple(filled)))
    return Layout(shards=tuple(shards))


def fewest_new_kv_copies(
    units: ModelUnits, before: Layout, lost: Collection[str], target: Mapping[str, int]
) -> int:
    """Over every assignment of the missing q heads that ends in the widths `target`: the fewest
    (device, KV head) pairs that must be filled. Exponential; for a handful of heads."""
    survivors = before.without(lost)
    missing = sorted(set(range(units.num_units[ATTENTION])) - survivors.held(ATTENTION))
    best = None
    for choice in product(survivors.devices, repeat=len(missing)):
        width = {s.device: len(s[ATTENTION]) + choice.count(s.device) for s in survivors.shards}
        if width != dict(target):
            continue
        opened = {
            (device, units.kv_head_of(head))
            for head, device in zip(missing, choice, strict=True)
            if units.kv_head_of(head) not in survivors[device][KV]
        }
        best = len(opened) if best is None else min(best, len(opened))
    assert best is not None, "no assignment reaches the target widths"
    return best
