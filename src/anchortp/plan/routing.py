"""Which way the bytes go: the split over sources and routes that makes the fullest link least full. Exact.

Given who must receive how much of what, find flows that minimise T = max over links of load / bandwidth:

    minimise T   subject to   for each link l:                sum of flows over l / bandwidth_l <= T
                              for each wish (commodity, d):   sum of its flows                   = bytes
                              for each limited source:        sum of flows out of it            <= its bytes
              for each commodity's extra:     sum of its extra flows            = bytes,   into d <= cap of d

Columns are routes, of which there are far too many to list. So: (1) begin with one route per wish; (2) solve;
(3) the dual values are prices, one per link, that add up to 1: a cheaper route than those in use, found by
Dijkstra, becomes a new column; (4) repeat until the routes in use are the cheapest. Any prices, at any time, give
a bound from below (sum of bytes x cheapest price <= T), so the gap is known and the work stops when it is small.

The linear programme is solved by a revised simplex method with an explicit inverse (Dantzig; column generation:
Ford and Fulkerson 1958): a few dozen rows, some hundred pivots, each an elementwise numpy update. No BLAS call is
on the path, so the result is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anchortp.plan.topology import Route, Topology, TopologyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

GAP = 2e-4  # relative distance to the optimum at which it is good enough
_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Commodity:
    """Bytes that are interchangeable: `wishes` per device, served by any of `sources` (a limit in bytes, or None).
    `extra` bytes more go to any of the devices in `caps`, to each at most so many; and all commodities of one
    `family` together at most as many extra bytes to a device as `route_all` is told."""

    name: str
    sources: tuple[tuple[str, int | None], ...]
    wishes: tuple[tuple[str, int], ...]
    extra: int = 0
    caps: tuple[tuple[str, int], ...] = ()
    family: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Bytes of a commodity that go from `source` to `device` along `route` (empty if they are there already)."""

    commodity: str
    source: str
    device: str
    route: Route
    num_bytes: float
    is_extra: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """`prices` per link, in seconds per byte, of which `bound_s` is the sum over all bytes of the cheapest way."""

    portions: tuple[Portion, ...]
    seconds: float
    bound_s: float
    prices: tuple[float, ...]


Room = Mapping[tuple[str, str], int]  # (family, device) -> extra bytes


def route_all(
    network: Topology,
    commodities: Sequence[Commodity],
    *,
    gap: float = GAP,
    room: Room | None = None,
    give_up_s: float = math.inf,
) -> Routing:
    """The best split over all sources and routes, to within `gap`; or, as soon as it is clear that none takes less
    than `give_up_s`, whatever was found so far. Raises TopologyError for a wish that no unlimited source of its
    commodity can reach, NoRoom if the first try to place all extra bytes within `room` fails."""
    try:
        start = _first_columns(network, commodities, dict(room or {}), nearest=True)
    except NoRoom:
        start = _first_columns(network, commodities, dict(room or {}), nearest=False)
    loads = [0.0] * len(network.links)
    for column, num_bytes in start:
        for link in column.route:
            loads[link] += num_bytes
    times = [num_bytes * s for num_bytes, s in zip(loads, network.seconds_per_byte, strict=True)]
    seconds = max(times, default=0.0)
    if seconds <= 0.0:
        return Routing(portions=(), seconds=0.0, bound_s=0.0, prices=network.seconds_per_byte)
    # Where all bytes must pass one link, as they do on a shared bus, nothing is to be gained, and no numpy is loaded.
    full = max((x for x, t in enumerate(times) if t > seconds * (1 - _TINY)), key=loads.__getitem__)
    prices = tuple(s if x == full else 0.0 for x, s in enumerate(network.seconds_per_byte))
    bound_s = floor(network, commodities, prices)
    if seconds <= bound_s * (1 + gap) or bound_s >= give_up_s:
        portions = tuple(column.portion(num_bytes) for column, num_bytes in start)
        return Routing(portions=portions, seconds=seconds, bound_s=bound_s, prices=prices)
    return _Simplex(network, commodities, start, seconds, room or {}).solve(gap, give_up_s / seconds)


