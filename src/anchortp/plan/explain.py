"""Where one unit comes from and why, in words."""

from __future__ import annotations

from anchortp.layout import KV
from anchortp.plan.plan import PLANE, REPLICATED, FromHost, Move, Plan


def explain(plan: Plan, family: str, unit: int) -> str:
    """Every copy of the unit in the new layout: kept, or the way it comes and what it was chosen over.

    `family`: a layout's, or PLANE (the KV cache of head `unit`) or REPLICATED (all replicated tensors, unit 0).
    """
    before, after = _holders(plan, family, unit)
    lines = [_title(plan, family, unit, before)]
    moves = [move for move in plan.moves if _carries(move, family, unit)]
    for device in after:
        coming = [move for move in moves if move.device == device]
        if not coming:
            lines.append(f"  {device} keeps it: it is there already, and what is there costs nothing")
        lines += [f"  {device} {_way(move)}" for move in coming]
    for drop in plan.drops:
        if drop.family == family and drop.unit <= unit < drop.unit + drop.num_units:
            lines.append(f"  {drop.device} lets go of it after stage {drop.stage + 1}")
    if family == PLANE and unit in plan.replayed:
        lines.append("  no living source holds it: its sequences replay their tokens")
    return "\n".join([*lines, *(f"  · {reason}" for reason in plan.reasons)])


def _holders(plan: Plan, family: str, unit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if family == REPLICATED:
        return plan.before.devices, plan.after.devices
    held_as = KV if family == PLANE else family
    return plan.before.holders(held_as, unit), plan.after.holders(held_as, unit)


def _title(plan: Plan, family: str, unit: int, before: tuple[str, ...]) -> str:
    lost = [device for device in before if device in plan.lost]
    alive = [device for device in before if device not in plan.lost]
    text = f"{family} {unit} ({plan.policy}): "
    if not before:
        return text + "no device held it; it comes from a store"
    if not alive:
        return text + f"was on {', '.join(lost)} alone, which is lost; it must come from a store"
    rest = f"; {', '.join(lost)} is lost" if lost else ""
    return text + f"was on {', '.join(before)}{rest}"


def _carries(move: Move, family: str, unit: int) -> bool:
    return move.family == family and move.unit <= unit < move.unit + move.num_units


def _way(move: Move) -> str:
    if move.is_relocation:
        return "moves it to another slot of its own, over no link"
    source = move.source.place if isinstance(move.source, FromHost) else move.source.device
    verb = "loads" if isinstance(move.source, FromHost) else "copies"
    share = "" if move.first_byte == 0 and move.num_units > 1 else _share(move)
    route = " > ".join(move.route) or "no link"
    stage = f", in stage {move.stage + 1}" if move.stage else ""
    return f"{verb} it from {source or 'the host'}{share} over {route}{stage}"


def _share(move: Move) -> str:
    return f" (bytes {move.first_byte} to {move.first_byte + move.num_bytes})" if move.num_units == 1 else ""
