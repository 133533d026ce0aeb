"""The contract of `Group`, held by every kind of group, with every rank a process."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anchortp.comm import GlooGroup, Group, PeerGroup, ShmGroup, ShmRegion, StagedGroup
from anchortp.config import cache_folder
from anchortp.errors import GroupError
from anchortp.native import Library, build_kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

EPOCH = 5
DEADLINE_S = 30.0
SLOT_BYTES = 4096
TWO_PHASE_FROM = 512  # floats: half of a slot, so that small tensors reach all the paths
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("shm", "kernels", "gloo", "peer", "staged")


# --- ranks as processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank's program returned, or the group error that it left with, and when (monotonic)."""

    value: object = None
    error: str = ""
    message: str = ""
    missing: tuple[int, ...] = ()
    at_s: float = 0.0


def _outcome(program: Callable, *args: object) -> Outcome:
    try:
        return Outcome(value=program(*args), at_s=time.monotonic())
    except (GroupError, AssertionError) as error:
        return Outcome(
            error=type(error).__name__,
            message=str(error),
            missing=getattr(error, "missing", ()),
            at_s=time.monotonic(),
        )


class _SlowQueue:
    """A device that is behind: it has got to a mark when it was asked a few times. Nothing is announced before."""

    def __init__(self, region: ShmRegion, rank: int):
        self._region, self._rank = region, rank
        self._num_marks = 0

    def mark(self) -> Callable[[], bool]:
        arrived = self._region.progress()[self._rank]
        self._num_marks += 1
        waits = self._num_marks % 3

        def reached() -> bool:
            nonlocal waits
            assert self._region.progress()[self._rank] == arrived, "announced before the device was there"
            waits -= 1
            return waits < 0

        return reached


def _library() -> str:
    return str(build_kernels(cache_folder() / "kernels"))


