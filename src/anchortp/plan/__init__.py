"""What must move: plans as values, and the policies that make them. Pure: no torch, no IO, no clock."""

from anchortp.plan.plan import FromHost, FromPeer, Move, Plan, moves_between
from anchortp.plan.shrink import fill_plan, shrink_plan

__all__ = ["FromHost", "FromPeer", "Move", "Plan", "fill_plan", "moves_between", "shrink_plan"]
