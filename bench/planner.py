"""How fast the planner plans, and how near to the best possible: `python -m bench.planner`.

1. Planning time on one core, a new problem each time, census of the layout included: the two MoE models of the paper
   at 8→7 with an expert of a layer as unit, and 61 layers of 256 experts at 64→63.
2. Random problems of all kinds (`planner_problems`) against a linear programme solved by HiGHS
   (`planner_reference`): how far the predicted time is above the bound, whether any other policy is faster, and
   whether every plan, played by the slow reference, gives the layout that it promises. HiGHS is asked only where the
   planner's own bound leaves more than 2 %. Both split units between devices; where a plan is more than 2 % above
   both, HiGHS is asked what whole units can reach.

The last line on stdout is one JSON document. `python -m bench.planner_docs` writes the table of docs/planner.md.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from anchortp.layout import EXPERT, initial_layout
from anchortp.plan import POLICIES, SHAPES, Plan, Problem, Topology, makespan, predict, preset, reference
from anchortp.plan.topology import cluster
from bench.common import conditions, console, finish, spread
from bench.planner_problems import KINDS, random_problem

GOALS_MS = {"Mixtral-8x22B": 10.0, "Qwen3-30B-A3B": 10.0, "deepseek-v3-like": 100.0}
NEAR = 0.02  # of the bound: the goal
HIGHS_S = 60.0  # for one programme
PAGE = 1e-4  # relative; bytes are divided at whole pages, which two plans do differently


def timed_cases() -> Iterator[tuple[str, Topology]]:
    for model in ("Mixtral-8x22B", "Qwen3-30B-A3B"):
        for name in ("mi210-2x4", "dgx-h100"):
            yield model, preset(name)
    yield "deepseek-v3-like", cluster(8, 8)


def planning_times(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per plan: wall clock, and the processor time of this process, which other load does not change."""
    results = []
    for model, topology in timed_cases():
        shape, lost = SHAPES[model], (topology.devices[3],)
        before = initial_layout(shape, topology.devices)
        survivors = tuple(device for device in topology.devices if device not in lost)
        wall, cpu, plan = [], [], None
        for _ in range(repeats + 1):
            problem = Problem(
                units=shape,
                before=before,
                devices=survivors,
                topology=topology,
                lost=lost,
                memory_bytes=dict.fromkeys(topology.devices, 1 << 50),
            )
            began, began_cpu = time.perf_counter(), time.process_time()
            plan = makespan(problem)
            cpu.append((time.process_time() - began_cpu) * 1e3)
            wall.append((time.perf_counter() - began) * 1e3)
        results.append(
            {
                "model": model,
                "topology": topology.name,
                "change": f"{len(before.devices)}→{len(survivors)}",
                "num_units": sum(shape.num_units.values()),
                "wall_ms": spread(wall[1:]),  # the first imports numpy
                "cpu_ms": spread(cpu[1:]),
                "goal_ms": GOALS_MS[model],
                "predicted_s": predict(plan, topology).makespan_s,
                "bound_s": plan.bound_s,
            }
        )
    return results


