"""For process tests of the engine: a running one, streams that can be waited for, faults, and a leak check."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from anchortp.config import resolve_engine_config
from anchortp.engine.api import EngineRequest, SamplingParams, TokenOutput
from anchortp.engine.controller import ElasticEngine
from anchortp.engine.faults import Strike, fired_strikes
from anchortp.state.client import AnchorClient
from anchortp.state.process import kill, open_pidfd, wait_gone
from tests.tiny_model import Oracle

DEADLINE_S = 60.0
DEVICE_MEMORY_BYTES = 1 << 28


# ---------------------------------------------------------------------------------------- what is expected


@functools.cache
def _oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@functools.cache
def _answer(folder: Path, prompt: tuple[int, ...]) -> list[int]:
    """The greedy answer as far as anybody has asked for it; grown in place."""
    return []


def greedy(folder: Path, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What the model in `folder` answers, computed by one device in this process."""
    known = _answer(folder, prompt)
    if len(known) < num_tokens:
        known += _oracle(folder).greedy([*prompt, *known], num_tokens - len(known))
    return known[:num_tokens]


def prompt_of(index: int, length: int = 4) -> tuple[int, ...]:
    """Prompts that differ from their first token on."""
    return tuple((17 * index + 5 * i * i + 3 * i + 1) % 250 for i in range(length))


# -------------------------------------------------------------------------------------------- streams


class Stream:
    """One request and what came of it so far. Filled by the engine's thread."""

    def __init__(self, driver: Driver, request: EngineRequest):
        self.request = request
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0
        self._driver = driver

    def take(self, output: TokenOutput) -> None:
        with self._driver.changed:
            assert self.finish_reason is None, "something came after the end"
            self.tokens += [token.token_id for token in output.tokens]
            self.finish_reason, self.error = output.finish_reason, output.error
            self.num_cached_tokens = output.num_cached_tokens
            self._driver.changed.notify_all()

    def wait_tokens(self, num_tokens: int) -> None:
        self._driver.wait(
            lambda: len(self.tokens) >= num_tokens or self.finish_reason is not None,
            f"{num_tokens} tokens of {self.request.request_id}, which has {len(self.tokens)}",
        )
        assert self.error is None, self.error
        assert len(self.tokens) >= num_tokens, f"ended after {len(self.tokens)} tokens: {self.finish_reason}"

    def wait_end(self) -> str:
        self._driver.wait(lambda: self.finish_reason is not None, f"the end of {self.request.request_id}")
        assert self.finish_reason is not None
        return self.finish_reason

    def check(self) -> None:
        """Waits for the end; the answer is whole and what one device alone would have said."""
        assert (self.wait_end(), self.error) == ("length", None)
        expected = greedy(self._driver.folder, self.request.prompt_token_ids, self.request.params.max_tokens)
        assert self.tokens == expected


class _Watched(ElasticEngine):
    """Wakes whoever waits for a change of its status."""

    def __init__(self, *args: Any, changed: threading.Condition, **options: Any):
        super().__init__(*args, **options)
        self._changed = changed

    def _publish(self, *args: Any, **options: Any) -> None:
        super()._publish(*args, **options)
        with self._changed:
            self._changed.notify_all()


