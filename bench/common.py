"""What the benchmarks share: where they ran, what the machine can do, and how a result is printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import anchortp


def conditions() -> dict[str, Any]:
    """Machine, versions and commit: what a reader needs to repeat the run."""
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    return {
        "anchortp": anchortp.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": model,
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_before": os.getloadavg()[0],
    }


def memory_bandwidth(num_bytes: int = 256 << 20, repeats: int = 7) -> float:
    """Bytes per second that a plain parallel copy writes on this machine: the best of a few."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        source = torch.ones(num_bytes // 8, dtype=torch.float64)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(repeats):
            began_s = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - began_s)
        return num_bytes / best
    finally:
        torch.set_num_threads(threads)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range; of nothing, nothing."""
    if not values:
        return {}
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def console() -> Console:
    """For tables and progress: stderr, so that stdout holds the one JSON document."""
    return Console(file=sys.stderr)


def finish(result: dict[str, Any]) -> None:
    """The last line on stdout is the result."""
    print(json.dumps(result), flush=True)
