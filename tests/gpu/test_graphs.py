"""Decode steps as CUDA graphs give the logits of steps without, on ranks that share a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bench.gpu_ranks import anchors, decode_with_and_without_graphs, run_ranks
from tests.gpu.test_groups import DEVICES, runtime_dir
from tests.tiny_model import write_model

__all__ = ["runtime_dir"]


@pytest.mark.parametrize(
    ("attention", "kernels"),
    [("torch", "torch"), ("sdpa", "torch"), ("flashinfer", "torch"), ("torch", "triton"), ("sdpa", "triton")],
)
@pytest.mark.parametrize("size", [1, 2])
def test_graphs_change_no_logit(size: int, attention: str, kernels: str, runtime_dir: Path) -> None:
    for name in {attention, kernels} & {"flashinfer", "triton"}:
        if importlib.util.find_spec(name) is None:  # not imported: this process must stay free of CUDA
            pytest.skip(f"{name} is not installed")
    folder = str(write_model(runtime_dir / "model", dtype="bfloat16", head_dim=64))
    with anchors(runtime_dir, DEVICES[:size], 64 << 20):
        program = (decode_with_and_without_graphs, folder, attention, kernels)
        (first, *_) = run_ranks("peer", runtime_dir, DEVICES[:size], 1 << 20, *program)
    assert first["num_captured"] == 5 and first["largest_difference"] < 0.1, first
