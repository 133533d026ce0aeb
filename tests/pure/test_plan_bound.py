"""How good plans are: the programme inside the planner and its plans against HiGHS, which was written separately."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from anchortp.layout import KV, initial_layout
from anchortp.plan import POLICIES, SHAPES, Problem, TopologyError, lower_bound, makespan, predict, preset, reference
from anchortp.plan.bound import transport
from anchortp.plan.routing import Commodity, NoRoom, Routing, route_all
from anchortp.plan.topology import Topology, cluster
from bench.planner_problems import KINDS, random_problem, random_topology
from bench.planner_reference import Unsolved, lp_bound

GPUS = tuple(f"gpu:{i}" for i in range(8))


# --------------------------------------------------------------------------------------------- the programme inside


def random_commodities(rng: random.Random, topology: Topology) -> tuple[list[Commodity], dict]:
    """Fixed wishes, limited sources, and extras with caps and shared room."""
    devices, commodities = list(topology.devices), []
    for number in range(rng.randint(1, 4)):
        givers = rng.sample(devices, rng.randint(0, len(devices) - 1))
        takers = [device for device in devices if device not in givers]
        sources = [(device, rng.choice([None, rng.randint(1, 10**9)])) for device in givers]
        sources += [(store, None) for store in topology.weights_at]
        caps = {device: rng.randint(1, 10**9) for device in devices if rng.random() < 0.7}
        wishes = tuple((device, rng.randint(1, 10**9)) for device in takers)
        extra = rng.randint(0, sum(caps.values()) // 2) if caps else 0
        commodities.append(
            Commodity(
                name=f"c{number}",
                sources=tuple(sources),
                wishes=wishes,
                extra=extra,
                caps=tuple(caps.items()),
                family="f",
            )
        )
    room = {("f", device): rng.randint(10**9, 3 * 10**9) for device in devices if rng.random() < 0.3}
    return commodities, room


def best_by_highs(topology: Topology, commodities: list[Commodity], room: dict) -> float:
    """The same programme over arcs: one flow per commodity and link. In GB, or HiGHS takes prices for zeros."""
    places = [place.name for place in topology.places]
    links = topology.links
    columns: dict[tuple, int] = defaultdict(lambda: len(columns))
    makespan_at = columns["T"]
    equal, at_most = [], []  # (row, right-hand side)
    use = [{makespan_at: -link.bytes_per_s / 1e9} for link in links]
    filled: dict[tuple, dict] = defaultdict(dict)
    for c in commodities:
        net: dict[str, dict[int, float]] = {name: {} for name in places}
        for i, link in enumerate(links):
            if topology.by_name[link.dst].kind != "disk":
                flow = columns[c.name, "flow", i]
                use[i][flow] = 1.0
                net[link.dst][flow], net[link.src][flow] = 1.0, -1.0
        for name, limit in c.sources:
            net[name][columns[c.name, "out", name]] = 1.0
            if limit is not None:
                at_most.append(({columns[c.name, "out", name]: 1.0}, limit / 1e9))
        for name, cap in c.caps if c.extra else ():
            extra = columns[c.name, "extra", name]
            net[name][extra] = -1.0
            filled[c.family, name][extra] = 1.0
            at_most.append(({extra: 1.0}, cap / 1e9))
        if c.extra:
            equal.append(({columns[c.name, "extra", name]: 1.0 for name, _ in c.caps}, c.extra / 1e9))
        for name in places:
            equal.append((net[name], dict(c.wishes).get(name, 0) / 1e9))
    at_most += [(filled[key], most / 1e9) for key, most in room.items() if filled[key]]
    at_most += [(row, 0) for row in use]

    def dense(rows):
        matrix = np.zeros((len(rows), len(columns)))
        for at, (row, _) in enumerate(rows):
            for column, value in row.items():
                matrix[at, column] = value
        return matrix, [value for _, value in rows]

    a_ub, b_ub = dense(at_most)
    a_eq, b_eq = dense(equal)
    cost = np.zeros(len(columns))
    cost[makespan_at] = 1.0
    found = linprog(cost, a_ub, b_ub, a_eq, b_eq, method="highs")
    assert found.status == 0, found.message
    return found.fun


def check_routing(topology: Topology, commodities: list[Commodity], room: dict, routing: Routing) -> None:
    """Every wish, limit and cap is kept, routes are routes, and the time is that of the fullest link."""
    total: dict[tuple, float] = defaultdict(float)
    load = [0.0] * len(topology.links)
    for portion in routing.portions:
        at = portion.source
        for link in portion.route:
            assert topology.links[link].src == at
            at = topology.links[link].dst
            load[link] += portion.num_bytes
        assert at == portion.device
        kind = "extra" if portion.is_extra else "wish"
        total[portion.commodity, kind, portion.device] += portion.num_bytes
        total[portion.commodity, "out", portion.source] += portion.num_bytes
        total[portion.commodity, kind] += portion.num_bytes
        if portion.is_extra:
            total["room", portion.device] += portion.num_bytes
    near = {"rel": 1e-4, "abs": 1e5}
    for c in commodities:
        for device, wish in c.wishes:
            assert total[c.name, "wish", device] == pytest.approx(wish, **near)
        assert total[c.name, "extra"] == pytest.approx(c.extra, **near)
        for name, limit in [*c.caps, *c.sources]:
            kind = "extra" if (name, limit) in c.caps else "out"
            assert limit is None or total[c.name, kind, name] <= limit * (1 + 1e-4) + 1e5
    for (_, device), most in room.items():
        assert total["room", device] <= most * (1 + 1e-4) + 1e5
    seconds = max(n / link.bytes_per_s for n, link in zip(load, topology.links, strict=True))
    assert seconds == pytest.approx(routing.seconds, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_the_programme_is_solved_as_highs_solves_it(seed):
    rng = random.Random(seed)
    topology = random_topology(rng, rng.randint(2, 7))
    commodities, room = random_commodities(rng, topology)
    try:
        routing = route_all(topology, commodities, room=room)
    except NoRoom:
        room = {}
        routing = route_all(topology, commodities)
    check_routing(topology, commodities, room, routing)
    best = best_by_highs(topology, commodities, room)
    assert best * (1 - 1e-4) - 1e-9 <= routing.seconds <= best * (1 + 5e-4) + 1e-9
    assert routing.bound_s <= best * (1 + 1e-4) + 1e-9
    assert sum(p * x.bytes_per_s for p, x in zip(routing.prices, topology.links, strict=True)) <= 1 + 1e-6 or best == 0


def test_a_search_that_cannot_win_is_given_up():
    topology = preset("mi210-2x4")
    wishes = tuple((device, 10**9 + i * 10**8) for i, device in enumerate(topology.devices))
    commodity = Commodity(name="c", sources=(("host", None),), wishes=wishes)
    best = route_all(topology, [commodity])
    given_up = route_all(topology, [commodity], give_up_s=best.seconds * 0.9)
    assert given_up.seconds >= best.seconds and given_up.bound_s >= best.seconds * 0.9


def test_what_cannot_be_reached_is_named():
    topology = preset("pcie-4")
    commodity = Commodity(name="kv", sources=(("gpu:0", 5),), wishes=(("gpu:1", 5),))
    with pytest.raises(TopologyError, match="gpu:1 must receive kv, but no route leads there from any source"):
        route_all(topology, [commodity])
    with pytest.raises(NoRoom, match="3 bytes more"):
        full = Commodity(name="c", sources=(("host", None),), wishes=(), extra=8, caps=(("gpu:0", 5),))
        route_all(topology, [full])


@pytest.mark.parametrize("seed", range(40))
def test_transport_against_highs(seed):
    rng = random.Random(seed)
    devices = [f"d{i}" for i in range(rng.randint(1, 5))]
    supply = {f"k{i}": rng.randint(0, 20) for i in range(rng.randint(1, 5))}
    total = sum(supply.values())
    low = {d: rng.randint(0, total // len(devices)) for d in devices}
    high = {d: rng.randint(-(-total // len(devices)), total) for d in devices}
    cost = {(k, d): rng.choice([0.0, rng.random()]) for k in supply for d in devices}
    flow, paid = transport(supply, low, high, cost)
    for key, amount in supply.items():
        assert sum(flow.get((key, d), 0) for d in devices) == amount
    for d in devices:
        assert low[d] <= sum(flow.get((k, d), 0) for k in supply) <= high[d]
    pairs = list(cost)
    to = np.array([[float(p[1] == d) for p in pairs] for d in devices])
    of = np.array([[float(p[0] == k) for p in pairs] for k in supply])
    best = linprog(
        [cost[p] for p in pairs],
        np.vstack([to, -to]),
        [*high.values(), *(-n for n in low.values())],
        of,
        list(supply.values()),
        method="highs",
    )
    assert paid == pytest.approx(best.fun, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- the plans


@pytest.mark.parametrize("seed", range(48))
def test_makespan_is_near_the_bound(seed):
    """Within 2 % of what HiGHS proves, for all kinds of change (thousands of them in `python -m bench.planner`); and
    the planner's own bound is one: no plan is below it."""
    kind = KINDS[seed % len(KINDS)]
    problem = random_problem(random.Random(20_000 + seed), fine=True, kind=kind, copies=False)
    plan = makespan(problem)
    seconds = predict(plan, problem.topology).makespan_s
    bound = max(lp_bound(problem, plan.after), plan.bound_s)
    assert bound <= seconds * (1 + 1e-6)
    assert seconds <= bound * 1.02
    assert lower_bound(problem).seconds <= seconds * (1 + 1e-6)


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_makespan_is_near_what_can_be_proven(kind):
    """Many more, by the planner's own bound where that is enough, else by HiGHS, if it is done soon."""
    far, unsolved = [], []
    for seed in range(25):
        problem = random_problem(random.Random(f"{kind} {seed}"), fine=True, kind=kind, copies=False)
        plan = makespan(problem)
        seconds = predict(plan, problem.topology).makespan_s
        if seconds > plan.bound_s * 1.02:
            try:
                bound = lp_bound(problem, plan.after, time_limit_s=4.0)
            except Unsolved:
                unsolved.append(seed)
                continue
            if seconds > bound * 1.02:
                far.append((seed, seconds / bound - 1))
    assert not far and len(unsolved) <= 3