def _rank_main(
    backend: str,
    fd: int,
    rank: int,
    timeout_s: float,
    two_phase_from: int,
    store: str,
    memory: mmap.mmap,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    before = _resources()
    region = ShmRegion.attach(fd, epoch=EPOCH)
    if backend in ("shm", "kernels", "staged"):
        library = Library(_library(), "bfloat16") if backend == "kernels" else None
        group: Group = ShmGroup(region, rank, timeout_s, two_phase_from=two_phase_from, library=library)
        group = StagedGroup(group) if backend == "staged" else group
    elif backend == "peer":
        size = 2 * region.slot_bytes
        parts = [torch.frombuffer(memory, dtype=torch.uint8, offset=r * size, count=size) for r in range(region.size)]
        queue = _SlowQueue(region, rank)
        group = PeerGroup(region, rank, timeout_s, parts, mark=queue.mark, two_phase_from=two_phase_from)
        del parts
    else:
        group = GlooGroup(region, rank, timeout_s, store_path=store)
    assert (group.epoch, group.rank, group.size) == (EPOCH, rank, region.size)
    for program, args in iter(pipe.recv, None):
        pipe.send(_outcome(program, group, *args))
    group.close()
    group.close()
    region.close()
    wait_until(lambda: _resources() == before)  # gloo closes its sockets in a thread


class Ranks:
    """The processes of one group, driven by programs `f(group, *args)`; checked for leaks at the end."""

    def __init__(
        self,
        backend: str,
        size: int,
        tmp_path: Path,
        *,
        timeout_s: float = DEADLINE_S,
        slot_bytes: int = SLOT_BYTES,
        two_phase_from: int = TWO_PHASE_FROM,
    ):
        context = multiprocessing.get_context("fork")
        self.region = ShmRegion.create(EPOCH, size, slot_bytes)
        self.memory = mmap.mmap(-1, size * 2 * self.region.slot_bytes)  # shared with the ranks: "device" memory
        self.size = size
        self.processes, self.pipes = [], []
        self._killed: set[int] = set()
        for rank in range(size):
            here, there = context.Pipe()
            store = str(tmp_path / "store")
            args = (backend, self.region.fd, rank, timeout_s, two_phase_from, store, self.memory, there)
            process = context.Process(target=_rank_main, args=args, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def start(self, program: Callable, *args: object, ranks=None) -> None:
        for rank in self._ranks(ranks):
            self.pipes[rank].send((program, args))

    def finish(self, ranks=None) -> list[Outcome]:
        waiting = {self.pipes[rank]: rank for rank in self._ranks(ranks)}
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(waiting):
            pending = [pipe for pipe, rank in waiting.items() if rank not in outcomes]
            ready = wait(pending, DEADLINE_S)
            assert ready, f"stuck: ranks {[waiting[pipe] for pipe in pending]}; the others: {outcomes}"
            for pipe in ready:
                outcomes[waiting[pipe]] = pipe.recv()
                if outcomes[waiting[pipe]].error == "AssertionError":
                    self.region.abort("a rank failed its test")
        return [outcomes[rank] for rank in waiting.values()]

    def run(self, program: Callable, *args: object) -> list:
        self.start(program, *args)
        outcomes = self.finish()
        assert not any(outcome.error for outcome in outcomes), outcomes
        return [outcome.value for outcome in outcomes]

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.processes[rank].join(DEADLINE_S)
        self._killed.add(rank)

    def _ranks(self, ranks) -> list[int]:
        return [rank for rank in (range(self.size) if ranks is None else ranks) if rank not in self._killed]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks(None):
            with contextlib.suppress(OSError):
                self.pipes[rank].send(None)
        codes = [self._reap(process) for process in self.processes]
        for pipe in self.pipes:
            pipe.close()
        self.region.close()
        self.memory.close()
        assert codes == [-signal.SIGKILL if rank in self._killed else 0 for rank in range(self.size)]

    @staticmethod
    def _reap(process) -> int | str:
        process.join(DEADLINE_S)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        return code


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        os.sched_yield()


def _resources() -> dict[str, object]:
    with open("/proc/self/maps") as maps:
        num_regions = sum("anchortp-comm" in line for line in maps)
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            fds.append((int(fd), os.readlink(f"/proc/self/fd/{fd}")))
    children = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as listing:
            children.update(listing.read().split())
    return {
        "regions": num_regions,
        "fds": sorted(fds),
        "children": children,
        "shm": sorted(os.listdir("/dev/shm")),
    }


@pytest.fixture(autouse=True)
def no_leak():
    before = _resources()
    yield
    assert _resources() == before


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


# --- data and oracles


def sample(seed: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of very different sizes: another order of summation would round to other bits."""
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 4, shape, generator=generator)
    return x.to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part.to(torch.float32)
    return total.to(parts[0].dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- programs: run by the ranks


def all_reduce_sample(group: Group, seed: int, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> bytes:
    x = sample(seed, group.rank, shape, dtype)
    result = group.all_reduce(x.mT.contiguous().mT if transposed else x)
    assert result.shape == x.shape and result.dtype == x.dtype
    return bits(result)


def gather_sample(group: Group, seed: int, rows: int, cols: tuple[int, ...], dtype: torch.dtype, root: int):
    x = sample(seed, group.rank, (rows, cols[group.rank]), dtype)
    result = group.gather(x, cols, root)
    if result is None:
        return None
    return [(tuple(part.shape), part.dtype, bits(part)) for part in result]


def mixed(group: Group, seed: int, num_collectives: int) -> int:
    """Back to back collectives of random kind and size, each checked at once, on ranks that drift apart."""
    plan, drift = random.Random(seed), random.Random(seed + 1 + group.rank)
    num_checked = 0
    for index in range(num_collectives):
        sum(range(drift.choice((0, 0, 0, 3000))))  # be late, without giving the core away
        kind = plan.choice(("reduce", "reduce", "gather", "barrier"))
        dtype = plan.choice(DTYPES)
        if kind == "reduce":
            shape = (plan.choice((1, 3, 16)), plan.choice((1, 17, 64, 200)))
            parts = [sample(index, rank, shape, dtype) for rank in range(group.size)]
            result = group.all_reduce(parts[group.rank].clone())
            assert same_bits(result, in_order(parts)), f"collective {index}: {shape} {dtype}"
        elif kind == "gather":
            num_checked += _checked_gather(group, plan, index, dtype)
        else:
            group.barrier()
        num_checked += kind == "reduce"
    return num_checked


def reduce_large(group: Group, num_floats: int, num_times: int) -> None:
    for index in range(num_times):
        # Cheap to make, so that the ranks spend their time in the collective; exact in float32.
        result = group.all_reduce(torch.full((num_floats,), float(group.rank + index)))
        wanted = float(sum(rank + index for rank in range(group.size)))
        assert result.eq(wanted).all(), f"{int(result.ne(wanted).sum())} wrong sums in all-reduce {index}"


def _checked_gather(group: Group, plan: random.Random, index: int, dtype: torch.dtype) -> int:
    rows, root = plan.choice((1, 5)), plan.randrange(group.size)
    cols = [plan.choice((0, 1, 33, 400)) for _ in range(group.size)]
    parts = [sample(index, rank, (rows, num), dtype) for rank, num in enumerate(cols)]
    result = group.gather(parts[group.rank], cols, root)
    assert (result is not None) == (group.rank == root)
    for got, wanted in zip(result or (), parts, strict=bool(result)):
        assert same_bits(got, wanted), f"collective {index}: {rows} x {cols} to {root}"
    return len(result or ())


def reduce_forever(group: Group) -> None:
    while True:
        group.all_reduce(torch.ones(600))


def enter(group: Group, kind: str) -> None:
    if kind == "all_reduce":
        group.all_reduce(torch.ones(16))
    elif kind == "gather":
        group.gather(torch.ones(1, 2), [2] * group.size, root=group.rank)
    else:
        group.barrier()


def enter_twice(group: Group, kind: str) -> str:
    first = _outcome(enter, group, kind)
    assert first.error, "the first was to fail"
    return _outcome(enter, group, kind).error


def modes(group: Group) -> None:
    """In and out of inference mode, with sizes that were first seen in the other."""
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            for num in (5, 700):
                result = group.all_reduce(torch.ones(num, dtype=torch.bfloat16))
                assert result.eq(group.size).all()


def mismatched(group: Group) -> None:
    group.all_reduce(torch.ones(4 + group.rank))


# --- the contract


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_reduce_is_the_sum_in_rank_order_on_every_rank(backend, size, tmp_path):
    shapes = st.lists(st.integers(0, 70), min_size=0, max_size=3).filter(lambda s: torch.Size(s).numel() < 9000)

    with Ranks(backend, size, tmp_path) as ranks:

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(seed=st.integers(0, 999), shape=shapes, dtype=st.sampled_from(DTYPES), transposed=st.booleans())
        def check(seed, shape, dtype, transposed):
            results = ranks.run(all_reduce_sample, seed, tuple(shape), dtype, transposed and len(shape) > 1)
            parts = [sample(seed, rank, tuple(shape), dtype) for rank in range(size)]
            assert results == [bits(in_order(parts))] * size

        check()


@pytest.mark.parametrize("shape", [(16, 576), (511,), (512,), (1024,), (1025,), (2048 + 700,), (5000,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_is_close_to_float64(dtype, shape, tmp_path):
    with Ranks("shm", 3, tmp_path) as ranks:
        results = ranks.run(all_reduce_sample, 1, shape, dtype, False)
    parts = [sample(1, rank, shape, dtype).to(torch.float64) for rank in range(3)]
    wanted = torch.stack(parts).sum(0)
    magnitude = torch.stack(parts).abs().sum(0)
    got = torch.frombuffer(bytearray(results[0]), dtype=dtype).view(shape).to(torch.float64)
    assert ((got - wanted).abs() <= magnitude * torch.finfo(dtype).eps).all()
    assert results == [results[0]] * 3


def test_gather_brings_unequal_columns_to_root(backend, tmp_path):
    size = 3
    cols = st.tuples(*[st.sampled_from((0, 1, 7, 250))] * size)

    with Ranks(backend, size, tmp_path) as ranks:

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(
            seed=st.integers(0, 999),
            rows=st.integers(0, 12),
            cols=cols,
            dtype=st.sampled_from((*DTYPES, torch.int64)),
            root=st.integers(0, size - 1),
        )
        def check(seed, rows, cols, dtype, root):
            results = ranks.run(gather_sample, seed, rows, cols, dtype, root)
            parts = [sample(seed, rank, (rows, num), dtype) for rank, num in enumerate(cols)]
            wanted = [(tuple(part.shape), part.dtype, bits(part)) for part in parts]
            assert results == [wanted if rank == root else None for rank in range(size)]

        check()


@pytest.mark.parametrize("size", [2, 5])
def test_hundreds_of_mixed_collectives_do_not_race(backend, size, tmp_path):
    num_collectives = 1500 if backend == "shm" else 60
    with Ranks(backend, size, tmp_path) as ranks:
        for num_checked in ranks.run(mixed, 3, num_collectives):
            assert num_checked > num_collectives // 3


@pytest.mark.parametrize("two_phase_from", [0, sys.maxsize], ids=["two-phase", "one-phase"])
def test_large_tensors_are_whole_when_they_are_announced(two_phase_from, tmp_path):
    num_floats = 1 << 18  # copying takes long enough that a flag set too early would be seen
    with Ranks("shm", 3, tmp_path, slot_bytes=4 * num_floats, two_phase_from=two_phase_from) as ranks:
        ranks.run(reduce_large, num_floats, 30)
        assert min(ranks.region.progress()) == (60 if two_phase_from == 0 else 30)


def test_inference_mode_may_come_and_go(backend, tmp_path):
    with Ranks(backend, 2, tmp_path) as ranks:
        ranks.run(modes)


@pytest.mark.parametrize("kind", ["all_reduce", "gather", "barrier"])
def test_abort_wakes_every_survivor(backend, kind, tmp_path):
    survivors = [0, 1, 3]
    with Ranks(backend, 4, tmp_path) as ranks:
        ranks.run(enter, "all_reduce")
        before = ranks.region.progress()
        ranks.start(enter_twice, kind, ranks=[1])
        ranks.start(enter, kind, ranks=[0, 3])
        wait_until(lambda: all(ranks.region.progress()[r] > before[r] for r in survivors))
        assert ranks.region.progress()[2] == before[2], "the missing rank is the one with the fewest arrivals"
        aborted_s = time.monotonic()
        ranks.region.abort("cpu:2 is lost")
        outcomes = ranks.finish(survivors)
        assert outcomes[1].value == "GroupAborted", "a dissolved group stays dissolved"
        for outcome in (outcomes[0], outcomes[2]):
            assert outcome.error == "GroupAborted" and "cpu:2 is lost" in outcome.message
        assert all(outcome.at_s - aborted_s < 2.0 for outcome in outcomes)


def test_a_killed_peer_and_an_abort_in_the_middle_of_collectives(backend, tmp_path):
    with Ranks(backend, 4, tmp_path) as ranks:
        ranks.start(reduce_forever)
        wait_until(lambda: min(ranks.region.progress()) > 20)
        ranks.kill(1)
        ranks.region.abort("cpu:1 is lost")
        assert [outcome.error for outcome in ranks.finish()] == ["GroupAborted"] * 3


def test_gloo_notices_a_killed_peer_by_itself(tmp_path):
    with Ranks("gloo", 3, tmp_path) as ranks:
        ranks.start(reduce_forever)
        wait_until(lambda: min(ranks.region.progress()) > 5)
        ranks.kill(2)
        # Who talks to the dead notices first; the abort flag is for those who wait for the ones that left.
        wait_until(lambda: any(ranks.pipes[rank].poll() for rank in (0, 1)))
        ranks.region.abort("noticed")
        outcomes = ranks.finish()
        assert [outcome.error for outcome in outcomes] == ["GroupAborted"] * 2
        assert any("gloo lost a peer" in outcome.message for outcome in outcomes)


@pytest.mark.parametrize("kind", ["all_reduce", "barrier"])
def test_timeout_names_the_ranks_that_did_not_arrive(backend, kind, tmp_path):
    with Ranks(backend, 4, tmp_path, timeout_s=1.0) as ranks:
        ranks.run(enter, "barrier")
        ranks.start(enter, kind, ranks=[0, 2])
        for outcome in ranks.finish([0, 2]):
            assert outcome.error == "GroupTimeout" and outcome.missing == (1, 3)


def test_ranks_that_call_different_collectives_are_told(tmp_path):
    with Ranks("shm", 2, tmp_path) as ranks:
        ranks.start(mismatched)
        outcomes = ranks.finish()
        assert "AssertionError" in {outcome.error for outcome in outcomes}
        assert any("different collectives" in outcome.message for outcome in outcomes)


def test_the_region_works_without_torch_and_travels_by_scm_rights():
    """The controller's view: a process that never imports torch gets the descriptor over a socket."""
    code = (
        "import socket, sys\n"
        "from anchortp.comm import ShmRegion\n"
        "with socket.socket(fileno=int(sys.argv[1])) as peer:\n"
        "    fd = socket.recv_fds(peer, 1, 1)[1][0]\n"
        "    region = ShmRegion.attach(fd, epoch=9)\n"
        "    region.mark(1, 77)\n"
        "    region.abort('from another process')\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
        "    peer.sendall(b'.')\n"
    )
    region = ShmRegion.create(9, 2, 64)
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    with ours, theirs:
        child = subprocess.Popen([sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        socket.send_fds(ours, [b"."], [region.fd])
        assert ours.recv(1) == b"."
        assert child.wait(DEADLINE_S) == 0
    assert region.aborted and region.steps() == [0, 77]
    region.close()
