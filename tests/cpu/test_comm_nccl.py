"""`NcclGroup` over a stand-in for torch's NCCL, a thread per rank."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from anchortp.comm import Kept, MixedGroup, NcclGroup, PeerGroup, ShmRegion
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
    """A region, and ranks that are threads: `run(rank, work)` gives a future of `work(group)`. `kept`: what each rank's
    worker has of earlier epochs; `members`: the workers' devices."""

    def __init__(self, epoch: int, size: int, members: str = "abcd", kept: dict[str, Kept] | None = None):
        self.epoch, self.members = epoch, members[:size]
        self.kept = kept if kept is not None else {member: Kept() for member in self.members}
        self.region = ShmRegion.create(epoch, size, 1024)

    def run(self, rank: int, work: Callable[[NcclGroup], Any], *, timeout_s: float = DEADLINE_S) -> Future:
        outcome: Future = Future()
        more = {"store_path": "store", "device": CPU, "members": self.members, "kept": self.kept[self.members[rank]]}

        def main() -> None:
            region = ShmRegion.attach(self.region.fd, epoch=self.epoch)
            try:
                group = NcclGroup(region, rank, timeout_s, **more)
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

    def make(*args: Any) -> Epoch:
        made.append(Epoch(*args))
        return made[-1]

    yield make
    for epoch in made:
        epoch.region.close()