# Random problems of `python -m bench.planner` with small units that plans were once 2 to 23 % above the bound of.
HARD = (735, 998, 1311, 1741, 100_469, 100_631, 100_870, 101_479, 101_645, 101_726, 201_110, 118_327_357_223)
HARD += (300_057, 300_128)  # which copy of an expert is dropped decides


def hard_problem(seed: int) -> Problem:
    kind = KINDS[seed % 100_000 % len(KINDS)]
    return random_problem(random.Random(seed), fine=True, kind=kind, copies=None if kind == "shrink" else False)


@pytest.mark.parametrize("seed", HARD)
def test_makespan_is_near_the_bound_where_it_once_was_not(seed):
    problem = hard_problem(seed)
    plan = makespan(problem)
    assert reference.apply(plan) == plan.after
    assert predict(plan, problem.topology).makespan_s <= 1.02 * max(lp_bound(problem, plan.after), plan.bound_s)


@pytest.mark.parametrize("seed", [100_184, 300_418, 301_361, 301_695])
def test_units_is_not_faster_where_it_once_was(seed):
    """Where devices are reached at different speeds the even placement can be better than one that looks at them."""
    problem = hard_problem(seed)
    ours, even = (predict(policy(problem), problem.topology).makespan_s for policy in (makespan, POLICIES["units"]))
    assert ours <= even


