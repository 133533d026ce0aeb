"""Progress of loads: bars while an engine starts, and what `status` of a running one says of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

POLL_S = 0.05
BAR_WIDTH = 60
MAX_LINKS = 12  # in a live view, the slowest


def show_start(status: Callable[[], dict[str, Any]]) -> None:
    """Follows `status` until the engine serves, refuses or has stopped. [server process, main thread]"""
    console = Console(file=sys.stderr)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        while True:
            now = status()
            _update(bars, tasks, now)
            if now["state"] in ("serving", "refusing", "stopped"):
                break
            time.sleep(POLL_S)
        for task in tasks.values():
            bars.update(task, completed=bars.tasks[task].total)


def _update(bars: Progress, tasks: dict[str, Any], status: dict[str, Any]) -> None:
    for name, device in status.get("devices", {}).items():
        if not device["loading_total_bytes"]:
            continue
        if name not in tasks:
            tasks[name] = bars.add_task(f"loading {name}", total=device["loading_total_bytes"])
        bars.update(tasks[name], completed=device["loading_bytes"])


def is_loading(status: Mapping[str, Any]) -> bool:
    """Whether weights move now: at the start, in a recovery, or for a change."""
    return bool(status.get("loading_total_bytes"))


def loading_lines(status: Mapping[str, Any], max_links: int | None = None) -> list[str]:
    """Bytes and time left, then a line per link, the slowest first; nothing if nothing is loaded."""
    if not is_loading(status):
        return []
    done, total, left_s = status["loading_bytes"], status["loading_total_bytes"], status["loading_left_s"]
    left = "time left unknown" if left_s is None else f"{_seconds(left_s)} left"
    lines = [f"weights: {done / 1e6:.1f} of {total / 1e6:.1f} MB ({done / total:.0%}), {left}"]
    links = link_lines(status["loading_links"])
    shown = links[:max_links]
    lines += [f"  {line}" for line in shown]
    if len(shown) < len(links):
        lines.append(f"  and {len(links) - len(shown)} faster")
    return lines


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1.0 else f"{seconds:.1f} s"


def link_lines(links: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of `loading_links`, or an episode's `links`: what each carried, and how fast while it was busy."""
    slowest = sorted(links.items(), key=lambda item: item[1]["bytes_per_s"])
    return [f"{name}: {of['bytes'] / 1e6:.1f} MB at {of['bytes_per_s'] / 1e9:.3g} GB/s" for name, of in slowest]


def loading_view(status: Mapping[str, Any]) -> RenderableType:
    """The same lines with a bar, for a live view; empty if nothing is loaded."""
    lines = loading_lines(status, MAX_LINKS)
    if not lines:
        return Group()
    grid = Table.grid()
    grid.add_row(lines[0])
    grid.add_row(ProgressBar(total=status["loading_total_bytes"], completed=status["loading_bytes"], width=BAR_WIDTH))
    for line in lines[1:]:
        grid.add_row(line)
    return grid
