"""Recoveries in which experts stay: what has a replica is not loaded again, however uneven the experts are."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.errors import DoesNotFit
from anchortp.layout import EXPERT, KV, Layout, filled_bounds, initial_layout
from anchortp.plan import POLICIES, FromHost, Plan, Shape, plan_change, reference

NAMES = tuple(f"cpu:{n}" for n in range(7))
SPEEDS = (0.5, 1.0, 2.0)
SHAPE = Shape(
    name="tiny",
    num_layers=3,
    hidden_size=64,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=640,
    mlp_width=0,
    num_experts=6,
    expert_width=32,
    tie_embeddings=True,
)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(SPEEDS)), min_size=1, max_size=8), st.integers(0, 30))
def test_units_fill_those_that_have_fewest(devices, num_new):
    held = {f"cpu:{i}": count for i, (count, _) in enumerate(devices)}
    speeds = {f"cpu:{i}": speed for i, (_, speed) in enumerate(devices)}
    low, high = filled_bounds(held, num_new, speeds)
    width = dict(held)
    for _ in range(num_new):  # the slow obvious way, unit by unit to whoever has fewest afterwards
        width[min(width, key=lambda d: (width[d] + 1) / speeds[d])] += 1
    assert sum(low.values()) <= sum(width.values()) <= sum(high.values())
    for device, count in held.items():
        assert count <= low[device] <= high[device] <= max(count, low[device] + 1)
        if len(set(speeds.values())) == 1:
            assert low[device] <= width[device] <= high[device]
    given_to = [d for d in held if low[d] > held[d]]
    for device in given_to:
        assert all((low[device] - 1) / speeds[device] < high[d] / speeds[d] for d in held), "nobody had far fewer"


def worn(rng: random.Random, num_devices: int, num_replicas: int, speeds: dict[str, float] | None = None) -> Layout:
    """A layout as the balancer leaves it: experts moved and replicated at random."""
    layout = initial_layout(SHAPE, NAMES[:num_devices], speeds)
    for _ in range(num_replicas):
        unit, to = rng.randrange(SHAPE.num_units[EXPERT]), rng.choice(NAMES[:num_devices])
        if unit not in layout[to][EXPERT]:
            layout = layout.with_shard(layout[to].appended(EXPERT, (unit,)))
            others = [d for d in NAMES[:num_devices] if d != to and unit in layout[d][EXPERT]]
            if rng.random() < 0.4:
                shard = layout[rng.choice(others)]
                layout = layout.with_shard(shard.replaced(EXPERT, (u for u in shard[EXPERT] if u != unit)))
    return layout


def lost_bytes(held: Layout) -> int:
    """Of all units that nobody holds."""
    return sum(
        (SHAPE.num_units[family] - len(held.held(family))) * SHAPE.unit_bytes[family] for family in SHAPE.families
    )


@settings(max_examples=150, deadline=None)
@given(
    num_devices=st.integers(2, 7),
    num_lost=st.integers(1, 6),
    num_replicas=st.integers(0, 40),
    policy=st.sampled_from(["makespan", "units"]),
    min_gain=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
def test_bytes_loaded_are_those_of_units_without_a_survivor(
    num_devices, num_lost, num_replicas, policy, min_gain, weighted, rng
):
    names = NAMES[:num_devices]
    speeds = {name: rng.choice(SPEEDS) for name in names} if weighted else None
    held = worn(rng, num_devices, num_replicas, speeds).without(rng.sample(names, min(num_lost, num_devices - 1)))
    speeds = speeds and {name: speeds[name] for name in held.devices}
    plan = plan_change(
        SHAPE, held, held.devices, policy=POLICIES[policy], min_gain=min_gain, speeds=speeds, experts="stay"
    )
    assert reference.apply(plan) == plan.after
    plan.after.check(SHAPE)
    further = sum(move.num_units for move in plan.moves if move.family == KV) - (
        SHAPE.num_units[KV] - len(held.held(KV))
    )
    assert plan.lost_bytes == lost_bytes(held)
    if policy == "units" and not weighted:  # else q heads may be passed on, to copy less or because of the speeds
        assert plan.loaded_bytes == plan.lost_bytes + further * SHAPE.unit_bytes[KV] and plan.copied_bytes == 0
    loads = [move for move in plan.moves if move.family == EXPERT]
    assert all(isinstance(move.source, FromHost) for move in loads)
    arrived = sorted(move.unit + i for move in loads for i in range(move.num_units))
    assert arrived == sorted(set(range(SHAPE.num_units[EXPERT])) - held.held(EXPERT))
    for shard in held.shards:
        assert plan.after[shard.device][EXPERT][: len(shard[EXPERT])] == shard[EXPERT], "nothing is given up"
    check_filled(held, plan, speeds)


def check_filled(held: Layout, plan: Plan, speeds: dict[str, float] | None) -> None:
    for layer in range(SHAPE.num_layers):
        before, after = (
            Counter({s.device: sum(u // SHAPE.num_experts == layer for u in s[EXPERT]) for s in layout.shards})
            for layout in (held, plan.after)
        )
        low, high = filled_bounds(before, sum(after.values()) - sum(before.values()), speeds)
        assert all(low[d] <= after[d] <= high[d] for d in held.devices), "the emptiest receive what was lost"


def test_numbers_are_balanced_where_that_is_asked_for():
    """The same loss: by default experts that a survivor holds move too."""
    held = worn(random.Random(1), 4, 20).without(["cpu:1"])
    even, stay = (plan_change(SHAPE, held, held.devices, policy=POLICIES["units"], experts=e) for e in ("even", "stay"))
    assert stay.loaded_bytes == lost_bytes(held) + stay.replica_bytes < even.loaded_bytes
    assert even.drops and not stay.drops


# ---------------------------------------------------------------------------------------------- too little memory


def peak_and_end(plan: Plan) -> tuple[int, int]:
    """Bytes that the fullest device holds at the fullest moment, and at the end."""
    size = SHAPE.unit_bytes
    now = {s.device: sum(len(s[f]) * size[f] for f in SHAPE.families) for s in plan.before.shards}
    peak = max(now.values())
    for stage in range(plan.num_stages):
        for move in plan.moves:
            if move.stage == stage:
                now[move.device] += move.num_bytes
        peak = max(peak, *now.values())
        for drop in plan.drops:
            if drop.stage == stage:
                now[drop.device] -= drop.num_units * size[drop.family]
    return peak + SHAPE.replicated_bytes, max(now.values()) + SHAPE.replicated_bytes


def test_replicas_make_room_before_anything_is_refused():
    """With ever less memory: first all stay, then one replica each, and still nothing is loaded that somebody holds."""
    held = initial_layout(SHAPE, NAMES[:4]).without(["cpu:3"])
    for name in held.devices:  # everybody holds everything that is left
        units = (u for u in sorted(held.held(EXPERT)) if u not in held[name][EXPERT])
        held = held.with_shard(held[name].appended(EXPERT, units))
    roomy = plan_change(SHAPE, held, held.devices, experts="stay")
    most, _ = peak_and_end(roomy)
    unit = SHAPE.unit_bytes[EXPERT]
    said = set()
    for budget in range(most, 0, -unit):
        try:
            plan = plan_change(
                SHAPE, held, held.devices, memory_bytes=dict.fromkeys(held.devices, budget), experts="stay"
            )
        except DoesNotFit:
            break
        peak, end = peak_and_end(plan)
        start = max(sum(len(s[f]) * SHAPE.unit_bytes[f] for f in SHAPE.families) for s in held.shards)
        assert end <= budget and peak <= max(budget, start + SHAPE.replicated_bytes)
        assert plan.loaded_bytes == lost_bytes(held), "KV heads that others need too are copied"
        assert reference.apply(plan) == plan.after
        said.add(next((reason for reason in plan.reasons if "lack of memory" in reason), "").split(":")[0])
    assert said == {"", "replicas of experts are given up, for lack of memory"}
    least = SHAPE.total_bytes - SHAPE.replicated_bytes
    assert budget < least / 3 + SHAPE.replicated_bytes + 4 * unit, "refused only when the model hardly fits"


def test_a_plan_says_so_if_memory_makes_it_load_what_somebody_holds():
    """One device holds all experts and has no memory for what else it must take."""
    names = ("cpu:0", "cpu:1")
    held = initial_layout(SHAPE, (*names, "cpu:2")).without(["cpu:2"])
    experts = range(SHAPE.num_units[EXPERT])
    held = held.with_shard(held["cpu:0"].replaced(EXPERT, experts)).with_shard(held["cpu:1"].replaced(EXPERT, ()))
    stay = plan_change(SHAPE, held, names, experts="stay")
    assert not any(move.family == EXPERT for move in stay.moves)
    budget = peak_and_end(stay)[1] - SHAPE.unit_bytes[EXPERT]
    plan = plan_change(SHAPE, held, names, experts="stay", memory_bytes={"cpu:0": budget})
    assert any(reason.startswith("experts that somebody holds are loaded elsewhere") for reason in plan.reasons)
    assert reference.apply(plan) == plan.after and peak_and_end(plan)[1] <= peak_and_end(stay)[1]
    assert len(plan.after["cpu:1"][EXPERT]) == len(experts) // 2


@pytest.mark.parametrize("num_replicas", [0, 30])
def test_a_device_that_leaves_passes_its_experts_on(num_replicas):
    held = worn(random.Random(3), 4, num_replicas)
    plan = plan_change(SHAPE, held, NAMES[:3], experts="stay")
    plan.after.check(SHAPE)
    orphans = set(held["cpu:3"][EXPERT]) - replace(held, shards=held.shards[:3]).held(EXPERT)
    moved = [move.unit + i for move in plan.moves if move.family == EXPERT for i in range(move.num_units)]
    assert sorted(moved) == sorted(orphans)
