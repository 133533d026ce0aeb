"""Decode steps over buffers that stay where they are, so that their kernels can be captured once and replayed [worker].

A step is cut at its collectives, in which ranks wait for each other by flags on the host: no graph can hold those.
Between two of them lies a *segment*, half a layer, of fifteen kernels or so that become one launch. So the same code
serves every width and every kind of group; with one rank nothing happens between segments.

Batches are padded to a *bucket*: sequences, and blocks of the longest one, to powers of two. A bucket that was just
made computes over its buffers without graphs; segments are captured one at a time, between steps, by `capture_next`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from anchortp.model.batch import BatchEntry, DecodeGroup, ForwardBatch
from anchortp.model.decoder import Decoder, ReduceGroup, Step
from anchortp.model.paged import Pages

# Runs nothing, or runs it in vain; returns what does to the device all that the work does to it, at the same addresses.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

MIN_BLOCKS = 8  # of a bucket: fewer are not worth another one
MAX_TOKENS = 1 << 15  # of a bucket's contexts together: beyond that padding costs more than launches do
MAX_BUCKETS = 16
MAX_FAILURES = 3  # of captures, without a bucket that was completed in between: then no more are tried

log = logging.getLogger("anchortp.engine")


class CudaGraphs:
    """`Capture` on a GPU. All graphs of one object share a pool of memory: they never run at the same time, and carry
    nothing from one to another but in tensors that are alive.

    `alone` is held during a capture: by it other threads put off what waits for the device.
    """

    def __init__(self, device: torch.device, alone: AbstractContextManager[object]):
        self._device, self._alone = device, alone
        self._begin()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            if self._first is None:
                self._first = self._captured(lambda: self._small.zero_())
            return self._captured(work).replay
        except BaseException:
            self._begin()  # the pool may count as one in which a capture is under way
            raise

    def _begin(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        # A pool whose graphs have all gone is refused, so one of them stays.
        self._first: torch.cuda.CUDAGraph | None = None
        self._small = torch.zeros(1, device=self._device)

    def _captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with self._alone:
            torch.cuda.synchronize()
            gc.disable()  # a mapping that it collects would wait for the device, which voids a capture
            try:
                self._capture(graph, work)
            finally:
                gc.enable()
        return graph

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            # Loads make pinned buffers and streams on their threads meanwhile; that must not void the capture. Not
            # `torch.cuda.graph`: it empties torch's cache of memory at every call.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()


class DecodeGraphs:
    """Decode steps of one decoder, whenever `takes` says so. What was captured is dropped when the decoder is bound to
    other units or other memory (`Decoder.bound_to`), and kept when it is not.

    The collectives are those of `Decoder.forward`, so one rank may compute a step here and another there.
    """

    def __init__(self, decoder: Decoder, capture: Capture):
        self._decoder = decoder
        self._capture: Capture | None = capture
        self._buckets: dict[tuple[int, int], _Bucket] = {}  # by (rows, blocks), least recently used first
        self._bound_to = decoder.bound_to
        self._num_failures = 0

    def close(self) -> None:
        """Lets go of all that was captured, and with that of the decoder's memory."""
        for bucket in self._buckets.values():
            bucket.close()
        self._buckets.clear()

    def takes(self, entries: Sequence[BatchEntry]) -> bool:
        """Whether these are a step of a dense model in which every sequence has one new token, and few enough keys."""
        if self._capture is None or self._decoder.moe is not None or any(len(e.token_ids) != 1 for e in entries):
            return False
        num_rows, num_blocks = self._size(len(entries), max(entry.start for entry in entries))
        return num_rows * num_blocks * self._decoder.kv_cache.block_size <= MAX_TOKENS

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, group: ReduceGroup) -> Tensor | None:
        """As `Decoder.forward`. `batch`: in host memory, of entries that `takes` has seen. New tensors are made on the
        decoder's device (`torch.device` as a context)."""
        decoder = self._decoder
        assert (group.rank, group.size) == (decoder.rank, decoder.num_ranks), "a group of another layout"
        size = self._size(batch.token_ids.shape[0], int(batch.positions.max()))
        bucket = self._bucket(size)
        if batch.opened_blocks.numel():
            decoder.kv_cache.clear(batch.opened_blocks)
        bucket.fill(batch)
        x = bucket.run(group)
        return decoder.logits(x.index_select(0, batch.sample_rows.to(x.device)), group)

    def capture_next(self) -> bool:
        """Captures one more segment of the bucket that was used last, a millisecond's work; False if there is none."""
        self._drop_what_is_bound_elsewhere()
        if self._capture is None or not self._buckets:
            return False
        size, bucket = next(reversed(self._buckets.items()))
        with torch.inference_mode():
            try:
                captured = bucket.capture_next(self._capture)
                if captured and bucket.is_captured:
                    self._num_failures = 0
                return captured
            except RuntimeError:
                del self._buckets[size]  # a capture that failed may have left tensors of no memory
                bucket.close()
                self._capture_failed()
        return False

    def _capture_failed(self) -> None:
        """Something else that used the device may have broken one; what breaks them again and again will go on."""
        self._num_failures += 1
        if self._num_failures < MAX_FAILURES:
            log.warning("a step could not be captured as a graph; it is tried again", exc_info=True)
            return
        log.exception("steps cannot be captured as graphs on this device; decoding goes on without them")
        self._capture = None
        self.close()

    def _size(self, num_rows: int, last_position: int) -> tuple[int, int]:
        num_blocks = last_position // self._decoder.kv_cache.block_size + 1
        return _power_of_two(num_rows), max(MIN_BLOCKS, _power_of_two(num_blocks))

    def _drop_what_is_bound_elsewhere(self) -> None:
        if self._bound_to != self._decoder.bound_to:
            self.close()
            self._bound_to = self._decoder.bound_to

    def _bucket(self, size: tuple[int, int]) -> _Bucket:
        self._drop_what_is_bound_elsewhere()
        bucket = self._buckets.pop(size, None)
        if bucket is None:
            bucket = _Bucket(self._decoder, *size)
            if len(self._buckets) == MAX_BUCKETS:
                self._buckets.pop(next(iter(self._buckets))).close()
        self._buckets[size] = bucket
        return bucket


