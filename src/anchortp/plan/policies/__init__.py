"""Planners, each `Problem -> Plan`, so that they can be compared. `makespan` is the one to use."""

from collections.abc import Callable

from anchortp.plan.plan import Plan
from anchortp.plan.policies.intervals import cmm, greedy, reload
from anchortp.plan.policies.makespan import makespan
from anchortp.plan.policies.units import units
from anchortp.plan.problem import Problem

Policy = Callable[[Problem], Plan]
POLICIES: dict[str, Policy] = {
    "reload": reload,
    "greedy": greedy,
    "cmm": cmm,
    "units": units,
    "makespan": makespan,
}

__all__ = ["POLICIES", "Policy", "cmm", "greedy", "makespan", "reload", "units"]
