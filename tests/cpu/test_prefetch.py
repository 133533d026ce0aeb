"""Weights that are not in the page cache: all of them are asked of the disk, however little one call brings."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from anchortp.layout import empty_shard, initial_layout
from anchortp.transfer import checkpoint, work
from anchortp.transfer.checkpoint import is_cached
from anchortp.transfer.packed import PackedWeights, is_packed
from anchortp.transfer.sources import HostSource
from tests.cpu.transfer_tools import Bench
from tests.tiny_model import write_model

ARRIVES_S, EVICTED_S = 30.0, 2.0
CAP_BYTES = 128 << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its larger tensors are 6 MiB each."""
    shape = {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 4096}
    return write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16", **shape)


@pytest.fixture(autouse=True)
def capped(monkeypatch):
    """As on a device of the usual read-ahead: what lies beyond it is forgotten by the kernel."""
    advise = os.posix_fadvise

    def ask(fd, start, num_bytes, advice):
        advise(fd, start, min(num_bytes, CAP_BYTES) if advice == os.POSIX_FADV_WILLNEED else num_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", ask)


@pytest.fixture
def bench(folder):
    bench = Bench(folder)
    yield bench
    bench.close()


def evict(path, keeping=0):
    """All but the last `keeping` bytes, which somebody has mapped. Pages that are just being read (the kernel reads
    beyond what it is asked for) cannot go, and would be there later on: so all are read first."""
    path.read_bytes()
    deadline_s = time.monotonic() + EVICTED_S
    kept_from = -(-(path.stat().st_size - keeping) // mmap.PAGESIZE)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while resident(path)[:kept_from].any():
            if time.monotonic() > deadline_s:
                pytest.skip("this file system keeps files in memory")
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path):
    """By page of the file, whether it is in the page cache (mincore(2))."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        found = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(num_bytes), found) == 0
        del pages
    return np.frombuffer(found, np.uint8) & 1 == 1


def check_arrives(path, start, stop):
    """Bytes `[start, stop)` are in the page cache soon."""
    pages = slice(start // mmap.PAGESIZE, -(-stop // mmap.PAGESIZE))
    deadline_s = time.monotonic() + ARRIVES_S
    while not (here := resident(path)[pages]).all():
        assert time.monotonic() < deadline_s, f"{here.mean():.0%} of the pages that were asked for arrived"
        os.sched_yield()


def stored(bench, name):
    """Where a tensor's bytes lie in its file."""
    place = bench.checkpoint._places[name]
    return place._row_at(0)[1], place._row_at(place.shape[0])[1]


@pytest.mark.parametrize("key", ["gate_up", "down"])
@pytest.mark.parametrize("first_is_there", [False, True])
def test_rows_and_columns_are_asked_for_as_a_whole(bench, folder, key, first_is_there):
    path = folder / "model.safetensors"
    (tensor,) = [tensor for tensor in bench.units.tensors if tensor.key == key]
    spans = [stored(bench, part.name.format(layer=0)) for part in tensor.parts]
    evict(path)
    if first_is_there:  # which says nothing about the rest
        with path.open("rb", buffering=0) as file:
            for start, _ in spans:
                os.pread(file.fileno(), 1, start)
                assert is_cached(file.fileno(), start)
    num_units = bench.units.num_units[tensor.family] if tensor.parts[0].axis == 0 else 1
    bench.checkpoint.prefetch(tensor, 0, 0, 0, num_units * tensor.rows)
    for start, stop in spans:
        check_arrives(path, start, stop)


def test_all_chunks_of_a_load_are_brought_by_asking_for_them(bench, folder):
    path = folder / "model.safetensors"
    source = HostSource(bench.checkpoint)
    evict(path)
    for chunk in chunks_of(bench):
        source.prefetch(chunk)
    for name, shape in bench.units.stored_tensors():
        if len(shape) == 2:
            check_arrives(path, *stored(bench, name))


def test_what_is_packed_is_asked_for_where_it_lies(bench, folder, tmp_path):
    """And the checkpoint is left alone where the file has it all."""
    path = tmp_path / "packed"
    packed = PackedWeights(path, bench.geometry)
    shard, arena = initial_layout(bench.units, ["cpu:0"]).shards[0], bench.arena("cpu:0")
    view = memoryview(arena.numpy())
    kept = [chunk for chunk in chunks_of(bench) if is_packed(bench.units, chunk.region)]
    for chunk in kept:
        for index, s in enumerate(chunk.segments):
            unit = chunk.unit + index // chunk.region.num_segments
            packed.write(chunk.region, unit, index % chunk.region.num_segments, view[s.start : s.stop])
    assert shard and kept and all(packed._table)
    evict(path, keeping=len(packed._map))  # the table
    evict(folder / "model.safetensors")
    source = HostSource(bench.checkpoint, packed)
    for chunk in kept:
        source.prefetch(chunk)
    check_arrives(path, 0, path.stat().st_size)
    assert not resident(folder / "model.safetensors").any()
    packed.close()


def chunks_of(bench):
    shard = initial_layout(bench.units, ["cpu:0"]).shards[0]
    return bench.geometry.chunks(work.complete(bench.geometry, "cpu:0", empty_shard("cpu:0"), shard, [], False))


def mapped_bytes(path):
    """Of a file's pages, what this process has mapped."""
    found = re.findall(
        rf"{re.escape(str(path))}\nSize:.*?\nRss:\s+(\d+) kB", Path("/proc/self/smaps").read_text(), re.S
    )
    return sum(map(int, found)) * 1024


def test_weights_are_mapped_ahead_where_they_need_no_disk(folder, monkeypatch):
    path = folder / "model.safetensors"
    path.read_bytes()
    bench = Bench(folder)
    wanted = sum(bench.checkpoint.tensor(n).nbytes for n, shape in bench.units.stored_tensors() if len(shape) == 2)
    before = mapped_bytes(path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "is_cached", lambda fd, at: False)
        assert list(bench.checkpoint.map_ahead())
    assert mapped_bytes(path) == before and not bench.checkpoint._ready
    assert list(bench.checkpoint.map_ahead())
    assert before < wanted <= mapped_bytes(path) and bench.checkpoint._ready.total == wanted
    bench.close()
