"""Rotary position embedding: inverse frequencies as in transformers (`modeling_rope_utils`), tables built once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anchortp.config import ModelConfig, RopeConfig


class RopeTables:
    """`cos` and `sin` `[max_len + 1, head_dim]` in the model's dtype, for positions `[0, max_len)`.

    The first half of each row of `sin` is negated, so that a head is rotated by
    `x * cos + x.roll(head_dim / 2) * sin`. The last row (`identity`) leaves a head as it is.
    """

    def __init__(self, config: ModelConfig, max_len: int):
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse_frequencies(config))
        sin, dtype = angles.sin(), getattr(torch, config.dtype)
        self.identity = max_len
        self.cos = torch.ones(max_len + 1, config.head_dim, dtype=dtype)
        self.sin = torch.zeros(max_len + 1, config.head_dim, dtype=dtype)
        self.cos[:max_len] = angles.cos().repeat(1, 2)
        self.sin[:max_len] = torch.cat((-sin, sin), dim=-1)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Float32 `[head_dim / 2]`: radians per position of each pair of elements."""
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _llama3(frequencies, rope) if rope.kind == "llama3" else frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slowed = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), between, slowed)
