"""Hearing of a death before the kernel has taken the dead process's memory down."""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anchortp.engine import messages as m
from anchortp.engine.pool import WorkerPool, WorkerProcess
from anchortp.state.process import (
    DeathNotice,
    get_out_of_the_way,
    hold_until_death,
    how_it_ended,
    is_dead,
    open_pidfd,
)
from anchortp.state.wire import Channel

DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


def readable(fd: int, timeout_s: float = DEADLINE_S) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(int(1000 * timeout_s)))


def forked(notice: DeathNotice, live: Callable[[], None]) -> int:
    """A process that holds the notice and then lives; it has taken the mutex when this returns."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            hold_until_death(notice.fd)
            os.write(writer, b"x")
            live()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    notice.sent()
    return pid


def wait_for_a_signal() -> None:
    while True:
        signal.pause()


def with_threads() -> None:
    for _ in range(4):
        threading.Thread(target=spin, daemon=True).start()
    spin()


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("live", [wait_for_a_signal, with_threads])
def test_a_kill_is_heard(live):
    notice = DeathNotice()
    pid = forked(notice, live)
    fd = notice.watch(pid)
    assert not readable(fd, 0.05) and not is_dead(pid)
    os.kill(pid, signal.SIGKILL)
    assert readable(fd)
    assert is_dead(pid) and how_it_ended(pid) == "killed by SIGKILL"
    os.waitpid(pid, 0)
    notice.close()


def test_an_exit_is_heard():
    notice = DeathNotice()
    pid = forked(notice, lambda: os._exit(7))
    assert readable(notice.watch(pid))
    assert how_it_ended(pid) == "exited with status 7"
    os.waitpid(pid, 0)
    notice.close()


def test_a_stopped_process_is_not_dead():
    notice = DeathNotice()
    pid = forked(notice, wait_for_a_signal)
    fd = notice.watch(pid)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert not readable(fd, 0.05) and not is_dead(pid)
    os.kill(pid, signal.SIGKILL)
    assert readable(fd)
    os.waitpid(pid, 0)
    notice.close()


def test_it_is_heard_before_the_memory_is_gone():
    """What the notice is for. This process may itself be late to look, so it may look again at another one's end."""
    assert any(first_heard_of_one_with_much_memory() == ["notice"] for _ in range(10))


def first_heard_of_one_with_much_memory() -> list[str]:
    memory = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memory, 256 << 20)
    notice = DeathNotice()

    def live() -> None:
        mapping = mmap.mmap(memory, 256 << 20)
        for start in range(0, len(mapping), 1 << 20):
            mapping[start : start + (1 << 20)] = b"x" * (1 << 20)
        os.kill(os.getpid(), signal.SIGSTOP)

    pid = forked(notice, live)
    os.close(memory)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    pidfd, fd = open_pidfd(pid), notice.watch(pid)
    ready = select.poll()
    ready.register(pidfd, select.POLLIN)
    ready.register(fd, select.POLLIN)
    os.kill(pid, signal.SIGKILL)
    first = [{fd: "notice", pidfd: "pidfd"}[found] for found, _ in ready.poll(int(1000 * DEADLINE_S))]
    assert readable(pidfd)
    os.waitpid(pid, 0)
    os.close(pidfd)
    notice.close()
    return first


def test_one_that_died_before_it_was_watched_is_heard_at_once():
    notice = DeathNotice()
    pid = forked(notice, lambda: os._exit(0))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert readable(notice.watch(pid))
    assert how_it_ended(pid) == "exited with status 0"
    os.waitpid(pid, 0)
    notice.close()


def test_one_that_was_never_started_leaves_nothing():
    DeathNotice().close()


def test_who_was_collected_is_dead_and_has_ended():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert is_dead(pid) and how_it_ended(pid) == "ended"


@pytest.mark.parametrize("gpus", [(), (0,)])
def test_a_worker_on_gpus_is_gone_when_its_descriptors_are_and_no_sooner(gpus):
    """What it has queued there runs until then, so its early notice is no fence."""
    watched: dict[int, Callable[[], None]] = {}
    ends: list[tuple[str | None, str]] = []
    pool = WorkerPool(
        runtime_dir="/nowhere",
        num_spares=0,
        spare=m.ForkSpare(gpus=gpus),
        watch=watched.__setitem__,
        unwatch=lambda fd: watched.pop(fd, None),
        on_message=lambda process, message: None,
        on_end=lambda process, how: ends.append((process.device, how)),
    )
    notice = DeathNotice()
    pid = forked(notice, wait_for_a_signal)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    process = WorkerProcess(Channel(ours, m.FromWorker), notice)
    watched[ours.fileno()] = lambda: None
    pool._processes.add(process)
    pool._spare_ready(process, pid)
    pool.take("cuda:0", lambda spare: setattr(spare, "device", "cuda:0"))
    early = set(watched) - {process.pidfd, ours.fileno()}
    assert len(early) == (0 if gpus else 1)

    os.kill(pid, signal.SIGKILL)
    assert all(map(readable, early))
    for fd in early:
        watched[fd]()
    assert ends == ([] if gpus else [("cuda:0", "killed by SIGKILL")])
    assert readable(process.pidfd)
    watched[process.pidfd]()
    assert ends == [("cuda:0", "killed by SIGKILL")] and watched == {}
    theirs.close()


EXITING, RUNNING = 0x40040C, 0x400400


def fake_proc(root: Path, first: int, others: dict[int, int | None]) -> str:
    """A /proc with process 7, its threads' flags as given; None: listed, but gone when one looks."""
    for thread, flags in ({7: first} | others).items():
        folder = root / "7" / "task" / str(thread)
        folder.mkdir(parents=True)
        if flags is not None:
            fields = ["Z", "1", "7", "7", "0", "-1", str(flags), *["0"] * 43]
            (folder / "stat").write_text(f"{thread} (a name (with) 9) {' '.join(fields)}\n")
    (root / "7" / "stat").write_text((root / "7" / "task" / "7" / "stat").read_text())
    return str(root)


@pytest.mark.parametrize(
    ("first", "others", "dead"),
    [
        (EXITING, {}, True),
        (EXITING, {8: EXITING, 9: EXITING}, True),  # one of them still takes the memory down
        (EXITING, {8: None}, True),
        (EXITING, {8: EXITING, 9: RUNNING}, False),
        (RUNNING, {8: EXITING}, False),
    ],
)
def test_a_process_is_dead_when_each_of_its_threads_is(tmp_path, first, others, dead):
    assert is_dead(7, fake_proc(tmp_path, first, others)) == dead


def test_every_thread_gets_out_of_the_way():
    """Which of them takes the memory down is a race."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            threading.Thread(target=wait_for_a_signal, daemon=True).start()
            os.write(writer, b"x")
            wait_for_a_signal()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"x"
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        before = os.getpriority(os.PRIO_PROCESS, 0)
        get_out_of_the_way(pid)
        assert len(threads) == 2 and os.getpriority(os.PRIO_PROCESS, 0) == before
        assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads] == [10, 10]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
