"""Who keeps what, and how many units each device is still to receive: the part of a plan that balance decides.

For the policies that own *sets* of units. Per family (experts: per layer):
1. Units that no living device holds are missing. A device above the most that balance allows gives units up
   (`retain.py`), unless experts are to stay (`Problem.experts`); one that leaves gives up all.
2. Every device receives the least that balance demands. What then remains, at most a unit or so per device, goes
   one unit at a time, large units first, to the device that would have received everything soonest with it.
q heads come first, because where they go decides which KV heads must be copied (`heads.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anchortp.layout import ATTENTION, EXPERT, KV, filled_bounds
from anchortp.plan.heads import kv_after, place_heads
from anchortp.plan.loads import Load
from anchortp.plan.problem import Problem
from anchortp.plan.retain import Pool, by_group, copies_of, drop_copies, num_sole, retain

Widths = Mapping[tuple[str, int], Mapping[str, int]]  # (family, index of the group) -> device -> units
Given = set[tuple[str, int]]  # units that devices give up


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

    def width(self, device: str) -> int:
        """Units that the device has when all is done."""
        return self.held[device] - len(self.pool.released.get(device, ())) + self.incoming[device]


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
    load = Load(problem, slow)
    for share in shares:
        size = problem.size(share.family)
        for device, count in share.incoming.items():
            load.add(device, count * size)
    kept[ATTENTION], heads, head_holder = place_heads(problem, load, (widths or {}).get((ATTENTION, 0)))
    kept[KV], kv = kv_after(problem, kept[ATTENTION], heads)
    for device in problem.devices:
        load.add(device, len(heads[device]) * problem.size(ATTENTION))
        load.add(device, len(kv[device]) * problem.kv_bytes)
    _spread_remainders(problem, shares, load, kept)
    return Placement(kept=kept, heads=heads, head_holder=head_holder, kv=kv, shares=shares)


def _shares(problem: Problem, family: str, widths: Widths) -> tuple[dict[str, tuple[int, ...]], list[Share]]:
    """What each device keeps of a family, and per group what is left to be placed."""
    num_groups = problem.units.num_groups(family)
    per_group = problem.units.num_units[family] // num_groups
    groups = by_group(problem, family, num_groups, per_group)
    copies = copies_of(problem, family)
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
        if problem.stays(family):
            low, high, dropped = _staying(problem, held, pool, at)
        else:
            low, high, dropped = _balanced(problem, held, pool, copies)
        gone |= dropped
        size = sum(map(len, held.values())) + len(pool)
        wanted = widths.get((family, at))
        count = {device: len(units) for device, units in held.items()}
        gone |= retain(problem, held, pool, copies, *((wanted, wanted) if wanted else (low, high)))
        left = {device: len(units) for device, units in held.items()}
        least = {d: max(0, low[d] - left[d]) for d in problem.devices}
        share = Share(
            family=family,
            size=size,
            held=count,
            low=low,
            high=high,
            pool=pool,
            least=least,
            most={d: max(0, high[d] - left[d]) for d in problem.devices},
            incoming={d: max(0, wanted[d] - left[d]) for d in problem.devices} if wanted else dict(least),
        )
        shares.append(share)
    kept = {d: slots.get(d, ()) for d in problem.devices}
    for device in {device for device, _ in gone}:
        kept[device] = tuple(unit for unit in kept[device] if (device, unit) not in gone)
    return kept, shares


def _balanced(
    problem: Problem, held: dict[str, list[int]], pool: Pool, copies: Counter[int] | None
) -> tuple[Mapping[str, int], Mapping[str, int], Given]:
    """The fewest and the most units per device, and the copies that are given up for that, which `held` loses."""
    dropped = drop_copies(problem, held, pool, copies)
    low, high = problem.bounds(sum(map(len, held.values())) + len(pool))
    if copies is not None:  # copies are not passed on
        low = {d: max(low[d], min(high[d], len(held[d]) - num_sole(held[d], copies))) for d in problem.devices}
    return low, high, dropped


def _staying(
    problem: Problem, held: dict[str, list[int]], pool: Pool, at: int
) -> tuple[Mapping[str, int], Mapping[str, int], Given]:
    """As `_balanced`, where what the group holds stays."""
    dropped = set()
    for device, units in held.items():
        stay = set(problem.staying[at][device])
        dropped |= {(device, unit) for unit in units if unit not in stay}
        units[:] = (unit for unit in units if unit in stay)
    low, high = filled_bounds({device: len(units) for device, units in held.items()}, len(pool), problem.speeds)
    return low, high, dropped


# ------------------------------------------------------------------------------------------------- variants


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


# ---------------------------------------------------------------------------------------------- remainders


def _spread_remainders(
    problem: Problem, shares: Sequence[Share], load: Load, kept: Mapping[str, Mapping[str, Sequence[int]]]
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


def _spread(problem: Problem, share: Share, load: Load, width: dict[str, int] | None) -> None:
    size, incoming = problem.size(share.family), share.incoming
    for _ in range(len(share.pool) - sum(incoming.values())):
        open_to = [d for d in problem.devices if incoming[d] < share.most[d]]
        if width is not None:
            rank = {d: (width[d] + 1) / problem.speed(d) for d in open_to}
            least = min(rank.values())
            open_to = [d for d in open_to if rank[d] == least]
        best = open_to[0] if len(open_to) == 1 else min(open_to, key=lambda d: load.done_with(d, size))
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
