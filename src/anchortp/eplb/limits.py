"""What a balancer may use, and what it is worth. A value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anchortp.eplb.placement import Floats, Ints, by_device
from anchortp.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Checked on construction: ConfigError.

    `slots`: expert units each device may hold at any time, all layers together (memory for experts // bytes of a
    unit). Copies arrive before anything is dropped to make room, so a device whose slots are all taken by experts that
    nobody else holds can take part in nothing: leave one free.
    `seconds_per_choice`: what one choice (a token and an expert chosen for it) costs a device of speed 1.
    `choices_per_replica`: what an expert costs a device that holds it in every step, however few tokens it computes,
    in choices: its weights are read once. Where steps have few tokens this is most of it, and a further replica makes
    all slower.
    `seconds_per_byte`: how much longer the service takes, in all, for a byte copied in the background.
    `horizon_steps`: for how many steps the loads are trusted to stay as they are: what is copied must pay by then.
    `max_bytes`: copied by one decision; None: no limit.
    `min_gain`: part of the experts' time of a step that a change must win at least.
    `speeds`: relative, 1 where missing. `other_load`: work that a device does beside its experts while the others are
    waiting for it, in choices per step and layer at speed 1; 0 where missing.
    `nodes`, `num_groups`: if every device has a node, there are several, and they divide the groups of experts (equal
    runs, as group-limited routers have them), each group stays inside one node, replicas included.
    """

    slots: Mapping[str, int]
    seconds_per_choice: float
    choices_per_replica: float = 0.0
    seconds_per_byte: float = 0.0
    horizon_steps: float = 10_000.0
    max_bytes: int | None = None
    min_gain: float = 0.02
    speeds: Mapping[str, float] | None = None
    other_load: Mapping[str, float] | None = None
    nodes: Mapping[str, str] | None = None
    num_groups: int = 1

    def __post_init__(self) -> None:
        for device, count in self.slots.items():
            if count < 0:
                raise ConfigError(f"slots of {device} is {count}; it must be 0 or more.")
        if not self.seconds_per_choice > 0:
            raise ConfigError(f"seconds_per_choice is {self.seconds_per_choice}; it must be greater than 0.")
        for name in ("choices_per_replica", "seconds_per_byte", "horizon_steps", "min_gain"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for device, speed in (self.speeds or {}).items():
            if not speed > 0:
                raise ConfigError(f"speed of {device} is {speed}; speeds are relative and greater than 0.")
        for device, load in (self.other_load or {}).items():
            if not load >= 0:
                raise ConfigError(f"other_load of {device} is {load}; it must be 0 or more.")
        if self.num_groups < 1:
            raise ConfigError(f"num_groups is {self.num_groups}; it must be 1 or more.")

    def slots_of(self, devices: Sequence[str]) -> Ints:
        missing = [device for device in devices if device not in self.slots]
        if missing:
            raise ConfigError(f"limits name no slots for {', '.join(missing)}; give every device of the layout some.")
        return np.array([self.slots[device] for device in devices], dtype=np.int64)

    def speeds_of(self, devices: Sequence[str]) -> Floats:
        return by_device(devices, self.speeds, 1.0)

    def other_of(self, devices: Sequence[str], num_layers: int) -> Floats:
        """`[num_layers, num_devices]`"""
        return np.tile(by_device(devices, self.other_load, 0.0), (num_layers, 1))

    def nodes_of(self, devices: Sequence[str], num_experts: int) -> Ints:
        """`[num_devices]`: the number of each device's node; all 0 where groups are not kept inside nodes."""
        one = np.zeros(len(devices), dtype=np.int64)
        if self.nodes is None or num_experts % self.num_groups or any(d not in self.nodes for d in devices):
            return one
        names = list(dict.fromkeys(self.nodes[device] for device in devices))
        return one if self.num_groups % len(names) else np.array([names.index(self.nodes[d]) for d in devices])
