"""Layouts and the shrink plan against slow, obvious references."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.config import ModelConfig, MoEConfig, RopeConfig
from anchortp.errors import ConfigError, DoesNotFit
from anchortp.layout import (
    ATTENTION,
    EXPERT,
    KV,
    KVAddresses,
    Layout,
    Shard,
    WeightAddresses,
    initial_layout,
    model_units,
    shard_from_dict,
    width_bounds,
    widths,
)
from anchortp.plan import POLICIES, fill_plan, plan_change, reference
from tests.losses import after_loss


def make_config(kv_heads=3, group=3, hidden=48, mlp=96, vocab=250, layers=2, tied=True, **more):
    return ModelConfig(
        architecture="llama",
        num_layers=layers,
        hidden_size=hidden,
        num_q_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=8,
        mlp_width=mlp,
        vocab_size=vocab,
        tie_embeddings=tied,
        qk_norm=False,
        rms_eps=1e-5,
        rope=RopeConfig(),
        max_position=128,
        dtype="bfloat16",
        **more,
    )


def make_moe(kv_heads=3, group=3, layers=3, experts=8, width=48, cut="experts", **more):
    moe = MoEConfig(num_experts=experts, top_k=1, width=width, normalise=True, cut=cut)
    return make_config(kv_heads=kv_heads, group=group, layers=layers, mlp=0, moe=moe, **more)


def devices(count):
    return tuple(f"cpu:{i}" for i in range(count))


models = st.builds(
    make_config,
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 5),
    mlp=st.sampled_from([32, 48, 96, 100, 1536]),
    vocab=st.integers(30, 3000),
    tied=st.booleans(),
) | st.builds(
    make_moe,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    layers=st.integers(1, 4),
    experts=st.integers(1, 9),
    width=st.sampled_from([32, 48, 100]),
    cut=st.sampled_from(["experts", "columns"]),
)


@st.composite
def model_and_degree(draw):
    units = model_units(draw(models))
    return units, draw(st.integers(1, units.config.num_q_heads))


def spread(units, layout: Layout, family: str) -> int:
    """Most units minus fewest: of experts in the layer where that is worst."""
    per_group = units.num_units[family] // units.num_groups(family)
    held = [[unit // per_group for unit in shard[family]] for shard in layout.shards]
    counts = [[groups.count(group) for groups in held] for group in range(units.num_groups(family))]
    return max(max(each) - min(each) for each in counts)


@given(model_and_degree())
def test_initial_layout_is_complete_and_even(case):
    units, degree = case
    layout = initial_layout(units, devices(degree))
    layout.check(units)
    for family in units.families:
        if family != KV:
            assert spread(units, layout, family) <= 1
    assert sum(len(s[KV]) for s in layout.shards) <= units.config.num_kv_heads + degree - 1


@given(model_and_degree(), st.data())
def test_initial_layout_follows_speeds(case, data):
    units, degree = case
    speeds = {d: data.draw(st.floats(0.2, 5.0)) for d in devices(degree)}
    layout = initial_layout(units, devices(degree), speeds)
    layout.check(units)
    for family in set(units.families) - {KV, EXPERT}:
        total = units.num_units[family]
        slowest = max(len(s[family]) / speeds[s.device] for s in layout.shards)
        # No single unit moved elsewhere would make the slowest device faster.
        assert all((len(s[family]) + 1) / speeds[s.device] >= slowest - 1e-9 for s in layout.shards if total > 0)


def test_degree_above_the_q_heads_is_refused_with_the_numbers():
    units = model_units(make_config(kv_heads=2, group=2))
    with pytest.raises(DoesNotFit, match=r"5 devices.*4 q heads"):
        initial_layout(units, devices(5))


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_speeds_must_be_positive(speed):
    units = model_units(make_config())
    with pytest.raises(ConfigError, match="speed of cpu:1"):
        initial_layout(units, devices(2), {"cpu:1": speed})


def test_doubled_devices_are_refused():
    with pytest.raises(ConfigError, match="each once"):
        initial_layout(model_units(make_config()), ("cpu:0", "cpu:0"))


@settings(deadline=None)
@given(model_and_degree(), st.randoms(use_true_random=False))
def test_any_sequence_of_losses(case, rng: random.Random):
    """Survivors keep every unit in its slot, exactly the lost bytes are loaded, widths stay even, down to one."""
    units, degree = case
    layout = initial_layout(units, devices(degree))
    while len(layout.devices) > 1:
        lost = rng.sample(layout.devices, rng.randint(1, len(layout.devices) - 1))
        plan = after_loss(units, layout, lost)
        plan.after.check(units)
        assert reference.apply(plan) == plan.after
        survivors = layout.without(lost)
        for shard in survivors.shards:
            for family in units.families:
                kept = shard[family]
                assert plan.after[shard.device][family][: len(kept)] == kept
        gone = sum(
            units.unit_bytes[family]
            for family in units.families
            for unit in range(units.num_units[family])
            if not survivors.holders(family, unit)
        )
        assert plan.lost_bytes == gone
        assert plan.copied_bytes == 0
        assert plan.loaded_bytes == gone + plan.replica_bytes
        assert plan.replica_bytes % units.unit_bytes[KV] == 0 and plan.replica_bytes >= 0
        for family in units.families:
            if family != KV:
                assert spread(units, plan.after, family) <= 1
            if family not in (KV, EXPERT):
                arrived = [len(plan.after[d][family]) - len(survivors[d][family]) for d in plan.after.devices]
                assert max(arrived) - min(arrived) <= 2  # even links, as even as the widths were
        layout = plan.after


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_few_new_kv_copies(kv_heads, group, rng: random.Random):
    """At most one KV copy above the best of all assignments, and usually the best itself."""
    units = model_units(make_config(kv_heads=kv_heads, group=group))
    layout = initial_layout(units, devices(rng.randint(1, units.config.num_q_heads)))
    while len(layout.devices) > 1:
        lost = [rng.choice(layout.devices)]
        plan = after_loss(units, layout, lost)
        target = {s.device: len(s[ATTENTION]) for s in plan.after.shards}
        best = reference.fewest_new_kv_copies(units, layout, lost, target)
        ours = sum(len(s[KV]) - len(layout[s.device][KV]) for s in plan.after.shards)
        assert ours <= best + 1
        layout = plan.after


def test_new_kv_copies_are_the_fewest_in_nearly_all_cases():
    rng, best_total, ours_total = random.Random(1), 0, 0
    for _ in range(150):
        units = model_units(make_config(kv_heads=rng.randint(1, 3), group=rng.randint(1, 3)))
        layout = initial_layout(units, devices(rng.randint(1, units.config.num_q_heads)))
        while len(layout.devices) > 1:
            lost = [rng.choice(layout.devices)]
            plan = after_loss(units, layout, lost)
            target = {s.device: len(s[ATTENTION]) for s in plan.after.shards}
            best_total += reference.fewest_new_kv_copies(units, layout, lost, target)
            ours_total += sum(len(s[KV]) - len(layout[s.device][KV]) for s in plan.after.shards)
            layout = plan.after
    assert best_total > 0
    assert ours_total <= 1.02 * best_total


@given(model_and_degree(), st.data())
def test_weighted_shrink_keeps_to_the_speeds(case, data):
    units, degree = case
    if degree == 1:
        return
    speeds = {d: data.draw(st.floats(0.2, 5.0)) for d in devices(degree)}
    layout = initial_layout(units, devices(degree), speeds)
    lost = data.draw(st.sampled_from(devices(degree)))
    plan = after_loss(units, layout, [lost], speeds)
    plan.after.check(units)
    assert reference.apply(plan) == plan.after
    for family in set(units.families) - {KV, EXPERT}:
        low, high = width_bounds(units.num_units[family], plan.after.devices, speeds)
        assert all(low[d] <= len(plan.after[d][family]) <= high[d] for d in plan.after.devices)


@given(model_and_degree(), st.randoms(use_true_random=False))
def test_restart_of_a_half_done_recovery_counts_every_byte_once(case, rng: random.Random):
    """A second loss strikes when some survivors have loaded and others have not."""
    units, degree = case
    if degree < 3:
        return
    layout = initial_layout(units, devices(degree))
    first = after_loss(units, layout, [rng.choice(layout.devices)])
    done = [d for d in first.after.devices if rng.random() < 0.5]
    actual = layout.without(set(layout.devices) - set(first.after.devices))
    for device in done:
        actual = actual.with_shard(first.after[device])
    second_lost = rng.choice(actual.devices)
    second = after_loss(units, actual, [second_lost])
    second.after.check(units)
    assert reference.apply(second) == second.after


@given(st.integers(2, 5), st.integers(2, 8), st.randoms(use_true_random=False))
def test_a_lost_expert_with_a_replica_costs_no_load(degree, experts, rng: random.Random):
    units = model_units(make_moe(experts=experts))
    layout = initial_layout(units, devices(degree))
    copies = [(d, u) for d in layout.devices for u in range(units.num_units[EXPERT]) if u not in layout[d][EXPERT]]
    for device, unit in rng.sample(copies, rng.randint(0, len(copies))):
        layout = layout.with_shard(layout[device].appended(EXPERT, [unit]))
    layout.check(units)
    lost = rng.choice(layout.devices)
    plan = after_loss(units, layout, [lost])
    plan.after.check(units)
    survivors = layout.without([lost])
    gone = {unit for unit in layout[lost][EXPERT] if not survivors.holders(EXPERT, unit)}
    loaded = [m for m in plan.moves if m.family == EXPERT and not m.is_relocation]
    arrived = Counter(unit for m in loaded for unit in range(m.unit, m.unit + m.num_units))
    given_up = Counter(u for d in survivors.devices for u in set(survivors[d][EXPERT]) - set(plan.after[d][EXPERT]))
    assert set(arrived) >= gone and max(arrived.values(), default=1) == 1
    assert all(given_up[unit] for unit in set(arrived) - gone)  # by a device that had more than balance allows
    assert reference.apply(plan) == plan.after


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 6), st.integers(2, 8), st.sampled_from(["makespan", "units"]), st.randoms(use_true_random=False))
def test_any_change_with_any_number_of_replicas(degree, experts, policy, rng: random.Random):
    """Losses, leaves, joins and speeds at once, with so many copies that hardly any unit may be passed on."""
    units = model_units(make_moe(experts=experts))
    layout = initial_layout(units, devices(degree))
    copies = [(d, u) for d in layout.devices for u in range(units.num_units[EXPERT]) if u not in layout[d][EXPERT]]
    for device, unit in rng.sample(copies, rng.randint(0, len(copies))):
        layout = layout.with_shard(layout[device].appended(EXPERT, [unit]))
    held = layout.without(rng.sample(layout.devices, rng.randint(0, degree - 1)))
    group = (*held.devices[rng.randint(0, len(held.devices) - 1) :], *rng.choice([(), ("cpu:9",)]))
    speeds = {device: rng.choice([1.0, 0.7, 0.5]) for device in group} if rng.random() < 0.4 else None
    plan = plan_change(units, held, group, policy=POLICIES[policy], speeds=speeds)
    plan.after.check(units)
    assert plan.after.devices == group and reference.apply(plan) == plan.after


def test_experts_of_all_layers_together_are_even_too():
    """One expert more than devices in each layer: the odd one out goes round."""
    units = model_units(make_moe(experts=4, layers=6))
    layout = initial_layout(units, devices(3))
    assert [len(shard[EXPERT]) for shard in layout.shards] == [8, 8, 8]
    plan = after_loss(units, layout, ["cpu:1"])
    assert [len(shard[EXPERT]) for shard in plan.after.shards] == [12, 12]


def test_columns_of_experts_are_mlp_blocks():
    """One byte range per layer, expert and tensor; every unit has its columns of all of them."""
    experts, columns = (model_units(make_moe(cut=cut)) for cut in ("experts", "columns"))
    assert experts.families == ("attention", "kv", "vocab", "expert")
    assert columns.families == ("attention", "kv", "mlp", "vocab")
    assert experts.total_bytes == columns.total_bytes
    ranges = list(WeightAddresses(units=columns).slot_ranges("mlp", 0, 1))
    assert len(ranges) == 2 * 3 * 8
    assert len(list(WeightAddresses(units=experts).slot_ranges(EXPERT, 0, 5))) == 2
    assert dict(columns.stored_tensors()) == dict(experts.stored_tensors())


def test_nobody_left():
    units = model_units(make_config())
    layout = initial_layout(units, devices(2))
    with pytest.raises(DoesNotFit, match="no device is left"):
        after_loss(units, layout, devices(2))


def test_fill_plan_loads_the_model_once_and_kv_copies():
    units = model_units(make_config())
    plan = fill_plan(units, devices(4))
    assert reference.apply(plan) == plan.after == initial_layout(units, devices(4))
    assert plan.lost_bytes == units.total_bytes - units.replicated_bytes
    copies = sum(len(s[KV]) for s in plan.after.shards) - units.config.num_kv_heads
    assert plan.replica_bytes == copies * units.unit_bytes[KV]


def test_plans_and_layouts_are_values():
    units = model_units(make_config())
    layout = initial_layout(units, devices(4))
    assert after_loss(units, layout, ["cpu:2"]) == after_loss(units, layout, ["cpu:2"])
    assert hash(layout) == hash(initial_layout(units, devices(4)))
    shard = layout.shards[1]
    assert shard_from_dict(shard.device, shard.as_dict()) == shard
    assert "cpu:1" in repr(layout)


def test_published_table_for_equal_widths():
    """The busiest link of facts.md's table: 4→3 loads 8.3 % of the model per survivor, 8→7 1.8 %."""
    for degree, lost, share in [(4, ["cpu:2"], 1 / 12), (4, ["cpu:2", "cpu:3"], 1 / 4), (8, ["cpu:3"], 1 / 56)]:
        units = model_units(make_config(kv_heads=168, group=1, mlp=168 * 8, vocab=168 * 64))
        plan = after_loss(units, initial_layout(units, devices(degree)), lost)
        sharded = units.total_bytes - units.replicated_bytes
        busiest = max(plan.bytes_by_device().values())
        assert busiest == pytest.approx(sharded * share, rel=0.01)