def test_highs_proves_a_plan_the_best_that_is_above_what_split_units_could_reach():
    """One expert takes a link from the host 0.5 of 1.2 ms: 3.8 % above the linear programme, which splits it."""
    problem = hard_problem(201_646)
    plan = makespan(problem)
    seconds = predict(plan, problem.topology).makespan_s
    assert seconds > 1.03 * lp_bound(problem, plan.after)
    assert seconds <= 1.01 * lp_bound(problem, plan.after, integral=True, gap=5e-3, time_limit_s=60.0)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.sampled_from(sorted(set(KINDS))), st.integers(0, 2**40))
def test_makespan_is_near_what_units_of_any_size_can_reach(kind, seed):
    """Within 2 % of the planner's own bound, else of the linear programme, else of what HiGHS proves of whole units;
    and no other policy is faster (but for pages, at which bytes are cut)."""
    problem = random_problem(random.Random(seed), fine=True, kind=kind, copies=None if kind == "shrink" else False)
    plan = makespan(problem)
    seconds = predict(plan, problem.topology).makespan_s
    for name in ("units", "cmm"):
        other = POLICIES[name](problem)
        if len(other.replayed) <= len(plan.replayed):
            assert predict(other, problem.topology).makespan_s >= seconds * (1 - 1e-4)
    if seconds > plan.bound_s * 1.02:
        try:
            near = seconds <= 1.02 * lp_bound(problem, plan.after, time_limit_s=4.0)
            assert near or seconds <= 1.02 * lp_bound(problem, plan.after, integral=True, time_limit_s=4.0)
        except Unsolved:
            reject()


