"""Weights kept as arenas hold them: read back as the checkpoint gives them, believed only where they add up."""

from __future__ import annotations

import os

import pytest
import torch

from anchortp.config import cache_folder
from anchortp.layout import empty_shard, initial_layout
from anchortp.native import build_kernels
from anchortp.transfer import packed as packed_weights
from anchortp.transfer import sources, work
from anchortp.transfer.checksum import digest
from anchortp.transfer.device import DeviceDestination
from anchortp.transfer.executor import Loaded
from anchortp.transfer.packed import PackedWeights, is_packed, pack
from anchortp.transfer.sources import HostSource
from anchortp.transfer.streamed import Streamer
from tests.cpu.transfer_tools import Bench
from tests.tiny_model import write_model

SIZES = {"large": (1 << 20, 4 << 20), "small": (1000, 5000), "panels": (8192, 65536)}


@pytest.fixture(params=["large", "small", "panels"])
def bench(request, tmp_path, monkeypatch):
    segment_bytes, chunk_bytes = SIZES[request.param]
    monkeypatch.setattr(work, "SEGMENT_BYTES", segment_bytes)
    monkeypatch.setattr(work, "CHUNK_BYTES", chunk_bytes)
    shape = {"head_dim": 64, "intermediate_size": 512} if request.param == "panels" else {}
    bench = Bench(write_model(tmp_path / "model", dtype="bfloat16", **shape), panels=request.param == "panels")
    assert any(map(bench.units.in_panels, bench.units.tensors)) == (request.param == "panels")
    yield bench
    bench.close()


@pytest.fixture
def packed(bench, tmp_path):
    packed = PackedWeights(tmp_path / "cache" / "columns", bench.geometry)
    yield packed
    packed.close()


def shard_of(bench):
    return initial_layout(bench.units, ["cpu:0"]).shards[0]


@pytest.fixture(params=["descriptor", "mapping"])
def fill(request, stream, monkeypatch):
    """Packs what the bench's first device holds; then it is read in one way or the other."""
    monkeypatch.setattr(packed_weights, "LOOK_EVERY_S", 0.0)

    def fill(bench, packed):
        buffer = bench.fill("cpu:0", shard_of(bench))
        way = stream if request.param == "mapping" else None
        view = DeviceDestination(buffer).view
        list(pack(packed, bench.geometry, shard_of(bench), view, way))
        return packed._mapped.total == (bytes_kept(bench) if way else 0)

    return fill


@pytest.fixture(scope="module")
def stream():
    return Streamer(str(build_kernels(cache_folder() / "kernels")))


def bytes_kept(bench):
    regions = [r for regions in bench.geometry.regions.values() for r in regions if is_packed(bench.units, r)]
    return sum(region.block_bytes * bench.units.num_units[region.family] for region in regions)


def reads(bench, packed):
    """Per chunk that is kept whether it came from the file; what came is compared with the arena."""
    everything = work.complete(bench.geometry, "cpu:0", empty_shard("cpu:0"), shard_of(bench), [], False)
    arena, found = bench.arena("cpu:0"), []
    for chunk in bench.geometry.chunks(everything):
        out = torch.zeros(chunk.num_bytes, dtype=torch.uint8)
        digests = packed.read(chunk, out, lambda: None)
        came = digests is not None
        assert digests in (
            None,
            [digest(memoryview(out.numpy())[s.start - chunk.start :][: s.stop - s.start]) for s in chunk.segments],
        )
        assert came == (came and is_packed(bench.units, chunk.region))
        if is_packed(bench.units, chunk.region):
            found.append(came)
        if came:
            assert torch.equal(out, arena[chunk.start : chunk.stop])
    return found


def test_what_was_packed_is_read_back_and_the_rest_is_not_there(bench, packed, fill):
    assert not any(reads(bench, packed))
    assert fill(bench, packed)
    found = reads(bench, packed)
    assert found and all(found)


def test_another_process_sees_what_one_has_written(bench, packed, fill, tmp_path):
    other = PackedWeights(tmp_path / "cache" / "columns", bench.geometry)
    fill(bench, packed)
    assert all(reads(bench, other))
    other.close()


def test_a_torn_segment_is_not_believed_and_the_load_reads_the_checkpoint(bench, packed, fill, tmp_path):
    fill(bench, packed)
    with (tmp_path / "cache" / "columns").open("r+b") as file:
        (byte,) = file.read(1)
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    found = reads(bench, packed)
    assert found.count(False) == 1
    assert found == reads(bench, packed), "it is missing from now on"
    load, results = bench.load("cpu:1", shard_of(bench))
    opened = load._hooks.open_source
    object.__setattr__(load._hooks, "open_source", lambda name: with_packed(opened(name), packed))
    load.start()
    assert isinstance(results.get(timeout=30), Loaded)
    load.cancel()
    assert torch.equal(bench.arena("cpu:1"), bench.arena("cpu:0"))


def with_packed(source: HostSource, packed: PackedWeights) -> HostSource:
    return sources.HostSource(source._checkpoint, packed)


def test_a_file_that_was_cut_off_is_as_good_as_empty(bench, packed, fill, tmp_path):
    fill(bench, packed)
    table_at = os.path.getsize(tmp_path / "cache" / "columns") - len(packed._map)
    with open(tmp_path / "cache" / "columns", "r+b") as file:
        file.write(bytes(table_at))
    assert not any(reads(bench, packed))


def test_a_file_that_has_become_shorter_is_left_alone(bench, packed, fill, tmp_path):
    fill(bench, packed)
    assert all(reads(bench, packed))
    os.truncate(tmp_path / "cache" / "columns", 0)
    assert not any(reads(bench, packed)), "to touch what was mapped would have ended this process"
    fill(bench, packed)
    assert not any(reads(bench, packed)), "nor is it written to"


def test_what_was_written_later_is_read_through_the_descriptor_until_it_is_mapped(bench, packed, stream):
    assert list(packed.map_ahead(stream)) == [] and not packed._mapped
    buffer = bench.fill("cpu:0", shard_of(bench))
    list(pack(packed, bench.geometry, shard_of(bench), DeviceDestination(buffer).view))
    assert all(reads(bench, packed)) and not packed._mapped
    assert list(packed.map_ahead(stream)) and packed._mapped.total == bytes_kept(bench)
    assert all(reads(bench, packed)) and list(packed.map_ahead(stream)) == [], "once is enough"
