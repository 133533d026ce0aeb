"""The load balancer that DeepSeek published with its V3 model, written again from its description, and the exact best
of small cases. Slow and obvious.

The description: replicate the expert whose load per replica is largest until all slots are used; pack replicas,
largest first, onto the least loaded device that still has room for one, all devices getting equally many. With
`num_groups % num_nodes == 0` first pack the groups of experts onto the nodes, and replicate and pack inside each
(hierarchical); else all devices together (global). A replica carries an even share of its expert's load.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pack(weights: Floats, num_packs: int) -> list[list[int]]:
    """Balanced packing: items into packs of equally many, largest first onto the least loaded."""
    capacity = -(-len(weights) // num_packs)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for item in np.argsort(-weights, kind="stable"):
        best = min((p for p in packs if len(p) < capacity), key=lambda p: sum(weights[i] for i in p))
        best.append(int(item))
    return packs


def replicate(loads: Floats, num_slots: int) -> list[int]:
    """The expert of each replica."""
    experts = list(range(len(loads)))
    replicas = np.ones(len(loads))
    for _ in range(num_slots - len(loads)):
        hottest = int((loads / replicas).argmax())
        replicas[hottest] += 1
        experts.append(hottest)
    return experts


def published(
    loads: Floats, num_devices: int, num_slots: int, num_groups: int = 1, num_nodes: int = 1
) -> list[list[int]]:
    """One layer, `loads` [num_experts]: the experts in each device's slots, `num_slots` in all."""
    if num_nodes > 1 and num_groups % num_nodes == 0:
        groups = loads.reshape(num_groups, -1)
        devices: list[list[int]] = []
        for node in pack(groups.sum(axis=1), num_nodes):
            experts = np.concatenate([np.arange(g * groups.shape[1], (g + 1) * groups.shape[1]) for g in node])
            inside = published(loads[experts], num_devices // num_nodes, num_slots // num_nodes)
            devices += [[int(experts[e]) for e in device] for device in inside]
        return devices
    experts = replicate(loads, num_slots)
    count = np.bincount(experts, minlength=len(loads))
    return [[experts[i] for i in device] for device in pack((loads / count)[experts], num_devices)]


def device_loads(loads: Floats, placement: list[list[int]]) -> Floats:
    """With even shares."""
    count = np.bincount([e for device in placement for e in device], minlength=len(loads))
    return np.array([sum(loads[e] / count[e] for e in device) for device in placement])


def best_time(loads: Floats, speeds: Floats, held: NDArray[np.bool_], per_replica: float = 0.0) -> float:
    """One layer: the earliest time at which the slowest device can be done when tokens are shared out best.
    `held` [num_devices, num_experts]; each brings its device `per_replica` work beside its tokens. By the max-flow
    min-cut theorem that is the largest, over sets of experts, of their load, and what the devices that hold any of them
    do beside, over the speed of these devices; and no device is done before what it does beside."""
    beside = per_replica * held.sum(axis=1)
    found = [float((beside / speeds).max())]
    for size in range(1, len(loads) + 1):
        for experts in itertools.combinations(range(len(loads)), size):
            holders = held[:, experts].any(axis=1)
            found.append((loads[list(experts)].sum() + beside[holders].sum()) / speeds[holders].sum())
    return max(found)


def brute_force(loads: Floats, speeds: Floats, slots: tuple[int, ...], per_replica: float = 0.0) -> float:
    """One layer: the earliest time over all placements. (If replicas cost nothing, those that use all slots.)"""
    rows = [
        [
            row
            for row in itertools.product((False, True), repeat=len(loads))
            if sum(row) == min(limit, len(loads)) or (per_replica and sum(row) < limit)
        ]
        for limit in slots
    ]
    best = float("inf")
    for choice in itertools.product(*rows):
        held = np.array(choice)
        if held.any(axis=0).all():
            best = min(best, best_time(loads, speeds, held, per_replica))
    return best


def even_placement(num_experts: int, num_devices: int) -> list[list[int]]:
    """Every expert once, in intervals: what there is without load balancing."""
    return [[e for e in range(num_experts) if e * num_devices // num_experts == d] for d in range(num_devices)]
