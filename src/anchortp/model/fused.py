"""What lies between a layer's matmuls on GPUs, in one kernel each, by Triton [worker].

To import this is to import Triton; `engine.accelerator` does so, for devices on GPUs alone, before a spare is ready.

Values are rounded to the model's dtype wherever `TorchKernels` rounds them. What is left between the two is the order
of a sum and the last bit of an exponential, a division or a root: mostly equal, sometimes the next number.

Compiled code depends on what a model fixes (dtype, widths, size of heads and blocks) and on nothing that a layout does:
Triton makes code of its own for integers that are 1 or multiples of 16, and for pointers by their alignment, and a
recovery would then wait for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anchortp.layout import ModelUnits
from anchortp.model.kernels import Places, TorchKernels
from anchortp.model.rope import RopeTables

GATE_ELEMENTS = 1024  # that one program of `_gate` makes


@triton.jit
def _normed(x, weight, mean_square, eps):
    """RMS norm of float32 `x`; rounded as `TorchKernels.norm` does it, to `weight`'s dtype, -> float32."""
    rounded = (x * tl.rsqrt(mean_square + eps)).to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)


@triton.jit
def _add_norm(x, more, weight, out, eps, width: tl.constexpr, padded: tl.constexpr):
    """A program per row."""
    columns = tl.arange(0, padded)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if more is not None:
        rounded = (total + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=inside)
        total = rounded.to(tl.float32)
    normed = _normed(total, tl.load(weight + columns, mask=inside, other=0.0), tl.sum(total * total, 0) / width, eps)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_blocks"])
def _gate(both, out, num_blocks, width: tl.constexpr, padded: tl.constexpr, per_program: tl.constexpr):
    """A program per `per_program` blocks; `both` is `[num_blocks, 2, width]`."""
    blocks = tl.program_id(0).to(tl.int64) * per_program + tl.arange(0, per_program)[:, None]
    columns = tl.arange(0, padded)[None, :]
    inside = (blocks < num_blocks) & (columns < width)
    at = both + blocks * (2 * width) + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + blocks * width + columns, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(source, target, norm, eps, cos, sin, columns, half: tl.constexpr):
    """One head from `source` to `target`. `columns` of each of its halves; `cos` and `sin` of the upper one."""
    inside = columns < half
    low = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + columns, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        mean_square = tl.sum(low * low + high * high, 0) / (2 * half)
        low = _normed(low, tl.load(norm + columns, mask=inside, other=0.0), mean_square, eps)
        high = _normed(high, tl.load(norm + half + columns, mask=inside, other=0.0), mean_square, eps)
    dtype = target.dtype.element_ty
    turned_low = (low * cos).to(dtype).to(tl.float32) - high * sin
    turned_high = (high * cos).to(dtype).to(tl.float32) + low * sin
    tl.store(target + columns, turned_low.to(dtype), mask=inside)
    tl.store(target + half + columns, turned_high.to(dtype), mask=inside)


@triton.jit(
    do_not_specialize=["positions", "cache_slots", "pick", "num_q", "num_picked", "num_kv", "num_tokens"],
)
def _rotate_store(
    q,
    kv,
    q_norm,
    k_norm,
    eps,
    positions,
    cache_slots,
    cos,
    sin,
    cache,
    pick,
    out,
    num_q,
    num_picked,
    num_kv,
    num_tokens,
    half: tl.constexpr,
    padded: tl.constexpr,
):
    """A program per row and picked q head, or KV head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, padded)
    inside = columns < half
    # The halves of a row of `cos` are equal, those of `sin` but for the sign.
    angle = tl.load(positions + row) * (2 * half) + half + columns
    turn_cos = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    turn_sin = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if head < num_picked:
        source = q + (row * num_q + tl.load(pick + head)) * (2 * half)
        target = out + (row * num_picked + head) * (2 * half)
        _rotate(source, target, q_norm, eps, turn_cos, turn_sin, columns, half)
    else:
        slot = head - num_picked
        keys = kv + (row * num_kv + slot) * (4 * half)
        target = cache + (2 * slot * num_tokens + tl.load(cache_slots + row)) * (2 * half)
        _rotate(keys, target, k_norm, eps, turn_cos, turn_sin, columns, half)
        values, target = keys + 2 * half, target + num_tokens.to(tl.int64) * (2 * half)
        tl.store(target + columns, tl.load(values + columns, mask=inside), mask=inside)
        tl.store(target + half + columns, tl.load(values + half + columns, mask=inside), mask=inside)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: int) -> None:
    """Into torch's current stream of its current GPU, which holds the tensors."""
    kernel[grid](*args, **options)


