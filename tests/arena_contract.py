"""What every kind of arena promises, whatever its memory: for `cpu`, `sim` and, on a GPU, `cuda` devices.

Subclass `ArenaContract` with a `device`. Each test has an anchor as a process, and workers as processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anchortp.devices import parse_device
from anchortp.errors import BudgetExceeded, StateError
from anchortp.state import process
from anchortp.state.client import AnchorClient
from anchortp.state.launch import anchor_log, start_anchor

DEADLINE_S = 60.0
BUDGET_PAGES = 200  # more chunks than one message has descriptors for

WORKER = """
import ctypes, os, sys
from anchortp.arena import MemfdArena
from anchortp.devices import parse_device
from anchortp.state.client import AnchorClient
runtime_dir, device = sys.argv[1:3]
IS_GPU = parse_device(device).kind == "cuda"
if IS_GPU:
    import torch
    from anchortp.transfer.tensors import tensor_of
client = AnchorClient.connect(runtime_dir, device, "worker", 60)
arenas, views = {}, {}

def attach(name, epoch):
    arenas[name] = client.open_arena(name, epoch)
    client.refresh(arenas[name], epoch)

def view(name):
    if name not in views:
        arena = arenas[name]
        views[name] = arena.map() if isinstance(arena, MemfdArena) else tensor_of(arena) if IS_GPU else arena.address
    return views[name]

