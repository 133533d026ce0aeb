"""Whole models with Triton's kernels, in its interpreter: `tests/cpu/test_fused.py` runs this, in a process of its
own."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from anchortp.config import load_model_config
from anchortp.layout import ATTENTION, Layout, model_units
from tests.cpu.model_tools import load_group, random_layout, random_steps, scrambled_tables
from tests.cpu.test_model_graphs import Graphed, _Recorder
from tests.tiny_model import write_model
from tests.triton_interpreter import interpret

interpret()

from anchortp.model import fused  # noqa: E402

ONE_AT_A_TIME = threading.Lock()  # ranks are threads here; the interpreter and its recorders know but one


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: int) -> None:
    """As `fused.launch`. A tape records the launch, with the tensors that it had, and nothing inside of it."""
    recorder = _get_current_dispatch_mode()
    with ONE_AT_A_TIME, _disable_current_modes():
        fused.launch(kernel, grid, *args, **options)
    if isinstance(recorder, _Recorder):
        recorder.calls.append((launch, (kernel, grid, *args), options, []))


KERNELS = fused.TritonKernels(launch)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
KINDS = {"llama": {}, "qwen3": {"model_type": "qwen3"}, "mixtral": {"model_type": "mixtral", **EXPERTS}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_model(tmp_path_factory.mktemp(kind) / "model", **changes) for kind, changes in KINDS.items()}


def logits(folder: Path, layout: Layout, kernels: str | fused.TritonKernels, graphs: bool = False, **options) -> Tensor:
    """Of all steps of some sequences: chunks, then tokens one by one."""
    rng = random.Random(5)
    with load_group(folder, layout, kernels=kernels, **options) as group:
        sequences = [[rng.randrange(250) for _ in range(length)] for length in (6, 4)]
        steps = random_steps(sequences, scrambled_tables(2, group, rng), rng, num_decode=3)
        graphed = Graphed(group, captures_per_step=9) if graphs else None
        results = [group.forward([entry for _, entry in step]) for step in steps]
        assert graphed is None or all(tape.num_replayed >= 5 for tape in graphed.tapes)
        return torch.cat(results)


def unequal(folder: Path, seed: int, num_devices: int = 2) -> Layout:
    return random_layout(model_units(load_model_config(folder)), num_devices, random.Random(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_shards(folders: dict[str, Path], kind: str) -> None:
    layout = unequal(folders[kind], 1)
    found, wanted = (logits(folders[kind], layout, kernels) for kernels in (KERNELS, "torch"))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_shard_without_q_heads_in_bfloat16(folders: dict[str, Path]) -> None:
    layouts = (unequal(folders["qwen3"], seed) for seed in range(100))
    layout = next(one for one in layouts if any(not shard[ATTENTION] for shard in one.shards))
    results = [logits(folders["qwen3"], layout, kernels, dtype="bfloat16") for kernels in (KERNELS, "torch")]
    assert float((results[0] - results[1]).norm() / results[1].norm()) < 0.01


def test_captured_steps_replay_the_launches(folders: dict[str, Path]) -> None:
    """With the tensors that they had, and everything else overwritten: what a CUDA graph would do."""
    layout = unequal(folders["qwen3"], 1)
    found = logits(folders["qwen3"], layout, KERNELS, graphs=True)
    torch.testing.assert_close(found, logits(folders["qwen3"], layout, "torch"), atol=1e-4, rtol=1e-4)
