"""`makespan`: the last device is ready as early as the links allow. The planner to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchortp.layout import EXPERT
from anchortp.plan.assemble import assemble
from anchortp.plan.bound import LARGE, Sizes, lower_bound, price_bound, sizes_of
from anchortp.plan.deliver import Delivery, deliver, floor_s
from anchortp.plan.improve import changed, changes
from anchortp.plan.loads import into
from anchortp.plan.placement import interval_heads, place
from anchortp.plan.plan import Plan
from anchortp.plan.problem import Problem
from anchortp.plan.reasons import reasons
from anchortp.plan.widths import best_widths

NEAR = 2e-3  # relative distance to the bound at which the search stops
FAR = 1.02  # times the bound from which on more is tried, and another cut of the heads
WORTH = 1 - 1e-4  # a change must bring the time down to this part of it
MAX_WORK = 3 * 8**2  # placements that are tried, times what one costs: about the square of the number of devices,
UNITS_PER_WORK = 30  # and a bit for each expert; where units are many and small, odd ones matter less anyway


def makespan(problem: Problem) -> Plan:
    """Survivors keep what they hold unless balance forbids it (or, when devices join or leave, time is won by passing
    units on). Of what must move, sources, routes and destinations are chosen so that the fullest link is as little
    full as possible:

    1. `placement.py` decides who receives how much; only the odd unit is open to choice.
    2. `deliver.py` and `routing.py` split the bytes over replicas, released copies, stores and routes: exact.
    3. The prices of the links that come with it bound what *any* plan can reach (`bound.py`). If that is near, done.
    4. If it is more than 2 % away, the widths of all families and layers are chosen anew by the links (`widths.py`).
    5. Odd units are shifted from devices that are dear to reach to cheap ones, alone or in exchange for one of
       another size or layer; devices give up one more unit if that is a source worth having; and q heads are exchanged
       (`improve.py`): first what by the prices would just close the gap. What helps is kept.

    Source: this project; the programme of step 2 is the maximum concurrent flow problem (Shahrokhi and Matula
    1990), the bound of step 3 its dual.
    """
    best = _search(problem)
    kept, pieces = best.delivery.kept, best.delivery.pieces()
    return assemble(
        problem,
        policy="makespan",
        kept=kept,
        pieces=pieces,
        replayed=best.delivery.replayed,
        bound_s=best.bound_s,
        reasons=(*reasons(problem, kept, pieces), _bound_reason(best)),
    )


def _bound_reason(best: _Best) -> str:
    if best.bound_s <= 0.0:
        return "nothing has to pass a link"
    over = best.seconds / best.bound_s - 1
    return f"no plan can be ready before {best.bound_s * 1e3:.4g} ms ({best.why}); this one is {over:.2%} above that"


@dataclass(slots=True)
class _Best:
    problem: Problem
    sizes: Sizes
    delivery: Delivery
    bound_s: float
    why: str

    def raise_bound(self, prices: Sequence[float]) -> None:
        seconds = price_bound(self.problem, prices, self.sizes, by_layer=self.is_far)
        if seconds > self.bound_s:
            self.bound_s, self.why = seconds, "by the prices of the links"

    @property
    def seconds(self) -> float:
        return self.delivery.routing.seconds

    @property
    def is_near(self) -> bool:
        return self.seconds <= self.bound_s * (1 + NEAR)

    @property
    def is_far(self) -> bool:
        return self.seconds > self.bound_s * FAR


def _search(problem: Problem) -> _Best:
    delivery, prices = _delivery(problem)
    sizes = sizes_of(problem, delivery.placement)
    bound = lower_bound(problem, sizes)
    best = _Best(problem, sizes, delivery, bound.seconds, bound.why)
    if prices and not best.is_near:
        best.raise_bound(prices)
    if not best.is_near:
        best.raise_bound(best.delivery.routing.prices)
    if best.is_far:
        best.delivery = _with_all_widths(problem, best.delivery)
    cost = len(problem.devices) ** 2 + problem.units.num_units.get(EXPERT, 0) // UNITS_PER_WORK
    tries = MAX_WORK // cost * (8 if best.is_far else 1)
    while not best.is_near and tries > 0:
        tries -= _step(problem, best, tries)
        if tries > 0:
            best.raise_bound(best.delivery.routing.prices)
    if best.is_far:
        best.delivery = _with_intervals(problem, best.delivery)
    # Where layers force it, all layers together may be less even than the bound assumes.
    best.bound_s = min(best.bound_s, best.seconds)
    return best


def _delivery(problem: Problem) -> tuple[Delivery, Sequence[float]]:
    """The best of the placements that one look at the links leads to; if no living device gives anything up, that is
    one. And the prices of the links, if they were found on the way."""
    slow, prices = into(problem), ()
    best = deliver(problem, place(problem, slow))
    if len(set(slow.values())) > 1:  # else it is what `units` has, and no worse
        best = _sooner(best, deliver(problem, place(problem, dict.fromkeys(slow, 1.0)), best.routing.seconds))
    found = best_widths(problem, best.placement)
    if found is not None:
        widths, prices = found
        best = _sooner(best, deliver(problem, place(problem, slow, widths)))
    return _with_intervals(problem, best) if best.placement.head_holder else best, prices


def _with_all_widths(problem: Problem, best: Delivery) -> Delivery:
    found = best_widths(problem, best.placement, thorough=True)
    if found is None:
        return best
    return _sooner(best, deliver(problem, place(problem, into(problem), found[0]), best.routing.seconds))


def _with_intervals(problem: Problem, best: Delivery) -> Delivery:
    """The same with the q heads in intervals, if that is sooner; hardly where more KV heads would have to be copied,
    and not worth a look where each head is a small part."""
    other = interval_heads(problem, best.placement)
    copies, before = (sum(map(len, p.kv.values())) for p in (other, best.placement))
    if copies > before or len(problem.devices) > LARGE:
        return best
    return _sooner(best, deliver(problem, other, best.routing.seconds))


def _sooner(a: Delivery, b: Delivery) -> Delivery:
    """`b` if that is worth a change."""
    return b if b.routing.seconds < a.routing.seconds * WORTH else a


def _step(problem: Problem, best: _Best, tries: int) -> int:
    """Takes the first change that helps. Returns how many were tried (where the bound is far: in vain); all of `tries`
    if none helps."""
    prices = best.delivery.routing.prices
    placement, aim = best.delivery.placement, best.seconds - best.bound_s
    for spent, change in enumerate(changes(problem, placement, prices, aim, thorough=best.is_far)[:tries], 1):
        other, enough_s = changed(problem, placement, change), best.seconds * WORTH
        if floor_s(problem, other, prices) < enough_s:
            delivery = deliver(problem, other, enough_s)
            if delivery.routing.seconds < enough_s:
                best.delivery = delivery
                return spent - best.is_far
    return tries
