"""Host memory as a device's: windows of an arena are registered with the driver as they are used, and let go of."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anchortp.arena import MemfdArena, PinnedMapping
from anchortp.arena.cuda import CudaVmm
from anchortp.arena.sim import SimVmm
from anchortp.errors import StateError
from anchortp.transfer.tensors import tensor_of
from tests.cuda_fake import FakeCuda

P = 4096
WINDOW = 4 * P
RESERVED = 10 * P  # the last window is shorter


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("anchortp:pinned")


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert (sorted(os.listdir("/proc/self/fd")), mapped()) == (before, 0)


@pytest.fixture
def arena() -> Iterator[MemfdArena]:
    with MemfdArena.create("pinned", RESERVED) as arena:
        yield arena


def test_what_is_written_through_the_device_is_in_the_arena(arena: MemfdArena) -> None:
    pinned = PinnedMapping(arena, SimVmm(), window_bytes=WINDOW)
    pinned.pin([(P, P + 8)])
    whole = tensor_of(pinned)
    assert whole.data_ptr() == pinned.address and whole.shape == (RESERVED,) and whole.dtype == torch.uint8
    whole[P : P + 8] = torch.arange(8, dtype=torch.uint8)
    assert os.pread(arena.fd, 8, P) == bytes(range(8))


def test_windows_are_pinned_once_as_they_are_used_and_let_go_of_with_the_last_tensor(arena: MemfdArena) -> None:
    driver = SimVmm()
    pinned = PinnedMapping(arena, driver, window_bytes=WINDOW)
    view = tensor_of(pinned)[:P]
    assert pinned.pinned_bytes == 0 and driver.pinned == {}
    pinned.pin([(WINDOW - 1, WINDOW + 1)])
    pinned.pin([(0, P), (WINDOW, WINDOW), (9 * P, 10 * P)])
    base = pinned.address
    assert driver.pinned == {base: WINDOW, base + WINDOW: WINDOW, base + 2 * WINDOW: 2 * P}
    assert pinned.pinned_bytes == RESERVED
    del pinned
    gc.collect()
    assert len(driver.pinned) == 3 and mapped() == 1, "a tensor still needs them"
    del view
    gc.collect()
    assert driver.pinned == {}


def test_nothing_is_unpinned_while_the_device_may_use_it(arena: MemfdArena) -> None:
    called = []

    class Recording(SimVmm):
        def synchronize(self) -> None:
            called.append("synchronize")

        def unpin(self, address: int) -> None:
            called.append("unpin")
            super().unpin(address)

    pinned = PinnedMapping(arena, Recording(), window_bytes=WINDOW)
    pinned.pin([(0, 2 * WINDOW)])
    del pinned
    gc.collect()
    assert called == ["synchronize", "unpin", "unpin"]


# -- NVIDIA's calls


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda(pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed"))


def test_the_calls_register_and_unregister(arena: MemfdArena, fake: FakeCuda) -> None:
    pinned = PinnedMapping(arena, CudaVmm(fake, 0), window_bytes=WINDOW)
    pinned.pin([(0, P)])
    assert fake.host_memory == {pinned.address: WINDOW}
    del pinned
    gc.collect()
    assert fake.host_memory == {}


def test_a_refusal_is_told_and_what_was_pinned_before_is_let_go_of(arena: MemfdArena, fake: FakeCuda) -> None:
    pinned = PinnedMapping(arena, CudaVmm(fake, 0), window_bytes=WINDOW)
    pinned.pin([(0, P)])
    fake.failing["cuMemHostRegister"] = 2
    with pytest.raises(StateError, match="host has no memory left"):
        pinned.pin([(WINDOW, 2 * WINDOW)])
    del fake.failing["cuMemHostRegister"]
    pinned.pin([(WINDOW, 2 * WINDOW)])
    fake.device_offset = 1 << 40
    with pytest.raises(StateError, match="other addresses than the host"):
        pinned.pin([(2 * WINDOW, 2 * WINDOW + 1)])
    assert len(fake.host_memory) == 2
    del pinned
    gc.collect()
    assert fake.host_memory == {}
