"""Which device is to hold how many units, where that is worth a choice: when units must leave living devices.

After a loss the widths are all but given: everybody keeps what it has and the rest is dealt out. When devices join,
leave or change their speeds, balance often leaves open which device gives up a unit more than another, and that
decides how much can travel over good links. So the widths become variables of the programme in `routing.py`: each
device is sure of the least that balance demands; the units beyond that are extra, and may be anyone's up to the
most; a device that has units beyond its least already has a source of them in itself, at no distance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from anchortp.layout import ATTENTION, KV
from anchortp.plan.deliver import MAX_ROWS, items_and_lost, to_commodities
from anchortp.plan.placement import Placement, Share
from anchortp.plan.plan import PLANE
from anchortp.plan.problem import Problem
from anchortp.plan.retain import Pool
from anchortp.plan.routing import Commodity, NoRoom, Routing, route_all

MANY_ROWS = 1000  # as MAX_ROWS, where the plan is far from the bound

Widths = dict[tuple[str, int], dict[str, int]]  # (family, index of the group) -> device -> units


def best_widths(
    problem: Problem, placement: Placement, *, thorough: bool = False
) -> tuple[Widths, tuple[float, ...]] | None:
    """Widths for all groups in which a living device gives up units in `placement`, q heads included, chosen so that
    the fullest link would be least full if units could be split; and the prices of the links then. None if there are
    none, or too many devices for it to be worth the time.

    `thorough`: for all groups, since it can be worth it that a device passes units on though it need not; and layers
    that differ stay apart, even if that takes far longer."""
    max_rows = MANY_ROWS if thorough else MAX_ROWS
    heads = [_head_share(problem, placement)] if placement.head_holder or thorough else []
    index: dict[str, int] = {}
    moving: list[tuple[int, Share]] = []
    for share in (*placement.shares, *heads):
        at = index[share.family] = index.get(share.family, -1) + 1
        if share.pool.released or thorough:
            moving.append((at, share))
    names = _alike(problem, moving, max_rows)
    if not names or len(names) * 3 * len(problem.devices) > max_rows:
        return None
    routing = _route(problem, placement, names, list(index), bool(heads))
    extra: dict[str, dict[str, float]] = {name: {} for name in names}
    for portion in routing.portions:
        if portion.is_extra:
            at_device = extra[portion.commodity]
            at_device[portion.device] = at_device.get(portion.device, 0.0) + portion.num_bytes
    result: Widths = {}
    over: dict[str, dict[str, float]] = {}  # what rounding left of the groups before
    for name, group in names.items():
        family = group[0][1].family
        size = _weight(problem, placement, family)
        quota = over.setdefault(family, dict.fromkeys(problem.devices, 0.0))
        for device, num_bytes in extra[name].items():
            quota[device] += num_bytes / size
        for at, share in group:
            result[share.family, at] = _whole(problem, share, quota)
    for family in index:
        _even_out(problem, family, placement, result)
    return result, routing.prices


def _route(
    problem: Problem,
    placement: Placement,
    names: Mapping[str, Sequence[tuple[int, Share]]],
    families: Sequence[str],
    with_heads: bool,
) -> Routing:
    items, lost = items_and_lost(problem, placement)
    if with_heads:
        items = [item for item in items if item.family not in (ATTENTION, KV, PLANE)]
    commodities = to_commodities(problem, items, lost)
    room = {}
    for name, group in names.items():
        weight = _weight(problem, placement, group[0][1].family)
        commodities.append(_commodity(problem, name, [share for _, share in group], weight))
    for family in families:
        chosen = {at for group in names.values() for at, share in group if share.family == family}
        room |= _room(problem, family, placement, chosen) if chosen else {}
    try:
        return route_all(problem.network, commodities, room=room)
    except NoRoom:
        return route_all(problem.network, commodities)


def _head_share(problem: Problem, placement: Placement) -> Share:
    """The q heads, as if they were a family like the others."""
    held = {d: len(problem.slots[ATTENTION].get(d, ())) for d in problem.devices}
    low, high = problem.bounds(problem.num_heads)
    pool = Pool(missing=list(problem.missing[ATTENTION]))
    for head, device in placement.head_holder.items():
        pool.released.setdefault(device, []).append(head)
    incoming = {d: len(heads) for d, heads in placement.heads.items()}
    return Share(
        family=ATTENTION,
        size=problem.num_heads,
        held=held,
        low=low,
        high=high,
        pool=pool,
        least={},
        most={},
        incoming=incoming,
    )


def _weight(problem: Problem, placement: Placement, family: str) -> int:
    """Bytes of a unit; of a q head with what it brings along on average, its part of a KV head's copy included."""
    if family != ATTENTION or KV not in problem.families:
        return problem.size(family)
    moved = sum(map(len, placement.heads.values()))
    copies = sum(map(len, placement.kv.values()))
    return problem.size(ATTENTION) + copies * problem.kv_bytes // max(1, moved)


