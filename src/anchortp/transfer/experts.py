"""Experts as transformers 5 keeps them in memory, and saves them with `save_original_format=False`: fused.

Checkpoints on the hub have a tensor per expert, under the names that `layout.units` uses. Fused, all experts of a
layer are one tensor: `mlp.experts.gate_up_proj` `[experts, 2 * width, hidden]`, gate before up, and
`mlp.experts.down_proj` `[experts, hidden, width]`; Mixtral's router then is `mlp.gate.weight`, as Qwen3-MoE's is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anchortp.config import ModelConfig

_EXPERT = re.compile(r"(.+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
_ROUTER = re.compile(r"(.+)\.block_sparse_moe\.gate\.weight")
_UP, _DOWN = ("up_proj", "w3"), ("down_proj", "w2")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedPlace:
    """A tensor inside of another of `shape`: rows of `expert` from `start` on; all of it if that is None."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0


def fused_place(name: str, shape: tuple[int, ...], config: ModelConfig) -> FusedPlace | None:
    """Where a fused checkpoint would hold the tensor called `name`; None for tensors that are never fused."""
    if router := _ROUTER.fullmatch(name):
        return FusedPlace(name=f"{router[1]}.mlp.gate.weight", shape=shape)
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    assert config.moe is not None, f"{name} in a dense model"
    layer, expert, kind = match[1], int(match[2]), match[3]
    experts, (rows, columns) = config.moe.num_experts, shape
    if kind in _DOWN:
        return FusedPlace(name=f"{layer}.mlp.experts.down_proj", shape=(experts, rows, columns), expert=expert)
    start = rows if kind in _UP else 0
    return FusedPlace(
        name=f"{layer}.mlp.experts.gate_up_proj", shape=(experts, 2 * rows, columns), expert=expert, start=start
    )
