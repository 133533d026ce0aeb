"""Which q head goes where, so that few KV heads need a further copy.

A device needs the KV head of each of its q heads. Placing a q head where its KV head already is costs nothing
more; elsewhere it opens a (device, KV head) pair: a copy of the head's weights and of its cache plane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, product

from anchortp.layout import ATTENTION, KV
from anchortp.plan.loads import Load, into, way
from anchortp.plan.problem import Problem
from anchortp.plan.retain import Pool, retain

ROUNDS = 4  # over all pairs of devices, in search of swaps


def place_heads(
    problem: Problem, load: Load, widths: Mapping[str, int] | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[int]], dict[int, str]]:
    """Per device the q heads it keeps and those it receives; and who holds those that are not lost. `widths`: how many
    each is to have, if that is decided."""
    stay = set(problem.devices)
    held = {d: list(problem.slots[ATTENTION].get(d, ())) for d in problem.devices}
    held = {d: _by_group_size(problem, units) for d, units in held.items()}
    pool = Pool(missing=list(problem.missing[ATTENTION]))
    for device, units in problem.slots[ATTENTION].items():
        if device not in stay and units:
            pool.released[device] = list(units)
    low, high = (widths, widths) if widths else problem.bounds(problem.num_heads)
    dropped = retain(problem, held, pool, None, low, high)
    holder = {unit: device for device, units in pool.released.items() for unit in units}
    groups: dict[int, list[int]] = {}
    for head in sorted([*pool.missing, *holder]):
        groups.setdefault(problem.kv_head_of(head), []).append(head)
    near = {g: [d for d in problem.devices if g in problem.held.get(KV, {}).get(d, ())] for g in groups}
    free = {d: max(0, low[d] - len(held[d])) for d in problem.devices}
    rest = sum(map(len, groups.values())) - sum(free.values())
    _place_rest(problem, load, near, free, rest, {d: high[d] - len(held[d]) for d in held})
    kept = {d: tuple(u for u in problem.slots[ATTENTION].get(d, ()) if (d, u) not in dropped) for d in held}
    heads = assign_heads(groups, near, free)
    if holder:
        _Swaps(problem, holder).improve(heads)
    return kept, heads, holder


def _place_rest(
    problem: Problem,
    load: Load,
    near: Mapping[int, Sequence[str]],
    free: dict[str, int],
    rest: int,
    most: Mapping[str, int],
) -> None:
    """Places for the q heads that do not divide evenly: where their KV head is, before all else; then on the island,
    and the device, that would be done soonest."""
    wanted = Counter(device for devices in near.values() for device in devices)
    size = problem.size(ATTENTION)

    def cost(device: str) -> tuple[bool, tuple[float, float]]:
        island = load.island[device]
        others = sum(free[d] for d in problem.devices if d != device and load.island[d] == island)
        island_s, device_s = load.done_with(device, (free[device] + 1) * size)
        return wanted[device] <= free[device], (island_s + others * size / load.speed[island], device_s)

    for _ in range(rest):
        free[min((d for d in problem.devices if free[d] < most[d]), key=cost)] += 1


class _Swaps:
    """Swaps of q heads between the devices that receive them, while that brings heads nearer to where they come from,
    the copies of KV heads that they need counted in."""

    def __init__(self, problem: Problem, holder: Mapping[int, str]):
        self.problem, self.holder, self.stores = problem, holder, into(problem)

    def improve(self, heads: dict[str, list[int]]) -> None:
        receivers = [device for device, mine in heads.items() if mine]
        for _ in range(ROUNDS):
            if not any([self._swap(heads, a, b) for a, b in combinations(receivers, 2)]):
                break
        for device in receivers:
            heads[device].sort()

    def _swap(self, heads: dict[str, list[int]], a: str, b: str) -> bool:
        """Swaps what is worth it between two devices. Returns whether anything was."""
        swapped, now = False, self._cost(a, heads[a]) + self._cost(b, heads[b])
        for i, j in product(range(len(heads[a])), range(len(heads[b]))):
            x, y = heads[a][i], heads[b][j]
            if self.holder.get(x) == self.holder.get(y) and self._group(x) == self._group(y):
                continue
            mine, theirs = list(heads[a]), list(heads[b])
            mine[i], theirs[j] = y, x
            after = self._cost(a, mine) + self._cost(b, theirs)
            if after < now * (1 - 1e-9):
                heads[a], heads[b], now, swapped = mine, theirs, after, True
        return swapped

    def _group(self, head: int) -> int:
        return self.problem.kv_head_of(head)

    def _cost(self, device: str, heads: Sequence[int]) -> float:
        problem, seconds = self.problem, 0.0
        for head in heads:
            source = self.holder.get(head)
            seconds += problem.size(ATTENTION) * (way(problem, source, device) if source else self.stores[device])
        for group in problem.kv_heads(set(heads)) - problem.held.get(KV, {}).get(device, frozenset()):
            near = [way(problem, source, device) for source in problem.holders(KV, group)]
            seconds += problem.copy_bytes(group) * min([self.stores[device], *near])
        return seconds


def _by_group_size(problem: Problem, heads: list[int]) -> list[int]:
    """Heads (in slot order) in the order in which they are kept: the largest groups of one KV head first, then those
    in the first slots."""
    groups: dict[int, list[int]] = {}
    for head in heads:
        groups.setdefault(problem.kv_head_of(head), []).append(head)
    return [head for group in sorted(groups.values(), key=len, reverse=True) for head in group]


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


# ---------------------------------------------------------------------------------------------- assignments


def assign_heads(
    groups: Mapping[int, Sequence[int]], near: Mapping[int, Sequence[str]], free: Mapping[str, int]
) -> dict[str, list[int]]:
    """All q heads in `groups` (by KV head) to devices with `free` places, just as many as there are heads;
    `near[g]`: devices that hold KV head g.

    First the largest matching of heads to devices that hold their KV head already. What is left opens a pair
    each time, the largest group into the largest gap, so each opening fills a gap or ends a group.
    """
    left = {group: list(heads) for group, heads in groups.items()}
    matched = _match({g: len(heads) for g, heads in left.items()}, near, free)
    result: dict[str, list[int]] = {device: [] for device in free}
    room = dict(free)

    def give(group: int, device: str, count: int) -> None:
        for _ in range(count):
            result[device].append(left[group].pop(0))
        room[device] -= count

    for (group, device), count in sorted(matched.items()):
        give(group, device, count)
    while any(left.values()):
        exact = [(g, d) for g, heads in left.items() if heads for d in room if room[d] == len(heads)]
        if exact:
            group, device = exact[0]
        else:
            group = max(left, key=lambda g: len(left[g]))
            device = max(room, key=lambda d: room[d])
        give(group, device, min(len(left[group]), room[device]))
    return {device: sorted(heads) for device, heads in result.items()}


def _match(
    supply: Mapping[int, int], near: Mapping[int, Sequence[str]], free: Mapping[str, int]
) -> Counter[tuple[int, str]]:
    """The largest assignment of `supply[g]` heads to devices in `near[g]` within `free`: augmenting paths."""
    flow: Counter[tuple[int, str]] = Counter()
    used: Counter[str] = Counter()

    def augment(group: int, seen: set[str]) -> bool:
        for device in near[group]:
            if device in seen:
                continue
            seen.add(device)
            if used[device] < free[device]:
                used[device] += 1
                flow[group, device] += 1
                return True
            for other in [g for (g, d), n in flow.items() if d == device and n and g != group]:
                if augment(other, seen):
                    flow[other, device] -= 1
                    flow[group, device] += 1
                    return True
        return False

    for group, count in supply.items():
        for _ in range(count):
            if not augment(group, set()):
                break
    return +flow
