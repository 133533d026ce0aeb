"""Which device holds which experts, and which share of an expert's tokens each of its holders computes. A value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from anchortp.layout import EXPERT, Layout, Part, UnitCatalog

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """`held[layer, device, expert]` and `shares` of the same shape: over the holders of an expert they sum to 1, and
    are 0 elsewhere. Both are read-only; devices are in rank order. An expert without a holder has no shares."""

    devices: tuple[str, ...]
    held: Bools
    shares: Floats

    def __post_init__(self) -> None:
        assert self.held.shape == self.shares.shape and self.held.shape[1] == len(self.devices)
        self.held.setflags(write=False)
        self.shares.setflags(write=False)

    @property
    def num_layers(self) -> int:
        return self.held.shape[0]

    @property
    def num_experts(self) -> int:
        return self.held.shape[2]

    @cached_property
    def num_replicas(self) -> Ints:
        """`[num_layers, num_experts]`"""
        return self.held.sum(axis=1)

    @cached_property
    def slots_used(self) -> Ints:
        """Expert units per device, all layers together."""
        return self.held.sum(axis=(0, 2))

    def units_of(self, device: str) -> tuple[int, ...]:
        """Expert units on the device, ascending."""
        held = self.held[:, self.devices.index(device)]
        return tuple(np.flatnonzero(held.ravel()).tolist())

    def holders(self, unit: int) -> tuple[str, ...]:
        layer, expert = divmod(unit, self.num_experts)
        return tuple(self.devices[d] for d in np.flatnonzero(self.held[layer, :, expert]))

    def parts(self, device: str) -> dict[int, Part]:
        """Of which experts the device computes only a part of the tokens, and which part: `part_of` turns it into
        tokens. Of its other experts it computes all. Parts of one expert's holders meet exactly, end to begin."""
        at = self.devices.index(device)
        layers, experts = np.nonzero(self.held[:, at] & (self.num_replicas > 1))
        held, shares = self.held[layers, :, experts], self.shares[layers, :, experts]
        ends = np.minimum(np.cumsum(shares, axis=1), 1.0)
        last = held.shape[1] - 1 - held[:, ::-1].argmax(axis=1)
        end = np.where(last == at, 1.0, ends[:, at])
        begin = ends[:, at - 1] if at else np.zeros(len(end))
        units = (layers * self.num_experts + experts).tolist()
        return dict(zip(units, zip(begin.tolist(), end.tolist(), strict=True), strict=True))


def placement_of(layout: Layout, units: UnitCatalog, previous: Placement | None = None) -> Placement:
    """The experts of a layout. Shares are those of `previous` as far as its holders still are holders (a holder that is
    gone leaves its tokens to the others, in proportion; a new one has none yet); without `previous` they are even."""
    num_layers = units.num_groups(EXPERT)
    num_experts = units.num_units[EXPERT] // num_layers
    held = np.zeros((num_layers, len(layout.devices), num_experts), dtype=bool)
    for at, shard in enumerate(layout.shards):
        layers, experts = np.divmod(np.asarray(shard[EXPERT], dtype=np.int64), num_experts)
        held[layers, at, experts] = True
    weights = held.astype(np.float64)
    if previous is not None:
        weights = np.zeros(held.shape)
        for at, device in enumerate(layout.devices):
            if device in previous.devices:
                weights[:, at] = previous.shares[:, previous.devices.index(device)] * held[:, at]
    return Placement(devices=layout.devices, held=held, shares=shares_from(weights, held))


def shares_from(weights: Floats, held: Bools) -> Floats:
    """Shares in proportion to `weights`, even where an expert's weights are all 0."""
    total = weights.sum(axis=1)
    shares = weights / np.where(total > 0, total, 1.0)[:, None, :]
    layers, experts = np.nonzero(total <= 0)
    rows = held[layers, :, experts]
    shares[layers, :, experts] = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1)
    return shares


def by_device(devices: Sequence[str], values: Mapping[str, float] | None, default: float) -> Floats:
    return np.array([(values or {}).get(device, default) for device in devices], dtype=np.float64)


def device_times(loads: Floats, shares: Floats, speeds: Floats, other: Floats) -> Floats:
    """`[num_layers, num_devices]`: when each device would be done with a layer, in choices at speed 1."""
    return (np.einsum("lde,le->ld", shares, loads) + other) / speeds
