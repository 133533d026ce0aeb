"""What no placement can beat. Per layer, in choices at speed 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from anchortp.eplb.placement import Floats


def even_time(total: Floats, speeds: Floats, other: Floats) -> Floats:
    """When everybody would be done if the work could be split at will: the level to which `total` `[n]` more work
    fills devices that carry `other` `[n, num_devices]` already. Whoever carries more than that gets none."""
    begin = other / speeds
    order = np.argsort(begin, axis=1, kind="stable")
    begin = np.take_along_axis(begin, order, axis=1)
    speed = np.cumsum(np.take_along_axis(np.broadcast_to(speeds, other.shape), order, axis=1), axis=1)
    carried = np.cumsum(np.take_along_axis(other, order, axis=1), axis=1)
    levels = (total[:, None] + carried) / speed  # if the first 1, 2, ... devices took part
    # One more device joins as long as it begins below the level of those before it: the least level is the one.
    return levels.min(axis=1)


def lower_bound(loads: Floats, speeds: Floats, other: Floats, num_slots: ArrayLike) -> Floats:
    """`[num_layers]`: no placement of at most `num_slots` replicas of a layer (one number, or one per layer), no two of
    an expert on one device, is done with the layer earlier, however tokens are shared out. With D devices and
    R = num_slots - num_experts further replicas:

    1. all work, split at will (`even_time`); never before the device that has most other work;
    2. the k largest experts have at most k + R replicas, and at most k * D: one of these carries at least their mean;
    3. of the D + R + 1 largest experts at least D + 1 have one replica, so two of them meet on a device.
    """
    num_layers, num_experts = loads.shape
    num_devices = len(speeds)
    spare = np.broadcast_to(np.asarray(num_slots), num_layers) - num_experts
    assert (spare >= 0).all(), "every expert needs a slot"
    order = -np.sort(-loads, axis=1)
    k = np.arange(1, num_experts + 1)
    split = np.cumsum(order, axis=1) / np.minimum(k + spare[:, None], k * num_devices)
    at = np.minimum(num_devices + spare, num_experts)
    padded = np.pad(order, ((0, 0), (0, 1)))
    lines = np.arange(num_layers)
    pair = np.where(at < num_experts, padded[lines, at - 1] + padded[lines, at], 0.0)
    other = np.broadcast_to(other, (num_layers, num_devices))
    all_work = np.maximum(even_time(loads.sum(axis=1), speeds, other), (other / speeds).max(axis=1))
    return np.maximum(all_work, np.maximum(split.max(axis=1), pair) / speeds.max())
