"""The zygote: one process that has imported torch and forks workers in milliseconds.

`import torch` takes longer than a whole recovery may. It is paid once, here; a worker, spare or not, is a fork
that shares those pages. The zygote computes with one thread and starts none, so forking it is safe.

Workers are forked twice, so that they become children of the controller (which is their subreaper) and not of
the zygote: the zygote may die without them, and they die with the controller (PR_SET_PDEATHSIG), however it
ends. Runs as `python -m anchortp.engine.zygote --fd N --controller PID`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import socket
import sys
from functools import partial

from anchortp.state.process import hold_until_death

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """[controller] Orphans among this process's descendants become its children."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when `parent_pid`, its parent, ends; exits at once if that has happened."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--controller", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.controller)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle

    import torch

    torch.set_num_threads(1)

    from anchortp.engine import messages, worker
    from anchortp.errors import ChannelClosed
    from anchortp.state.wire import Channel

    worker.warm_up()
    # What is imported stays for ever: without this, a worker's collector walks all of it at some point, and every
    # page it touches is copied, since it is shared with the zygote. That took 0.15 s, in the middle of a recovery.
    gc.collect()
    gc.freeze()
    channel = Channel(socket.socket(fileno=options.fd), messages.ToZygote)
    channel.send(messages.ZygoteReady(pid=os.getpid()))
    while True:
        try:
            received = channel.recv(timeout_s=_FOREVER_S)
        except ChannelClosed:
            return
        if isinstance(received.message, messages.Stop):
            return
        fd, notice_fd = received.fds
        child = os.fork()
        if child == 0:
            serve = partial(worker.worker_main, order=received.message)
            _become_worker(channel.fileno(), fd, notice_fd, options.controller, serve)
        os.close(fd)
        os.close(notice_fd)
        os.waitpid(child, 0)


def _become_worker(zygote_fd: int, fd: int, notice_fd: int, controller_pid: int, serve) -> None:
    """In the first child: fork once more, so that the worker is orphaned to the controller."""
    if os.fork() != 0:
        os._exit(0)
    status = 1
    try:
        os.close(zygote_fd)
        while os.getppid() != controller_pid:
            if os.getppid() == 1:
                os._exit(1)  # the controller is gone
            os.sched_yield()
        die_with_parent(controller_pid)
        hold_until_death(notice_fd)
        serve(socket.socket(fileno=fd))
        status = 0
    finally:
        # Not sys.exit: what the zygote had registered to run at its exit is not this process's to run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_FOREVER_S = 1e6  # an idle zygote waits for work; it ends with the controller

if __name__ == "__main__":
    main()
