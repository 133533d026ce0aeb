"""Which device holds which units, in which slots. A value: frozen, printable, comparable."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from anchortp.errors import ConfigError, DoesNotFit
from anchortp.layout.units import ATTENTION, FAMILIES, KV, ModelUnits


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one device holds: per family (in the order of `FAMILIES`) its units in slot order."""

    device: str
    slots: tuple[tuple[int, ...], ...]

    def __getitem__(self, family: str) -> tuple[int, ...]:
        return self.slots[FAMILIES.index(family)]

    def appended(self, family: str, units: Iterable[int]) -> Shard:
        """The shard with `units` in the next free slots of `family`; what is there stays where it is."""
        index = FAMILIES.index(family)
        grown = (*self.slots[index], *units)
        return replace(self, slots=(*self.slots[:index], grown, *self.slots[index + 1 :]))

    def as_dict(self) -> dict[str, list[int]]:
        return {family: list(units) for family, units in zip(FAMILIES, self.slots, strict=True)}


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

    def weight_bytes(self, units: ModelUnits, device: str) -> int:
        """Bytes of weights on `device`, replicated tensors included."""
        shard = self[device]
        return units.replicated_bytes + sum(len(shard[f]) * units.unit_bytes[f] for f in FAMILIES)

    def check(self, units: ModelUnits) -> None:
        """Asserts what every complete layout promises: nothing missing, nothing twice on one device, one holder
        for all but KV heads, and beside every q head the KV head that it reads."""
        for family in FAMILIES:
            total = units.num_units[family]
            assert self.held(family) == set(range(total)), f"{family}: units are missing or unknown"
            for shard in self.shards:
                assert len(set(shard[family])) == len(shard[family]), f"{shard.device}: {family} unit twice"
            if family != KV:
                assert sum(len(s[family]) for s in self.shards) == total, f"{family}: a unit has two holders"
        for shard in self.shards:
            needed = {units.kv_head_of(q) for q in shard[ATTENTION]}
            assert needed == set(shard[KV]), f"{shard.device}: q heads {shard[ATTENTION]}, KV {shard[KV]}"


def empty_shard(device: str) -> Shard:
    return Shard(device=device, slots=((),) * len(FAMILIES))


def shard_from_dict(device: str, slots: Mapping[str, Sequence[int]]) -> Shard:
    return Shard(device=device, slots=tuple(tuple(slots[family]) for family in FAMILIES))


def initial_layout(
    units: ModelUnits, devices: Sequence[str], speeds: Mapping[str, float] | None = None
) -> Layout:
    """Cuts every family into contiguous intervals in rank order, even to within one unit, or by `speeds`
    (relative; a missing device counts 1.0). A device gets the KV heads that its q heads read.

    Raises DoesNotFit above one device per q head, ConfigError for doubled devices or speeds that are not > 0.
    """
    check_devices(units, devices, speeds)
    shards = {device: empty_shard(device) for device in devices}
    for family in FAMILIES:
        if family == KV:
            continue
        start = 0
        for device, width in widths(units.num_units[family], devices, speeds).items():
            shards[device] = shards[device].appended(family, range(start, start + width))
            start += width
    for device, shard in shards.items():
        heads = sorted({units.kv_head_of(q) for q in shard[ATTENTION]})
        shards[device] = shard.appended(KV, heads)
    return Layout(shards=tuple(shards.values()))


def check_devices(units: ModelUnits, devices: Sequence[str], speeds: Mapping[str, float] | None) -> None:
    """The errors that `initial_layout` documents."""
    if not devices or len(set(devices)) != len(devices):
        raise ConfigError(f"devices {list(devices)}: name at least one, each once.")
    if len(devices) > units.config.num_q_heads:
        raise DoesNotFit(
            f"{len(devices)} devices, but the model has {units.config.num_q_heads} q heads; "
            f"use at most {units.config.num_q_heads} devices."
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
    result = {device: (held or {}).get(device, 0) for device in devices}
    speed = {device: (speeds or {}).get(device, 1.0) for device in devices}
    for _ in range(total - sum(result.values())):
        best = min(devices, key=lambda d: (result[d] + 1) / speed[d])
        result[best] += 1
    return result
