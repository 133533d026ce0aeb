"""The shared memory of one epoch: who arrived, who began a step, the abort flag, and slots for data.

Free of torch: the controller creates a region per epoch, passes its descriptor to the workers (SCM_RIGHTS),
watches their progress in it, and raises the abort flag when the epoch is over.

Layout of the file, in cache lines of 64 bytes, words of 8:

| line | content |
|---|---|
| 0 | magic, version, epoch, size, slot_bytes |
| 1 | abort flag, length of the reason in bytes |
| 2-7 | the reason, UTF-8 |
| 8 + rank | arrivals, step, tag of the last even and the last odd arrival: written by that rank alone |
| next page on | `slot[parity][rank]`, `slot_bytes` each |

Kernels take part in collectives of their own (`native/group.h`), by the same words.

**What this assumes of the machine.** A flag is stored after the data it announces, by another Python
bytecode, so no compiler can reorder the two, and x86's total store order shows them to every other core in
that order; a load of the flag followed by loads of the data is kept in order as well. A word is 8 aligned
bytes, which `memoryview` reads and writes with one instruction. (Where the C library copies with non-temporal
stores, it fences them itself.) Machines with a weaker order would need fences that Python cannot express;
there `Rendezvous` refuses to work.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import time
from collections.abc import Callable
from typing import NoReturn

from ..errors import ConfigError, GroupAborted, GroupTimeout, ProtocolError, StaleEpoch

_MAGIC = int.from_bytes(b"ANCHTPSH", "little")
_VERSION = 1
_LINE_BYTES = 64
_LINE_WORDS = 8
_MAGIC_WORD, _VERSION_WORD, _EPOCH_WORD, _SIZE_WORD, _SLOT_WORD = range(5)
_ABORT_WORD, _REASON_LEN_WORD = 8, 9
_REASON_AT, _REASON_BYTES = 2 * _LINE_BYTES, 6 * _LINE_BYTES
_RANK_LINE = 8
_ARRIVED, _STEP, _TAG = 0, 1, 2  # words of a rank's line; the tag has one word per parity

# How a rank waits; measured with 4 ranks on 2 cores, with and without other busy processes there. Yielding is
# the fastest way (a sum of 16 x 576 takes 0.05 ms) as long as the core goes to a peer. A busy process outside
# of the group keeps a core that is given to it for its slice of some ms (the same sum: 3 ms), while a sleeper
# is woken in between (0.1 ms). So a rank whose yield was that expensive sleeps instead, for a while.
# A yield this long met a stranger, whose slice is 3 ms. In a decode step a peer keeps the core for 1.5 ms at most (its
# part of lm_head): with 1 ms here ranks that share a core took each other for strangers; four on two cores lost 9 %.
_LOST_S = 2.5e-3
_AVOID_YIELD_S = 0.1
_NAP_S = 20e-6  # the kernel's timer slack adds 50
_LONG_WAIT_S = 2e-3  # from then on (for a peer's prefill, say) do not eat a core
_LONG_NAP_S = 100e-6

_TOTAL_STORE_ORDER = ("x86_64", "amd64", "i686", "i386")


class ShmRegion:
    """One epoch's control block. `create` [controller], `attach` [worker]; each closes what it opened.

    Attributes: `epoch`; `size`, the number of ranks; `slot_bytes`, the room of one rank for one collective (a
    multiple of 64; tensors larger than that are sent in pieces); `fd`, the descriptor to pass on (-1 unless
    created here); `buffer`, the mapping. Pages are committed as they are touched.
    """

    def __init__(self, mapping: mmap.mmap, *, fd: int):
        self.buffer = mapping
        self.fd = fd
        self.words = memoryview(mapping).cast("q")
        self.epoch = self.words[_EPOCH_WORD]
        self.size = self.words[_SIZE_WORD]
        self.slot_bytes = self.words[_SLOT_WORD]

    @classmethod
    def create(cls, epoch: int, size: int, slot_bytes: int) -> ShmRegion:
        """A fresh region, nobody arrived. `slot_bytes` is rounded up to whole cache lines."""
        assert epoch >= 0 and size >= 1 and slot_bytes >= 1, (epoch, size, slot_bytes)
        slot_bytes = _round_up(slot_bytes, _LINE_BYTES)
        num_bytes = _total_bytes(size, slot_bytes)
        fd = os.memfd_create(f"anchortp-comm-{epoch}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            # A peer that shrank the file would kill the others with SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            mapping = mmap.mmap(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
        with memoryview(mapping).cast("q") as words:
            words[:5] = memoryview(_words(_MAGIC, _VERSION, epoch, size, slot_bytes)).cast("q")
        return cls(mapping, fd=fd)

    @classmethod
    def attach(cls, fd: int, *, epoch: int) -> ShmRegion:
        """Maps the region behind `fd`, which stays the caller's to close.

        Raises ProtocolError when `fd` is no region of ours, StaleEpoch when it is one of another epoch.
        """
        num_bytes = os.fstat(fd).st_size
        if num_bytes < _slots_at(1) or num_bytes % _LINE_BYTES:
            raise ProtocolError(f"descriptor {fd} holds {num_bytes} bytes, no collective region; pass ShmRegion.fd")
        region = cls(mmap.mmap(fd, num_bytes), fd=-1)
        try:
            region._validate(num_bytes, epoch)
        except BaseException:
            region.close()
            raise
        return region

    def _validate(self, num_bytes: int, epoch: int) -> None:
        magic, version = self.words[_MAGIC_WORD], self.words[_VERSION_WORD]
        if (magic, version) != (_MAGIC, _VERSION):
            raise ProtocolError(
                f"not a collective region of version {_VERSION} (magic {magic:#x}, version {version}); "
                "run controller and workers from one release and pass ShmRegion.fd"
            )
        if self.size < 1 or num_bytes != _total_bytes(self.size, self.slot_bytes):
            raise ProtocolError(
                f"a collective region of {self.size} ranks with slots of {self.slot_bytes} bytes cannot have "
                f"{num_bytes} bytes; create it again"
            )
        if self.epoch != epoch:
            raise StaleEpoch(epoch=min(epoch, self.epoch), current=max(epoch, self.epoch))

    # What the controller does with it.

    def abort(self, reason: str = "") -> None:
        """Dissolves the group: every rank that waits in a collective, or enters one, raises `GroupAborted`.

        Any process may call it; the first reason stands (its first 384 bytes).
        """
        if self.words[_ABORT_WORD]:
            return
        text = reason.encode()[:_REASON_BYTES]
        self.buffer[_REASON_AT : _REASON_AT + len(text)] = text
        self.words[_REASON_LEN_WORD] = len(text)
        self.words[_ABORT_WORD] = 1

    @property
    def aborted(self) -> bool:
        return self.words[_ABORT_WORD] != 0

    def progress(self) -> list[int]:
        """Arrivals per rank. In a stuck group, the ranks with the fewest are those the others wait for."""
        return [self.words[_rank_word(rank) + _ARRIVED] for rank in range(self.size)]

    def steps(self) -> list[int]:
        """The step that each rank marked last: tells a rank that never began from one that hangs in it."""
        return [self.words[_rank_word(rank) + _STEP] for rank in range(self.size)]

    # What the workers do with it.

    def mark(self, rank: int, step: int) -> None:
        """[worker] Says that `rank` begins `step`; called as the step's message is read."""
        assert 0 <= rank < self.size, (rank, self.size)
        self.words[_rank_word(rank) + _STEP] = step

    def check(self) -> None:
        """Raises GroupAborted, with the reason, when the abort flag is up."""
        if self.words[_ABORT_WORD]:
            text = self.buffer[_REASON_AT : _REASON_AT + self.words[_REASON_LEN_WORD]]
            raise GroupAborted(self.epoch, text.decode(errors="ignore"))

    def slot_at(self, parity: int, rank: int) -> int:
        """Offset in bytes of a slot in `buffer`."""
        return _slots_at(self.size) + (parity * self.size + rank) * self.slot_bytes

    def close(self) -> None:
        """Lets go of the mapping and of `fd`. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.buffer is not None:
            self.words.release()
            # Not `mmap.close()`: it does not know of the tensors that still look at these pages. The mapping
            # goes when the last of them does: now, unless a group is open or a gathered view is kept.
            self.buffer = None


class Rendezvous:
    """One rank's side of the flags: counts its collectives, announces them, waits for its peers.

    A collective is `begin`, write the slot of the returned parity, `arrive`, `wait`, read the peers' slots.

    **Why two slots and one flag are enough.** Collective `n` uses the slots of parity `n % 2`, so a rank
    writes a slot again in `n + 2`. `begin` of `n + 2` returns only when every peer has arrived at `n + 1`,
    and a rank that arrives at `n + 1` has finished reading what it wanted of `n`. So no slot is written while
    a peer still reads it, and nobody has to announce that it has finished reading. Mostly `wait` of `n + 1`
    has done that waiting already; who left without it (a gather to another rank) does it in `begin`.
    """

    def __init__(self, region: ShmRegion, rank: int, timeout_s: float):
        assert 0 <= rank < region.size and timeout_s > 0, (rank, region.size, timeout_s)
        assert region.words[_rank_word(rank)] == 0, f"rank {rank} joined epoch {region.epoch} before; raise the epoch"
        if platform.machine().lower() not in _TOTAL_STORE_ORDER:
            raise ConfigError(
                f"no shared-memory collectives on {platform.machine()}: its stores are unordered; use x86"
            )
        self._region = region
        self._rank = rank
        self._timeout_s = timeout_s
        self._words = region.words
        self._own = _rank_word(rank)
        self._peers = tuple(_rank_word(peer) for peer in range(region.size) if peer != rank)
        self._avoid_yield_until_s = 0.0

    @property
    def _arrived(self) -> int:
        """How many collectives this rank has been in, those of a kernel (`native/group.h`) included."""
        return self._words[self._own]

    def begin(self) -> int:
        """The parity of the next collective; its slot may be written from now on."""
        if self._words[_ABORT_WORD]:
            self._region.check()
        self._wait_for_arrivals()
        return (self._arrived + 1) & 1

    def arrive(self, tag: int) -> None:
        """Announces what was written since `begin`. `tag` says which collective this is, of what size."""
        arrived = self._arrived + 1
        self._words[self._own + _TAG + (arrived & 1)] = tag
        self._words[self._own] = arrived

    def wait(self, tag: int) -> None:
        """Returns when every rank has arrived, and with the same tag."""
        self._wait_for_arrivals()
        tag_word = _TAG + (self._arrived & 1)
        for peer in self._peers:
            assert self._words[peer + tag_word] == tag, self.describe_mismatch()

    def exchange(self, word: int) -> list[int]:
        """A collective of its own: every rank brings a word of 8 bytes -> all of them, by rank."""
        self.begin()
        self.arrive(word)
        self._wait_for_arrivals()
        tag_word = _TAG + (self._arrived & 1)
        return [self._words[_rank_word(rank) + tag_word] for rank in range(self._region.size)]

    def _wait_for_arrivals(self) -> None:
        words, goal = self._words, self._arrived
        for peer in self._peers:
            if words[peer] < goal:
                self.poll(lambda word=peer: words[word] >= goal)

    def poll(self, ready: Callable[[], bool]) -> None:
        """Gives the core away until `ready()`; leaves with GroupAborted or GroupTimeout.

        There may be more ranks than cores, so the peer that is waited for may need this very core.
        """
        start_s = time.monotonic()
        while not ready():
            if self._words[_ABORT_WORD]:
                self._region.check()
            now_s = time.monotonic()
            if now_s - start_s > self._timeout_s:
                self.time_out()
            if now_s - start_s > _LONG_WAIT_S:
                time.sleep(_LONG_NAP_S)
            elif now_s < self._avoid_yield_until_s:
                time.sleep(_NAP_S)
            else:
                self._yield_core(now_s)

    def time_out(self) -> NoReturn:
        raise GroupTimeout(self._region.epoch, self._missing(), self._timeout_s)

    def _yield_core(self, now_s: float) -> None:
        os.sched_yield()
        back_s = time.monotonic()
        if back_s - now_s > _LOST_S:
            self._avoid_yield_until_s = back_s + _AVOID_YIELD_S

    def _missing(self) -> tuple[int, ...]:
        return tuple(rank for rank, count in enumerate(self._region.progress()) if count < self._arrived)

    def describe_mismatch(self) -> str:
        tags = [self._words[_rank_word(r) + _TAG + (self._arrived & 1)] for r in range(self._region.size)]
        return f"different collectives at arrival {self._arrived} of rank {self._rank}; tags by rank: {tags}"


def _rank_word(rank: int) -> int:
    return (_RANK_LINE + rank) * _LINE_WORDS


def _slots_at(size: int) -> int:
    return _round_up((_RANK_LINE + size) * _LINE_BYTES, mmap.PAGESIZE)


def _total_bytes(size: int, slot_bytes: int) -> int:
    return _slots_at(size) + 2 * size * slot_bytes


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)
