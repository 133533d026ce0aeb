"""Planners that cut every tensor into contiguous intervals in rank order: `reload`, `greedy`, `cmm`.

With equal speeds rank r of N gets rows [r*L//N, (r+1)*L//N) of L: the true length, so that no tail is lost. With
given speeds, and for the experts of each layer, the widths are those of `layout.group_widths`, so that the experts
of all layers together are spread evenly too. When one device leaves, the borders of all intervals shift, which is
what makes these planners move more than was lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from anchortp.layout import ATTENTION, KV, group_widths
from anchortp.plan.assemble import Piece, assemble
from anchortp.plan.plan import PLANE, REPLICATED, Plan
from anchortp.plan.problem import Problem
from anchortp.plan.topology import Route, TopologyError


def reload(problem: Problem) -> Plan:
    """Restart and reload: every process is started anew and every device reads its whole shard from a store.

    Source: what serving engines do today; the baseline of the AnchorTP paper (arXiv 2511.11617). All KV is lost.
    """
    target = intervals(problem)
    pieces, replayed = _arrivals(problem, target, held={}, peers=False, planes=False)
    everyone = [_replicated(problem, device, peers=False) for device in problem.devices]
    return assemble(
        problem,
        policy="reload",
        kept={family: {} for family in problem.families},
        pieces=[*pieces, *(piece for piece in everyone if piece)],
        replayed=replayed,
        reasons=("every process starts anew: all weights are read again, all KV is replayed",),
        restart=True,
    )


def greedy(problem: Problem) -> Plan:
    """Keep the overlap of the old interval with the new one, read the rest from a store; no copies between devices.

    Source: the greedy baseline in the evaluation of the AnchorTP paper (arXiv 2511.11617).
    """
    return _keep_overlap(problem, "greedy", peers=False)


def cmm(problem: Problem) -> Plan:
    """Continuous Minimal Migration: for each new interval keep what the same device holds, copy from live owners
    what they hold, read what is left from a store. Cost order: keep < peer < store, whatever the links are.

    Source: AnchorTP (arXiv 2511.11617), its planner. It looks at neither reachability nor bandwidth: where two
    devices have no link of their own, the copy takes whatever way there is.
    """
    return _keep_overlap(problem, "cmm", peers=True)


def _keep_overlap(problem: Problem, policy: str, *, peers: bool) -> Plan:
    target = intervals(problem)
    pieces, replayed = _arrivals(problem, target, held=problem.held, peers=peers, planes=True)
    fresh = [_replicated(problem, device, peers=peers) for device in problem.fresh]
    kept = {
        family: {
            device: tuple(u for u in problem.slots[family].get(device, ()) if u in new)
            for device, new in target[family].items()
        }
        for family in problem.families
    }
    return assemble(
        problem,
        policy=policy,
        kept=kept,
        pieces=[*pieces, *(piece for piece in fresh if piece)],
        replayed=replayed,
        reasons=_reasons(problem, kept, pieces),
    )


Target = dict[str, dict[str, frozenset[int]]]  # family, device -> units


def intervals(problem: Problem) -> Target:
    """The new interval (experts: one per layer) of each device, and the KV heads that its q heads read."""
    target: Target = {}
    for family in problem.families:
        if family != KV:
            target[family] = {device: frozenset(u) for device, u in _cut(problem, family).items()}
    if KV in problem.families:
        target[KV] = {d: frozenset(problem.kv_heads(q)) for d, q in target[ATTENTION].items()}
    return target


def _cut(problem: Problem, family: str) -> dict[str, list[int]]:
    total, groups = problem.units.num_units[family], problem.units.num_groups(family)
    result: dict[str, list[int]] = {device: [] for device in problem.devices}
    start = 0
    for cut in _group_cuts(problem, total, groups):
        for device, width in cut.items():
            result[device].extend(range(start, start + width))
            start += width
    return result


def _group_cuts(problem: Problem, total: int, groups: int) -> list[dict[str, int]]:
    if problem.speeds or groups > 1:
        return group_widths(total, groups, problem.devices, problem.speeds)
    n = len(problem.devices)
    return [{d: (r + 1) * total // n - r * total // n for r, d in enumerate(problem.devices)}]


def _arrivals(
    problem: Problem,
    target: Target,
    *,
    held: Mapping[str, Mapping[str, Collection[int]]],
    peers: bool,
    planes: bool,
) -> tuple[list[Piece], list[int]]:
    """What each device lacks of its new interval, and where it comes from."""
    ways = _Ways(problem)
    pieces: list[Piece] = []
    replayed: list[int] = []
    for family, shards in target.items():
        owner = _owners(problem, family) if peers else {}
        for device, units in shards.items():
            new = sorted(units.difference(held.get(family, {}).get(device, ())))
            pieces += _from_owners(problem, family, device, new, owner, ways)
            if family == KV and problem.plane_bytes:
                for head in new:
                    piece = _plane(problem, device, head, owner, ways) if planes else None
                    pieces += [piece] if piece else []
                    replayed += [] if piece else [head]
    return pieces, replayed


def _owners(problem: Problem, family: str) -> dict[int, str]:
    """The first living holder of each unit, in rank order."""
    owner: dict[int, str] = {}
    for device in reversed(problem.alive):
        owner.update(dict.fromkeys(problem.slots[family].get(device, ()), device))
    return owner


def _from_owners(
    problem: Problem, family: str, device: str, new: list[int], owner: Mapping[int, str], ways: _Ways
) -> list[Piece]:
    size, pieces, begin = problem.size(family), [], 0
    for end in range(1, len(new) + 1):
        unit, count = new[begin], end - begin
        source = owner.get(unit)
        if end == len(new) or new[end] != unit + count or owner.get(new[end]) != source:
            place, route = ways.from_device(source, device) if source else ways.from_stores(device)
            pieces.append(Piece(device, family, unit, count, 0, count * size, place, route))
            begin = end
    return pieces


def _plane(problem: Problem, device: str, head: int, owner: Mapping[int, str], ways: _Ways) -> Piece | None:
    if head in owner:
        place, route = ways.from_device(owner[head], device)
    elif problem.planes_at:
        place, route = ways.nearest(problem.planes_at, device)
    else:
        return None
    return Piece(device, PLANE, head, 1, 0, problem.plane_bytes, place, route)


def _replicated(problem: Problem, device: str, *, peers: bool) -> Piece | None:
    if not problem.units.replicated_bytes:
        return None
    ways = _Ways(problem)
    place, route = ways.from_stores(device)
    if peers and problem.alive:
        place, route = ways.from_device(problem.alive[0], device)
    return Piece(device, REPLICATED, 0, 1, 0, problem.size(REPLICATED), place, route)


@dataclass(frozen=True, slots=True)
class _Ways:
    """One route each: the quickest when nothing else moves."""

    problem: Problem

    def from_device(self, source: str, device: str) -> tuple[str, Route]:
        return self.nearest((source,), device)

    def from_stores(self, device: str) -> tuple[str, Route]:
        return self.nearest(self.problem.stores, device)

    def nearest(self, places: tuple[str, ...], device: str) -> tuple[str, Route]:
        network = self.problem.network
        routes = [(place, route) for place in places if (route := network.route(place, device)) is not None]
        if not routes:
            raise TopologyError(f"no route leads from {', '.join(places)} to {device}; add a link.")
        return min(routes, key=lambda found: sum(network.seconds_per_byte[link] for link in found[1]))


def _reasons(
    problem: Problem, kept: Mapping[str, Mapping[str, tuple[int, ...]]], pieces: list[Piece]
) -> tuple[str, ...]:
    reasons = []
    for family in problem.families:
        stay = sum(map(len, kept[family].values()))
        kinds = {"device": 0, "store": 0}
        for piece in pieces:
            if piece.family == family:
                is_device = problem.topology.by_name[piece.source].kind == "device"
                kinds["device" if is_device else "store"] += piece.count
        reasons.append(
            f"{family}: {stay} unit(s) stay within the new intervals, {kinds['device']} copied from live owners, "
            f"{kinds['store']} read from a store"
        )
    return tuple(reasons)
