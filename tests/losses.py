"""What tests of layouts, weights and models do when devices are lost."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from anchortp.layout import Layout, ModelUnits
from anchortp.plan import POLICIES, Plan, plan_change


def after_loss(
    units: ModelUnits, layout: Layout, lost: Collection[str], speeds: Mapping[str, float] | None = None
) -> Plan:
    """The survivors keep what they hold, and what is lost is spread evenly over them."""
    held = layout.without(lost)
    return plan_change(units, held, held.devices, policy=POLICIES["units"], speeds=speeds)


def arrivals(plan: Plan, device: str) -> list[tuple[str, int, int]]:
    """(family, unit, slot) of all that the plan writes on a device."""
    return [(m.family, m.unit + i, m.slot + i) for m in plan.moves_of(device) for i in range(m.num_units)]
