"""What each device gives up so that a balanced layout is in reach: as little as possible.

A device above the most that a balanced layout allows gives units up: second copies of experts first, which costs
nothing, then the last of its units. So does the one with the best way out when others could not reach their least
otherwise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anchortp.plan.loads import into, way
from anchortp.plan.problem import Problem


@dataclass(slots=True, kw_only=True)
class Pool:
    """Units of one family and group (layer) that need a new holder: `missing` have none, `released` still have."""

    missing: list[int] = field(default_factory=list)
    released: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.missing) + sum(map(len, self.released.values()))


Group = tuple[dict[str, list[int]], dict[str, list[int]], list[int]]


def by_group(problem: Problem, family: str, num_groups: int, per_group: int) -> list[Group]:
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


def copies_of(problem: Problem, family: str) -> Counter[int] | None:
    """How many devices of the new group hold each unit; None if no unit has two living holders."""
    slots = problem.slots[family]
    if sum(map(len, slots.values())) + len(problem.missing[family]) == problem.units.num_units[family]:
        return None
    stay = set(problem.devices)
    return Counter(unit for device, units in slots.items() if device in stay for unit in units)


def drop_copies(
    problem: Problem, held: dict[str, list[int]], pool: Pool, copies: Counter[int] | None
) -> set[tuple[str, int]]:
    """Takes copies off devices above their most while there are any, and where others could not reach their least
    otherwise (a copy is not passed on). Returns them as (device, unit)."""
    dropped: set[tuple[str, int]] = set()
    while copies is not None:
        low, high = problem.bounds(sum(map(len, held.values())) + len(pool))
        spare = _spare_copy(problem, held, high, copies) or _stuck_copy(held, pool, low, copies)
        if spare is None:
            break
        held[spare[0]].remove(spare[1])
        copies[spare[1]] -= 1
        dropped.add(spare)
    return dropped


def retain(
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
    short = -len(pool)
    for device, units in held.items():
        count = len(units)
        for _ in range(count - high[device]):
            _release(device, units, pool, copies, dropped)
        if count < low[device]:
            short += low[device] - count
        elif count > high[device]:
            short -= count - high[device]
    for _ in range(short):
        open_to = [d for d in held if len(held[d]) > low[d] and num_sole(held[d], copies)]
        giver = min(open_to, key=lambda d: (way_out(problem, d), -len(held[d]) / problem.speed(d)))
        _release(giver, held[giver], pool, copies, dropped)
    return dropped


def _spare_copy(
    problem: Problem, held: dict[str, list[int]], high: Mapping[str, int], copies: Counter[int]
) -> tuple[str, int] | None:
    """A unit on a device above its most that another device of the group holds too. It goes from the device that the
    stores reach soonest; among equals from the one that has the slowest way out: what it would have to release else
    would be the dearest to copy."""
    slow = into(problem)
    for device in sorted(held, key=lambda d: (slow[d], -way_out(problem, d))):
        if len(held[device]) > high[device]:
            for unit in reversed(held[device]):
                if copies[unit] > 1:
                    return device, unit
    return None


def _stuck_copy(
    held: Mapping[str, list[int]], pool: Pool, low: Mapping[str, int], copies: Counter[int]
) -> tuple[str, int] | None:
    """A copy on the fullest device above its least, if what such devices hold alone is not enough for the others."""
    wanted = sum(max(0, low[d] - len(units)) for d, units in held.items()) - len(pool)
    above = {d: units for d, units in held.items() if len(units) > low[d]}
    if wanted <= sum(min(len(units) - low[d], num_sole(units, copies)) for d, units in above.items()):
        return None
    device = max((d for d in above if num_sole(held[d], copies) < len(held[d])), key=lambda d: len(held[d]) - low[d])
    return device, next(unit for unit in reversed(held[device]) if copies[unit] > 1)


def num_sole(units: Sequence[int], copies: Mapping[int, int] | None) -> int:
    """How many of the units no other device of the new group holds."""
    return len(units) if copies is None else sum(copies[unit] == 1 for unit in units)


def way_out(problem: Problem, device: str) -> float:
    """Seconds per byte from a device to whichever device that will receive units it reaches soonest."""
    return min(
        (way(problem, device, other) for other in problem.fresh or problem.devices if other != device),
        default=0.0,
    )


def _release(
    device: str, units: list[int], pool: Pool, copies: Counter[int] | None, dropped: set[tuple[str, int]]
) -> None:
    """Gives up the last unit of which this is the only copy in the new group."""
    at = next(i for i in range(len(units) - 1, -1, -1) if copies is None or copies[units[i]] == 1)
    unit = units.pop(at)
    pool.released.setdefault(device, []).append(unit)
    dropped.add((device, unit))
