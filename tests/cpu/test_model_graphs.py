"""Decode steps that are captured and replayed give the logits of transformers, whatever happens between two of them.

`Tape` stands in for CUDA graphs: it records operations with the tensors they had, and replays just these. What Python
decides, and every address, is thereby frozen as in a graph; what a step reads that no replay has written is poison.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anchortp.layout import Layout, initial_layout
from anchortp.model import DecodeGraphs, ForwardBatch
from anchortp.model import graphs as graphs_module
from tests.cpu.model_tools import (
    Entry,
    ThreadGroup,
    TPGroup,
    check_group,
    devices,
    load_group,
    make_tiny_model,
    nan_buffer,
    random_layout,
    reference_logits,
    scrambled_tables,
)

KINDS = ("llama", "llama-tied", "qwen3")
POISON = 1 << 40  # an index that is nowhere


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_tiny_model(tmp_path_factory.mktemp(kind), kind) for kind in (*KINDS, "mixtral")}


def tensors(value: object) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def storages(value: object) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors(value)}


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []  # and the tensors that it makes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = storages((args, kwargs))
        result = func(*args, **kwargs)
        is_new = not storages(result) & known
        assert is_new or storages(result) <= known, f"{func} makes some of what it returns"
        self.calls.append((func, args, kwargs, tensors(result) if is_new else []))
        return result


@dataclass
class Tape:
    """`Capture` over a rank's `memory`, which looks as if what was recorded had not run."""

    memory: Callable[[], Tensor]
    num_captured: int = 0
    num_replayed: int = 0
    made: list[Tensor] = field(default_factory=list)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        before = self.memory().clone()
        with _Recorder() as recorder:
            work()
        self.memory().copy_(before)
        self.made += [made for *_, new in recorder.calls for made in new]
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            for func, args, kwargs, new in recorder.calls:
                result = func(*args, **kwargs)
                for made, again in zip(new, tensors(result) if new else [], strict=True):
                    made.copy_(again)

        return replay

    @torch.inference_mode()
    def poison(self) -> None:
        """Before a step: nothing of an earlier one may be needed."""
        for new in self.made:
            new.fill_(float("nan") if new.is_floating_point() else POISON if new.dtype == torch.int64 else 1)


class _InPlace:
    """A `ThreadGroup` that sums as most groups do: into the tensor given, of which the others keep nothing."""

    def __init__(self, group: ThreadGroup):
        self._group, self.rank, self.size, self.gather = group, group.rank, group.size, group.gather

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self._group.all_reduce(x.clone()))


@dataclass
class Graphed:
    """A group whose ranks (those in `ranks`, by default all) use graphs, and capture some segments after each step."""

    group: TPGroup
    captures_per_step: int = 1
    ranks: frozenset[int] | None = None
    tapes: list[Tape] = field(default_factory=list)

    def __post_init__(self):
        group, self.captured = self.group, 0
        self.tapes = [Tape(lambda d=device: group.kv[d]) for device in group.layout.devices]
        self.graphs = [DecodeGraphs(d, tape) for d, tape in zip(group.decoders, self.tapes, strict=True)]
        self._plain = group._forward_rank
        group._forward_rank = self._forward_rank
        group.forward = self.forward

    def forward(self, entries) -> Tensor:
        self.entries = entries
        for tape in self.tapes:
            tape.poison()
        logits = TPGroup.forward(self.group, entries)
        for graphs in self.graphs:
            for _ in range(self.captures_per_step):
                graphs.capture_next()
        return logits

    def _forward_rank(self, rank: int, batch: ForwardBatch) -> Tensor | None:
        if (self.ranks is None or rank in self.ranks) and self.graphs[rank].takes(self.entries):
            try:
                return self.graphs[rank].forward(batch, _InPlace(self.group.groups[rank]))
            except BaseException:
                self.group.groups[rank].abort()
                raise
        return self._plain(rank, batch)


def refuse(work: Callable[[], None]) -> NoReturn:
    """As a capture that fails on its way."""
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


@contextlib.contextmanager
def collecting_nothing() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def prefill_all(group: TPGroup, sequences, tables) -> None:
    for tokens, table in zip(sequences, tables, strict=True):
        group.forward([Entry(token_ids=tuple(tokens), start=0, block_ids=table)])


