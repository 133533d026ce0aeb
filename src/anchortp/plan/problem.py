"""What a planner is asked: which units are where, which devices go on, over which links. A value.

Every change is the same question with other numbers:

| change | `before` | `lost` | `devices` |
|---|---|---|---|
| first load | empty | - | all |
| shrink after losses | the old group | the lost | the survivors |
| planned shrink, move to other nodes | the old group | - (those that leave are sources) | who stays, who comes |
| grow, replace | the old group | the lost, if any | the survivors and the new |
| other speeds | the group | - | the same, with other `speeds` |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from anchortp.errors import ConfigError, DoesNotFit
from anchortp.layout import (
    ATTENTION,
    EVERY_FAMILY,
    EXPERT,
    KV,
    Layout,
    UnitCatalog,
    check_devices,
    filled_bounds,
    single_replicas,
    width_bounds,
    widths,
)
from anchortp.plan.plan import PLANE, REPLICATED
from anchortp.plan.topology import Topology

Bounds = tuple[dict[str, int], dict[str, int]]  # fewest and most units per device
Experts = Literal["even", "stay", "single"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Checked on construction: ConfigError for devices that contradict each other, DoesNotFit for nobody left or
    more devices than q heads, TopologyError for a device that can no longer be reached from the weights.

    `devices`: the group that goes on, in rank order. `lost`: devices of `before` whose memory is gone.
    `speeds`: relative, 1.0 where missing. `memory_bytes`: per device, for weights and planes; where missing, the
    topology's, else unlimited. `plane_bytes`: KV cache in use per KV head (0: planes are not planned, and whoever
    moves a KV head sees to its plane).
    `planes_at`: stores that hold a mirror of every plane. `weights_at`: other than the topology's. A device of
    `before` whose shard is empty is a new one: it lacks the replicated tensors too.

    What the one who carries out the plan can do: `relays`: send on what arrives in the same stage, to devices that
    are further on its way or need it as well; `parts`: fetch parts of a unit from several sources.
    """

    units: UnitCatalog
    before: Layout
    devices: tuple[str, ...]
    topology: Topology
    lost: tuple[str, ...] = ()
    speeds: Mapping[str, float] | None = None
    memory_bytes: Mapping[str, int] | None = None
    plane_bytes: int = 0
    planes_at: tuple[str, ...] = ()
    weights_at: tuple[str, ...] | None = None
    relays: bool = True
    parts: bool = True
    experts: Experts = "even"

    def __post_init__(self) -> None:
        if not self.devices:
            raise DoesNotFit(f"no device is left of {', '.join(self.before.devices)}; add one and start again.")
        check_devices(self.units, self.devices, self.speeds)
        known = self.topology.by_name
        for name in (*self.before.devices, *self.devices, *self.stores, *self.planes_at):
            if name not in known:
                places = ", ".join(known)
                raise ConfigError(f"{name!r} is not in topology {self.topology.name!r}, which has {places}.")
        for name in (*self.stores, *self.planes_at):
            if known[name].kind not in ("host", "disk"):
                stores = ", ".join(place.name for place in known.values() if place.kind in ("host", "disk"))
                raise ConfigError(
                    f"{name!r} is a {known[name].kind}; weights and mirrors are read from a host or disk: {stores}."
                )
        for name in self.lost:
            if name in self.devices or name not in self.before.devices:
                raise ConfigError(f"{name!r} cannot be lost: it must be in the old layout and not in the new one.")
        if self.plane_bytes < 0:
            raise ConfigError(f"plane_bytes is {self.plane_bytes}; it must be 0 or more.")
        _ = self.network

    # ---------------------------------------------------------------------------------------- what moves

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Families of the layout that the model has."""
        return tuple(f for f in EVERY_FAMILY if self.units.num_units.get(f, 0))

    def size(self, family: str) -> int:
        """Bytes of one unit, planes and replicated tensors included."""
        if family == PLANE:
            return self.plane_bytes
        return self.units.replicated_bytes if family == REPLICATED else self.units.unit_bytes[family]

    @cached_property
    def stores(self) -> tuple[str, ...]:
        return self.topology.weights_at if self.weights_at is None else self.weights_at

    @cached_property
    def network(self) -> Topology:
        """The topology without what is lost. Devices outside both groups take no part, not even as a relay."""
        topology = self.topology if self.relays else replace(self.topology, relays=False)
        absent = set(topology.devices) - set(self.alive) - set(self.devices)
        return topology.without(absent) if absent else topology

    # ------------------------------------------------------------------------------------------- census

    @cached_property
    def alive(self) -> tuple[str, ...]:
        """Devices of the old layout that still hold something."""
        return tuple(s.device for s in self.before.shards if s.device not in self.lost and any(s.slots))

    @cached_property
    def fresh(self) -> tuple[str, ...]:
        """Devices of the new group that hold nothing yet, not even the replicated tensors."""
        return tuple(device for device in self.devices if device not in self.alive)

    @cached_property
    def slots(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Per family and living device: its units in slot order."""
        return {
            family: {s.device: s[family] for s in self.before.shards if s.device in self.alive}
            for family in self.families
        }

    @cached_property
    def held(self) -> dict[str, dict[str, frozenset[int]]]:
        """As `slots`, as sets, and with an empty one for devices that are new."""
        return {
            family: dict.fromkeys(self.fresh, frozenset()) | {d: frozenset(units) for d, units in slots.items()}
            for family, slots in self.slots.items()
        }

    @cached_property
    def missing(self) -> dict[str, tuple[int, ...]]:
        """Per family, ascending: units that no living device holds."""
        found = {}
        for family, slots in self.slots.items():
            left = set(range(self.units.num_units[family]))
            for units in slots.values():
                left.difference_update(units)
            found[family] = tuple(sorted(left))
        return found

    def holders(self, family: str, unit: int) -> tuple[str, ...]:
        """Living devices that hold the unit (a plane: its KV head), in rank order."""
        held = self.held[KV if family == PLANE else family]
        return tuple(device for device in self.alive if unit in held[device])

    def stores_of(self, family: str) -> tuple[str, ...]:
        """Stores that a unit of the family can be read from."""
        return self.planes_at if family == PLANE else self.stores

    @cached_property
    def islands(self) -> dict[str, str]:
        """Per device of the group the first one of its island: devices joined by links of their own, or by switches
        that no host is on. Inside an island what one device cannot receive in time others can receive for it."""
        network = self.network
        if not network.relays:
            return {device: device for device in self.devices}
        stores = {place.name for place in network.places if place.kind in ("host", "disk")}
        roots = {end for link in network.links if stores & {link.src, link.dst} for end in (link.src, link.dst)}
        inside = {p.name for p in network.places if p.kind == "device" or p.name not in roots | stores}
        near: dict[str, list[str]] = {name: [] for name in inside}
        for link in network.links:
            if link.src in inside and link.dst in inside:
                near[link.src].append(link.dst)
                near[link.dst].append(link.src)
        found: dict[str, str] = {}
        for device in self.devices:
            queue = [device] if device not in found else []
            while queue:
                name = queue.pop()
                if name not in found:
                    found[name] = device
                    queue += near[name]
        return {device: found[device] for device in self.devices}

    @cached_property
    def lost_bytes(self) -> int:
        """Weights that no living device holds: what any plan must load at least."""
        return sum(len(units) * self.size(family) for family, units in self.missing.items())

    def stays(self, family: str) -> bool:
        """Whether nobody gives up a unit of the family (but replicas) for the sake of balance."""
        return family == EXPERT and self.experts != "even"

    @cached_property
    def staying(self) -> list[dict[str, list[int]]]:
        """Per layer: the experts that each device of the group keeps, if they stay."""
        group = Layout(shards=tuple(shard for shard in self.before.shards if shard.device in self.devices))
        if self.experts == "single":
            group = single_replicas(group, self.units, self.speeds)
        num_layers = self.units.num_groups(EXPERT)
        per_layer = self.units.num_units[EXPERT] // num_layers
        layers: list[dict[str, list[int]]] = [{device: [] for device in self.devices} for _ in range(num_layers)]
        for shard in group.shards:
            for unit in sorted(shard[EXPERT]):
                layers[unit // per_layer][shard.device].append(unit)
        return layers

    # ------------------------------------------------------------------------------------------- limits

    def bounds(self, num_units: int) -> Bounds:
        """Fewest and most of `num_units` units per device of the new group, in a balanced layout. (Not to be changed
        by the caller: they are remembered.)"""
        if num_units not in self._bounds:
            self._bounds[num_units] = width_bounds(num_units, self.devices, self.speeds)
        return self._bounds[num_units]

    @cached_property
    def _bounds(self) -> dict[int, Bounds]:
        return {}

    def interval_widths(self) -> dict[str, int]:
        """Widths of the q heads when they are cut in rank order into equal intervals, or by speed."""
        if self.speeds:
            return widths(self.num_heads, self.devices, self.speeds)
        total, n = self.num_heads, len(self.devices)
        return {d: (r + 1) * total // n - r * total // n for r, d in enumerate(self.devices)}

    def speed(self, device: str) -> float:
        return self.speeds.get(device, 1.0) if self.speeds else 1.0

    def total_bounds(self, family: str, sizes: Sequence[int] | None = None) -> Bounds:
        """As `bounds`, for all groups of a family together. `sizes`: units per group, if some have copies.

        A step waits for the fullest device of each layer, so it is each layer of experts that must be balanced. All
        layers together are balanced too, as far as the bounds of the layers allow it and no unit has to move that
        may stay: what a device holds beyond its most is let be, and the others may have so much less.
        """
        if sizes is None:
            groups = self.units.num_groups(family)
            sizes = [self.units.num_units[family] // groups] * groups
        least, most = self._bounds_of_staying if self.stays(family) else self._bounds_of_groups(sizes)
        if len(sizes) == 1:
            return least, most
        total = sum(sizes)
        low, high = self.bounds(total)
        held = {d: min(len(self.slots[family].get(d, ())), most[d]) for d in self.devices}
        low = {d: min(most[d], max(least[d], low[d])) for d in self.devices}
        high = {d: max(least[d], min(most[d], high[d])) for d in self.devices}
        beyond = {d: max(0, held[d] - high[d]) for d in self.devices}
        wanting = max(0, total - sum(high.values()))
        excess = max(0, sum(low.values()) - total) + sum(beyond.values())
        return (
            {d: max(least[d], low[d] - excess) for d in self.devices},
            {d: min(most[d], high[d] + max(beyond[d], wanting)) for d in self.devices},
        )

    def _bounds_of_groups(self, sizes: Sequence[int]) -> Bounds:
        """As they are when each group for itself is balanced."""
        return _sums(self.devices, ((*self.bounds(size), count) for size, count in Counter(sizes).items()))

    @cached_property
    def _bounds_of_staying(self) -> Bounds:
        per_layer = self.units.num_units[EXPERT] // self.units.num_groups(EXPERT)
        layers = []
        for keeps in self.staying:
            held = {device: len(units) for device, units in keeps.items()}
            num_new = per_layer - len({unit for units in keeps.values() for unit in units})
            layers.append((*filled_bounds(held, num_new, self.speeds), 1))
        return _sums(self.devices, layers)

    def budget(self, device: str) -> int | None:
        """Bytes of weights and planes that the device may hold at any time."""
        if self.memory_bytes is not None and device in self.memory_bytes:
            return self.memory_bytes[device]
        return self.topology.by_name[device].memory_bytes

    def shard_bytes(self, widths: Mapping[str, int]) -> int:
        """Bytes of a shard with so many units per family, replicated tensors and planes included."""
        weights = sum(count * self.size(family) for family, count in widths.items())
        return self.units.replicated_bytes + weights + widths.get(KV, 0) * self.plane_bytes

    def kv_head_of(self, q_head: int) -> int:
        """The KV head that a q head reads; 0 for all if the model has none."""
        return self.units.kv_head_of(q_head) if KV in self.families else 0

    def kv_heads(self, q_heads: frozenset[int] | set[int]) -> set[int]:
        return {self.units.kv_head_of(q) for q in q_heads} if KV in self.families else set()

    def copy_bytes(self, kv_head: int) -> int:
        """What a further copy of this KV head must bring: weights, and its plane if any source has that."""
        plane = self.plane_bytes and (self.planes_at or self.holders(PLANE, kv_head))
        return self.size(KV) + (self.plane_bytes if plane else 0)

    @property
    def kv_bytes(self) -> int:
        """What a further copy of a KV head brings along: weights and plane."""
        return self.size(KV) + self.plane_bytes if KV in self.families else 0

    @property
    def num_heads(self) -> int:
        return self.units.num_units[ATTENTION]


def _sums(devices: Sequence[str], parts: Iterable[tuple[Mapping[str, int], Mapping[str, int], int]]) -> Bounds:
    """Of `(low, high)`, each that many times."""
    least, most = dict.fromkeys(devices, 0), dict.fromkeys(devices, 0)
    for low, high, count in parts:
        for device in devices:
            least[device] += low[device] * count
            most[device] += high[device] * count
    return least, most
