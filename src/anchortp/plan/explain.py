"""Where one unit comes from and why, in words."""

from __future__ import annotations

from anchortp.layout import KV
from anchortp.plan.plan import PLANE, REPLICATED, Drop, FromHost, Move, Plan


def explain(plan: Plan, family: str, unit: int) -> str:
    """Every copy of the unit in the new layout: kept, or the way it comes and what it was chosen over.

    `family`: a layout's, or PLANE (the KV cache of head `unit`) or REPLICATED (all replicated tensors, unit 0).
    """
    before, after = _holders(plan, family, unit)
    gone = {drop.device for drop in plan.drops if _covers(drop, KV if family == PLANE else family, unit)}
    lines = [_title(plan, family, unit, before)]
    moves = [move for move in plan.moves if _covers(move, family, unit)]
    for device in after:
        coming = [move for move in moves if move.device == device]
        if not coming and device in before and device not in gone:
            lines.append(f"  {device} keeps it: it is there already, and what is there costs nothing")
        in_parts = sum(not move.is_relocation for move in coming) > 1
        lines += [f"  {device} {_way(move, in_parts)}" for move in coming]
    for drop in plan.drops:
        if _covers(drop, family, unit):
            lines.append(f"  {drop.device} lets go of it after stage {drop.stage + 1}")
    if family == PLANE and unit in plan.replayed and set(before) - set(plan.lost):
        lines.append("  not all that need it have a source: its sequences replay their tokens")
    return "\n".join([*lines, *(f"  · {reason}" for reason in plan.reasons)])


def _holders(plan: Plan, family: str, unit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if family == REPLICATED:
        return plan.before.devices, plan.after.devices
    held_as = KV if family == PLANE else family
    return plan.before.holders(held_as, unit), plan.after.holders(held_as, unit)


def _title(plan: Plan, family: str, unit: int, before: tuple[str, ...]) -> str:
    lost = [device for device in before if device in plan.lost]
    alive = [device for device in before if device not in plan.lost]
    text, is_lost = f"{family} {unit} ({plan.policy}): ", "is lost" if len(lost) == 1 else "are lost"
    if not before:
        return text + "no device held it; it comes from a store"
    if not alive:
        return text + f"was on {', '.join(lost)} alone, which {is_lost}; {_no_holder(plan, family, unit)}"
    rest = f"; {', '.join(lost)} {is_lost}" if lost else ""
    return text + f"was on {', '.join(before)}{rest}"


def _covers(step: Move | Drop, family: str, unit: int) -> bool:
    return step.family == family and step.unit <= unit < step.unit + step.num_units


def _no_holder(plan: Plan, family: str, unit: int) -> str:
    replayed = family == PLANE and unit in plan.replayed
    return "no mirror has it, its sequences replay their tokens" if replayed else "it must come from a store"


def _way(move: Move, in_parts: bool) -> str:
    if move.is_relocation:
        return "moves it to another slot of its own, over no link"
    source = move.source.place if isinstance(move.source, FromHost) else move.source.device
    verb = "loads" if isinstance(move.source, FromHost) else "copies"
    share = f" (bytes {move.first_byte} to {move.first_byte + move.num_bytes})" if in_parts else ""
    route = " > ".join(move.route) or "no link"
    stage = f", in stage {move.stage + 1}" if move.stage else ""
    return f"{verb} it from {source or 'the host'}{share} over {route}{stage}"
