"""Attention by libraries [worker]: FlashInfer's over KV planes where they lie, torch's over what is gathered of them.

Both make a plan of each step, which then attends in every layer.

FlashInfer's paged caches are `[pages, heads, page_size, head_dim]` ("HND") of any strides, the same for keys and values
and below 2**32 elements. A layer's planes are such a cache: of keys from the first plane on, of values from the second,
two planes from head to head. So nothing is gathered and nothing is copied.

One of its wrappers serves prefill, decode and both in one step: each sequence has some queries, its last tokens.
Checked against the sources of flashinfer-python 0.7.2 (`BatchPrefillWithPagedKVCacheWrapper`, csrc/batch_prefill.cu).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from anchortp.config import ModelConfig
from anchortp.model.batch import DecodeGroup, ForwardBatch, PrefillChunk

WORKSPACE_BYTES = 128 << 20  # its own recommendation

Attend = Callable[[Tensor, Tensor], Tensor]  # queries [rows, heads, head_dim], cache as `KVCache.layer` -> as queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """The sequences of a step, in host memory, all int32: FlashInfer's notation."""

    rows: Tensor  # [sequences + 1]: first row of each, and the end
    starts: Tensor  # [sequences + 1]: where its blocks begin in `blocks`, and the end
    blocks: Tensor  # of all sequences, one after the other
    last_tokens: Tensor  # [sequences]: tokens in its last block

    @classmethod
    def of(cls, block_size: int, parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Pages:
        """`parts`: some sequences each: block tables `[n, any]`, tokens of context `[n]`, rows `[n]`."""
        rows, nums, blocks, last = [], [], [], []
        for tables, num_keys, num_rows in parts:
            num_blocks = (num_keys - 1) // block_size + 1
            blocks.append(tables[torch.arange(tables.shape[1], device="cpu") < num_blocks.unsqueeze(1)])
            rows.append(num_rows)
            nums.append(num_blocks)
            last.append((num_keys - 1) % block_size + 1)
        return cls(
            rows=_bounds(torch.cat(rows)),
            starts=_bounds(torch.cat(nums)),
            blocks=torch.cat(blocks).int(),
            last_tokens=torch.cat(last).int(),
        )

    @classmethod
    def of_batch(cls, batch: ForwardBatch) -> Pages:
        """On a device, this waits for it."""
        parts = []
        positions = batch.positions.cpu()
        for group in batch.decode:
            num_keys = positions[group.start : group.stop] + 1
            parts.append((group.blocks.cpu(), num_keys, torch.ones_like(num_keys)))
        for chunk in batch.prefill:
            sizes = torch.tensor([chunk.num_keys, chunk.stop - chunk.start], device="cpu")
            parts.append((chunk.blocks.cpu(), sizes[:1], sizes[1:]))
        return cls.of(batch.block_size, parts)


class FlashInfer:
    """Paged attention for one model on one device. `module`: the package `flashinfer`."""

    def __init__(self, module: Any, config: ModelConfig, block_size: int, device: torch.device):
        """Compiles what is not compiled yet, which may take a minute (the package flashinfer-jit-cache has it
        compiled). `config.resolve_engine_config` knows which models it can serve."""
        self._wrapper_type = module.BatchPrefillWithPagedKVCacheWrapper
        self._dtype = getattr(torch, config.dtype)
        self._head_dim, self._block_size, self._device = config.head_dim, block_size, device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)  # of one run at a time
        self._of_steps = self._wrapper_type(self._workspace, "HND", backend="fa2")
        self._touch()

    def plan(self, batch: ForwardBatch, num_heads: tuple[int, int]) -> Attend:
        """For all layers of this step, until the next plan. `num_heads`: q (as many for each KV head), and KV."""
        return self._plan(self._of_steps, Pages.of_batch(batch), num_heads)

    def fixed(self, num_sequences: int, num_blocks: int) -> FixedPlan:
        """For steps of so many rows, one to a sequence, of up to so many blocks in all, that are to be captured."""
        with self._device:
            buffers = {
                "qo_indptr_buf": torch.zeros(num_sequences + 1, dtype=torch.int32),
                "paged_kv_indptr_buf": torch.zeros(num_sequences + 1, dtype=torch.int32),
                "paged_kv_indices_buf": torch.zeros(num_blocks, dtype=torch.int32),
                "paged_kv_last_page_len_buf": torch.zeros(num_sequences, dtype=torch.int32),
            }
        wrapper = self._wrapper_type(self._workspace, "HND", use_cuda_graph=True, backend="fa2", **buffers)
        return FixedPlan(lambda pages, num_heads: self._plan(wrapper, pages, num_heads))

    def _plan(self, wrapper: Any, pages: Pages, num_heads: tuple[int, int]) -> Attend:
        with torch.device("cpu"):  # it does not expect that tensors without a device are made elsewhere
            wrapper.plan(
                pages.rows,
                pages.starts,
                pages.blocks,
                pages.last_tokens,
                num_heads[0],
                num_heads[1],
                self._head_dim,
                self._block_size,
                causal=True,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )
        return lambda queries, cache: wrapper.run(queries, as_paged(cache, self._block_size))

    def _touch(self) -> None:
        one = torch.ones(1, dtype=torch.int64, device="cpu")
        pages = Pages.of(self._block_size, [(one.view(1, 1) - 1, one, one)])
        cache = torch.zeros(2, self._block_size, self._head_dim, dtype=self._dtype, device=self._device)
        self._plan(self._of_steps, pages, (1, 1))(cache[:1, :1].contiguous(), cache)


