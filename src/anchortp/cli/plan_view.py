"""How plans look: tables for people, one document for programs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from anchortp.layout import EVERY_FAMILY, KV
from anchortp.plan import PLANE, FromHost, Plan, Problem, Refused, Row, Timeline

MAX_LINKS = 16  # rows of the link table; the rest is summed up in one
PIPE_WIDTH = 120


def console() -> Console:
    """For stdout. Names of devices are data, not markup; a pipe gets lines wide enough for every column."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(markup=False, highlight=False, emoji=False, width=width)


def size(num_bytes: float) -> str:
    """Decimal units, three digits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * scale:
            return f"{_digits(num_bytes / scale)} {unit}"
    return "-" if not num_bytes else f"{num_bytes:.0f} B"


def rate(bytes_per_s: float) -> str:
    return f"{size(bytes_per_s)}/s"


def duration(seconds: float) -> str:
    if seconds == 0:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# ------------------------------------------------------------------------------------------------------ figures


def arrivals(plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes per device of the new layout, KV planes included: copied from other devices, and loaded from stores."""
    copied, loaded = (Counter(dict.fromkeys(plan.after.devices, 0)) for _ in range(2))
    for move in plan.moves:
        if not move.is_relocation:
            (loaded if isinstance(move.source, FromHost) else copied)[move.device] += move.num_bytes
    return dict(copied), dict(loaded)


def kept_by_device(problem: Problem, plan: Plan) -> dict[str, int]:
    """Bytes of weights in the new layout that did not have to come from anywhere, in whatever slot they are."""
    kept = {device: plan.after.weight_bytes(problem.units, device) for device in plan.after.devices}
    for move in plan.moves:
        if not move.is_relocation and move.family != PLANE:
            kept[move.device] -= move.num_bytes
    return kept


def link_rows(timeline: Timeline) -> list[tuple[str, int, float, float, float]]:
    """Per link that is used, busiest first: name, bytes, bandwidth, seconds at full speed, share of the whole time."""
    rows = []
    for name, num_bytes in timeline.link_bytes.items():
        speed = timeline.topology.link(name).bytes_per_s
        busy_s = num_bytes / speed
        rows.append((name, num_bytes, speed, busy_s, busy_s / timeline.makespan_s if timeline.makespan_s else 0.0))
    return sorted(rows, key=lambda row: (-row[3], row[0]))


def headline(problem: Problem) -> str:
    units, gone = problem.units, _leaving(problem)
    parts = [f"{units.name} ({size(units.total_bytes)})", f"on {problem.topology.name}:"]
    parts.append(f"{len(problem.before.devices)} → {len(problem.devices)} devices")
    for word, names in (("lost", problem.lost), ("leaving", gone), ("joining", problem.fresh)):
        if names:
            parts.append(f"· {word} {', '.join(names)}")
    return " ".join(parts)


def _leaving(problem: Problem) -> tuple[str, ...]:
    return tuple(device for device in problem.alive if device not in problem.devices)


# ------------------------------------------------------------------------------------------------------- tables


def show(problem: Problem, rows: Sequence[Row | Refused], chosen: Row) -> None:
    """The chosen plan in detail, then all policies side by side."""
    view = console()
    view.print(headline(problem), style="bold")
    view.print(_device_table(problem, chosen))
    if chosen.timeline.link_bytes:
        view.print(_link_table(chosen.timeline))
    for line in _summary(chosen):
        view.print(line)
    view.print(_policy_table(problem, rows, chosen))
    refused: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row, Refused):
            refused.setdefault(row.why, []).append(row.policy)
    for why, policies in refused.items():
        view.print(f"without room: {', '.join(policies)}. {why}")


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=number >= left)
    return table


def _device_table(problem: Problem, row: Row) -> Table:
    families = [f for f in EVERY_FAMILY if f in problem.families]
    title = f"widths and bytes per device ({row.policy})"
    planes = ("KV cache",) if problem.plane_bytes else ()
    table = _table(title, "device", *families, "weights", "kept", *planes, "copied", "loaded", "ready after")
    kept = kept_by_device(problem, row.plan)
    copied, loaded = arrivals(row.plan)
    for shard in row.plan.after.shards:
        device = shard.device
        table.add_row(
            device + (" (new)" if device in problem.fresh else ""),
            *(str(len(shard[family])) for family in families),
            size(row.plan.after.weight_bytes(problem.units, device)),
            size(kept[device]),
            *(size(problem.plane_bytes * len(shard[KV])) for _ in planes),
            size(copied[device]),
            size(loaded[device]),
            duration(row.timeline.ready_s[device]),
        )
    return table


