"""All policies on one problem, side by side, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchortp.plan.bound import lower_bound
from anchortp.plan.cost import Timeline, predict
from anchortp.plan.plan import PLANE, Plan
from anchortp.plan.policies import POLICIES
from anchortp.plan.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy's plan and its figures. Bytes; `kept_bytes` are weights of the new layout that nobody sends.

    `bound_s` is the same for all rows: the largest lower bound that is known.
    """

    policy: str
    plan: Plan
    timeline: Timeline
    kept_bytes: int
    bound_s: float

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


def compare(problem: Problem, policies: Sequence[str] | None = None) -> list[Row]:
    """A row per policy, in the order of `POLICIES`. Raises what the policies raise (DoesNotFit)."""
    plans = [POLICIES[name](problem) for name in policies or POLICIES]
    bound_s = max([lower_bound(problem).seconds, *(plan.bound_s for plan in plans)])
    return [
        Row(
            policy=plan.policy,
            plan=plan,
            timeline=predict(plan, problem.topology),
            kept_bytes=_kept_bytes(problem, plan),
            bound_s=bound_s,
        )
        for plan in plans
    ]


def _kept_bytes(problem: Problem, plan: Plan) -> int:
    held = sum(plan.after.weight_bytes(problem.units, device) for device in plan.after.devices)
    return held - sum(m.num_bytes for m in plan.moves if m.family != PLANE and not m.is_relocation)
