"""From one placement to another without a moment in which an expert has no holder or a device has too many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anchortp.eplb.balance import granted
from anchortp.eplb.placement import Bools, Ints, Placement, shares_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Expert unit `unit` is to be appended on `device`, read from `source`, which holds it when the stage begins;
    None: no device of the layout does, so it comes from a store."""

    unit: int
    device: str
    source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """`device` gives expert unit `unit` up."""

    unit: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """In this order: all of `copies`, side by side; tokens go by `placement`, in which what is to be dropped takes no
    part any more; all of `drops`."""

    copies: tuple[Copy, ...]
    drops: tuple[Drop, ...]
    placement: Placement


def staged(before: Placement, after: Placement, slots: Ints, node: Ints) -> tuple[Stage, ...]:
    """The last stage ends with `after`, except where devices whose slots are all taken wait for each other: then with
    as much of it as can be reached. Sources are near (of the same node) if possible, and take turns."""
    sent = np.zeros(len(before.devices), dtype=np.int64)
    have = before.held.copy()
    stages = []
    while True:
        arriving = _with_room(after.held & ~have, slots - have.sum(axis=(0, 2)))
        copies = tuple(_copies(after.devices, have, arriving, sent, node))
        have |= arriving
        # Only where a holder that stays is in place already.
        going = have & ~after.held & (have & after.held).any(axis=1, keepdims=True)
        have &= ~going
        if not copies and not going.any():
            return tuple(stages)
        units = np.argwhere(going.transpose(1, 0, 2)).tolist()
        drops = tuple(Drop(unit=la * after.num_experts + e, device=after.devices[d]) for d, la, e in units)
        stages.append(Stage(copies=copies, drops=drops, placement=_between(before, after, have)))


def _between(before: Placement, after: Placement, held: Bools) -> Placement:
    """With the shares of `after` as far as its holders are there, else those of `before`."""
    if (held == after.held).all():
        return after
    weights = after.shares * held
    weights = np.where(weights.any(axis=1, keepdims=True), weights, before.shares * held)
    return Placement(devices=after.devices, held=held.copy(), shares=shares_from(weights, held))


def _with_room(wanted: Bools, free: Ints) -> Bools:
    """As many of the wanted units on each device as it has slots free, first layers first."""
    at = np.nonzero(wanted)
    first = granted(at[1], -np.arange(len(at[1]), dtype=np.float64), free)
    result = np.zeros_like(wanted)
    result[tuple(index[first] for index in at)] = True
    return result


def _copies(devices: tuple[str, ...], have: Bools, arriving: Bools, sent: Ints, node: Ints) -> Iterator[Copy]:
    layers, targets, experts = np.nonzero(arriving)
    which, holders = np.nonzero(have[layers, :, experts])
    ends = np.cumsum(np.bincount(which, minlength=len(layers)))
    units = (layers * have.shape[2] + experts).tolist()
    near, taken, nodes = holders.tolist(), sent.tolist(), node.tolist()
    begin = 0
    for unit, target, end in zip(units, targets.tolist(), ends.tolist(), strict=True):
        source, best = None, (True, 0)
        for holder in near[begin:end]:
            rank = (nodes[holder] != nodes[target], taken[holder])
            if source is None or rank < best:
                source, best = holder, rank
        if source is not None:
            taken[source] += 1
        yield Copy(unit=unit, device=devices[target], source=None if source is None else devices[source])
        begin = end
    sent[:] = taken