def wait_until(ready: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < end_s, "did not happen"
        os.sched_yield()


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
    assert not any(group.is_aborted for group in nccl.made), "idle ones are kept"


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
    begun: list[list[int]] = []  # where the ranks were as each collective began
    nccl.on_collective = lambda: begun.append(list(epoch.region.progress()))

    def early(group: NcclGroup) -> None:
        group.barrier()

    def late(group: NcclGroup) -> None:
        assert go.wait(DEADLINE_S)
        group.barrier()

    first, second = epoch.run(0, early), epoch.run(1, late)
    wait_until(lambda: epoch.region.progress()[0] == 3)  # at its barrier, for which the other has not set out
    go.set()
    first.result(DEADLINE_S)
    second.result(DEADLINE_S)
    assert len(begun) == 4 and all(min(progress) >= 3 for progress in begun[2:]), begun


# ------------------------------------------------------------------------------------------------- from epoch to epoch


def step(epoch: Epoch) -> list[Any]:
    """All ranks sum; returns their process groups, each epoch's group being closed by then."""

    def work(group: NcclGroup) -> Any:
        parts = parts_of(group.size)
        assert torch.equal(group.all_reduce(parts[group.rank].clone()), summed(parts))
        return group._process_group

    outcomes = [epoch.run(rank, work) for rank in range(len(epoch.members))]
    return [outcome.result(DEADLINE_S) for outcome in outcomes]


@pytest.fixture
def kept():
    return {member: Kept() for member in "abcd"}


def test_after_a_loss_the_survivors_shrink_what_they_have(nccl, epochs, kept):
    first = step(epochs(1, 4, "abcd", kept))
    second = step(epochs(2, 3, "acd", kept))
    assert nccl.num_initialised == 4, "no communicator was made anew"
    assert not set(second) & set(first) and [(g.rank(), g.size()) for g in second] == [(0, 3), (1, 3), (2, 3)]
    wait_until(lambda: all(first[rank].is_aborted for rank in (0, 2, 3)))
    third = step(epochs(4, 1, "d", kept))  # two more at once, and an epoch without a group in between
    assert nccl.num_initialised == 4 and third[0].size() == 1 and not third[0].is_aborted


def test_another_layout_of_the_same_workers_needs_no_other_communicator(nccl, epochs, kept):
    first = step(epochs(1, 3, "abc", kept))
    assert step(epochs(2, 3, "abc", kept)) == first and step(epochs(5, 3, "abc", kept)) == first
    assert not any(group.is_aborted for group in first)


@pytest.mark.parametrize("members", ["abc", "abcd", "cba"], ids=["respawned", "joined", "in another order"])
def test_who_has_another_one_or_none_makes_all_make_a_new_one(nccl, epochs, kept, caplog, members):
    first = step(epochs(1, 3, "abc", kept))
    if members == "abc":
        kept["b"] = Kept()  # of another process
    second = step(epochs(2, len(members), members, kept))
    assert nccl.num_initialised == 3 + len(members) and not set(first) & set(second)
    wait_until(lambda: all(first[rank].is_aborted for rank in (0, 2)))
    assert "a new NCCL communicator is made" in caplog.text


def test_one_that_was_in_use_as_its_group_ended_is_aborted_and_not_shrunk(nccl, epochs, kept):
    """Its kernel may wait for the dead rank: only its abort ends that."""
    epoch = epochs(1, 3, "abc", kept)
    in_it = threading.Barrier(3)

    def work(group: NcclGroup) -> None:
        in_it.wait(DEADLINE_S)
        group.barrier()

    def dies_in_it(group: NcclGroup) -> None:
        in_it.wait(DEADLINE_S)
        group._process_group.allgather = lambda outs, ins: pytest.fail("killed here")
        group.barrier()

    outcomes = [epoch.run(rank, dies_in_it if rank == 1 else work) for rank in range(3)]
    wait_until(lambda: [g.num_under_way for g in nccl.made if g.rank() != 1] == [1, 1] and outcomes[1].done())
    epoch.region.abort("b is gone")
    for rank in (0, 2):
        with pytest.raises(GroupAborted, match="b is gone"):
            outcomes[rank].result(DEADLINE_S)
    wait_until(lambda: all(group.is_aborted for group in nccl.made))
    step(epochs(2, 2, "ac", kept))
    assert nccl.num_initialised == 5


def test_where_the_library_cannot_shrink_the_log_says_so(nccl, epochs, kept, caplog):
    nccl.can_shrink = False
    step(epochs(1, 3, "abc", kept))
    step(epochs(2, 2, "ac", kept))
    assert nccl.num_initialised == 5 and "this NCCL cannot shrink" in caplog.text
    step(epochs(3, 2, "ac", kept))
    assert nccl.num_initialised == 5, "nothing to shrink"


def test_a_shrink_that_fails_for_one_rank_costs_the_others_a_bounded_wait(nccl, epochs, kept, caplog, monkeypatch):
    """They wait for it inside of the library."""
    monkeypatch.setattr(nccl_module, "DERIVE_S", 0.3)
    nccl.forming_timeout_s = 1.0
    first = step(epochs(1, 4, "abcd", kept))
    nccl.failing = {3}
    step(epochs(2, 3, "abd", kept))
    assert nccl.num_initialised == 4 + 3
    assert "ncclCommShrink failed" in caplog.text and "it took longer than 0.3 s" in caplog.text
    wait_until(lambda: all(first[rank].is_aborted for rank in (0, 1, 3)))


def test_a_communicator_that_works_for_all_but_one_is_used_by_none(nccl, epochs, kept, caplog):
    first = step(epochs(1, 3, "abc", kept))
    nccl.failing_late = {2}
    second = step(epochs(2, 2, "ac", kept))
    assert nccl.num_initialised == 3 + 2 and "another rank failed" in caplog.text
    in_use = [*second, first[1]]  # b is dead
    wait_until(lambda: all(group.is_aborted for group in nccl.made if group not in in_use))


def test_a_peer_that_dies_while_they_shrink_costs_the_others_no_wait(nccl, epochs, kept):
    nccl.forming_timeout_s = 2.0
    first = step(epochs(1, 3, "abc", kept))
    epoch = epochs(2, 2, "ac", kept)
    survivor = epoch.run(0, lambda group: "formed")
    gone = ShmRegion.attach(epoch.region.fd, epoch=2)
    dead = nccl_module.Rendezvous(gone, 1, DEADLINE_S)
    dead.begin()
    dead.arrive(1 + 1)  # it has the communicator of epoch 1, too
    wait_until(lambda: first[0]._lock.locked())
    began_s = time.monotonic()
    epoch.region.abort("c is gone")
    with pytest.raises(GroupAborted, match="c is gone"):
        survivor.result(DEADLINE_S)
    assert time.monotonic() - began_s < 1.0, "it waited for the library"
    gone.close()
    assert kept["a"].take() is None
    wait_until(lambda: first[0].is_aborted)
