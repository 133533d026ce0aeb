"""Copies in one pass with the sum: bytes are the source's, sums are xxhash's; without a compiler there are none."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash

from anchortp.transfer import streamed
from anchortp.transfer.pages import MappedPages
from anchortp.transfer.streamed import find_streamer, open_streamer

PLAIN_CPU = tuple(flag for flag in streamed.FLAGS if flag != "-march=native")
LENGTHS = (1, 64, 240, 241, 256, 257, 1023, 1024, 1025, 2048, 4103, 1 << 20, (1 << 20) + 64)


@pytest.fixture(scope="module", params=["this CPU", "a plain CPU"])
def stream(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "a plain CPU":
            patch.setattr(streamed, "FLAGS", PLAIN_CPU)
        stream = open_streamer(tmp_path_factory.mktemp("library"))
    assert stream is not None
    return stream


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


def test_it_is_compiled_once_whoever_asks(tmp_path, monkeypatch):
    commands = []
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append(command) or run(command, **options)
    )
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(open_streamer, [tmp_path] * 3))
    assert open_streamer(tmp_path) is not None and len(commands) == 1
    monkeypatch.setattr(streamed, "cpu_flags", lambda: frozenset({"another"}))
    assert open_streamer(tmp_path) is not None and len(commands) == 2, "another CPU has its own"


def test_it_is_found_once_it_is_made(tmp_path):
    assert find_streamer(tmp_path) is None
    assert open_streamer(tmp_path) is not None and find_streamer(tmp_path) is not None


def test_pages_that_cannot_be_had_are_not_ready(tmp_path):
    """Beyond the end of the file; to touch them would end this process."""
    path, page = tmp_path / "file", mmap.PAGESIZE
    path.write_bytes(b"x" * 4 * page)
    with path.open("rb") as file:
        pages = MappedPages(file.fileno(), 4 * page)
    assert pages.make_ready(5, 4 * page)
    os.truncate(path, page)
    assert not pages.make_ready(5, 4 * page) and pages.make_ready(0, page - 1)


@pytest.mark.parametrize("compiler", ["false", "/nowhere/c++", ""])
def test_without_a_compiler_there_is_none_and_the_log_says_why(tmp_path, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setattr(streamed, "COMPILERS", ())
    assert open_streamer(tmp_path) is None
    assert "slower" in caplog.text


def test_a_library_that_cannot_be_loaded_is_not_used(tmp_path, caplog):
    assert open_streamer(tmp_path) is not None
    (library,) = tmp_path.glob("*.so")
    broken = tmp_path / "broken" / library.name
    broken.parent.mkdir()
    broken.write_bytes(b"nothing")
    assert open_streamer(broken.parent) is None and "slower" in caplog.text
