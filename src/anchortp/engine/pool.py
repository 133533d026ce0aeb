"""[controller] The processes that can compute: a zygote that forks them, spares, and workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anchortp.engine import messages as m
from anchortp.engine.zygote import become_subreaper
from anchortp.errors import ChannelClosed, WireError
from anchortp.state.process import DeathNotice, get_out_of_the_way, how_it_ended, kill, open_pidfd, wait_gone
from anchortp.state.wire import Channel

# How long OpenMP's threads spin before they sleep: some 50 us, longer than the Python between two kernels. Where there
# is more to run than cores, a thread that spins keeps the core from the one it waits for: with the default a step of
# two threads then took 0.5 to 1.4 s, with counts near this one 0.1 to 0.2. Where there is not, threads that slept at
# once took 1.6 times as long as those that spin, and with this they are as fast.
SPIN_COUNT = "10000"

MAX_STILLBORN = 3  # spares in a row that died before they were ready; then no more are forked until somebody asks

Watch = Callable[[int, Callable[[], None]], None]


class WorkerProcess:
    """A forked process: spare while `device` is None.

    `pidfd` is readable once it has ended and holds nothing any more. It `is_dead` before that, but on GPUs.
    """

    def __init__(self, channel: Channel, notice: DeathNotice):
        self.channel = channel
        self.notice = notice
        self.pid = 0
        self.pidfd = -1
        self.device: str | None = None
        self.is_dead = False
        self.last_words = ""

    def started(self, pid: int) -> None:
        self.pid, self.pidfd = pid, open_pidfd(pid)

    def kill(self) -> None:
        """SIGKILL: also ends a process that is stopped."""
        if self.pidfd >= 0:
            kill(self.pidfd, signal.SIGKILL)

    def how_it_ended(self) -> str:
        how = how_it_ended(self.pid)
        return f"{how} ({self.last_words})" if self.last_words else how

    def reap(self) -> None:
        """Collects a process that has ended, and closes everything."""
        if self.pidfd >= 0:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            os.close(self.pidfd)
            self.pidfd = -1
        self.channel.close()
        self.notice.close()


class WorkerPool:
    """Keeps `num_spares` processes ready and hands them out in the order in which they were asked for.

    `watch(fd, callback)` and `unwatch(fd)` are the controller's selector; all callbacks run on its thread.
    `on_message(process, message)` gets what workers say, `on_end(process, how)` the end of one that had a
    device, when nothing of it writes to memory any more. A zygote that dies is replaced; no worker dies with it.
    `spare`: what all spares are to be; they are warm on its GPUs, any of which they may have to take over.
    """

    def __init__(
        self,
        *,
        runtime_dir: str,
        num_spares: int,
        spare: m.ForkSpare = m.ForkSpare(),
        watch: Watch,
        unwatch: Callable[[int], None],
        on_message: Callable[[WorkerProcess, Any], None],
        on_end: Callable[[WorkerProcess, str], None],
    ):
        self._runtime_dir = runtime_dir
        self._num_spares = num_spares
        self._spare = spare
        self._watch, self._unwatch = watch, unwatch
        self._on_message, self._on_end = on_message, on_end
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_channel: Channel | None = None
        self._zygote_ready = False
        self._groups: list[int] = []  # process groups, one per zygote: its forks are in it
        self._processes: set[WorkerProcess] = set()
        self._spares: deque[WorkerProcess] = deque()
        self._wanted: dict[str, Callable[[WorkerProcess], None]] = {}  # by device, in the order of asking
        self._num_stillborn = 0  # in a row
        self._stopping = False

    def start(self) -> None:
        """Starts the zygote; forks follow when it is ready."""
        become_subreaper()
        self._start_zygote()

    def take(self, device: str, use: Callable[[WorkerProcess], None]) -> None:
        """Calls `use` with a spare: now if there is one, else as soon as one is ready.

        Whoever asks again for the same device, before that, takes the place of the first.
        """
        if self._spares:
            self._wanted.pop(device, None)
            use(self._spares.popleft())
            return
        self._wanted[device] = use
        self.replenish()

    def forget(self, device: str) -> None:
        """The device needs no process any more."""
        self._wanted.pop(device, None)

    def replenish(self) -> None:
        """Forks spares up to the wanted number, and one for each device that waits."""
        if not self._zygote_ready or self._stopping:
            return
        coming = sum(1 for p in self._processes if p.device is None and not p.is_dead)
        self._collect_stillborn()
        for _ in range(self._num_spares + len(self._wanted) - coming):
            self._fork()

    @property
    def num_spares_ready(self) -> int:
        return len(self._spares)

    def stop(self, timeout_s: float) -> None:
        """Ends every process, kindly first; none is left when it returns."""
        self._stopping = True
        deadline_s = time.monotonic() + timeout_s
        for process in [p for p in self._processes if p.pid == 0]:
            self._await_pid(process, timeout_s)
        for process in list(self._processes):
            with contextlib.suppress(WireError):
                process.channel.send(m.Stop(), timeout_s=0.1)
        for process in list(self._processes):
            if process.pidfd < 0:
                continue
            if not wait_gone(process.pidfd, max(0.0, deadline_s - time.monotonic())):
                process.kill()
                wait_gone(process.pidfd, timeout_s)
        for process in list(self._processes):
            self._forget(process)
        if self._zygote is not None:
            self._drop_zygote_channel()
            try:
                self._zygote.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
        for group in self._groups:
            self._end_group(group)

    # ------------------------------------------------------------------------------------------- inside

    def _end_group(self, group: int) -> None:
        """Collects the forks of a zygote that died before it could tell us of them."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-group, os.WNOHANG)  # from here on a child of ours is in the group, so its id is not reused
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            while True:
                os.waitpid(-group, 0)

    def _await_pid(self, process: WorkerProcess, timeout_s: float) -> None:
        """A fork that is under way has to be known to be collected."""
        with contextlib.suppress(WireError):
            received = process.channel.recv(timeout_s)
            if isinstance(received.message, m.SpareReady):
                process.started(received.message.pid)

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, Path(self._runtime_dir, "workers.log").open("ab") as log:
            command = [sys.executable, "-m", "anchortp.engine.zygote"]
            command += ["--fd", str(theirs.fileno()), "--controller", str(os.getpid())]
            environment = {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ, "OMP_NUM_THREADS": "1"}
            self._zygote = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,
            )
        self._groups.append(self._zygote.pid)
        self._zygote_ready = False
        self._zygote_channel = Channel(ours, m.FromZygote)
        self._watch(self._zygote_channel.fileno(), self._read_zygote)

    def _read_zygote(self) -> None:
        assert self._zygote_channel is not None
        try:
            ready = self._zygote_channel.receive_ready()
        except WireError:
            self._replace_zygote()
            return
        if ready:
            self._zygote_ready = True
            self.replenish()

    def _replace_zygote(self) -> None:
        self._drop_zygote_channel()
        assert self._zygote is not None
        self._zygote.wait()
        if self._stopping:
            return
        # A fork that was asked for either has happened and still answers, or its socket ends and it is forgotten.
        self._start_zygote()

    def _drop_zygote_channel(self) -> None:
        if self._zygote_channel is not None:
            self._unwatch(self._zygote_channel.fileno())
            self._zygote_channel.close()
            self._zygote_channel = None

    def _collect_stillborn(self) -> None:
        """Forks that ended before they told their pid: no pidfd tells of them. Where one may yet tell it nobody is
        collected, and none of whom the pid is known: how it ended is read before that."""
        if self._num_stillborn == 0 or any(process.pid == 0 for process in self._processes):
            return
        assert self._zygote is not None
        known = {self._zygote.pid, *(process.pid for process in self._processes)}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_PGID, self._zygote.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in known:
                    return
                os.waitpid(ended.si_pid, 0)

    def _fork(self) -> None:
        assert self._zygote_channel is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        notice = DeathNotice()
        with theirs:
            try:
                self._zygote_channel.send(self._spare, fds=(theirs.fileno(), notice.fd))
            except WireError:
                ours.close()
                notice.close()
                return  # the zygote's end is read as an event, and it is replaced
        notice.sent()
        process = WorkerProcess(Channel(ours, m.FromWorker), notice)
        self._processes.add(process)
        self._watch(ours.fileno(), lambda: self._read(process))

    def _read(self, process: WorkerProcess) -> None:
        try:
            ready = process.channel.receive_ready()
        except ChannelClosed:
            self._unwatch(process.channel.fileno())
            if process.pid == 0:
                self._forget(process)
                self._num_stillborn += 1
                # What killed it may well kill the next, and the next: that would go on as fast as this machine forks.
                if self._num_stillborn < MAX_STILLBORN:
                    self.replenish()
            return  # its end comes through the pidfd, with its status
        except WireError as error:
            process.last_words = str(error)
            self._unwatch(process.channel.fileno())
            process.kill()
            return
        for received in ready:
            if isinstance(received.message, m.SpareReady):
                self._spare_ready(process, received.message.pid)
            elif isinstance(received.message, m.WorkerFailed):
                process.last_words = received.message.reason
            elif process in self._processes:
                self._on_message(process, received.message)

    def _spare_ready(self, process: WorkerProcess, pid: int) -> None:
        self._num_stillborn = 0
        process.started(pid)
        self._watch(process.pidfd, lambda: self._ended(process))
        if not self._spare.gpus:  # a GPU runs what a dead process has queued until its descriptors are closed
            self._watch(process.notice.watch(pid), lambda: self._died(process))
        if self._wanted:
            self._wanted.pop(next(iter(self._wanted)))(process)
        else:
            self._spares.append(process)

    def _died(self, process: WorkerProcess) -> None:
        """It computes no more. The kernel may still take its memory down, for which nobody waits."""
        if process.notice.event_fd >= 0:
            self._unwatch(process.notice.event_fd)
        if process.is_dead:
            return
        process.is_dead = True
        get_out_of_the_way(process.pid)
        if process.channel.fileno() >= 0:
            self._read_last_words(process)
            self._unwatch(process.channel.fileno())
        with contextlib.suppress(ValueError):
            self._spares.remove(process)
        if process.device is not None:
            self._on_end(process, process.how_it_ended())
        self.replenish()

    def _ended(self, process: WorkerProcess) -> None:
        self._died(process)  # unless that was heard before
        self._forget(process)

    def _read_last_words(self, process: WorkerProcess) -> None:
        with contextlib.suppress(WireError):
            for received in process.channel.receive_ready():
                if isinstance(received.message, m.WorkerFailed):
                    process.last_words = received.message.reason

    def _forget(self, process: WorkerProcess) -> None:
        self._processes.discard(process)
        with contextlib.suppress(ValueError):
            self._spares.remove(process)
        for fd in (process.channel.fileno(), process.pidfd, process.notice.event_fd):
            if fd >= 0:
                self._unwatch(fd)
        process.reap()
