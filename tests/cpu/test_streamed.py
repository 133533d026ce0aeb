"""Copies in one pass with the sum: bytes are the source's, sums are xxhash's."""

from __future__ import annotations

import ctypes.util
import mmap
import os
import random

import numpy as np
import pytest
import xxhash

from anchortp.arena.pages import MappedPages
from anchortp.errors import ConfigError
from anchortp.native import build, build_kernels
from anchortp.transfer.streamed import Streamer
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
