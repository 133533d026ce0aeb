"""Progress while an engine starts: bars, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

POLL_S = 0.05


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
