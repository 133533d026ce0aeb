"""The forward pass of one rank: whatever units its device holds, in whatever slots.

Runs in a worker. Every rank walks the same layers; after attention, MLP and embedding the partial sums meet in
an all-reduce, so it does not matter which rank contributes which unit. Arithmetic follows transformers: the
residual stream is in the model's dtype, norms are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from anchortp.layout import ATTENTION, KV, MLP, VOCAB, Layout, ModelUnits, Shard
from anchortp.model.batch import SHORT_CHUNK_TOKENS, DecodeGroup, ForwardBatch, PrefillChunk, cut_groups
from anchortp.model.kernels import Places, TorchKernels
from anchortp.model.kv_cache import KVCache
from anchortp.model.moe import MoE
from anchortp.model.paged import Attend, FlashInfer, Sdpa
from anchortp.model.rope import RopeTables
from anchortp.model.weights import LayerWeights, WeightViews

# Queries of a prefill chunk that attend at once. Their scores stay in the L2 cache, and no key after the tile
# is touched. With explicit matmuls this took 2.4 ms for 512 tokens of 9 heads in bf16 on one thread, against
# 7.6 ms for torch's fused attention on CPU.
TILE_QUERIES = 64

# For weights that are still on their way. Called before each layer (its number) and before the logits (the number of
# layers): returns once those weights may be used, or raises. The embedding must be there before the pass begins.
Gate = Callable[[int], None]


class ReduceGroup(Protocol):
    """What the decoder asks of a group; `anchortp.comm` has them."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def gather(self, x: Tensor, cols: tuple[int, ...], root: int = 0) -> list[Tensor] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """How one shard's heads line up. G is the largest number of local q heads that read one local KV slot."""

    num_q: int
    num_kv: int
    group: int  # G
    pick: Tensor  # int64 [num_kv * G]: q slot per place in the groups; a missing one repeats slot 0
    back: Tensor | None  # int64 [num_q]: place of each q slot; None if the groups are the slots in order
    plane_starts: Tensor  # int64 [2, 1, num_kv, 1]: first block of the plane of keys / values of a KV slot
    diagonal: Tensor  # [TILE_QUERIES * G, TILE_QUERIES]: 0 where a query may see a key of its tile, else -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """Batch rows `[start, stop)` that attend together, and where their context lies: a decode group, short prefill
    chunks of several sequences, or a chunk of one."""

    start: int
    stop: int
    num_keys: int  # of the longest sequence
    num_planes: int  # sequences * num_kv
    blocks: Tensor  # int64 [2 * num_planes * blocks]: blocks of a layer's planes, keys before values
    gathered: Tensor  # [2 * num_planes * blocks, block_size * head_dim]: for what lies there, of one layer at a time
    mask: Tensor | None  # additive [num_planes, 1 or queries * G, num_keys]; None if all see all, and of one chunk
    spread: Tensor | None = None  # short chunks: int64 [sequences * queries], rows from `start` on, the last repeated
    picked: Tensor | None = None  # int64 [stop - start]: place of each row in `spread`


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Places):
    """What all layers of one forward pass share."""

    attend: Attend | None  # by blocks where they lie; else decode and prefill say what to gather
    groups: tuple[_Context, ...]  # of several sequences, each with few queries
    chunks: tuple[_Context, ...]  # of one sequence each


class Decoder:
    """Llama, Qwen3, Mixtral and Qwen3-MoE over one shard. Holds views and small index tables, no weights of its own."""

    def __init__(
        self,
        units: ModelUnits,
        layout: Layout,
        rank: int,
        weights: WeightViews,
        kv_cache: KVCache,
        max_model_len: int,
        paged: FlashInfer | Sdpa | None = None,
        kernels: TorchKernels | None = None,
    ):
        """`paged`: the library that attends; else matrices are multiplied."""
        self.paged = paged
        self.kernels = kernels or TorchKernels()
        self.units = units
        self.config = units.config
        self.dtype = getattr(torch, units.config.dtype)
        self.max_model_len = max_model_len
        self._rope = RopeTables(units.config, max_model_len)
        self.weights = weights
        self.bound_to: object = None  # the units and the memory that kernels of this rank read and write
        self.rebind(layout, rank, weights, kv_cache)

    def rebind(self, layout: Layout, rank: int, weights: WeightViews, kv_cache: KVCache) -> None:
        """Takes over another layout, rank or arena. Costs a millisecond: only index tables are rebuilt, and those that
        `bound_to` names are kept as long as it stays the same."""
        shard = layout.shards[rank]
        assert weights.shard == shard and kv_cache.shard == shard, "views of another shard"
        bound_to = (shard, weights.address, kv_cache.address, kv_cache.num_blocks)
        if bound_to != self.bound_to:
            self.bound_to = bound_to
            self._heads = _line_up(self.units, shard, kv_cache.num_blocks, self.dtype)
            self._local_row = _local_rows(self.units, shard)
        self.rank = rank
        self.num_ranks = len(layout.shards)
        self.weights = weights
        self.kv_cache = kv_cache
        self._vocab_units = tuple(torch.tensor(s[VOCAB], dtype=torch.int64) for s in layout.shards)
        self._vocab_ordered = all(a < b for a, b in pairwise(u for s in layout.shards for u in s[VOCAB]))
        self.moe = MoE(self.units, layout, rank, weights, self.kernels) if self.config.moe else None
        self._gathered = torch.empty(0, dtype=self.dtype)  # context of one group, reused by all layers and groups

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, group: ReduceGroup, gate: Gate | None = None) -> Tensor | None:
        """One step: writes the batch's keys and values into the cache, computes logits where asked.

        Returns float32 `[sampled, vocab_size]` on rank 0, in the order of the entries, and None on the others.
        Every rank of the group must call it with an equal batch. Raises what the group and `gate` raise.
        """
        assert (group.rank, group.size) == (self.rank, self.num_ranks), "a group of another layout"
        assert batch.block_size == self.kv_cache.block_size, "a batch for another block size"
        if batch.opened_blocks.numel():
            self.kv_cache.clear(batch.opened_blocks)
        step = self.prepare(batch)
        if self.moe is not None:
            self.moe.begin(batch.positions)
        x = self.layers(group.all_reduce(self.embed(batch.token_ids)), step, group, gate)
        if gate:
            gate(self.config.num_layers)
        return self.logits(x.index_select(0, batch.sample_rows), group)

    def layers(self, x: Tensor, step: Step, group: ReduceGroup, gate: Gate | None) -> Tensor:
        """The residual stream `x` `[rows, hidden]`, of which no more is needed, through all layers."""
        more = None
        for index, layer in enumerate(self.weights.layers):
            if gate:
                gate(index)
            more = group.all_reduce(self.attention(index, layer, self.add_norm(x, more, layer.input_norm), step))
            more = group.all_reduce(self.mlp(index, layer, self.add_norm(x, more, layer.post_norm)))
        assert more is not None, "a model without layers"
        return x.add_(more)

    def prepare(self, batch: ForwardBatch, attend: Attend | None = None) -> Step:
        """`attend`: made for this batch already."""
        heads = self._heads
        if attend is None and self.paged is not None and heads.num_q:
            attend = self.paged.plan(batch, self.num_heads)
        cos, sin = self.kernels.rotation(self._rope, batch.positions, heads.num_q, heads.num_kv)
        return Step(
            positions=batch.positions,
            cache_slots=batch.cache_slots,
            cos=cos,
            sin=sin,
            attend=attend,
            groups=() if attend else tuple(self._groups(batch)),
            chunks=()
            if attend
            else tuple(self._context(chunk, None) for chunk in batch.prefill if not _is_short(chunk)),
        )

    def _groups(self, batch: ForwardBatch) -> Iterator[_Context]:
        for group in batch.decode:
            yield self._context(group, None if group.valid is None else group.valid.unsqueeze(1))
        short = [chunk for chunk in batch.prefill if _is_short(chunk)]
        for start, stop in cut_groups([chunk.num_keys for chunk in short], batch.block_size):
            yield self._short_chunks(short[start:stop], batch.block_size)

    def _short_chunks(self, chunks: Sequence[PrefillChunk], block_size: int) -> _Context:
        """As many queries of each as the longest chunk has: those that there are not repeat the chunk's last."""
        first, sizes = chunks[0].start, [chunk.stop - chunk.start for chunk in chunks]
        num_queries, num_blocks = max(sizes), max(chunk.blocks.shape[1] for chunk in chunks)
        whole = DecodeGroup(
            start=first,
            stop=chunks[-1].stop,
            blocks=torch.cat([_filled_up(chunk.blocks, num_blocks) for chunk in chunks]),
            num_keys=num_blocks * block_size,
            valid=None,
        )
        # Of each query: its row, counted from the first, and the last key that it sees.
        numbers = [
            (chunk.start - first + query, chunk.num_keys - size + query)
            for chunk, size in zip(chunks, sizes, strict=True)
            for query in (min(place, size - 1) for place in range(num_queries))
        ]
        rows, last_keys = torch.tensor(numbers).T
        picked = [index * num_queries + query for index, size in enumerate(sizes) for query in range(size)]
        seen = torch.arange(whole.num_keys) <= last_keys.view(-1, num_queries, 1)
        context = self._context(whole, seen)
        return replace(context, spread=rows, picked=torch.tensor(picked))

    @property
    def num_heads(self) -> tuple[int, int]:
        """The q heads as `Attend` gets them, as many to each KV head, and the KV heads."""
        return self._heads.num_kv * self._heads.group, self._heads.num_kv

    def _context(self, part: DecodeGroup | PrefillChunk, valid: Tensor | None) -> _Context:
        """`valid`: bool `[sequences, queries, num_keys]`, which keys a query sees; None if all, or by place."""
        heads = self._heads
        blocks = (heads.plane_starts + part.blocks[None, :, None, :]).flatten()
        block_elements = self.kv_cache.block_size * self.config.head_dim
        if self._gathered.numel() < blocks.shape[0] * block_elements:
            self._gathered = torch.empty(blocks.shape[0] * block_elements, dtype=self.dtype)
        mask = None
        if valid is not None:
            mask = torch.zeros(valid.shape, dtype=self.dtype).masked_fill_(~valid, float("-inf"))
            if valid.shape[1] > 1:
                mask = mask.repeat_interleave(heads.group, dim=1)
            mask = mask.repeat_interleave(heads.num_kv, dim=0)
        return _Context(
            start=part.start,
            stop=part.stop,
            num_keys=part.num_keys,
            num_planes=part.blocks.shape[0] * heads.num_kv,
            blocks=blocks,
            gathered=self._gathered[: blocks.shape[0] * block_elements].view(-1, block_elements),
            mask=mask,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Partial `[rows, hidden]`: zeros for tokens whose embedding another rank holds."""
        if not self.weights.shard[VOCAB]:
            return torch.zeros(token_ids.shape[0], self.config.hidden_size, dtype=self.dtype)
        rows = self._local_row.index_select(0, token_ids)
        embedded = self.weights.embedding(rows.clamp(min=0))
        return embedded.masked_fill_((rows < 0).unsqueeze(1), 0)

    def attention(self, index: int, layer: LayerWeights, x: Tensor, step: Step) -> Tensor:
        """Of the normalised `x`: partial `[rows, hidden]` of this rank's q heads; their keys and values go to the
        cache."""
        if not self._heads.num_q:
            return torch.zeros_like(x)
        cache = self.kv_cache.layer(index)
        attended = self._attend(self._rotate_store(layer, x, cache, step), cache, step)
        return self.kernels.times(attended.reshape(x.shape[0], -1), layer.o)

    def _rotate_store(self, layer: LayerWeights, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        """The queries of `_attend`; k and v go to the cache."""
        q, kv = self.kernels.linear(x, layer.q), self.kernels.linear(x, layer.kv)
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        return self.kernels.rotate_store(q, kv, norms, self.config.rms_eps, step, cache, self._heads.pick)

    def _attend(self, queries: Tensor, cache: Tensor, step: Step) -> Tensor:
        """`[rows, num_kv * G, head_dim]`, as `_Heads.pick` orders them -> what every q slot finds in the cache,
        `[rows, num_q, head_dim]`."""
        if step.attend is not None:
            attended = step.attend(queries, cache)
        else:
            planes = cache.view(cache.shape[0] * self.kv_cache.num_blocks, -1)  # a row per block
            parts = [self._attend_together(queries, planes, context) for context in step.groups]
            parts += [self._attend_alone(queries, planes, context) for context in step.chunks]
            attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended if self._heads.back is None else attended.index_select(1, self._heads.back)

    def _attend_together(self, queries: Tensor, planes: Tensor, context: _Context) -> Tensor:
        """A few queries of each of several sequences -> `[rows, num_kv * G, head_dim]`."""
        heads, hd = self._heads, self.config.head_dim
        keys, values = self._gather(planes, context)
        rows = queries[context.start : context.stop]
        if context.spread is None:
            grouped = rows.view(-1, heads.group, hd)
        else:
            num_sequences = context.num_planes // heads.num_kv
            by_query = rows.index_select(0, context.spread).view(num_sequences, -1, heads.num_kv, heads.group, hd)
            by_head = by_query.transpose(1, 2)
            grouped = by_head.reshape(context.num_planes, -1, hd)
        attended = torch.bmm(torch.softmax(_scores(grouped, keys, context.mask, hd), -1), values)
        if context.picked is not None:
            by_query = attended.view(by_head.shape).transpose(1, 2)
            attended = by_query.reshape(-1, heads.num_kv * heads.group, hd).index_select(0, context.picked)
        return attended.view(-1, heads.num_kv * heads.group, hd)

    def _attend_alone(self, queries: Tensor, planes: Tensor, context: _Context) -> Tensor:
        """Consecutive queries of one sequence -> `[queries, num_kv * G, head_dim]`, a tile at a time."""
        heads, hd = self._heads, self.config.head_dim
        keys, values = self._gather(planes, context)
        first_key = context.num_keys - (context.stop - context.start)  # the key of the chunk's first query
        chunk = queries[context.start : context.stop]
        out = torch.empty_like(chunk).view(-1, heads.num_kv, heads.group, hd)
        for start in range(0, chunk.shape[0], TILE_QUERIES):
            tile = chunk[start : start + TILE_QUERIES]
            size, num_keys = tile.shape[0], first_key + start + tile.shape[0]
            by_kv = tile.view(size, heads.num_kv, heads.group, hd).transpose(0, 1)
            grouped = by_kv.reshape(heads.num_kv, size * heads.group, hd)
            scores = _scores(grouped, keys[:, :num_keys], None, hd)
            scores[:, :, num_keys - size :].add_(heads.diagonal[: size * heads.group, :size])
            attended = torch.bmm(torch.softmax(scores, -1), values[:, :num_keys])
            by_query = attended.view(heads.num_kv, size, heads.group, hd).transpose(0, 1)
            out[start : start + size].copy_(by_query)
        return out.view(chunk.shape)

    def _gather(self, planes: Tensor, context: _Context) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_planes, num_keys, head_dim]`, valid until the next call."""
        torch.index_select(planes, 0, context.blocks, out=context.gathered)
        both = context.gathered.view(2, context.num_planes, -1, self.config.head_dim)[:, :, : context.num_keys]
        return both[0], both[1]

    def mlp(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        """Of the normalised `x`: partial `[rows, hidden]` of this rank's MLP blocks or experts."""
        if self.moe is not None:
            return self.moe.forward(index, x)
        assert layer.gate_up is not None and layer.down is not None
        if not self.weights.shard[MLP]:
            return torch.zeros_like(x)
        gated = self.kernels.gate(self.kernels.linear(x, layer.gate_up), self.units.mlp_block)
        return self.kernels.times(gated, layer.down)

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> Tensor:
        """Adds `more` to the residual stream `x`, in place -> what of it goes into the next half of a layer."""
        return self.kernels.add_norm(x, more, weight, self.config.rms_eps)

    def logits(self, x: Tensor, group: ReduceGroup) -> Tensor | None:
        """`x` `[sampled, hidden]` -> float32 logits in vocabulary order on the root."""
        if not x.shape[0]:
            return x.new_zeros(0, self.config.vocab_size, dtype=torch.float32) if self.rank == 0 else None
        # Gathered in the model's dtype: that is all the precision a matmul gives, in half the bytes of float32.
        local = self.kernels.linear(self.add_norm(x, None, self.weights.final_norm), self.weights.lm_head)
        cols = tuple(len(held) * self.units.vocab_block for held in self._vocab_units)
        parts = group.gather(local, cols, root=0)
        if parts is None:
            return None
        return self._in_vocabulary_order(parts)[:, : self.config.vocab_size].float()

    def _in_vocabulary_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Columns of all ranks -> `[sampled, all vocabulary units * vocab_block]`, padding at the end."""
        if self._vocab_ordered:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        num_rows, block = parts[0].shape[0], self.units.vocab_block
        out = parts[0].new_empty(num_rows, self.units.num_units[VOCAB], block)
        for held, part in zip(self._vocab_units, parts, strict=True):
            out.index_copy_(1, held, part.view(num_rows, -1, block))
        return out.view(num_rows, -1)


def _is_short(chunk: PrefillChunk) -> bool:
    return chunk.stop - chunk.start <= SHORT_CHUNK_TOKENS


def _filled_up(blocks: Tensor, num_blocks: int) -> Tensor:
    """`[1, num_blocks]`: with the sequence's own first block, as those of a decode group."""
    return torch.cat((blocks, blocks[:, :1].expand(-1, num_blocks - blocks.shape[1])), dim=1)


def _scores(queries: Tensor, keys: Tensor, mask: Tensor | None, head_dim: int) -> Tensor:
    """Scaled `queries @ keys.T` (+ mask) per KV head: `[planes, queries, keys]`."""
    scale = head_dim**-0.5
    if mask is None:  # beta=0: the first argument is not read
        return torch.baddbmm(queries[:, :1, :1], queries, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale)


def _line_up(units: ModelUnits, shard: Shard, num_blocks: int, dtype: torch.dtype) -> _Heads:
    readers = {kv: [] for kv in shard[KV]}
    for slot, q_head in enumerate(shard[ATTENTION]):
        readers[units.kv_head_of(q_head)].append(slot)
    assert all(readers.values()), "a KV head that no local q head reads"
    group = max((len(slots) for slots in readers.values()), default=0)
    places = [slot for slots in readers.values() for slot in slots + [-1] * (group - len(slots))]
    back = [places.index(slot) for slot in range(len(shard[ATTENTION]))]
    num_kv = len(readers)
    starts = torch.arange(2 * num_kv).view(num_kv, 2).t() * num_blocks
    above = torch.full((TILE_QUERIES, TILE_QUERIES), float("-inf"), dtype=dtype).triu_(1)
    return _Heads(
        num_q=len(back),
        num_kv=num_kv,
        group=group,
        pick=torch.tensor(places, dtype=torch.int64).clamp_(min=0),
        back=None if back == list(range(len(places))) else torch.tensor(back, dtype=torch.int64),
        plane_starts=starts.reshape(2, 1, num_kv, 1),
        diagonal=above.repeat_interleave(group, dim=0),
    )


def _local_rows(units: ModelUnits, shard: Shard) -> Tensor:
    """int64, per token of the padded vocabulary: its row in the local embedding, -1 if it is elsewhere."""
    table = torch.full((units.num_units[VOCAB], units.vocab_block), -1, dtype=torch.int64)
    held = torch.tensor(shard[VOCAB], dtype=torch.int64)
    table[held] = torch.arange(held.numel() * units.vocab_block).view(-1, units.vocab_block)
    return table.flatten()