class TritonKernels(TorchKernels):
    """Over contiguous tensors on a GPU; matmuls are torch's. Nothing waits for the device, and all memory is torch's:
    once `touch` has run, every call can be captured in a CUDA graph."""

    def __init__(self, launch: Callable[..., None] = launch):
        # No product is added without being rounded before: torch has most of them in kernels of their own.
        self._launch = partial(launch, enable_fp_fusion=False)

    def touch(self, units: ModelUnits) -> None:
        """Compiles what a model needs, or loads it from Triton's cache, and runs it once, on the device that is torch's
        default now."""
        config, block = units.config, units.mlp_block
        hd, dtype = config.head_dim, getattr(torch, config.dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        x, weight = zeros(1, config.hidden_size), zeros(config.hidden_size)
        self.add_norm(x, None, weight, config.rms_eps)
        self.add_norm(x, torch.zeros_like(x), weight, config.rms_eps)
        self.gate(zeros(1, 2 * block), block)
        zero = torch.zeros(1, dtype=torch.int64)
        places = Places(positions=zero, cache_slots=zero, cos=zeros(1, hd), sin=zeros(1, hd))
        norms = (zeros(hd), zeros(hd)) if config.qk_norm else None
        self.rotate_store(zeros(1, hd), zeros(1, 2 * hd), norms, config.rms_eps, places, zeros(2, 1, hd), zero)

    def gate(self, both: Tensor, block: int) -> Tensor:
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        num_blocks, padded = out.numel() // block, triton.next_power_of_2(block)
        per_program = max(1, GATE_ELEMENTS // padded)
        sizes = {"width": block, "padded": padded, "per_program": per_program}
        self._launch(_gate, (triton.cdiv(num_blocks, per_program),), both, out, num_blocks, **sizes)
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.add_norm(x, None, weight, eps)

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out, width = torch.empty_like(x), weight.shape[0]
        padded = triton.next_power_of_2(width)
        # Of bfloat16 a thread then has 16 bytes of each tensor: with few rows all waits are for memory.
        num_warps = min(16, max(1, padded // 256))
        sizes = {"width": width, "padded": padded, "num_warps": num_warps}
        self._launch(_add_norm, (x.numel() // width,), x, more, weight, out, eps, **sizes)
        return out

    def rotation(self, rope: RopeTables, positions: Tensor, num_q: int, num_kv: int) -> tuple[Tensor, Tensor]:
        """The tables: positions are looked up in the kernel."""
        return rope.cos, rope.sin

    def rotate_store(
        self,
        q: Tensor,
        kv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        places: Places,
        cache: Tensor,
        pick: Tensor,
    ) -> Tensor:
        num_planes, num_tokens, hd = cache.shape
        num_rows, num_picked, num_kv = q.shape[0], pick.shape[0], num_planes // 2
        out = q.new_empty(num_rows, num_picked, hd)
        self._launch(
            _rotate_store,
            (num_rows, num_picked + num_kv),
            q,
            kv,
            *(norms or (None, None)),
            eps,
            places.positions,
            places.cache_slots,
            places.cos,
            places.sin,
            cache,
            pick,
            out,
            q.shape[1] // hd,
            num_picked,
            num_kv,
            num_tokens,
            half=hd // 2,
            padded=triton.next_power_of_2(hd // 2),
            num_warps=1,
        )
        return out