class FixedPlan:
    """A plan over buffers that stay where they are: `attend` may be captured, and replayed after another `plan`."""

    def __init__(self, plan: Callable[[Pages, tuple[int, int]], Attend]):
        self._plan = plan
        self._attend: Attend | None = None

    def plan(self, pages: Pages, num_heads: tuple[int, int]) -> None:
        self._attend = self._plan(pages, num_heads)

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        assert self._attend is not None, "plan first"
        return self._attend(queries, cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows `[start, stop)` that attend in one call: some sequences with as many queries each."""

    start: int
    stop: int
    num_sequences: int
    blocks: Tensor  # int64 [sequences * blocks]
    num_keys: int  # that are attended to, from each sequence's first on
    mask: Tensor | None  # additive [sequences or 1, 1, queries * q heads per KV head, num_keys]
    is_causal: bool = False  # its queries are its keys, and there is no mask


class Sdpa:
    """Torch's `scaled_dot_product_attention`, for any model, dtype and device.

    The q heads of a KV head are so many queries more, not heads: then torch's kernel that takes a mask on GPUs, and no
    grouped heads, takes both. A chunk that begins its sequence needs no mask, so it has heads, and torch's flash
    attention. Whole blocks are gathered: what no token has been written to is zero (`ForwardBatch.opened_blocks`).
    """

    def __init__(self, config: ModelConfig, block_size: int):
        self._head_dim, self._block_size = config.head_dim, block_size
        self._dtype: torch.dtype = getattr(torch, config.dtype)

    def fixed(self, num_sequences: int, num_blocks: int) -> None:
        """Nothing is to be made ahead: `plan` does all on the device, in shapes that only the batch's own decide, so it
        is captured with the step."""

    def plan(self, batch: ForwardBatch, num_heads: tuple[int, int]) -> Attend:
        """As `FlashInfer.plan`."""
        group = num_heads[0] // num_heads[1]
        parts = [self._decode(part, group) for part in batch.decode]
        parts += [self._prefill(chunk, batch.positions, group) for chunk in batch.prefill]

        def attend(queries: Tensor, cache: Tensor) -> Tensor:
            found = [self._attend(part, queries[part.start : part.stop], cache) for part in parts]
            return found[0] if len(found) == 1 else torch.cat(found)

        return attend

    def _decode(self, part: DecodeGroup, group: int) -> _Part:
        return _Part(
            start=part.start,
            stop=part.stop,
            num_sequences=part.blocks.shape[0],
            blocks=part.blocks.flatten(),
            num_keys=part.num_keys,
            mask=None if part.valid is None else self._mask(part.valid.unsqueeze(1), group),
        )

    def _prefill(self, chunk: PrefillChunk, positions: Tensor, group: int) -> _Part:
        is_causal = chunk.num_keys == chunk.stop - chunk.start
        # A mask of whole blocks, so that its rows begin where a kernel can read them at once.
        num_keys = chunk.num_keys if is_causal else chunk.blocks.shape[1] * self._block_size
        seen = None if is_causal else torch.arange(num_keys) <= positions[chunk.start : chunk.stop].unsqueeze(1)
        return _Part(
            start=chunk.start,
            stop=chunk.stop,
            num_sequences=1,
            blocks=chunk.blocks.flatten(),
            num_keys=num_keys,
            mask=None if seen is None else self._mask(seen.unsqueeze(0), group),
            is_causal=is_causal,
        )

    def _mask(self, seen: Tensor, group: int) -> Tensor:
        """`seen`: bool `[sequences, queries, keys]`."""
        mask = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, float("-inf"))
        return mask.repeat_interleave(group, dim=1).unsqueeze(1)

    def _attend(self, part: _Part, queries: Tensor, cache: Tensor) -> Tensor:
        planes = cache.view(cache.shape[0], -1, self._block_size * self._head_dim)
        gathered = planes.index_select(1, part.blocks).view(cache.shape[0], part.num_sequences, -1, self._head_dim)
        keys, values = (gathered[which::2, :, : part.num_keys].transpose(0, 1) for which in (0, 1))
        if part.is_causal:
            by_head = queries.transpose(0, 1).unsqueeze(0)
            attended = scaled_dot_product_attention(by_head, keys, values, is_causal=True, enable_gqa=True)
            return attended.squeeze(0).transpose(0, 1)
        num_kv = keys.shape[1]
        by_kv = queries.view(part.num_sequences, -1, num_kv, queries.shape[1] // num_kv, self._head_dim).transpose(1, 2)
        folded = by_kv.reshape(part.num_sequences, num_kv, -1, self._head_dim)
        attended = scaled_dot_product_attention(folded, keys, values, attn_mask=part.mask)
        return attended.view(by_kv.shape).transpose(1, 2).reshape(queries.shape)


def as_paged(cache: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Views of a layer's planes `[2 * slots, tokens, head_dim]`: keys and values `[blocks, slots, block_size,
    head_dim]`."""
    blocks = cache.unflatten(1, (-1, block_size))
    return blocks[0::2].transpose(0, 1), blocks[1::2].transpose(0, 1)


def open_flashinfer(config: ModelConfig, block_size: int, device: torch.device) -> FlashInfer:
    """The package must be installed."""
    import flashinfer

    return FlashInfer(flashinfer, config, block_size, device)


def _bounds(nums: Tensor) -> Tensor:
    return torch.cat((nums.new_zeros(1), nums.cumsum(0))).int()
