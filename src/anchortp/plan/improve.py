"""Small changes to a placement that balance allows: which odd unit could be received by another device instead.

Used by the `makespan` policy. A change is one of three: a unit of one family goes to device b instead of a; the same,
and a unit of another family goes to a instead of b; the q heads of one KV head go to b instead of a, in exchange for as
many that b has and whose KV heads are at a. What it gains is estimated with the prices of the links: a byte that is
delivered at b instead of a costs `far[a] - far[b]` less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from anchortp.layout import ATTENTION, EXPERT, KV
from anchortp.plan.heads import kv_after
from anchortp.plan.placement import Placement, Share
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


def changes(problem: Problem, placement: Placement, far: Mapping[str, float], aim: float) -> list[Change]:
    """All single shifts, exchanges and pairs that should gain something, those first whose gain is nearest to `aim`.

    `far`: seconds per byte to each device, by the present prices; `aim`: seconds to be gained.
    """
    shifts: dict[tuple[str, str], list[Shift]] = {}
    for family in problem.families:
        if family != KV:
            for shift in _family_shifts(problem, placement, family, far):
                shifts.setdefault((shift.a, shift.b), []).append(shift)
    found: list[tuple[float, Change]] = [(swap.gain, (swap,)) for swap in _exchanges(problem, placement, far)]
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
            placement = _with_head_moved(problem, placement, shift)
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


def _with_head_moved(problem: Problem, placement: Placement, shift: Shift) -> Placement:
    heads, kept, holder = dict(placement.heads), placement.kept[ATTENTION], placement.head_holder
    heads[shift.a] = sorted({*heads[shift.a], *shift.back}.difference(shift.which))
    heads[shift.b] = sorted([*heads[shift.b], *shift.which])
    if shift.back:
        kept = kept | {shift.b: tuple(head for head in kept[shift.b] if head not in shift.back)}
        holder = holder | dict.fromkeys(shift.back, shift.b)
    kept_kv, kv = kv_after(problem, kept, heads)
    return replace(
        placement, heads=heads, head_holder=holder, kept=placement.kept | {ATTENTION: kept, KV: kept_kv}, kv=kv
    )


def _family_shifts(problem: Problem, placement: Placement, family: str, far: Mapping[str, float]) -> Iterator[Shift]:
    """For each ordered pair of devices at most one shift of a unit of the family (of q heads: one per KV group)."""
    if family == ATTENTION:
        yield from _head_shifts(problem, placement, far)
        return
    shares = [(i, share) for i, share in enumerate(placement.shares) if share.family == family]
    givers, takers = _open_ends(problem, placement, family, [share for _, share in shares])
    size = problem.size(family)
    for a in givers:
        for b in takers:
            if a != b and far[a] != far[b]:
                which = next((i for i, s in shares if _can_shift(s, a, b)), None)
                if which is not None:
                    yield Shift(family, a, b, (which,), size * (far[a] - far[b]))


def _can_shift(share: Share, a: str, b: str) -> bool:
    return share.incoming[a] > share.least[a] and share.incoming[b] < share.most[b]


def _open_ends(problem: Problem, placement: Placement, family: str, shares: list[Share]) -> tuple[list[str], list[str]]:
    """Devices that may end with one unit less, and with one more, over all layers together."""
    if family != EXPERT:
        return list(problem.devices), list(problem.devices)
    width = {d: len(placement.kept[family][d]) + sum(s.incoming[d] for s in shares) for d in problem.devices}
    low, high = problem.total_bounds(family, placement.sizes(family))
    return [d for d in width if width[d] > low[d]], [d for d in width if width[d] < high[d]]


def _head_shifts(problem: Problem, placement: Placement, far: Mapping[str, float]) -> Iterator[Shift]:
    kept, heads = placement.kept[ATTENTION], placement.heads
    width = {d: len(kept[d]) + len(heads[d]) for d in problem.devices}
    low, high = problem.bounds(problem.num_heads)
    size, kv_size = problem.size(ATTENTION), problem.kv_bytes
    for a in problem.devices:
        one_each = {problem.kv_head_of(head): head for head in heads[a]}
        for group, head in one_each.items() if width[a] > low[a] else ():
            alone = sum(problem.kv_head_of(h) == group for h in (*kept[a], *heads[a])) == 1
            closes = kv_size * far[a] if alone and group in placement.kv[a] else 0.0
            for b in problem.devices:
                if a == b or width[b] >= high[b] or far[a] == far[b]:
                    continue
                there = group in placement.kv[b] or group in problem.held.get(KV, {}).get(b, ())
                opens = 0.0 if there else kv_size * far[b]
                yield Shift(ATTENTION, a, b, (head,), size * (far[a] - far[b]) + closes - opens)


def _exchanges(problem: Problem, placement: Placement, far: Mapping[str, float]) -> Iterator[Shift]:
    """The q heads for which alone `a` would need a KV head, for as many that `b` has and whose KV heads are at `a`."""
    kept, heads, held_kv = placement.kept[ATTENTION], placement.heads, problem.held.get(KV, {})
    for a in problem.devices:
        for group in placement.kv[a]:
            mine = tuple(head for head in heads[a] if problem.kv_head_of(head) == group)
            for b in problem.devices:
                back = [h for h in reversed(kept[b]) if problem.kv_head_of(h) in held_kv.get(a, ())][: len(mine)]
                there = group in placement.kv[b] or group in held_kv.get(b, ())
                costs = len(mine) * problem.size(ATTENTION) + (0 if there else problem.kv_bytes)
                gain = problem.kv_bytes * far[a] - costs * far[b]
                if a != b and len(back) == len(mine) and gain > 0:
                    yield Shift(ATTENTION, a, b, mine, gain, tuple(back))
