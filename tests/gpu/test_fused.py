"""Triton's kernels give what torch's give, on a GPU."""

from __future__ import annotations

import importlib.util

import pytest

from tests.triton_interpreter import run_apart


def test_they_compute_what_torchs_do() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    run_apart("tests/fused_contract.py")
