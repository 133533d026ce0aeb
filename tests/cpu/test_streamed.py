"""Copies in one pass with the sum: bytes are the source's, sums are xxhash's."""

from __future__ import annotations

import ctypes.util
import mmap
import os
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash

from anchortp.arena.pages import MappedPages
from anchortp.errors import ConfigError
from anchortp.layout import PANEL_COLUMNS, PANEL_ROWS, ReplicatedTensor
from anchortp.native import build, build_kernels
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.work import Chunk, Region
from tests.cpu.test_native import PLAIN

LENGTHS = (1, 64, 240, 241, 256, 257, 1023, 1024, 1025, 2048, 4103, 1 << 20, (1 << 20) + 64)


@pytest.fixture(scope="module", params=["this CPU", "a plain CPU"])
def stream(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "a plain CPU":
            patch.setattr(build, "FLAGS", tuple(PLAIN if f == "-march=native" else f for f in build.FLAGS))
        return Streamer(str(build_kernels(tmp_path_factory.mktemp("library"))))


@pytest.mark.parametrize("skew", [0, 16, 3], ids=["aligned", "half", "odd"])
def test_the_bytes_are_the_sources_and_the_sum_is_xxhashs(stream, skew):
    rng = random.Random(5)
    for length in (*LENGTHS, *(rng.randrange(1, 9000) for _ in range(100))):
        source = np.frombuffer(rng.randbytes(length), dtype=np.uint8)
        target = np.full(length + 192, 0xFF, dtype=np.uint8)
        first = -target.ctypes.data % 64 + skew
        found = stream(target.ctypes.data + first, source.ctypes.data, length)
        assert found == xxhash.xxh3_64_intdigest(source.tobytes()), length
        assert np.array_equal(target[first : first + length], source)
        assert (target[:first] == 0xFF).all() and (target[first + length :] == 0xFF).all()


@pytest.mark.parametrize("lengths", [(241, 9000), (1, 300)], ids=["long", "short"])
def test_a_chunk_has_a_sum_for_each_of_its_segments(stream, lengths):
    """Blocks and segments of all sizes, from an odd place within the first block to one within the last; segments that
    the kernel does not sum are there too."""
    rng = random.Random(8)
    for _ in range(40):
        segment_bytes = rng.randint(*lengths)
        block_bytes = rng.randint(0, 3) * segment_bytes + rng.randint(lengths[0], segment_bytes)
        edges = [
            block * block_bytes + start for block in range(3) for start in range(0, block_bytes, segment_bytes)
        ] + [3 * block_bytes]
        first, last = sorted(rng.sample(range(len(edges)), 2))
        if edges[first] >= block_bytes:  # a chunk begins in its first block
            first, last = 0, last
        source = np.frombuffer(rng.randbytes(edges[-1]), dtype=np.uint8)
        chunk = chunk_of(block_bytes, segment_bytes, edges[first], edges[last])
        out = torch.full((chunk.num_bytes + 64,), 0xFF, dtype=torch.uint8)
        found = stream.chunk(chunk, source.ctypes.data + edges[first], out[: chunk.num_bytes])
        parts = [source[a:b].tobytes() for a, b in pairwise(edges[first : last + 1])]
        assert found == [xxhash.xxh3_64_intdigest(part) for part in parts]
        assert out.numpy().tobytes() == b"".join(parts) + 64 * b"\xff"


@pytest.mark.parametrize("in_panels", [False, True])
@pytest.mark.parametrize("skew", [0, 16], ids=["aligned", "half"])
def test_rows_from_anywhere_become_a_chunk(stream, in_panels, skew):
    """Held against torch and xxhash, with sums of whole blocks of stripes and of some that are not."""
    rng = random.Random(9)
    for _ in range(20):
        hidden = rng.choice((64, 96, 576, 1024))
        segment_rows, block_rows = 64 * rng.randint(1, 3), 64 * rng.randint(1, 4)
        num_rows, row_bytes = 2 * block_rows, 2 * hidden
        memory = torch.randint(-9999, 9999, (3 * num_rows, hidden), dtype=torch.int16)
        order = torch.tensor(rng.sample(range(3 * num_rows), num_rows))
        addresses = (memory.data_ptr() + order * row_bytes).numpy()
        chunk = chunk_of(block_rows * row_bytes, min(segment_rows, block_rows) * row_bytes, 0, num_rows * row_bytes)
        kept = torch.full((chunk.num_bytes + 192,), 0xFF, dtype=torch.uint8)
        first = -kept.data_ptr() % 64 + skew
        out = kept[first : first + chunk.num_bytes]
        found = stream.rows(chunk, addresses, row_bytes, in_panels, out)
        wanted = memory[order]
        if in_panels:
            wanted = wanted.view(torch.int32).view(-1, PANEL_ROWS, hidden // 2).transpose(1, 2).contiguous()
        assert torch.equal(out, wanted.view(torch.uint8).flatten())
        assert found == [xxhash.xxh3_64_intdigest(out[s.start : s.stop].numpy()) for s in chunk.segments]
        assert (kept[:first] == 0xFF).all() and (kept[first + chunk.num_bytes :] == 0xFF).all()


def test_rows_that_the_kernel_is_not_made_for_are_left_alone(stream):
    memory, out = torch.ones(64, 40, dtype=torch.int16), torch.zeros(64 * 80, dtype=torch.uint8)
    addresses = memory.data_ptr() + np.arange(64) * 80
    assert stream.rows(chunk_of(64 * 80, 64 * 80, 0, 64 * 80), addresses, 80, False, out) is None  # no whole lines
    assert stream.rows(chunk_of(128, 128, 0, 64 * 128), addresses, 128, False, out) is None  # too short for the sum
    assert not out.any()


def chunk_of(block_bytes: int, segment_bytes: int, start: int, stop: int) -> Chunk:
    region = Region(
        tensor=ReplicatedTensor(key="any", name="any", shape=(block_bytes,)),
        copy=0,
        family="any",
        position=0,
        block_bytes=block_bytes,
        segment_bytes=segment_bytes,
    )
    return Chunk(
        region=region,
        unit=0,
        num_units=(stop - 1) // block_bytes + 1,
        slot=0,
        first_byte=start,
        num_bytes=stop - start,
        source="",
        source_slot=0,
        link="host",
        start=start,
        source_start=0,
    )


def test_columns_become_rows(stream):
    """Held against torch; with what lies around the matrix untouched."""
    rng, generator = random.Random(6), torch.Generator().manual_seed(6)
    sizes = [(1, 1), (32, 32), (33, 31), (64, 96), *((rng.randint(1, 150), rng.randint(1, 150)) for _ in range(40))]
    for rows, columns in sizes:
        whole = torch.randint(-9999, 9999, (rows, columns + 5), generator=generator, dtype=torch.int16)
        source, kept = whole.view(torch.bfloat16)[:, 3 : 3 + columns], rng.choice((0, 8, 32))
        memory = torch.full((kept + rows * columns + 64,), -1, dtype=torch.int16)
        out = memory[kept : kept + rows * columns].view(torch.bfloat16).view(columns, rows)
        assert stream.columns(source, out)
        assert torch.equal(out.view(torch.int16), whole[:, 3 : 3 + columns].t()), (rows, columns)
        assert (memory[:kept] == -1).all() and (memory[kept + rows * columns :] == -1).all()


def test_columns_of_other_dtypes_are_left_to_torch(stream):
    out = torch.zeros(2, 3)
    assert not stream.columns(torch.ones(3, 2), out)
    assert not stream.columns(torch.ones(3, 2, dtype=torch.float16), out.bfloat16())
    assert not stream.columns(torch.ones(2, 3, dtype=torch.bfloat16).t(), out.bfloat16())
    assert not out.any()


@pytest.mark.parametrize("hidden", [PANEL_COLUMNS, 576, 1024])
def test_rows_become_panels(stream, hidden):
    plain = torch.randn(3 * PANEL_ROWS, hidden, generator=torch.Generator().manual_seed(7)).bfloat16()
    memory = torch.full((plain.numel() + 64,), -1.0, dtype=torch.bfloat16)
    out = memory[32:-32].view(plain.shape)
    stream.panels(plain, out)
    pairs = plain.view(torch.int32).view(3, PANEL_ROWS, -1).transpose(1, 2).contiguous()
    assert torch.equal(out.view(torch.int32).flatten(), pairs.flatten())
    assert (memory[:32] == -1).all() and (memory[-32:] == -1).all()


def test_pages_that_cannot_be_had_are_not_ready(tmp_path):
    """Beyond the end of the file; to touch them would end this process."""
    path, page = tmp_path / "file", mmap.PAGESIZE
    path.write_bytes(b"x" * 4 * page)
    with path.open("rb") as file:
        pages = MappedPages(file.fileno(), 4 * page)
    assert pages.make_ready(5, 4 * page)
    os.truncate(path, page)
    assert not pages.make_ready(5, 4 * page) and pages.make_ready(0, page - 1)


def test_a_library_of_something_else_is_refused(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing")
    for library in (broken, ctypes.util.find_library("m") or "libm.so.6"):
        with pytest.raises(ConfigError, match="--kernels torch"):
            Streamer(str(library))
