"""All-reduce latency of the groups of one epoch: `python -m bench.allreduce --ranks 4 --shape 16x576`.

Each rank is a process with one compute thread. Rank 0's time per call is reported; calls follow each other
with nothing between them, so a call contains the wait for the slowest rank of the one before. `kernels` is what
workers on CPUs use, `shm` the same by torch's operations. `barrier` carries no data: it is the floor, what a
rendezvous of this many ranks on these cores costs. `gloo-native` is gloo's own all-reduce, which sums in another
order than the groups promise.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from anchortp.comm import GlooGroup, Group, ShmGroup, ShmRegion
from anchortp.comm.shm import TWO_PHASE_FROM
from anchortp.config import cache_folder
from anchortp.native import Library, build_kernels

_TIMEOUT_S = 60.0
_WARMUP_S = 0.3  # a rank remembers for a while how it waited when the others were still starting


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    backend: str
    num_ranks: int
    shape: tuple[int, ...]
    dtype: str
    num_iters: int
    two_phase_from: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    name: str
    median_ms: float
    p99_ms: float


def _open_group(case: Case, region: ShmRegion, rank: int, store_path: str) -> Group:
    if case.backend in ("shm", "kernels"):
        path = cache_folder() / "kernels"
        library = Library(str(build_kernels(path)), case.dtype) if case.backend == "kernels" else None
        return ShmGroup(region, rank, _TIMEOUT_S, two_phase_from=case.two_phase_from, library=library)
    return GlooGroup(region, rank, _TIMEOUT_S, store_path=store_path)


def _operation(case: Case, group: Group) -> Callable[[Tensor], object]:
    if case.name == "barrier":
        return lambda _: group.barrier()
    if case.name == "gloo-native":
        return lambda x: group._process_group.allreduce([x]).wait()
    return group.all_reduce


def _rank_main(case: Case, region: ShmRegion, rank: int, store_path: str, results: Connection) -> None:
    group = _open_group(case, region, rank, store_path)
    run = _operation(case, group)
    x = torch.zeros(case.shape, dtype=getattr(torch, case.dtype))
    _warm_up(group, run, x)
    times_s = []
    for _ in range(case.num_iters):
        start_s = time.perf_counter()
        run(x)
        times_s.append(time.perf_counter() - start_s)
    group.barrier()
    group.close()
    if rank == 0:
        results.send(times_s)


def _warm_up(group: Group, run: Callable[[Tensor], object], x: Tensor) -> None:
    """Runs until `_WARMUP_S` have passed on some rank; every rank decides the same."""
    start_s = time.monotonic()
    while not group.all_reduce(torch.tensor([float(time.monotonic() - start_s > _WARMUP_S)])).item():
        for _ in range(10):
            run(x)


def measure(case: Case) -> Timing:
    """Runs one case in processes of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    region = ShmRegion.create(1, case.num_ranks, math.prod(case.shape) * torch.float32.itemsize)
    with tempfile.TemporaryDirectory() as folder:
        args = (os.path.join(folder, "store"), sender)
        ranks = [context.Process(target=_rank_main, args=(case, region, r, *args)) for r in range(case.num_ranks)]
        for process in ranks:
            process.start()
        sender.close()
        try:
            times_s = sorted(receiver.recv())
        finally:
            region.abort("the benchmark ended")
            for process in ranks:
                process.join()
            region.close()
    p99_s = times_s[int(0.99 * (len(times_s) - 1))]
    return Timing(name=case.name, median_ms=statistics.median(times_s) * 1e3, p99_ms=p99_s * 1e3)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All-reduce latency, shared memory against gloo.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--shape", default="16x576", help="ROWSxCOLS")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--only", nargs="*", help="names of cases")
    return parser.parse_args()


def _cases(args: argparse.Namespace) -> list[Case]:
    never = sys.maxsize
    variants = [
        ("barrier", "shm", never),
        ("shm", "shm", TWO_PHASE_FROM),
        ("shm-one-phase", "shm", never),
        ("shm-two-phase", "shm", 0),
        ("kernels", "kernels", TWO_PHASE_FROM),
        ("kernels-one-phase", "kernels", never),
        ("kernels-two-phase", "kernels", 0),
        ("gloo", "gloo", never),
        ("gloo-native", "gloo", never),
    ]
    return [
        Case(
            name=name,
            backend=backend,
            num_ranks=args.ranks,
            shape=tuple(map(int, args.shape.split("x"))),
            dtype=args.dtype,
            num_iters=args.iters,
            two_phase_from=two_phase_from,
        )
        for name, backend, two_phase_from in variants
        if not args.only or name in args.only
    ]


def main() -> None:
    args = _parse_args()
    torch.set_num_threads(1)
    print(f"all-reduce {args.shape} {args.dtype}, {args.ranks} ranks on {len(os.sched_getaffinity(0))} cores")
    print(f"{'case':<16}{'median ms':>12}{'p99 ms':>12}")
    timings = []
    for case in _cases(args):
        timings.append(measure(case))
        print(f"{timings[-1].name:<16}{timings[-1].median_ms:>12.3f}{timings[-1].p99_ms:>12.3f}", flush=True)
    print(json.dumps({"bench": "allreduce", **vars(args), "timings": [asdict(t) for t in timings]}))


if __name__ == "__main__":
    main()
