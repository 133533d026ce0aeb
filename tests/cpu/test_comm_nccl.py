"""`NcclGroup` over a stand-in for torch's NCCL, a thread per rank."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from anchortp.comm import MixedGroup, NcclGroup, PeerGroup, ShmRegion
from anchortp.comm import nccl as nccl_module
from anchortp.errors import GroupAborted
from tests.nccl_fake import FakeNccl

CPU = torch.device("cpu")
DEADLINE_S = 20.0


@pytest.fixture
def nccl(monkeypatch):
    library = FakeNccl()
    monkeypatch.setattr(nccl_module, "dist", library)
    return library


class Epoch:
    """A region, and ranks that are threads: `run(rank, work)` gives a future of `work(group)`."""

    def __init__(self, epoch: int, size: int):
        self.epoch = epoch
        self.region = ShmRegion.create(epoch, size, 1024)

    def run(self, rank: int, work: Callable[[NcclGroup], Any], *, timeout_s: float = DEADLINE_S) -> Future:
        outcome: Future = Future()

        def main() -> None:
            region = ShmRegion.attach(self.region.fd, epoch=self.epoch)
            try:
                group = NcclGroup(region, rank, timeout_s, store_path="store", device=CPU)
                try:
                    outcome.set_result(work(group))
                finally:
                    group.close()
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                region.close()

        threading.Thread(target=main, daemon=True).start()
        return outcome


@pytest.fixture
def epochs():
    made: list[Epoch] = []

    def make(epoch: int, size: int) -> Epoch:
        made.append(Epoch(epoch, size))
        return made[-1]

    yield make
    for epoch in made:
        epoch.region.close()


def wait_until(ready: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < end_s, "did not happen"
        time.sleep(0.001)


def parts_of(size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 5, generator=generator) * 10.0**rank for rank in range(size)]


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def test_sums_in_the_order_of_the_ranks_and_gathers(nccl, epochs):
    parts, epoch = parts_of(3), epochs(1, 3)

    def work(group: NcclGroup) -> Any:
        group.barrier()
        total = group.all_reduce(parts[group.rank].clone())
        return total, group.gather(parts[group.rank][:, : group.rank + 1].clone(), [1, 2, 3], root=1)

    found = [f.result(DEADLINE_S) for f in [epoch.run(rank, work) for rank in range(3)]]
    assert all(torch.equal(total, summed(parts)) for total, _ in found)
    assert found[0][1] is None and [tuple(part.shape) for part in found[1][1]] == [(3, 1), (3, 2), (3, 3)]
    wait_until(lambda: all(group.is_aborted for group in nccl.made))


class LateDevice:
    """Copies into slots and sums come through at once here; what is asked of it says so late."""

    def __init__(self):
        self.num_marks = 0

    def mark(self) -> Callable[[], bool]:
        self.num_marks += 1
        waits = [None] * (self.num_marks % 3)
        return lambda: not (waits and [waits.pop()])


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_group_gives_the_same_bits_whichever_way_a_message_goes(nccl, epochs, seed):
    """Any order of collectives, just below and just above what the small way takes; the flags are those of both."""
    size, rng = 3, random.Random(seed)
    epoch = epochs(1, size)
    limit = epoch.region.slot_bytes
    memory = [torch.zeros(2 * limit, dtype=torch.uint8) for _ in range(size)]
    dtypes = (torch.float32, torch.bfloat16)
    plan = [
        (rng.choice("sgb"), rng.choice(dtypes), rng.choice((1, limit // 4, limit // 4 + 1, limit // 2, limit // 2 + 1)))
        for _ in range(40)
    ]

    def part(step: int, rank: int) -> torch.Tensor:
        _, dtype, num = plan[step]
        generator = torch.Generator().manual_seed(100 * step + rank)
        return (torch.randn(1, num, generator=generator) * 10.0 ** (rank - 1)).to(dtype)

    def work(large: NcclGroup) -> tuple[int, int]:
        region, device = large._region, LateDevice()
        small = PeerGroup(region, large.rank, DEADLINE_S, memory, mark=device.mark, rendezvous=large.rendezvous)
        group = MixedGroup(small, large, limit)
        for step, (kind, dtype, _) in enumerate(plan):
            parts = [part(step, rank) for rank in range(size)]
            if kind == "s":
                found = group.all_reduce(parts[group.rank].clone())
                wanted = summed([x.float() for x in parts]).to(dtype)
                assert torch.equal(found, wanted), plan[step]
            elif kind == "g":
                found = group.gather(parts[group.rank], [parts[0].shape[1]] * size, root=step % size)
                assert (found is None) == (group.rank != step % size)
                assert found is None or all(map(torch.equal, found, parts)), plan[step]
            else:
                group.barrier()
        return device.num_marks, large._process_group._num_rounds

    (marks, rounds), *others = [f.result(DEADLINE_S) for f in [epoch.run(rank, work) for rank in range(size)]]
    num_small = sum(num * (4 if kind == "s" else dtype.itemsize) <= limit or kind == "b" for kind, dtype, num in plan)
    assert rounds == 1 + len(plan) - num_small and marks == num_small, "each message went its way"
    assert set(others) == {(marks, rounds)}


def test_a_peer_that_dies_while_the_communicator_is_made_costs_the_others_no_wait(nccl, epochs):
    """It has arrived, so the others go into the library, which waits for it; nobody else can end that wait."""
    nccl.forming_timeout_s = 2.0
    epoch = epochs(4, 2)
    survivor = epoch.run(0, lambda group: "formed")
    gone = ShmRegion.attach(epoch.region.fd, epoch=4)
    dead = nccl_module.Rendezvous(gone, 1, DEADLINE_S)
    for _ in range(2):  # at the meeting before, and at the first collective
        dead.begin()
        dead.arrive(nccl_module._BARRIER)
    wait_until(lambda: nccl.made and nccl.made[0]._clique.present == {0})
    began_s = time.monotonic()
    epoch.region.abort("rank 1 is gone")
    with pytest.raises(GroupAborted, match="rank 1 is gone"):
        survivor.result(DEADLINE_S)
    assert time.monotonic() - began_s < 1.0, "it waited for the library"
    assert not nccl.made[0].is_aborted  # the library is still in its lock
    wait_until(lambda: nccl.made[0].is_aborted)
    gone.close()


def test_no_collective_begins_before_every_rank_is_at_it(nccl, epochs):
    """The first of a kind connects inside of torch's call, where no flag is seen."""
    epoch, go = epochs(2, 2), threading.Event()

    def early(group: NcclGroup) -> None:
        with pytest.raises(GroupAborted):
            group.barrier()

    def late(group: NcclGroup) -> None:
        assert go.wait(DEADLINE_S)

    first, second = epoch.run(0, early), epoch.run(1, late)
    wait_until(lambda: epoch.region.progress()[0] == 3)
    time.sleep(0.05)
    assert [group._num_rounds for group in nccl.made] == [1, 1]
    epoch.region.abort("over")
    first.result(DEADLINE_S)
    go.set()
    second.result(DEADLINE_S)
