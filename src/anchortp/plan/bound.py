"""What no plan can beat: bytes, and time.

**Bytes.** A unit that no living device holds must be read from a store at least once.

**Time.** Let every link have a price, such that the sum over links of price x bandwidth is 1. In a plan that takes
T seconds each link carries at most T x bandwidth, so all its bytes, each paying the price of every link it passes,
pay at most T together. Hence T >= what the cheapest plan pays (linear programming duality). The cheapest plan is
found exactly, since under prices nothing queues: the way of each byte is a shortest path, and what remains is, per
family, a small transport problem: who receives what, within the widths that balance allows.

Two details keep this a true bound for plans that forward what they receive and pass units on:
- A further copy of a KV head may come from any device, so it pays only the cheapest way in from anywhere; and a
  device may receive up to all the q heads of a group for one copy. A lost KV head comes from a store once. (Where a
  KV head has but one q head, there are no further copies, and it pays its way as that does.)
- Devices may pass on units that they hold to make room; such units pay their own way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from anchortp.layout import ATTENTION, KV
from anchortp.plan.placement import Placement, place
from anchortp.plan.plan import REPLICATED
from anchortp.plan.problem import Problem
from anchortp.plan.retain import by_group
from anchortp.plan.ways import Ways

_K = TypeVar("_K", bound=Hashable)
LARGE = 16  # devices from which on a simpler, weaker bound is taken where the transport problem would be large


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """`lost_bytes`: what any plan must read from stores. `seconds`: no plan is faster; `why` says what limits it."""

    lost_bytes: int
    seconds: float
    why: str


Sizes = Mapping[str, Sequence[int]]  # units per group of a family, copies included, when all is done


def lower_bound(problem: Problem, sizes: Sizes | None = None) -> Bound:
    """For plans into balanced layouts with `sizes`; by default with as many copies of experts as can stay where they
    are. In closed form, from the prices that most often turn out to be the right ones: all on the links into one
    device, or all, evenly, on the links of one kind on the ways from the stores."""
    if sizes is None:
        sizes = sizes_of(problem, place(problem, dict.fromkeys(problem.devices, 1.0)))
    found = [*_device_bounds(problem, sizes), *_kind_bounds(problem, sizes)]
    seconds, why = max(found, key=lambda item: item[0])
    if not seconds:
        why = "nothing has to move"
    return Bound(lost_bytes=problem.lost_bytes, seconds=seconds, why=why)


def _device_bounds(problem: Problem, sizes: Sizes) -> Iterator[tuple[float, str]]:
    """What must come to each device over all its links together."""
    entering = dict.fromkeys(problem.devices, 0.0)
    for link in problem.network.links:
        if link.dst in entering:
            entering[link.dst] += link.bytes_per_s
    low, _ = problem.bounds(problem.num_heads)
    least = {family: problem.total_bounds(family, of)[0] for family, of in sizes.items()} | {ATTENTION: low}
    for device in problem.devices:
        num_bytes = problem.units.replicated_bytes if device in problem.fresh else 0
        for family, widths in least.items():
            held = len(problem.slots[family].get(device, ()))
            num_bytes += max(0, widths[device] - held) * problem.size(family)
        yield num_bytes / entering[device], f"all that must come to {device} over its links"


def _kind_bounds(problem: Problem, sizes: Sizes) -> Iterator[tuple[float, str]]:
    network = problem.network
    _, last = network.quickest(problem.stores)
    used = sorted({link for device in problem.devices for link in network.path(last, device)})
    for speed in sorted({network.links[link].bytes_per_s for link in used}):
        same = [link for link in used if network.links[link].bytes_per_s == speed]
        prices = [0.0] * len(network.links)
        for link in same:
            prices[link] = 1.0 / (len(same) * speed)
        why = f"the {len(same)} links of {speed / 1e9:.1f} GB/s on the ways from the stores, all busy"
        yield price_bound(problem, prices, sizes), why


def sizes_of(problem: Problem, placement: Placement) -> Sizes:
    return {family: placement.sizes(family) for family in problem.families if family not in (ATTENTION, KV)}


def price_bound(problem: Problem, prices: Sequence[float], sizes: Sizes, *, by_layer: bool = False) -> float:
    """Seconds that every plan needs, by these prices (>= 0, in seconds per byte, sum of price x bandwidth <= 1).
    `by_layer`: also looks at each layer of experts alone, which takes longer and matters where layers differ."""
    ways = _Ways(problem, prices)
    total = sum(_sharded(problem, ways, family, of, by_layer) for family, of in sizes.items())
    total += _heads(problem, ways)
    if problem.fresh and problem.units.replicated_bytes:
        total += problem.size(REPLICATED) * sum(ways.entry(device) for device in problem.fresh)
    return total


class _Ways(Ways):
    """With what only a bound asks for: the least that something can pay wherever it comes from."""

    def __init__(self, problem: Problem, prices: Sequence[float]):
        super().__init__(problem, prices)
        self._entry = dict.fromkeys(problem.devices, math.inf)
        for price, link in zip(prices, problem.network.links, strict=True):
            if price < self._entry.get(link.dst, 0.0):
                self._entry[link.dst] = price

    def entry(self, device: str) -> float:
        """From anywhere else at all: the cheapest last link."""
        return self._entry[device]

    def kv_copy(self, kv_head: int, device: str, num_heads: int) -> float:
        """What it costs that a KV head, which `num_heads` q heads read, and its plane come to the device. If that is
        but one, no other device can need them and pass them on."""
        paid = self.kv_head(kv_head, device) if num_heads == 1 else math.inf
        return paid if math.isfinite(paid) else self.entry(device) * self.problem.copy_bytes(kv_head)


Held = Mapping[str, Sequence[int]]  # device -> units


def _sharded(problem: Problem, ways: _Ways, family: str, sizes: Sequence[int], by_layer: bool = False) -> float:
    """What the units of one family cost at least, all layers together (and if that is more: one by one)."""
    bounds = problem.total_bounds(family, sizes)
    paid = _placed(problem, ways, problem.slots[family], len(problem.missing[family]), sum(sizes), *bounds)
    if by_layer and len(sizes) > 1 and len(problem.devices) <= LARGE:
        groups = by_group(problem, family, len(sizes), problem.units.num_units[family] // len(sizes))
        layers = (
            _placed(problem, ways, held | leaving, len(missing), size, *problem.bounds(size))
            for (held, leaving, missing), size in zip(groups, sizes, strict=True)
        )
        paid = max(paid, sum(layers))
    return problem.size(family) * paid


def _placed(
    problem: Problem,
    ways: _Ways,
    held: Held,
    num_missing: int,
    num_units: int,
    low: Mapping[str, int],
    high: Mapping[str, int],
) -> float:
    """The transport problem of `num_units` units, copies included: prices paid, for units of one byte."""
    counts = {d: len(held.get(d, ())) for d in problem.devices}
    leaving = any(units for device, units in held.items() if device not in counts)
    room = sum(max(0, low[d] - counts[d]) for d in problem.devices)
    all_stay = sum(counts.values()) + num_missing == num_units and all(counts[d] <= high[d] for d in counts)
    if not leaving and num_missing >= room and all_stay:
        # Passing units on to make room pays no less than going there directly (triangle inequality).
        least = {d: low[d] - counts[d] for d in problem.devices}
        most = {d: high[d] - counts[d] for d in problem.devices}
        return _fill(num_missing, least, most, ways.from_stores)
    if len(problem.devices) > LARGE:
        return sum(max(0, low[d] - counts[d]) * ways.entry(d) for d in problem.devices)
    supply, low = _supply(problem, held, num_missing, low)
    cost = {
        (sources, d): min((ways.from_device(s, d) for s in sources), default=ways.from_stores[d])
        for sources in supply
        for d in problem.devices
    }
    return transport(supply, low, high, cost)[1]


def _supply(
    problem: Problem, held: Held, num_missing: int, low: Mapping[str, int]
) -> tuple[dict[tuple[str, ...], int], dict[str, int]]:
    """Units that must end somewhere, by the devices that hold them now. Units with several holders in the group may
    stay on either, or on both: they are left out, and the least that each such holder must have is lowered."""
    stay, counted = set(problem.devices), Counter(u for units in held.values() for u in units)
    several: dict[int, tuple[str, ...]] = {u: () for u, n in counted.items() if n > 1}
    supply: Counter[tuple[str, ...]] = Counter({(): num_missing})
    for device, units in held.items():
        sole = [unit for unit in units if unit not in several]
        supply[device,] += len(sole)
        for unit in units if len(sole) < len(units) else ():
            if unit in several:
                several[unit] = (*several[unit], device)
    least = Counter(low)
    for holders in several.values():
        here = [device for device in holders if device in stay]
        if not here:
            supply[holders] += 1
        for device in here:
            least[device] -= 1
    wanted = {device: max(0, least[device]) for device in problem.devices}
    short = max(0, sum(wanted.values()) - sum(supply.values()))  # too many copies, which stay where they are
    return dict(supply), {device: max(0, count - short) for device, count in wanted.items()}


def _fill(count: int, least: Mapping[str, int], most: Mapping[str, int], price: Mapping[str, float]) -> float:
    """`count` units, each device between `least` and `most`, the rest to the cheapest."""
    paid, left = 0.0, count
    for device, needed in least.items():
        if needed > 0:
            paid += needed * price[device]
            left -= needed
    for device in sorted(most, key=lambda d: price[d]):
        take = min(left, most[device] - max(0, least[device]))
        paid += take * price[device]
        left -= take
    assert left == 0, "balance leaves no room for what must be placed"
    return paid


def _heads(problem: Problem, ways: _Ways) -> float:
    """q heads, with the share of a KV head's copy that each must at least bring along."""
    if len(problem.devices) > LARGE:
        once = len(problem.missing.get(KV, ())) * min(ways.from_stores[d] for d in problem.devices)
        return _sharded(problem, ways, ATTENTION, [problem.num_heads]) + (once * problem.size(KV) if once else 0.0)
    low, high = problem.bounds(problem.num_heads)
    held = problem.slots[ATTENTION]
    has_kv = bool(problem.units.num_units.get(KV))
    group_of = problem.units.kv_head_of if has_kv else (lambda q: 0)
    supply: dict[tuple[str, int], int] = {}
    for source, units in (*held.items(), ("", problem.missing[ATTENTION])):
        for unit in units:
            key = (source, group_of(unit))
            supply[key] = supply.get(key, 0) + 1
    per_group: dict[int, int] = {}
    for (_, group), count in supply.items():
        per_group[group] = per_group.get(group, 0) + count
    opens = {}  # the share of a copy that comes with each q head
    for group, count in per_group.items() if has_kv else ():
        for device in problem.devices:
            if group not in problem.held[KV].get(device, ()):
                opens[group, device] = ways.kv_copy(group, device, count) / max(1, min(count, high[device]))
    cost, size = {}, problem.size(ATTENTION)
    for source, group in supply:
        for device in problem.devices:
            way = ways.from_stores[device] if not source else ways.from_device(source, device)
            price = 0.0 if source == device else way * size
            cost[(source, group), device] = price + opens.get((group, device), 0.0)
    total = transport(supply, low, high, cost)[1]
    dearer = max(0.0, min(ways.from_stores[d] - ways.entry(d) for d in problem.devices))
    shared = sum(per_group[group] > 1 for group in problem.missing.get(KV, ()))
    total += shared * problem.size(KV) * dearer
    return total


