"""Which device holds which units, in which slots. A value: frozen, printable, comparable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from anchortp.errors import ConfigError, DoesNotFit
from anchortp.layout.units import ATTENTION, EVERY_FAMILY, EXPERT, FAMILIES, KV, UnitCatalog


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one device holds: per family its units in slot order.

    `slots` goes by the order of `EVERY_FAMILY`; the experts' entry is there only if the device holds some.
    """

    device: str
    slots: tuple[tuple[int, ...], ...]

    def __getitem__(self, family: str) -> tuple[int, ...]:
        index = EVERY_FAMILY.index(family)
        return self.slots[index] if index < len(self.slots) else ()

    def appended(self, family: str, units: Iterable[int]) -> Shard:
        """The shard with `units` in the next free slots of `family`; what is there stays where it is."""
        return self.replaced(family, (*self[family], *units))

    def replaced(self, family: str, units: Iterable[int]) -> Shard:
        """The shard with `units`, in slot order, as all that it has of `family`."""
        index, held = EVERY_FAMILY.index(family), tuple(units)
        if index >= len(self.slots) and not held:
            return self
        return replace(self, slots=(*self.slots[:index], held, *self.slots[index + 1 :]))

    def as_dict(self) -> dict[str, list[int]]:
        return {family: list(units) for family, units in zip(EVERY_FAMILY, self.slots, strict=False)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The shards of all devices of a group, in rank order."""

    shards: tuple[Shard, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(shard.device for shard in self.shards)

    def __getitem__(self, device: str) -> Shard:
        for shard in self.shards:
            if shard.device == device:
                return shard
        raise KeyError(device)

    def rank(self, device: str) -> int:
        return self.devices.index(device)

    def without(self, lost: Collection[str]) -> Layout:
        return Layout(shards=tuple(s for s in self.shards if s.device not in lost))

    def with_shard(self, shard: Shard) -> Layout:
        """The layout with the shard of that device replaced, or appended as the last rank."""
        if shard.device not in self.devices:
            return Layout(shards=(*self.shards, shard))
        return Layout(shards=tuple(shard if s.device == shard.device else s for s in self.shards))

    def holders(self, family: str, unit: int) -> tuple[str, ...]:
        return tuple(s.device for s in self.shards if unit in s[family])

    def held(self, family: str) -> set[int]:
        """Units of `family` that at least one device holds."""
        return {unit for shard in self.shards for unit in shard[family]}

    def weight_bytes(self, units: UnitCatalog, device: str) -> int:
        """Bytes of weights on `device`, replicated tensors included."""
        shard = self[device]
        return units.replicated_bytes + sum(len(shard[f]) * size for f, size in units.unit_bytes.items())

    def check(self, units: UnitCatalog) -> None:
        """Asserts what every complete layout promises: nothing missing, nothing twice on one device, one holder
        for all but KV heads and experts, and beside every q head the KV head that it reads."""
        for family in EVERY_FAMILY:
            total = units.num_units.get(family, 0)
            assert self.held(family) == set(range(total)), f"{family}: units are missing or unknown"
            for shard in self.shards:
                assert len(set(shard[family])) == len(shard[family]), f"{shard.device}: {family} unit twice"
            if family not in (KV, EXPERT):
                assert sum(len(s[family]) for s in self.shards) == total, f"{family}: a unit has two holders"
        for shard in self.shards:
            needed = {units.kv_head_of(q) for q in shard[ATTENTION]}
            assert needed == set(shard[KV]), f"{shard.device}: q heads {shard[ATTENTION]}, KV {shard[KV]}"


def empty_shard(device: str) -> Shard:
    return Shard(device=device, slots=((),) * len(FAMILIES))


def shard_from_dict(device: str, slots: Mapping[str, Sequence[int]]) -> Shard:
    """The shard whose units per family are `slots`; families of which it has none may be left out."""
    shard = Shard(device=device, slots=tuple(tuple(slots.get(family, ())) for family in FAMILIES))
    return shard.appended(EXPERT, slots.get(EXPERT, ()))


def initial_layout(units: UnitCatalog, devices: Sequence[str], speeds: Mapping[str, float] | None = None) -> Layout:
    """Cuts every family (experts: of each layer) into contiguous intervals in rank order, even to within one
    unit, or by `speeds` (relative; a missing device counts 1.0). A device gets the KV heads that its q heads
    read.

    Raises DoesNotFit above one device per q head, ConfigError for doubled devices or speeds that are not > 0.
    """
    check_devices(units, devices, speeds)
    shards = {device: empty_shard(device) for device in devices}
    experts = _initial_experts(units, devices, speeds)
    for family in FAMILIES:
        if family == KV:
            continue
        start = 0
        for device, width in widths(units.num_units[family], devices, speeds).items():
            shards[device] = shards[device].appended(family, range(start, start + width))
            start += width
    for device, shard in shards.items():
        heads = sorted({units.kv_head_of(q) for q in shard[ATTENTION]})
        shards[device] = shard.appended(KV, heads).appended(EXPERT, experts[device])
    return Layout(shards=tuple(shards.values()))


def _initial_experts(
    units: UnitCatalog, devices: Sequence[str], speeds: Mapping[str, float] | None
) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {device: [] for device in devices}
    start = 0
    for cut in group_widths(units.num_units.get(EXPERT, 0), units.num_groups(EXPERT), devices, speeds):
        for device, width in cut.items():
            result[device].extend(range(start, start + width))
            start += width
    return result


def check_devices(units: UnitCatalog, devices: Sequence[str], speeds: Mapping[str, float] | None) -> None:
    """The errors that `initial_layout` documents."""
    if not devices or len(set(devices)) != len(devices):
        raise ConfigError(f"devices {list(devices)}: name at least one, each once.")
    num_heads = units.num_units[ATTENTION]
    if len(devices) > num_heads:
        raise DoesNotFit(
            f"{len(devices)} devices, but the model has {num_heads} q heads; use at most {num_heads} devices."
        )
    for device, speed in (speeds or {}).items():
        if not speed > 0:
            raise ConfigError(f"speed of {device} is {speed}; speeds are relative and greater than 0.")


def widths(
    total: int,
    devices: Sequence[str],
    speeds: Mapping[str, float] | None = None,
    held: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many of `total` units each device gets when nobody gives back what it holds.

    One unit at a time goes to the device that would be done first with it, ties to the lower rank. That keeps
    the slowest device's time (width over speed) minimal; with equal speeds the widths end within one unit of
    each other whenever those in `held` began so.
    """
    speed = {device: (speeds or {}).get(device, 1.0) for device in devices}
    if held is None:
        # Whoever serves so never gets less than the whole part of its share: begin there, not at nothing.
        unit = total / sum(speed.values())
        held = {device: max(0, int(unit * speed[device] - 1e-6)) for device in devices}
    result = {device: held.get(device, 0) for device in devices}
    for _ in range(total - sum(result.values())):
        best = min(devices, key=lambda d: (result[d] + 1) / speed[d])
        result[best] += 1
    return result


def group_widths(
    total: int, num_groups: int, devices: Sequence[str], speeds: Mapping[str, float] | None = None
) -> list[dict[str, int]]:
    """`total` units in `num_groups` equal groups, each spread over the devices as `widths` would, where the
    units that do not divide evenly go to the devices that have had the least (for their speed) so far."""
    if not total:
        return []
    assert total % num_groups == 0, f"{total} units do not fall into {num_groups} equal groups"
    per_group = total // num_groups
    so_far = dict.fromkeys(devices, 0)
    result = []
    for _ in range(num_groups):
        low, high = width_bounds(per_group, devices, speeds)
        cut = dict(low)
        for _ in range(per_group - sum(cut.values())):
            open_to = [d for d in devices if cut[d] < high[d]]
            best = min(open_to, key=lambda d: (so_far[d] + cut[d] + 1) / (speeds or {}).get(d, 1.0))
            cut[best] += 1
        for device, width in cut.items():
            so_far[device] += width
        result.append(cut)
    return result


def width_bounds(
    total: int, devices: Sequence[str], speeds: Mapping[str, float] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most units each device may have in a balanced layout: never less than the whole part of
    its share, and never so many that it would be slower than the slowest device of the best split. With equal
    speeds these are the share rounded down and up: widths within one unit of each other."""
    best = widths(total, devices, speeds)
    speed = {device: (speeds or {}).get(device, 1.0) for device in devices}
    slowest = max((width / speed[device] for device, width in best.items()), default=0.0)
    unit = total / sum(speed.values())
    low = {d: min(best[d], int(unit * speed[d] + 1e-6)) for d in devices}
    high = {d: max(best[d], int(slowest * speed[d] + 1e-6)) for d in devices}
    return low, high


def filled_bounds(
    held: Mapping[str, int], num_new: int, speeds: Mapping[str, float] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most units each device may have when `num_new` units go to whoever has fewest for its speed
    and nobody gives anything up: as water fills a vessel, to within one unit."""
    speed = {device: (speeds or {}).get(device, 1.0) for device in held}
    level, below, room = 0.0, 0.0, float(num_new)
    for device in sorted(held, key=lambda d: held[d] / speed[d]):
        if below and held[device] * below >= room * speed[device]:
            break
        below, room = below + speed[device], room + held[device]
        level = room / below
    low = {d: max(count, math.floor(level * speed[d] + 1e-6)) for d, count in held.items()}
    high = {d: max(count, math.ceil(level * speed[d] - 1e-6)) for d, count in held.items()}
    return low, high


def single_replicas(layout: Layout, units: UnitCatalog, speeds: Mapping[str, float] | None = None) -> Layout:
    """Of each expert only one replica: the one on the device that has fewest of its layer for its speed, or else fewest
    in all. What stays is in the same order."""
    per_layer = units.num_units[EXPERT] // units.num_groups(EXPERT)
    speed = {device: (speeds or {}).get(device, 1.0) for device in layout.devices}
    holders: dict[int, list[str]] = {}
    for shard in layout.shards:
        for unit in shard[EXPERT]:
            holders.setdefault(unit, []).append(shard.device)
    total: dict[str, set[int]] = {device: set() for device in layout.devices}
    count = Counter[tuple[str, int]]()
    for unit, of in sorted(holders.items(), key=lambda item: (len(item[1]), item[0])):  # no choice first
        layer = unit // per_layer
        keeper = min(of, key=lambda d: (count[d, layer] / speed[d], len(total[d]) / speed[d]))
        count[keeper, layer] += 1
        total[keeper].add(unit)
    for shard in layout.shards:
        if len(total[shard.device]) < len(shard[EXPERT]):
            kept = (unit for unit in shard[EXPERT] if unit in total[shard.device])
            layout = layout.with_shard(shard.replaced(EXPERT, kept))
    return layout
