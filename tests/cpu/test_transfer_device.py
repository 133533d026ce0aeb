"""Sources and destination of loads into mapped memory, over a simulated device's chunks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from anchortp.arena import ChunkPool, VmmArena, VmmMapping
from anchortp.arena.sim import SimVmm
from anchortp.errors import StateError
from anchortp.layout import empty_shard, initial_layout
from anchortp.transfer import device, work
from anchortp.transfer.checksum import digest
from anchortp.transfer.device import DeviceDestination, MappedSource, StagedSource
from anchortp.transfer.sources import HostSource, Stopped
from anchortp.transfer.tensors import tensor_of
from anchortp.transfer.work import complete
from tests.cpu.transfer_tools import Bench
from tests.tiny_model import write_model

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


class LateStream:
    """Copies as late as it may: when somebody waits, and then in order. What a source put into a buffer meanwhile is
    what is copied."""

    def __init__(self):
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_made = 0

    def copy(self, out, data):
        self.queued.append((out, data))
        number = self.num_made + len(self.queued)

        def wait():
            while self.num_made < number:
                target, source = self.queued.pop(0)
                target.copy_(source)
                self.num_made += 1

        return wait


class Watched:
    """The host's checkpoint; notes how many copies were under way as each piece was read. May fail on purpose."""

    def __init__(self, bench, stream, fail_at=-1):
        self._inner, self._stream, self.fail_at = HostSource(bench.checkpoint), stream, fail_at
        self.check_unchanged, self.prefetch, self.close = (lambda *_: None for _ in range(3))
        self.under_way: list[int] = []

    def read(self, chunk, out, stopped):
        assert out.device.type == "cpu" and out.numel() == chunk.num_bytes
        self.under_way.append(len(self._stream.queued))
        if stopped():
            raise Stopped
        if len(self.under_way) - 1 == self.fail_at:
            out.fill_(0xEE)
            raise OSError("the disk")
        return self._inner.read(chunk, out, stopped)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def bench(folder, monkeypatch):
    """Chunks of several segments, of which some are of several units."""
    monkeypatch.setattr(work, "SEGMENT_BYTES", 1024)
    monkeypatch.setattr(work, "CHUNK_BYTES", 8192)
    bench = Bench(folder)
    yield bench
    bench.close()


def chunks_of(bench):
    shard = initial_layout(bench.units, ["cpu:0"])["cpu:0"]
    wanted = bench.fill("wanted", shard)
    return bench.geometry.chunks(complete(bench.geometry, "cpu:0", empty_shard("cpu:0"), shard, [], True)), wanted


def test_a_piece_is_read_while_the_one_before_is_copied_and_no_buffer_is_used_too_early(bench):
    chunks, wanted = chunks_of(bench)
    stream = LateStream()
    inner = Watched(bench, stream)
    source, out = StagedSource(inner, lambda device: stream), torch.zeros_like(wanted)
    num_pieces = []
    for chunk in chunks:
        inner.under_way.clear()
        digests = source.read(chunk, out[chunk.start : chunk.stop], lambda: False)
        assert not stream.queued, "what has been read is there"
        assert torch.equal(out[chunk.start : chunk.stop], wanted[chunk.start : chunk.stop]), str(chunk)
        if digests is not None:
            view = memoryview(out.numpy())
            assert digests == [digest(view[s.start : s.stop]) for s in chunk.segments], "of other bytes"
        assert inner.under_way == [0, *[1] * (len(inner.under_way) - 1)], "the copy before is still under way"
        num_pieces.append(len(inner.under_way))
    assert max(num_pieces) > 4 and min(num_pieces) == 1


@pytest.mark.parametrize("how", ["an error", "stopped"])
def test_a_read_that_ends_early_leaves_no_copy_behind_and_its_buffers_free(how, bench):
    chunks, wanted = chunks_of(bench)
    chunk = max(chunks, key=lambda c: len(list(device._pieces(c))))
    stream = LateStream()
    inner = Watched(bench, stream, fail_at=3 if how == "an error" else -1)
    source, out = StagedSource(inner, lambda device: stream), torch.zeros(chunk.num_bytes, dtype=torch.uint8)
    with pytest.raises(OSError if how == "an error" else Stopped):
        source.read(chunk, out, lambda: how == "stopped" and len(inner.under_way) == 3)
    assert not stream.queued
    inner.fail_at = -1
    source.read(chunk, out, lambda: False)
    assert torch.equal(out, wanted[chunk.start : chunk.stop])


def test_a_part_of_a_chunk_is_a_chunk_of_the_same_bytes(bench):
    chunks, _ = chunks_of(bench)
    for chunk in chunks:
        moved = replace(chunk, source="cpu:1", source_slot=chunk.slot + 3, source_start=chunk.start + 1000)
        parts = [moved.part(piece) for piece in moved.pieces(2048)]
        assert [s for part in parts for s in part.segments] == chunk.segments
        assert all(part.source_start - part.start == 1000 and part.source_slot - part.slot == 3 for part in parts)
        assert all(part.is_whole and part.first_byte < chunk.region.block_bytes for part in parts)


def test_a_chunk_goes_through_staging_and_on_to_another_place(buffer, bench):
    chunk = max(chunks_of(bench)[0], key=lambda c: (c.num_bytes <= P, c.num_bytes))
    assert chunk.num_bytes <= P
    destination, source = DeviceDestination(buffer), StagedSource(Watched(bench, LateStream()))
    destination.prepare(P, P + chunk.num_bytes)
    source.read(chunk, destination.tensor(P, P + chunk.num_bytes), lambda: False)
    wanted = memoryview(bench.buffers["wanted"].numpy())[chunk.start : chunk.stop]
    assert bytes(destination.view(P, P + chunk.num_bytes)) == bytes(wanted)

    closed = []
    peer = MappedSource("cuda:1", buffer, is_gone=lambda: False, on_close=lambda: closed.append(True))
    peer.read(SimpleNamespace(num_bytes=P, source_start=P + 200), destination.tensor(3 * P, 4 * P), lambda: False)
    assert bytes(destination.view(3 * P, 4 * P)) == bytes(destination.view(P + 200, 2 * P + 200))
    peer.close()
    assert closed == [True]


def test_what_comes_from_a_device_that_went_away_is_not_believed(buffer):
    gone = MappedSource("cuda:1", buffer, is_gone=lambda: True, on_close=lambda: None)
    with pytest.raises(StateError, match="anchor of cuda:1 went away"):
        gone.read(SimpleNamespace(num_bytes=8, source_start=P), torch.zeros(8, dtype=torch.uint8), lambda: False)
