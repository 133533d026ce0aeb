"""A source that fails on purpose, at any byte: for tests and drills."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from anchortp.errors import StateError
from anchortp.transfer.sources import Source, Stopped
from anchortp.transfer.work import Chunk

SourceFault = Literal["slow", "hang", "error", "corrupt", "short", "gone"]
SLOW_BYTES_PER_S = 2e6
_LOOK_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Strikes the read in which the `at_byte`-th byte that the source gives falls, and the `times - 1` after it.

    slow: the read crawls. hang: it never ends by itself. error: the system reports an I/O error. corrupt: one bit
    of that byte is wrong. short: the bytes after it are missing, and that is noticed. gone: the device has died.
    """

    kind: SourceFault
    at_byte: int
    times: int = 1


class FaultySource:
    """`inner`, struck by `fault`. `fired`: how often, for tests to assert. `on_fire` is told before the first."""

    def __init__(self, inner: Source, fault: Fault, on_fire: Callable[[], None] = lambda: None):
        self._inner = inner
        self._fault = fault
        self._on_fire = on_fire
        self._lock = threading.Lock()
        self._given_bytes = 0
        self.fired = 0

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> list[int] | None:
        at = self._strike(chunk.num_bytes)
        if at is None:
            return self._inner.read(chunk, out, stopped)
        match self._fault.kind:
            case "error":
                raise OSError(errno.EIO, "injected")
            case "gone":
                raise StateError("injected: the device is gone")
            case "hang":
                _wait(None, stopped)
            case "slow":
                _wait(chunk.num_bytes / SLOW_BYTES_PER_S, stopped)
                self._inner.read(chunk, out, stopped)
            case "short":
                self._inner.read(chunk, out, stopped)
                out[at:].zero_()
                raise OSError(errno.ENODATA, "injected: the file ends early")
            case "corrupt":
                self._inner.read(chunk, out, stopped)
                out[at] ^= 1
        return None

    def _strike(self, num_bytes: int) -> int | None:
        """The byte of this read that is struck, if any."""
        with self._lock:
            begin, self._given_bytes = self._given_bytes, self._given_bytes + num_bytes
            if self.fired >= self._fault.times or self._fault.at_byte >= begin + num_bytes:
                return None
            if not self.fired:
                self._on_fire()
            self.fired += 1
            return max(0, self._fault.at_byte - begin)

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()

    def prefetch(self, chunk: Chunk) -> None:
        self._inner.prefetch(chunk)

    def close(self) -> None:
        self._inner.close()


def _wait(seconds: float | None, stopped: Callable[[], bool]) -> None:
    began_s = time.monotonic()
    while seconds is None or time.monotonic() < began_s + seconds:
        if stopped():
            raise Stopped
        time.sleep(_LOOK_S)
