"""`plan_change`, as a recovery calls it: losses, joins, leaves and other speeds one after the other, on any devices."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest

from anchortp.errors import DoesNotFit
from anchortp.layout import ATTENTION, KV, Layout, empty_shard, initial_layout
from anchortp.plan import (
    PLANE,
    REPLICATED,
    FromHost,
    FromPeer,
    Plan,
    Problem,
    Shape,
    makespan,
    plan_change,
    predict,
    reference,
)
from anchortp.plan.topology import TopologyError, local
from bench.planner_problems import random_problem

SMOLLM2 = Shape(
    name="SmolLM2-135M",
    num_layers=30,
    hidden_size=576,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    mlp_width=1536,
    tie_embeddings=True,
)
MOE = replace(SMOLLM2, mlp_width=0, num_experts=8, expert_width=512)


def devices(*numbers: int) -> tuple[str, ...]:
    return tuple(f"cpu:{n}" for n in numbers)


def check_executable(plan: Plan, units: Shape) -> None:
    """All moves of a stage can run in any order: whole units, each from a store or from a slot that held it."""
    held = {s.device: {(f, s[f][i], i) for f in units.num_units for i in range(len(s[f]))} for s in plan.before.shards}
    for shard in plan.before.shards:
        held[shard.device] |= {(REPLICATED, 0, 0)} if any(shard.slots) else set()
    for stage in range(plan.num_stages):
        arriving = []
        for move in plan.moves:
            if move.stage == stage:
                size = units.replicated_bytes if move.family == REPLICATED else units.unit_bytes[move.family]
                assert move.first_byte == 0 and move.num_bytes == move.num_units * size
                for i in range(move.num_units):
                    if isinstance(move.source, FromPeer):
                        assert (move.family, move.unit + i, move.source.slot + i) in held[move.source.device]
                    arriving.append((move.device, (move.family, move.unit + i, move.slot + i)))
        for device, what in arriving:
            held.setdefault(device, set()).add(what)
        for drop in plan.drops:
            if drop.stage == stage:
                held[drop.device] -= {(drop.family, drop.unit + i, drop.slot + i) for i in range(drop.num_units)}
    assert reference.apply(plan) == plan.after
    plan.after.check(units)


@pytest.mark.parametrize("units", [SMOLLM2, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_changes(units, seed):
    """Devices come and go, and a recovery is cut short now and then: some of what was to come has not."""
    rng = random.Random(seed)
    names = [f"cpu:{n}" for n in rng.sample(range(20), 7)]
    held = Layout(shards=tuple(empty_shard(name) for name in names[:3]))
    for _ in range(8):
        group = tuple(rng.sample(names, rng.randint(1, 7)))
        speeds = {name: rng.choice([1.0, 0.5]) for name in group} if rng.random() < 0.2 else None
        plan = plan_change(units, held, group, speeds=speeds)
        check_executable(plan, units)
        assert plan.after.devices == group
        lost = set(rng.sample(group, rng.randint(0, len(group) - 1)))
        held = plan.after.without(lost)
        if rng.random() < 0.3:
            held = Layout(shards=tuple(_cut_short(rng, shard) for shard in held.shards))


def _cut_short(rng, shard):
    return replace(shard, slots=tuple(units[: rng.randint(0, len(units))] for units in shard.slots))


def test_a_loss_loads_what_was_lost_and_moves_nothing_else():
    before = initial_layout(SMOLLM2, devices(0, 1, 5, 7))
    plan = plan_change(SMOLLM2, before.without(["cpu:5"]), devices(0, 1, 7))
    assert plan.copied_bytes + plan.loaded_bytes == plan.lost_bytes + plan.replica_bytes
    assert not plan.drops and plan.num_stages == 1 and plan.relocated_bytes == 0
    assert plan.replica_bytes == 0, "each lost q head goes where its KV head is"


@pytest.mark.parametrize("num_before", range(2, 9))
def test_who_gives_units_away_gives_those_in_its_last_slots(num_before):
    """A new device joins: survivors close no holes, in layouts as they are first cut and as faults leave them; but for
    a q head that moves up because the one before it went with its KV head."""
    names = devices(*range(num_before + 1))
    before = initial_layout(SMOLLM2, names[:-1])
    worn = plan_change(SMOLLM2, initial_layout(SMOLLM2, names).without([names[0]]), names[1:]).after
    for layout, joins in ((before, names[-1]), (worn, names[0])):
        plan = plan_change(SMOLLM2, layout, (*layout.devices, joins))
        check_executable(plan, SMOLLM2)
        assert plan.drops
        assert {move.family for move in plan.moves if move.is_relocation} <= {ATTENTION, KV}
        assert plan.relocated_bytes <= SMOLLM2.unit_bytes[ATTENTION] * num_before


def test_who_joins_copies_what_others_hold():
    plan = plan_change(SMOLLM2, initial_layout(SMOLLM2, devices(0, 1, 2)), devices(0, 1, 2, 3))
    assert plan.copied_bytes > 0.9 * (plan.copied_bytes + plan.loaded_bytes)


def test_devices_that_join_get_the_replicated_tensors_whether_listed_or_not():
    before = initial_layout(SMOLLM2, devices(0, 1))
    empty = before.with_shard(empty_shard("cpu:2"))
    plans = [plan_change(SMOLLM2, held, devices(0, 1, 2)) for held in (before, empty)]
    assert plans[0].moves == plans[1].moves
    assert {m.device for m in plans[0].moves if m.family == REPLICATED} == {"cpu:2"}
    first = plan_change(SMOLLM2, Layout(shards=()), devices(0, 1))
    assert {m.device for m in first.moves if m.family == REPLICATED} == set(devices(0, 1))
    assert all(isinstance(move.source, FromHost) for move in first.moves)


def test_nobody_left_or_too_little_memory():
    before = initial_layout(SMOLLM2, devices(0, 1))
    with pytest.raises(DoesNotFit, match="no device is left of cpu:0, cpu:1"):
        plan_change(SMOLLM2, before, ())
    with pytest.raises(DoesNotFit, match="cpu:0 would hold"):
        plan_change(SMOLLM2, before.without(["cpu:1"]), devices(0), memory_bytes={"cpu:0": 200_000_000})


def test_a_plan_for_a_loss_needs_no_numpy():
    """Its import would take longer than the plan."""
    code = """
