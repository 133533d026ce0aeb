"""Arenas of chunks in one process: tensors over them, the pool, and NVIDIA's calls as the package has them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.arena import ChunkPool, OutOfPhysicalMemory, VmmArena, VmmMapping
from anchortp.arena.cuda import CudaVmm, open_cuda
from anchortp.arena.sim import SimVmm
from anchortp.errors import BudgetExceeded, ConfigError, DeviceFull, StateError
from anchortp.state.memory import DeviceMemory
from anchortp.state.messages import error_of, failure_of
from anchortp.transfer.tensors import tensor_of
from tests.cuda_fake import GRANULE, FakeCuda

P = 4096
NUM_PAGES = 12
ERROR_UNKNOWN = 999


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd")), chunks_mapped()
    yield
    gc.collect()
    assert (sorted(os.listdir("/proc/self/fd")), chunks_mapped()) == before


def chunks_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("anchortp:sim")


def sim() -> SimVmm:
    return SimVmm(granule_bytes=P)


def sync(arena: VmmArena, mapping: VmmMapping) -> None:
    """What GetChunks does between processes."""
    mapping.keep(arena.committed_ranges())
    while chunks := arena.newer(mapping.newest, 5):
        mapping.attach(chunks, [arena.export(offset) for offset, _ in chunks])


class Pair:
    """An arena and one mapping of it."""

    def __init__(self, driver=None, num_pages: int = NUM_PAGES):
        driver = driver or sim()
        self.pool = ChunkPool(driver)
        self.arena = VmmArena(name="kv", reserved_bytes=num_pages * driver.granule_bytes, pool=self.pool)
        self.mapping = VmmMapping(name="kv", reserved_bytes=self.arena.reserved_bytes, open_driver=lambda: driver)

    def sync(self) -> None:
        sync(self.arena, self.mapping)

    def close(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
            self.mapping = None  # its memory goes now, or with the last tensor over it
        self.arena.close()
        self.pool.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_one_tensor_sees_what_is_committed_later_and_its_views_compute(pair: Pair) -> None:
    whole = tensor_of(pair.mapping)
    assert whole.dtype == torch.uint8 and whole.shape == (NUM_PAGES * P,) and whole.data_ptr() == pair.mapping.address
    pair.arena.commit([(2 * P, 4 * P)])
    pair.sync()
    weights = whole[2 * P : 4 * P].view(torch.bfloat16).view(64, -1)
    weights.copy_(torch.eye(64, weights.shape[1]))
    pair.arena.commit([(0, 1)])
    pair.sync()
    whole[:P] = 1
    assert torch.equal(weights @ weights.T, torch.eye(64, dtype=torch.bfloat16))
    assert pair.mapping.attached_bytes == pair.arena.committed_bytes() == 3 * P


def test_a_tensor_keeps_the_memory_and_its_death_lets_go(pair: Pair) -> None:
    pair.arena.commit([(0, 2 * P)])
    pair.sync()
    view = tensor_of(pair.mapping)[:4]
    view.copy_(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    pair.close()  # also: what the anchor does as it ends
    gc.collect()
    assert view.tolist() == [1, 2, 3, 4] and chunks_mapped() > 0
    del view
    gc.collect()
    assert chunks_mapped() == 0


def test_a_capsule_that_nobody_takes_lets_go_too() -> None:
    pair = Pair()
    pair.arena.commit([(0, P)])
    pair.sync()
    capsule = pair.mapping.dlpack()
    pair.close()
    gc.collect()
    assert chunks_mapped() == 1
    del capsule  # the leak check does the rest


def test_a_mapping_asks_nothing_of_the_driver_before_it_is_used() -> None:
    def fail():
        raise AssertionError("the driver was opened")

    with VmmMapping(name="kv", reserved_bytes=P, open_driver=fail) as mapping:
        assert mapping.chunks_in([(0, P)]) == [] and mapping.attached_bytes == 0
        mapping.keep([])


spans = st.tuples(st.integers(0, NUM_PAGES * P), st.integers(0, NUM_PAGES * P)).map(lambda pair: tuple(sorted(pair)))
changes = st.lists(st.tuples(st.sampled_from(["commit", "decommit", "sync"]), spans), max_size=12)


@settings(max_examples=80, deadline=None)
@given(changes)
def test_whatever_is_committed_a_refreshed_mapping_is_the_arena(changes: list) -> None:
    """Every page carries a mark from when it was committed: no page is lost, kept too long, or taken for another."""
    pair, marks = Pair(), {}
    whole = tensor_of(pair.mapping)
    for number, (change, (start, stop)) in enumerate(changes, 1):
        if change == "commit":
            pair.arena.commit([(start, stop)])
            new = [page for a, b in pair.arena.committed_ranges() for page in range(a, b, P) if page not in marks]
            pair.sync()
            for page in new:
                marks[page] = number
                whole[page : page + P] = number
        elif change == "decommit":
            pair.arena.decommit(start, stop)
            marks = {page: mark for page, mark in marks.items() if not start <= page <= page + P <= stop}
        pair.sync() if change == "sync" else None
    pair.sync()
    assert {page: int(whole[page]) for page in marks} == marks
    assert all(int(whole[page + P - 1]) == mark for page, mark in marks.items())
    assert pair.arena.committed_bytes() == pair.mapping.attached_bytes == len(marks) * P
    del whole
    pair.close()


def test_what_is_given_back_is_used_again_before_more_is_made(pair: Pair) -> None:
    driver = SimVmm(granule_bytes=P, capacity_bytes=4 * P)
    pool = ChunkPool(driver)
    first, second = (VmmArena(name=name, reserved_bytes=8 * P, pool=pool) for name in "ab")
    first.commit([(0, 4 * P)])
    first.decommit(P, 4 * P)
    second.commit([(0, 3 * P)])  # three chunks, though the "device" has none left
    with pytest.raises(OutOfPhysicalMemory):
        second.commit([(0, 4 * P)])
    assert second.committed_bytes() == 3 * P
    for arena in (first, second):
        arena.close()
    pool.close()


def test_a_device_with_less_than_its_budget_says_so_and_changes_nothing() -> None:
    pool = ChunkPool(SimVmm(granule_bytes=P, capacity_bytes=2 * P))
    memory = DeviceMemory(device="cuda:0", budget_bytes=8 * P, pool=pool)
    memory.create("kv", 8 * P)
    memory.commit("kv", ((0, P),))
    with pytest.raises(DeviceFull) as caught:
        memory.commit("kv", ((0, 3 * P),))
    memory.validate()
    assert memory.committed_bytes == P
    there = error_of(failure_of(caught.value))
    assert isinstance(there, DeviceFull) and isinstance(there, BudgetExceeded) and str(there) == str(caught.value)
    assert (there.requested_bytes, there.committed_bytes, there.budget_bytes) == (2 * P, P, 8 * P)
    memory.commit("kv", ((0, 2 * P),))
    memory.close()


def test_adoption_is_by_rising_serial_and_at_places_of_chunks(pair: Pair) -> None:
    pair.arena.commit([(0, 3 * P)])
    pair.sync()
    held = pair.mapping.chunks_in([(0, 3 * P)])
    assert [chunk for chunk, _ in held] == [(0, 1), (P, 2), (2 * P, 3)]
    heir = VmmArena(name="kv", reserved_bytes=NUM_PAGES * P, pool=pair.pool)
    heir.adopt(P, 2, held[1][1])
    heir.adopt(P, 2, held[1][1])  # again, by another who holds it
    for offset, serial, complaint in ((0, 1, "comes late"), (5, 9, "no place"), (NUM_PAGES * P, 9, "no place")):
        with pytest.raises(StateError, match=complaint):
            heir.adopt(offset, serial, held[0][1])
    heir.commit([(0, P)])
    assert heir.newer(0, 9) == [(P, 2), (0, 3)]
    heir.close()


def test_a_descriptor_that_is_no_chunk_is_refused_and_closed(pair: Pair) -> None:
    pair.arena.commit([(0, 3 * P)])
    fds = [pair.arena.export(0), os.memfd_create("odd"), pair.arena.export(2 * P)]
    with pytest.raises(StateError, match="no chunk"):
        pair.mapping.attach([(0, 1), (P, 2), (2 * P, 3)], fds)
    assert pair.mapping.newest == 1 and pair.mapping.attached_bytes == P


# -- NVIDIA's calls


@pytest.fixture
def real():
    return pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


def test_an_anchor_makes_and_exports_chunks_without_a_context(real) -> None:
    fake = FakeCuda(real)
    pair = Pair(CudaVmm(fake, 1))
    pair.arena.commit([(0, 3 * GRANULE)])
    os.close(pair.arena.export(0))
    pair.arena.decommit(0, GRANULE)
    heir = VmmArena(name="kv", reserved_bytes=GRANULE, pool=pair.pool)
    fd = pair.arena.export(GRANULE)
    heir.adopt(0, 1, fd)
    os.close(fd)
    heir.close()
    pair.close()
    assert fake.current is None
    assert {"cuMemCreate", "cuMemExportToShareableHandle", "cuMemRelease"} <= set(fake.without_context)


def test_a_worker_maps_and_computes_through_the_calls(real) -> None:
    fake = FakeCuda(real)
    driver = CudaVmm(fake, 0)
    assert driver.dlpack_device == (2, 0)
    driver.dlpack_device = (1, 0)  # the fake's memory is the host's
    pair = Pair(driver)
    whole = tensor_of(pair.mapping)
    assert fake.current == ("context", 0)
    pair.arena.commit([(GRANULE, 3 * GRANULE)])
    pair.sync()
    whole[GRANULE : 3 * GRANULE].view(torch.float32).fill_(2.0)
    assert pair.arena.scribble([(0, 2 * GRANULE)]) == GRANULE
    assert whole[GRANULE : 2 * GRANULE].view(torch.float32).isnan().all()
    assert (whole[2 * GRANULE : 3 * GRANULE].view(torch.float32) == 2.0).all()
    pair.arena.decommit(0, 2 * GRANULE)
    pair.sync()
    del whole
    pair.close()


def test_whether_gpus_can_use_each_others_memory_is_asked_without_a_context(real) -> None:
    fake = FakeCuda(real)
    fake.separate.add((1, 0))
    assert CudaVmm(fake, 0).reaches(1) and not CudaVmm(fake, 1).reaches(0)
    assert CudaVmm(fake, 1).pci_bus_id() == "0000:01:00.0"
    assert fake.current is None


def test_what_the_driver_says_is_told_by_name(real) -> None:
    fake = FakeCuda(real, capacity_bytes=GRANULE)
    driver = CudaVmm(fake, 0)
    handle = driver.create()
    with pytest.raises(OutOfPhysicalMemory, match="GPU 0 has no memory left"):
        driver.create()
    fake.failing["cuMemExportToShareableHandle"] = ERROR_UNKNOWN
    with pytest.raises(StateError, match=r"cuMemExportToShareableHandle .* CUDA_ERROR_UNKNOWN \(999\)"):
        driver.export(handle)
    driver.release(handle)


def test_a_gpu_that_cannot_be_used_is_a_config_error(real) -> None:
    with pytest.raises(ConfigError, match=r"sees 2 GPU\(s\)"):
        CudaVmm(FakeCuda(real), 2)
    with pytest.raises(ConfigError, match="steps of 4194304 bytes"):
        CudaVmm(FakeCuda(real, granularity=4 << 20), 0)
    fake = FakeCuda(real)
    fake.failing["cuInit"] = 100
    with pytest.raises(ConfigError, match="CUDA_ERROR_NO_DEVICE"):
        CudaVmm(fake, 0)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU")
def test_without_a_gpu_or_without_the_package_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU|install it"):
        open_cuda(0)
