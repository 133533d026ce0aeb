"""All policies on all kinds of change, played by the slow reference; the paper's example; limits; reasons."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from anchortp.errors import BudgetExceeded, ConfigError, DoesNotFit
from anchortp.layout import ATTENTION, EXPERT, KV, MLP, VOCAB, Layout, empty_shard, initial_layout
from anchortp.plan import (
    PLANE,
    POLICIES,
    REPLICATED,
    SHAPES,
    FromHost,
    FromPeer,
    Plan,
    Problem,
    Refused,
    Row,
    Shape,
    compare,
    explain,
    lower_bound,
    makespan,
    predict,
    preset,
    reference,
)
from anchortp.plan.topology import uniform
from bench.planner_problems import KINDS, random_problem

ROWS = Shape(  # 1,024 rows of MLP, one unit each
    name="rows",
    num_layers=1,
    hidden_size=8,
    num_q_heads=1024,
    num_kv_heads=1024,
    head_dim=2,
    vocab_size=1024,
    mlp_width=1024,
)
GPUS = tuple(f"gpu:{i}" for i in range(8))


def problem_of(shape: Shape, lost: tuple[str, ...], topology="mi210-2x4", degree=8, **more) -> Problem:
    names = GPUS[:degree]
    found = preset(topology) if isinstance(topology, str) else topology
    rest = tuple(name for name in names if name not in lost)
    return Problem(units=shape, before=initial_layout(shape, names), devices=rest, lost=lost, topology=found, **more)


def moved(plan: Plan, family: str, device: str) -> dict[str, int]:
    """Units that come to a device, by kind of source."""
    count: Counter[str] = Counter()
    for move in plan.moves:
        if move.family == family and move.device == device and not move.is_relocation:
            count[move.source.kind] += move.num_units
    return dict(count)


def spread(plan: Plan, units: set[int], family: str) -> int:
    widths = [len(units & set(shard[family])) for shard in plan.after.shards]
    return max(widths) - min(widths)


# ------------------------------------------------------------------------------------------- the paper's example


def test_cmm_reproduces_the_example_of_1024_rows():
    """4→3, the second of four lost: 85 + 171 rows reloaded, 86 copied, 256 + 170 + 256 kept."""
    plan = POLICIES["cmm"](problem_of(ROWS, ("gpu:1",), uniform(GPUS[:4]), 4))
    assert moved(plan, MLP, "gpu:0") == {"host": 85}
    assert moved(plan, MLP, "gpu:2") == {"host": 171}
    assert moved(plan, MLP, "gpu:3") == {"peer": 86}
    kept = {d: len(set(plan.before[d][MLP]) & set(plan.after[d][MLP])) for d in plan.after.devices}
    assert kept == {"gpu:0": 256, "gpu:2": 170, "gpu:3": 256}
    assert plan.loaded_bytes == plan.lost_bytes


def test_greedy_reloads_what_cmm_copies_and_reload_reloads_all():
    problem = problem_of(ROWS, ("gpu:1",), uniform(GPUS[:4]), 4)
    greedy, everything = POLICIES["greedy"](problem), POLICIES["reload"](problem)
    assert moved(greedy, MLP, "gpu:3") == {"host": 86} and greedy.copied_bytes == 0
    assert [moved(everything, MLP, d)["host"] for d in problem.devices] == [341, 341, 342]
    assert everything.loaded_bytes == ROWS.total_bytes + 2 * ROWS.replicated_bytes


@pytest.mark.parametrize("rows", [5, 100, 1021, 1024])
@pytest.mark.parametrize("degree", [2, 3, 7, 8])
def test_intervals_have_the_true_length(rows, degree):
    shape = replace(ROWS, mlp_width=rows, num_q_heads=rows, num_kv_heads=rows, vocab_size=rows)
    if rows < degree:
        return
    plan = POLICIES["cmm"](problem_of(shape, ("gpu:1",), uniform(GPUS[:degree]), degree))
    plan.after.check(shape)
    for shard in plan.after.shards:
        units = sorted(shard[MLP])
        assert units == list(range(units[0], units[-1] + 1)), "not an interval"


@pytest.mark.parametrize(
    ("degree", "lost", "shares"),
    [  # facts.md: of the model, over the busiest link and between peers
        (4, ("gpu:2",), (0.167, 0.083)),
        (4, ("gpu:2", "gpu:3"), (0.5, 0.25)),
        (8, ("gpu:3",), (0.071, 0.161)),
        (8, ("gpu:7",), (0.125, 0.375)),
        (8, ("gpu:6", "gpu:7"), (0.167, 0.5)),
    ],
)
def test_published_table(degree, lost, shares):
    shape = Shape(
        name="even",
        num_layers=1,
        hidden_size=64,
        num_q_heads=168,
        num_kv_heads=168,
        head_dim=2,
        vocab_size=168 * 64,
        mlp_width=168 * 64,
    )
    problem = problem_of(shape, lost, uniform(GPUS[:degree]), degree)
    cmm, sets = POLICIES["cmm"](problem), POLICIES["units"](problem)
    total = shape.total_bytes - shape.replicated_bytes
    from_host: Counter[str] = Counter()
    for move in cmm.moves:
        if isinstance(move.source, FromHost):
            from_host[move.device] += move.num_bytes
    assert max(from_host.values()) / total == pytest.approx(shares[0], abs=0.003)
    assert cmm.copied_bytes / total == pytest.approx(shares[1], abs=0.003)
    even = len(lost) / degree / (degree - len(lost))
    assert max(sets.bytes_by_device().values()) / total == pytest.approx(even, abs=0.003)


# ---------------------------------------------------------------------------------------------------- any change


@pytest.mark.parametrize("seed", range(32))
def test_every_plan_gives_the_layout_it_promises(seed):
    """Random problems of every kind: played by the reference, complete, balanced, the same again; `makespan` is not
    slower than any other and not faster than its bound; planes come or are said to be replayed."""
    problem = random_problem(random.Random(7000 + seed), kind=KINDS[seed % len(KINDS)])
    plans = {name: policy(problem) for name, policy in POLICIES.items()}
    seconds = {name: predict(plan, problem.topology).makespan_s for name, plan in plans.items()}
    for name, plan in plans.items():
        assert reference.apply(plan) == plan.after, name
        assert plan == POLICIES[name](problem), f"{name} is not deterministic"
        assert plan.after.devices == problem.devices
        plan.after.check(problem.units)
        assert plan.loaded_bytes >= problem.lost_bytes
        assert plan.loaded_bytes + plan.copied_bytes == plan.lost_bytes + plan.replica_bytes
        _check_balance(problem, plan)
        _check_planes(problem, plan)
        _check_replicated(problem, plan)
    best = plans["makespan"]
    assert best.bound_s <= seconds["makespan"] * (1 + 1e-6)
    for name, plan in plans.items():
        if len(plan.replayed) <= len(best.replayed):  # else it brings less
            assert seconds["makespan"] <= seconds[name] * (1 + 1e-4), name


def _check_balance(problem: Problem, plan: Plan) -> None:
    for family in problem.families:
        groups = problem.units.num_groups(family)
        per_group = problem.units.num_units[family] // groups
        for group in range(groups) if family != KV else ():
            width = Counter(
                {s.device: sum(unit // per_group == group for unit in s[family]) for s in plan.after.shards}
            )
            low, high = problem.bounds(sum(width.values()))
            for device in problem.devices:
                assert low[device] <= width[device] <= high[device], (plan.policy, family, group, device)


def _check_planes(problem: Problem, plan: Plan) -> None:
    if not problem.plane_bytes:
        return
    came = {(m.device, m.unit + i) for m in plan.moves if m.family == PLANE for i in range(m.num_units)}
    for shard in plan.after.shards:
        held = problem.held[KV].get(shard.device, frozenset()) if plan.policy != "reload" else frozenset()
        for head in shard[KV]:
            assert head in held or (shard.device, head) in came or head in plan.replayed


def _check_replicated(problem: Problem, plan: Plan) -> None:
    wanted = problem.devices if plan.policy == "reload" else problem.fresh
    came = {m.device for m in plan.moves if m.family == REPLICATED}
    assert came == set(wanted)


@pytest.mark.parametrize("seed", range(40))
def test_units_reads_what_is_lost_and_copies_nothing(seed):
    """After any loss: the least bytes that can be read, each once, but for KV heads that the cut splits."""
    problem = random_problem(random.Random(100 + seed), kind="shrink", copies=False)
    problem = replace(problem, plane_bytes=0)
    plan = POLICIES["units"](problem)
    assert plan.copied_bytes == 0 and plan.relocated_bytes == 0 and not plan.drops
    assert plan.lost_bytes == lower_bound(problem).lost_bytes == problem.lost_bytes
    assert plan.loaded_bytes == plan.lost_bytes + plan.replica_bytes
    copies = sum(move.num_units for move in plan.moves if move.family == KV) - len(problem.missing[KV])
    assert plan.replica_bytes == copies * problem.size(KV)
    for shard in plan.after.shards:
        for family in problem.families:
            kept = problem.slots[family][shard.device]
            assert shard[family][: len(kept)] == kept, "what survives stays in its slot"


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B", "Mixtral-8x22B"])
def test_makespan_reads_exactly_what_is_lost_where_devices_can_copy(name):
    plan = makespan(problem_of(SHAPES[name], ("gpu:3",), "dgx-h100"))
    assert plan.loaded_bytes == plan.lost_bytes and plan.copied_bytes == plan.replica_bytes
    assert predict(plan, preset("dgx-h100")).makespan_s <= plan.bound_s * 1.005


# ---------------------------------------------------------------------------------------------------- each change


def test_growing_fills_a_device_from_peers_and_host_at_once():
    shape, topology = SHAPES["Qwen3-30B-A3B"], preset("mi210-2x4")
    problem = Problem(units=shape, before=initial_layout(shape, GPUS[:7]), devices=GPUS, topology=topology)
    plan = makespan(problem)
    sources = {m.source.device if isinstance(m.source, FromPeer) else "host" for m in plan.moves_of("gpu:7")}
    assert "host" in sources and len(sources) > 3
    received = plan.bytes_by_device()
    assert received["gpu:7"] > 0.8 * sum(received.values()), "the others only pass q heads on, if that is sooner"
    alone = topology.link("root:1>gpu:7").bytes_per_s
    arriving = plan.bytes_by_device()["gpu:7"]
    assert predict(plan, topology).makespan_s < 0.5 * arriving / alone, "several links at once"


def test_a_lone_replacement_is_fed_over_the_links_of_the_others():
    """The host link of one device is 7 times slower than what all links can bring."""
    shape, topology = SHAPES["Llama-3.1-70B"], preset("dgx-h100")
    before = initial_layout(shape, GPUS)
    problem = Problem(units=shape, before=before.without(["gpu:3"]), devices=GPUS, topology=topology)
    plan = makespan(problem)
    assert any(len(move.route) > 3 for move in plan.moves_of("gpu:3")), "through another device"
    seconds = predict(plan, topology).makespan_s
    assert seconds < 0.2 * plan.bytes_by_device()["gpu:3"] / topology.link("root:0>gpu:3").bytes_per_s
    assert any("pass through" in reason for reason in plan.reasons)


def test_moving_to_other_nodes_leaves_the_old_ones_empty():
    shape, topology = SHAPES["Qwen3-8B"], preset("2-nodes-8")
    old, new = GPUS[:4], GPUS[4:]
    problem = Problem(units=shape, before=initial_layout(shape, old), devices=new, topology=topology)
    for policy in POLICIES.values():
        plan = policy(problem)
        assert reference.apply(plan) == plan.after and plan.after.devices == new
    assert makespan(problem).copied_bytes + makespan(problem).loaded_bytes >= shape.total_bytes


def test_the_first_load_is_a_plan_too():
    shape, topology = SHAPES["Qwen3-8B"], preset("dgx-h100")
    problem = Problem(units=shape, before=Layout(shards=()), devices=GPUS, topology=topology)
    plan = makespan(problem)
    assert reference.apply(plan) == plan.after
    assert plan.loaded_bytes == shape.total_bytes, "each byte is read once; copies are made between devices"
    filled = replace(problem, before=Layout(shards=tuple(empty_shard(d) for d in GPUS)))
    assert makespan(filled).after.devices == GPUS


def test_a_slower_device_gives_units_away():
    shape = SHAPES["Qwen3-8B"]
    problem = problem_of(shape, (), speeds={"gpu:2": 0.5})
    plan = makespan(problem)
    assert len(plan.after["gpu:2"][MLP]) * 1.8 < len(plan.after["gpu:0"][MLP])
    assert {drop.device for drop in plan.drops} >= {"gpu:2"}
    assert all(move.device != "gpu:2" or move.is_relocation for move in plan.moves if move.family == MLP)


def test_a_lost_expert_with_a_living_copy_is_not_loaded():
    shape = SHAPES["Mixtral-8x22B"]
    before = initial_layout(shape, GPUS)
    twice = before.with_shard(before["gpu:0"].appended(EXPERT, before["gpu:3"][EXPERT]))
    problem = replace(problem_of(shape, ("gpu:3",)), before=twice, memory_bytes=dict.fromkeys(GPUS, 1 << 50))
    assert not problem.missing[EXPERT]
    plan = makespan(problem)
    assert reference.apply(plan) == plan.after
    assert not any(
        move.family == EXPERT and move.source.kind == "host" and move.device == "gpu:0" for move in plan.moves
    )


def test_planes_come_from_replicas_then_mirror_else_are_replayed():
    shape = SHAPES["Qwen3-30B-A3B"]  # 4 KV heads on 8 devices: each is on two
    plane = shape.plane_bytes(10_000)
    one = makespan(problem_of(shape, ("gpu:3",), plane_bytes=plane))
    assert not one.replayed
    assert all(isinstance(m.source, FromPeer) for m in one.moves if m.family == PLANE)
    both = makespan(problem_of(shape, ("gpu:2", "gpu:3"), plane_bytes=plane))
    assert both.replayed == (1,) and not any(m.family == PLANE and m.unit == 1 for m in both.moves)
    mirrored = makespan(problem_of(shape, ("gpu:2", "gpu:3"), plane_bytes=plane, planes_at=("host",)))
    assert not mirrored.replayed
    assert any(m.family == PLANE and m.unit == 1 and m.source.kind == "host" for m in mirrored.moves)
    assert mirrored.lost_bytes == both.lost_bytes + plane


def test_a_device_without_a_link_to_the_host_is_reached_through_another():
    topology = preset("mi210-2x4").without({"root:0>gpu:1"})
    plan = makespan(problem_of(SHAPES["Qwen3-8B"], ("gpu:3",), topology))
    assert reference.apply(plan) == plan.after and plan.bytes_by_device()["gpu:1"] > 0
    assert any("gpu:1 has no way of its own" in reason for reason in plan.reasons)


# --------------------------------------------------------------------------------------------------------- limits


def test_a_shard_that_does_not_fit_is_refused_with_the_numbers():
    problem = problem_of(SHAPES["Mixtral-8x22B"], GPUS[2:], "mi210-2x4")
    with pytest.raises(DoesNotFit, match=r"gpu:0 would hold 140.6 GB \(140,6[\d,]* bytes\) .*is 64.0 GB \("):
        makespan(problem)


def weights_and_planes(problem: Problem, layout: Layout) -> dict[str, int]:
    return {s.device: problem.shard_bytes({f: len(s[f]) for f in problem.families}) for s in layout.shards}


@pytest.mark.parametrize("policy", ["greedy", "cmm", "units", "makespan"])
def test_where_memory_is_tight_the_moves_are_ordered(policy):
    """Every device has room for its new shard and little more; with intervals the third both gives and takes."""
    problem = problem_of(SHAPES["Qwen3-8B"], ("gpu:1",), uniform(GPUS[:4]), 4, plane_bytes=1 << 20)
    roomy = POLICIES[policy](problem)
    need = weights_and_planes(problem, roomy.after)
    problem = replace(problem, memory_bytes={d: n + (200 << 20) for d, n in need.items()})
    plan = POLICIES[policy](problem)
    assert reference.apply(plan) == plan.after
    used = weights_and_planes(problem, plan.before.without(problem.lost))
    for stage in range(plan.num_stages):
        steps = [move for move in plan.moves if move.stage == stage]
        for move in steps:
            used[move.device] += move.num_bytes
        assert all(used[d] <= problem.budget(d) for d in used), f"stage {stage}"
        for drop in plan.drops:
            if drop.stage == stage:
                planes = (drop.device, drop.unit) not in [(d, h) for d in used for h in plan.replayed]
                size = problem.size(drop.family) + (problem.plane_bytes if drop.family == KV and planes else 0)
                used[drop.device] -= drop.num_units * size
    if policy in ("greedy", "cmm"):
        assert roomy.num_stages <= 2 < plan.num_stages, "one stage and relocations, but for the memory"
    else:
        assert plan == replace(roomy, bound_s=plan.bound_s), "who only receives needs no order"


def test_where_no_order_fits_it_says_by_how_much():
    """Two full devices that are to swap what they hold."""
    problem = problem_of(SHAPES["Qwen3-8B"], (), uniform(GPUS[:2]), 2)
    full = weights_and_planes(problem, problem.before)
    swapped = replace(problem, before=_swapped(problem.before), memory_bytes=full)
    with pytest.raises(BudgetExceeded, match=r"gpu:0: 75.5 MB \(\S+ bytes\) more do not fit: (.+) of \1 are in use"):
        POLICIES["cmm"](swapped)
    assert not makespan(swapped).moves, "sets may stay where they are"


def _swapped(layout: Layout) -> Layout:
    first, second = layout.shards
    return Layout(shards=(replace(first, slots=second.slots), replace(second, slots=first.slots)))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"devices": ()}, DoesNotFit, "no device is left"),
        ({"devices": ("gpu:0", "gpu:0")}, ConfigError, "each once"),
        ({"devices": ("gpu:0", "gpu:9")}, ConfigError, "'gpu:9' is not in topology 'mi210-2x4'"),
        ({"lost": ("gpu:0",)}, ConfigError, "'gpu:0' cannot be lost"),
        ({"speeds": {"gpu:1": -1.0}}, ConfigError, "speed of gpu:1 is -1.0"),
        ({"plane_bytes": -1}, ConfigError, "plane_bytes is -1"),
        ({"weights_at": ("disk:9",)}, ConfigError, "'disk:9' is not in topology"),
    ],
)
def test_problems_that_contradict_themselves(more, error, message):
    shape = SHAPES["Qwen3-8B"]
    good = {"devices": GPUS[:7], "lost": ("gpu:7",)}
    with pytest.raises(error, match=message):
        Problem(units=shape, before=initial_layout(shape, GPUS), topology=preset("mi210-2x4"), **(good | more))


def test_more_devices_than_q_heads_are_refused():
    shape = replace(SHAPES["Qwen3-8B"], num_q_heads=4, num_kv_heads=2)
    with pytest.raises(DoesNotFit, match="5 devices, but the model has 4 q heads"):
        Problem(units=shape, before=Layout(shards=()), devices=GPUS[:5], topology=preset("mi210-2x4"))


# ------------------------------------------------------------------------------------------------ seen from outside


def test_compare_names_the_policies_whose_plan_does_not_fit():
    """Room for what balance asks for at the least, where interval cuts and whole KV heads ask for more."""
    shape = SHAPES["Qwen3-8B"]
    problem = replace(problem_of(shape, ("gpu:3",)), memory_bytes={"gpu:1": 2_350_000_000})
    rows = {row.policy: row for row in compare(problem)}
    assert list(rows) == list(POLICIES)
    assert isinstance(rows["makespan"], Row)
    refused = rows["reload"]
    assert isinstance(refused, Refused) and "gpu:1 would hold 2.4 GB" in refused.why
    nobody = compare(replace(problem, memory_bytes=dict.fromkeys(GPUS, 10**9)))
    assert all(isinstance(row, Refused) for row in nobody)


def test_no_plan_is_below_the_bound_that_is_shown():
    """Here `greedy` drops all copies of experts, and has less to load than any plan that keeps them."""
    rows = compare(random_problem(random.Random(101_176), fine=True, kind="shrink"))
    assert all(row.predicted_s >= row.bound.seconds > 0 for row in rows)
    best = next(row for row in rows if row.policy == "makespan").plan
    copies = {row.policy: sum(len(shard[EXPERT]) for shard in row.plan.after.shards) for row in rows}
    assert copies["greedy"] < copies["makespan"] == sum(len(shard[EXPERT]) for shard in best.after.shards)


def test_compare_puts_all_policies_side_by_side():
    rows = compare(problem_of(SHAPES["Qwen3-8B"], ("gpu:3",)))
    assert [row.policy for row in rows] == list(POLICIES)
    ours = rows[-1]
    assert ours.predicted_s == min(row.predicted_s for row in rows) >= ours.bound_s > 0
    assert len({row.bound_s for row in rows}) == 1
    assert rows[0].kept_bytes == 0 and ours.kept_bytes > 0.8 * SHAPES["Qwen3-8B"].total_bytes


def test_explain_says_where_a_unit_comes_from():
    plan = makespan(problem_of(SHAPES["Qwen3-8B"], ("gpu:3",), plane_bytes=1 << 20))
    lost = explain(plan, KV, 3)
    assert "was on gpu:3 alone, which is lost" in lost and "loads it from host" in lost
    assert "keeps it" in explain(plan, VOCAB, 0)
    assert "bytes" not in lost.split("·")[0], "it comes whole"


def test_explain_says_that_a_plane_without_a_source_is_replayed():
    """Both holders of KV head 1 are lost; with a mirror its plane is loaded, by those that need it alone."""
    shape = SHAPES["Qwen3-30B-A3B"]
    problem = problem_of(shape, ("gpu:2", "gpu:3"), plane_bytes=shape.plane_bytes(10_000))
    replayed = explain(makespan(problem), PLANE, 1)
    assert "was on gpu:2, gpu:3 alone, which are lost; no mirror has it" in replayed
    assert "keeps it" not in replayed and "loads it" not in replayed
    mirrored = explain(makespan(replace(problem, planes_at=("host",))), PLANE, 1)
    assert "it must come from a store" in mirrored and "loads it from host" in mirrored
    assert "replay" not in mirrored and "keeps it" not in mirrored


def test_explain_names_who_lets_go_and_what_comes_in_parts():
    """Growing: the new device takes q heads from others, and what is large over several links at once."""
    shape, topology = SHAPES["Qwen3-30B-A3B"], preset("mi210-2x4")
    plan = makespan(Problem(units=shape, before=initial_layout(shape, GPUS[:7]), devices=GPUS, topology=topology))
    drop = next(drop for drop in plan.drops if drop.family == ATTENTION)
    text = explain(plan, ATTENTION, drop.unit)
    assert f"{drop.device} lets go of it" in text and f"{drop.device} keeps it" not in text
    part = next(move for move in plan.moves if move.first_byte and move.family != KV)
    assert explain(plan, part.family, part.unit).count(f"{part.device} ") >= 2
    assert f"(bytes {part.first_byte} to " in explain(plan, part.family, part.unit)


def test_reasons_name_counts_devices_and_the_bound():
    reasons = " | ".join(makespan(problem_of(SHAPES["Qwen3-8B"], ("gpu:3",))).reasons)
    for text in ("attention: 4 unit(s) had no other holder", "forwarded by", "no plan can be ready before"):
        assert text in reasons
    nothing = makespan(problem_of(SHAPES["Qwen3-8B"], ()))
    assert not nothing.moves and "nothing has to pass a link" in nothing.reasons[-1]


def test_attention_stays_with_its_kv_heads():
    for seed in range(6):
        problem = random_problem(random.Random(seed), kind="irregular")
        for shard in makespan(problem).after.shards:
            assert set(shard[KV]) == problem.kv_heads(set(shard[ATTENTION]))
