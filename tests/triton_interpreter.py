"""Triton's kernels on tensors in the host's memory, and tests in a process of their own: as Triton is imported it is
decided for all of a process whether its kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 110.0


def run_apart(*files: str, **environment: str) -> None:
    """Runs the tests of `files`, which have names that pytest does not look for, and fails as they do."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpret() -> None:
    """Before anything imports Triton, or a module with kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    def convert(values: np.ndarray, source: Any, target: Any, rounding: object) -> np.ndarray:
        """Of bits. The interpreter's own cuts float32 off where a GPU rounds to the nearest bfloat16."""
        if target.name == "bf16":
            return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
        assert source.name == "bf16", "what the kernels convert"
        return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy().view(np.uint32)

    interpreter._convert_float = convert
