"""Progress while an engine starts: bars on a terminal, a few lines elsewhere."""

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
    for device, (num_bytes, total_bytes) in status.get("load_progress", {}).items():
        if device not in tasks:
            tasks[device] = bars.add_task(f"loading {device}", total=total_bytes)
        bars.update(tasks[device], completed=num_bytes)
