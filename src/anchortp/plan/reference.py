"""Slow and obvious counterparts of the planner, for tests: what a plan does, and the best that one could do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import product

from anchortp.layout import ATTENTION, EVERY_FAMILY, EXPERT, FAMILIES, KV, Layout, ModelUnits, Shard
from anchortp.plan.plan import PLANE, REPLICATED, Drop, FromPeer, Move, Plan

Slots = dict[tuple[str, str], dict[int, int]]  # (device, family) -> slot -> unit


def apply(plan: Plan) -> Layout:
    """Plays the plan stage by stage on a picture of the devices' memory and reads the layout off it.

    Asserts what `plan.py` promises: a move writes only free slots (a unit in parts: the same slot, each byte once);
    a peer really holds what is copied from it, at the beginning of the stage or because it arrives there in the same
    stage and is forwarded; nothing comes from a lost device; a drop names what is there; no slot is left a hole.
    """
    memory: Slots = {}
    for shard in plan.before.shards:
        if shard.device not in plan.lost and any(shard.slots):
            for family in EVERY_FAMILY:
                memory[shard.device, family] = dict(enumerate(shard[family]))
            memory[shard.device, PLANE] = dict(memory[shard.device, KV])
            memory[shard.device, REPLICATED] = {0: 0}
    for stage in range(plan.num_stages):
        _play_stage(
            [move for move in plan.moves if move.stage == stage],
            [drop for drop in plan.drops if drop.stage == stage],
            memory,
        )
    return Layout(shards=tuple(_read(device, memory) for device in plan.after.devices))


def _play_stage(moves: list[Move], drops: list[Drop], memory: Slots) -> None:
    start = {key: dict(slots) for key, slots in memory.items()}
    waiting = moves
    parts: dict[tuple[str, str, int], list[tuple[int, int]]] = defaultdict(list)
    while waiting:
        # What is forwarded has to arrive first; a circle would never end.
        ready = [move for move in waiting if _is_ready(move, memory, waiting)]
        assert ready, f"these wait for each other: {waiting}"
        for move in ready:
            _play(move, start, memory, parts)
        waiting = [move for move in waiting if move not in ready]
    _check_parts(moves, parts)
    for drop in drops:
        for i in range(drop.num_units):
            slots = memory[drop.device, drop.family]
            assert slots.pop(drop.slot + i) == drop.unit + i, f"{drop} names what is not there"
            if drop.family == KV:
                memory[drop.device, PLANE].pop(drop.slot + i, None)


def _is_ready(move: Move, memory: Slots, waiting: Collection[Move]) -> bool:
    if not isinstance(move.source, FromPeer):
        return True
    there = memory.get((move.source.device, move.family), {})
    fed = any(
        other.device == move.source.device
        and other.family == move.family
        and other is not move
        and other.slot < move.source.slot + move.num_units
        and move.source.slot < other.slot + other.num_units
        for other in waiting
    )
    return move.source.slot in there and not fed


def _play(move: Move, start: Slots, memory: Slots, parts: dict[tuple[str, str, int], list[tuple[int, int]]]) -> None:
    free = start.get((move.device, move.family), {})
    slots = memory.setdefault((move.device, move.family), {})
    for i in range(move.num_units):
        slot, unit = move.slot + i, move.unit + i
        assert slot not in free, f"{move} overwrites {free[slot]}"
        assert slots.get(slot, unit) == unit, f"{move} overwrites {slots[slot]}"
        if isinstance(move.source, FromPeer):
            there = memory[move.source.device, move.family]
            assert there[move.source.slot + i] == unit, f"{move}: {move.source} does not hold it"
        slots[slot] = unit
        parts[move.device, move.family, slot].append((move.first_byte, move.num_bytes // move.num_units))


def _check_parts(moves: list[Move], parts: Mapping[tuple[str, str, int], list[tuple[int, int]]]) -> None:
    """A unit that comes in parts comes whole, and without an overlap."""
    whole = {move.family: move.num_bytes // move.num_units for move in moves if move.num_units > 1}
    for (device, family, slot), ranges in parts.items():
        end = 0
        for first, size in sorted(ranges):
            assert first == end, f"{device}: bytes of {family} slot {slot} come twice or not at all: {ranges}"
            end += size
        assert whole.setdefault(family, end) == end, f"{device}: {family} slot {slot} has {end} bytes"


def _read(device: str, memory: Slots) -> Shard:
    filled = {}
    for family in EVERY_FAMILY:
        slots = memory.get((device, family), {})
        assert set(slots) == set(range(len(slots))), f"{device}: {family} has holes"
        filled[family] = tuple(slots[i] for i in range(len(slots)))
    for slot, unit in memory.get((device, PLANE), {}).items():
        assert filled[KV][slot] == unit, f"{device}: the plane in slot {slot} is not that of its KV head"
    shard = Shard(device=device, slots=tuple(filled[family] for family in FAMILIES))
    return shard.appended(EXPERT, filled[EXPERT])


def fewest_new_kv_copies(units: ModelUnits, before: Layout, lost: Collection[str], target: Mapping[str, int]) -> int:
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