class _Bucket:
    """Steps of up to `num_rows` sequences of up to `num_blocks` blocks.

    Rows that no sequence has repeat the first one, all of it: they write what it writes, where it writes it. What they
    add to the residual stream is taken from the first row, as the collectives leave them out.
    """

    def __init__(self, decoder: Decoder, num_rows: int, num_blocks: int):
        self._decoder = decoder
        self._num_rows, self._num_blocks = num_rows, num_blocks
        self._num_keys = num_blocks * decoder.kv_cache.block_size
        self._used = 0
        self._inputs = torch.zeros(num_rows * (4 + num_blocks), dtype=torch.int64)
        hidden = decoder.config.hidden_size
        self._x = torch.zeros(num_rows, hidden, dtype=decoder.dtype)
        self._partial = torch.zeros(num_rows, hidden, dtype=decoder.dtype)
        self._step: Step | None = None  # what `_begin` made last: once that is captured, the graph writes it
        paged = decoder.paged if decoder.num_heads[1] else None
        self._paged = paged.fixed(num_rows, num_rows * num_blocks) if paged else None
        self._segments = [self._begin, *self._halves()]
        self._replays: list[Callable[[], None]] = []  # of the first segments: what is captured so far

    def close(self) -> None:
        """Its memory is free when this returns: segments refer to their bucket, so it would wait to be collected."""
        self._segments.clear()
        self._replays.clear()

    def fill(self, batch: ForwardBatch) -> None:
        """The batch's numbers into the buffers: one copy, whatever the device."""
        num = self._used = batch.token_ids.shape[0]
        host = torch.empty(self._inputs.shape, dtype=torch.int64, device="cpu")
        rows, token_ids, positions, cache_slots, blocks = self._parts(host)
        given = (batch.token_ids, batch.positions, batch.cache_slots)
        for part, values in zip((token_ids, positions, cache_slots), given, strict=True):
            part[:num], part[num:] = values, values[0]
        rows[:num], rows[num:] = torch.arange(num, device="cpu"), 0
        for group in batch.decode:
            width = group.blocks.shape[1]
            blocks[group.start : group.stop, :width] = group.blocks
            blocks[group.start : group.stop, width:] = group.blocks[:, :1]
        blocks[num:] = blocks[0]
        self._inputs.copy_(host)
        if self._paged is not None:
            pages = Pages.of(batch.block_size, [(blocks, positions + 1, torch.ones_like(positions))])
            self._paged.plan(pages, self._decoder.num_heads)

    def run(self, group: ReduceGroup) -> Tensor:
        """The residual stream behind the last layer, `[rows, hidden]`."""
        partial = self._partial[: self._used]
        for index, segment in enumerate(self._segments):
            if index < len(self._replays):
                self._replays[index]()
            else:
                segment()
            reduced = group.all_reduce(partial)
            if reduced.data_ptr() != partial.data_ptr():
                partial.copy_(reduced)
        return self._x[: self._used] + partial

    @property
    def is_captured(self) -> bool:
        return len(self._replays) == len(self._segments)

    def capture_next(self, capture: Capture) -> bool:
        # In order: what a segment reads of `_begin` must be what a replay of `_begin` writes.
        if self.is_captured:
            return False
        self._replays.append(capture(self._segments[len(self._replays)]))
        return True

    def _parts(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The row that each row repeats, token ids, positions, cache slots, blocks `[rows, blocks]`."""
        num = self._num_rows
        rows, token_ids, positions, cache_slots = inputs[: 4 * num].view(4, num).unbind(0)
        return rows, token_ids, positions, cache_slots, inputs[4 * num :].view(num, self._num_blocks)

    def _begin(self) -> None:
        rows, token_ids, positions, cache_slots, blocks = self._parts(self._inputs)
        whole = DecodeGroup(
            start=0,
            stop=self._num_rows,
            blocks=blocks,
            num_keys=self._num_keys,
            valid=torch.arange(self._num_keys) <= positions.unsqueeze(1),
        )
        batch = ForwardBatch(
            block_size=self._decoder.kv_cache.block_size,
            token_ids=token_ids,
            positions=positions,
            cache_slots=cache_slots,
            opened_blocks=rows[:0],  # cleared before the step, all layers at once
            sample_rows=rows[:0],
            decode=(whole,),
            prefill=(),
        )
        self._step = self._decoder.prepare(batch, self._paged.attend if self._paged else None)
        self._x.zero_()
        self._partial.copy_(self._decoder.embed(token_ids))

    def _halves(self) -> list[Callable[[], None]]:
        layers = range(self._decoder.config.num_layers)
        return [half for layer in layers for half in (self._attention_of(layer), self._mlp_of(layer))]

    def _attention_of(self, layer: int) -> Callable[[], None]:
        def attention() -> None:
            decoder, weights = self._decoder, self._decoder.weights.layers[layer]
            x = self._take_sum(weights.input_norm)
            assert self._step is not None, "the step has not begun"
            self._partial.copy_(decoder.attention(layer, weights, x, self._step))

        return attention

    def _mlp_of(self, layer: int) -> Callable[[], None]:
        def mlp() -> None:
            decoder, weights = self._decoder, self._decoder.weights.layers[layer]
            self._partial.copy_(decoder.mlp(layer, weights, self._take_sum(weights.post_norm)))

        return mlp

    def _take_sum(self, norm: Tensor) -> Tensor:
        rows, *_ = self._parts(self._inputs)
        return self._decoder.add_norm(self._x, self._partial.index_select(0, rows), norm)


def _power_of_two(num: int) -> int:
    return 1 << (num - 1).bit_length()
