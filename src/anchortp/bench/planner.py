"""`anchortp bench planner`: every policy on the changes of the paper, predicted and timed. No process is started."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anchortp.layout import initial_layout
from anchortp.plan import POLICIES, SHAPES, Problem, predict, preset
from anchortp.plan.topology import Topology

# (devices before, ranks lost): one device, and two of one group, as the paper has them.
CHANGES = ((8, (3,)), (8, (6, 7)), (4, (2,)), (4, (2, 3)))
TOPOLOGIES = ("mi210-2x4", "dgx-h100")
MEMORY_BYTES = 1 << 50  # memory is not what is compared


def run(models: Sequence[str], repeats: int, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One row per model, topology, change and policy. `planning_ms`: the median of `repeats`, after a first one.

    Raises KeyError for a model that `anchortp.plan.SHAPES` has not.
    """
    for model in models:
        tell(model)
        for name in TOPOLOGIES:
            topology = preset(name)
            for num_devices, lost in CHANGES:
                yield from _rows(model, topology, num_devices, lost, repeats)


def _rows(
    model: str, topology: Topology, num_devices: int, lost: tuple[int, ...], repeats: int
) -> Iterator[dict[str, Any]]:
    devices = topology.devices[:num_devices]
    gone = tuple(devices[rank] for rank in lost)
    survivors = tuple(device for device in devices if device not in gone)
    before = initial_layout(SHAPES[model], devices)
    for policy, plan_by in POLICIES.items():
        times = []
        for _ in range(repeats + 1):
            problem = Problem(
                units=SHAPES[model],
                before=before,
                devices=survivors,
                topology=topology,
                lost=gone,
                memory_bytes=dict.fromkeys(devices, MEMORY_BYTES),
            )
            began_s = time.perf_counter()
            plan = plan_by(problem)
            times.append(1e3 * (time.perf_counter() - began_s))
        yield {
            "model": model,
            "topology": topology.name,
            "change": f"{num_devices}→{len(survivors)}",
            "lost": list(gone),
            "policy": policy,
            "predicted_s": predict(plan, topology).makespan_s,
            "loaded_bytes": plan.loaded_bytes,
            "copied_bytes": plan.copied_bytes,
            "planning_ms": statistics.median(times[1:]),
        }