def floor(network: Topology, commodities: Sequence[Commodity], prices: Sequence[float]) -> float:
    """Seconds below which no split can come, by these prices (as those of a `Routing`), limits of sources aside."""
    far: dict[tuple[str, ...], Mapping[str, float]] = {}
    paid = 0.0
    for commodity in commodities:
        sources = tuple(source for source, _ in commodity.sources)
        if sources not in far:
            far[sources], _ = network.cheapest(dict.fromkeys(sources, 0.0), prices)
        paid += _least(commodity, far[sources])
    return paid


class NoRoom(Exception):
    """The caps leave no room for the extra bytes, as far as was looked."""


@dataclass(frozen=True, slots=True)
class _Column:
    commodity: str
    source: str
    device: str
    route: Route
    limit: str  # "wish": a fixed amount. An extra one, and in the first basis what stops it: "cap", "room", "extra"

    @property
    def is_extra(self) -> bool:
        return self.limit != "wish"

    def portion(self, num_bytes: float) -> Portion:
        return Portion(
            commodity=self.commodity,
            source=self.source,
            device=self.device,
            route=self.route,
            num_bytes=num_bytes,
            is_extra=self.is_extra,
        )


def _first_columns(
    network: Topology, commodities: Sequence[Commodity], room: dict[tuple[str, str], int], *, nearest: bool
) -> list[tuple[_Column, float]]:
    """Every wish from the nearest unlimited source, the quickest way; extras to the nearest devices first, or to those
    that have most room left (which finds a way to place them all if the commodities are alike: Gale and Ryser 1957).
    """
    result = []
    for commodity in commodities:
        free = tuple(name for name, limit in commodity.sources if limit is None)
        far, last = network.quickest(free)
        order = far if nearest else {device: -room.get((commodity.family, device), 0) for device, _ in commodity.caps}
        for device, num_bytes, limit in _amounts(commodity, order, room):
            if device not in far:
                raise TopologyError(
                    f"{device} must receive {commodity.name}, but no route leads there from "
                    f"{', '.join(free) or 'any source'}; add a link."
                )
            route = network.path(last, device)
            source = network.links[route[0]].src if route else device
            result.append((_Column(commodity.name, source, device, route, limit), float(num_bytes)))
    return result


def _amounts(
    commodity: Commodity, order: Mapping[str, float], room: dict[tuple[str, str], int]
) -> Iterator[tuple[str, int, str]]:
    """(device, bytes, what limits them), the extra bytes filled in from the least in `order` on. Uses up `room`."""
    for device, num_bytes in commodity.wishes:
        if num_bytes > 0:
            yield device, num_bytes, "wish"
    left = commodity.extra
    for device, cap in sorted(commodity.caps, key=lambda pair: order.get(pair[0], math.inf)):
        key = (commodity.family, device)
        most = min(cap, room.get(key, cap))
        amount = min(left, most)
        if amount > 0:
            yield device, amount, "extra" if amount == left else "cap" if amount == cap else "room"
            left -= amount
            if key in room:
                room[key] -= amount
    if left > 0:
        raise NoRoom(f"{commodity.name}: {left} bytes more than there is room for")


def _least(commodity: Commodity, far: Mapping[str, float], dearer: Mapping[str, float] | None = None) -> float:
    """What the commodity pays at the least, if a byte to a device costs `far`, and an extra one so much more."""
    paid = sum(far[device] * num_bytes for device, num_bytes in commodity.wishes)
    if commodity.extra > 0:
        price = {device: far[device] + (dearer or {}).get(device, 0.0) for device, _ in commodity.caps}
        extra = replace(commodity, wishes=())
        paid += sum(price[device] * num_bytes for device, num_bytes, _ in _amounts(extra, price, {}))
    return paid


