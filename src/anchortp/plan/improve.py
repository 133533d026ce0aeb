"""Small changes to a placement that balance allows: which odd unit could be received by another device instead.

Used by the `makespan` policy. A change is one of three: a unit of one family goes to device b instead of a; the same,
and a unit of another family goes to a instead of b; the q heads of one KV head go to b instead of a, in exchange for as
many that b has and whose KV heads are at a. What it gains is estimated with the prices of the links: a byte that is
delivered at b instead of a costs `far[a] - far[b]` less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from anchortp.layout import ATTENTION, EXPERT, KV
from anchortp.plan.heads import kv_after
from anchortp.plan.placement import Placement, Share
from anchortp.plan.plan import PLANE
from anchortp.plan.problem import Problem


@dataclass(frozen=True, slots=True)
class Shift:
    """One unit of `family`, now to be received by device `a`, is received by `b`. `which`: the share (its index),
    or the q heads. `back`: q heads that `a` receives instead, from `b`."""

    family: str
    a: str
    b: str
    which: tuple[int, ...]
    gain: float
    back: tuple[int, ...] = ()


Change = tuple[Shift, ...]


def changes(problem: Problem, placement: Placement, prices: Sequence[float], aim: float) -> list[Change]:
    """All single shifts, exchanges and pairs that should gain something by these prices (per link, in seconds per
    byte), those first whose gain is nearest to `aim` (seconds)."""
    look = _Look(problem, placement, prices)
    shifts: dict[tuple[str, str], list[Shift]] = {}
    for shift in look.shifts():
        shifts.setdefault((shift.a, shift.b), []).append(shift)
    found: list[tuple[float, Change]] = [(swap.gain, (swap,)) for swap in look.exchanges() if swap.gain > 0]
    for (a, b), there in shifts.items():
        for shift in there:
            if shift.gain > 0:
                found.append((shift.gain, (shift,)))
            for back in shifts.get((b, a), ()):
                gain = shift.gain + back.gain
                if back.family != shift.family and shift.gain > 0 and gain > 0:
                    found.append((gain, (shift, back)))
    found.sort(key=lambda item: abs(item[0] - aim))
    return [change for _, change in found]


def changed(problem: Problem, placement: Placement, change: Change) -> Placement:
    """The placement after the change; `placement` itself stays as it is."""
    for shift in change:
        if shift.family == ATTENTION:
            placement = _with_heads_moved(problem, placement, shift)
        else:
            share = placement.shares[shift.which[0]]
            incoming = share.incoming | {
                shift.a: share.incoming[shift.a] - 1,
                shift.b: share.incoming[shift.b] + 1,
            }
            shares = list(placement.shares)
            shares[shift.which[0]] = replace(share, incoming=incoming)
            placement = replace(placement, shares=shares)
    return placement


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


def _can_shift(share: Share, a: str, b: str) -> bool:
    return share.incoming[a] > share.least[a] and share.incoming[b] < share.most[b]


class _Look:
    """What could change in a placement, and what that should gain."""

    def __init__(self, problem: Problem, placement: Placement, prices: Sequence[float]):
        self.problem, self.placement, self.prices = problem, placement, prices
        self._trees: dict[tuple[str, ...], Mapping[str, float]] = {}
        self._kv: dict[tuple[int, str], float] = {}

    def far(self, sources: tuple[str, ...], device: str) -> float:
        """Seconds per byte from the nearest of `sources`."""
        if sources not in self._trees:
            self._trees[sources], _ = self.problem.network.cheapest(dict.fromkeys(sources, 0.0), self.prices)
        return self._trees[sources].get(device, math.inf)

    def head(self, head: int, device: str) -> float:
        """What it costs that `device` gets a q head."""
        problem, placement = self.problem, self.placement
        if head in placement.kept[ATTENTION].get(device, ()):
            return 0.0
        holder = placement.head_holder.get(head)
        if holder is None:
            holder = next((d for d, heads in placement.kept[ATTENTION].items() if head in heads), None)
        sources = problem.stores if holder is None else (holder, *problem.stores)
        return problem.size(ATTENTION) * self.far(sources, device)

    def kv(self, group: int, device: str) -> float:
        """What it costs that `device` gets a KV head, and its plane, if it has not held them."""
        problem, key = self.problem, (group, device)
        if KV not in problem.families or group in problem.held[KV].get(device, ()):
            return 0.0
        if key not in self._kv:
            self._kv[key] = 0.0
            for family in (KV, PLANE) if problem.plane_bytes else (KV,):
                sources = (*problem.holders(family, group), *problem.stores_of(family))
                if sources:  # else it is replayed
                    self._kv[key] += problem.size(family) * self.far(sources, device)
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
        shares = [(i, share) for i, share in enumerate(self.placement.shares) if share.family == family]
        givers, takers = self._open_ends(family, [share for _, share in shares])
        size, stores = self.problem.size(family), self.problem.stores
        for a in givers:
            for b in takers:
                gain = size * (self.far(stores, a) - self.far(stores, b))
                if a != b and gain:
                    which = next((i for i, share in shares if _can_shift(share, a, b)), None)
                    if which is not None:
                        yield Shift(family, a, b, (which,), gain)

    def _open_ends(self, family: str, shares: list[Share]) -> tuple[list[str], list[str]]:
        """Devices that may end with one unit less, and with one more, over all layers together."""
        problem, placement = self.problem, self.placement
        if family != EXPERT:
            return list(problem.devices), list(problem.devices)
        width = {d: len(placement.kept[family][d]) + sum(s.incoming[d] for s in shares) for d in problem.devices}
        low, high = problem.total_bounds(family, placement.sizes(family))
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
        """The q heads for which alone `a` needs a copy of a KV head, for as many that `b` has and whose KV heads are,
        or come, to `a` anyway."""
        held = self.problem.held.get(KV, {})
        mine = {device: self.mine(device) for device in self.problem.devices}
        for a in mine:
            for group in self.placement.kv[a]:
                given = mine[a][group]
                there = {*held.get(a, ()), *self.placement.kv[a]} - {group}
                before = self.kv(group, a) + sum(self.head(head, a) for head in given)
                for b in mine:
                    back = [head for g, heads in mine[b].items() if g in there for head in heads][: len(given)]
                    if a != b and len(back) == len(given):
                        gain = before - sum(self.head(head, b) for head in given) - self._taken(back, a, b)
                        gain -= 0.0 if group in mine[b] else self.kv(group, b)
                        yield Shift(ATTENTION, a, b, tuple(given), gain, tuple(back))

    def _taken(self, back: Sequence[int], a: str, b: str) -> float:
        """What it costs that `a` receives these q heads, and `b` does not have them."""
        return sum(self.head(head, a) - self.head(head, b) for head in back)