def decode(folder: Path, group: TPGroup, sequences, tables, num_steps: int, rng: random.Random) -> None:
    """Greedy steps of all sequences, in a new order each time; every step is compared with transformers."""
    for _ in range(num_steps):
        order = rng.sample(range(len(sequences)), len(sequences))
        entries = []
        for index in order:
            sequences[index].append(rng.randrange(group.units.config.vocab_size))
            entries.append(
                Entry(token_ids=(sequences[index][-1],), start=len(sequences[index]) - 1, block_ids=tables[index])
            )
        logits = group.forward(entries)
        expected = torch.stack([reference_logits(folder, sequences[index])[-1] for index in order])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def begin(group: TPGroup, lengths, rng: random.Random):
    sequences = [[rng.randrange(group.units.config.vocab_size) for _ in range(length)] for length in lengths]
    tables = scrambled_tables(len(lengths), group, rng)
    prefill_all(group, sequences, tables)
    return sequences, tables


@pytest.mark.parametrize(("kind", "captures"), list(itertools.product(KINDS, (0, 1, 3))))
def test_decode_is_transformers_while_segments_are_captured(folders, kind: str, captures: int) -> None:
    """Rows and blocks are padded, tables and slots are random, cache memory is NaN until it is written."""
    rng = random.Random(captures)
    with load_group(folders[kind], 1) as probe:
        layout = random_layout(probe.units, 3, rng)
    with load_group(folders[kind], layout) as group:
        graphed = Graphed(group, captures)
        sequences, tables = begin(group, (5, 11, 20), rng)
        decode(folders[kind], group, sequences, tables, 8, rng)
        num_segments = 1 + 2 * group.units.config.num_layers
        for tape in graphed.tapes:
            assert tape.num_captured == min(8 * captures, num_segments)
            assert (tape.num_replayed > 0) == (captures > 0)


def test_chunked_prefill_and_decode_in_one_step_go_the_plain_way(folders) -> None:
    with load_group(folders["llama"], 2) as group:
        graphed = Graphed(group, captures_per_step=9)
        check_group(folders["llama"], group, random.Random(3))
        assert all(tape.num_replayed for tape in graphed.tapes)


def test_one_rank_may_use_graphs_while_another_does_not(folders) -> None:
    """As when one waits for weights that are still on their way."""
    rng = random.Random(4)
    with load_group(folders["llama"], 2) as group:
        graphed = Graphed(group, captures_per_step=9, ranks=frozenset({1}))
        sequences, tables = begin(group, (3, 9, 14), rng)
        decode(folders["llama"], group, sequences, tables, 3, rng)
        assert [tape.num_replayed > 0 for tape in graphed.tapes] == [False, True]


def test_a_batch_that_grows_has_buckets_of_its_own_and_the_oldest_goes(folders, monkeypatch) -> None:
    monkeypatch.setattr(graphs_module, "MAX_BUCKETS", 2)
    rng = random.Random(5)
    with load_group(folders["llama"], 1) as group:
        graphed = Graphed(group, captures_per_step=9)
        sequences, tables = begin(group, (4, 7, 12, 3, 8), rng)
        for num in (1, 2, 5, 2, 1):
            decode(folders["llama"], group, sequences[:num], tables[:num], 2, rng)
        # One, two and eight rows; one was dropped for eight, and made again.
        assert graphed.tapes[0].num_captured == 4 * 5
        assert [rows for rows, _ in graphed.graphs[0]._buckets] == [2, 1]


def test_contexts_beyond_a_bucket_take_the_next_one(folders) -> None:
    rng = random.Random(6)
    with load_group(folders["llama"], 1) as group:
        graphed = Graphed(group, captures_per_step=9)
        sequences, tables = begin(group, (30, 2), rng)  # blocks of 4: from 8 to 9 of them on the way
        decode(folders["llama"], group, sequences, tables, 5, rng)
        assert list(graphed.graphs[0]._buckets) == [(2, 8), (2, 16)]


@pytest.fixture
def pair(folders) -> Iterator[tuple[TPGroup, Graphed]]:
    with load_group(folders["llama"], 2) as group:
        yield group, Graphed(group, captures_per_step=9)


