"""Tiny random models, whole tensor-parallel groups in one process, and transformers as the oracle.

`make_tiny_model` writes a folder, `load_group` gives a `TPGroup` over it for any layout, `reference_logits` is
what transformers computes. Memory starts as NaN everywhere, so reading what was never written shows.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from anchortp.config import cache_folder, load_model_config
from anchortp.layout import (
    ATTENTION,
    EVERY_FAMILY,
    EXPERT,
    KV,
    KVAddresses,
    Layout,
    ModelUnits,
    Shard,
    WeightAddresses,
    empty_shard,
    initial_layout,
    model_units,
)
from anchortp.model import Decoder, ForwardBatch, KVCache, NativeDecoder, NativeKernels, TorchKernels, WeightViews
from anchortp.native import Library, build_kernels
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import Item, load_replicated, load_units

MAX_LEN = 128
GROUP_TIMEOUT_S = 30.0
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

# kind -> (model_type, what differs from the base shape)
KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 16, "rope_parameters": LINEAR_ROPE}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 6}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
}
MOE_KINDS: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "mixtral-one": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16}
        | {"norm_topk_prob": True},
    ),
    "qwen3-moe-raw": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": False},
    ),
}
BASE_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 101,  # not a multiple of any block: the last vocabulary unit is padded
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sequence's part of a step, as the scheduler would say it."""

    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: bool = True


def make_tiny_model(
    folder: Path,
    kind: str,
    *,
    seed: int = 0,
    max_shard_size: str = "50GB",
    dtype: str = "float32",
    original_format: bool = True,
    **shape,
) -> Path:
    """Saves a random model of `kind` (see KINDS; `shape` overrides config fields) with transformers.

    `original_format`: of experts; False: fused, as transformers has them in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = (KINDS | MOE_KINDS)[kind]
    config = AutoConfig.for_model(model_type, **{**BASE_SHAPE, **changes, **shape})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=max_shard_size, save_original_format=original_format
    )
    return folder


@lru_cache(maxsize=8)
def _reference_model(folder: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def reference_logits(folder: Path, token_ids: Sequence[int]) -> Tensor:
    """Float32 `[tokens, vocab_size]`: what transformers computes for one sequence."""
    return _reference_model(folder)(torch.tensor([list(token_ids)])).logits[0]


class _Meeting:
    """Where the threads of one group meet."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=GROUP_TIMEOUT_S)
        self.parts: list[Tensor] = [torch.empty(0)] * size


class ThreadGroup:
    """The collectives of one rank, among threads of this process: float32 sums in rank order."""

    def __init__(self, meeting: _Meeting, rank: int, size: int, epoch: int = 0):
        self._meeting = meeting
        self.rank = rank
        self.size = size
        self.epoch = epoch

    def all_reduce(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape, dtype=torch.float32)
        for part in self._exchange(x):
            total += part
        return total.to(x.dtype)

    def gather(self, x: Tensor, cols: tuple[int, ...], root: int = 0) -> list[Tensor] | None:
        assert x.shape[1] == cols[self.rank]
        parts = self._exchange(x)
        return parts if self.rank == root else None

    def abort(self) -> None:
        self._meeting.barrier.abort()

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._meeting.parts[self.rank] = x
        self._meeting.barrier.wait()
        parts = list(self._meeting.parts)
        self._meeting.barrier.wait()  # nobody overwrites what another has not read
        return parts


def thread_groups(size: int, epoch: int = 0) -> list[ThreadGroup]:
    meeting = _Meeting(size)
    return [ThreadGroup(meeting, rank, size, epoch) for rank in range(size)]


def nan_buffer(num_bytes: int) -> Tensor:
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


def shard_items(shard: Shard) -> list[Item]:
    return [(family, unit, slot) for family in EVERY_FAMILY for slot, unit in enumerate(shard[family])]


