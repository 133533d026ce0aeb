"""What a worker does when it has nothing better to do: in steps, until it is told to stop; memory in huge pages."""

from __future__ import annotations

import mmap
import os
import random
import re
import threading
from pathlib import Path

import pytest
import torch

from anchortp.arena import MemfdArena
from anchortp.arena.pages import HUGE_PAGE_BYTES, MappedPages, map_shared
from anchortp.config import parse_model_config
from anchortp.layout import EVERY_FAMILY, WeightAddresses, initial_layout, model_units
from anchortp.transfer.idle import IdleWork, huge_extents, huge_pages
from anchortp.transfer.tensors import tensor_of
from tests.tiny_model import TINY

WIDE = TINY | {"hidden_size": 512, "head_dim": 64, "intermediate_size": 4096, "vocab_size": 5000}


@pytest.fixture(scope="module")
def addresses():
    return WeightAddresses(units=model_units(parse_model_config(WIDE)))


@pytest.fixture
def arena(addresses):
    with MemfdArena.create("weights", addresses.reserved_bytes) as arena:
        yield arena


def shard_of(addresses, num_devices):
    return initial_layout(addresses.units, [f"cpu:{i}" for i in range(num_devices)]).shards[-1]


def fill(addresses, shard, memory):
    """Random bytes in all slots of the shard -> where they are."""
    ranges = [r for family in EVERY_FAMILY for r in addresses.slot_ranges(family, 0, len(shard[family]))]
    generator = torch.Generator().manual_seed(1)
    for start, stop in ranges:
        memory[start:stop] = torch.randint(0, 256, (stop - start,), generator=generator, dtype=torch.uint8)
    return ranges


def huge_bytes():
    """Of shared memory that this process maps in huge pages."""
    (found,) = re.findall(r"ShmemPmdMapped:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found) * 1024


@pytest.mark.parametrize("num_devices", [1, 2, 3, 5])
def test_huge_pages_begin_where_nothing_else_lies(addresses, num_devices):
    """Held against a set of all pages."""
    shard = shard_of(addresses, num_devices)
    counts = {family: random.Random(num_devices).randint(0, len(shard[family])) for family in EVERY_FAMILY}
    part = shard
    for family, count in counts.items():
        part = part.replaced(family, shard[family][:count])
    for held in (shard, part):
        pages = set()
        for family in EVERY_FAMILY:
            for start, stop in addresses.slot_ranges(family, 0, len(held[family])):
                pages.update(range(start // mmap.PAGESIZE, -(-stop // mmap.PAGESIZE)))
        each = HUGE_PAGE_BYTES // mmap.PAGESIZE
        numbers = range(addresses.reserved_bytes // HUGE_PAGE_BYTES + 1)
        whole = [n * HUGE_PAGE_BYTES for n in numbers if pages.issuperset(range(n * each, (n + 1) * each))]
        assert huge_extents(addresses, held) == whole
    assert num_devices > 2 or huge_extents(addresses, shard)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_bytes_and_pages_stay_and_memory_is_given_back_as_before(addresses, arena, num_devices):
    shard, memory, other = shard_of(addresses, num_devices), tensor_of(arena), tensor_of(arena)
    ranges = fill(addresses, shard, memory)
    committed, copies = arena.committed_ranges(), [memory[start:stop].clone() for start, stop in ranges]
    num_steps = len(list(huge_pages(addresses, shard, memory)))
    assert num_steps == len(huge_extents(addresses, shard)) > 0
    for view in (memory, other):
        assert all(torch.equal(view[a:b], copy) for (a, b), copy in zip(ranges, copies, strict=True))
    assert huge_bytes() == 2 * num_steps * HUGE_PAGE_BYTES, "both see huge pages"
    assert arena.committed_ranges() == committed
    # One page in the middle of each huge one goes.
    before = arena.committed_bytes()
    for start in huge_extents(addresses, shard):
        assert arena.decommit(start + 8 * mmap.PAGESIZE, start + 9 * mmap.PAGESIZE) == mmap.PAGESIZE
    assert arena.committed_bytes() == before - num_steps * mmap.PAGESIZE
    gone = torch.zeros_like(memory, dtype=torch.bool)
    for start in huge_extents(addresses, shard):
        gone[start + 8 * mmap.PAGESIZE : start + 9 * mmap.PAGESIZE] = True
    for (start, stop), copy in zip(ranges, copies, strict=True):
        assert torch.equal(memory[start:stop], copy.masked_fill(gone[start:stop], 0))


def test_a_kernel_that_has_no_huge_pages_is_asked_once(addresses, arena, monkeypatch):
    asked = []

    def refuse(address):
        asked.append(address)
        raise OSError(22, "no")

    monkeypatch.setattr("anchortp.transfer.idle.gather_pages", refuse)
    assert list(huge_pages(addresses, shard_of(addresses, 1), tensor_of(arena))) == []
    assert len(asked) == 1


def mappings():
    return sum("anchortp:pages" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_mapping_lies_where_huge_pages_can_and_goes_with_its_last_view():
    with MemfdArena.create("pages", 3 * mmap.PAGESIZE) as arena:
        buffer = map_shared(arena.fd, arena.reserved_bytes, writable=True)
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        assert tensor.data_ptr() % HUGE_PAGE_BYTES == 0 and len(tensor) == 3 * mmap.PAGESIZE
        tensor[-1] = 7
        view = memoryview(tensor[mmap.PAGESIZE :].numpy())
        assert MappedPages(arena.fd, arena.reserved_bytes).make_ready(0, 3 * mmap.PAGESIZE)
        assert mappings() == 1, "the other has gone"
        del buffer, tensor
        assert view[-1] == 7 and mappings() == 1
        del view
        assert mappings() == 0


def test_what_cannot_be_mapped_leaves_nothing_behind(tmp_path):
    with open(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), "wb") as file:
        before = Path("/proc/self/maps").read_text().count("---p")
        with pytest.raises(OSError, match="4096 bytes cannot be mapped: Permission denied"):
            map_shared(file.fileno(), 4096, writable=False)
        assert Path("/proc/self/maps").read_text().count("---p") == before


def test_idle_work_ends_within_a_step_when_it_is_stopped():
    began, done = threading.Event(), []

    def steps():
        while True:
            began.set()
            done.append(1)
            yield

    work = IdleWork(steps(), pace=1e-6)
    work.start()
    assert began.wait(30)
    work.stop()
    assert not work._thread.is_alive() and done == [1], "it rested after its first step"


def test_idle_work_takes_all_steps():
    done = []
    work = IdleWork((done.append(i) for i in range(50)), pace=1.0)
    work.start()
    work.join()
    assert done == list(range(50))
    work.stop()
