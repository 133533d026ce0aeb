"""How good and how fast the expert load balancer is: `python -m bench.eplb`.

1. Time of one decision on one core: 61 layers of 256 experts on 32 devices with 9 slots a layer each, from a placement
   without replicas and from nothing; search, choice of what is worth it and stages included.
2. Balance against the algorithm that DeepSeek published (`eplb_reference`), layer by layer, so that no layer borrows
   slots of another: slowest device over mean. The published placement with even shares; the same with its shares
   fitted as ours are; ours from nothing, as the published one is; and ours live, from a placement without replicas,
   by copies that find a free slot (of 8 slots for 8 experts none is free).
3. Small cases against the best of all placements (brute force).
4. The paper's changes as modelled step time of the experts: Mixtral 8→7 and 4→3, without replicas and with.

The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table

from anchortp.eplb import Limits, Placement, Rebalance, rebalance
from bench.common import conditions, console, finish, spread
from bench.eplb_reference import Floats, brute_force, even_placement, published

GOAL_MS = 100.0
Cases = tuple[tuple[int, int, int], ...]  # experts, devices, slots per device and layer
CASES: Cases = ((256, 32, 9), (256, 32, 8), (128, 8, 17), (64, 16, 6), (8, 7, 2), (8, 3, 3))
SMALL = ((4, 2, 3), (5, 3, 2), (4, 3, 2), (5, 2, 3), (6, 2, 4), (6, 3, 3))


def workloads(seed: int, num_layers: int, num_experts: int) -> Iterator[tuple[str, Floats]]:
    """Choices per expert `[num_layers, num_experts]`. The last three are made to hurt."""
    rng = np.random.default_rng(seed)
    shape = (num_layers, num_experts)
    rank = np.arange(1, num_experts + 1)
    for power in (0.5, 1.0, 1.5):
        yield f"zipf {power}", rng.permuted(np.tile(1000 * rank**-power, (num_layers, 1)), axis=1)
    yield "uniform", rng.random(shape)
    yield "lognormal", rng.lognormal(0, 1, shape)
    places = rng.random(shape).argsort(axis=1)
    yield "one hot", np.where(places == 0, 1000.0, 1.0)
    yield "few hot", np.where(places <= num_experts // 28, 100.0, 1.0)
    yield "equal", np.ones(shape)


def to_placement(lists: list[list[int]], num_experts: int) -> Placement:
    """One layer. Of two replicas of an expert on one device (the published packing allows that) one is enough."""
    held = np.zeros((1, len(lists), num_experts), dtype=bool)
    count = np.zeros(held.shape)
    for device, experts in enumerate(lists):
        for expert in experts:
            held[0, device, expert] = True
            count[0, device, expert] += 1
    return Placement(
        devices=tuple(f"gpu:{i}" for i in range(len(lists))), held=held, shares=count / count.sum(axis=1, keepdims=True)
    )


def stacked(layers: list[Placement]) -> Placement:
    held, shares = (np.concatenate([getattr(layer, name) for layer in layers]) for name in ("held", "shares"))
    return Placement(devices=layers[0].devices, held=held, shares=shares)


def limits(placement: Placement, per_layer: int, **more: Any) -> Limits:
    slots = dict.fromkeys(placement.devices, per_layer * placement.num_layers)
    return Limits(slots=slots, **{"seconds_per_choice": 1e-6, "min_gain": 0.0, **more})


def balanced(loads: Floats, start: Placement, per_device: int, **more: Any) -> Rebalance:
    return rebalance(loads, start, limits(start, per_device, **more), unit_bytes=1)


def decision_times(repeats: int, seed: int) -> list[dict[str, Any]]:
    results = []
    for name, loads in workloads(seed, 61, 256):
        single = stacked([to_placement(even_placement(256, 32), 256)] * 61)
        nothing = Placement(devices=single.devices, held=single.held & False, shares=single.shares * 0)
        for begin, start in (("no replicas", single), ("nothing", nothing)):
            wall, cpu, answer = [], [], None
            for _ in range(repeats + 1):
                began, began_cpu = time.perf_counter(), time.process_time()
                answer = balanced(loads, start, 9)
                cpu.append((time.process_time() - began_cpu) * 1e3)
                wall.append((time.perf_counter() - began) * 1e3)
            results.append(
                {
                    "loads": name,
                    "from": begin,
                    "wall_ms": spread(wall[1:]),
                    "cpu_ms": spread(cpu[1:]),
                    "copies_per_layer": len(answer.copies) / 61,
                    "imbalance_before": answer.imbalance_before,
                    "imbalance_after": answer.imbalance_after,
                }
            )
    return results


def against_published(num_layers: int, seed: int, cases: Cases = CASES) -> list[dict[str, Any]]:
    results = []
    for num_experts, num_devices, per_device in cases:
        for name, loads in workloads(seed, num_layers, num_experts):
            before, even, fitted, ours, live, copies = [], [], [], [], [], []
            single = to_placement(even_placement(num_experts, num_devices), num_experts)
            for layer in loads:
                theirs = to_placement(published(layer, num_devices, num_devices * per_device), num_experts)
                only_shares = balanced(layer[None], theirs, 0, seconds_per_byte=1e12)
                nothing = Placement(devices=single.devices, held=single.held & False, shares=single.shares * 0)
                answer = balanced(layer[None], single, per_device)
                before.append(answer.imbalance_before)
                even.append(only_shares.imbalance_before)
                fitted.append(only_shares.imbalance_after)
                ours.append(balanced(layer[None], nothing, per_device).imbalance_after)
                live.append(answer.imbalance_after)
                copies.append(len(answer.copies))
            results.append(
                {
                    "experts": num_experts,
                    "devices": num_devices,
                    "slots_per_device": per_device,
                    "loads": name,
                    "no_replicas": float(np.mean(before)),
                    "published": float(np.mean(even)),
                    "published_fitted": float(np.mean(fitted)),
                    "ours": float(np.mean(ours)),
                    "ours_live": float(np.mean(live)),
                    "live_copies": float(np.mean(copies)),
                }
            )
    return results


def against_brute_force(num_cases: int, seed: int) -> list[dict[str, Any]]:
    results = []
    for num_experts, num_devices, per_device in SMALL:
        rng = np.random.default_rng(seed)
        gaps, live, theirs = [], [], []
        for i in range(num_cases):
            loads = rng.lognormal(0, 1, num_experts) if i % 2 else rng.random(num_experts)
            best = brute_force(loads, np.ones(num_devices), (per_device,) * num_devices)
            single = to_placement(even_placement(num_experts, num_devices), num_experts)
            nothing = Placement(devices=single.devices, held=single.held & False, shares=single.shares * 0)
            gaps.append(balanced(loads[None], nothing, per_device).step_s_after * 1e6 / best - 1)
            live.append(balanced(loads[None], single, per_device).step_s_after * 1e6 / best - 1)
            placement = to_placement(published(loads, num_devices, num_devices * per_device), num_experts)
            theirs.append((placement.shares[0] @ loads).max() / best - 1)
        results.append(
            {
                "experts": num_experts,
                "devices": num_devices,
                "slots_per_device": per_device,
                "mean": float(np.mean(gaps)),
                "max": float(np.max(gaps)),
                "optimal": float(np.mean(np.array(gaps) < 1e-3)),
                "live_mean": float(np.mean(live)),
                "published_mean": float(np.mean(theirs)),
            }
        )
    return results


def after_a_loss(seed: int) -> list[dict[str, Any]]:
    """56 layers of 8 experts, one replica each after the recovery, then what spare slots bring."""
    results = []
    for num_devices in (7, 3):
        loads = np.random.default_rng(seed).dirichlet(np.full(8, 4.0), 56) * 1000
        single = stacked([to_placement(even_placement(8, num_devices), 8)] * 56)
        needed = -(-8 // num_devices)
        for per_device in (needed, needed + 1):
            answer = balanced(loads, single, per_device)
            results.append(
                {
                    "devices": num_devices,
                    "slots_per_device": per_device,
                    "imbalance_before": answer.imbalance_before,
                    "imbalance_after": answer.imbalance_after,
                    "experts_faster": answer.step_s_before / answer.step_s_after - 1,
                    "copies": len(answer.copies),
                }
            )
    return results


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        values = [value["median"] if isinstance(value, dict) else value for value in row.values()]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=11, help="decisions per timed case")
    parser.add_argument("--layers", type=int, default=12, help="layers of each case that is compared")
    parser.add_argument("--small", type=int, default=40, help="cases per shape for brute force")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = conditions()
    times = decision_times(args.repeats, args.seed)
    show(f"one decision, 61 layers x 256 experts on 32 devices (goal {GOAL_MS:.0f} ms)", times)
    balance = against_published(args.layers, args.seed)
    show("slowest device over mean", balance)
    small = against_brute_force(args.small, args.seed)
    show("above the best of all placements", small)
    loss = after_a_loss(args.seed)
    show("56 layers of 8 experts after a loss", loss)
    finish(
        {
            "bench": "eplb",
            "conditions": began,
            "seed": args.seed,
            "goal_ms": GOAL_MS,
            "decision": times,
            "balance": balance,
            "brute_force_gap": small,
            "after_a_loss": loss,
        }
    )


if __name__ == "__main__":
    main()
