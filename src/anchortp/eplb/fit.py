"""The best shares for a placement as it is: nothing moves but tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from anchortp.eplb.placement import Bools, Floats, Ints

MAX_STEPS = 400
NEAR = 2e-3  # of a layer's mean time: differences that are let be


Carry = Callable[[Ints, Ints, Ints, Ints, Floats], None]


def fit_shares(work: Floats, held: Bools, carried: Floats, speeds: Floats, carry: Carry) -> None:
    """Shifts `work` `[num_layers, num_devices, num_experts]` between holders of the same expert until the slowest
    device of each layer is as early as the replicas allow, or nearly; no device becomes slower than the slowest was.
    `carry(layers, sources, targets, experts, amounts)` is to do so, in `work` and in `carried` `[num_layers,
    num_devices]`: all that a device does, other work included.

    The times that are least unequal minimise sum of carried^2 / speed as well (the loads within reach form the base
    of a polymatroid; Fujishige 1980), and that is a smooth convex problem: in every layer at once, take the expert
    whose slowest holder with work and fastest holder are furthest apart, and let these two meet. Every step lowers the
    sum.
    """
    layers, experts = np.nonzero(held.sum(axis=1) > 1)
    if not len(layers):
        return
    holders, valid, which = _tables(held, layers, experts)
    lines = np.unique(layers)
    small = NEAR * np.maximum(carried.sum(axis=1) / speeds.sum(), 1e-300)
    for _ in range(MAX_STEPS):
        times = carried / speeds
        of_holder = times[lines[:, None, None], holders[lines]]
        busy = valid[lines] & (work[lines[:, None, None], holders[lines], which[lines][:, :, None]] > 0)
        gap = np.where(busy, of_holder, -np.inf).max(axis=2) - np.where(valid[lines], of_holder, np.inf).min(axis=2)
        row = gap.argmax(axis=1)
        at = np.arange(len(lines))
        gap = gap[at, row]
        open_ = gap > small[lines]
        if not open_.any():
            return
        lines, row, gap, at = lines[open_], row[open_], gap[open_], at[open_]
        source = holders[lines, row, np.where(busy[at, row], of_holder[at, row], -np.inf).argmax(axis=1)]
        target = holders[lines, row, np.where(valid[lines, row], of_holder[at, row], np.inf).argmin(axis=1)]
        expert = which[lines, row]
        amount = np.minimum(work[lines, source, expert], gap / (1 / speeds[source] + 1 / speeds[target]))
        carry(lines, source, target, expert, amount)


def _tables(held: Bools, layers: Ints, experts: Ints) -> tuple[Ints, Bools, Ints]:
    """Of experts with several holders, `layers` and `experts` in order: their holders `[layer, row, i]`, which of
    these entries are valid, and the expert of each `[layer, row]`."""
    per_layer = np.bincount(layers, minlength=held.shape[0])
    row = np.arange(len(layers)) - np.repeat(np.cumsum(per_layer) - per_layer, per_layer)
    which = np.zeros((held.shape[0], per_layer.max()), dtype=np.int64)
    which[layers, row] = experts
    expert, device = np.nonzero(held[layers, :, experts])
    replicas = np.bincount(expert)
    i = np.arange(len(expert)) - np.repeat(np.cumsum(replicas) - replicas, replicas)
    holders = np.zeros((*which.shape, replicas.max()), dtype=np.int64)
    valid = np.zeros(holders.shape, dtype=bool)
    holders[layers[expert], row[expert], i] = device
    valid[layers[expert], row[expert], i] = True
    return holders, valid, which
