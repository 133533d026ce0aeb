"""What the links say before anything moves: how far it is to each device, and how much each has to receive."""

from __future__ import annotations

import math
from collections.abc import Mapping

from anchortp.plan.problem import Problem


def into(problem: Problem) -> Mapping[str, float]:
    """Seconds per byte into each device from the stores when nothing else moves: the slowest link of the quickest
    way."""
    network = problem.network
    _, last = network.quickest(problem.stores)
    return {
        device: max((network.seconds_per_byte[link] for link in network.path(last, device)), default=0.0)
        for device in problem.devices
    }


def way(problem: Problem, source: str, device: str) -> float:
    """Seconds per byte from one device to another when nothing else moves: the slowest link of the quickest way."""
    route = problem.network.route(source, device)
    return math.inf if route is None else max((problem.network.seconds_per_byte[link] for link in route), default=0.0)


class Load:
    """Bytes that each device receives so far, and how soon it and its island would be done with `size` more."""

    def __init__(self, problem: Problem, slow: Mapping[str, float]):
        self.slow, self.island = slow, problem.islands
        self.bytes = dict.fromkeys(problem.devices, 0.0)
        self.on_island = dict.fromkeys(self.island.values(), 0.0)
        self.speed = dict.fromkeys(self.island.values(), 0.0)
        for device in problem.devices:
            self.speed[self.island[device]] += 1.0 / slow[device]

    def add(self, device: str, num_bytes: float) -> None:
        self.bytes[device] += num_bytes
        self.on_island[self.island[device]] += num_bytes

    def done_with(self, device: str, size: float) -> tuple[float, float]:
        island = self.island[device]
        island_s = (self.on_island[island] + size) / self.speed[island]
        return island_s, self.slow[device] * (self.bytes[device] + size)