@pytest.mark.parametrize("topology", ["mi210-2x4", "2-nodes-8"])
def test_a_device_that_joins_takes_q_heads_with_their_kv_head(topology):
    """Seven devices split five of eight KV heads; the eighth takes one whole group, the others make up for it, and
    that is what HiGHS finds best too."""
    shape, names = SHAPES["Qwen3-8B"], preset(topology).devices
    problem = Problem(
        units=shape,
        before=initial_layout(shape, names[:7]),
        devices=names,
        topology=preset(topology),
        plane_bytes=shape.plane_bytes(20_000),
    )
    plan = makespan(problem)
    assert all(len(shard[KV]) == 1 for shard in plan.after.shards)
    best = lp_bound(problem, integral=True, gap=5e-3)
    assert predict(plan, problem.topology).makespan_s <= best * 1.01


@pytest.mark.parametrize("seed", range(10))
def test_the_own_bound_is_below_whole_units_too(seed):
    """Coarse units: the mixed-integer optimum is an upper limit for anything that calls itself a lower bound."""
    problem = random_problem(random.Random(seed), kind="shrink", copies=False)
    problem = replace(problem, plane_bytes=0)
    if len(problem.devices) > 4:
        problem = replace(problem, lost=(*problem.lost, *problem.devices[4:]), devices=problem.devices[:4])
    whole = lp_bound(problem, integral=True, gap=1e-3)
    assert lower_bound(problem).seconds <= whole * (1 + 2e-3) + 1e-9


def test_bounds_of_the_paper_machine_say_what_limits():
    shape = SHAPES["Qwen3-30B-A3B"]
    topology = preset("mi210-2x4")
    rest = tuple(gpu for gpu in GPUS if gpu != "gpu:3")
    problem = Problem(units=shape, before=initial_layout(shape, GPUS), devices=rest, lost=("gpu:3",), topology=topology)
    bound = lower_bound(problem)
    assert bound.lost_bytes == problem.lost_bytes and not problem.missing[KV]
    assert bound.why == "the 7 links of 27.2 GB/s on the ways from the stores, all busy"
    assert bound.seconds >= problem.lost_bytes / (7 * 27.2e9)
    assert lower_bound(replace(problem, lost=(), devices=GPUS)).why == "nothing has to move"


def test_sixty_four_devices():
    """One of 64 lost: every expert once, every layer balanced, near the bound."""
    shape, topology = SHAPES["deepseek-v3-like"], cluster(8, 8)
    lost = topology.devices[9]
    rest = tuple(device for device in topology.devices if device != lost)
    problem = Problem(
        units=shape,
        before=initial_layout(shape, topology.devices),
        devices=rest,
        lost=(lost,),
        topology=topology,
    )
    plan = makespan(problem)
    plan.after.check(shape)
    assert plan.loaded_bytes == plan.lost_bytes
    seconds = predict(plan, topology).makespan_s
    assert math.isfinite(seconds) and plan.bound_s <= seconds <= 1.05 * plan.bound_s
