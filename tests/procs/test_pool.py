"""The pool of workers against a zygote whose forks do not live."""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from anchortp.engine import messages as m
from anchortp.engine.pool import MAX_STILLBORN, WorkerPool, WorkerProcess
from anchortp.state.process import DeathNotice
from anchortp.state.wire import Channel


class _Zygote:
    """Stands in for the process. Each fork that it is asked for ends before it can say a word."""

    def __init__(self, num_spares: int, group: int):
        self.selector = selectors.DefaultSelector()
        self.pool = WorkerPool(
            runtime_dir="",
            num_spares=num_spares,
            watch=lambda fd, read: self.selector.register(fd, selectors.EVENT_READ, read),
            unwatch=self._unwatch,
            on_message=lambda process, message: pytest.fail(str(message)),
            on_end=lambda process, how: pytest.fail(how),
        )
        ours, theirs = socket.socketpair()
        self.channel = Channel(theirs, m.ToZygote)
        self.pool._zygote = SimpleNamespace(pid=group)
        self.pool._zygote_channel = Channel(ours, m.FromZygote)
        self.pool._zygote_ready = True

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(fd)

    def forks(self, limit: int = 20) -> int:
        """Answers every order, and those that follow from the answers; returns how many came."""
        num_orders = 0
        while (orders := self.channel.receive_ready()) and num_orders < limit:
            num_orders += len(orders)
            for order in orders:
                self.end_one()
                order.close_fds()
            for key, _ in self.selector.select(0):
                key.data()
        return num_orders

    def end_one(self) -> None:
        pass

    def close(self) -> None:
        self.channel.close()
        self.pool._zygote_channel.close()
        for process in self.pool._processes:
            process.reap()
        self.selector.close()


class _ForkingZygote(_Zygote):
    """Its forks are processes, in the group of the first."""

    def __init__(self, num_spares: int, group: int):
        super().__init__(num_spares, group)
        self.group = group
        self.ended: list[int] = []

    def end_one(self) -> None:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, self.group)
            os._exit(1)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self.ended.append(pid)


@pytest.fixture
def group() -> Iterator[int]:
    """A child that lives, first of a process group; nothing else is left when the test ends."""
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.setpgid(pid, pid)
    os.close(reader)
    yield pid
    os.close(writer)
    os.waitpid(pid, 0)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("num_spares", [1, 2, 4])
def test_spares_that_die_before_they_are_ready_are_not_forked_for_ever(group, num_spares):
    zygote = _Zygote(num_spares, group)
    with contextlib.closing(zygote):
        zygote.pool.replenish()
        assert num_spares <= zygote.forks() <= num_spares + MAX_STILLBORN
        zygote.pool.replenish()  # whoever asks again has another try
        assert zygote.forks() == num_spares
        zygote.pool.take("cpu:0", pytest.fail)
        assert zygote.forks() == num_spares + 1


def test_spares_that_died_before_they_were_ready_are_collected(group):
    zygote = _ForkingZygote(1, group)
    with contextlib.closing(zygote):
        zygote.pool.replenish()
        assert zygote.forks() == MAX_STILLBORN
        first = list(zygote.ended)
        zygote.pool.replenish()
        for pid in first:
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        zygote.forks()
        zygote.pool._collect_stillborn()
        assert os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def test_one_whose_end_is_still_to_be_heard_is_not_collected(group):
    """How it ended is read from what is left of it."""
    zygote = _ForkingZygote(1, group)
    with contextlib.closing(zygote):
        zygote.end_one()
        ours, theirs = socket.socketpair()
        theirs.close()
        known = WorkerProcess(Channel(ours, m.FromWorker), DeathNotice())
        known.started(zygote.ended[0])
        zygote.pool._processes.add(known)
        zygote.pool._num_stillborn = 1
        zygote.pool._collect_stillborn()
        assert known.how_it_ended() == "exited with status 1"