def put(name, at, data):
    memory = view(name)
    if IS_GPU:
        memory[at : at + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(memory.device)
    elif isinstance(memory, int):
        ctypes.memmove(memory + at, data, len(data))
    else:
        memory[at : at + len(data)] = data

def get(name, at, size):
    memory = view(name)
    if IS_GPU:
        return bytes(memory[at : at + size].cpu().numpy())
    return ctypes.string_at(memory + at, size) if isinstance(memory, int) else memory[at : at + size]

def verdict(work):
    from anchortp.engine.device_errors import verdict_of
    try:
        return work()
    except Exception as error:
        return verdict_of(error, attaching=False)

def hand_over(epoch, name, ranges):
    global client
    client.close()
    client = AnchorClient.connect(runtime_dir, device, "worker", 60)
    client.lease(epoch)
    return client.adopt_arena(arenas[name], ranges, epoch).accounted_bytes

print("ready", flush=True)
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Worker:
    """A process that attaches arenas and reads and writes what it is told."""

    def __init__(self, runtime_dir: Path, device: str):
        self._child = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(runtime_dir), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pidfd = process.open_pidfd(self._child.pid)
        assert self._child.stdout.readline() == "ready\n"

    def ask(self, expression: str) -> str:
        self._child.stdin.write(expression + "\n")
        self._child.stdin.flush()
        return self._child.stdout.readline().rstrip("\n")

    def do(self, expression: str) -> None:
        answer = self.ask(expression)
        assert answer == "None", f"{expression} -> {answer}"

    def kill(self) -> None:
        process.kill(self.pidfd, signal.SIGKILL)
        assert process.wait_gone(self.pidfd, DEADLINE_S)

    def close(self) -> None:
        self.kill()
        os.close(self.pidfd)
        with self._child:
            pass


class World:
    """One device: its anchor, and the processes and connections that a test makes."""

    def __init__(self, runtime_dir: Path, device: str):
        self.runtime_dir, self.device = runtime_dir, device
        self.page = parse_device(device).page_bytes
        self._closing = contextlib.ExitStack()
        self._anchor = -1
        self.start_anchor()

    def start_anchor(self) -> None:
        pid = start_anchor(
            device=self.device,
            budget_bytes=BUDGET_PAGES * self.page,
            runtime_dir=self.runtime_dir,
            timeout_s=DEADLINE_S,
        )
        self._anchor, self._anchor_pid = process.open_pidfd(pid), pid

    def anchor_fds(self) -> int:
        return len(os.listdir(f"/proc/{self._anchor_pid}/fd"))

    def log(self) -> str:
        return anchor_log(self.runtime_dir, self.device).read_text()

    def crash_anchor(self) -> None:
        process.kill(self._anchor, signal.SIGKILL)
        assert process.wait_gone(self._anchor, DEADLINE_S)
        os.close(self._anchor)
        self._anchor = -1

    def wait_anchor_gone(self) -> None:
        assert process.wait_gone(self._anchor, DEADLINE_S)

    def client(self, role: str = "controller") -> AnchorClient:
        return self._closing.enter_context(
            AnchorClient.connect(self.runtime_dir, self.device, role, timeout_s=DEADLINE_S)
        )

    def client_of(self, device: str) -> AnchorClient:
        """Of another device's anchor, which ends with the test."""
        client = AnchorClient.connect(self.runtime_dir, device, "controller", timeout_s=DEADLINE_S)
        self._closing.callback(client.close)
        self._closing.callback(client.shutdown)
        return client

    def worker(self) -> Worker:
        worker = Worker(self.runtime_dir, self.device)
        self._closing.callback(worker.close)
        return worker

    def close(self) -> None:
        self._closing.close()
        if self._anchor >= 0:
            process.kill(self._anchor, signal.SIGTERM)
            assert process.wait_gone(self._anchor, DEADLINE_S)
            os.close(self._anchor)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        os.sched_yield()


class ArenaContract:
    device: str

    @pytest.fixture
    def world(self) -> Iterator[World]:
        fds = sorted(os.listdir("/proc/self/fd"))
        runtime_dir = Path(tempfile.mkdtemp(prefix="atp-"))
        try:
            world = World(runtime_dir, self.device)
            try:
                yield world
            finally:
                world.close()
            assert "bug" not in world.log() and "Traceback" not in world.log(), world.log()
            assert sorted(os.listdir("/proc/self/fd")) == fds
            assert "anchortp:" not in Path("/proc/self/maps").read_text()
        finally:
            shutil.rmtree(runtime_dir)

    def test_two_workers_see_the_same_bytes_and_the_controller_maps_nothing(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("weights", 1 << 30, 1).close()
        client.commit("weights", [(0, 3 * page), (100 * page, 100 * page + 1)], 1)
        first, second = world.worker(), world.worker()
        for worker in (first, second):
            worker.do("attach('weights', 1)")
        first.do(f"put('weights', {3 * page - 4}, b'last')")
        first.do(f"put('weights', {100 * page}, b'far')")
        first.do(f"put('weights', {page - 2}, b'edge')")  # on both sides of a page's end
        assert second.ask(f"get('weights', {3 * page - 4}, 4)") == "b'last'"
        assert second.ask(f"get('weights', {100 * page}, 3)") == "b'far'"
        assert second.ask(f"get('weights', {page - 2}, 4)") == "b'edge'"

    def test_what_is_committed_later_appears_where_it_belongs(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", 1 << 30, 1).close()
        client.commit("kv", [(5 * page, 6 * page)], 1)
        worker, other = world.worker(), world.worker()
        worker.do("attach('kv', 1)")
        worker.do(f"put('kv', {5 * page}, b'kept')")
        client.commit("kv", [(0, 150 * page)], 1)
        worker.do("client.refresh(arenas['kv'], 1)")
        worker.do(f"put('kv', {149 * page}, b'more')")
        other.do("attach('kv', 1)")
        assert other.ask(f"get('kv', {5 * page}, 4)") == "b'kept'"
        assert other.ask(f"get('kv', {149 * page}, 4)") == "b'more'"

    def test_a_killed_worker_takes_nothing_with_it(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("weights", 8 * page, 1).close()
        client.commit("weights", [(0, 8 * page)], 1)
        worker = world.worker()
        worker.do("client.lease(1)")
        worker.do("attach('weights', 1)")
        worker.do(f"put('weights', 0, b'state' * {page // 5})")
        worker.kill()
        until(lambda: client.status().lease is None)
        assert client.status().committed_bytes == 8 * page
        spare = world.worker()
        spare.do("client.lease(1)")
        spare.do("attach('weights', 1)")
        assert spare.ask(f"get('weights', 0, {page // 5 * 5}) == b'state' * {page // 5}") == "True"

    def test_the_budget_counts_whole_pages_and_refuses_with_the_numbers(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("weights", 1 << 40, 1).close()
        assert client.commit("weights", [(1, 2)], 1) == page
        assert client.commit("weights", [(page - 1, page + 1), (0, page)], 1) == 2 * page
        with pytest.raises(BudgetExceeded) as caught:
            client.commit("weights", [(0, (BUDGET_PAGES + 1) * page)], 1)
        error = caught.value
        assert (error.device, error.committed_bytes) == (self.device, 2 * page)
        assert (error.requested_bytes, error.budget_bytes) == ((BUDGET_PAGES - 1) * page, BUDGET_PAGES * page)
        assert client.status().committed_bytes == 2 * page
        assert client.commit("weights", [(0, BUDGET_PAGES * page)], 1) == BUDGET_PAGES * page

    def test_decommitting_makes_room_and_spares_the_neighbours(self, world: World) -> None:
        client, page = world.client(), world.page
        for name in ("weights", "kv"):
            client.create_arena(name, 1 << 30, 1).close()
        client.commit("kv", [(0, BUDGET_PAGES * page)], 1)
        worker = world.worker()
        worker.do("attach('kv', 1)")
        for at in (0, 1, 99, 101):
            worker.do(f"put('kv', {at * page}, b'page {at}')")
        assert client.decommit("kv", [(page + 1, 99 * page + 1)], 2) == (BUDGET_PAGES - 97) * page
        assert client.commit("weights", [(0, 97 * page)], 2) == BUDGET_PAGES * page
        worker.do("client.refresh(arenas['kv'], 2)")
        worker.do("attach('weights', 2)")
        worker.do(f"put('weights', 0, b'w' * {97 * page})")
        for at in (0, 1, 99, 101):
            assert worker.ask(f"get('kv', {at * page}, {len(f'page {at}')})") == repr(f"page {at}".encode())
        assert client.decommit("weights", [(0, page)], 2) == (BUDGET_PAGES - 1) * page
        client.commit("kv", [(50 * page, 51 * page)], 2)
        worker.do("client.refresh(arenas['kv'], 2)")
        worker.do("client.refresh(arenas['weights'], 2)")
        worker.do(f"put('kv', {50 * page}, b'again')")
        assert worker.ask(f"get('weights', {page}, 3)") == "b'www'"

    def test_dropping_an_arena_frees_its_name_and_its_budget(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", 1 << 30, 1).close()
        client.commit("kv", [(0, BUDGET_PAGES * page)], 1)
        assert client.drop_arena("kv", 1) == 0
        client.create_arena("kv", 1 << 20, 1).close()
        assert client.commit("kv", [(0, page)], 1) == page

    def test_growing_keeps_bytes_and_offsets(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", page, 1).close()
        client.commit("kv", [(0, page)], 1)
        worker = world.worker()
        worker.do("attach('kv', 1)")
        worker.do("put('kv', 0, b'kept')")
        assert client.grow_arena("kv", 4 * page, 1).reserved_bytes == 4 * page
        client.commit("kv", [(3 * page, 4 * page)], 1)
        other = world.worker()
        other.do("attach('kv', 1)")
        other.do(f"put('kv', {4 * page - 3}, b'end')")
        assert other.ask("get('kv', 0, 4)") == "b'kept'"
        with pytest.raises(StateError, match="cannot shrink"):
            client.grow_arena("kv", page, 1)

    def test_a_new_anchor_adopts_what_a_worker_holds(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", 1 << 30, 3).close()
        client.commit("kv", [(0, 120 * page)], 3)
        worker = world.worker()
        worker.do("client.lease(3)")
        worker.do("attach('kv', 3)")
        worker.do("put('kv', 0, b'the state')")
        worker.do(f"put('kv', {119 * page}, b'lives')")
        client.commit("kv", [(120 * page, 121 * page)], 3)  # the worker has not heard of this one
        world.crash_anchor()
        worker.do("put('kv', 4, b'bytes')")
        world.start_anchor()
        ranges = [(0, 121 * page)]
        assert worker.ask(f"hand_over(3, 'kv', {ranges})") == str(121 * page)
        again = world.client()
        assert again.status().committed_bytes == 121 * page
        again.commit("kv", [(130 * page, 131 * page)], 3)
        worker.do("client.refresh(arenas['kv'], 3)")
        worker.do(f"put('kv', {130 * page}, b'new')")
        worker.do(f"put('kv', {120 * page}, b'empty before')")
        worker.kill()
        spare = world.worker()
        spare.do("attach('kv', 3)")
        assert spare.ask("get('kv', 0, 9)") == "b'the bytes'"
        assert spare.ask(f"get('kv', {119 * page}, 5)") == "b'lives'"
        assert spare.ask(f"get('kv', {130 * page}, 3)") == "b'new'"

    def test_a_lost_device_leaves_garbage_under_who_still_maps_it(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("weights", 4 * page, 1).close()
        client.commit("weights", [(0, 2 * page)], 1)
        worker, bystander = world.worker(), world.worker()
        worker.do("client.lease(1)")
        for process_ in (worker, bystander):
            process_.do("attach('weights', 1)")
        worker.do(f"put('weights', 0, b'w' * {2 * page})")
        world.client("tool").inject("lost")
        assert process.wait_gone(worker.pidfd, DEADLINE_S)
        world.wait_anchor_gone()
        assert bystander.ask(f"get('weights', 0, {2 * page}) == b'\\xff' * {2 * page}") == "True"