def gaps(num_problems: int, seed: int, *, fine: bool) -> dict[str, Any]:
    """How far above the bound, by kind of change; and what went wrong, which should be nothing.

    `fine`: units so small that it hardly matters that the bound splits them; else units as large as in real models on
    few devices, where part of the distance is the bound's.
    """
    from bench.planner_reference import Unsolved, lp_bound

    by_kind: dict[str, list[float]] = {kind: [] for kind in sorted(set(KINDS))}
    worse, wrong, unsolved, far = [], [], [], []
    for number in range(num_problems):
        kind = KINDS[number % len(KINDS)]
        rng = random.Random(seed + number)
        # Copies of experts beside other changes than a loss leave choices that only rebalancing them would use.
        problem = random_problem(rng, fine=fine, kind=kind, copies=None if kind == "shrink" else False)
        plans = {name: policy(problem) for name, policy in POLICIES.items()}
        seconds = {name: predict(plan, problem.topology).makespan_s for name, plan in plans.items()}
        wrong += [(number, name) for name, plan in plans.items() if reference.apply(plan) != plan.after]
        ours = plans["makespan"]
        bound = ours.bound_s
        if seconds["makespan"] > bound * (1 + NEAR):
            try:
                bound = max(bound, lp_bound(problem, ours.after, time_limit_s=HIGHS_S))
            except Unsolved:
                unsolved.append(number)
        by_kind[kind].append(seconds["makespan"] / bound - 1 if bound > 0 else 0.0)
        if by_kind[kind][-1] > NEAR and not _is_best(problem, ours, seconds["makespan"]):
            far.append((number, by_kind[kind][-1]))
        worse += [
            (number, name)
            for name, plan in plans.items()
            if seconds[name] < seconds["makespan"] * (1 - PAGE) and _brings_as_much(plan, ours)
        ]
    every = [gap for found in by_kind.values() for gap in found]
    return {
        "num_problems": num_problems,
        "fine": fine,
        "seed": seed,
        "within_2_percent": sum(gap <= NEAR for gap in every) / max(1, len(every)),
        "within_2_percent_of_whole_units": 1 - len(far) / max(1, len(every)),
        "neither": far,
        "mean": sum(every) / max(1, len(every)),
        "by_kind": {
            kind: {
                "n": len(found),
                "mean": sum(found) / len(found),
                "max": max(found),
                "above_2_percent": sum(gap > NEAR for gap in found),
            }
            for kind, found in by_kind.items()
            if found
        },
        "unsolved_by_highs": unsolved,  # counted with the planner's own bound
        "another_policy_was_faster": worse,
        "another_layout_than_promised": wrong,
    }


def _brings_as_much(plan: Plan, ours: Plan) -> bool:
    """As many KV planes and copies of experts. (The policies with intervals drop all second copies.)"""
    copies = [sum(len(shard[EXPERT]) for shard in found.after.shards) for found in (plan, ours)]
    return len(plan.replayed) <= len(ours.replayed) and copies[0] >= copies[1]


def _is_best(problem: Problem, plan: Plan, seconds: float) -> bool:
    """Whether HiGHS proves within its time that no plan of whole units is faster by more than 2 %."""
    from bench.planner_reference import Unsolved, lp_bound

    try:
        return seconds <= lp_bound(problem, plan.after, integral=True, time_limit_s=HIGHS_S) * (1 + NEAR)
    except Unsolved:
        return False


def show_times(times: list[dict[str, Any]]) -> None:
    table = Table(title="planning time, one core")
    for column in ("model", "topology", "change", "units", "median ms", "goal ms", "plan / bound"):
        table.add_column(column)
    for row in times:
        table.add_row(
            row["model"],
            row["topology"],
            row["change"],
            str(row["num_units"]),
            f"{row['wall_ms']['median']:.1f}",
            f"{row['goal_ms']:.0f}",
            f"{row['predicted_s'] / row['bound_s']:.4f}",
        )
    console().print(table)


def show_gaps(near: dict[str, Any]) -> None:
    size = "small" if near["fine"] else "large"
    table = Table(title=f"above the bound, {near['num_problems']} random problems with {size} units")
    for column in ("change", "problems", "mean", "most", "above 2 %"):
        table.add_column(column)
    for kind, row in near["by_kind"].items():
        table.add_row(kind, str(row["n"]), f"{row['mean']:.3%}", f"{row['max']:.2%}", str(row["above_2_percent"]))
    console().print(table)
    whole = near["within_2_percent_of_whole_units"]
    console().print(f"within 2 %: {near['within_2_percent']:.1%}; of what whole units can reach: {whole:.1%}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21, help="plans per timed case")
    parser.add_argument("--problems", type=int, default=400, help="random problems; 0.15 s each")
    parser.add_argument("--coarse", type=int, default=100, help="random problems with large units")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = conditions()
    times = planning_times(args.repeats)
    show_times(times)
    fine = gaps(args.problems, args.seed, fine=True)
    coarse = gaps(args.coarse, args.seed, fine=False)
    for found in (fine, coarse):
        if found["num_problems"]:
            show_gaps(found)
    finish({"bench": "planner", "conditions": began, "planning": times, "gap": fine, "gap_large_units": coarse})


if __name__ == "__main__":
    main()
