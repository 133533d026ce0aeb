"""Where a benchmark ran: what a reader needs to repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import anchortp


def conditions() -> dict[str, Any]:
    """Machine, versions and commit. `load_before`: processes that wanted to run, as a mean over the last minute."""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    return {
        "anchortp": anchortp.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "kernel": platform.release(),
        "cpu": model,
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Of the checkout that this package runs from; "unknown" where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
