"""What bytes pay on their way if every link has a price (in seconds per byte, as those of a `Routing`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from anchortp.layout import KV
from anchortp.plan.plan import PLANE
from anchortp.plan.problem import Problem


class Ways:
    """Prices per byte of the cheapest ways. `from_stores`: to each place from the nearest store."""

    def __init__(self, problem: Problem, prices: Sequence[float]):
        self.problem, self.prices = problem, prices
        self._far: dict[tuple[str, ...], Mapping[str, float]] = {}
        self.from_stores = self.far(problem.stores)

    def far(self, sources: tuple[str, ...]) -> Mapping[str, float]:
        """From the nearest of `sources`, to each place that they reach."""
        if sources not in self._far:
            self._far[sources], _ = self.problem.network.cheapest(dict.fromkeys(sources, 0.0), self.prices)
        return self._far[sources]

    def from_device(self, source: str, device: str) -> float:
        """From the device or a store, whichever is cheaper; nothing if it is there already."""
        return self.far((source, *self.problem.stores))[device]

    def kv_head(self, kv_head: int, device: str) -> float:
        """What a KV head and its plane pay together, each from the nearest that has it. (A plane that is to be
        replayed pays nothing, one that has no way to the device infinitely much.)"""
        problem, paid = self.problem, 0.0
        for family in (KV, PLANE) if problem.plane_bytes else (KV,):
            sources = (*problem.holders(family, kv_head), *problem.stores_of(family))
            if sources:
                paid += problem.size(family) * self.far(sources).get(device, math.inf)
        return paid