def test_what_was_captured_is_used_again_after_a_recovery_that_left_this_rank_as_it_was(folders, pair) -> None:
    """As after a crash of another worker: rebound to the same units in the same memory."""
    group, graphed = pair
    rng = random.Random(7)
    sequences, tables = begin(group, (5, 6), rng)
    decode(folders["llama"], group, sequences, tables, 3, rng)
    before = [tape.num_captured for tape in graphed.tapes]
    tables_before = [(decoder._heads, decoder._local_row) for decoder in group.decoders]
    group._pool.shutdown()
    group._start()
    # A graph does not keep the tensors that it reads.
    tables_after = [(decoder._heads, decoder._local_row) for decoder in group.decoders]
    assert all(a is b for pair in zip(tables_before, tables_after, strict=True) for a, b in zip(*pair, strict=True))
    decode(folders["llama"], group, sequences, tables, 3, rng)
    assert [tape.num_captured for tape in graphed.tapes] == before


def test_another_layout_or_other_memory_begins_anew(folders, pair) -> None:
    group, graphed = pair
    rng = random.Random(8)
    decode(folders["llama"], group, *begin(group, (5, 6), rng), 3, rng)
    before = graphed.tapes[0].num_captured
    group.rebind(group.layout, {})  # its cache is made anew
    assert graphed.graphs[0].capture_next() is False, "there is nothing of this memory yet"
    sequences, tables = begin(group, (5, 6), rng)
    decode(folders["llama"], group, sequences, tables, 1, rng)
    num_segments = 1 + 2 * group.units.config.num_layers
    assert graphed.tapes[0].num_captured == before + num_segments

    one = Layout(shards=initial_layout(group.units, devices(1)).shards)
    kept = group.layout.shards[0]
    items = [
        (family, unit, slot)
        for family in group.units.families
        for slot, unit in enumerate(one.shards[0][family])
        if slot >= len(kept[family]) or kept[family][slot] != unit
    ]
    group.rebind(one, {"cpu:0": items})
    sequences, tables = begin(group, (5, 6), rng)
    decode(folders["llama"], group, sequences, tables, 2, rng)
    assert graphed.tapes[0].num_captured == before + 2 * num_segments


def test_a_device_that_cannot_capture_decodes_without(folders, caplog) -> None:
    rng = random.Random(9)
    with load_group(folders["llama"], 1) as group:
        graphed = Graphed(group)

        graphs, graphed.graphs[0]._capture = graphed.graphs[0], refuse
        group.kv["cpu:0"] = nan_buffer(group.kv_addresses.reserved_bytes)
        sequences, tables = begin(group, (5, 6), rng)
        graphed.captures_per_step = 0
        for _ in range(graphs_module.MAX_FAILURES):
            assert graphs.takes([Entry(token_ids=(1,), start=5, block_ids=tables[0])])
            decode(folders["llama"], group, sequences, tables, 1, rng)
            assert not graphs.capture_next() and not graphs._buckets, "what is left of it is not used"
        assert "without them" in caplog.text
        assert not graphs.takes(graphed.entries)


def test_a_capture_that_something_else_broke_is_tried_again(folders, caplog) -> None:
    """Over and over, if a bucket is completed in between; the steps are right all the while."""
    rng = random.Random(10)
    with load_group(folders["llama"], 1) as group:
        graphed = Graphed(group, captures_per_step=0)
        (graphs,), (tape,) = graphed.graphs, graphed.tapes
        sequences, tables = begin(group, (5, 6), rng)
        for _ in range(2 * graphs_module.MAX_FAILURES):
            decode(folders["llama"], group, sequences, tables, 1, rng)
            assert graphs.capture_next()
            graphs._capture = refuse
            assert not graphs.capture_next()
            graphs._capture = tape
            decode(folders["llama"], group, sequences, tables, 1, rng)
            while graphs.capture_next():
                pass
            graphs.close()
        assert "tried again" in caplog.text and "without them" not in caplog.text