@given(model_and_degree(), st.data())
def test_weight_addresses_never_overlap(case, data):
    units, _ = case
    addresses = WeightAddresses(units=units)
    taken = [addresses.replicated_range]
    for tensor in units.tensors:
        for copy in range(units.num_copies(tensor)):
            first = addresses.block(tensor, copy, 0)
            last = addresses.block(tensor, copy, units.num_units[tensor.family] - 1)
            assert first[0] == addresses.offset(tensor.key, copy) and first[0] % 4096 == 0
            taken.append((first[0], last[1]))
    taken.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(taken))
    assert taken[-1][1] <= addresses.reserved_bytes
    family = data.draw(st.sampled_from(units.families))
    start = data.draw(st.integers(0, units.num_units[family]))
    stop = data.draw(st.integers(start, units.num_units[family]))
    total = sum(b - a for a, b in addresses.slot_ranges(family, start, stop))
    assert total == (stop - start) * units.unit_bytes[family]


@given(models, st.integers(1, 32), st.integers(1, 40), st.data())
def test_kv_addresses_never_overlap(config, block_size, num_blocks, data):
    addresses = KVAddresses(config=config, block_size=block_size, num_blocks=num_blocks)
    stop = data.draw(st.integers(0, config.num_kv_heads))
    last = data.draw(st.integers(0, num_blocks))
    ranges = sorted(addresses.slot_ranges(0, stop, 0, last))
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    assert sum(b - a for a, b in ranges) == stop * last * addresses.block_bytes
    assert not ranges or ranges[-1][1] <= addresses.reserved_bytes


def test_widths_are_exact_and_keep_what_is_held():
    assert widths(9, devices(4)) == {"cpu:0": 3, "cpu:1": 2, "cpu:2": 2, "cpu:3": 2}
    assert widths(9, ("a", "b"), held={"a": 7, "b": 0}) == {"a": 7, "b": 2}
    assert widths(12, ("a", "b"), speeds={"a": 2.0}) == {"a": 8, "b": 4}


def test_a_shard_appends_without_moving():
    shard = Shard(device="cpu:0", slots=((4, 2), (1,), (), ()))
    assert shard.appended(ATTENTION, [7])[ATTENTION] == (4, 2, 7)
    assert shard.appended(ATTENTION, [7])[KV] == (1,)
