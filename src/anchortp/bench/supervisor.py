"""Starts a system, says when it answers, kills it, and starts it again the moment that it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from anchortp.bench.client import ServerError, Target, get
from anchortp.bench.systems import System
from anchortp.errors import EngineStopped

HOST = "127.0.0.1"
PROBE_S = 0.05
PROBE_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 30.0
KILLED_S = 0.002  # between looks at processes that were killed
SHARED_MEMORY = Path("/dev/shm")
MARK = "ANCHORTP_BENCH_MARK"  # in the environment of all that a system starts, wherever it ends up


class Supervisor:
    """One system under test. `up` is set while it answers. Event loop only.

    `restarts`: seconds from each end of the system to its next first answer.
    """

    def __init__(self, system: System, model: Path, devices: tuple[str, ...], *, served_name: str = "bench"):
        self.system = system
        self.devices = devices
        self.up = asyncio.Event()
        self.restarts: list[float] = []
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="anchortp-bench-"))
        self.target = Target(host=HOST, port=free_port(), model=served_name)
        self._model = model
        self._mark = secrets.token_hex(8)
        self._log = self.runtime_dir / "system.log"
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._sessions: set[int] = set()  # of every start
        self._shared_memory: set[int] = set()  # inodes
        self._stopping = False

    async def __aenter__(self) -> Supervisor:
        """Starts the system. Raises EngineStopped if it ends or does not answer in time."""
        try:
            await self._start()
            self._watching = asyncio.create_task(self._watch())
        except BaseException:
            await self._clean_up()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Asks the system to end, then sees to it."""
        self._stopping = True
        await self._clean_up()

    def strike(self, devices: tuple[str, ...], *, gone: bool) -> float:
        """The fault of a system that has no anchors: its processes are killed. `gone`: the next start does without
        these devices. Returns the moment (CLOCK_MONOTONIC). From any thread. Raises EngineStopped."""
        if gone:
            self.devices = tuple(device for device in self.devices if device not in devices)
        pattern = self.system.victim if self.system.faults == "victim" else ""
        found = self._marked(pattern)
        self._note_shared_memory()
        fault_s = time.monotonic()
        if not _kill(found):
            raise EngineStopped(f"system {self.system.name}: no process matches {pattern!r}; correct its `victim`.")
        return fault_s

    def raise_if_gone(self) -> None:
        """What went wrong while the system was started again, if anything did."""
        if self._watching is not None and self._watching.done():
            self._watching.result()

    async def status(self) -> dict[str, Any]:
        """The engine's own account, where it has one at /status; else nothing."""
        try:
            found = await get(self.target, "/status", timeout_s=PROBE_TIMEOUT_S)
        except (ServerError, OSError, TimeoutError, ValueError, EOFError):
            return {}
        return found if isinstance(found, dict) else {}

    def log_end(self, num_chars: int = 1500) -> str:
        """What it said last, after the first errors that it named: their cause is often far above."""
        logs = (self._log, self.runtime_dir / "serve.log")
        text = "\n".join(path.read_text(errors="replace") for path in logs if path.exists())
        errors = dict.fromkeys(line.strip()[:300] for line in text.splitlines() if "Error: " in line)
        return "\n".join([*list(errors)[:3], "...", text[-num_chars:]])

    # -- the system's processes

    async def _start(self) -> None:
        command = self.system.command_for(
            model=self._model,
            served_name=self.target.model,
            host=HOST,
            port=self.target.port,
            devices=",".join(self.devices),
            tp=len(self.devices),
            runtime_dir=self.runtime_dir,
        )
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.system.environment(**{MARK: self._mark}),
                start_new_session=True,
            )
        self._sessions.add(self._process.pid)
        ended = asyncio.create_task(self._process.wait())
        try:
            async with asyncio.timeout(self.system.start_timeout_s):
                while not await self._answers():
                    if ended.done():
                        raise EngineStopped(
                            f"system {self.system.name} ended with status {ended.result()} before it answered; it "
                            f"said: {self.log_end()}"
                        )
                    await asyncio.wait([ended], timeout=PROBE_S)
        except TimeoutError:
            raise EngineStopped(
                f"system {self.system.name} did not answer within {self.system.start_timeout_s} s; it said: "
                f"{self.log_end()}"
            ) from None
        finally:
            ended.cancel()
        self.up.set()

    async def _answers(self) -> bool:
        try:
            await get(self.target, "/v1/models", timeout_s=PROBE_TIMEOUT_S)
        except (ServerError, OSError, TimeoutError, ValueError, EOFError):
            return False
        return True

    async def _watch(self) -> None:
        """Starts the system again whenever it ends, at once; what it leaves behind is killed first."""
        while not self._stopping:
            assert self._process is not None
            await self._process.wait()
            if self._stopping:
                return
            self.up.clear()
            ended_s = time.monotonic()
            await self._end_all()
            await self._start()
            self.restarts.append(time.monotonic() - ended_s)

    async def _clean_up(self) -> None:
        self._stopping = True
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineStopped):
                await self._watching
        self._note_shared_memory()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        await self._end_all()
        if self._process is not None:
            await self._process.wait()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    async def _end_all(self) -> None:
        """SIGKILL for whatever of the system lives; then its named shared memory goes, whose keeper is gone too."""
        self._note_shared_memory()
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        while _kill(self._marked()):
            if time.monotonic() > deadline_s:
                raise EngineStopped(f"processes of system {self.system.name} do not end: {self._marked()}")
            await asyncio.sleep(KILLED_S)
        for path in SHARED_MEMORY.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino in self._shared_memory:
                    path.unlink()
        self._shared_memory.clear()
        self._sessions.clear()

    def _note_shared_memory(self) -> None:
        self._shared_memory |= {inode for pid in self._marked() for inode in _shared_memory(pid)}

    def _marked(self, pattern: str = "") -> list[int]:
        """The living processes that the system has started and whose command line matches: those with the mark, and
        those of its session (a process that gives itself a title overwrites the environment that others see)."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):  # it ended, or is not ours to read
                    _, _, stat = (entry / "stat").read_text().rpartition(") ")
                    state, _, _, session = stat.split()[:4]
                    ours = int(session) in self._sessions or wanted in (entry / "environ").read_bytes().split(b"\0")
                    if ours and state != "Z":
                        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        found += [int(entry.name)] if re.search(pattern, line) else []
        return found


def _kill(pids: list[int]) -> int:
    """SIGKILL; how many of them were still there."""
    killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def _shared_memory(pid: int) -> set[int]:
    """Inodes of the files under /dev/shm in its memory. (Semaphores are mapped under a name that they lose at once.)"""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}


def free_port() -> int:
    """A port that nobody listens on now. Somebody may before it is used, but then the system says so and ends."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