def _alike(problem: Problem, moving: Sequence[tuple[int, Share]], max_rows: int) -> dict[str, list[tuple[int, Share]]]:
    """Groups of one family and the same numbers are one commodity. If that makes too many rows, each family is."""
    found: dict[tuple[object, ...], list[tuple[int, Share]]] = {}
    for at, share in moving:
        leaving = tuple((d, len(u)) for d, u in share.pool.released.items() if d not in problem.devices)
        key = (share.family, share.size, tuple(share.held.values()), len(share.pool.missing), leaving)
        found.setdefault(key, []).append((at, share))
    if len(found) * 3 * len(problem.devices) > max_rows:
        found = {}
        for at, share in moving:
            found.setdefault((share.family,), []).append((at, share))
    return {f"widths {i}": group for i, group in enumerate(found.values())}


def _room(problem: Problem, family: str, placement: Placement, chosen: Collection[int]) -> dict[tuple[str, str], int]:
    """Extra bytes of the groups `chosen` (by index) that each device may have in all, so that the groups together
    stay balanced too."""
    shares = [share for share in placement.shares if share.family == family]
    if len(shares) <= 1:
        return {}
    _, high = problem.total_bounds(family, placement.sizes(family))
    left = dict(high)
    for at, share in enumerate(shares):
        expected = share.low if at in chosen else _expected(share)
        for device in problem.devices:
            left[device] -= expected[device]
    size = problem.size(family)
    return {(family, device): max(0, n) * size for device, n in left.items()}


def _commodity(problem: Problem, name: str, shares: Sequence[Share], weight: int) -> Commodity:
    """All shares together. `weight`: bytes of a unit."""
    spare, wishes, caps, extra = Counter[str](), Counter[str](), Counter[str](), 0
    for share in shares:
        for device, held in share.held.items():
            spare[device] += max(0, held - share.low[device])
            wishes[device] += max(0, share.low[device] - held)
            caps[device] += share.high[device] - share.low[device]
        for device, units in share.pool.released.items():
            spare[device] += 0 if device in problem.devices else len(units)
        extra += share.size - sum(share.low.values())
    return Commodity(
        name=name,
        sources=(*((d, n * weight) for d, n in spare.items() if n), *((store, None) for store in problem.stores)),
        wishes=tuple((d, n * weight) for d, n in wishes.items() if n),
        extra=extra * weight,
        caps=tuple((d, n * weight) for d, n in caps.items() if n),
        family=shares[0].family,
    )


def _whole(problem: Problem, share: Share, quota: dict[str, float]) -> dict[str, int]:
    """The extra units of one group, one by one to whoever has most of its quota left, first of those that hold them;
    takes it off the quota."""
    width = dict(share.low)
    for _ in range(share.size - sum(width.values())):
        open_to = [device for device in problem.devices if width[device] < share.high[device]]
        best = max(open_to, key=lambda d: (quota[d] > 0.5 and share.held[d] > width[d], quota[d]))
        width[best] += 1
        quota[best] -= 1.0
    return width


def _even_out(problem: Problem, family: str, placement: Placement, widths: Widths) -> None:
    """Shifts single units, within the bounds of their layer, until all layers together are within theirs."""
    shares = [share for share in placement.shares if share.family == family]
    if len(shares) <= 1:
        return
    total = dict.fromkeys(problem.devices, 0)
    for at, share in enumerate(shares):
        for device, width in widths.get((family, at), _expected(share)).items():
            total[device] += width
    low, high = problem.total_bounds(family, placement.sizes(family))
    for _ in range(sum(total.values())):
        pair = _pair(problem, total, low, high, shares, family, widths)
        if pair is None:
            return
        a, b, at = pair
        widths[family, at][a] -= 1
        widths[family, at][b] += 1
        total[a] -= 1
        total[b] += 1


def _expected(share: Share) -> dict[str, int]:
    return {device: min(held, share.high[device]) + share.incoming[device] for device, held in share.held.items()}


def _pair(
    problem: Problem,
    total: Mapping[str, int],
    low: Mapping[str, int],
    high: Mapping[str, int],
    shares: Sequence[Share],
    family: str,
    widths: Widths,
) -> tuple[str, str, int] | None:
    """A device above its most (or the widest) and one below its least (or the narrowest), and a group to shift in."""
    givers = sorted((d for d in total if total[d] > low[d]), key=lambda d: high[d] - total[d])
    takers = sorted((d for d in total if total[d] < high[d]), key=lambda d: total[d] - low[d])
    for a in givers:
        for b in takers:
            if a == b or (total[a] <= high[a] and total[b] >= low[b]):
                continue
            for at, share in enumerate(shares):
                width = widths.get((family, at))
                if width and width[a] > share.low[a] and width[b] < share.high[b]:
                    return a, b, at
    return None
