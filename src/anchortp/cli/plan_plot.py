"""The transfers of a plan per link over time, as a picture: length is time, height is share of the bandwidth."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchortp.cli.plan_view import duration, headline, link_rows, size
from anchortp.errors import ConfigError
from anchortp.plan import Problem, Refused, Row

if TYPE_CHECKING:
    from anchortp.plan.cost import Busy

COMPARED_WITH = "cmm"  # the paper's; where that is the chosen one, with the default
DEFAULT = "makespan"
MAX_LINKS = 36
LEAST_SHARE = 0.01  # of the time: what is busy for less is not drawn
HAIR = 0.07  # height of what would be too thin to see
ROW_INCHES, BAR = 0.27, 0.78
TITLE_COLUMNS = 88
INK, MUTED, IDLE, LOAD, COPY, WAIT = "#1f2430", "#6b7280", "#eef0f3", "#2f6db3", "#e8872b", "#b3261e"


def draw(problem: Problem, rows: Sequence[Row | Refused], policy: str, path: Path) -> None:
    """Writes the chart of `policy` with another for comparison below, on one time axis, to `path` (PNG, SVG, PDF).

    Raises ConfigError where matplotlib is missing or the file cannot be written.
    """
    plt = _pyplot()
    panels = _panels(rows, policy)
    links, num_hidden = _links(panels)
    height = len(panels) * (len(links) * ROW_INCHES + 0.85) + 1.0
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, height), sharex=True, squeeze=False, layout="constrained")
    title = textwrap.fill(headline(problem), TITLE_COLUMNS)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    scale, unit = _scale(max(row.predicted_s for row in panels))
    for axis, row in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, row, links, scale)
    axes[-1, 0].set_xlabel(f"time after the start of the move ({unit})", color=MUTED, fontsize=9)
    _legend(figure, plt, num_hidden)
    try:
        figure.savefig(path, dpi=150, facecolor="white")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written ({error}); give a .png file in a folder that exists.") from None
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it, or anchortp[bench], or leave --plot out.") from None
    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt


def _panels(rows: Sequence[Row | Refused], policy: str) -> list[Row]:
    other = COMPARED_WITH if policy != COMPARED_WITH else DEFAULT
    by_name = {row.policy: row for row in rows if isinstance(row, Row)}
    return [by_name[name] for name in (policy, other) if name in by_name]


def _links(panels: Sequence[Row]) -> tuple[list[str], int]:
    """Links that matter in any panel, in the topology's order, and how many are left out: those that are hardly
    used, and of too many those that are idle the longest."""
    shares = [{name: share for name, *_, share in link_rows(row.timeline)} for row in panels]
    used = {name for panel in shares for name in panel}
    kept = {name for panel in shares for name, share in panel.items() if share >= LEAST_SHARE}
    if len(kept) > MAX_LINKS:
        most = MAX_LINKS // len(panels)
        kept = {name for panel in shares for name in sorted(panel, key=lambda n: (-panel[n], n))[:most]}
    order = [link.name for link in panels[0].timeline.topology.links if link.name in kept]
    return order, len(used) - len(kept)


def _scale(longest_s: float) -> tuple[float, str]:
    return (1.0, "s") if longest_s >= 1 else (1e3, "ms") if longest_s >= 1e-3 else (1e6, "µs")


def _draw_panel(axis: Any, row: Row, links: Sequence[str], scale: float) -> None:
    end = row.predicted_s * scale
    place = {name: len(links) - 1 - number for number, name in enumerate(links)}
    for name, y in place.items():
        axis.barh(y, end, height=BAR, color=IDLE, linewidth=0, zorder=1)
        _draw_link(axis, y, [bar for bar in row.timeline.busy() if bar.link == name], row, scale)
    _label_links(axis, row, place, scale)
    _mark_bound(axis, row, end, scale, len(links))
    axis.set_ylim(-0.6, len(links) - 0.4)
    axis.set_yticks(list(place.values()), list(place), fontsize=8, family="monospace", color=INK)
    axis.tick_params(length=0, labelsize=8, labelcolor=INK, labelbottom=True)
    axis.grid(axis="x", color="#d6dae0", linewidth=0.6, zorder=0)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def _draw_link(axis: Any, y: float, bars: Sequence[Busy], row: Row, scale: float) -> None:
    """Flows side by side on one link are stacked, those that last longest at the bottom."""
    devices = set(row.timeline.topology.devices)
    level: dict[float, float] = {}
    for bar in sorted(bars, key=lambda b: (b.start_s, -b.stop_s, b.device, b.source)):
        at = level.get(bar.start_s, 0.0)
        level[bar.start_s] = at + bar.share
        axis.barh(
            y - BAR / 2 + at * BAR,
            (bar.stop_s - bar.start_s) * scale,
            left=bar.start_s * scale,
            height=max(HAIR, bar.share * BAR),
            align="edge",
            color=COPY if bar.source in devices else LOAD,
            edgecolor="white",
            linewidth=0.4 if bar.share > 0.1 else 0.0,
            zorder=2,
        )


def _label_links(axis: Any, row: Row, place: dict[str, int], scale: float) -> None:
    waited_for = {step.link for step in row.timeline.critical}
    used = {name: (num_bytes, share) for name, num_bytes, _, _, share in link_rows(row.timeline)}
    for name, y in place.items():
        text, color = "idle", MUTED
        if name in used:
            text = f"{size(used[name][0])}, {used[name][1]:.0%}"
            color = WAIT if used[name][1] > 0.995 else MUTED
        if name in waited_for:
            text, color = f"{text}  ◀ bottleneck", WAIT
        axis.annotate(
            text,
            (row.predicted_s * scale, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=color,
            annotation_clip=False,
        )


def _mark_bound(axis: Any, row: Row, end: float, scale: float, num_links: int) -> None:
    moved = [f"{size(n)} {verb}" for n, verb in ((row.loaded_bytes, "loaded"), (row.copied_bytes, "copied")) if n]
    title = f"{row.policy}: ready after {duration(row.predicted_s)}, {' and '.join(moved) or 'nothing moves'}"
    axis.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8, fontweight="bold")
    axis.axvline(end, color=INK, linewidth=1.1, zorder=3)
    if row.bound_s:
        axis.axvline(row.bound_s * scale, color=WAIT, linewidth=1.1, linestyle=(0, (4, 3)), zorder=3)


def _legend(figure: Any, plt: Any, num_hidden: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=LOAD, label="loaded from host or disk"),
        Patch(color=COPY, label="copied between devices"),
        Patch(color=IDLE, label="idle (height is the share of the bandwidth)"),
        Line2D([], [], color=INK, linewidth=1.1, label="last device ready"),
        Line2D([], [], color=WAIT, linewidth=1.1, linestyle=(0, (4, 3)), label="lower bound of any plan"),
    ]
    if num_hidden:
        handles.append(Patch(color="none", label=f"{num_hidden} less busy links are not shown"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
