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
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

Point = Literal[
    "prefill", "decode", "collective", "between", "load", "form", "attach", "leave", "save", "restore", "arrange"
]


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """At the `nth` time (from 1) that the worker of `device` passes `point`, inject `kind`.

    Points: `prefill`, `decode` (a step begins that holds, or does not hold, more than one token of a
    sequence), `collective` (about to enter one, in a step), `between` (after a step), `load` (about to copy a
    run of units), `form` (about to join a group), `attach`, `leave` (answering those commands), `save` (about to
    copy blocks to the mirror), `restore` (about to fill planes).
    """

    device: str
    point: Point
    kind: Literal["lost", "crash", "hang"]
    nth: int = 1

    @property
    def key(self) -> str:
        return f"{self.device} {self.point} {self.nth} {self.kind}"


class FaultProbe:
    """[worker] Counts passages and fires the strikes that are due. With no strikes it costs a truth test."""

    def __init__(self, strikes: tuple[Strike, ...], runtime_dir: str, inject: Callable[[str], None]):
        self._log = Path(runtime_dir, "faults-fired.jsonl")
        self._inject = inject
        fired = {line["strike"] for line in fired_strikes(runtime_dir)} if strikes else set()
        self._due = [strike for strike in strikes if strike.key not in fired]
        self._passed: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._due)

    def at(self, point: Point) -> None:
        """The worker passes `point` now. Does not return if a strike fires."""
        if not self._due:
            return
        self._passed[point] += 1
        for strike in self._due:
            if strike.point == point and strike.nth == self._passed[point]:
                self._fire(strike)

    def _fire(self, strike: Strike) -> None:
        line = json.dumps({"strike": strike.key, "pid": os.getpid(), "at_s": time.monotonic()})
        with self._log.open("a", encoding="utf-8") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            log.write(line + "\n")
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
