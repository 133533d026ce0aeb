"""Every policy on random problems, against the slow reference that plays a plan and the bound that none may beat."""

from __future__ import annotations

import random

import pytest

from anchortp.errors import CapacityError
from anchortp.layout import initial_layout
from anchortp.plan import POLICIES, Problem, compare, lower_bound, makespan, predict, preset, reference, shape
from bench.planner_problems import random_problem

SEEDS = range(40)


def problem_of(seed: int) -> Problem:
    return random_problem(random.Random(seed))


def planned(policy: str, problem: Problem):
    """The plan, or None where the policy says with numbers that it does not fit."""
    try:
        return POLICIES[policy](problem)
    except CapacityError as error:
        assert any(character.isdigit() for character in str(error))
        return None


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_played_step_by_step_gives_exactly_the_new_layout(policy, seed):
    problem = problem_of(seed)
    plan = planned(policy, problem)
    if plan is None:
        return
    assert reference.apply(plan) == plan.after
    assert set(plan.after.devices) == set(problem.devices)
    assert plan.policy == policy
    again = planned(policy, problem_of(seed))
    assert again == plan, "not deterministic"


@pytest.mark.parametrize("policy", ["units", "makespan"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_plan_beats_the_bound(policy, seed):
    problem = problem_of(seed)
    plan = planned(policy, problem)
    if plan is None:
        return
    assert predict(plan, problem.topology).makespan_s >= lower_bound(problem).seconds * (1 - 1e-6)
    assert plan.loaded_bytes + plan.copied_bytes == plan.lost_bytes + plan.replica_bytes


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B", "Mixtral-8x22B"])
@pytest.mark.parametrize("lost", range(8))
def test_one_of_eight_lost_on_the_papers_machine(name, lost):
    """Sets of units load what was lost and copy nothing; the paper's planner fills one link with several times that."""
    topology, model = preset("mi210-2x4"), shape(name)
    devices = topology.devices[:8]
    problem = Problem(
        units=model,
        before=initial_layout(model, devices),
        devices=tuple(d for i, d in enumerate(devices) if i != lost),
        topology=topology,
        lost=(devices[lost],),
    )
    rows = {row.policy: row for row in compare(problem)}
    assert rows["units"].copied_bytes == 0
    assert rows["units"].plan.loaded_bytes - rows["units"].plan.replica_bytes == problem.lost_bytes
    best = min(row.predicted_s for row in rows.values())
    assert rows["makespan"].predicted_s <= best * 1.001
    assert rows["makespan"].predicted_s <= rows["makespan"].bound_s * 1.10
    assert rows["cmm"].predicted_s > 2 * rows["makespan"].predicted_s
    assert makespan(problem) == rows["makespan"].plan
