"""Channels between two processes: a peer that dies, and memory that crosses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from anchortp.arena import PAGE_BYTES, MemfdArena
from anchortp.errors import ChannelClosed
from anchortp.state import process
from anchortp.state.wire import Channel

DEADLINE_S = 20.0

PEER = """
import os, socket, sys
import msgspec
from anchortp.arena import MemfdArena
from anchortp.state.wire import Channel

class Say(msgspec.Struct, frozen=True, tag=True):
    text: str

with Channel(socket.socket(fileno=int(sys.argv[1])), Say) as channel:
    while True:
        received = channel.recv(20)
        match received.message.text:
            case "write":
                with MemfdArena.from_fd("shared", received.fds[0]) as arena, arena.map() as memory:
                    memory[:5] = b"peer!"
                channel.send(Say("written"))
            case "die with half a message":
                os.write(channel.fileno(), b"ATPw")
                os._exit(1)
            case text:
                channel.send(Say(text), received.fds)
                received.close_fds()
"""


class Say(msgspec.Struct, frozen=True, tag=True):
    text: str


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def peer() -> Iterator[tuple[Channel, subprocess.Popen]]:
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen([sys.executable, "-c", PEER, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    with Channel(ours, Say) as channel, child:
        yield channel, child
        channel.close()
        child.kill()


def test_messages_of_all_sizes_come_back(peer) -> None:
    channel, _ = peer
    for size in (0, 1, 1000, 1 << 20, 8 << 20):
        channel.send(Say("x" * size), timeout_s=DEADLINE_S)
        assert len(channel.recv(DEADLINE_S).message.text) == size


def test_both_processes_see_the_same_bytes(peer) -> None:
    channel, _ = peer
    with MemfdArena.create("shared", PAGE_BYTES) as arena, arena.map() as memory:
        channel.send(Say("write"), fds=(arena.fd,))
        assert channel.recv(DEADLINE_S).message.text == "written"
        assert memory[:5] == b"peer!"


def test_a_descriptor_that_went_there_and_back_is_the_same_memory(peer) -> None:
    channel, _ = peer
    with MemfdArena.create("shared", PAGE_BYTES) as arena:
        channel.send(Say("echo"), fds=(arena.fd, arena.fd))
        received = channel.recv(DEADLINE_S)
        assert len(received.fds) == 2
        assert all(os.path.samestat(os.fstat(fd), os.fstat(arena.fd)) for fd in received.fds)
        received.close_fds()


def test_a_peer_that_dies_in_the_middle_of_a_message(peer) -> None:
    channel, _ = peer
    channel.send(Say("die with half a message"))
    with pytest.raises(ChannelClosed, match="middle of a message"):
        channel.recv(DEADLINE_S)


def test_a_killed_peer_is_seen_at_once(peer) -> None:
    channel, child = peer
    channel.send(Say("up?"))
    assert channel.recv(DEADLINE_S).message.text == "up?"
    pidfd = process.open_pidfd(child.pid)
    assert not process.wait_gone(pidfd, 0.0)
    assert process.kill(pidfd, signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        channel.recv(DEADLINE_S)
    assert process.wait_gone(pidfd, DEADLINE_S)
    child.wait(DEADLINE_S)
    assert not process.kill(pidfd, signal.SIGKILL)
    os.close(pidfd)