class TPGroup:
    """Every rank of a layout, each with arenas of its own, in one process. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        units: ModelUnits,
        layout: Layout,
        block_size: int,
        num_blocks: int,
        kernels: str | TorchKernels = "torch",
    ):
        layout.check(units)
        self.units = units
        if isinstance(kernels, str):
            kernels = native_kernels(units.config.dtype) if kernels == "native" else TorchKernels()
        self._kernels = kernels
        self.layout = layout
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.weight_addresses = WeightAddresses(units=units)
        self.kv_addresses = KVAddresses(config=units.config, block_size=block_size, num_blocks=num_blocks)
        self.checkpoint = Checkpoint.open(folder, units)
        self.weights = {d: self._loaded(layout[d]) for d in layout.devices}
        self.kv = {d: nan_buffer(self.kv_addresses.reserved_bytes) for d in layout.devices}
        self._decoders: dict[str, Decoder] = {}
        self._start()

    def _loaded(self, shard: Shard) -> Tensor:
        buffer = nan_buffer(self.weight_addresses.reserved_bytes)
        load_replicated(self.checkpoint, buffer, self.weight_addresses)
        load_units(self.checkpoint, buffer, self.weight_addresses, shard_items(shard))
        return buffer

    def _start(self) -> None:
        self.groups = thread_groups(len(self.layout.shards))
        for rank, shard in enumerate(self.layout.shards):  # a device that stays keeps its decoder, as in a worker
            if shard.device in self._decoders:
                self._decoders[shard.device].rebind(self.layout, rank, *self.views(shard))
            else:
                parts = (self.units, self.layout, rank, *self.views(shard), MAX_LEN)
                make = NativeDecoder if isinstance(self._kernels, NativeKernels) else Decoder
                self._decoders[shard.device] = make(*parts, kernels=self._kernels)
        self.decoders = [self._decoders[device] for device in self.layout.devices]
        self._pool = ThreadPoolExecutor(len(self.decoders))

    def views(self, shard: Shard) -> tuple[WeightViews, KVCache]:
        return (
            WeightViews(self.weights[shard.device], self.weight_addresses, shard),
            KVCache(self.kv[shard.device], self.kv_addresses, shard),
        )

    def rebind(self, layout: Layout, items: dict[str, list[Item]]) -> None:
        """Goes on under `layout`: loads `items` per device, keeps all other weights; the KV cache is empty."""
        layout.check(self.units)
        self._pool.shutdown()
        for device, wanted in items.items():
            load_units(self.checkpoint, self.weights[device], self.weight_addresses, wanted)
        self.layout = layout
        self.kv = {d: nan_buffer(self.kv_addresses.reserved_bytes) for d in layout.devices}
        self._start()

    def forward(self, entries: Sequence[Entry]) -> Tensor:
        """One step on every rank -> the root's logits `[sampled, vocab_size]`."""
        batch = ForwardBatch.build(entries, self.block_size)
        futures = [self._pool.submit(self._forward_rank, r, batch) for r in range(len(self.decoders))]
        results = [future.result(timeout=2 * GROUP_TIMEOUT_S) for future in futures]
        assert all(result is None for result in results[1:]), "a rank that is not the root has logits"
        assert results[0] is not None and results[0].dtype == torch.float32
        return results[0]

    def _forward_rank(self, rank: int, batch: ForwardBatch) -> Tensor | None:
        try:
            return self.decoders[rank].forward(batch, self.groups[rank])
        except BaseException:
            self.groups[rank].abort()
            raise

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> TPGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_group(
    folder: Path,
    layout: Layout | int = 1,
    *,
    block_size: int = 4,
    num_blocks: int = 64,
    dtype: str = "auto",
    expert_cut: str = "experts",
    panels: bool = False,
    kernels: str | TorchKernels = "torch",
) -> TPGroup:
    """A `TPGroup` over the model in `folder`; `layout` may be a number of devices with equal shards. `kernels`:
    "torch", "native", or some that all ranks share."""
    units = model_units(replace(load_model_config(folder, dtype, expert_cut), panels=panels))
    if isinstance(layout, int):
        layout = initial_layout(units, devices(layout))
    return TPGroup(folder, units, layout, block_size, num_blocks, kernels)


