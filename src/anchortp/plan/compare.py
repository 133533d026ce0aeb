"""All policies on one problem, side by side, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from anchortp.errors import CapacityError
from anchortp.plan.bound import Bound, lower_bound
from anchortp.plan.cost import Timeline, predict
from anchortp.plan.plan import PLANE, Plan
from anchortp.plan.policies import POLICIES
from anchortp.plan.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy's plan and its figures. Bytes; `kept_bytes` are weights of the new layout that nobody sends.

    `bound` is the same for all rows: the largest lower bound that is known.
    """

    policy: str
    plan: Plan
    timeline: Timeline
    kept_bytes: int
    bound: Bound

    @property
    def bound_s(self) -> float:
        return self.bound.seconds

    @property
    def loaded_bytes(self) -> int:
        return self.plan.loaded_bytes

    @property
    def copied_bytes(self) -> int:
        return self.plan.copied_bytes

    @property
    def predicted_s(self) -> float:
        return self.timeline.makespan_s

    @property
    def busiest_link(self) -> str:
        busiest = self.timeline.busiest
        return busiest.link if busiest else ""

    @property
    def busiest_bytes(self) -> int:
        busiest = self.timeline.busiest
        return busiest.num_bytes if busiest else 0


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A policy whose plan does not fit into the memory that there is; `why` has the numbers."""

    policy: str
    why: str


def compare(problem: Problem, policies: Sequence[str] | None = None) -> list[Row | Refused]:
    """One for each policy, in the order of `POLICIES`."""
    found: dict[str, Plan | Refused] = {}
    for name in policies or POLICIES:
        try:
            found[name] = POLICIES[name](problem)
        except CapacityError as error:
            found[name] = Refused(policy=name, why=str(error))
    plans = {name: plan for name, plan in found.items() if isinstance(plan, Plan)}
    timelines = {name: predict(plan, problem.topology) for name, plan in plans.items()}
    bound = _best_bound(problem, plans.values(), timelines.values())
    return [
        Row(
            policy=name,
            plan=plan,
            timeline=timelines[name],
            kept_bytes=_kept_bytes(problem, plan),
            bound=bound,
        )
        if isinstance(plan, Plan)
        else plan
        for name, plan in found.items()
    ]


def _best_bound(problem: Problem, plans: Iterable[Plan], timelines: Iterable[Timeline]) -> Bound:
    """The bound in closed form, or the one that `makespan` came upon. Both are of layouts with as many copies of
    experts as can stay; a plan that drops them all may have less to load."""
    bound = lower_bound(problem)
    known_s = max((plan.bound_s for plan in plans), default=0.0)
    if known_s > bound.seconds:
        bound = replace(bound, seconds=known_s, why="by the prices of the links")
    return replace(bound, seconds=min([bound.seconds, *(timeline.makespan_s for timeline in timelines)]))


def _kept_bytes(problem: Problem, plan: Plan) -> int:
    held = sum(plan.after.weight_bytes(problem.units, device) for device in plan.after.devices)
    return held - sum(m.num_bytes for m in plan.moves if m.family != PLANE and not m.is_relocation)
