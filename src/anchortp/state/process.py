"""Handles on processes (pidfds): unlike a pid, they cannot come to mean another process. pidfd_open(2)."""

from __future__ import annotations

import math
import os
import select
import signal


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


def kill(pidfd: int, sig: signal.Signals) -> bool:
    """Sends a signal. False when the process is gone already."""
    try:
        signal.pidfd_send_signal(pidfd, sig)
    except ProcessLookupError:
        return False
    return True
