"""How long a plan takes: links as fluids. Deterministic, and exact in its own model.

All bytes that go the same way (source, route, destination) in one stage are one flow. Transfers are cut into
pieces far smaller than a flow and pipelined, so a flow passes all links of its route at once, at one rate; a link
carries at most its bandwidth, over all flows. Each flow is paced in proportion to its bytes (weighted max-min
fairness): raise all rates together; when a link is full, the flows through it keep theirs, the rest go on rising.

Then the flows through the fullest link all end after `bytes on that link / its bandwidth`, and all others no
later. So a stage takes `max over links of bytes / bandwidth` (plus a latency once per flow), and no schedule of
the same flows can take less. That is what makes bounds and proofs simple, and it can be executed: a copy engine
that keeps to the rates reaches it. Relocations within a device use no link and count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from anchortp.plan.plan import FromHost, FromPeer, Move, Plan
from anchortp.plan.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """All bytes of one stage from `source` (a store or a device) to `device` along `route` (names of links)."""

    source: str
    device: str
    route: tuple[str, ...]
    num_bytes: int
    stage: int
    start_s: float
    stop_s: float
    bytes_per_s: float
    bottleneck: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """What one flow does to one link: from `start_s` to `stop_s` it takes `share` of the bandwidth."""

    link: str
    start_s: float
    stop_s: float
    share: float
    source: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Critical:
    """The link that a stage waits for."""

    stage: int
    link: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What `predict` foresees. `ready_s`: per device of the new group, when its last byte is there."""

    makespan_s: float
    ready_s: dict[str, float]
    flows: tuple[Flow, ...]
    link_bytes: dict[str, int]
    critical: tuple[Critical, ...]
    topology: Topology

    @property
    def busiest(self) -> Critical | None:
        """The link with the longest wait of all stages; None if nothing moves."""
        return max(self.critical, key=lambda c: c.seconds, default=None)

    def busy(self) -> tuple[Busy, ...]:
        """One bar per flow and link, for a Gantt chart: stacked, the shares on a link never exceed 1."""
        return tuple(
            Busy(
                link=link,
                start_s=flow.start_s,
                stop_s=flow.stop_s,
                share=flow.bytes_per_s / self.topology.link(link).bytes_per_s,
                source=flow.source,
                device=flow.device,
            )
            for flow in self.flows
            for link in flow.route
        )


def predict(plan: Plan, topology: Topology) -> Timeline:
    """Plays the plan on the links of `topology`. All moves must carry their routes."""
    stages: dict[int, list[Move]] = {}
    for move in plan.moves:
        if not move.is_relocation:
            assert move.route, f"{move} has no route; only plans made with a topology can be timed"
            stages.setdefault(move.stage, []).append(move)
    start_s, flows_done, critical = 0.0, [], []
    for stage in sorted(stages):
        loads: dict[_Key, int] = {}
        for move in stages[stage]:
            key = (_source(move), move.device, move.route)
            loads[key] = loads.get(key, 0) + move.num_bytes
        flows = _after_feeders(_run(stage, loads, topology, start_s), stages[stage])
        flows_done += flows
        critical.append(_critical(stage, flows, topology))
        start_s = max(flow.stop_s for flow in flows)
    ready = dict.fromkeys(plan.after.devices, 0.0)
    for flow in flows_done:
        if flow.device in ready:
            ready[flow.device] = max(ready[flow.device], flow.stop_s)
    return Timeline(
        makespan_s=start_s,
        ready_s=ready,
        flows=tuple(flows_done),
        link_bytes=plan.bytes_by_link(),
        critical=tuple(critical),
        topology=topology,
    )


def _source(move: Move) -> str:
    return move.source.place if isinstance(move.source, FromHost) else move.source.device


_Key = tuple[str, str, tuple[str, ...]]  # source, device, route


def _run(stage: int, loads: dict[_Key, int], topology: Topology, start_s: float) -> list[Flow]:
    """Weighted max-min rates, link by link in the order in which they fill up."""
    on_link: dict[str, list[_Key]] = {}
    for key in loads:
        for link in key[2]:
            on_link.setdefault(link, []).append(key)
    room = {link: topology.link(link).bytes_per_s for link in on_link}
    rising = {link: float(sum(loads[key] for key in keys)) for link, keys in on_link.items()}
    pace: dict[_Key, tuple[float, str]] = {}
    while len(pace) < len(loads):
        full = min((link for link in room if rising[link] > 0), key=lambda link: room[link] / rising[link])
        level = room[full] / rising[full]
        for key in on_link[full]:
            if key not in pace:
                pace[key] = (level, full)
                for link in key[2]:
                    room[link] = max(0.0, room[link] - level * loads[key])
                    rising[link] -= loads[key]
        rising[full] = 0.0
    result = []
    for key, num_bytes in loads.items():
        level, full = pace[key]
        latency_s = sum(topology.link(link).latency_s for link in key[2])
        result.append(
            Flow(
                source=key[0],
                device=key[1],
                route=key[2],
                num_bytes=num_bytes,
                stage=stage,
                start_s=start_s,
                stop_s=start_s + latency_s + 1.0 / level,
                bytes_per_s=level * num_bytes,
                bottleneck=full,
            )
        )
    return result


def _after_feeders(flows: list[Flow], moves: list[Move]) -> list[Flow]:
    """What a device forwards cannot be all there before the device has it: such flows go at the pace of what feeds
    them. That makes them longer, never the stage: what feeds them is a flow of the same stage."""
    arriving: dict[tuple[str, str, int], set[_Key]] = {}
    for move in moves:
        for unit in range(move.unit, move.unit + move.num_units):
            key = (_source(move), move.device, move.route)
            arriving.setdefault((move.device, move.family, unit), set()).add(key)
    feeders: dict[_Key, set[_Key]] = {}
    for move in moves:
        if isinstance(move.source, FromPeer):
            for unit in range(move.unit, move.unit + move.num_units):
                found = arriving.get((move.source.device, move.family, unit))
                if found:
                    feeders.setdefault((_source(move), move.device, move.route), set()).update(found)
    flow_of = {(flow.source, flow.device, flow.route): flow for flow in flows}
    for _ in range(len(feeders)):  # chains are no longer than that
        for key, found in feeders.items():
            stop_s = max(flow_of[feeder].stop_s for feeder in found)
            flow = flow_of[key]
            if stop_s > flow.stop_s:
                pace = flow.num_bytes / (stop_s - flow.start_s)
                flow_of[key] = replace(flow, stop_s=stop_s, bytes_per_s=pace)
    return list(flow_of.values())


def _critical(stage: int, flows: list[Flow], topology: Topology) -> Critical:
    last = max(flows, key=lambda flow: flow.stop_s)
    num_bytes = sum(flow.num_bytes for flow in flows if last.bottleneck in flow.route)
    seconds = num_bytes / topology.link(last.bottleneck).bytes_per_s
    return Critical(stage=stage, link=last.bottleneck, num_bytes=num_bytes, seconds=seconds)
