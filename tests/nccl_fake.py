"""torch's NCCL interface, for ranks that are threads of one process, with the rules that matter to `comm.nccl`:

- A communicator is made by the first collective, in which every rank waits for all others, deaf to everything but its
  own timeout; meanwhile it is locked, and who aborts it waits for that too.
- A collective ends when every rank is in it. One whose communicator was aborted raises.
- Every rank that stays, and no other, shrinks a communicator, with the same list, and waits there for the others that
  do. It is not shrunk when it was aborted, or, without the flag for it, while a collective is under way.

Sources: torch 2.13, `torch/_C/_distributed_c10d.pyi` and `distributed_c10d.py` (`shrink_group`), `NCCLUtils.cpp`
(`getNcclComm`, `waitReady`, `shrink`, `abort`), `nccl.h`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist


class FakeNccl:
    """What `comm.nccl` takes for `torch.distributed`. `made`: all process groups, in the order of their making."""

    DistError = dist.DistError

    def __init__(self, *, forming_timeout_s: float = 5.0):
        self.forming_timeout_s = forming_timeout_s
        self.can_shrink = True
        self.failing: set[int] = set()  # ranks of the parent for which a shrink fails at once
        self.failing_late: set[int] = set()  # and those whose first collective afterwards fails for them alone
        self.on_collective: Callable[[], None] = lambda: None  # called as each begins
        self.num_initialised = 0
        self.made: list[Any] = []
        self._cliques: dict[str, _Clique] = {}
        self._lock = threading.Lock()
        self._joined = threading.Condition()
        library = self

        class ProcessGroupNCCL(_ProcessGroup):
            Options = _Options

            def __init__(self, store: Any, rank: int, size: int, options: Any):
                assert options.config.blocking == 0, "a communicator that blocks cannot be left"
                super().__init__(library, rank, library.clique(store.key, size))
                library.num_initialised += 1

        self.ProcessGroupNCCL = ProcessGroupNCCL

    def clique(self, key: str, size: int) -> _Clique:
        with self._lock:
            clique = self._cliques.setdefault(key, _Clique(size, key))
        assert clique.size == size, "ranks do not agree on the size"
        return clique

    def join(self, clique: _Clique, rank: int) -> None:
        """Returns when every rank of the clique has called this; raises as the library does if one stays away."""
        with self._joined:
            clique.present.add(rank)
            self._joined.notify_all()
            if not self._joined.wait_for(lambda: len(clique.present) == clique.size, self.forming_timeout_s):
                raise dist.DistBackendError("NCCL timeout in waitReady")

    def is_nccl_available(self) -> bool:
        return True

    def FileStore(self, path: str, size: int) -> Any:
        return SimpleNamespace(key=path, set_timeout=lambda timeout: None)

    def PrefixStore(self, prefix: str, store: Any) -> Any:
        return SimpleNamespace(key=f"{store.key}/{prefix}")


class _Options:
    def __init__(self) -> None:
        self.config = SimpleNamespace(blocking=1)
        self._timeout = None


class _Clique:
    """The ranks of one communicator, and what they brought to each of its collectives."""

    def __init__(self, size: int, key: str):
        self.size, self.key = size, key
        self.present: set[int] = set()
        self.rounds: dict[int, dict[int, Any]] = {}
        self.lock = threading.Lock()


class _ProcessGroup:
    def __init__(self, library: FakeNccl, rank: int, clique: _Clique):
        self._library, self._rank, self._clique = library, rank, clique
        self._is_ready, self._num_rounds = False, 0
        self._lock = threading.Lock()
        self.is_aborted = False
        self.num_under_way, self.fails = 0, False
        library.made.append(self)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._clique.size

    def allgather(self, outs: list[list[Any]], ins: list[Any]) -> _Work:
        self._library.on_collective()
        with self._lock:
            if self.is_aborted:
                raise dist.DistBackendError("NCCL communicator was aborted")
            if not self._is_ready:
                self._library.join(self._clique, self._rank)
                self._is_ready = True
        self._num_rounds += 1
        self.num_under_way += 1
        with self._clique.lock:
            brought = self._clique.rounds.setdefault(self._num_rounds, {})
            brought[self._rank] = ins[0].clone()
        return _Work(self, brought, outs[0])

    @property
    def supports_shrinking(self) -> bool:
        return self._library.can_shrink

    def shrink(self, ranks_to_exclude: list[int], shrink_flags: int = 0, opts_override: Any = None) -> _ProcessGroup:
        gone = sorted(set(ranks_to_exclude))
        assert gone == list(ranks_to_exclude) and gone and set(gone) <= set(range(self.size()))
        assert self._rank not in gone, "a rank that goes does not call it"
        if not self._library.can_shrink or self._rank in self._library.failing:
            raise RuntimeError("ncclCommShrink failed\nand this is where")
        with self._lock:
            if self.is_aborted:
                raise dist.DistBackendError("NCCL communicator was aborted")
            if self.num_under_way and not shrink_flags & 1:
                raise dist.DistBackendError("ncclInvalidUsage")
            clique = self._library.clique(f"{self._clique.key} without {gone}", self.size() - len(gone))
            rank = self._rank - sum(other < self._rank for other in gone)
            self._library.join(clique, rank)
        child = _ProcessGroup(self._library, rank, clique)
        child._is_ready = True
        child.fails = self._rank in self._library.failing_late
        return child

    def abort(self) -> None:
        with self._lock:
            self.is_aborted = True


class _Work:
    def __init__(self, group: _ProcessGroup, brought: dict[int, Any], outs: list[Any]):
        self._group, self._brought, self._outs = group, brought, outs
        self._is_done = False

    def is_completed(self) -> bool:
        if self._group.is_aborted or self._group.fails:
            raise dist.DistBackendError("NCCL communicator was aborted")
        done = len(self._brought) == self._group.size()
        if done and not self._is_done:
            self._is_done = True
            self._group.num_under_way -= 1
        return done

    def wait(self) -> None:
        assert self.is_completed()
        for rank, out in enumerate(self._outs):
            out.copy_(self._brought[rank])
