"""The planner's problem as a linear (or mixed-integer) programme, for HiGHS: the reference that plans are held to.

Written from the problem, not from the planner: arc flows instead of routes, all choices at once. Relaxed where the
planner is exact only in integers, so its optimum bounds every plan into a balanced layout from below:
- what several devices need a copy of (KV heads, planes, replicated tensors) is multicast: a link carries it once
  for all of them (Edmonds; with network coding that is the exact capacity, so forwarding cannot beat it).
`integral=True` keeps heads, KV copies and units whole (a mixed-integer programme; the tighter bound where units are
coarse), otherwise units may be split between devices. Needs scipy.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from anchortp.layout import ATTENTION, KV, Layout
from anchortp.plan import PLANE, REPLICATED, Problem

# sources, what it is, a device that needs it, the variable that says whether it does, bytes
Copy = tuple[tuple[str, ...], tuple[str, int], str, int, int]


class Unsolved(Exception):
    """HiGHS ran out of time."""


class _Programme:
    """Variables >= 0 by name; rows `low <= sum(coefficient * variable) <= high`."""

    def __init__(self) -> None:
        self.index: dict[Any, int] = {}
        self.integral: set[int] = set()
        self.upper: dict[int, float] = {}
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def var(self, name: Any, *, integral: bool = False, upper: float = np.inf) -> int:
        if name not in self.index:
            self.index[name] = len(self.index)
            self.upper[self.index[name]] = upper
            if integral:
                self.integral.add(self.index[name])
        return self.index[name]

    def row(self, terms: dict[int, float], low: float, high: float) -> None:
        self.entries += [(len(self.low), column, value) for column, value in terms.items()]
        self.low.append(low)
        self.high.append(high)

    def minimise(self, name: Any, gap: float, time_limit_s: float) -> float:
        size = len(self.index)
        rows, columns, values = zip(*self.entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self.low), size))
        cost = np.zeros(size)
        cost[self.index[name]] = 1.0
        integrality = np.zeros(size)
        integrality[list(self.integral)] = 1
        found = milp(
            cost,
            constraints=LinearConstraint(matrix, self.low, self.high),
            bounds=Bounds(0.0, np.array([self.upper[i] for i in range(size)])),
            integrality=integrality,
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )
        if found.x is None and not self.integral:
            found = self._by_interior_point(cost, matrix, time_limit_s)
        if found.x is None:
            raise Unsolved(found.message)
        return float(found.mip_dual_bound if self.integral else found.fun)

    def _by_interior_point(self, cost: Any, matrix: Any, time_limit_s: float) -> Any:
        """Large programmes with many optima, in which the simplex method of HiGHS goes astray."""
        low, high = np.array(self.low), np.array(self.high)
        equal = low == high
        below, above = np.isfinite(high) & ~equal, np.isfinite(low) & ~equal
        return linprog(
            cost,
            A_ub=vstack([matrix[below], -matrix[above]]),
            b_ub=np.concatenate([high[below], -low[above]]),
            A_eq=matrix[equal],
            b_eq=low[equal],
            bounds=[(0.0, self.upper[i]) for i in range(len(cost))],
            method="highs-ipm",
            options={"time_limit": time_limit_s},
        )


def lp_bound(
    problem: Problem,
    after: Layout | None = None,
    *,
    integral: bool = False,
    gap: float = 1e-3,
    time_limit_s: float = 20.0,
) -> float:
    """Seconds that no plan can beat that ends in a balanced layout, with as many copies of experts as `after`. Raises
    Unsolved."""
    programme = _Programme()
    # In units of the whole model over a typical link, so that numbers are near 1.
    scale = float(sum(problem.size(f) * problem.units.num_units[f] for f in problem.families)) or 1.0
    wishes: dict[tuple[str, ...], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    copies: list[Copy] = []
    for family in problem.families:
        if family not in (ATTENTION, KV):
            _family(programme, problem, family, _sizes(problem, family, after), after, wishes, scale, integral)
    _heads(programme, problem, wishes, copies, scale, integral)
    one = programme.var("one")
    programme.row({one: 1.0}, 1.0, 1.0)
    sources = (*problem.alive, *problem.stores)
    copies += [(sources, (REPLICATED, 0), device, one, problem.size(REPLICATED)) for device in problem.fresh]
    _flows(programme, problem, wishes, copies, scale)
    return programme.minimise("T", gap, time_limit_s)


def _holding(problem: Problem, family: str) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = dict.fromkeys(range(problem.units.num_units[family]), ())
    for device, units in problem.slots[family].items():
        for unit in units:
            found[unit] = (*found[unit], device)
    return found


def _sizes(problem: Problem, family: str, after: Layout | None) -> list[int]:
    groups = problem.units.num_groups(family)
    per_group = problem.units.num_units[family] // groups
    sizes = [0] * groups
    for shard in after.shards if after else ():
        for unit in shard[family]:
            sizes[unit // per_group] += 1
    return sizes if after else [per_group] * groups


def _family(programme, problem, family, sizes, after, wishes, scale, integral) -> None:
    """Of a unit with several holders, copies may stay where they are or go, but they do not move elsewhere."""
    per_group = problem.units.num_units[family] // len(sizes)
    classes: dict[tuple[int, tuple[str, ...]], int] = defaultdict(int)
    for unit, holders in _holding(problem, family).items():
        classes[unit // per_group, holders] += 1
    width: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for (group, holders), count in classes.items():
        here = set(holders) & set(problem.devices)
        several = len(holders) > 1 and bool(here)
        terms = {}
        for device in here if several else problem.devices:
            whole = integral and device not in holders
            at = programme.var(("place", family, group, holders, device), integral=whole, upper=count)
            terms[at] = width[group, device][at] = 1.0
            if device not in holders:
                wishes[(*holders, *problem.stores)][device][at] = problem.size(family) / scale
        programme.row(terms, count, count * len(here) if several else count)
    for group, size in enumerate(sizes):
        low, high = problem.bounds(size)
        for device in problem.devices:
            programme.row(width[group, device], low[device], high[device])
        everything = {at: 1.0 for device in problem.devices for at in width[group, device]}
        programme.row(everything, size, size)
    low, high = problem.total_bounds(family, sizes)
    total = {d: {at: 1.0 for group in range(len(sizes)) for at in width[group, d]} for d in problem.devices}
    for device, row in total.items():
        # Where layers force it, all layers together are less even than they might be.
        actual = len(after[device][family]) if after else low[device]
        programme.row(row, min(low[device], actual), max(high[device], actual))
    if integral:
        _whole_totals(programme, problem, family, total)


def _whole_totals(programme, problem, family, total) -> None:
    """That the units of a device, and of an island, are a whole number follows from the rest. But to decide about
    these first settles far more than to decide layer by layer, of which many are alike."""
    islands: dict[str, dict[int, float]] = defaultdict(dict)
    for device, row in total.items():
        islands[problem.islands[device]] |= row
    for name, row in (
        *((("of", d), row) for d, row in total.items()),
        *((("on", i), row) for i, row in islands.items()),
    ):
        whole = programme.var(("total", family, *name), integral=True)
        programme.row({**row, whole: -1.0}, 0.0, 0.0)


def _heads(programme, problem, wishes, copies, scale, integral) -> None:
    units, has_kv = problem.units, KV in problem.families
    classes: dict[tuple[tuple[str, ...], int], int] = defaultdict(int)
    for head, holders in _holding(problem, ATTENTION).items():
        classes[holders[:1], units.kv_head_of(head) if has_kv else 0] += 1
    group_size: dict[int, int] = defaultdict(int)
    for (_, group), count in classes.items():
        group_size[group] += count
    low, high = problem.bounds(problem.num_heads)
    width: dict[str, dict[int, float]] = {d: {} for d in problem.devices}
    on: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for (holders, group), count in classes.items():
        terms = {}
        for device in problem.devices:
            at = programme.var(("head", holders, group, device), integral=integral, upper=count)
            terms[at] = width[device][at] = on[group, device][at] = 1.0
            if device not in holders:
                wishes[(*holders, *problem.stores)][device][at] = problem.size(ATTENTION) / scale
        programme.row(terms, count, count)
    for device in problem.devices:
        programme.row(width[device], low[device], high[device])
    if has_kv:
        for (group, device), terms in on.items():
            if group not in problem.held[KV].get(device, ()):
                _kv_copy(programme, problem, group, device, terms, high, group_size, copies, integral)


def _kv_copy(programme, problem, group, device, terms, high, group_size, copies, integral) -> None:
    opened = programme.var(("kv", group, device), integral=integral, upper=1.0)
    most = min(group_size[group], high[device])
    programme.row({**terms, opened: -float(most)}, -np.inf, 0.0)
    for family in (KV, PLANE) if problem.plane_bytes else (KV,):
        sources = (*problem.holders(family, group), *problem.stores_of(family))
        if sources:
            copies.append((sources, (family, group), device, opened, problem.size(family)))


def _flows(programme, problem, wishes, copies, scale) -> None:
    network = problem.network
    makespan = programme.var("T")
    use: list[dict[int, float]] = [{makespan: -link.bytes_per_s / scale} for link in network.links]
    for sources, by_device in wishes.items():
        for index, flow in _commodity(programme, problem, sources, ("flow", sources), by_device).items():
            use[index][flow] = 1.0
    together: dict[tuple[tuple[str, int], int], dict[int, float]] = defaultdict(dict)
    for sources, what, device, needed, size in copies:
        wish = {device: {needed: size / scale}}
        for index, flow in _commodity(programme, problem, sources, ("copy", what, device), wish).items():
            carried = programme.var(("carried", what, index))
            programme.row({carried: 1.0, flow: -1.0}, 0.0, np.inf)
            together[what, index][flow] = -1.0
            use[index][carried] = 1.0
    group_size = problem.num_heads // max(1, problem.units.num_units.get(KV, 1))
    for ((family, number), index), flows in together.items():
        # Of a KV head no more copies are needed than it has q heads. (Else a link could carry a fraction, once, for
        # all the devices among which a fractional q head is divided.)
        most = len(flows) if family == REPLICATED else min(group_size, len(flows))
        carried = programme.var(("carried", (family, number), index))
        programme.row({carried: float(most), **flows}, 0.0, np.inf)
    for terms in use:
        programme.row(terms, -np.inf, 0.0)


def _commodity(programme, problem, sources, name, by_device) -> dict[int, int]:
    """Conservation at every place but the sources. Returns the flow variable of each link."""
    network, flows = problem.network, {}
    net: dict[str, dict[int, float]] = {place.name: {} for place in network.places}
    for index, link in enumerate(network.links):
        if network.by_name[link.dst].kind != "disk":
            flows[index] = programme.var((*name, index))
            net[link.dst][flows[index]] = 1.0
            net[link.src][flows[index]] = -1.0
    for place, terms in net.items():
        for at, num_bytes in by_device.get(place, {}).items():
            terms[at] = terms.get(at, 0.0) - num_bytes
        if terms and place not in sources:
            programme.row(terms, 0.0, np.inf)
    return flows
