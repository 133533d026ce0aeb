"""The check for GPUs does not rot: without one it says so, and its measurements run on simulated devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gpu_check(*arguments: str) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_is_content():
    result, told = gpu_check()
    assert result["checked"] is False
    assert "nothing was checked" in told and result["why"] in told


def test_every_measurement_runs_on_simulated_devices(tmp_path):
    result, told = gpu_check(
        "--kind", "sim", "--reports", str(tmp_path), "--parts", "memory,survival,collectives,kernels,attention,engine"
    )
    figures = {name: part["figures"] for name, part in result["parts"].items()}
    assert figures["memory"]["num_chunks"] == 256 and figures["memory"]["peer_arena_to_arena_bytes_per_s"] > 0
    assert figures["memory"]["mirror_is_whole"] is True and figures["memory"]["mirror_save_bytes_per_s"] > 0
    assert figures["survival"]["sigkill"]["bytes_whole"] is True
    graphs, *reduces = sorted(figures["collectives"])
    assert figures["collectives"][graphs]["num_captured"] == 5
    assert figures["collectives"][graphs]["largest_difference"] < 1e-3
    assert set(reduces) == {f"{kind}, {num} ranks" for kind in ("peer", "shm") for num in (2, 4)}
    for name in ("add_norm", "gate", "rotate_store"):
        kernel = figures["kernels"][f"{name}, 3 rows"]
        assert kernel["equal_share"] > 0.5 and kernel["largest_step"] < 1e-5
        assert min(kernel[f"{whose}_{how}_us"] for whose in ("triton", "torch") for how in ("plain", "captured")) > 0
    assert len(figures["attention"]) == 4
    assert all(case["sdpa_s"] > 0 and case["sdpa_largest_difference"] < 1e-4 for case in figures["attention"].values())
    for kind in ("lost", "crash"):
        struck = figures["engine"][kind]
        assert struck["failed"] == [] and struck["same_answers"] == struck["num_answers"] == 8
    assert figures["engine"]["lost"]["bytes"]["loaded"] > 0 == figures["engine"]["crash"]["bytes"]["loaded"]
    (report,) = tmp_path.glob("*.md")
    assert "| peer, 2 ranks: 16x64_bf16_s |" in report.read_text() and report.name in told
    assert json.loads(report.with_suffix(".json").read_text()) == result


def test_the_numbers_of_a_large_model_come_with_their_floors(tmp_path):
    result, told = gpu_check("--kind", "sim", "--reports", str(tmp_path), "--parts", "qwen3_8b")
    figures = result["parts"]["qwen3_8b"]["figures"]
    for width in ("width 1", "width 1 without graphs"):
        assert 0 < figures[width]["roofline_1_share"] < 1
    assert "sim" in figures["width 1 with triton"]["not_measured"]
    # 2 layers of q and o [96, 64], k and v [32, 64], gate, up and down [128, 64] and two norms; the last norm and the
    # lm_head [259, 64]; keys and values of 2 heads of 16 for the prompt of 32 and half of 60 tokens; all float32.
    weights = 2 * (64 * (2 * 96 + 2 * 32 + 3 * 128) + 2 * 64) + 64 + 259 * 64
    assert figures["width 1"]["decode_step_bytes"] == 4 * (weights + 2 * 2 * 2 * 16 * (32 + 30))
    lost, crash = figures["width 4"]["lost"], figures["width 4"]["crash"]
    assert lost["moved_over_lost_ratio"] == 1.0 and crash["bytes"]["loaded"] == 0
    assert lost["floor_s"] == lost["bytes"]["lost"] / figures["ceilings"]["host_to_device_bytes_per_s"]
    assert lost["tfs_s"] >= lost["floor_s"] and figures["restart_over_lost_ratio"] > 1
    assert lost["failed"] == crash["failed"] == []
    assert figures["packed_bytes"] > 0 and "tfs_over_floor_ratio" in told