def transport(
    supply: Mapping[_K, int],
    low: Mapping[str, int],
    high: Mapping[str, int],
    cost: Mapping[tuple[_K, str], float],
) -> tuple[dict[tuple[_K, str], int], float]:
    """The cheapest way to give all of `supply` to devices so that each ends between `low` and `high`.

    Successive shortest paths: whatever can be had for nothing is had first; then each unit of supply left, and each
    device below its least, takes the cheapest chain of shifts, so that no shift ever makes the rest cheaper.
    """
    flow: dict[tuple[_K, str], int] = {}
    count = dict.fromkeys(low, 0)
    left = dict(supply)
    for (key, device), price in cost.items():
        if price == 0.0 and left[key] and count[device] < high[device]:
            take = min(left[key], high[device] - count[device])
            flow[key, device] = take
            count[device] += take
            left[key] -= take
    for key, amount in left.items():
        while amount:
            start = {device: (cost[key, device], (key, "", device)) for device in low}
            chain = _chain(flow, cost, start, {d for d in low if count[d] < high[d]})
            end = chain[-1][2]
            step = min([amount, high[end] - count[end], *(flow[k, a] for k, a, _ in chain if a)])
            _shift(flow, chain, step)
            count[end] += step
            amount -= step
    for device in low:
        while count[device] < low[device]:
            start = {d: (0.0, None) for d in low if count[d] > low[d]}
            chain = _chain(flow, cost, start, {device})
            begin = chain[0][1]
            step = min([low[device] - count[device], count[begin] - low[begin], *(flow[k, a] for k, a, _ in chain)])
            _shift(flow, chain, step)
            count[begin] -= step
            count[device] += step
    return flow, sum(cost[pair] * amount for pair, amount in flow.items())


