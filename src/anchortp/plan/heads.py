"""Which q head goes where, so that few KV heads need a further copy.

A device needs the KV head of each of its q heads. Placing a q head where its KV head already is costs nothing
more; elsewhere it opens a (device, KV head) pair: a copy of the head's weights and of its cache plane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence


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


def spread_heads(
    heads: Mapping[int, str],
    group_of: Mapping[int, int],
    there: Mapping[str, Collection[int]],
    room: Mapping[str, int],
    slow: Mapping[tuple[str, str], float],
) -> dict[str, list[int]]:
    """q heads that living devices give up (`heads`: head -> holder) to devices with `room` places, in all as many as
    there are heads, so that no pair of devices has much more to copy than the others. `slow`: (holder, device) ->
    seconds per head. One head at a time, heads of one KV group in a row; where its KV head is already (`there`), or
    will be, a head costs half."""
    result: dict[str, list[int]] = {device: [] for device in room}
    has = {device: set(there.get(device, ())) for device in room}
    busy: Counter[tuple[str, str]] = Counter()
    for head in sorted(heads, key=lambda h: (group_of[h], h)):
        source = heads[head]

        def done(device: str, source: str = source, group: int = group_of[head]) -> float:
            weight = 1.0 if group in has[device] else 2.0
            return slow[source, device] * (busy[source, device] + weight)

        best = min((d for d in room if len(result[d]) < room[d]), key=done)
        busy[source, best] += 1 if group_of[head] in has[best] else 2
        result[best].append(head)
        has[best].add(group_of[head])
    return result


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
