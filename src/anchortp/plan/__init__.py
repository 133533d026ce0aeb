"""What must move: problems, plans as values, the policies that make them, and what they cost. Pure: no torch, no
IO, no clock. (numpy is imported by the first plan that needs it, not with this package.)"""

from anchortp.plan.bound import Bound, lower_bound
from anchortp.plan.change import fill_plan, plan_change
from anchortp.plan.compare import Refused, Row, compare
from anchortp.plan.cost import Busy, Critical, Flow, Timeline, predict
from anchortp.plan.explain import explain
from anchortp.plan.plan import PLANE, REPLICATED, Drop, FromHost, FromPeer, Move, Plan, moves_between
from anchortp.plan.policies import POLICIES, Policy, makespan
from anchortp.plan.problem import Experts, Problem
from anchortp.plan.rates import Rates
from anchortp.plan.shapes import PAPER_MODELS, SHAPES, Shape, shape, shape_from_config
from anchortp.plan.topology import (
    PRESETS,
    Link,
    Place,
    Topology,
    TopologyError,
    local,
    parse_topology,
    preset,
)

__all__ = [
    "PAPER_MODELS",
    "PLANE",
    "POLICIES",
    "PRESETS",
    "REPLICATED",
    "SHAPES",
    "Bound",
    "Busy",
    "Critical",
    "Drop",
    "Experts",
    "Flow",
    "FromHost",
    "FromPeer",
    "Link",
    "Move",
    "Place",
    "Plan",
    "Policy",
    "Problem",
    "Rates",
    "Refused",
    "Row",
    "Shape",
    "Timeline",
    "Topology",
    "TopologyError",
    "compare",
    "explain",
    "fill_plan",
    "local",
    "lower_bound",
    "makespan",
    "moves_between",
    "parse_topology",
    "plan_change",
    "predict",
    "preset",
    "shape",
    "shape_from_config",
]