_Shift = tuple[Any, str, str]  # units of a class go from one device ("": from their supply) to another


def _chain(
    flow: Mapping[tuple[_K, str], int],
    cost: Mapping[tuple[_K, str], float],
    start: Mapping[str, tuple[float, _Shift | None]],
    ends: Collection[str],
) -> list[_Shift]:
    """The cheapest chain of shifts from any of `start` (a price and a first shift) to any of `ends`."""
    far = {device: price for device, (price, _) in start.items()}
    came: dict[str, _Shift] = {device: first for device, (_, first) in start.items() if first is not None}
    at: dict[str, list[_K]] = {}
    for (key, device), amount in flow.items():
        if amount:
            at.setdefault(device, []).append(key)
    devices, queue = {device for _, device in cost}, list(far)
    while queue:
        here = queue.pop(0)
        for key in at.get(here, ()):
            base = far[here] - cost[key, here]
            for there in devices:
                price = base + cost[key, there]
                if price < far.get(there, math.inf) - 1e-15 - 1e-12 * abs(price):
                    far[there], came[there] = price, (key, here, there)
                    queue.append(there)
    end = min(sorted(d for d in ends if d in far), key=lambda d: far[d])
    chain = []
    while end and end in came:
        chain.append(came[end])
        end = came[end][1]
    return list(reversed(chain))


def _shift(flow: dict[tuple[_K, str], int], chain: Sequence[_Shift], step: int) -> None:
    for key, here, there in chain:
        if here:
            flow[key, here] -= step
        flow[key, there] = flow.get((key, there), 0) + step
