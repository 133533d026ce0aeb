"""`anchortp bench recovery`: a load, a fault in the middle of it, and what the clients noticed, system by system.

A run is one system under one load with its faults. Where a folder is given each run is kept there as a file as soon as
it is done, so that the same command goes on where it was interrupted, or where its time was used up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from anchortp.bench import machine, measures
from anchortp.bench.faults import Fault, Struck, strike_all
from anchortp.bench.load import Load
from anchortp.bench.supervisor import Supervisor
from anchortp.bench.systems import System
from anchortp.bench.workload import Session, WorkloadOptions, make
from anchortp.errors import AnchorTPError, ConfigError

TICK_S = 0.5
TIMELINE = ("at_s", "text")  # what is kept of the lines of an engine's own story


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a run is made of. `change`: as "4→3", for people."""

    model: Path
    devices: tuple[str, ...]
    faults: tuple[Fault, ...]
    workload: WorkloadOptions
    system: System

    @property
    def change(self) -> str:
        lost = {device for fault in self.faults if fault.kind == "lost" for device in fault.devices}
        return f"{len(self.devices)}→{len(self.devices) - len(lost)}"

    def describe(self) -> dict[str, Any]:
        """Everything that a rerun needs; JSON-able."""
        return {
            "model": self.model.name,
            "change": self.change,
            "devices": list(self.devices),
            "faults_planned": msgspec.to_builtins(self.faults),
            "workload": self.workload.as_dict(),
            "system": msgspec.to_builtins(self.system) | {"command": _without_paths(self.system.command)},
        }

    def file_name(self) -> str:
        """The same for the same case: readable, and told apart by a digest of all of it."""
        kinds = "-".join(dict.fromkeys(fault.kind for fault in self.faults)) or "healthy"
        shares = "-".join(f"{fault.at:g}" for fault in self.faults)
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:8]
        change = self.change.replace("→", "to")
        return f"{self.model.name}-{change}-{kinds}-{shares}-{self.system.name}-{digest}.json"


Observer = Callable[[Case, Load], None]


def run(
    cases: list[Case], output: Path | None, budget_s: float | None, tell: Callable[[str], None], observe: Observer
) -> Iterator[dict[str, Any]]:
    """The document of each case, in order; those that `output` holds already are not run again.

    Ends early on SIGINT, or `budget_s` after the first began: with a document that says `interrupted`, or between two
    runs where the next would surely take longer. A system that fails to start gives a document with its `error`.
    """
    workloads: dict[tuple[str, Path], tuple[Session, ...]] = {}
    began_s = time.monotonic()
    for index, case in enumerate(cases):
        kept = None if output is None else output / case.file_name()
        if kept is not None and kept.exists():
            yield json.loads(kept.read_text(encoding="utf-8"))
            continue
        left_s = math.inf if budget_s is None else budget_s - (time.monotonic() - began_s)
        if case.workload.requests / case.workload.rate > left_s:
            tell(f"the budget of {budget_s:g} s is used up; {len(cases) - index} run(s) are left for the same command")
            return
        sessions = workloads.setdefault((repr(case.workload), case.model), make(case.workload, case.model))
        tell(f"{index + 1} of {len(cases)}: {case.system.name}, {case.change}")
        document = _document(case, sessions, left_s, tell, observe)
        if kept is not None and not document.get("interrupted") and "error" not in document:
            output.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(document), encoding="utf-8")
        yield document
        if document.get("interrupted"):
            return


def _document(
    case: Case, sessions: tuple[Session, ...], left_s: float, tell: Callable[[str], None], observe: Observer
) -> dict[str, Any]:
    document = {"benchmark": "recovery", "conditions": machine.conditions(), **case.describe()}
    try:
        return document | asyncio.run(_play(case, sessions, left_s, observe))
    except ConfigError:
        raise
    except AnchorTPError as error:
        tell(f"{case.system.name}: {error}")
        return document | {"error": str(error)}


async def _play(case: Case, sessions: tuple[Session, ...], left_s: float, observe: Observer) -> dict[str, Any]:
    """Raises AnchorTPError if the system does not start, or not again after a fault.

    SIGINT while it starts ends the process as usual; later it ends the load, as the end of `left_s` does.
    """
    began_s = time.monotonic()
    async with Supervisor(case.system, case.model, case.devices) as supervisor:
        started_s = time.monotonic() - began_s
        load = Load(sessions, supervisor, case.workload.think_s)
        struck: list[Struck] = []
        with _interrupt(left_s - started_s) as interrupted:
            playing = asyncio.create_task(load.play())
            striking = asyncio.create_task(strike_all(case.faults, load, supervisor, struck))
            stopping = asyncio.create_task(interrupted.wait())
            try:
                await _until_done(playing, striking, stopping, supervisor, lambda: observe(case, load))
            finally:
                for task in (playing, striking, stopping):
                    task.cancel()
                await asyncio.gather(playing, striking, stopping, return_exceptions=True)
        return {
            "interrupted": interrupted.is_set(),
            "start_s": started_s,
            "restarts_s": supervisor.restarts,
            **measures.measure(load.sent, struck, load.began_s),
            "engine": _engine(await supervisor.status(), load.began_s),
        }


async def _until_done(
    playing: asyncio.Task[None],
    striking: asyncio.Task[None],
    stopping: asyncio.Task[bool],
    supervisor: Supervisor,
    tick: Callable[[], None],
) -> None:
    """Until the load is over, or somebody wants it to be. Raises what went wrong beside it."""
    while not playing.done() and not stopping.done():
        await asyncio.wait([playing, stopping], timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        tick()
        supervisor.raise_if_gone()
        if striking.done():
            striking.result()
    if playing.done():
        playing.result()


@contextlib.contextmanager
def _interrupt(after_s: float) -> Iterator[asyncio.Event]:
    """Set by the first SIGINT, or after so long; a second SIGINT ends the process as usual."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    timer = None if math.isinf(after_s) else loop.call_later(max(0.0, after_s), event.set)

    def stop() -> None:
        event.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield event
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if timer is not None:
            timer.cancel()


def _engine(status: dict[str, Any], began_s: float) -> dict[str, Any]:
    """What the system itself tells of its recoveries, where it does: phases, bytes by kind, its story."""
    episodes = [episode for episode in status.get("episodes", ()) if episode.get("cause") != "start"]
    told = []
    for episode in episodes:
        timeline = [{key: line[key] for key in TIMELINE} for line in episode.get("timeline", ())]
        told.append(episode | {"at_s": episode["began_s"] - began_s, "timeline": timeline})
    return {"episodes": told} if told else {}


def _without_paths(command: tuple[str, ...]) -> list[str]:
    """Results are read elsewhere: of absolute paths only the last part is kept."""
    return [Path(part).name if part.startswith("/") else part for part in command]
