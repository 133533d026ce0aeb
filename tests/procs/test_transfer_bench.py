"""The benchmark runs tiny as a test, so that it does not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anchortp

ROOT = Path(__file__).parents[2]


def test_transfer_benchmark_ends_with_one_json_line(tmp_path):
    paths = [str(Path(anchortp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    options = ["--tiny", "--layers", "2", "--repeats", "1", "--dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "bench.transfer", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["changes"]) == {"8 to 7", "8 to 6", "4 to 2"}
    for rows in report["changes"].values():
        by_policy = {row["policy"]: row for row in rows}
        assert list(by_policy) == ["reload", "greedy", "cmm", "units", "makespan"]
        assert by_policy["reload"]["loaded_bytes"] > by_policy["makespan"]["loaded_bytes"] > 0
        assert all(row["seconds"]["median"] > 0 for row in rows)
    assert report["overlap"]["both_s"] > 0
