"""Triton's kernels as its compiler sees them: `tests/cpu/test_fused.py` runs this in a process of its own. No GPU is
needed to compile for one; nothing here is launched."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from anchortp.config import load_model_config
from anchortp.layout import model_units
from anchortp.model import fused
from tests.cpu.model_tools import TPGroup, load_group, random_layout, random_steps, scrambled_tables
from tests.cpu.test_model_graphs import Graphed
from tests.tiny_model import write_model

QWEN3_8B = {"model_type": "qwen3", "hidden_size": 4096, "head_dim": 128, "dtype": "bfloat16"}


class GPU:
    """What Triton's compiler asks its driver. The device's number is its compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiler:
    """As `fused.launch`, but for the launch. `made`: each piece of code that the arguments of some launch needed."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: object, **options: int) -> None:
        with self._lock:
            code = kernel.warmup(*args, grid=grid, **options)
            self.made[id(code)] = code


def compiler_for(capability: int) -> Compiler:
    triton.runtime.driver.set_active(GPU(capability))
    return Compiler()


def names(compiler: Compiler) -> list[str]:
    return sorted(code.metadata.name for code in compiler.made.values())


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bfloat16"), (90, "bfloat16"), (90, "float32")])
def test_everything_that_a_model_needs_compiles(capability: int, dtype: str, tmp_path: Path) -> None:
    compiler = compiler_for(capability)
    folder = write_model(tmp_path / "model", **QWEN3_8B | {"dtype": dtype})
    fused.TritonKernels(compiler).touch(model_units(load_model_config(folder)))
    assert names(compiler) == ["_add_norm", "_add_norm", "_gate", "_rotate_store"]
    for code in compiler.made.values():
        assert code.asm["cubin"] and code.metadata.shared <= 1024
        # To the nearest, as torch does.
        assert (code.asm["ptx"].count("cvt.rn.bf16") > 0) == (dtype == "bfloat16")
        assert ".local" not in code.asm["ptx"], "it keeps things in memory that belong in registers"


def run(group: TPGroup, seed: int) -> None:
    """Prefill and decode; the numbers are what was in memory."""
    rng = random.Random(seed)
    sequences = [[rng.randrange(101) for _ in range(length)] for length in (9, 2, 16)]
    for step in random_steps(sequences, scrambled_tables(len(sequences), group, rng), rng, num_decode=3):
        group.forward([entry for _, entry in step])


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_no_layout_and_no_batch_needs_more_than_was_compiled_at_the_start(model_type: str, tmp_path: Path) -> None:
    """Or a recovery would wait for the compiler: one head or many, one row or many, with graphs and without."""
    folder = write_model(tmp_path / "model", model_type=model_type, dtype="bfloat16")
    units = model_units(load_model_config(folder))
    compiler = compiler_for(90)
    kernels = fused.TritonKernels(compiler)
    kernels.touch(units)
    before = set(compiler.made)
    assert len(before) == 4
    used: set[int] = set()
    for seed in range(4):
        compiler.made.clear()
        layout = random_layout(units, seed % 3 + 1, random.Random(seed))
        with load_group(folder, layout, kernels=kernels) as group:
            run(group, seed)
            Graphed(group, captures_per_step=9)
            run(group, seed)
        used |= set(compiler.made)
    assert used == before


def test_the_test_above_can_fail() -> None:
    compiler = compiler_for(90)
    kernels, weight = fused.TritonKernels(compiler), torch.ones(16)
    for offset in (0, 4, 1):  # of these the last is no multiple of 16 bytes
        kernels.norm(torch.zeros(32)[offset : offset + 16], weight, 1e-6)
    assert len(compiler.made) == 2
