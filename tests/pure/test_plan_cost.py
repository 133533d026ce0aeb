"""The model of time, against figures by hand and against what it promises of every plan."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from anchortp.layout import initial_layout
from anchortp.plan import POLICIES, FromHost, FromPeer, Link, Move, Place, Plan, Topology, predict
from bench.planner_problems import random_problem, random_shape

SHAPE = random_shape(random.Random(1))
NAMES = ("a", "b", "c")


def box(**speeds: float) -> Topology:
    """A host and three devices; links by name, such as `host_a=2`, in bytes per second."""
    places = [Place(name="host", kind="host"), *(Place(name=name, kind="device") for name in NAMES)]
    links = []
    for name, speed in speeds.items():
        src, dst = name.split("_")
        links.append(Link(src=src, dst=dst, bytes_per_s=float(speed)))
    return Topology(name="box", places=tuple(places), links=tuple(links), weights_at=("host",))


def move(device: str, num_bytes: int, *route: str, **more) -> Move:
    src = route[0].split(">")[0]
    source = FromHost(place="host") if src == "host" else FromPeer(device=src, slot=more.pop("source_slot", 0))
    return Move(device=device, family="mlp", source=source, num_bytes=num_bytes, route=route, **more)


def plan_of(*moves: Move) -> Plan:
    layout = initial_layout(SHAPE, NAMES)
    return Plan(before=layout, after=layout, moves=moves, lost_bytes=0)


def test_nothing_takes_no_time():
    timeline = predict(plan_of(), box(host_a=1, host_b=1, host_c=1))
    assert timeline.makespan_s == 0.0 and timeline.busiest is None and timeline.busy() == ()


def test_a_shared_link_is_the_one_that_is_waited_for():
    topology = box(host_a=10, a_b=4, a_c=100)
    timeline = predict(
        plan_of(
            move("a", 20, "host>a", unit=0, slot=0),
            move("b", 10, "host>a", "a>b", unit=1, slot=0),
            move("c", 10, "host>a", "a>c", unit=2, slot=0),
        ),
        topology,
    )
    assert timeline.makespan_s == pytest.approx(4.0)  # 40 bytes at 10 bytes/s
    assert timeline.busiest.link == "host>a" and timeline.busiest.num_bytes == 40
    assert timeline.link_bytes == {"host>a": 40, "a>b": 10, "a>c": 10}
    assert timeline.ready_s == {name: pytest.approx(4.0) for name in NAMES}


def test_who_is_not_held_up_is_ready_sooner():
    topology = box(host_a=1, host_b=10, host_c=10)
    moves = [move("a", 6, "host>a", unit=0, slot=0), move("b", 20, "host>b", unit=1, slot=0)]
    timeline = predict(plan_of(*moves), topology)
    assert timeline.ready_s == {"a": pytest.approx(6.0), "b": pytest.approx(2.0), "c": 0.0}


def test_stages_follow_each_other_and_relocations_cost_nothing():
    topology = box(host_a=1, host_b=1, host_c=1)
    relocation = Move(
        device="c", family="mlp", unit=3, slot=0, source=FromPeer(device="c", slot=9), num_bytes=50, stage=2
    )
    moves = [move("a", 3, "host>a", unit=0, slot=0), move("b", 4, "host>b", unit=1, slot=0, stage=1), relocation]
    timeline = predict(plan_of(*moves), topology)
    assert timeline.makespan_s == pytest.approx(7.0)
    assert [critical.link for critical in timeline.critical] == ["host>a", "host>b"]
    assert timeline.flows[1].start_s == pytest.approx(3.0)


def test_what_is_forwarded_is_not_there_before_it_came():
    topology = box(host_a=1, a_b=100, host_c=1)
    moves = [move("a", 8, "host>a", unit=5, slot=2), move("b", 8, "a>b", unit=5, slot=0, source_slot=2)]
    timeline = predict(plan_of(*moves), topology)
    assert timeline.ready_s["b"] == pytest.approx(8.0) == timeline.makespan_s


def test_latency_counts_once_per_flow():
    topology = Topology(
        name="far",
        places=(Place(name="host", kind="host"), *(Place(name=name, kind="device") for name in NAMES)),
        links=tuple(Link(src="host", dst=name, bytes_per_s=1.0, latency_s=0.5) for name in NAMES),
        weights_at=("host",),
    )
    moves = [move("a", 2, "host>a", unit=unit, slot=unit) for unit in range(3)]
    assert predict(plan_of(*moves), topology).makespan_s == pytest.approx(6.5)


@pytest.mark.parametrize("seed", range(12))
def test_of_every_plan(seed):
    """No link is ever over its bandwidth, every flow ends with its bytes, and the time is that of the fullest link."""
    problem = random_problem(random.Random(900 + seed))
    for policy in POLICIES.values():
        plan = policy(problem)
        timeline = predict(plan, problem.topology)
        for flow in timeline.flows:
            latency_s = sum(problem.topology.link(link).latency_s for link in flow.route)
            carried = flow.bytes_per_s * (flow.stop_s - flow.start_s - latency_s)
            assert carried == pytest.approx(flow.num_bytes)
        edges = defaultdict(list)
        for bar in timeline.busy():
            edges[bar.link] += [(bar.start_s, bar.share), (bar.stop_s, -bar.share)]
        for changes in edges.values():
            level = 0.0
            for _, change in sorted(changes):
                level += change
                assert level <= 1 + 1e-9
        expected = 0.0
        for stage in range(plan.num_stages):
            load: dict[str, int] = defaultdict(int)
            for step in plan.moves:
                if step.stage == stage:
                    for link in step.route:
                        load[link] += step.num_bytes
            expected += max((n / problem.topology.link(x).bytes_per_s for x, n in load.items()), default=0.0)
        assert timeline.makespan_s == pytest.approx(expected)
        assert timeline.link_bytes == plan.bytes_by_link()