def _link_table(timeline: Timeline) -> Table:
    table = _table("bytes per link, busiest first", "link", "bytes", "bandwidth", "busy", "of the time")
    rows = link_rows(timeline)
    for name, num_bytes, speed, busy_s, share in rows[:MAX_LINKS]:
        table.add_row(name, size(num_bytes), rate(speed), duration(busy_s), f"{share:.0%}")
    if rest := rows[MAX_LINKS:]:
        most = max(share for *_, share in rest)
        table.add_row(f"{len(rest)} more links", size(sum(r[1] for r in rest)), "", "", f"at most {most:.0%}")
    return table


def _summary(row: Row) -> list[str]:
    bound = row.bound
    lines = [f"predicted: {duration(row.predicted_s)} in {row.plan.num_stages} stage(s)"]
    for step in row.timeline.critical:
        speed = row.timeline.topology.link(step.link).bytes_per_s
        lines.append(
            f"  stage {step.stage + 1} waits for {step.link}: {size(step.num_bytes)} at {rate(speed)} "
            f"= {duration(step.seconds)}"
        )
    lines.append(f"lower bound: {duration(bound.seconds)}, {size(bound.lost_bytes)} to load at least ({bound.why})")
    if row.plan.replayed:
        lines.append(f"replayed, since no copy is left: KV cache of heads {', '.join(map(str, row.plan.replayed))}")
    return lines + [f"  · {reason}" for reason in row.plan.reasons]


def _policy_table(problem: Problem, rows: Sequence[Row | Refused], chosen: Row) -> Table:
    planes = ("replayed",) if problem.plane_bytes else ()  # KV heads: who brings less can be sooner
    columns = ("kept", "loaded", "copied", *planes, "busiest link", "its bytes", "predicted", "of the bound")
    table = _table("all policies", "policy", *columns)
    for row in rows:
        if isinstance(row, Refused):
            table.add_row(row.policy, *("" for _ in columns[1:]), "no room")
            continue
        ratio = f"{row.predicted_s / row.bound_s:.2f} x" if row.bound_s else "-"
        table.add_row(
            row.policy,
            size(row.kept_bytes),
            size(row.loaded_bytes),
            size(row.copied_bytes),
            *(str(len(row.plan.replayed) or "-") for _ in planes),
            row.busiest_link or "-",
            size(row.busiest_bytes),
            duration(row.predicted_s),
            ratio,
            style="bold" if row is chosen else None,
        )
    return table


# ----------------------------------------------------------------------------------------------------- document


def as_document(problem: Problem, rows: Sequence[Row | Refused], chosen: Row) -> dict[str, Any]:
    """Everything the tables show, unrounded: bytes, seconds, bytes per second."""
    return {
        "problem": _problem(problem),
        "policy": chosen.policy,
        "predicted_s": chosen.predicted_s,
        "lower_bound": asdict(chosen.bound),
        "devices": _devices(problem, chosen),
        "links": [
            {"link": name, "bytes": num_bytes, "bytes_per_s": speed, "busy_s": busy_s, "share": share}
            for name, num_bytes, speed, busy_s, share in link_rows(chosen.timeline)
        ],
        "critical": [asdict(step) for step in chosen.timeline.critical],
        "num_stages": chosen.plan.num_stages,
        "num_moves": len(chosen.plan.moves),
        "relocated_bytes": chosen.plan.relocated_bytes,
        "replayed_kv_heads": list(chosen.plan.replayed),
        "reasons": list(chosen.plan.reasons),
        "policies": [_policy(row) for row in rows],
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "model": problem.units.name,
        "total_bytes": problem.units.total_bytes,
        "topology": problem.topology.name,
        "from": list(problem.before.devices),
        "to": list(problem.devices),
        "lost": list(problem.lost),
        "leaving": list(_leaving(problem)),
        "joining": list(problem.fresh),
        "speeds": dict(problem.speeds or {}),
        "plane_bytes": problem.plane_bytes,
        "lost_bytes": problem.lost_bytes,
    }


def _devices(problem: Problem, row: Row) -> dict[str, Any]:
    kept = kept_by_device(problem, row.plan)
    copied, loaded = arrivals(row.plan)
    return {
        shard.device: {
            "widths": {family: len(shard[family]) for family in problem.families},
            "weight_bytes": row.plan.after.weight_bytes(problem.units, shard.device),
            "kept_bytes": kept[shard.device],
            "copied_bytes": copied[shard.device],
            "loaded_bytes": loaded[shard.device],
            "ready_s": row.timeline.ready_s[shard.device],
        }
        for shard in row.plan.after.shards
    }


def _policy(row: Row | Refused) -> dict[str, Any]:
    if isinstance(row, Refused):
        return {"policy": row.policy, "refused": row.why}
    fields = (
        "policy",
        "kept_bytes",
        "loaded_bytes",
        "copied_bytes",
        "busiest_link",
        "busiest_bytes",
        "predicted_s",
    )
    return {field: getattr(row, field) for field in (*fields, "bound_s")} | {
        "num_stages": row.plan.num_stages,
        "replayed_kv_heads": list(row.plan.replayed),
    }
