"""Faults on purpose, at a place that can be named: for tests, benchmarks and drills.

A `Strike` says where, in the life of a worker, the device's own anchor is asked to inject a fault. So the fault
is the same as `anchortp fault` makes; only its moment is exact. Each strike fires once, and leaves a line in
`faults-fired.jsonl` of the runtime directory before it does: a test asserts that it fired.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

Point = Literal[
    "prefill",
    "decode",
    "collective",
    "between",
    "load",
    "read",
    "form",
    "attach",
    "leave",
    "save",
    "restore",
    "arrange",
]


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """At the `nth` time (from 1) that the worker of `device` passes `point`, inject `kind`.

    Points: `prefill`, `decode` (a step begins that holds, or does not hold, more than one token of a
    sequence), `collective` (about to enter one, in a step), `between` (after a step), `load` (about to copy a
    chunk of weights), `form` (about to join a group), `attach`, `leave` (answering those commands), `save` (about to
    copy blocks to the mirror), `restore` (about to fill planes), `arrange` (about to move units to other slots).

    At `read` not the worker fails but what a load reads from, `source` (a device, "" the host), as it gives its
    `at_byte`-th byte, and for `times` reads; `kind` is then one of `transfer.faulty`.
    """

    device: str
    point: Point
    kind: Literal["lost", "crash", "hang", "slow", "error", "corrupt", "short", "gone"]
    nth: int = 1
    source: str = ""
    at_byte: int = 0
    times: int = 1

    @property
    def key(self) -> str:
        if self.point == "read":
            return f"{self.device} read {self.source or 'host'} {self.at_byte} {self.kind}"
        return f"{self.device} {self.point} {self.nth} {self.kind}"


class FaultProbe:
    """[worker] Counts passages and fires the strikes that are due. With no strikes it costs a truth test."""

    def __init__(self, strikes: tuple[Strike, ...], runtime_dir: str, inject: Callable[[str], None]):
        self._log = Path(runtime_dir, "faults-fired.jsonl")
        self._inject = inject
        fired = {line["strike"] for line in fired_strikes(runtime_dir)} if strikes else set()
        self._due = [strike for strike in strikes if strike.key not in fired]
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._due)

    def at(self, point: Point) -> None:
        """The worker passes `point` now. Does not return if a strike fires."""
        if not self._due:
            return
        with self._lock:  # several threads load
            self._passed[point] += 1
            passed = self._passed[point]
        for strike in self._due:
            if strike.point == point and strike.nth == passed:
                self._fire(strike)

    def on_source(self, source: str) -> Strike | None:
        """The strike at what `source` gives, if one is due. `record` it when it fires."""
        return next((s for s in self._due if s.point == "read" and s.source == source), None)

    def record(self, strike: Strike) -> None:
        """Leaves the line that says that the strike fired."""
        line = json.dumps({"strike": strike.key, "pid": os.getpid(), "at_s": time.monotonic()})
        with self._log.open("a", encoding="utf-8") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            log.write(line + "\n")

    def _fire(self, strike: Strike) -> None:
        self.record(strike)
        self._inject(strike.kind)
        while True:  # the anchor kills or stops this process; it must not go on in the meantime
            signal.pause()


def fired_strikes(runtime_dir: str | Path) -> list[dict[str, object]]:
    """The strikes that have fired under this runtime directory, oldest first."""
    try:
        text = Path(runtime_dir, "faults-fired.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()]