@pytest.mark.parametrize("give_up", ["rebind", "evict", "close"])
def test_what_is_dropped_is_freed_at_once(folders, monkeypatch, give_up: str) -> None:
    """It holds memory that is in no budget, and the mapping of arenas: that must not wait for the collector."""
    monkeypatch.setattr(graphs_module, "MAX_BUCKETS", 1)
    rng = random.Random(11)
    with load_group(folders["llama"], 1) as group, collecting_nothing():
        # As on a simulated device: what is replayed is the bucket's own method.
        graphs = DecodeGraphs(group.decoders[0], lambda work: work)
        sequences, tables = begin(group, (5, 6), rng)
        step = [Entry(token_ids=(1,), start=len(s), block_ids=t) for s, t in zip(sequences, tables, strict=True)]
        graphs.forward(ForwardBatch.build(step[:1], group.block_size), group.groups[0])
        while graphs.capture_next():
            pass
        bucket = weakref.ref(graphs._bucket((1, 8)))
        if give_up == "rebind":
            group.decoders[0].bound_to = object()
            assert not graphs.capture_next()
        elif give_up == "evict":
            graphs.forward(ForwardBatch.build(step, group.block_size), group.groups[0])
        else:
            graphs.close()
        assert bucket() is None


class FakeAllocator:
    """Of torch's rules for the pools of graphs those that a process can break by letting graphs go, or by a capture
    that fails; without a GPU. `alone`: as `CudaGraphs` is given it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.alone, self.is_broken, self.num_captures = threading.Lock(), False, 0
        self.living: dict[int, list[weakref.ref]] = {}  # graphs by pool
        self.open: set[int] = set()  # pools with a capture under way
        allocator = self

        class Graph:
            def __init__(self):
                self.pool = 0

            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert allocator.alone.locked() and not gc.isenabled()
                known = allocator.living.setdefault(pool, [])
                if pool in allocator.open or (known and not any(ref() for ref in known)):
                    raise RuntimeError(f"pool {pool} cannot be used")
                known.append(weakref.ref(self))
                allocator.open.add(pool)
                self.pool = pool

            def capture_end(self) -> None:
                if allocator.is_broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
                allocator.open.remove(self.pool)
                allocator.num_captures += 1

            def replay(self) -> None:
                pass

        handles = itertools.count(1)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_captures_go_on_when_every_graph_was_dropped_and_when_one_failed(monkeypatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    capture = graphs_module.CudaGraphs(torch.device("cpu"), allocator.alone)
    replays = [capture(lambda: None), capture(lambda: None)]
    assert len(allocator.living) == 1, "one pool for all"
    replays.clear()
    replays.append(capture(lambda: None))
    assert len(allocator.living) == 1
    allocator.is_broken = True
    with pytest.raises(RuntimeError, match="previous error"):
        capture(lambda: None)
    allocator.is_broken = False
    capture(lambda: None)
    assert gc.isenabled() and not allocator.alone.locked()


def test_what_is_taken(folders, monkeypatch) -> None:
    one = [Entry(token_ids=(1,), start=20, block_ids=tuple(range(6)))]
    with load_group(folders["llama"], 1) as group, load_group(folders["mixtral"], 1) as moe:
        graphs = DecodeGraphs(group.decoders[0], lambda work: work)
        assert graphs.takes(one) and graphs.takes(one * 3)
        assert not graphs.takes([*one, Entry(token_ids=(1, 2), start=0, block_ids=(7,))])
        assert not DecodeGraphs(moe.decoders[0], lambda work: work).takes(one)
        monkeypatch.setattr(graphs_module, "MAX_TOKENS", 4 * 8 * group.block_size)
        assert graphs.takes(one * 4) and not graphs.takes(one * 5)
        assert graphs.capture_next() is False, "nothing was decoded yet"


def test_what_is_for_the_host_is_made_there_whatever_device_is_the_default(folders) -> None:
    """On a GPU new tensors are made on it, unless they say otherwise."""
    entries = [Entry(token_ids=(7 + i,), start=5 * i, block_ids=tuple(range(10 * i, 10 * i + 10))) for i in range(3)]
    with load_group(folders["llama"], 1) as group:
        batch = ForwardBatch.build(entries, group.block_size)
        bucket = DecodeGraphs(group.decoders[0], lambda work: work)._bucket((4, 8))
        with torch.device("meta"):
            bucket.fill(batch)
        rows, token_ids, positions, _, blocks = (part.tolist() for part in bucket._parts(bucket._inputs))
        assert (rows, token_ids, positions) == ([0, 1, 2, 0], [7, 8, 9, 7], [0, 5, 10, 0])
        assert blocks == [[0] * 8, [10, 11] + [10] * 6, [20, 21, 22] + [20] * 5, [0] * 8]
