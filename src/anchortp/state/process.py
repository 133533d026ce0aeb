"""Handles on processes, and hearing of their ends.

A pidfd, unlike a pid, cannot come to mean another process; but it becomes readable only when the kernel has released
the dead process's memory and descriptors. Measured: 50 ms for each GB that was mapped, 200 where nobody else held it;
with a GPU's driver it can be seconds. Where only threads write to memory, a recovery need not wait for that: before it
takes anything down, the kernel lets go of the robust futexes of the process's threads and wakes who waits for them,
0.2 ms after the signal. So every worker holds a robust mutex as long as it lives (`hold_until_death`), and the
controller waits for it (`DeathNotice`). A GPU goes on with what a dead process has queued there, kernels and copies,
until the driver has closed the process's descriptors: there the pidfd decides.

Sources: pidfd_open(2), get_robust_list(2), pthread_mutexattr_setrobust(3), proc_pid_stat(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import select
import signal
import threading
import time
from pathlib import Path

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat
_PROCESS_SHARED = _ROBUST = 1
_LOW_PRIORITY = 10  # a tenth of what others get, lest its memory be held for long
_POLL_S = 0.0002
_JOIN_TIMEOUT_S = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


def open_pidfd(pid: int) -> int:
    """A descriptor for the process, close-on-exec; readable once the process is dead (a zombie included).

    Raises ProcessLookupError when there is no such process.
    """
    return os.pidfd_open(pid)


def wait_gone(pidfd: int, timeout_s: float) -> bool:
    """True as soon as the process is dead, its memory and descriptors released; False after `timeout_s`."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(math.ceil(timeout_s * 1000)))


def wait_dead(pid: int, timeout_s: float) -> bool:
    """True as soon as the process is dead, even if the kernel still holds its memory; False after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not is_dead(pid):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def is_dead(pid: int, proc: str = "/proc") -> bool:
    """Whether no thread of the process will run its code again.

    Its threads may still be listed: one of them takes the memory down, and is there until that is done.
    """
    # The first thread first: once it dies of a signal no thread can start another, so the list is complete.
    if not _is_exiting(f"{proc}/{pid}"):
        return False
    return all(_is_exiting(f"{proc}/{pid}/task/{thread}") for thread in _threads(pid, proc))


def _is_exiting(folder: str) -> bool:
    """Of a thread, which never comes back from that; one that has vanished has exited."""
    try:
        return bool(int(_stat(folder)[6]) & _PF_EXITING)
    except (FileNotFoundError, ProcessLookupError):
        return True


def _threads(pid: int, proc: str = "/proc") -> list[str]:
    try:
        return os.listdir(f"{proc}/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []


def how_it_ended(pid: int) -> str:
    """In words, of a dead process that nobody has collected yet."""
    try:
        code = os.waitstatus_to_exitcode(int(_stat(f"/proc/{pid}")[49]))
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _stat(folder: str) -> list[str]:
    """The fields of /proc/PID/stat from the third on: before it comes a name that may have spaces."""
    return Path(folder, "stat").read_text().rpartition(")")[2].split()


def get_out_of_the_way(pid: int) -> None:
    """What the process still does, or the kernel for it, yields to others; 0 is the caller. A process that has died
    with gigabytes mapped keeps a core busy for some 100 ms, just when a recovery needs it: any one of its threads, the
    last to let go of the memory."""
    for thread in _threads(pid or os.getpid()):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread), _LOW_PRIORITY)


def kill(pidfd: int, sig: signal.Signals) -> bool:
    """Sends a signal. False when the process is gone already."""
    try:
        signal.pidfd_send_signal(pidfd, sig)
    except ProcessLookupError:
        return False
    return True


class DeathNotice:
    """[controller] Tells of the death of one process, which is started with `fd` and calls `hold_until_death`."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("anchortp-notice", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        attributes = ctypes.create_string_buffer(64)  # more than a pthread_mutexattr_t takes anywhere
        _check(_libc.pthread_mutexattr_init(attributes))
        _check(_libc.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED))
        _check(_libc.pthread_mutexattr_setrobust(attributes, _ROBUST))
        with _mutex(self._memory) as mutex:
            _check(_libc.pthread_mutex_init(mutex, attributes))
        self.event_fd = -1  # readable when the process is dead; there is one once it is watched
        self._thread: threading.Thread | None = None

    def sent(self) -> None:
        """The process has its duplicate of `fd`."""
        os.close(self.fd)
        self.fd = -1

    def watch(self, pid: int) -> int:
        """A descriptor that becomes readable when the process is dead. Called when it has taken the mutex."""
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._wait, args=(pid,), name=f"death-{pid}", daemon=True)
        self._thread.start()
        return self.event_fd

    def _wait(self, pid: int) -> None:
        with _mutex(self._memory) as mutex:
            _libc.pthread_mutex_lock(mutex)
            _libc.pthread_mutex_unlock(mutex)
        # The thread that held it is dead; others die of the same signal, within microseconds.
        wait_dead(pid, math.inf)
        os.eventfd_write(self.event_fd, 1)

    def close(self) -> None:
        """Only when the process has ended, or was never started."""
        if self.fd >= 0:
            self.sent()
        if self._thread is not None:
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():  # a process that overwrote its own list of locks; the pidfd has told instead
                return
            os.close(self.event_fd)
            self._thread, self.event_fd = None, -1
        self._memory.close()


def hold_until_death(fd: int) -> None:
    """[worker, its main thread] Takes the mutex behind the `fd` of a `DeathNotice`, and never gives it back."""
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    _held.append(memory)
    with _mutex(memory) as mutex:
        _check(_libc.pthread_mutex_lock(mutex))


_held: list[mmap.mmap] = []  # the mutex must stay mapped


@contextlib.contextmanager
def _mutex(memory: mmap.mmap):
    view = ctypes.c_char.from_buffer(memory)
    try:
        yield ctypes.byref(view)
    finally:
        del view  # `memory` could not be closed


def _check(code: int) -> None:
    if code:
        raise OSError(code, f"{errno.errorcode.get(code, code)} from a robust mutex")