def native_kernels(dtype: str) -> NativeKernels:
    return NativeKernels(Library(str(build_kernels(cache_folder() / "kernels")), dtype))


def devices(num_devices: int) -> list[str]:
    return [f"cpu:{index}" for index in range(num_devices)]


def random_layout(units: ModelUnits, num_devices: int, rng: random.Random, num_replicas: int = 0) -> Layout:
    """Every unit on a random device in a random slot; some devices get nothing of some families. `num_replicas`:
    how often to try another copy of a random expert on a random device (where experts are units)."""
    held: dict[str, dict[str, list[int]]] = {d: {f: [] for f in EVERY_FAMILY} for d in devices(num_devices)}
    for family in units.families:
        if family == KV:
            continue
        takers = rng.sample(sorted(held), rng.randint(1, num_devices))
        for unit in rng.sample(range(units.num_units[family]), units.num_units[family]):
            held[rng.choice(takers)][family].append(unit)
    for _ in range(num_replicas if EXPERT in units.families else 0):
        experts, unit = held[rng.choice(sorted(held))][EXPERT], rng.randrange(units.num_units[EXPERT])
        if unit not in experts:
            experts.insert(rng.randint(0, len(experts)), unit)
    shards = []
    for device, slots in held.items():
        kv = sorted({units.kv_head_of(q) for q in slots[ATTENTION]})
        shard = empty_shard(device)
        for family in EVERY_FAMILY:
            units_here = rng.sample(kv, len(kv)) if family == KV else slots[family]
            shard = shard.appended(family, units_here)
        shards.append(shard)
    return Layout(shards=tuple(shards))


def scrambled_tables(num_sequences: int, group: TPGroup, rng: random.Random) -> list[tuple[int, ...]]:
    """A block table per sequence, blocks in random order, none shared."""
    blocks = rng.sample(range(group.num_blocks), group.num_blocks)
    each = group.num_blocks // num_sequences
    return [tuple(blocks[i * each : (i + 1) * each]) for i in range(num_sequences)]


def random_steps(
    sequences: Sequence[Sequence[int]], tables: Sequence[tuple[int, ...]], rng: random.Random, *, num_decode: int
) -> list[list[tuple[int, Entry]]]:
    """Steps that compute all of every sequence: random chunks, then the last `num_decode` tokens one by one.

    Each step is a list of (sequence, entry); all sample, so that every step can be compared.
    """
    done = [0] * len(sequences)
    steps = []
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        step = []
        for index, tokens in enumerate(sequences):
            left = len(tokens) - done[index]
            if left == 0 or (step and rng.random() < 0.3):
                continue
            size = rng.randint(1, left - num_decode) if left > num_decode else 1
            chunk = tuple(tokens[done[index] : done[index] + size])
            step.append((index, Entry(token_ids=chunk, start=done[index], block_ids=tables[index])))
            done[index] += size
        if step:
            steps.append(rng.sample(step, len(step)))
    return steps


def check_group(
    folder: Path, group: TPGroup, rng: random.Random, *, lengths: Sequence[int] = (23, 9, 40, 2), atol: float = 1e-4
) -> None:
    """Asserts that chunked prefill and decode of several sequences at once give transformers' logits."""
    vocab = group.units.config.vocab_size
    sequences = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
    expected = [reference_logits(folder, tokens) for tokens in sequences]
    tables = scrambled_tables(len(sequences), group, rng)
    for step in random_steps(sequences, tables, rng, num_decode=4):
        logits = group.forward([entry for _, entry in step])
        wanted = torch.stack([expected[i][e.start + len(e.token_ids) - 1] for i, e in step])
        torch.testing.assert_close(logits, wanted, atol=atol, rtol=1e-4)
