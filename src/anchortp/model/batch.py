"""One step's work as tensors. The same on every rank: it knows tokens and cache rows, but no layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Sequences that attend together are padded to the longest context among them. A group is closed when its
# padding would cost more than a second round of kernels, or its gathered context would take too much memory.
MAX_PADDING_TOKENS = 1024
MAX_GROUP_TOKENS = 16384
# Prefill chunks of up to so many tokens attend together as well: what each of the ends of sequences that a KV mirror
# did not have yet needs is little, and a round of kernels a layer for each took longer than all the rest of the step.
SHORT_CHUNK_TOKENS = 32


class BatchEntry(Protocol):
    """What the scheduler says about one sequence; it has `start` tokens in the cache already."""

    @property
    def token_ids(self) -> Sequence[int]: ...  # to compute, at least one

    @property
    def start(self) -> int: ...  # position of the first of them

    @property
    def block_ids(self) -> Sequence[int]: ...  # of the whole sequence, these tokens included

    @property
    def sample(self) -> bool: ...  # wants the logits after its last token


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one new token each: rows `[start, stop)` of the batch.

    `blocks`: int64 `[rows, blocks]`, the block tables up to the new token; a shorter one is filled up with the
    sequence's own first block, so that no sequence ever reads another's.
    `valid`: bool `[rows, num_keys]`, which of the gathered tokens are the sequence's; None if all are.
    Whole blocks are attended to: keys that are not contiguous would be copied before they are multiplied, which
    costs more than multiplying a few too many.
    """

    start: int
    stop: int
    blocks: Tensor
    num_keys: int  # tokens in `blocks` of one sequence
    valid: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Consecutive tokens of one sequence: rows `[start, stop)` of the batch, its last `stop - start` tokens.

    `blocks`: int64 `[1, blocks]`, its block table up to the last token of the chunk.
    """

    start: int
    stop: int
    blocks: Tensor
    num_keys: int  # all its tokens, the chunk included


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Rows are tokens: decoding sequences first, then short prefill chunks, each by ascending context, then others.

    `opened_blocks`: blocks whose first token is in this batch and whose last is not. Their rest still holds what
    an earlier sequence left, and decoding gathers whole blocks: they are zeroed before they are written, because
    a NaN there would pass through the mask.
    """

    block_size: int
    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    cache_slots: Tensor  # int64 [rows]: the cache row that each token's keys and values go to
    opened_blocks: Tensor  # int64 [opened]
    sample_rows: Tensor  # int64 [sampled]: rows to compute logits for, in the order of the entries
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]

    @classmethod
    def build(cls, entries: Sequence[BatchEntry], block_size: int) -> ForwardBatch:
        """Raises nothing of its own: entries come from our scheduler."""
        for entry in entries:
            assert entry.token_ids, "an entry without tokens"
            assert _context(entry) <= len(entry.block_ids) * block_size, "block table too short"
        order = sorted(range(len(entries)), key=lambda i: _sort_key(entries[i]))
        ordered = [entries[i] for i in order]
        num_decode = sum(len(entry.token_ids) == 1 for entry in ordered)
        last_row = _last_rows(ordered)
        row_of = {entry: row for entry, row in zip(order, last_row, strict=True)}
        positions = [p for entry in ordered for p in range(entry.start, _context(entry))]
        slots = [
            entry.block_ids[p // block_size] * block_size + p % block_size
            for entry in ordered
            for p in range(entry.start, _context(entry))
        ]
        return cls(
            block_size=block_size,
            token_ids=_int64([token for entry in ordered for token in entry.token_ids]),
            positions=_int64(positions),
            cache_slots=_int64(slots),
            opened_blocks=_int64(_opened_blocks(ordered, block_size)),
            sample_rows=_int64([row_of[i] for i, entry in enumerate(entries) if entry.sample]),
            decode=tuple(_decode_groups(ordered[:num_decode], block_size)),
            prefill=tuple(_prefill_chunks(ordered[num_decode:], num_decode, block_size)),
        )


def _context(entry: BatchEntry) -> int:
    return entry.start + len(entry.token_ids)


def _whole_blocks(entry: BatchEntry, block_size: int) -> int:
    """Blocks that its context reaches into."""
    return -(-_context(entry) // block_size)


def _sort_key(entry: BatchEntry) -> tuple[int, int]:
    if len(entry.token_ids) > SHORT_CHUNK_TOKENS:
        return (2, 0)
    return (int(len(entry.token_ids) > 1), _context(entry))


def _last_rows(entries: Sequence[BatchEntry]) -> list[int]:
    rows, end = [], 0
    for entry in entries:
        end += len(entry.token_ids)
        rows.append(end - 1)
    return rows


def _decode_groups(entries: Sequence[BatchEntry], block_size: int) -> Iterator[DecodeGroup]:
    for start, stop in cut_groups([_context(entry) for entry in entries], block_size):
        yield _decode_group(entries[start:stop], start, block_size)


def cut_groups(lengths: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """`[start, stop)` of contexts, given ascending, that attend together; cut from the longest downwards."""
    groups: list[tuple[int, int]] = []
    stop = len(lengths)
    while stop > 0:
        start, num_keys = stop - 1, -(-lengths[stop - 1] // block_size) * block_size
        padding = num_keys - lengths[start]
        while start > 0:
            padding += num_keys - lengths[start - 1]
            if padding > MAX_PADDING_TOKENS or (stop - start + 1) * num_keys > MAX_GROUP_TOKENS:
                break
            start -= 1
        groups.append((start, stop))
        stop = start
    return groups[::-1]


def _decode_group(entries: Sequence[BatchEntry], start: int, block_size: int) -> DecodeGroup:
    lengths = [_context(entry) for entry in entries]
    num_blocks = max(_whole_blocks(entry, block_size) for entry in entries)
    num_keys = num_blocks * block_size
    valid = None
    if min(lengths) < num_keys:
        valid = torch.arange(num_keys) < _int64(lengths).unsqueeze(1)
    return DecodeGroup(
        start=start,
        stop=start + len(entries),
        blocks=_int64([_table(entry, num_blocks, block_size) for entry in entries]),
        num_keys=num_keys,
        valid=valid,
    )


def _prefill_chunks(entries: Sequence[BatchEntry], start: int, block_size: int) -> Iterator[PrefillChunk]:
    for entry in entries:
        stop, num_keys = start + len(entry.token_ids), _context(entry)
        blocks = _int64([_table(entry, _whole_blocks(entry, block_size), block_size)])
        yield PrefillChunk(start=start, stop=stop, blocks=blocks, num_keys=num_keys)
        start = stop


def _table(entry: BatchEntry, num_blocks: int, block_size: int) -> list[int]:
    """The blocks in use, filled up to `num_blocks` with the first. Blocks beyond the context are not the
    sequence's yet: nothing has been written there."""
    used = list(entry.block_ids[: _whole_blocks(entry, block_size)])
    return used + used[:1] * (num_blocks - len(used))


def _opened_blocks(entries: Sequence[BatchEntry], block_size: int) -> list[int]:
    opened = []
    for entry in entries:
        index, filled = divmod(_context(entry), block_size)
        if filled and index * block_size >= entry.start:
            opened.append(entry.block_ids[index])
    return opened


def _int64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
