"""`units`: ownership by sets of units (design, idea 4). Least bytes, evenly spread, nothing copied between devices."""

from __future__ import annotations

from anchortp.layout import KV
from anchortp.plan.assemble import assemble
from anchortp.plan.deliver import Item, fixed_pieces, items_of
from anchortp.plan.placement import place
from anchortp.plan.plan import PLANE, Plan
from anchortp.plan.problem import Problem


def units(problem: Problem) -> Plan:
    """Survivors keep every unit they hold; what is missing is spread evenly and read from the nearest store, each
    device over its own way. Only KV planes, which no checkpoint holds, may come from another device.

    Source: this project. It reads exactly the lost bytes (plus the KV heads that the new cut splits), which is the
    least that any planner can read, and does not look at links: on links that differ it waits for the slowest.
    """
    placement = place(problem, dict.fromkeys(problem.devices, 1.0))
    items, kept, replayed = items_of(problem, placement)
    stores = tuple(
        Item(i.family, i.device, i.units, _holders(problem, i) if i.family == PLANE else problem.stores) for i in items
    )
    return assemble(
        problem,
        policy="units",
        kept=kept,
        pieces=fixed_pieces(problem, stores),
        replayed=replayed,
        reasons=("what survives stays where it is; what is lost is spread evenly and read from the nearest store",),
    )


def _holders(problem: Problem, item: Item) -> tuple[str, ...]:
    holders = problem.holders(KV, item.units[0])
    return holders or problem.planes_at
