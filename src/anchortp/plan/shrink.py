"""Shrink by sets of units (design, idea 4): survivors keep every byte, and only what was lost is loaded.

The paper's planner (AnchorTP, section on CMM) keeps each device's shard a contiguous interval, so that the
borders of *all* intervals shift when one device leaves, and surviving bytes travel between peers. Here a shard
is a set: the lost units are appended to the survivors' slots, evenly, and nothing else moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from anchortp.errors import DoesNotFit
from anchortp.layout import ATTENTION, EXPERT, KV, Layout, ModelUnits, empty_shard, initial_layout, widths
from anchortp.plan.heads import assign_heads
from anchortp.plan.plan import Plan, moves_between


def fill_plan(units: ModelUnits, devices: tuple[str, ...], speeds: Mapping[str, float] | None = None) -> Plan:
    """The first load: from empty devices to the initial layout. Raises as `initial_layout` does."""
    before = Layout(shards=tuple(empty_shard(device) for device in devices))
    after = initial_layout(units, devices, speeds)
    return Plan(
        before=before,
        after=after,
        moves=moves_between(before, after, units),
        lost_bytes=_missing_bytes(units, before),
        reasons=(f"{len(devices)} empty device(s): every unit is loaded from the host",),
    )


def shrink_plan(
    units: ModelUnits,
    before: Layout,
    lost: Collection[str],
    speeds: Mapping[str, float] | None = None,
) -> Plan:
    """The plan after the devices in `lost` are gone. `before` may be irregular, and may lack units already
    (a second fault in the middle of a recovery).

    1. Units that no survivor holds are missing. Per family (experts: per layer) each goes to the survivor that
       would be done first with it, so widths stay within one unit of each other, or follow `speeds`.
    2. Which q head goes where is free; heads go where their KV head already is, so that few KV heads need a
       further copy.
    3. A survivor that got a q head without its KV head loads that too.

    Raises DoesNotFit when nobody is left.
    """
    survivors = before.without(lost)
    if not survivors.shards:
        raise DoesNotFit(f"no device is left of {', '.join(before.devices)}; add one and start again.")
    after = survivors
    for family in units.families:
        if family != KV:
            for device, got in _assign(units, survivors, family, speeds).items():
                after = after.with_shard(after[device].appended(family, got))
    for shard in after.shards:
        needed = {units.kv_head_of(q) for q in shard[ATTENTION]} - set(shard[KV])
        after = after.with_shard(shard.appended(KV, sorted(needed)))
    plan = Plan(
        before=before,
        after=after,
        moves=moves_between(survivors, after, units),
        lost_bytes=_missing_bytes(units, survivors),
        reasons=(),
    )
    return Plan(
        before=plan.before,
        after=plan.after,
        moves=plan.moves,
        lost_bytes=plan.lost_bytes,
        reasons=_reasons(units, plan, lost),
    )


def _missing_bytes(units: ModelUnits, held: Layout) -> int:
    return sum((units.num_units[f] - len(held.held(f))) * units.unit_bytes[f] for f in units.families)


def _assign(
    units: ModelUnits, survivors: Layout, family: str, speeds: Mapping[str, float] | None
) -> dict[str, list[int]]:
    """Missing units of one family per survivor, in the order in which they take their slots."""
    if family == EXPERT:
        return _assign_experts(units, survivors, speeds)
    missing = sorted(set(range(units.num_units[family])) - survivors.held(family))
    held = {shard.device: len(shard[family]) for shard in survivors.shards}
    target = widths(sum(held.values()) + len(missing), survivors.devices, speeds, held)
    free = {device: target[device] - held[device] for device in survivors.devices}
    if family == ATTENTION:
        return _assign_heads(units, survivors, missing, free)
    # Neighbouring units stay together: a run in both checkpoint and arena is one copy.
    result, at = {}, 0
    for device, count in free.items():
        result[device] = missing[at : at + count]
        at += count
    return result


def _assign_experts(units: ModelUnits, survivors: Layout, speeds: Mapping[str, float] | None) -> dict[str, list[int]]:
    """Layer by layer, since the slowest device of each is waited for; among equals who has the fewest in all."""
    speed = {device: (speeds or {}).get(device, 1.0) for device in survivors.devices}
    per_layer = units.num_units[EXPERT] // units.num_groups(EXPERT)
    missing = sorted(set(range(units.num_units[EXPERT])) - survivors.held(EXPERT))
    in_layer = Counter((s.device, unit // per_layer) for s in survivors.shards for unit in s[EXPERT])
    in_all = {s.device: len(s[EXPERT]) for s in survivors.shards}
    result: dict[str, list[int]] = {device: [] for device in survivors.devices}
    for unit in missing:
        layer = unit // per_layer
        best = min(speed, key=lambda d, layer=layer: ((in_layer[d, layer] + 1) / speed[d], (in_all[d] + 1) / speed[d]))
        in_layer[best, layer] += 1
        in_all[best] += 1
        result[best].append(unit)
    return result


def _assign_heads(
    units: ModelUnits, survivors: Layout, missing: list[int], free: dict[str, int]
) -> dict[str, list[int]]:
    groups: dict[int, list[int]] = {}
    for head in missing:
        groups.setdefault(units.kv_head_of(head), []).append(head)
    near = {g: [s.device for s in survivors.shards if g in s[KV]] for g in groups}
    return assign_heads(groups, near, free)


def _reasons(units: ModelUnits, plan: Plan, lost: Collection[str]) -> tuple[str, ...]:
    """Why the plan is as it is, in the words that the recovery's story prints."""
    reasons = []
    survivors = plan.before.without(lost)
    for family in units.families:
        count = units.num_units[family] - len(survivors.held(family))
        if count:
            got = Counter(m.device for m in plan.moves if m.family == family)
            spread = ", ".join(f"{d} +{n}" for d, n in sorted(got.items()))
            reasons.append(f"{family}: {count} unit(s) had no other holder, loaded from the host: {spread}")
    extra = plan.replica_bytes // units.unit_bytes[KV]
    if extra:
        reasons.append(f"kv: {extra} further KV head copy(ies), because the new cut splits their q heads")
    return tuple(reasons) or ("every lost unit has a surviving holder: nothing to load",)
