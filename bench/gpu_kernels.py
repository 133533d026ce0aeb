"""Kernels by Triton beside torch's, for a section of `bench.gpu_check`: the same numbers, and in what time?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anchortp.config import ModelConfig, parse_model_config
from anchortp.devices import parse_device
from anchortp.engine.accelerator import Accelerator
from anchortp.layout import model_units
from anchortp.model import TorchKernels
from anchortp.model.kernels import Places
from anchortp.model.rope import RopeTables
from bench.gpu_ranks import timed
from tests.tiny_model import TINY
from tests.triton_interpreter import interpret

NUM_TOKENS = 4096  # of the cache


def run_kernels(scale: Any) -> dict[str, Any]:
    """Per kernel and number of rows, in the large model's shapes at width 1: microseconds of a call in a step without
    graphs and in a captured one, and how far the results are apart. Raises where that is more than the last bit."""
    if importlib.util.find_spec("triton") is None:
        return {"not_measured": "triton is not installed"}
    on_gpu = scale.kind == "cuda"
    accelerator = Accelerator.of(parse_device(scale.device(0)))
    config = parse_model_config(TINY | scale.large_model)
    all_kernels = {"triton": accelerator.fused(config) if on_gpu else _interpreted(), "torch": TorchKernels()}
    num_calls = 20 if on_gpu else 2  # that are timed as one: a call alone is shorter than the wait for it
    capture, result = accelerator.capture(), {}
    assert capture is not None
    with torch.inference_mode(), accelerator.placing():
        for rows in (1, 16, 256) if on_gpu else (1, 3):
            sides = {whose: _Side(kernels, config, rows) for whose, kernels in all_kernels.items()}
            for name in _Side.CALLS:
                figures = _apart(*(side.results(name) for side in sides.values()))
                for whose, side in sides.items():
                    work = _repeated(getattr(side, name), num_calls)
                    for how, run in {"plain": work, "captured": capture(work)}.items():
                        figures[f"{whose}_{how}_us"] = 1e6 * timed(accelerator, scale.repeats, run) / num_calls
                result[f"{name}, {rows} rows"] = figures
    return result


def _interpreted() -> TorchKernels:
    interpret()
    from anchortp.model.fused import TritonKernels

    return TritonKernels()


class _Side:
    """Some kernels, and tensors of their own to work on; the numbers are the same for all."""

    CALLS = ("add_norm", "gate", "rotate_store")

    def __init__(self, kernels: TorchKernels, config: ModelConfig, rows: int):
        torch.manual_seed(rows)
        dtype, hd = getattr(torch, config.dtype), config.head_dim
        num_q, num_kv = config.num_q_heads, config.num_kv_heads

        def values(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        self._kernels, self._eps, self._block = kernels, config.rms_eps, model_units(config).mlp_block
        self._x, self._more, self._weight = *values(2, rows, config.hidden_size), values(config.hidden_size)
        self._both = values(rows, 2 * config.mlp_width)
        self._q, self._kv = values(rows, num_q * hd), values(rows, num_kv * 2 * hd)
        self._norms = tuple(values(2, hd)) if config.qk_norm else None
        self._cache, self._pick = torch.zeros(2 * num_kv, NUM_TOKENS, hd, dtype=dtype), torch.arange(num_q)
        positions, slots = torch.randint(config.max_position, (rows,)), torch.randperm(NUM_TOKENS)[:rows]
        cos, sin = kernels.rotation(RopeTables(config, config.max_position), positions, num_q, num_kv)
        self._places = Places(positions=positions, cache_slots=slots, cos=cos, sin=sin)

    def add_norm(self) -> Tensor:
        return self._kernels.add_norm(self._x, self._more, self._weight, self._eps)

    def gate(self) -> Tensor:
        return self._kernels.gate(self._both, self._block)

    def rotate_store(self) -> Tensor:
        given = (self._q, self._kv, self._norms, self._eps, self._places, self._cache, self._pick)
        return self._kernels.rotate_store(*given)

    def results(self, name: str) -> list[Tensor]:
        """What one call makes, and what it changes."""
        made = getattr(self, name)()
        changed = {"add_norm": [self._x.clone()], "rotate_store": [self._cache[:, self._places.cache_slots]]}
        return [made, *changed.get(name, [])]


def _apart(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """`largest_step`: the largest difference, as a part of the largest number of its row."""
    equal = sum(int((a == b).sum()) for a, b in zip(found, wanted, strict=True))
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        steps = (a.float() - b.float()).abs() / b.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
        largest = max(largest, float(steps.max()))
    assert largest <= 2.0**-7, f"results are {largest} of their row's largest number apart"
    return {"equal_share": equal / sum(b.numel() for b in wanted), "largest_step": largest}


def _repeated(call: Callable[[], Tensor], num: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(num):
            call()

    return work
