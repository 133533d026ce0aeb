"""The anchor as a process: memory, budget, epochs, leases, faults, and clients that misbehave."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from anchortp.arena import PAGE_BYTES, MemfdArena
from anchortp.errors import (
    AnchorRunning,
    ArenaUnknown,
    BudgetExceeded,
    ChannelClosed,
    ChannelTimeout,
    ConfigError,
    LeaseHeld,
    ManifestInvalid,
    ProtocolError,
    StaleEpoch,
    StateError,
    in_words,
)
from anchortp.state import process
from anchortp.state.anchor import MAX_CLIENTS, Anchor, _Client
from anchortp.state.client import AnchorClient
from anchortp.state.launch import anchor_log, anchor_socket, start_anchor
from anchortp.state.manifest import Manifest
from anchortp.state.messages import AdoptArena, Failure, GetManifest, GetStatus, Hello, Reply, Welcome
from anchortp.state.wire import Channel, connect, listen

DEVICE = "cpu:0"
P = PAGE_BYTES
BUDGET = 64 * P
DEADLINE_S = 20.0


# -- processes


@dataclass(slots=True, kw_only=True)
class Running:
    """An anchor process and the connections that a test made to it."""

    runtime_dir: Path
    pid: int
    pidfd: int
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def connect(self, role: str = "controller", timeout_s: float = DEADLINE_S) -> AnchorClient:
        return self.closing.enter_context(AnchorClient.connect(self.runtime_dir, DEVICE, role, timeout_s))

    def channel(self) -> Channel:
        """A connection that has not said Hello."""
        path = anchor_socket(self.runtime_dir, DEVICE)
        return self.closing.enter_context(Channel(connect(path, DEADLINE_S), Reply))

    def worker(self) -> Worker:
        return self.closing.enter_context(Worker(self.runtime_dir))

    def keep(self, arena: MemfdArena) -> MemfdArena:
        return self.closing.enter_context(arena)

    def end(self, sig: signal.Signals) -> None:
        process.kill(self.pidfd, sig)
        assert process.wait_gone(self.pidfd, DEADLINE_S)


class Worker:
    """A process with a worker's connection, `client`, that evaluates what it is told."""

    PROGRAM = """
import os, sys
from anchortp.state.client import AnchorClient
client = AnchorClient.connect(sys.argv[1], sys.argv[2], "worker", 20)
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""

    def __init__(self, runtime_dir: Path):
        self._child = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, str(runtime_dir), DEVICE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid
        self.pidfd = process.open_pidfd(self.pid)
        assert self._child.stdout.readline() == "ready\n"

    def ask(self, expression: str) -> str:
        self._child.stdin.write(expression + "\n")
        self._child.stdin.flush()
        return self._child.stdout.readline().rstrip("\n")

    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        process.kill(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        with self._child:
            pass


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"


def processes_at(runtime_dir: Path) -> list[int]:
    """Those that have the directory on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.fsencode(runtime_dir) in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def children() -> set[str]:
    """Of this process, zombies included."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = entry.read_text().rpartition(")")[2].split()[1]
            found |= {entry.parent.name} if int(parent) == os.getpid() else set()
    return found


def arenas_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("anchortp:")


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A short path (pytest's are too long for a socket), with the leak check of every test here.

    An arena lives in the descriptors and mappings of processes, so these are what can leak.
    """
    gc.collect()  # what earlier tests left in reference cycles would go away in the middle, or not at all
    before = open_fds(), children(), arenas_mapped()
    path = Path(tempfile.mkdtemp(prefix="atp-"))
    try:
        yield path
        until(lambda: processes_at(path) == [])
        assert (open_fds(), children(), arenas_mapped()) == before
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def started(runtime_dir: Path) -> Iterator[Running]:
    pid = start_anchor(device=DEVICE, budget_bytes=BUDGET, runtime_dir=runtime_dir, timeout_s=DEADLINE_S)
    anchor = Running(runtime_dir=runtime_dir, pid=pid, pidfd=process.open_pidfd(pid))
    try:
        with anchor.closing:
            yield anchor
    finally:
        process.kill(anchor.pidfd, signal.SIGCONT)
        anchor.end(signal.SIGTERM)
        os.close(anchor.pidfd)


