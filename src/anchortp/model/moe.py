"""Mixture of experts on one rank: the tokens of the experts, or of the columns of experts, that its device holds.

The router is replicated and all ranks see the same activations, so all of them route alike and nothing is sent to
agree. An expert may have replicas on several devices: each then computes its part of the expert's tokens, by tables
that belong to the epoch (and are replaced on all ranks between the same two steps). Partial sums meet in the layer's
all-reduce, as those of an MLP do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from anchortp.layout import EXPERT, Layout, ModelUnits, Part, part_of
from anchortp.model.kernels import TorchKernels
from anchortp.model.panels import Matrix
from anchortp.model.weights import WeightViews

WHOLE: Part = (0.0, 1.0)
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True, kw_only=True)
class _LocalExpert:
    """An expert of one layer with weights on this rank, and which `part` of its tokens the rank computes."""

    expert: int
    gate_up: Matrix  # [2 * columns, hidden], for `linear_into`
    down: Tensor  # [columns, hidden]
    part: Part


class MoE:
    """The experts of all layers on one rank of one layout. Holds views and small tables, no weights of its own.

    `load`: int32 `[layers, experts]`, on rank 0 how many tokens each expert has had since `take_load`.
    """

    def __init__(self, units: ModelUnits, layout: Layout, rank: int, weights: WeightViews, kernels: TorchKernels):
        moe = units.config.moe
        assert moe is not None
        self._moe, self._block, self._kernels = moe, units.mlp_block, kernels
        self._counts_load = rank == 0  # routing is the same on all ranks: one of them counts
        self._routers = tuple(layer.router for layer in weights.layers)
        self._layers = _local_experts(units, layout, rank, weights)
        self._turn = 0
        self.load = torch.zeros(units.config.num_layers, moe.num_experts, dtype=torch.int32)

    def take_load(self) -> bytes:
        """`load` in this machine's byte order; counting begins anew."""
        taken = self.load.cpu().numpy().tobytes()
        self.load.zero_()
        return taken

    def share(self, parts: Mapping[int, Part]) -> None:
        """From the next step on: `parts` of the tokens of expert units that have other holders too; those that are not
        named are computed whole. All ranks get theirs between the same two steps."""
        num_experts = self._moe.num_experts
        self._layers = tuple(
            tuple(replace(local, part=parts.get(layer * num_experts + local.expert, WHOLE)) for local in experts)
            for layer, experts in enumerate(self._layers)
        )

    def begin(self, positions: Tensor) -> None:
        """Before the layers of a step whose tokens have `positions` (int64 `[rows]`): whose turn it is.

        With the same phase in each step an expert that gets one token a step would always be computed by the same
        replica. A decoding sequence's position moves on by one, and every rank knows it without a memory.
        """
        self._turn = int(positions[0])

    def forward(self, index: int, x: Tensor) -> Tensor:
        """Partial `[rows, hidden]` of layer `index`: what the local experts add for the normalised `x`.

        Tokens are sorted by expert; each local expert that has some is one matmul up and one down, of exactly
        those. Router weights are float32 throughout, after a product in the model's dtype, as in transformers.
        """
        experts = self._layers[index]
        if not experts and not self._counts_load:
            return torch.zeros_like(x)
        weights, chosen = self._route(index, x)
        counts = torch.bincount(chosen, minlength=self._moe.num_experts)
        if self._counts_load:
            self.load[index].add_(counts)
        mine = self._mine(experts, chosen, counts)
        if not mine:
            return torch.zeros_like(x)
        picks = torch.cat([pick for _, pick in mine])
        tokens = picks // self._moe.top_k
        partial = self._compute(mine, x.index_select(0, tokens))
        partial.mul_(weights.index_select(0, picks).unsqueeze(1))
        return torch.zeros_like(x).index_add_(0, tokens, partial)

    def _route(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (float32) and expert (int64) of every token's choices: `[rows * top_k]`."""
        router = self._routers[index]
        assert router is not None
        scores = torch.softmax(F.linear(x, router), -1, dtype=torch.float32)
        weights, chosen = scores.topk(self._moe.top_k, dim=-1)
        if self._moe.normalise:
            weights.div_(weights.sum(-1, keepdim=True))
        return weights.flatten(), chosen.flatten()

    def _mine(
        self, experts: tuple[_LocalExpert, ...], chosen: Tensor, counts: Tensor
    ) -> list[tuple[_LocalExpert, Tensor]]:
        """The local experts that compute something in this step, and which of the choices that is."""
        order = chosen.sort(stable=True).indices
        numbers = counts.tolist()
        ends = list(accumulate(numbers))
        mine = []
        for local in experts:
            number, end = numbers[local.expert], ends[local.expert]
            if not number:
                continue
            phase = (self._turn + local.expert) * GOLDEN % 1.0  # steps spread evenly over [0, 1), however many
            start, stop = part_of(number, local.part, phase)
            if start < stop:
                mine.append((local, order[end - number + start : end - number + stop]))
        return mine

    def _compute(self, mine: list[tuple[_LocalExpert, Tensor]], x: Tensor) -> Tensor:
        """`x` `[choices, hidden]`, sorted by local expert -> what the experts make of it."""
        ends = list(accumulate(pick.shape[0] for _, pick in mine))
        parts = [(local, slice(start, end)) for (local, _), start, end in zip(mine, [0, *ends], ends, strict=False)]
        both = x.new_empty(x.shape[0], mine[0][0].gate_up.shape[0])
        for local, rows in parts:
            self._kernels.linear_into(both[rows], x[rows], local.gate_up)
        gated = self._kernels.gate(both, self._block)
        out = torch.empty_like(x)
        for local, rows in parts:
            self._kernels.times_into(out[rows], gated[rows], local.down)
        return out


def _local_experts(
    units: ModelUnits, layout: Layout, rank: int, weights: WeightViews
) -> tuple[tuple[_LocalExpert, ...], ...]:
    """Per layer. Replicas get even parts until somebody knows better."""
    moe = units.config.moe
    assert moe is not None
    num_experts = moe.num_experts
    layers: list[list[_LocalExpert]] = [[] for _ in range(units.config.num_layers)]
    holders: dict[int, list[int]] = {}
    for holder, shard in enumerate(layout.shards):
        for unit in shard[EXPERT]:
            holders.setdefault(unit, []).append(holder)
    for unit, (gate_up, down) in weights.experts.items():
        layer, expert = divmod(unit, num_experts)
        ranks = holders.get(unit, [rank])
        place = ranks.index(rank)
        part = (place / len(ranks), (place + 1) / len(ranks))
        layers[layer].append(_LocalExpert(expert=expert, gate_up=gate_up, down=down, part=part))
    return tuple(tuple(sorted(local, key=lambda e: e.expert)) for local in layers)
