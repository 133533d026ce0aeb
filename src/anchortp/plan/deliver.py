"""From a placement to pieces on routes: which unit comes from where, and which way.

Everything that a device must receive is an item: units of one family with the places they can come from. A unit
that is lost comes from a store. One that is released, or held by several devices, comes from any of them or from a
store. A lost KV head that several devices need is read once and forwarded by the first of them, if that is quicker
than reading it again. `routing.py` splits the bytes; here the split becomes whole units, and a few in parts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from anchortp.layout import ATTENTION, EXPERT, KV
from anchortp.plan.assemble import Piece
from anchortp.plan.placement import Placement, Share
from anchortp.plan.plan import PLANE, REPLICATED
from anchortp.plan.problem import Problem
from anchortp.plan.routing import Commodity, Portion, Routing, floor, route_all
from anchortp.plan.topology import Route, TopologyError

Kept = Mapping[str, Mapping[str, tuple[int, ...]]]  # family, device -> units in slot order

GRAIN_BYTES = 4096  # a unit that comes in parts is cut at multiples of a page
SURE = 0.05  # of a unit: what of a flow is too little for another one
MAX_ROWS = 250  # of the programme that matches released units: it grows with their square


@dataclass(frozen=True, slots=True)
class Item:
    """Units of one family that `device` receives, each from any of `sources`."""

    family: str
    device: str
    units: Sequence[int]
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """The best routing of all that a placement asks for. `items`: all but the units of `placement.shares` that only
    stores have. `kept`: as the placement's, and what devices would give up but get back. `replayed`: KV heads whose
    planes no source has."""

    problem: Problem
    placement: Placement
    kept: Kept
    items: tuple[Item, ...]
    routing: Routing
    replayed: tuple[int, ...]

    def pieces(self) -> list[Piece]:
        """Every unit of every item exactly once, in runs."""
        by_key: dict[tuple[str, str], list[Portion]] = {}
        for portion in self.routing.portions:
            by_key.setdefault((portion.commodity, portion.device), []).append(portion)
        items: dict[tuple[str, str], list[Item]] = {}
        for item in (*self.items, *_lost_items(self.problem, self.placement)):
            items.setdefault((_key(item.sources), item.device), []).append(item)
        result: list[Piece] = []
        for key, group in items.items():
            total = sum(len(item.units) * self.problem.size(item.family) for item in group)
            if total:
                result += _cut(self.problem, group, _whole_bytes(by_key[key], total))
        return result


def deliver(problem: Problem, placement: Placement, give_up_s: float = math.inf) -> Delivery:
    """The best split of everything the placement asks for. Released units find their new device on the way.
    `give_up_s`: a split that takes longer is of no interest, and need not be the best."""
    items, replayed = _few_items(problem, placement)
    lost = _lost_wishes(problem, placement)
    moving = [share for share in placement.shares if share.pool.released]
    if moving:
        items += _match_released(problem, items, lost, moving)
    items, kept = _without_own(problem, placement.kept, items)
    return Delivery(
        problem=problem,
        placement=placement,
        kept=kept,
        items=tuple(items),
        routing=route_all(problem.network, to_commodities(problem, items, lost), give_up_s=give_up_s),
        replayed=tuple(replayed),
    )


def floor_s(problem: Problem, placement: Placement, prices: Sequence[float]) -> float:
    """Seconds below which `deliver` cannot come, by these prices of the links."""
    items, lost = items_and_lost(problem, placement)
    commodities = to_commodities(problem, items, lost)
    for share in placement.shares:
        if share.pool.released:
            commodities.append(_released_commodity(problem, "", (share,)))
    return floor(problem.network, commodities, prices)


def _without_own(problem: Problem, kept: Kept, items: Sequence[Item]) -> tuple[list[Item], Kept]:
    """Items that really have to move; and what devices keep, with what they would give up but get back: a unit that
    finds no better place, or one of which they were to drop a copy."""
    result = {family: dict(by_device) for family, by_device in kept.items()}
    moving = []
    for item in items:
        own = _own(problem, item)
        if own:
            stay = {*result[item.family][item.device], *own}
            result[item.family][item.device] = tuple(u for u in problem.slots[item.family][item.device] if u in stay)
            item = replace(item, units=[unit for unit in item.units if unit not in own])
        if item.units:
            moving.append(item)
    return moving, result


def _own(problem: Problem, item: Item) -> set[int]:
    if item.device in item.sources:
        return set(item.units)
    return problem.held[EXPERT][item.device].intersection(item.units) if item.family == EXPERT else set()


def items_and_lost(problem: Problem, placement: Placement) -> tuple[list[Item], dict[str, int]]:
    """All that is to be delivered but the families with released units: see `to_commodities`."""
    return _few_items(problem, placement)[0], _lost_wishes(problem, placement)


def items_of(problem: Problem, placement: Placement) -> tuple[list[Item], Kept, list[int]]:
    """What each device receives and keeps, and the KV heads to replay, without a look at any link."""
    items, replayed = _few_items(problem, placement)
    for share in placement.shares:
        if share.pool.released:
            items += _follow(problem, share, {}, 1, {})
    items, kept = _without_own(problem, placement.kept, items)
    return [*items, *_lost_items(problem, placement)], kept, replayed


def fixed_pieces(problem: Problem, items: Sequence[Item]) -> list[Piece]:
    """Every item whole, from the nearest of its sources, the quickest way."""
    network, pieces = problem.network, []
    for item in items:
        far, last = network.quickest(item.sources)
        if item.device not in far:
            raise TopologyError(f"no route leads from {', '.join(item.sources)} to {item.device}; add a link.")
        route = network.path(last, item.device)
        num_bytes = len(item.units) * problem.size(item.family)
        pieces += _cut(problem, (item,), [(network.links[route[0]].src, route, num_bytes)])
    return pieces


# ---------------------------------------------------------------------------------------------------- items


def _few_items(problem: Problem, placement: Placement) -> tuple[list[Item], list[int]]:
    """q heads, KV heads, planes, replicated tensors."""
    items, stores = [], problem.stores
    for device, heads in placement.heads.items():
        lost = [head for head in heads if head not in placement.head_holder]
        if lost:
            items.append(Item(ATTENTION, device, lost, stores))
        for head in heads:
            if head in placement.head_holder:
                items.append(Item(ATTENTION, device, (head,), (placement.head_holder[head], *stores)))
    kv_items, replayed = _kv_items(problem, placement)
    return [*items, *kv_items, *_replicated_items(problem)], replayed


def _lost_wishes(problem: Problem, placement: Placement) -> dict[str, int]:
    """Bytes per device of the units that `_lost_items` will list."""
    wishes = dict.fromkeys(problem.devices, 0)
    for share in placement.shares:
        if not share.pool.released:
            size = problem.size(share.family)
            for device, count in share.incoming.items():
                wishes[device] += count * size
    return wishes


def _lost_items(problem: Problem, placement: Placement) -> Iterator[Item]:
    """Units that only stores have. Neighbouring ones stay together: a run in checkpoint and arena is one copy."""
    for share in placement.shares:
        at = 0
        for device, count in () if share.pool.released else share.incoming.items():
            if count:
                yield Item(share.family, device, share.pool.missing[at : at + count], problem.stores)
                at += count


def _kv_items(problem: Problem, placement: Placement) -> tuple[list[Item], list[int]]:
    items, replayed = [], []
    wanted: dict[int, list[str]] = {}
    for device, heads in placement.kv.items():
        for head in heads:
            wanted.setdefault(head, []).append(device)
    for head, devices in sorted(wanted.items()):
        for family in (KV, PLANE) if problem.plane_bytes else (KV,):
            sources = (*problem.holders(family, head), *problem.stores_of(family))
            if not sources:
                replayed.append(head)
                continue
            items += _spread_copies(family, head, devices, sources, problem)
    return items, replayed


def _spread_copies(
    family: str, unit: int, devices: Sequence[str], sources: tuple[str, ...], problem: Problem
) -> list[Item]:
    """One item per device. On each island where no device of the group holds the unit yet, the first may forward it to
    those that come later."""
    islands, first, items = problem.islands, {}, []
    there = {islands[source] for source in sources if source in islands}
    for device in devices:
        items.append(Item(family, device, (unit,), (*first.values(), *sources)))
        if problem.network.relays and islands[device] not in there:
            first.setdefault(islands[device], device)
    return items


def _replicated_items(problem: Problem) -> list[Item]:
    if not problem.fresh or not problem.units.replicated_bytes:
        return []
    sources = (*problem.alive, *problem.stores)
    return _spread_copies(REPLICATED, 0, problem.fresh, sources, problem)


def _match_released(
    problem: Problem, items: Sequence[Item], lost: Mapping[str, int], shares: Sequence[Share]
) -> list[Item]:
    """Which device gets the units that a living device releases. First the flows that suit the links best, with
    the units of a family and layer interchangeable; then whole units that follow them as closely as possible."""
    alike = _alike(shares)
    commodities = to_commodities(problem, items, lost)
    for name, group in alike.items():
        commodities.append(_released_commodity(problem, name, group))
    routing = route_all(problem.network, commodities)
    worth = _worth(problem, routing)
    flows: dict[str, list[Portion]] = {name: [] for name in alike}
    for portion in routing.portions:
        if portion.commodity in alike:
            flows[portion.commodity].append(portion)
    found, left = [], defaultdict[str, Counter[tuple[str, str]]](Counter)  # what rounding left of the groups before
    for name, group in alike.items():
        family = group[0].family
        for portion in flows[name]:
            left[family][portion.source, portion.device] += portion.num_bytes / problem.size(family)
        for done, share in enumerate(group):
            found += _follow(problem, share, left[family], len(group) - done, worth)
    return found


def _worth(problem: Problem, routing: Routing) -> dict[tuple[str, str], float]:
    """Per source and device: the price of the way there from the stores, if the flow goes another way."""
    far, last = problem.network.cheapest(dict.fromkeys(problem.stores, 0.0), routing.prices)
    worth: dict[tuple[str, str], float] = {}
    for portion in routing.portions:
        pair, usual = (portion.source, portion.device), problem.network.path(last, portion.device)
        other = far[portion.device] if set(usual).isdisjoint(portion.route) else 0.0
        worth[pair] = max(other, worth.get(pair, 0.0))
    return worth


def _alike(shares: Sequence[Share]) -> dict[str, list[Share]]:
    """Layers that release and receive on the same devices are one commodity. If that makes too many, one family is."""
    found: dict[tuple[object, ...], list[Share]] = {}
    for share in shares:
        wanting = tuple(device for device, count in share.incoming.items() if count)
        found.setdefault((share.family, tuple(share.pool.released), wanting), []).append(share)
    if sum(len(key[1]) + len(key[2]) for key in found) > MAX_ROWS:  # type: ignore[arg-type]
        found = {}
        for share in shares:
            found.setdefault((share.family,), []).append(share)
    return {f"{key[0]}/{i}": group for i, (key, group) in enumerate(found.items())}


def _released_commodity(problem: Problem, name: str, shares: Sequence[Share]) -> Commodity:
    limits: dict[str, int] = {}
    wishes: dict[str, int] = {}
    for share in shares:
        size = problem.size(share.family)
        for device, units in share.pool.released.items():
            limits[device] = limits.get(device, 0) + len(units) * size
        for device, count in share.incoming.items():
            wishes[device] = wishes.get(device, 0) + count * size
    sources = (*((device, limit) for device, limit in limits.items()), *((s, None) for s in problem.stores))
    return Commodity(name=name, sources=sources, wishes=tuple((d, b) for d, b in wishes.items() if b))


def _follow(
    problem: Problem,
    share: Share,
    left: dict[tuple[str, str], float],
    num_shares: int,
    worth: Mapping[tuple[str, str], float],
) -> list[Item]:
    """Units of one pool to devices, by what is left of the flows (in units) for this and the shares to come,
    `num_shares` in all: first its part of each, then, rounded up, those that are `worth` most. (What a device could
    have from a peer it can have from a store as well, but not the other way round.)"""
    need = {device: count for device, count in share.incoming.items() if count}
    pools = {source: list(units) for source, units in share.pool.released.items()}
    items = []

    def give(source: str, device: str, count: int) -> None:
        pool = pools[source] if source else missing
        units, pool[:] = sorted(pool[:count]), pool[count:]
        need[device] -= count
        sources = (source, *problem.stores) if source else problem.stores
        items.append(Item(share.family, device, units, sources))

    missing = list(share.pool.missing)
    pairs = [(s, d) for s, d in left if s in pools and d in need]
    for part, up in ((num_shares, SURE), (1, 1 - SURE)):
        for source, device in sorted(pairs, key=lambda pair: (0.0 if up == SURE else -worth[pair], -left[pair])):
            count = min(len(pools[source]), need[device], int(left[source, device] / part + up))
            if count > 0:
                give(source, device, count)
                left[source, device] -= count
    for source in ("", *pools):  # what rounding left over
        for device in need:
            count = min(len(pools[source] if source else missing), need[device])
            if count:
                give(source, device, count)
    assert not any(need.values()) and not missing and not any(pools.values())
    return items


# ------------------------------------------------------------------------------------------------ commodities


def _key(sources: Sequence[str]) -> str:
    return " ".join(sources)


def to_commodities(problem: Problem, items: Sequence[Item], lost: Mapping[str, int]) -> list[Commodity]:
    """Items with the same sources are one commodity. `lost`: further bytes that each device wants from the stores."""
    wishes: dict[tuple[str, ...], dict[str, int]] = {problem.stores: dict(lost)} if any(lost.values()) else {}
    for item in items:
        at = wishes.setdefault(item.sources, {})
        at[item.device] = at.get(item.device, 0) + len(item.units) * problem.size(item.family)
    return [
        Commodity(
            name=_key(sources),
            sources=tuple((source, None) for source in sources),
            wishes=tuple(by_device.items()),
        )
        for sources, by_device in wishes.items()
    ]


# ----------------------------------------------------------------------------------------------------- pieces


def _whole_bytes(portions: Sequence[Portion], total: int) -> list[tuple[str, Route, int]]:
    """(source, route, bytes), multiples of GRAIN_BYTES but for the largest, `total` in all."""
    order = sorted(portions, key=lambda p: (-p.num_bytes, p.source, p.route))
    rest = [(p.source, p.route, int(p.num_bytes) // GRAIN_BYTES * GRAIN_BYTES) for p in order[1:]]
    rest = [portion for portion in rest if portion[2]]
    first = total - sum(num_bytes for _, _, num_bytes in rest)
    assert first > 0
    return [(order[0].source, order[0].route, first), *rest]


def _cut(problem: Problem, items: Sequence[Item], portions: Sequence[tuple[str, Route, int]]) -> list[Piece]:
    """Lays the items' units end to end and cuts them where one portion ends and the next begins; without `parts`,
    at the border of two units next to that."""
    pieces: list[Piece] = []
    queue, left, parts = list(portions), 0, problem.parts
    for item in items:
        size = problem.size(item.family)
        for unit, count in _consecutive(item.units):
            done, inside = 0, 0  # whole units of the run, and bytes of the next one, that have a portion
            while done < count:
                while queue and left <= (0 if parts else size // 2):
                    source, route, more = queue.pop(0)
                    left += more
                whole = 0 if inside else max(left // size, 0 if parts else 1)
                if whole:
                    take = min(whole, count - done)
                    pieces.append(Piece(item.device, item.family, unit + done, take, 0, take * size, source, route))
                    done, left = done + take, left - take * size
                    continue
                part = min(left, size - inside)
                pieces.append(Piece(item.device, item.family, unit + done, 1, inside, part, source, route))
                inside, left = inside + part, left - part
                if inside == size:
                    done, inside = done + 1, 0
    return pieces


def _consecutive(units: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for end in range(1, len(units) + 1):
        if end == len(units) or units[end] != units[begin] + end - begin:
            yield units[begin], end - begin
            begin = end
