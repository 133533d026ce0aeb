"""Which node each group of experts lives on (the hierarchical case)."""

from __future__ import annotations

import numpy as np

from anchortp.eplb.placement import Bools, Floats, Ints

WORSE = 1.1  # nodes that are so much less even than they could be are dealt out anew


def homes(loads: Floats, held: Bools, node: Ints, speeds: Floats, num_groups: int) -> Ints:
    """`[num_layers, num_experts]`: the node of each expert. Every node gets as many groups as the others, in each
    layer. Where the present placement keeps each group on one node, and the nodes are about as even as `deal_out`
    would make them, it stays."""
    num_layers, num_experts = loads.shape
    num_nodes = int(node.max()) + 1
    if num_nodes == 1:
        return np.zeros(loads.shape, dtype=np.int64)
    speed = np.bincount(node, weights=speeds)
    groups = loads.reshape(num_layers, num_groups, -1).sum(axis=2)
    on_node = np.stack([held[:, node == n].any(axis=1) for n in range(num_nodes)], axis=1)
    whole = on_node.reshape(num_layers, num_nodes, num_groups, -1).all(axis=3)
    present = whole.argmax(axis=1)
    dealt = deal_out(groups, speed)
    counts = np.stack([(present == n).sum(axis=1) for n in range(num_nodes)], axis=1)
    keeps = whole.any(axis=1).all(axis=1) & (counts == num_groups // num_nodes).all(axis=1)
    keeps &= _slowest(groups, present, speed) <= WORSE * _slowest(groups, dealt, speed)
    chosen = np.where(keeps[:, None], present, dealt)
    return np.repeat(chosen, num_experts // num_groups, axis=1)


def deal_out(groups: Floats, speed: Floats) -> Ints:
    """`[num_layers, num_groups]`: the node of each group: largest first, to the node that is done with it soonest and
    still has room, all getting equally many."""
    num_layers, num_groups = groups.shape
    num_nodes = len(speed)
    order = np.argsort(-groups, axis=1, kind="stable")
    lines = np.arange(num_layers)
    work, count = np.zeros((num_layers, num_nodes)), np.zeros((num_layers, num_nodes), dtype=np.int64)
    result = np.empty_like(order)
    for i in range(num_groups):
        group = order[:, i]
        load = groups[lines, group]
        done = np.where(count < num_groups // num_nodes, (work + load[:, None]) / speed, np.inf)
        best = done.argmin(axis=1)
        work[lines, best] += load
        count[lines, best] += 1
        result[lines, group] = best
    return result


def _slowest(groups: Floats, node: Ints, speed: Floats) -> Floats:
    work = np.stack([np.where(node == n, groups, 0.0).sum(axis=1) for n in range(len(speed))], axis=1)
    return (work / speed).max(axis=1)
