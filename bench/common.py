"""What the benchmarks share: where they ran, what the machine can do, and how a result is printed."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

from rich.console import Console

from anchortp.bench.machine import conditions

__all__ = ["conditions", "console", "finish", "memory_bandwidth", "spread"]


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
