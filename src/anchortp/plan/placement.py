"""Who keeps what, and how many units each device is still to receive: the part of a plan that balance decides.

For the policies that own *sets* of units. Per family (experts: per layer):
1. Units that no living device holds are missing. A device above the most that a balanced layout allows gives
   units up: second copies of experts first, which costs nothing, then the last of its units. So does the
   fullest one when others could not reach their least otherwise. A device that leaves gives up all.
2. Every device receives the least that balance demands. What then remains, at most a unit or so per device, goes
   one unit at a time, large units first, to the device that would have received everything soonest with it.
q heads come first, because where they go decides which KV heads must be copied (`heads.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from anchortp.layout import ATTENTION, EXPERT, KV
from anchortp.plan.heads import assign_heads, spread_heads
from anchortp.plan.problem import Problem

Widths = Mapping[tuple[str, int], Mapping[str, int]]  # (family, index of the group) -> device -> units


@dataclass(slots=True, kw_only=True)
class Pool:
    """Units of one family and group (layer) that need a new holder: `missing` have none, `released` still have."""

    missing: list[int] = field(default_factory=list)
    released: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.missing) + sum(map(len, self.released.values()))


@dataclass(slots=True, kw_only=True)
class Share:
    """One family and group, of `size` units (copies included) when all is done. Per device: how many it held before
    any was released, the fewest and the most it may have, and how many of the pool it receives; of these the least,
    and the most."""

    family: str
    size: int
    held: dict[str, int]
    low: Mapping[str, int]
    high: Mapping[str, int]
    pool: Pool
    least: dict[str, int]
    most: dict[str, int]
    incoming: dict[str, int]


@dataclass(slots=True, kw_only=True)
class Placement:
    """`kept`: per family and device the units it keeps, in slot order. `heads`: q heads that each device receives.
    `kv`: KV heads that each device receives. `shares`: all other families."""

    kept: dict[str, dict[str, tuple[int, ...]]]
    heads: dict[str, list[int]]
    head_holder: dict[int, str]  # q heads of `heads` that a living device still holds
    kv: dict[str, list[int]]
    shares: list[Share]

    def sizes(self, family: str) -> list[int]:
        return [share.size for share in self.shares if share.family == family]


def place(problem: Problem, slow: Mapping[str, float], widths: Widths | None = None) -> Placement:
    """A balanced placement in which as little as possible moves. `slow`: seconds per byte into each device, to
    choose by. `widths`: of some groups, as they are wanted; within the bounds."""
    kept: dict[str, dict[str, tuple[int, ...]]] = {}
    shares: list[Share] = []
    for family in problem.families:
        if family not in (ATTENTION, KV):
            kept[family], found = _shares(problem, family, widths or {})
            shares += found
    load = _Load(problem, slow)
    for share in shares:
        size = problem.size(share.family)
        for device, count in share.least.items():
            load.add(device, count * size)
            share.incoming[device] = count
    kept[ATTENTION], heads, head_holder = _place_heads(problem, load, (widths or {}).get((ATTENTION, 0)))
    kept[KV], kv = kv_after(problem, kept[ATTENTION], heads)
    for device in problem.devices:
        load.add(device, len(heads[device]) * problem.size(ATTENTION))
        load.add(device, len(kv[device]) * (problem.size(KV) + problem.plane_bytes) if kv[device] else 0)
    _spread_remainders(problem, shares, load, kept)
    return Placement(kept=kept, heads=heads, head_holder=head_holder, kv=kv, shares=shares)


# ------------------------------------------------------------------------------------------------ retaining


def _shares(problem: Problem, family: str, widths: Widths) -> tuple[dict[str, tuple[int, ...]], list[Share]]:
    """What each device keeps of a family, and per group what is left to be placed."""
    num_groups = problem.units.num_groups(family)
    per_group = problem.units.num_units[family] // num_groups
    groups = _by_group(problem, family, num_groups, per_group)
    copies = _copies(problem, family)
    slots, gone = problem.slots[family], set()
    shares = []
    for at, (held, leaving, missing) in enumerate(groups):
        pool = Pool(missing=missing)
        pooled: set[int] = set()
        for device, units in leaving.items():
            orphans = [u for u in units if u not in pooled and (copies is None or not copies[u])]
            if orphans:
                pool.released[device] = orphans
                pooled.update(orphans)
        gone |= _drop_copies(problem, held, pool, copies)
        size = sum(map(len, held.values())) + len(pool)
        low, high = problem.bounds(size)
        wanted = widths.get((family, at))
        count = {device: len(units) for device, units in held.items()}
        gone |= _retain(problem, held, pool, copies, *((wanted, wanted) if wanted else (low, high)))
        share = Share(
            family=family,
            size=size,
            held=count,
            low=low,
            high=high,
            pool=pool,
            least={d: max(0, (wanted or low)[d] - len(held[d])) for d in problem.devices},
            most={d: max(0, high[d] - len(held[d])) for d in problem.devices},
            incoming={},
        )
        shares.append(share)
    kept = {d: slots.get(d, ()) for d in problem.devices}
    for device in {device for device, _ in gone}:
        kept[device] = tuple(unit for unit in kept[device] if (device, unit) not in gone)
    return kept, shares


Group = tuple[dict[str, list[int]], dict[str, list[int]], list[int]]


def _by_group(problem: Problem, family: str, num_groups: int, per_group: int) -> list[Group]:
    """Per group: units held by each device that goes on, by each that leaves, and those that nobody holds."""
    stay = set(problem.devices)
    groups: list[Group] = [({d: [] for d in problem.devices}, {}, []) for _ in range(num_groups)]
    for device, units in problem.slots[family].items():
        which = 0 if device in stay else 1
        for group, part in zip(groups, _parts(units, num_groups, per_group), strict=True):
            group[which][device] = part
    for group, part in zip(groups, _parts(problem.missing[family], num_groups, per_group), strict=True):
        group[2].extend(part)
    return groups


def _parts(units: Sequence[int], num_groups: int, per_group: int) -> list[list[int]]:
    """The units of each group, ascending (if there is but one group: as given)."""
    if num_groups == 1:
        return [list(units)]
    order = sorted(units)
    ends = [bisect_left(order, (group + 1) * per_group) for group in range(num_groups)]
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _copies(problem: Problem, family: str) -> Counter[int] | None:
    """How many devices of the new group hold each unit; None if no unit has two living holders."""
    slots = problem.slots[family]
    if sum(map(len, slots.values())) + len(problem.missing[family]) == problem.units.num_units[family]:
        return None
    stay = set(problem.devices)
    return Counter(unit for device, units in slots.items() if device in stay for unit in units)


def _drop_copies(
    problem: Problem, held: dict[str, list[int]], pool: Pool, copies: Counter[int] | None
) -> set[tuple[str, int]]:
    """Takes copies off devices above their most while there are any. Returns them as (device, unit)."""
    dropped: set[tuple[str, int]] = set()
    while copies is not None:
        _, high = problem.bounds(sum(map(len, held.values())) + len(pool))
        spare = _spare_copy(problem, held, high, copies)
        if spare is None:
            break
        held[spare[0]].remove(spare[1])
        copies[spare[1]] -= 1
        dropped.add(spare)
    return dropped


def _retain(
    problem: Problem,
    held: dict[str, list[int]],
    pool: Pool,
    copies: Counter[int] | None,
    low: Mapping[str, int],
    high: Mapping[str, int],
) -> set[tuple[str, int]]:
    """Shortens the lists in `held` until all widths between `low` and `high` are in reach; fills `pool` with what is
    given up. Returns that as (device, unit)."""
    dropped: set[tuple[str, int]] = set()
    short = sum(max(0, low[d] - len(units)) for d, units in held.items()) - len(pool)
    for device, units in held.items():
        over = len(units) - high[device]
        for _ in range(over):
            _release(device, units, pool, copies, dropped)
        short -= max(0, over)
    for _ in range(short):
        open_to = [d for d in held if len(held[d]) > low[d]]
        giver = min(open_to, key=lambda d: (way_out(problem, d), -len(held[d]) / problem.speed(d)))
        _release(giver, held[giver], pool, copies, dropped)
    return dropped


def _spare_copy(
    problem: Problem, held: dict[str, list[int]], high: Mapping[str, int], copies: Counter[int]
) -> tuple[str, int] | None:
    """A unit on a device above its most that another device of the group holds too. It goes from the device that has
    the slowest way out: what it would have to release else would be the dearest to copy."""
    for device in sorted(held, key=lambda d: -way_out(problem, d)):
        if len(held[device]) > high[device]:
            for unit in reversed(held[device]):
                if copies[unit] > 1:
                    return device, unit
    return None


def way_out(problem: Problem, device: str) -> float:
    """Seconds per byte from a device to whichever device that will receive units it reaches soonest."""
    return min(
        (way(problem, device, other) for other in problem.fresh or problem.devices if other != device),
        default=0.0,
    )


def way(problem: Problem, source: str, device: str) -> float:
    """Seconds per byte from one device to another when nothing else moves: the slowest link of the quickest way."""
    route = problem.network.route(source, device)
    return math.inf if route is None else max((problem.network.seconds_per_byte[link] for link in route), default=0.0)


def _release(
    device: str, units: list[int], pool: Pool, copies: Counter[int] | None, dropped: set[tuple[str, int]]
) -> None:
    """Gives up the last unit of which this is the only copy in the new group."""
    at = next(i for i in range(len(units) - 1, -1, -1) if copies is None or copies[units[i]] == 1)
    unit = units.pop(at)
    pool.released.setdefault(device, []).append(unit)
    dropped.add((device, unit))


# -------------------------------------------------------------------------------------------------- q heads


def _place_heads(
    problem: Problem, load: _Load, wanted: Mapping[str, int] | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[int]], dict[int, str]]:
    stay = set(problem.devices)
    held = {d: list(problem.slots[ATTENTION].get(d, ())) for d in problem.devices}
    held = {d: _by_group_size(problem, units) for d, units in held.items()}
    pool = Pool(missing=list(problem.missing[ATTENTION]))
    for device, units in problem.slots[ATTENTION].items():
        if device not in stay and units:
            pool.released[device] = list(units)
    low, high = (wanted, wanted) if wanted else problem.bounds(problem.num_heads)
    dropped = _retain(problem, held, pool, None, low, high)
    groups: dict[int, list[int]] = {}
    holder = {unit: device for device, units in pool.released.items() for unit in units}
    for head in sorted([*pool.missing, *holder]):
        groups.setdefault(problem.units.kv_head_of(head) if problem.units.num_units.get(KV) else 0, []).append(head)
    near = {g: [d for d in problem.devices if g in problem.held.get(KV, {}).get(d, ())] for g in groups}
    free = {d: max(0, low[d] - len(held[d])) for d in problem.devices}
    rest = sum(map(len, groups.values())) - sum(free.values())
    wanted = Counter(d for g in groups for d in near[g])
    size = problem.size(ATTENTION)

    def cost(device: str) -> tuple[bool, tuple[float, float]]:
        far = not wanted[device] > free[device]  # q heads go where their KV head is, before all else
        island = load.island[device]
        others = sum(free[d] for d in problem.devices if d != device and load.island[d] == island)
        island_s, device_s = load.done_with(device, (free[device] + 1) * size)
        return far, (island_s + others * size / load.speed[island], device_s)

    for _ in range(rest):
        free[min((d for d in problem.devices if len(held[d]) + free[d] < high[d]), key=cost)] += 1
    kept = {d: tuple(u for u in problem.slots[ATTENTION].get(d, ()) if (d, u) not in dropped) for d in held}
    heads = assign_heads(groups, near, free)
    if holder:
        _swap_towards_holders(problem, kept, heads, holder)
    return kept, heads, holder


def spread_released_heads(problem: Problem, placement: Placement) -> Placement:
    """The placement with the q heads that living devices give up dealt out anew, evenly over the pairs of devices.
    Each device receives as many as before."""
    holder, has_kv = placement.head_holder, KV in problem.families
    lost = {d: [h for h in heads if h not in holder] for d, heads in placement.heads.items()}
    lost_kv = kv_after(problem, placement.kept[ATTENTION], lost)
    moved = spread_heads(
        holder,
        {head: problem.units.kv_head_of(head) if has_kv else 0 for head in holder},
        {d: {*lost_kv[0][d], *lost_kv[1][d]} for d in problem.devices},
        {d: len(heads) - len(lost[d]) for d, heads in placement.heads.items()},
        {(s, d): way(problem, s, d) if s != d else 0.0 for s in set(holder.values()) for d in problem.devices},
    )
    heads = {d: sorted([*lost[d], *moved[d]]) for d in problem.devices}
    kept_kv, kv = kv_after(problem, placement.kept[ATTENTION], heads)
    return replace(placement, heads=heads, kept=placement.kept | {KV: kept_kv}, kv=kv)


def interval_heads(problem: Problem, placement: Placement) -> Placement:
    """The placement with the q heads cut into contiguous intervals in rank order, whoever holds them now: more heads
    may move, but fewer devices share a KV head."""
    held = {d: set(problem.slots[ATTENTION].get(d, ())) for d in problem.alive}
    holder = {head: device for device, heads in held.items() for head in heads}
    width, kept, heads, start = problem.interval_widths(), {}, {}, 0
    for device in problem.devices:
        mine = range(start, start + width[device])
        start += width[device]
        kept[device] = tuple(h for h in problem.slots[ATTENTION].get(device, ()) if h in mine)
        heads[device] = [h for h in mine if h not in held.get(device, ())]
    kept_kv, kv = kv_after(problem, kept, heads)
    return replace(
        placement,
        heads=heads,
        head_holder={h: holder[h] for mine in heads.values() for h in mine if h in holder},
        kept=placement.kept | {ATTENTION: kept, KV: kept_kv},
        kv=kv,
    )


def _swap_towards_holders(
    problem: Problem,
    kept: Mapping[str, Sequence[int]],
    heads: dict[str, list[int]],
    holder: Mapping[int, str],
) -> None:
    """Swaps q heads between the devices that receive them while that brings heads nearer to where they come from,
    the copies of KV heads that they need counted in."""
    kv_size = problem.size(KV) + problem.plane_bytes if problem.units.num_units.get(KV) else 0
    group_of = problem.units.kv_head_of
    stores = into(problem)

    def cost(device: str, mine: list[int]) -> float:
        total = 0.0
        for head in mine:
            source = holder.get(head)
            total += problem.size(ATTENTION) * (way(problem, source, device) if source else stores[device])
        if kv_size:
            there = problem.held[KV].get(device, frozenset())
            for group in {group_of(head) for head in mine} - there:
                near = [way(problem, source, device) for source in problem.holders(KV, group)]
                total += kv_size * min([stores[device], *near])
        return total

    now = {device: cost(device, mine) for device, mine in heads.items()}
    receivers = [device for device, mine in heads.items() if mine]
    for _ in range(4):
        swapped = False
        for a, b in combinations(receivers, 2):
            for i, x in enumerate(heads[a]):
                for j, y in enumerate(heads[b]):
                    if holder.get(x) == holder.get(y) and group_of(x) == group_of(y):
                        continue
                    mine, theirs = list(heads[a]), list(heads[b])
                    mine[i], theirs[j] = y, x
                    after = cost(a, mine), cost(b, theirs)
                    if sum(after) < (now[a] + now[b]) * (1 - 1e-9):
                        heads[a], heads[b], now[a], now[b], swapped = mine, theirs, *after, True
                        x = y
        if not swapped:
            break
    for device in receivers:
        heads[device].sort()


def into(problem: Problem) -> Mapping[str, float]:
    """Seconds per byte into each device from the stores when nothing else moves: the slowest link of the quickest
    way."""
    network = problem.network
    _, last = network.quickest(problem.stores)
    return {
        device: max((network.seconds_per_byte[link] for link in network.path(last, device)), default=0.0)
        for device in problem.devices
    }


def _by_group_size(problem: Problem, heads: list[int]) -> list[int]:
    """Heads in the order in which they are kept: the largest groups of one KV head first."""
    if not problem.units.num_units.get(KV):
        return heads
    size = Counter(problem.units.kv_head_of(head) for head in heads)
    return sorted(heads, key=lambda h: (-size[problem.units.kv_head_of(h)], problem.units.kv_head_of(h), h))


def kv_after(
    problem: Problem, kept: Mapping[str, Sequence[int]], heads: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[int]]]:
    """Per device: KV heads it keeps (in slot order) and those it must receive."""
    kept_kv, new_kv = {}, {}
    for device in problem.devices:
        needed = problem.kv_heads({*kept[device], *heads[device]})
        held = problem.slots.get(KV, {}).get(device, ())
        kept_kv[device] = tuple(head for head in held if head in needed)
        new_kv[device] = sorted(needed.difference(held))
    return kept_kv, new_kv


# ---------------------------------------------------------------------------------------------- remainders


class _Load:
    """Bytes that each device receives so far, and how soon it and its island would be done with `size` more."""

    def __init__(self, problem: Problem, slow: Mapping[str, float]):
        self.slow, self.island = slow, problem.islands
        self.bytes = dict.fromkeys(problem.devices, 0.0)
        self.on_island = dict.fromkeys(self.island.values(), 0.0)
        self.speed = dict.fromkeys(self.island.values(), 0.0)
        for device in problem.devices:
            self.speed[self.island[device]] += 1.0 / slow[device]

    def add(self, device: str, num_bytes: float) -> None:
        self.bytes[device] += num_bytes
        self.on_island[self.island[device]] += num_bytes

    def done_with(self, device: str, size: float) -> tuple[float, float]:
        island = self.island[device]
        island_s = (self.on_island[island] + size) / self.speed[island]
        return island_s, self.slow[device] * (self.bytes[device] + size)


def _spread_remainders(
    problem: Problem, shares: Sequence[Share], load: _Load, kept: Mapping[str, Mapping[str, Sequence[int]]]
) -> None:
    """Deals out what balance leaves open, large units first: one unit at a time to the island, and in it the device,
    that would be done soonest with it. Experts go first to whoever has the fewest in all layers together."""
    for share in sorted(shares, key=lambda s: -problem.size(s.family)):
        if share.family != EXPERT:
            _spread(problem, share, load, None)
    experts = [share for share in shares if share.family == EXPERT]
    if experts:
        width = {d: len(kept[EXPERT][d]) + sum(s.incoming[d] for s in experts) for d in problem.devices}
        for share in experts:
            _spread(problem, share, load, width)
        _even_out(problem, experts, width)


def _spread(problem: Problem, share: Share, load: _Load, width: dict[str, int] | None) -> None:
    size, incoming = problem.size(share.family), share.incoming

    def cost(device: str) -> tuple[float, tuple[float, float]]:
        rank = (width[device] + 1) / problem.speed(device) if width is not None else 0.0
        return rank, load.done_with(device, size)

    for _ in range(len(share.pool) - sum(incoming.values())):
        best = min((d for d in problem.devices if incoming[d] < share.most[d]), key=cost)
        incoming[best] += 1
        load.add(best, size)
        if width is not None:
            width[best] += 1


def _even_out(problem: Problem, shares: Sequence[Share], width: dict[str, int]) -> None:
    """Shifts single experts between devices, within the bounds of each layer, until the widths over all layers are
    as balanced as those bounds allow."""
    low, high = problem.total_bounds(EXPERT, [share.size for share in shares])
    speed = {device: problem.speed(device) for device in problem.devices}
    while True:
        order = sorted(problem.devices, key=lambda d: width[d] / speed[d])
        pair = next(
            (
                (share, a, b)
                for b in reversed(order)
                for a in order
                if width[b] / speed[b] > (width[a] + 1) / speed[a] and (width[b] > high[b] or width[a] < low[a])
                for share in shares
                if share.incoming[b] > share.least[b] and share.incoming[a] < share.most[a]
            ),
            None,
        )
        if pair is None:
            return
        share, a, b = pair
        share.incoming[b] -= 1
        share.incoming[a] += 1
        width[b] -= 1
        width[a] += 1
