"""The benchmark runs tiny as a test, so that it does not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anchortp

ROOT = Path(__file__).parents[2]


def test_allreduce_benchmark_ends_with_one_json_line():
    paths = [str(Path(anchortp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "bench.allreduce", "--ranks", "2", "--shape", "4x96", "--iters", "5"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    names = [timing["name"] for timing in report["timings"]]
    kinds = [f"{kind}{phases}" for kind in ("shm", "kernels") for phases in ("", "-one-phase", "-two-phase")]
    assert names == ["barrier", *kinds, "gloo", "gloo-native"]
    assert all(0 < timing["median_ms"] <= timing["p99_ms"] for timing in report["timings"])
