"""Copies from mapped memory and sums in one pass, past the cache: `streamed.cpp`, compiled where it runs, once.

Without a compiler there is none, and bytes are read through descriptors.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import xxhash
from torch import Tensor

from anchortp.native import cpu_flags
from anchortp.transfer.work import Chunk

SOURCE = Path(__file__).with_name("streamed.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


class Streamer:
    """`streamer(to, start, num_bytes)` copies between addresses, and returns the xxh3_64 of what it stored, or 1 for 0
    as `checksum.digest` does. The memory must be mapped, and not overlap. Other threads run meanwhile."""

    def __init__(self, library: Path):
        """Raises OSError if it is not a library of this source."""
        functions = ctypes.CDLL(str(library))
        try:
            self._copy: Callable[[int, int, int], int] = functions.anchortp_copy_summed
            self._shortest: int = functions.anchortp_shortest_summed()
        except AttributeError as error:
            raise OSError(f"{library}: {error}") from error
        self._copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)  # type: ignore[attr-defined]
        self._copy.restype = ctypes.c_uint64  # type: ignore[attr-defined]

    def __call__(self, to: int, start: int, num_bytes: int) -> int:
        if num_bytes >= self._shortest:
            return self._copy(to, start, num_bytes) or 1
        ctypes.memmove(to, start, num_bytes)
        return xxhash.xxh3_64_intdigest(ctypes.string_at(to, num_bytes)) or 1

    def chunk(self, chunk: Chunk, start: int, out: Tensor) -> list[int]:
        """Fills `out` (uint8, the bytes of a chunk of whole segments) from an address on. The segments' digests."""
        source, to = start - chunk.start, out.data_ptr() - chunk.start
        return [self(to + s.start, source + s.start, s.stop - s.start) for s in chunk.segments]


def find_streamer(folder: Path) -> Streamer | None:
    """The library in `folder`, if somebody has made it there and it can be loaded."""
    library = _library(folder)
    try:
        return Streamer(library) if library.exists() else None
    except OSError:
        return None


def open_streamer(folder: Path) -> Streamer | None:
    """The library is in `folder`, or is made there: a second or two, by one process at a time. None, and a line in the
    log, where that fails."""
    library = _library(folder)
    try:
        if not library.exists():
            _compile(library)
        return Streamer(library)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("packed weights are read through their descriptor, which is slower: %s", error)
        return None


def _library(folder: Path) -> Path:
    made_of = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), " ".join(sorted(cpu_flags())).encode())
    return folder / f"streamed-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"


def _compile(library: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(None, map(shutil.which, COMPILERS)))[:1]
    if not compiler:
        raise OSError(f"no C++ compiler was found ({', '.join(COMPILERS)}); install one, or set CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of a group all want it at about the same time
        if library.exists():
            return
        making = library.with_suffix(".making")
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(making)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise OSError(f"{compiler[0]} does not compile {SOURCE.name}: {done.stderr.strip()[-2000:]}")
        os.replace(making, library)
