"""Triton's kernels without a GPU: what they compute, and that they compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.triton_interpreter import run_apart


def test_they_compute_what_torchs_do() -> None:
    run_apart("tests/fused_contract.py", "tests/cpu/fused_decoder.py", TRITON_INTERPRET="1")


def test_they_compile_before_they_are_needed(tmp_path: Path) -> None:
    run_apart("tests/cpu/fused_compiled.py", TRITON_CACHE_DIR=str(tmp_path))


def test_an_engine_without_them_does_not_import_triton() -> None:
    code = "import sys, anchortp.engine.controller, anchortp.engine.worker; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
