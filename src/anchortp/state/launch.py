"""Where an anchor is found, and how one is started. Runs in the process that wants an anchor."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from pathlib import Path

import msgspec

import anchortp
from anchortp.devices import parse_device
from anchortp.errors import AnchorTPError, ChannelTimeout, StateError
from anchortp.state import process
from anchortp.state.messages import Failure, Ready, error_of
from anchortp.state.wire import private_directory

_READY_FD = 3  # in the anchor


def anchor_socket(runtime_dir: str | os.PathLike[str], device: str) -> Path:
    """The socket of a device's anchor: `anchor-cpu-0.sock` for `cpu:0`. ConfigError for no device."""
    return _anchor_path(runtime_dir, device, "sock")


def anchor_log(runtime_dir: str | os.PathLike[str], device: str) -> Path:
    """Where an anchor that `start_anchor` started writes what it does."""
    return _anchor_path(runtime_dir, device, "log")


def start_anchor(
    *, device: str, budget_bytes: int, runtime_dir: str | os.PathLike[str], timeout_s: float = 10.0
) -> int:
    """Starts an anchor that outlives this process, in a session of its own; returns its pid once it listens.

    It is no child of ours that we would have to reap. Raises AnchorRunning if the device has one already,
    ConfigError for a directory that will not do, StateError if it ends without a word (its log says why), and
    ChannelTimeout.
    """
    log_path = anchor_log(private_directory(runtime_dir), device)
    deadline_s = time.monotonic() + timeout_s
    ready_fd, child_ready_fd = os.pipe()
    try:
        child = _spawn(device, budget_bytes, log_path, child_ready_fd)
        os.close(child_ready_fd)
        child_ready_fd = -1
        try:
            line = _read_line(ready_fd, deadline_s)
        finally:
            _reap(child, deadline_s)
    finally:
        os.close(ready_fd)
        if child_ready_fd >= 0:
            os.close(child_ready_fd)
    return _pid_of(line, device, log_path, timeout_s)


def _anchor_path(runtime_dir: str | os.PathLike[str], device: str, suffix: str) -> Path:
    return Path(os.path.abspath(runtime_dir)) / f"anchor-{parse_device(device).file_name}.{suffix}"


def _spawn(device: str, budget_bytes: int, log_path: Path, ready_fd: int) -> int:
    """The pid of the short-lived process that forks the anchor and ends."""
    command = [sys.executable, "-m", "anchortp.state.anchor", "--detach", "--device", device]
    command += [
        "--budget-bytes",
        str(budget_bytes),
        "--runtime-dir",
        str(log_path.parent),
        "--ready-fd",
        str(_READY_FD),
    ]
    return os.posix_spawn(
        sys.executable,
        command,
        _environment(),
        file_actions=[
            (os.POSIX_SPAWN_DUP2, ready_fd, _READY_FD),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=(),
    )


def _environment() -> dict[str, str]:
    """Ours, and the package where it is found when it runs from a source tree."""
    environment = dict(os.environ)
    root = Path(anchortp.__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
    return environment


def _read_line(fd: int, deadline_s: float) -> bytes | None:
    """What is written until a newline or the end; None at the deadline."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0, math.ceil((deadline_s - time.monotonic()) * 1000))):
            return None
        if not (chunk := os.read(fd, 4096)):
            break
        line += chunk
    return line


def _reap(child: int, deadline_s: float) -> None:
    """Waits for the short-lived process; one that hangs is killed with all of its session."""
    pidfd = process.open_pidfd(child)
    try:
        if not process.wait_gone(pidfd, max(0.0, deadline_s - time.monotonic())):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finally:
        os.close(pidfd)


def _pid_of(line: bytes | None, device: str, log_path: Path, timeout_s: float) -> int:
    if line is None:
        raise ChannelTimeout(f"the anchor of {device} was not ready within {timeout_s} s; see {log_path}")
    try:
        answer = msgspec.json.decode(line, type=Ready | Failure)
    except msgspec.DecodeError:
        raise StateError(f"the anchor of {device} ended before it was ready; see {log_path}") from None
    if isinstance(answer, Failure):
        error: AnchorTPError = error_of(answer)
        raise error
    return answer.pid