class _Simplex:
    """Rows: one per link, one per wish, and for commodities that have them one per limited source, one for the extra
    and one per cap. Amounts are shares of all bytes, times multiples of the first solution's: all are near 1."""

    def __init__(
        self,
        network: Topology,
        commodities: Sequence[Commodity],
        start: Sequence[tuple[_Column, float]],
        seconds: float,
        room: Room,
    ):
        import numpy as np  # here, because what must start fast imports this package

        self.np = np
        self.network, self.commodities, self.seconds = network, commodities, seconds
        self.total = sum(num_bytes for _, num_bytes in start)
        self.num_links = len(network.links)
        self.weight = [self.total * s / seconds for s in network.seconds_per_byte]
        # A grain on every right-hand side keeps ties apart, so that no pivot is without progress.
        rhs = [1e-7 * (1 + (7 * i) % 97) for i in range(self.num_links)]
        self.row: dict[tuple[str, ...], int] = {}
        self.equalities: set[int] = set()
        self.room = room
        self.family = {c.name: c.family for c in commodities}
        for key, num_bytes, is_equality in _rows(commodities, room):
            self.row[key] = len(rhs)
            if is_equality:
                self.equalities.add(len(rhs))
            rhs.append(num_bytes / self.total + (0.0 if is_equality else 1e-7))
        self.inverse: NDArray[Any] = np.eye(len(rhs))
        self.values: NDArray[Any] = np.array(rhs)
        self.columns: list[_Column | None] = [None] * len(rhs)  # None: slack, or T
        self._enter_first(start)

    def _enter_first(self, start: Sequence[tuple[_Column, float]]) -> None:
        """The first basis: a column per wish; of the extras those that fill a cap, and one that takes the rest; T in
        the row of the fullest link; slacks elsewhere."""
        for column, _ in start:
            key: tuple[str, ...] = (column.limit, column.commodity, column.device)
            if column.limit == "extra":
                key = key[:2]
            elif column.limit == "room":
                key = ("room", self.family[column.commodity], column.device)
            self._enter(self.row[key], self._in_basis(column), column)
        self.t_row = int(self.values[: self.num_links].argmin())  # most below 0 while T is 0
        makespan = self.np.zeros(len(self.values))
        makespan[: self.num_links] = -1.0
        self._enter(self.t_row, makespan, None)

    def solve(self, gap: float, give_up: float) -> Routing:
        best_bound, best_prices = 0.0, None
        pivots_left = 40 * len(self.values)
        while True:
            bound, prices, found = self._price()
            if bound > best_bound:
                best_bound, best_prices = bound, prices
            makespan = self.values[self.t_row]
            if makespan <= best_bound * (1 + gap) or best_bound >= give_up or pivots_left <= 0:
                break
            pivots = self._improve(found)
            if not pivots:
                break
            pivots_left -= pivots
        assert best_prices is not None
        return self._result(best_bound, best_prices)

    # ------------------------------------------------------------------------------------------ pricing

    def _price(self) -> tuple[float, list[float], list[_Column]]:
        """The bound that the present prices give, the prices (per link and share), and cheaper columns."""
        duals = self.inverse[self.t_row].tolist()
        prices = [max(0.0, -y) for y in duals[: self.num_links]]
        norm = sum(prices)
        toll = [p * w / norm + _TINY * w for p, w in zip(prices, self.weight, strict=True)]
        bound, found = -_TINY, []  # what the tolls add
        trees = {}
        for commodity in self.commodities:
            first = {s: 0.0 for s, limit in commodity.sources if limit is None}
            for s, limit in commodity.sources:
                if limit is not None:
                    first[s] = max(0.0, -duals[self.row["limit", commodity.name, s]]) / norm
                    bound -= first[s] * limit / self.total
            key = tuple(first.items())
            if key not in trees:
                trees[key] = self.network.cheapest(first, toll)
            far, last = trees[key]
            bound += _least(commodity, far, self._dearer(commodity, duals, norm)) / self.total
            for device, limit, worth in self._worth(commodity, duals):
                if far[device] * norm < worth - 1e-7:
                    route = self.network.path(last, device)
                    source = self.network.links[route[0]].src if route else device
                    found.append(_Column(commodity.name, source, device, route, limit))
        for key, num_bytes in self.room.items():
            bound -= max(0.0, -duals[self.row["room", *key]]) / norm * num_bytes / self.total
        return bound, [p / norm for p in prices], found

    def _dearer(self, commodity: Commodity, duals: list[float], norm: float) -> dict[str, float]:
        """What room in the commodity's family costs, per device."""
        rows = {device: self.row.get(("room", commodity.family, device)) for device, _ in commodity.caps}
        return {device: max(0.0, -duals[row]) / norm for device, row in rows.items() if row is not None}

    def _worth(self, commodity: Commodity, duals: list[float]) -> Iterator[tuple[str, str, float]]:
        """(device, kind of column, what a byte there is worth by the duals)."""
        for device, num_bytes in commodity.wishes:
            if num_bytes > 0:
                yield device, "wish", duals[self.row["wish", commodity.name, device]]
        if commodity.extra > 0:
            extra = duals[self.row["extra", commodity.name]]
            for device, _ in commodity.caps:
                room = self.row.get(("room", commodity.family, device))
                worth = extra + duals[self.row["cap", commodity.name, device]]
                yield device, "extra", worth if room is None else worth + duals[room]

    # ------------------------------------------------------------------------------------------ pivoting

    def _improve(self, found: list[_Column]) -> int:
        """Brings in columns from `found` (and slacks) while any lowers T. Returns the number of pivots."""
        done, size = 0, len(self.values)
        entries = [self._entries(column) for column in found]
        slacks = [row for row in range(size) if row not in self.equalities]
        while done < 4 * size:
            duals = self.inverse[self.t_row].tolist()
            gains = [sum(duals[row] * value for row, value in column) for column in entries]
            slack = max(slacks, key=duals.__getitem__)
            best = max(range(len(found)), key=gains.__getitem__, default=None)
            if best is not None and gains[best] > max(1e-8, duals[slack]):
                entering, column = found[best], self._in_basis(found[best])
            elif duals[slack] > 1e-8:
                entering, column = None, self.inverse[:, slack].copy()
            else:
                break
            row = self._leaving(column)
            if row is None:
                break
            self._enter(row, column, entering)
            done += 1
        return done

    def _entries(self, column: _Column) -> list[tuple[int, float]]:
        """The column's coefficients, by row."""
        name, device = column.commodity, column.device
        entries = [(link, self.weight[link]) for link in column.route]
        if column.is_extra:
            entries += [(self.row["extra", name], 1.0), (self.row["cap", name, device], 1.0)]
            if (room := self.row.get(("room", self.family[name], device))) is not None:
                entries.append((room, 1.0))
        else:
            entries.append((self.row["wish", name, device], 1.0))
        limit = self.row.get(("limit", name, column.source))
        return entries if limit is None else [*entries, (limit, 1.0)]

    def _in_basis(self, column: _Column) -> NDArray[Any]:
        """The column in terms of the basis."""
        result = self.np.zeros(len(self.values))
        for row, value in self._entries(column):
            result += self.inverse[:, row] * value
        return result

    def _leaving(self, column: NDArray[Any]) -> int | None:
        """The row whose variable reaches 0 first when the column enters. T stays: it is what is minimised."""
        np = self.np
        positive = column > 1e-9
        positive[self.t_row] = False
        if not positive.any():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(positive, np.maximum(self.values, 0.0) / column, np.inf)
        return int(ratios.argmin())

    def _enter(self, row: int, column: NDArray[Any], entering: _Column | None) -> None:
        step = float(self.values[row] / column[row])
        self.values -= column * step
        self.values[row] = step
        pivot = self.inverse[row] / column[row]
        touched = column.nonzero()[0]
        self.inverse[touched] -= self.np.multiply.outer(column[touched], pivot)
        self.inverse[row] = pivot
        self.columns[row] = entering

    def _result(self, bound: float, prices: list[float]) -> Routing:
        portions = []
        for value, column in zip(self.values.tolist(), self.columns, strict=True):
            if column is not None and value > 1e-9:
                portions.append(column.portion(value * self.total))
        portions.sort(key=lambda p: (p.commodity, p.device, p.source, p.route))
        scale = self.seconds / self.total
        return Routing(
            portions=tuple(portions),
            seconds=float(self.values[self.t_row]) * self.seconds,
            bound_s=bound * self.seconds,
            prices=tuple(p * w * scale for p, w in zip(prices, self.weight, strict=True)),
        )


def _rows(commodities: Sequence[Commodity], room: Room) -> Iterator[tuple[tuple[str, ...], int, bool]]:
    """(name of the row, bytes on its right-hand side, is it an equality)."""
    for key, num_bytes in room.items():
        yield ("room", *key), num_bytes, False
    for c in commodities:
        for device, num_bytes in c.wishes:
            if num_bytes > 0:
                yield ("wish", c.name, device), num_bytes, True
        if c.extra > 0:
            yield ("extra", c.name), c.extra, True
            for device, cap in c.caps:
                yield ("cap", c.name, device), cap, False
        for source, limit in c.sources:
            if limit is not None:
                yield ("limit", c.name, source), limit, False
