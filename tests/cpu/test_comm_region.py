"""The region of an epoch and its flags, in one process."""

import os
from itertools import pairwise

import pytest
import torch

from anchortp.comm import ShmGroup, ShmRegion
from anchortp.comm.region import Rendezvous
from anchortp.errors import GroupAborted, GroupTimeout, ProtocolError, StaleEpoch


def mapped_regions() -> int:
    with open("/proc/self/maps") as maps:
        return sum("anchortp-comm" in line for line in maps)


def open_fds() -> dict[str, str]:
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return fds


@pytest.fixture(autouse=True)
def no_leak():
    fds_before, maps_before = open_fds(), mapped_regions()
    yield
    assert open_fds() == fds_before
    assert mapped_regions() == maps_before


@pytest.fixture
def region():
    region = ShmRegion.create(7, 3, 1000)
    yield region
    region.close()


def test_attach_sees_what_was_created(region):
    attached = ShmRegion.attach(region.fd, epoch=7)
    assert (attached.epoch, attached.size, attached.slot_bytes, attached.fd) == (7, 3, 1024, -1)
    region.mark(1, 41)
    attached.mark(2, 42)
    assert region.steps() == attached.steps() == [0, 41, 42]
    assert attached.progress() == [0, 0, 0]
    attached.close()


def test_slots_are_disjoint_and_inside(region):
    starts = sorted(region.slot_at(parity, rank) for parity in range(2) for rank in range(3))
    assert all(b - a == region.slot_bytes for a, b in pairwise(starts))
    assert starts[0] % 64 == 0 and starts[-1] + region.slot_bytes == len(region.buffer)
    for rank in range(3):
        region.mark(rank, -1)
    region.abort("x" * 1000)
    assert not any(region.buffer[starts[0] :]), "a header word or the reason lies in a slot"
    assert region.progress() == [0, 0, 0], "the reason lies in a flag"


@pytest.mark.parametrize("expected", [6, 8])
def test_another_epoch_is_refused(region, expected):
    with pytest.raises(StaleEpoch) as caught:
        ShmRegion.attach(region.fd, epoch=expected)
    assert (caught.value.epoch, caught.value.current) == (min(7, expected), max(7, expected))


@pytest.mark.parametrize("num_bytes", [0, 100, 8192, 8199])
def test_a_foreign_descriptor_is_refused(num_bytes):
    fd = os.memfd_create("foreign")
    os.ftruncate(fd, num_bytes)
    with pytest.raises(ProtocolError):
        ShmRegion.attach(fd, epoch=1)
    os.close(fd)


def test_another_version_is_refused(region):
    region.words[1] += 1
    with pytest.raises(ProtocolError, match="one release"):
        ShmRegion.attach(region.fd, epoch=7)


@pytest.mark.parametrize(("word", "value"), [(3, 4), (3, -1), (4, 2048)])
def test_a_header_that_contradicts_the_size_is_refused(region, word, value):
    region.words[word] = value
    with pytest.raises(ProtocolError, match="create it again"):
        ShmRegion.attach(region.fd, epoch=7)


def test_nobody_can_shrink_the_file(region):
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 4096)


@pytest.mark.parametrize("reason", ["", "device cpu:2 lost", "ü" * 500])
def test_the_first_reason_stands(region, reason):
    region.check()
    assert not region.aborted
    region.abort(reason)
    region.abort("too late")
    assert region.aborted
    with pytest.raises(GroupAborted) as caught:
        region.check()
    assert caught.value.epoch == 7
    assert str(caught.value).endswith(reason[:192] or "dissolved")
    assert "too late" not in str(caught.value)


def test_close_is_idempotent_and_frees_the_descriptor():
    region = ShmRegion.create(1, 1, 64)
    fd = region.fd
    region.close()
    region.close()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_view_outlives_the_region(region):
    attached = ShmRegion.attach(region.fd, epoch=7)
    group = ShmGroup(attached, 0, 1.0)
    view = group._slots[0][0]
    view.fill_(3)
    group.close()
    attached.close()
    assert mapped_regions() == 2
    assert torch.equal(view, torch.full((1024,), 3, dtype=torch.uint8))
    del view
    assert mapped_regions() == 1


def test_a_rank_joins_an_epoch_once(region):
    Rendezvous(region, 0, 1.0).arrive(0)
    with pytest.raises(AssertionError, match="raise the epoch"):
        Rendezvous(region, 0, 1.0)


def test_timeout_names_the_missing_ranks(region):
    late, present = (Rendezvous(region, rank, 0.05) for rank in range(2))
    present.begin()
    present.arrive(0)
    late.begin()
    late.arrive(0)
    with pytest.raises(GroupTimeout) as caught:
        late.wait(0)
    assert caught.value.missing == (2,)
    assert region.progress() == [1, 1, 0]


def test_a_slot_is_not_reused_before_everybody_arrived(region):
    """What the two slots rest on: `begin` of the next collective waits for the present one."""
    ahead, peer, last = (Rendezvous(region, rank, 0.05) for rank in range(3))
    for rank in (ahead, peer):
        rank.begin()
        rank.arrive(0)
    with pytest.raises(GroupTimeout):
        ahead.begin()
    last.begin()
    last.arrive(0)
    assert ahead.begin() == 0


def test_different_collectives_are_told_apart(region):
    ranks = [Rendezvous(region, rank, 1.0) for rank in range(3)]
    for rank, tag in zip(ranks, (5, 5, 9), strict=True):
        rank.begin()
        rank.arrive(tag)
    with pytest.raises(AssertionError, match="different collectives"):
        ranks[0].wait(5)


def test_a_group_of_one_is_free_but_still_leaves():
    region = ShmRegion.create(2, 1, 64)
    group = ShmGroup(region, 0, 1.0)
    x = torch.arange(100.0)
    assert group.all_reduce(x) is x
    assert group.gather(x.view(10, 10), (10,))[0].data_ptr() == x.data_ptr()
    group.barrier()
    region.abort("over")
    for leave in (lambda: group.all_reduce(x), lambda: group.gather(x.view(10, 10), (10,)), group.barrier):
        with pytest.raises(GroupAborted, match="over"):
            leave()
    group.close()
    region.close()