import sys
from anchortp.layout import initial_layout
from anchortp.plan import SHAPES, plan_change
for degree, lost in ((4, 1), (4, 2), (8, 1)):
    names = tuple(f"cpu:{i}" for i in range(degree))
    rest = names[lost:]
    plan_change(SHAPES["Qwen3-8B"], initial_layout(SHAPES["Qwen3-8B"], names).without(names[:lost]), rest)
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ------------------------------------------------------------------------------- what an executor can do, anywhere


@pytest.mark.parametrize("seed", range(24))
def test_without_relays_nothing_is_forwarded_or_passes_a_device(seed):
    problem = random_problem(random.Random(900 + seed))
    try:
        problem = replace(problem, relays=False)
    except TopologyError:  # some device has no way of its own, and that is what it must say
        return
    plan = makespan(problem)
    assert reference.apply(plan) == plan.after
    kinds = {place.name: place.kind for place in problem.topology.places}
    for move in plan.moves:
        ends = [problem.topology.link(name).dst for name in move.route]
        assert all(kinds[end] != "device" for end in ends[:-1])
        if isinstance(move.source, FromPeer) and move.stage == 0:
            family = KV if move.family == PLANE else move.family
            if family != REPLICATED:
                slots = plan.before[move.source.device][family][move.source.slot :]
                assert slots[: move.num_units] == tuple(range(move.unit, move.unit + move.num_units))


def test_a_device_that_only_others_could_feed_is_refused_without_relays():
    topology = local(devices(0, 1, 2))
    links = tuple(replace(x, src="cpu:1") if x.name == "bus>cpu:2" else x for x in topology.links)
    topology = replace(topology, links=links)
    problem = Problem(
        units=SMOLLM2, before=initial_layout(SMOLLM2, devices(0, 1)), devices=devices(0, 1, 2), topology=topology
    )
    assert any("pass through cpu:1" in reason for reason in makespan(problem).reasons)
    with pytest.raises(TopologyError, match="cpu:2 cannot be reached"):
        replace(problem, relays=False)


@pytest.mark.parametrize("seed", range(16))
def test_whole_units_cost_little_time(seed):
    problem = random_problem(random.Random(1700 + seed), fine=True)
    parts, whole = makespan(problem), makespan(replace(problem, parts=False))
    assert reference.apply(whole) == whole.after
    for move in whole.moves:
        assert move.first_byte == 0 and move.num_bytes == move.num_units * problem.size(move.family)
    seconds = [predict(plan, problem.topology).makespan_s for plan in (parts, whole)]
    assert seconds[0] * (1 - 1e-3) <= seconds[1] <= seconds[0] * 1.1
