"""Sources and destination of loads into mapped memory, over a simulated device's chunks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anchortp.arena import ChunkPool, VmmArena, VmmMapping
from anchortp.arena.sim import SimVmm
from anchortp.errors import StateError
from anchortp.transfer.device import DeviceDestination, MappedSource, StagedSource
from anchortp.transfer.tensors import tensor_of

P = 4096


@pytest.fixture
def buffer():
    """All of an arena whose pages 1 to 3 are committed."""
    driver = SimVmm(granule_bytes=P)
    pool = ChunkPool(driver)
    arena = VmmArena(name="weights", reserved_bytes=8 * P, pool=pool)
    arena.commit([(P, 4 * P)])
    mapping = VmmMapping(name="weights", reserved_bytes=8 * P, open_driver=lambda: driver)
    chunks = arena.newer(0, 9)
    mapping.attach(chunks, [arena.export(offset) for offset, _ in chunks])
    yield tensor_of(mapping)
    mapping.close()
    arena.close()
    pool.close()


class Inner:
    """Gives bytes that tell their place, into host memory alone."""

    def __init__(self):
        self.check_unchanged = self.close = lambda: None
        self.prefetch = lambda chunk: None

    def read(self, chunk, out, stopped):
        assert out.device.type == "cpu" and not stopped()
        out.copy_(torch.arange(out.numel()) % 251)
        return [out.numel()]


def test_chunks_come_through_staging_and_go_on_to_another_place(buffer):
    destination, source = DeviceDestination(buffer), StagedSource(Inner())
    for start, size in ((P, 100), (P + 200, P)):  # the staging buffer grows
        destination.prepare(start, start + size)
        chunk, out = SimpleNamespace(num_bytes=size), destination.tensor(start, start + size)
        assert source.read(chunk, out, lambda: False) == [size], "what the inner source summed is not summed again"
        assert bytes(destination.view(start, start + size)) == bytes(i % 251 for i in range(size))
    assert bytes(destination.view(P + 100, P + 200)) == bytes(100)

    closed = []
    peer = MappedSource("cuda:1", buffer, is_gone=lambda: False, on_close=lambda: closed.append(True))
    chunk = SimpleNamespace(num_bytes=P, source_start=P + 200)
    peer.read(chunk, destination.tensor(3 * P, 4 * P), lambda: False)
    assert bytes(destination.view(3 * P, 4 * P)) == bytes(destination.view(P + 200, 2 * P + 200))
    peer.close()
    assert closed == [True]


def test_what_comes_from_a_device_that_went_away_is_not_believed(buffer):
    gone = MappedSource("cuda:1", buffer, is_gone=lambda: True, on_close=lambda: None)
    with pytest.raises(StateError, match="anchor of cuda:1 went away"):
        gone.read(SimpleNamespace(num_bytes=8, source_start=P), torch.zeros(8, dtype=torch.uint8), lambda: False)
