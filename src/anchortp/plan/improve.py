"""Small changes to a placement that balance allows: which odd unit could be received by another device instead.

Used by the `makespan` policy. A change is one of four: device b has a unit of one family more, and a one less; the
same, and the other way round for a unit of another family or layer; the q heads of one KV head go to b instead of a, in
exchange for as many of b's; another copy of an expert is dropped than was to be. What it gains is estimated with the
prices of the links: a byte that is delivered at b instead of a costs `far[a] - far[b]` less, and one that a gives up
saves what its receiver would pay from the stores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from anchortp.layout import ATTENTION, EXPERT, KV
from anchortp.plan.heads import kv_after
from anchortp.plan.placement import Placement, Share
from anchortp.plan.problem import Problem
from anchortp.plan.ways import Ways


@dataclass(frozen=True, slots=True)
class Shift:
    """Device `a` ends with one unit of `family` less, and `b` with one more. `which`: the share (its index), or the q
    heads. `back`: q heads that `a` gets instead, from `b`. `copy`: a device, and a copy of an expert that it was to
    drop. It keeps that, and receives one less, or gives up another; `a` drops the copy `drops`. (`b` may be `a` then.)
    `is_open`: all layers together stay balanced, so that it can be done alone."""

    family: str
    a: str
    b: str
    which: tuple[int, ...]
    gain: float
    back: tuple[int, ...] = ()
    copy: tuple[str, int] | None = None
    drops: int = 0
    is_open: bool = True


Change = tuple[Shift, ...]


def changes(
    problem: Problem, placement: Placement, prices: Sequence[float], aim: float, *, thorough: bool = False
) -> list[Change]:
    """All single shifts, exchanges and pairs that should gain something by these prices (per link, in seconds per
    byte), those first whose gain is nearest to `aim` (seconds). `thorough`: also pairs in which the shift of an expert
    gains nothing and only makes the other one possible, and other copies of experts."""
    look = _Look(problem, placement, prices, thorough)
    shifts: dict[tuple[str, str], list[Shift]] = {}
    for shift in look.shifts():
        shifts.setdefault((shift.a, shift.b), []).append(shift)
    found: list[tuple[float, Change]] = [(swap.gain, (swap,)) for swap in look.exchanges() if swap.gain > 0]
    for (a, b), there in shifts.items():
        for shift in there:
            if shift.gain > 0 and shift.is_open:
                found.append((shift.gain, (shift,)))
            for back in shifts.get((b, a), ()):
                gain = shift.gain + back.gain
                if _go_together(shift, back) and shift.gain > 0 and gain > 0:
                    found.append((gain, (shift, back)))
    found.sort(key=lambda item: abs(item[0] - aim))
    return [change for _, change in found]


def _go_together(shift: Shift, back: Shift) -> bool:
    """Whether the second undoes what the first does to the widths, and nothing else of it."""
    if shift.family == back.family:
        return shift.family == EXPERT and shift.which != back.which
    return shift.is_open and back.is_open


def changed(problem: Problem, placement: Placement, change: Change) -> Placement:
    """The placement after the change; `placement` itself stays as it is."""
    for shift in change:
        if shift.copy is not None:
            placement = _with_other_copy(problem, placement, shift, *shift.copy)
            shift = replace(shift, a=shift.copy[0])
        moved = _with_heads_moved if shift.family == ATTENTION else _with_unit_moved
        placement = moved(problem, placement, shift)
    return placement


def _with_other_copy(problem: Problem, placement: Placement, shift: Shift, keeper: str, unit: int) -> Placement:
    """`keeper` has one unit more than before, and `a` one less."""
    family, at = shift.family, shift.which[0]
    share, kept = placement.shares[at], placement.kept[family]
    stay = {*kept[keeper], unit}
    kept = kept | {
        keeper: tuple(u for u in problem.slots[family][keeper] if u in stay),
        shift.a: tuple(u for u in kept[shift.a] if u != shift.drops),
    }
    shares = list(placement.shares)
    shares[at] = replace(share, held=share.held | {keeper: share.held[keeper] + 1, shift.a: share.held[shift.a] - 1})
    return replace(placement, shares=shares, kept=placement.kept | {family: kept})


def _with_unit_moved(problem: Problem, placement: Placement, shift: Shift) -> Placement:
    """`a` receives one unit less, or, if it receives none, gives up one more; `b` keeps one that it gave up, if there
    is one, or receives one more."""
    family, at = shift.family, shift.which[0]
    share, kept = placement.shares[at], placement.kept[family]
    incoming, released = dict(share.incoming), {d: list(units) for d, units in share.pool.released.items()}
    if incoming[shift.a]:
        incoming[shift.a] -= 1
    else:
        unit = _sole_unit(problem, placement, at, shift.a)
        assert unit is not None
        released.setdefault(shift.a, []).append(unit)
        kept = kept | {shift.a: tuple(u for u in kept[shift.a] if u != unit)}
    if released.get(shift.b):
        stay = {*kept[shift.b], released[shift.b].pop()}
        kept = kept | {shift.b: tuple(u for u in problem.slots[family][shift.b] if u in stay)}
    else:
        incoming[shift.b] += 1
    pool = replace(share.pool, released={d: units for d, units in released.items() if units})
    shares = list(placement.shares)
    shares[at] = replace(share, pool=pool, incoming=incoming)
    return replace(placement, shares=shares, kept=placement.kept | {family: kept})


def _sole_unit(problem: Problem, placement: Placement, at: int, device: str) -> int | None:
    """The last unit of a share that the device keeps and no other device of the group does."""
    family = placement.shares[at].family
    per_group = problem.units.num_units[family] // problem.units.num_groups(family)
    group = sum(share.family == family for share in placement.shares[:at])
    others = [units for d, units in placement.kept[family].items() if d != device]
    mine = (u for u in reversed(placement.kept[family][device]) if u // per_group == group)
    return next((u for u in mine if not any(u in units for units in others)), None)


def _with_heads_moved(problem: Problem, placement: Placement, shift: Shift) -> Placement:
    kept, given = placement.kept[ATTENTION], set(shift.back)
    holder = placement.head_holder | dict.fromkeys(given.intersection(kept[shift.b]), shift.b)
    kept = kept | {shift.b: tuple(head for head in kept[shift.b] if head not in given)}
    heads = placement.heads | {
        shift.a: sorted({*placement.heads[shift.a], *given}.difference(shift.which)),
        shift.b: sorted({*placement.heads[shift.b], *shift.which} - given),
    }
    kept_kv, kv = kv_after(problem, kept, heads)
    return replace(
        placement, heads=heads, head_holder=holder, kept=placement.kept | {ATTENTION: kept, KV: kept_kv}, kv=kv
    )


_State = tuple[bool, bool, bool, bool]  # whether a device receives, gives up, may have one less, one more


def _state(share: Share, device: str) -> _State:
    width, gives = share.width(device), bool(share.pool.released.get(device))
    return share.incoming[device] > 0, gives, width > share.low[device], width < share.high[device]


class _Look:
    """What could change in a placement, and what that should gain."""

    def __init__(self, problem: Problem, placement: Placement, prices: Sequence[float], thorough: bool):
        self.problem, self.placement = problem, placement
        self.thorough = thorough and EXPERT in problem.families
        self.ways = Ways(problem, prices)
        self.from_stores = self.ways.from_stores
        self._kv: dict[tuple[int, str], float] = {}

    def head(self, head: int, device: str) -> float:
        """What it costs that `device` gets a q head."""
        problem, placement = self.problem, self.placement
        if head in placement.kept[ATTENTION].get(device, ()):
            return 0.0
        holder = placement.head_holder.get(head)
        if holder is None:
            holder = next((d for d, heads in placement.kept[ATTENTION].items() if head in heads), None)
        far = self.from_stores[device] if holder is None else self.ways.from_device(holder, device)
        return problem.size(ATTENTION) * far

    def kv(self, group: int, device: str) -> float:
        """What it costs that `device` gets a KV head, and its plane, if it has not held them."""
        problem, key = self.problem, (group, device)
        if KV not in problem.families or group in problem.held[KV].get(device, ()):
            return 0.0
        if key not in self._kv:
            self._kv[key] = self.ways.kv_head(group, device)
        return self._kv[key]

    def mine(self, device: str) -> dict[int, list[int]]:
        """q heads that the device will have, by KV head, those it receives first."""
        groups: dict[int, list[int]] = {}
        for head in (*self.placement.heads[device], *reversed(self.placement.kept[ATTENTION][device])):
            groups.setdefault(self.problem.kv_head_of(head), []).append(head)
        return groups

    def shifts(self) -> Iterator[Shift]:
        """For each ordered pair of devices at most one shift of a unit of each family (of q heads: one per group)."""
        for family in self.problem.families:
            if family == ATTENTION:
                yield from self._head_shifts()
            elif family != KV:
                yield from self._unit_shifts(family)

    def _unit_shifts(self, family: str) -> Iterator[Shift]:
        """Per pair of devices one shift for each thing that a share can do about it. (Shares in which all devices are
        in the same state can do the same.)"""
        shares = [(i, share) for i, share in enumerate(self.placement.shares) if share.family == family]
        givers, takers = self._open_ends(family, [share for _, share in shares])
        size, states = self.problem.size(family), set()
        seen: set[tuple[str, str, _State, _State]] = set()
        for i, share in shares:
            state = {device: _state(share, device) for device in self.problem.devices}
            if (key := tuple(state.values())) in states:
                continue
            states.add(key)
            fewer, more = self._fewer(i, share, state), self._more(share, state)
            for a, b in product(fewer, more):
                gain = size * (fewer[a] - more[b])
                if a != b and (gain or self.thorough) and (a, b, state[a], state[b]) not in seen:
                    seen.add((a, b, state[a], state[b]))
                    yield Shift(family, a, b, (i,), gain, is_open=a in givers and b in takers)
        if self.thorough and family == EXPERT:
            for shift in self._copy_shifts(shares):
                yield replace(shift, is_open=shift.a == shift.b or (shift.a in givers and shift.b in takers))

    def _copy_shifts(self, shares: Sequence[tuple[int, Share]]) -> Iterator[Shift]:
        """For each copy of an expert that is to be dropped, and each device that could drop one instead."""
        problem, kept = self.problem, self.placement.kept[EXPERT]
        per_layer, size = problem.units.num_units[EXPERT] // len(shares), problem.size(EXPERT)
        copies = Counter(unit for units in kept.values() for unit in units)
        for keeper, units in kept.items():
            for unit in sorted(problem.held[EXPERT][keeper].difference(units)):
                i, share = shares[unit // per_layer]
                given = share.pool.released.get(keeper, ())
                if unit in given or (
                    not share.incoming[keeper] and _sole_unit(problem, self.placement, i, keeper) is None
                ):
                    continue
                state = {device: _state(share, device) for device in problem.devices}
                for a, b in product(kept, problem.devices):
                    if a != keeper and (a == b or (b != keeper and state[a][2] and state[b][3])):
                        drops = (u for u in kept[a] if u // per_layer == unit // per_layer)
                        drop = next((u for u in drops if u == unit or copies[u] > 1), None)
                        if drop is not None:
                            gain = size * self._copy_gain(share, keeper, b)
                            yield Shift(EXPERT, a, b, (i,), gain, copy=(keeper, unit), drops=drop)

    def _copy_gain(self, share: Share, keeper: str, b: str) -> float:
        """Seconds per byte that are saved if one unit less comes to (or can come from) `keeper` and one more to `b`."""
        costs = self._one_more(share, b)
        if share.incoming[keeper]:
            return self.from_stores[keeper] - costs
        near = self.from_stores[b] - self.ways.from_device(keeper, b)
        return max(near, self._as_source(share, keeper)) - costs

    def _fewer(self, at: int, share: Share, state: Mapping[str, _State]) -> dict[str, float]:
        """Seconds per byte that are saved if a device has one unit less."""
        saved = {}
        for device, (receives, _, can_less, _) in state.items():
            if can_less and receives:
                saved[device] = self.from_stores[device]
            elif can_less and _sole_unit(self.problem, self.placement, at, device) is not None:
                worth = self._as_source(share, device)
                saved |= {device: worth} if worth or self.thorough else {}
        return saved

    def _more(self, share: Share, state: Mapping[str, _State]) -> dict[str, float]:
        """Seconds per byte that it costs if a device has one unit more."""
        return {device: self._one_more(share, device) for device, (*_, can_more) in state.items() if can_more}

    def _one_more(self, share: Share, device: str) -> float:
        return self._as_source(share, device) if share.pool.released.get(device) else self.from_stores[device]

    def _as_source(self, share: Share, device: str) -> float:
        """What a unit that the device gives up saves who would receive it from a store else."""
        wanting = (d for d, count in share.incoming.items() if count)
        return max((self.from_stores[d] - self.ways.from_device(device, d) for d in wanting), default=0.0)

    def _open_ends(self, family: str, shares: list[Share]) -> tuple[list[str], list[str]]:
        """Devices that may end with one unit less, and with one more, over all layers together."""
        if family != EXPERT:
            return list(self.problem.devices), list(self.problem.devices)
        width = {d: sum(share.width(d) for share in shares) for d in self.problem.devices}
        low, high = self.problem.total_bounds(family, self.placement.sizes(family))
        return [d for d in width if width[d] > low[d]], [d for d in width if width[d] < high[d]]

    def _head_shifts(self) -> Iterator[Shift]:
        mine = {device: self.mine(device) for device in self.problem.devices}
        width = {device: sum(map(len, groups.values())) for device, groups in mine.items()}
        low, high = self.problem.bounds(self.problem.num_heads)
        for a, groups in mine.items():
            for group, heads in groups.items() if width[a] > low[a] else ():
                if heads[0] in self.placement.heads[a]:
                    closes = self.kv(group, a) if len(heads) == 1 else 0.0
                    for b in mine:
                        if a != b and width[b] < high[b]:
                            opens = 0.0 if group in mine[b] else self.kv(group, b)
                            gain = closes - opens + self.head(heads[0], a) - self.head(heads[0], b)
                            if gain:
                                yield Shift(ATTENTION, a, b, (heads[0],), gain)

    def exchanges(self) -> Iterator[Shift]:
        """The q heads for which alone `a` needs a copy of a KV head, for as many that `b` has: such whose KV heads are,
        or come, to `a` anyway, or such that `b` receives with a KV head too."""
        mine = {device: self.mine(device) for device in self.problem.devices}
        for a in mine:
            for group in self.placement.kv[a]:
                for b in mine:
                    if a != b:
                        for back in self._backs(mine, a, b, group):
                            yield self._exchange(mine, a, b, group, back)

    def _backs(self, mine: Mapping[str, Mapping[int, list[int]]], a: str, b: str, group: int) -> Iterator[list[int]]:
        count = len(mine[a][group])
        there = {*self.problem.held.get(KV, {}).get(a, ()), *self.placement.kv[a]} - {group}
        candidates = [[head for g, heads in mine[b].items() if g in there for head in heads]]
        candidates += [mine[b][g] for g in self.placement.kv[b] if g not in there and g != group]
        return (heads[:count] for heads in candidates if len(heads) >= count)

    def _exchange(
        self, mine: Mapping[str, Mapping[int, list[int]]], a: str, b: str, group: int, back: list[int]
    ) -> Shift:
        given, there = mine[a][group], {*self.problem.held.get(KV, {}).get(a, ()), *self.placement.kv[a]}
        gain = self.kv(group, a) - (0.0 if group in mine[b] else self.kv(group, b))
        gain += sum(self.head(head, a) - self.head(head, b) for head in given)
        gain += sum(self.head(head, b) - self.head(head, a) for head in back)
        for g in {self.problem.kv_head_of(head) for head in back}:
            gain += self.kv(g, b) if set(mine[b][g]) <= set(back) else 0.0
            gain -= 0.0 if g in there else self.kv(g, a)
        return Shift(ATTENTION, a, b, tuple(given), gain, tuple(back))