@pytest.fixture
def anchor(runtime_dir: Path) -> Iterator[Running]:
    with started(runtime_dir) as anchor:
        yield anchor
    log = anchor_log(runtime_dir, DEVICE).read_text()
    assert "bug in" not in log and "bug while" not in log and "Traceback" not in log, log


# -- the process itself


def test_it_is_detached_and_says_who_it_is(anchor: Running) -> None:
    client = anchor.connect()
    assert client.welcome.device == DEVICE and client.welcome.pid == anchor.pid
    assert client.welcome.budget_bytes == BUDGET and client.welcome.epoch == 0
    assert os.getsid(anchor.pid) != os.getsid(0)
    assert os.readlink(f"/proc/{anchor.pid}/fd/0") == os.devnull
    assert os.readlink(f"/proc/{anchor.pid}/cwd") == "/"


def test_it_imports_nothing_heavy() -> None:
    check = (
        "import sys, anchortp.state.anchor, anchortp.state.client\n"
        "print(sorted({'torch', 'numpy', 'asyncio', 'subprocess', 'logging'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == "[]\n", done.stderr


def test_it_holds_no_descriptor_of_its_starter(runtime_dir: Path) -> None:
    readable, writable = os.pipe()
    os.set_inheritable(writable, True)
    with started(runtime_dir):
        os.close(writable)
        assert os.read(readable, 1) == b""  # else the anchor had a writing end, and this would block
    os.close(readable)


def test_ctrl_c_and_a_lost_terminal_are_ignored(anchor: Running) -> None:
    process.kill(anchor.pidfd, signal.SIGINT)
    process.kill(anchor.pidfd, signal.SIGHUP)
    assert anchor.connect().status().pid == anchor.pid


def test_sigterm_is_a_clean_stop(runtime_dir: Path) -> None:
    with started(runtime_dir) as anchor:
        client = anchor.connect()
        anchor.end(signal.SIGTERM)
        assert client.is_gone()
        with pytest.raises(ChannelClosed):
            client.status()
        assert os.listdir(runtime_dir) == [anchor_log(runtime_dir, DEVICE).name]
        with pytest.raises(ChannelClosed, match="nobody listens"):
            anchor.connect()


def test_after_shutdown_the_next_can_start_at_once(runtime_dir: Path) -> None:
    for _ in range(2):
        with started(runtime_dir) as anchor:
            anchor.connect().shutdown()
            start_again = start_anchor(device=DEVICE, budget_bytes=BUDGET, runtime_dir=runtime_dir)
            pidfd = process.open_pidfd(start_again)
            anchor.connect().shutdown()
            assert process.wait_gone(pidfd, DEADLINE_S)
            os.close(pidfd)


def test_a_second_anchor_is_refused_by_name(anchor: Running) -> None:
    with pytest.raises(AnchorRunning, match=f"process {anchor.pid};"):
        start_anchor(device=DEVICE, budget_bytes=BUDGET, runtime_dir=anchor.runtime_dir)
    assert anchor.connect().status().pid == anchor.pid


def test_devices_have_anchors_of_their_own(anchor: Running) -> None:
    host = start_anchor(device="host", budget_bytes=P, runtime_dir=anchor.runtime_dir)
    with AnchorClient.connect(anchor.runtime_dir, "host", "tool") as client:
        assert client.welcome.pid == host and client.status().device == "host"
        client.shutdown()


def test_what_cannot_start_says_why(runtime_dir: Path) -> None:
    with pytest.raises(ConfigError, match="is no device"):
        start_anchor(device="../x", budget_bytes=P, runtime_dir=runtime_dir)
    with pytest.raises(ConfigError, match="holds nothing"):  # found by the process that was started
        start_anchor(device=DEVICE, budget_bytes=0, runtime_dir=runtime_dir)
    with pytest.raises(ConfigError, match="shorter runtime directory"):
        start_anchor(device=DEVICE, budget_bytes=P, runtime_dir=runtime_dir / ("x" * 100))
    runtime_dir.chmod(0o750)
    with pytest.raises(ConfigError, match="mode 0750"):
        start_anchor(device=DEVICE, budget_bytes=P, runtime_dir=runtime_dir)


def test_a_start_that_takes_too_long_leaves_no_process(runtime_dir: Path) -> None:
    with pytest.raises(ChannelTimeout, match="not ready within"):
        start_anchor(device=DEVICE, budget_bytes=P, runtime_dir=runtime_dir, timeout_s=0.0)
    until(lambda: processes_at(runtime_dir) == [])


# -- memory


def test_two_processes_see_the_same_bytes(anchor: Running) -> None:
    client, worker = anchor.connect(), anchor.worker()
    arena = anchor.keep(client.create_arena("weights", 4 * P, 1))
    assert "MemfdArena" in worker.ask("(arena := client.open_arena('weights', 1))")
    worker.ask("(memory := arena.map()).write(b'from the worker')")
    with arena.map() as memory:
        assert memory[:15] == b"from the worker"
        memory[4 * P - 1] = 9
    assert worker.ask("memory[-1]") == "9"


def test_pages_are_committed_on_use_and_given_back(anchor: Running) -> None:
    client = anchor.connect()
    arena = anchor.keep(client.create_arena("kv", 1 << 40, 1))
    assert client.commit("kv", [(0, 8 * P)], 1) == 8 * P
    (info,) = client.status().arenas
    assert (info.reserved_bytes, info.accounted_bytes, info.committed_bytes) == (1 << 40, 8 * P, 0)
    with arena.map() as memory:
        memory[: 8 * P] = b"\1" * 8 * P
        assert client.status().arenas[0].committed_bytes == 8 * P
        assert client.decommit("kv", [(P, 3 * P), (4 * P + 1, 6 * P)], 1) == 5 * P
        (info,) = client.status().arenas
        assert info.committed_bytes == info.accounted_bytes == 5 * P
        assert info.ranges == ((0, P), (3 * P, 5 * P), (6 * P, 8 * P))
        assert memory[P : 3 * P] == bytes(2 * P) and memory[5 * P - 1] == 1
    assert client.drop_arena("kv", 1) == 0
    assert arena.committed_bytes() == 0 and client.status().arenas == ()


def test_growing_in_place(anchor: Running) -> None:
    client = anchor.connect()
    before = anchor.keep(client.create_arena("kv", P, 1))
    assert client.grow_arena("kv", 4 * P, 1).reserved_bytes == 4 * P
    after = anchor.keep(client.open_arena("kv", 1))
    with before.map() as short, after.map() as long:
        short[0] = 5
        assert len(long) == 4 * P and long[0] == 5
    with pytest.raises(StateError, match="cannot shrink"):
        client.grow_arena("kv", P, 1)


def test_the_budget_is_refused_with_the_numbers(anchor: Running) -> None:
    client = anchor.connect()
    for name in ("weights", "kv"):
        anchor.keep(client.create_arena(name, BUDGET, 1))
    assert client.commit("weights", [(0, 60 * P)], 1) == 60 * P
    with pytest.raises(BudgetExceeded) as caught:
        client.commit("kv", [(0, P), (10 * P, 14 * P)], 1)
    error = caught.value
    assert (error.device, error.requested_bytes, error.committed_bytes, error.budget_bytes) == (
        DEVICE,
        5 * P,
        60 * P,
        BUDGET,
    )
    assert all(in_words(size) in str(error) for size in (5 * P, 60 * P, BUDGET))
    assert client.status().committed_bytes == 60 * P
    assert client.commit("kv", [(0, 4 * P)], 1) == BUDGET
    assert client.commit("kv", [(0, 4 * P)], 1) == BUDGET  # counted once


def test_unknown_and_taken_names(anchor: Running) -> None:
    client = anchor.connect()
    anchor.keep(client.create_arena("kv", P, 1))
    with pytest.raises(ArenaUnknown, match="it has: kv"):
        client.open_arena("weights", 1)
    with pytest.raises(StateError, match="already"):
        client.create_arena("kv", P, 1)


# -- epochs and leases


STALE = {
    "fence": lambda client: client.fence(4),
    "lease": lambda client: client.lease(4),
    "create": lambda client: client.create_arena("new", P, 4),
    "open": lambda client: client.open_arena("kv", 4),
    "grow": lambda client: client.grow_arena("kv", 2 * P, 4),
    "drop": lambda client: client.drop_arena("kv", 4),
    "commit": lambda client: client.commit("kv", [(0, P)], 4),
    "decommit": lambda client: client.decommit("kv", [(0, P)], 4),
    "put_manifest": lambda client: client.put_manifest(MANIFEST, 4),
}


def test_an_older_epoch_changes_nothing(anchor: Running) -> None:
    client = anchor.connect("worker")
    arena = anchor.keep(client.create_arena("kv", P, 4))
    client.fence(5)
    before = client.status()
    stale = STALE | {"adopt": lambda client: client.adopt_arena(arena, [], 4)}
    for call in stale.values():
        with pytest.raises(StaleEpoch) as caught:
            call(client)
        assert (caught.value.epoch, caught.value.current) == (4, 5)
    after = client.status()
    assert msgspec.structs.replace(after, uptime_s=before.uptime_s) == before
    assert client.get_manifest() is None


def test_a_newer_epoch_becomes_the_anchors(anchor: Running) -> None:
    client = anchor.connect()
    client.fence(3)
    client.fence(3)
    anchor.keep(client.create_arena("kv", P, 7))
    assert client.status().epoch == 7
    with pytest.raises(StaleEpoch):
        client.fence(6)


def test_one_worker_at_a_time(anchor: Running) -> None:
    tool, first, second = anchor.connect("tool"), anchor.worker(), anchor.worker()
    assert first.ask("client.lease(1)") == "None"
    assert tool.status().lease.pid == first.pid
    assert second.ask("client.lease(1)").startswith(f"LeaseHeld process {first.pid} is the worker of {DEVICE}")
    assert first.ask("client.lease(2)") == "None"  # renewed
    assert tool.status().lease.epoch == 2
    assert second.ask("client.lease(1)").startswith("StaleEpoch")
    tool.fence(3)
    assert tool.status().lease.epoch == 2  # void, though the connection stays
    assert second.ask("client.lease(3)") == "None"
    assert tool.status().lease.pid == second.pid
    assert first.ask("client.commit('kv', [], 2)").startswith("StaleEpoch")
    assert first.ask("client.lease(3)").startswith(f"LeaseHeld process {second.pid}")


def test_the_next_worker_of_an_epoch_need_not_wait_until_the_dead_ones_memory_is_gone(runtime_dir: Path) -> None:
    """Its connection and its pidfd tell only then. Here nobody runs the anchor's loop, so it has heard of neither."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os._exit(0)
    anchor = Anchor(device=DEVICE, budget_bytes=BUDGET, listener=listen(anchor_socket(runtime_dir, DEVICE)))
    first, second = (_Client(channel=None, pid=of, role="worker") for of in (pid, os.getpid()))
    try:
        anchor._lease_to(first)
        with pytest.raises(LeaseHeld, match=f"process {pid} "):
            anchor._lease_to(second)
        os.write(writer, b"x")
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        anchor._lease_to(second)
        assert anchor._status().lease.pid == os.getpid()
    finally:
        os.write(writer, b"x")
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
        anchor.close()


def test_only_a_worker_can_take_the_lease(anchor: Running) -> None:
    with pytest.raises(StateError, match="connect as a worker"):
        anchor.connect("controller").lease(1)


def test_a_lease_ends_with_its_connection(anchor: Running) -> None:
    tool = anchor.connect("tool")
    with AnchorClient.connect(anchor.runtime_dir, DEVICE, "worker") as worker:
        worker.lease(1)
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()}"):
            anchor.connect("worker").lease(1)
    until(lambda: tool.status().lease is None)
    anchor.connect("worker").lease(1)


def test_a_lease_ends_with_its_process_even_if_a_child_holds_the_connection(anchor: Running) -> None:
    tool, worker = anchor.connect("tool"), anchor.worker()
    worker.ask("client.lease(1)")
    assert int(worker.ask("os.fork() or (os.read(0, 1), os._exit(0))")) > 0  # the child lives as long as the pipe
    process.kill(worker.pidfd, signal.SIGKILL)
    until(lambda: tool.status().lease is None)


# -- the manifest

MANIFEST = Manifest(
    device=DEVICE,
    model="fingerprint",
    dtype="float32",
    epoch=1,
    shards={"attention": (0, 2)},
    arenas={"kv": P},
    num_kv_blocks=4,
    kv_block_size=16,
).seal()


def test_the_manifest_is_kept_and_checked(anchor: Running) -> None:
    client = anchor.connect()
    assert client.get_manifest() is None
    client.put_manifest(MANIFEST, 1)
    assert anchor.connect("tool").get_manifest() == MANIFEST
    with pytest.raises(ManifestInvalid, match="torn"):
        client.put_manifest(msgspec.structs.replace(MANIFEST, epoch=2), 2)
    with pytest.raises(ManifestInvalid, match="not of cpu:0"):
        client.put_manifest(msgspec.structs.replace(MANIFEST, device="cpu:7").seal(), 2)
    assert client.get_manifest() == MANIFEST


# -- faults


def test_injected_crash_kills_the_worker_and_keeps_its_memory(anchor: Running) -> None:
    tool, worker = anchor.connect("tool"), anchor.worker()
    with pytest.raises(StateError, match="has no worker to crash"):
        tool.inject("crash")
    worker.ask("client.lease(1)")
    worker.ask("os.pwrite(client.create_arena('kv', 1, 1).fd, b'survives', 0)")
    tool.inject("crash")
    assert process.wait_gone(worker.pidfd, DEADLINE_S)
    until(lambda: tool.status().lease is None)
    spare = anchor.connect("worker")
    spare.lease(2)
    assert os.pread(anchor.keep(spare.open_arena("kv", 2)).fd, 8, 0) == b"survives"


def test_injected_hang_stops_the_worker(anchor: Running) -> None:
    tool, worker = anchor.connect("tool"), anchor.worker()
    worker.ask("client.lease(1)")
    tool.fence(2)  # also a worker whose lease is void, as in a recovery
    tool.inject("hang")
    until(worker.is_stopped)
    assert tool.status().lease.pid == worker.pid


@pytest.mark.parametrize("hung", [False, True], ids=["running", "hung"])
def test_a_lost_device_dies_with_its_worker_and_leaves_garbage(anchor: Running, hung: bool) -> None:
    controller, tool, worker = anchor.connect(), anchor.connect("tool"), anchor.worker()
    arena = anchor.keep(controller.create_arena("weights", 8 * P, 1))
    worker.ask("client.lease(1)")
    worker.ask("(memory := client.open_arena('weights', 1).map()).write(b'w' * 3 * 4096)")
    if hung:
        tool.inject("hang")
    used = arena.committed_bytes()
    tool.inject("lost")
    assert process.wait_gone(worker.pidfd, 0.0)  # before the anchor, hence before the garbage
    assert process.wait_gone(anchor.pidfd, DEADLINE_S)
    assert controller.is_gone()
    with pytest.raises(ChannelClosed, match="nobody listens"):
        anchor.connect()
    assert used == arena.committed_bytes() > 0
    assert os.pread(arena.fd, 8 * P, 0) == b"\xff" * used + bytes(8 * P - used)
    with started(anchor.runtime_dir) as again:
        assert again.connect().status().arenas == ()


def test_a_device_without_a_worker_can_be_lost(anchor: Running) -> None:
    tool = anchor.connect("tool")
    arena = anchor.keep(tool.create_arena("kv", P, 1))
    os.pwrite(arena.fd, b"x", 0)
    tool.inject("lost")
    assert os.pread(arena.fd, P, 0) == b"\xff" * P
    assert process.wait_gone(anchor.pidfd, DEADLINE_S)


def test_a_new_anchor_adopts_what_the_worker_still_holds(anchor: Running) -> None:
    worker = anchor.connect("worker")
    arena = anchor.keep(worker.create_arena("kv", 8 * P, 3))
    worker.commit("kv", [(0, 2 * P)], 3)
    with arena.map() as memory:
        memory[:9] = b"the state"
        anchor.end(signal.SIGKILL)
        assert worker.is_gone()
        with started(anchor.runtime_dir) as again:
            client = again.connect("worker")
            assert client.welcome.anchor_id != worker.welcome.anchor_id and client.welcome.epoch == 0
            client.fence(3)
            info = client.adopt_arena(arena, [(0, 2 * P)], 3)
            assert (info.accounted_bytes, info.committed_bytes) == (2 * P, P)
            client.adopt_arena(arena, arena.committed_ranges(), 3)
            memory[4:9] = b"lives"  # the mapping is still the same memory
            twin = again.keep(again.connect().open_arena("kv", 3))
            assert os.pread(twin.fd, 9, 0) == b"the lives"
            with pytest.raises(BudgetExceeded):
                client.adopt_arena(again.keep(MemfdArena.create("big", 2 * BUDGET)), [(0, 2 * BUDGET)], 3)
            assert [arena.name for arena in client.status().arenas] == ["kv"]


def test_a_stuck_anchor_is_a_timeout_and_its_late_answer_is_not_believed(anchor: Running) -> None:
    client = anchor.connect(timeout_s=0.05)
    process.kill(anchor.pidfd, signal.SIGSTOP)
    with pytest.raises(ChannelTimeout):
        client.status()
    process.kill(anchor.pidfd, signal.SIGCONT)
    with pytest.raises(ChannelClosed, match="this end closed"):
        client.get_manifest()


# -- clients that misbehave


def test_rubbish_is_answered_and_dropped_and_the_others_go_on(anchor: Running) -> None:
    other, channel = anchor.connect(), anchor.channel()
    os.write(channel.fileno(), b"GET / HTTP/1.1\r\n\r\n")
    failure = channel.recv(DEADLINE_S).message
    assert isinstance(failure, Failure) and failure.code == "protocol"
    with pytest.raises(ChannelClosed):
        channel.recv(DEADLINE_S)
    assert other.status().pid == anchor.pid


MISBEHAVIOURS = {
    "say Hello first": lambda channel, null: [channel.send(GetStatus())],
    "Hello came twice": lambda channel, null: [channel.send(Hello(role="tool")) for _ in range(2)],
    "came with 0 descriptors": lambda channel, null: [
        channel.send(Hello(role="tool")),
        channel.send(AdoptArena(name="a", reserved_bytes=1, ranges=(), epoch=0)),
    ],
    "came with 2 descriptors": lambda channel, null: [
        channel.send(Hello(role="tool")),
        channel.send(AdoptArena(name="a", reserved_bytes=1, ranges=(), epoch=0), fds=(null, null)),
    ],
    "none of ours": lambda channel, null: [channel.send({"type": "Hello", "role": "king"})],
}


@pytest.mark.parametrize("what", MISBEHAVIOURS)
def test_a_client_that_breaks_the_rules_is_told_and_dropped(anchor: Running, what: str) -> None:
    other, channel = anchor.connect(), anchor.channel()
    descriptors = len(os.listdir(f"/proc/{anchor.pid}/fd"))
    with open(os.devnull) as null:
        MISBEHAVIOURS[what](channel, null.fileno())
    messages = []
    with pytest.raises(ChannelClosed):
        while True:
            messages.append(channel.recv(DEADLINE_S).message)
    assert isinstance(messages[-1], Failure) and what in messages[-1].message
    assert other.status().pid == anchor.pid
    # That of the dropped client, which may or may not have been counted, is gone; nothing was added.
    assert len(os.listdir(f"/proc/{anchor.pid}/fd")) <= descriptors


def test_adopting_what_is_no_arena_is_refused_and_not_kept(anchor: Running) -> None:
    client = anchor.connect()
    descriptors = len(os.listdir(f"/proc/{anchor.pid}/fd"))
    with open(os.devnull) as null:
        fake = MemfdArena(name="fake", fd=null.fileno(), reserved_bytes=P)
        with pytest.raises(StateError, match="not an arena's"):
            client.adopt_arena(fake, [], 0)
    assert client.status().arenas == ()
    assert len(os.listdir(f"/proc/{anchor.pid}/fd")) == descriptors


def test_descriptors_with_a_request_that_wants_none_are_closed(anchor: Running) -> None:
    channel = anchor.channel()
    readable, writable = os.pipe()
    channel.send(Hello(role="tool"), fds=(readable,))
    os.close(readable)
    assert isinstance(channel.recv(DEADLINE_S).message, Welcome)
    with pytest.raises(BrokenPipeError):  # the anchor has closed its copy
        os.write(writable, b"x")
    os.close(writable)


def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(anchor: Running) -> None:
    other, channel = anchor.connect(), anchor.channel()
    large = msgspec.structs.replace(MANIFEST, shards={"mlp": tuple(range(1 << 17, 1 << 19))}).seal()
    other.put_manifest(large, 1)
    channel.send(Hello(role="tool"))
    with pytest.raises(ChannelClosed):
        while True:
            channel.send(GetManifest(), timeout_s=DEADLINE_S)
            assert other.status().pid == anchor.pid
    log = anchor_log(anchor.runtime_dir, DEVICE).read_text()
    assert re.search(rf"process {os.getpid()} \(tool\) left: the peer does not read", log)


def test_more_clients_than_it_takes_wait_their_turn(anchor: Running) -> None:
    channels = [anchor.channel() for _ in range(MAX_CLIENTS)]
    for channel in channels:
        channel.send(Hello(role="tool"))
        assert isinstance(channel.recv(DEADLINE_S).message, Welcome)
    late = anchor.channel()
    late.send(Hello(role="tool"))
    with pytest.raises(ChannelTimeout):
        late.recv(0.05)
    channels[0].close()
    assert isinstance(late.recv(DEADLINE_S).message, Welcome)


def test_clients_that_vanish_leave_nothing_in_the_anchor(anchor: Running) -> None:
    client = anchor.connect()
    anchor.keep(client.create_arena("kv", P, 1))
    descriptors = len(os.listdir(f"/proc/{anchor.pid}/fd"))
    for _ in range(5):
        worker = anchor.worker()
        worker.ask("client.lease(1)")
        worker.ask("(arena := client.open_arena('kv', 1))")
        process.kill(worker.pidfd, signal.SIGKILL)
        until(lambda: client.status().lease is None)
    assert len(os.listdir(f"/proc/{anchor.pid}/fd")) == descriptors


def test_the_wrong_answer_is_a_protocol_error(anchor: Running) -> None:
    client = anchor.connect()
    client._channel.send(GetStatus())  # a stray request: its answer comes first
    with pytest.raises(ProtocolError, match="answered Fence with AnchorStatus"):
        client.fence(1)
