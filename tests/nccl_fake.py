"""torch's NCCL interface, for ranks that are threads of one process, with the rules that matter to `comm.nccl`:

- A communicator is made by the first collective, in which every rank waits for all others, deaf to everything but its
  own timeout; meanwhile it is locked, and who aborts it waits for that too.
- A collective ends when every rank is in it. One whose communicator was aborted raises.

Sources: torch 2.13, `torch/_C/_distributed_c10d.pyi`, `NCCLUtils.cpp` (`getNcclComm`, `waitReady`, `abort`).
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist


class FakeNccl:
    """What `comm.nccl` takes for `torch.distributed`. `made`: all process groups, in the order of their making."""

    DistError = dist.DistError

    def __init__(self, *, forming_timeout_s: float = 5.0):
        self.forming_timeout_s = forming_timeout_s
        self.made: list[Any] = []
        self._cliques: dict[str, _Clique] = {}
        self._lock = threading.Lock()
        library = self

        class ProcessGroupNCCL(_ProcessGroup):
            Options = _Options

            def __init__(self, store: Any, rank: int, size: int, options: Any):
                assert options.config.blocking == 0, "a communicator that blocks cannot be left"
                super().__init__(library, rank, library.clique(store.key, size))

        self.ProcessGroupNCCL = ProcessGroupNCCL

    def clique(self, key: str, size: int) -> _Clique:
        with self._lock:
            clique = self._cliques.setdefault(key, _Clique(size))
        assert clique.size == size, "ranks do not agree on the size"
        return clique

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

    def __init__(self, size: int):
        self.size = size
        self.present: set[int] = set()
        self.rounds: dict[int, dict[int, Any]] = {}
        self.lock = threading.Lock()


class _ProcessGroup:
    def __init__(self, library: FakeNccl, rank: int, clique: _Clique):
        self._library, self._rank, self._clique = library, rank, clique
        self._is_ready, self._num_rounds = False, 0
        self._lock = threading.Lock()
        self.is_aborted = False
        library.made.append(self)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._clique.size

    def allgather(self, outs: list[list[Any]], ins: list[Any]) -> _Work:
        with self._lock:
            if self.is_aborted:
                raise dist.DistBackendError("NCCL communicator was aborted")
            if not self._is_ready:
                self._clique.present.add(self._rank)
                self.wait_for(lambda: len(self._clique.present) == self._clique.size)
                self._is_ready = True
        self._num_rounds += 1
        with self._clique.lock:
            brought = self._clique.rounds.setdefault(self._num_rounds, {})
            brought[self._rank] = ins[0].clone()
        return _Work(self, brought, outs[0])

    def wait_for(self, ready: Any) -> None:
        end_s = time.monotonic() + self._library.forming_timeout_s
        while not ready():
            if time.monotonic() > end_s:
                raise dist.DistBackendError("NCCL timeout in waitReady")
            time.sleep(0.001)

    def abort(self) -> None:
        with self._lock:
            self.is_aborted = True


class _Work:
    def __init__(self, group: _ProcessGroup, brought: dict[int, Any], outs: list[Any]):
        self._group, self._brought, self._outs = group, brought, outs

    def is_completed(self) -> bool:
        if self._group.is_aborted:
            raise dist.DistBackendError("NCCL communicator was aborted")
        return len(self._brought) == self._group.size()

    def wait(self) -> None:
        assert self.is_completed()
        for rank, out in enumerate(self._outs):
            out.copy_(self._brought[rank])