class Driver:
    """An engine, and what a test does to it."""

    def __init__(self, folder: Path, runtime_dir: Path, devices: int, strikes: tuple[Strike, ...], options: dict):
        self.folder = folder
        self.runtime_dir = runtime_dir
        self.changed = threading.Condition()
        self.strikes = strikes
        keep_anchors = options.pop("keep_anchors", False)
        timeouts = options.pop("recovery", {})
        kind = options.pop("kind", "cpu:")
        defaults = {"device_memory_bytes": DEVICE_MEMORY_BYTES}
        self.config = resolve_engine_config(
            folder,
            runtime_dir=runtime_dir,
            devices=tuple(f"{kind}{i}" for i in range(devices)),
            **defaults | options,
        )
        self.engine = _Watched(self.config, strikes=strikes, keep_anchors=keep_anchors, changed=self.changed)
        self.engine.recovery.config = dataclasses.replace(self.engine.recovery.config, **timeouts)
        self._num_requests = 0

    # -- waiting

    def wait(self, ready: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Until `ready()`, asked whenever a token arrives or the engine's status changes."""
        with self.changed:
            done = self.changed.wait_for(ready, timeout_s)
        assert done, f"waited {timeout_s} s for {what}; {self.engine.status()}"

    def wait_recovered(self, num_episodes: int) -> list[dict[str, Any]]:
        """Until so many episodes (the start is one) have ended and the engine serves; returns all of them."""

        def recovered() -> bool:
            status = self.engine.status()
            ended = [e for e in status["episodes"] if e["seconds"] is not None]
            return len(ended) >= num_episodes and status["state"] == "serving"

        self.wait(recovered, f"the end of episode {num_episodes}")
        return self.episodes

    @property
    def episodes(self) -> list[dict[str, Any]]:
        return self.engine.status()["episodes"]

    @property
    def state(self) -> str:
        return self.engine.status()["state"]

    # -- requests

    def submit(self, prompt: tuple[int, ...], num_tokens: int, **params: Any) -> Stream:
        self._num_requests += 1
        request = EngineRequest(
            request_id=f"r{self._num_requests}",
            prompt_token_ids=prompt,
            params=SamplingParams(**{"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True} | params),
        )
        stream = Stream(self, request)
        self.engine.submit(request, stream.take)
        return stream

    def speak(self, num_streams: int, num_tokens: int, after: int = 3) -> list[Stream]:
        """Streams that have all begun: each has `after` tokens."""
        streams = [self.submit(prompt_of(i), num_tokens) for i in range(num_streams)]
        for stream in streams:
            stream.wait_tokens(after)
        return streams

    # -- faults

    def inject(self, device: str, kind: str) -> None:
        with AnchorClient.connect(self.runtime_dir, device, role="tool") as tool:
            tool.inject(kind)

    def arm(self, *strikes: Strike) -> None:
        """Strikes for the workers that are assigned from now on; they count their passages from 1."""
        self.strikes += strikes
        self.engine._strikes = self.strikes

    def worker_pid(self, device: str) -> int:
        return self.engine.status()["devices"][device]["worker_pid"]

    def anchor_pid(self, device: str) -> int:
        with AnchorClient.connect(self.runtime_dir, device, role="tool") as tool:
            return tool.welcome.pid

    def replaced(self, device: str, before_pid: int) -> None:
        """Waits until another process is the device's worker and serves."""
        self.wait(
            lambda: self.state == "serving" and self.worker_pid(device) not in (0, before_pid),
            f"a new worker of {device}",
        )

    def check_fired(self) -> None:
        """Each strike fires once, by now or soon: a recovery may outlast the streams that it is about."""
        wanted = sorted(strike.key for strike in self.strikes)
        self.wait(lambda: len(self._fired()) >= len(wanted), "all strikes have fired")
        assert sorted(self._fired()) == wanted

    def _fired(self) -> list[str]:
        return [line["strike"] for line in fired_strikes(self.runtime_dir)]

    def validate(self) -> None:
        self.engine.scheduler.validate()
        self.engine.recovery.validate()


@contextlib.contextmanager
def running_engine(
    folder: Path,
    devices: int = 3,
    strikes: tuple[Strike, ...] = (),
    *,
    runtime_dir: Path | None = None,
    wait: bool = True,
    **options: Any,
) -> Iterator[Driver]:
    """An engine on `devices` devices under a private runtime directory, checked and gone without a trace after.

    `options` go to `resolve_engine_config`, but `keep_anchors` to the engine and `recovery`, a dict, into the
    coordinator's config. With a `runtime_dir` of the caller the leak check, too, is the caller's.
    """
    with contextlib.ExitStack() as stack:
        if runtime_dir is None:
            runtime_dir = stack.enter_context(nothing_left())
        driver = Driver(folder, runtime_dir, devices, tuple(strikes), options)
        try:
            driver.engine.start()
            if wait:
                driver.engine.wait_ready(DEADLINE_S)
            yield driver
            driver.validate()
        finally:
            driver.engine.stop()
        assert driver.engine._failure is None, driver.engine._failure


# ------------------------------------------------------------------------------------------- leak check


def processes_naming(text: str) -> dict[int, str]:
    """pid -> command line of every process, zombies not included, whose command line holds `text`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in line:
                    found[int(entry.name)] = line
    return found


def children() -> set[int]:
    """Of this process, by any of its threads; zombies too."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def _descriptors() -> dict[str, str]:
    links = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links[entry.name] = os.readlink(entry)
    return links


def _describe(pids: set[int]) -> list[str]:
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            lines.append(f"{pid} {state_of(pid)} {command}")
    return lines


@contextlib.contextmanager
def nothing_left() -> Iterator[Path]:
    """A private runtime directory with a short path (a socket's has 107 bytes); at the end nothing else is left
    of what was started under it: no process, zombie, descriptor, shared memory, socket."""
    folder = Path(tempfile.mkdtemp(prefix="atp-"))
    children_before, descriptors_before = children(), _descriptors()
    shm_before = set(os.listdir("/dev/shm"))
    try:
        yield folder
        running = processes_naming(str(folder))
        assert not running, f"processes left: {running}"
        assert not (left := children() - children_before), f"children left: {_describe(left)}"
        assert not (left := set(os.listdir("/dev/shm")) - shm_before), f"shared memory left: {left}"
        new = {fd: to for fd, to in _descriptors().items() if descriptors_before.get(fd) != to}
        assert len(_descriptors()) <= len(descriptors_before), f"descriptors left: {new}"
        assert not (left := list(folder.glob("*.sock"))), f"sockets left: {left}"
    finally:
        for pid in processes_naming(str(folder)):
            kill_process(pid)
        shutil.rmtree(folder)


def kill_process(pid: int, sig: signal.Signals = signal.SIGKILL, timeout_s: float = DEADLINE_S) -> None:
    """Sends the signal and, unless it only stops, waits until the process is dead. One that is gone is fine."""
    try:
        pidfd = open_pidfd(pid)
    except ProcessLookupError:
        return
    try:
        kill(pidfd, sig)
        assert sig == signal.SIGSTOP or wait_gone(pidfd, timeout_s), f"process {pid} does not end"
    finally:
        os.close(pidfd)


def wait_dead(pid: int, timeout_s: float = DEADLINE_S) -> None:
    try:
        pidfd = open_pidfd(pid)
    except ProcessLookupError:
        return
    try:
        assert wait_gone(pidfd, timeout_s), f"process {pid} does not end"
    finally:
        os.close(pidfd)


def wait_state(pid: int, state: str, timeout_s: float = DEADLINE_S) -> None:
    """A signal is sent before it is delivered: the process may run on for a moment on another core."""
    deadline_s = time.monotonic() + timeout_s
    while state_of(pid) != state:
        assert time.monotonic() < deadline_s, f"process {pid} is in state {state_of(pid)}, not {state}"
        os.sched_yield()


def state_of(pid: int) -> str:
    """As in /proc: R, S, T (stopped), Z (zombie); "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def check_bytes(episodes: Iterable[dict[str, Any]]) -> None:
    """Survivors moved nothing, and the host gave what was lost and the further copies that the cuts need.

    Over all episodes: what is still under way when the next fault comes arrives in the next one's account.
    """
    moved: Counter[str] = Counter()
    for episode in episodes:
        moved.update(episode["bytes"])
    assert moved["loaded"] == moved["lost"] + moved["replica"] + moved["replicated"]
    assert moved["lost"] > 0 and moved["copied"] == 0


def wait_balanced(driver: Driver, num_changes: int) -> dict[str, Any]:
    """Keeps the engine speaking until experts were rebalanced so often and the change is made."""

    def done() -> bool:
        status = driver.engine.status()
        ended = all(change["outcome"] for change in status["changes"])
        return ended and status["experts"].get("rebalanced", 0) >= num_changes

    while not done():
        driver.submit(prompt_of(1), 150).check()
    return driver.engine.status()
