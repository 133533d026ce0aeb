"""The state plane's commits against a device's real account, with the connection left out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from anchortp.arena import PAGE_BYTES, IntervalSet
from anchortp.config import EngineConfig, parse_model_config
from anchortp.engine.plane import KV_ARENA, WEIGHTS_ARENA, StatePlane
from anchortp.errors import ChannelClosed
from anchortp.layout import (
    EXPERT,
    KV,
    KVAddresses,
    Layout,
    WeightAddresses,
    empty_shard,
    initial_layout,
    model_units,
    shard_from_dict,
)
from anchortp.recovery.devices import Device, fitting_kv_blocks
from anchortp.recovery.events import Reserve
from anchortp.state.memory import DeviceMemory

DEVICE, BLOCK, WANTED = "cpu:0", 1, 1001
# Neither slots nor planes end on the edge of a page.
MODEL = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
UNITS = model_units(parse_model_config(MODEL))


class _Client:
    """What `AnchorClient` says of memory, answered in this process."""

    def __init__(self, budget_bytes: int, device: str = DEVICE):
        self.memory = DeviceMemory(device=device, budget_bytes=budget_bytes)
        self.welcome = SimpleNamespace(device=device, epoch=1)

    def create_arena(self, name, reserved_bytes, epoch):
        self.memory.create(name, reserved_bytes)
        return SimpleNamespace(close=lambda: None)

    def drop_arena(self, name, epoch):
        self.memory.drop(name)

    def commit(self, name, ranges, epoch):
        self.memory.commit(name, tuple(ranges))

    def commit_now(self, name, ranges, epoch):
        self.memory.commit(name, tuple(ranges), allocate=True)

    def decommit(self, name, ranges, epoch):
        self.memory.decommit(name, tuple(ranges))

    def status(self):
        return SimpleNamespace(arenas=self.memory.infos())

    def put_manifest(self, manifest, epoch):
        self.manifest = manifest
        self.named = Layout(shards=(shard_from_dict(DEVICE, manifest.shards),))

    def get_manifest(self):
        return self.manifest


def _plane(client: _Client) -> StatePlane:
    config = EngineConfig(
        model_folder="",
        runtime_dir="",
        model=UNITS.config,
        devices=(DEVICE,),
        device_memory_bytes=client.memory.budget_bytes,
        max_model_len=256,
        kv_block_size=BLOCK,
        kv_blocks=WANTED,
    )
    plane = StatePlane(
        config, UNITS, "print", watch=lambda fd, read: None, unwatch=lambda fd: None, on_gone=pytest.fail
    )
    plane._clients[DEVICE] = client
    return plane


def _check_manifest(client: _Client) -> None:
    """At any moment the engine may be killed, and the next one believe that what is named is there."""
    named, accounted = _used(client.named, 0), _accounted(client)
    if any(client.named.shards[0].slots):
        assert not named[WEIGHTS_ARENA] - accounted[WEIGHTS_ARENA], "named, and given back"


def _random_layout(draw: random.Random) -> Layout:
    shard = empty_shard(DEVICE)
    for family in UNITS.families:
        shard = shard.replaced(family, range(draw.randint(1, UNITS.num_units[family])))
    return Layout(shards=(shard,))


def _fitting(layout: Layout, budget_bytes: int) -> int:
    devices = {DEVICE: Device(budget_bytes=budget_bytes, shard=layout.shards[0], fresh=False)}
    return fitting_kv_blocks(UNITS, devices, layout, block_size=BLOCK, wanted=WANTED, least=1)


def _used(layout: Layout, num_kv_blocks: int) -> dict[str, IntervalSet]:
    """The oracle: pages with a byte in them that some slot names."""
    shard, page = layout.shards[0], PAGE_BYTES
    weights = WeightAddresses(units=UNITS, page_bytes=page)
    kv = KVAddresses(config=UNITS.config, block_size=BLOCK, num_blocks=WANTED, page_bytes=page)
    ranges = {WEIGHTS_ARENA: [weights.replicated_range], KV_ARENA: []}
    for tensor in UNITS.tensors:
        for copy in range(UNITS.num_copies(tensor)):
            ranges[WEIGHTS_ARENA] += [weights.block(tensor, copy, slot) for slot in range(len(shard[tensor.family]))]
    for slot in range(len(shard[KV])):
        ranges[KV_ARENA] += kv.slot_ranges(slot, slot + 1, 0, num_kv_blocks)
    return {
        name: IntervalSet((start // page * page, -(-stop // page) * page) for start, stop in ranges[name])
        for name in ranges
    }


@pytest.mark.parametrize("seed", range(200))
def test_memory_that_is_given_up_is_there_for_the_kv_cache(seed):
    """Shrink, grow and settle at the brim: what the planner says fits does, and nothing is kept that nobody uses."""
    draw = random.Random(seed)
    everything = _used(Layout(shards=(initial_layout(UNITS, (DEVICE,)).shards[0],)), 0)
    client = _Client(everything[WEIGHTS_ARENA].total + draw.randint(100, 400) * PAGE_BYTES)
    plane, fresh = _plane(client), (DEVICE,)
    for epoch in range(1, 9):
        staged, target = sorted((_random_layout(draw), _random_layout(draw)), key=_total, reverse=True)
        if not all(len(target.shards[0][f]) <= len(staged.shards[0][f]) for f in UNITS.families):
            target = staged
        blocks = _fitting(staged, client.memory.budget_bytes)
        order = Reserve(epoch=epoch, ticket=epoch, staged=staged, num_kv_blocks=blocks, fresh=fresh)
        assert plane.reserve(order) == ""
        _check_manifest(client)
        assert _accounted(client) == _used(staged, blocks)
        blocks = _fitting(target, client.memory.budget_bytes)
        assert plane.settle(target, blocks, epoch)
        _check_manifest(client)
        assert _accounted(client) == _used(target, blocks)
        client.memory.validate()
        if draw.random() < 0.7:  # else a fault comes before everything is loaded
            plane.put_manifests(target, blocks, epoch)
            assert client.named == target
        fresh = ()


def test_a_change_behind_the_steps_gives_nothing_back():
    client = _Client(1 << 24)
    plane, large, small = _plane(client), *sorted((_layout(4), _layout(2)), key=_total, reverse=True)
    assert plane.reserve(Reserve(epoch=1, ticket=1, staged=large, num_kv_blocks=9, fresh=(DEVICE,))) == ""
    behind = Reserve(epoch=1, ticket=2, staged=small, num_kv_blocks=9, fresh=(), background=True)
    assert plane.reserve(behind) == ""
    assert _accounted(client) == _used(large, 9)
    assert plane.settle(small, 9, 2)
    assert _accounted(client) == _used(small, 9)


def test_slots_that_are_named_stay_named_while_they_stay():
    client = _Client(1 << 24)
    plane = _plane(client)
    assert plane.reserve(Reserve(epoch=1, ticket=1, staged=_layout(2), num_kv_blocks=9, fresh=(DEVICE,))) == ""
    plane.put_manifests(_layout(2), 9, 1)
    assert plane.reserve(Reserve(epoch=2, ticket=2, staged=_layout(4), num_kv_blocks=9, fresh=())) == ""
    assert plane.settle(_layout(4), 9, 2) and client.named == _layout(2)
    assert plane.settle(_layout(1), 9, 3) and not any(client.named.shards[0].slots)


def test_a_manifest_that_names_memory_which_is_not_there_is_not_believed():
    client = _Client(1 << 24)
    plane, later = _plane(client), _plane(client)
    assert plane.reserve(Reserve(epoch=1, ticket=1, staged=_layout(3), num_kv_blocks=9, fresh=(DEVICE,))) == ""
    plane.put_manifests(_layout(3), 9, 1)
    assert later._held(DEVICE, client) == _layout(3).shards[0]
    client.decommit(WEIGHTS_ARENA, list(_used(_layout(3), 9)[WEIGHTS_ARENA])[-1:], 1)
    assert later._held(DEVICE, client) is None


def test_a_reservation_above_the_budget_is_refused_with_the_numbers_and_can_be_made_smaller():
    client = _Client(_used(_layout(4), 0)[WEIGHTS_ARENA].total + 16 * PAGE_BYTES)
    plane = _plane(client)
    refused = plane.reserve(Reserve(epoch=1, ticket=1, staged=_layout(4), num_kv_blocks=WANTED, fresh=(DEVICE,)))
    assert refused is not None and "do not fit" in refused
    assert plane.settle(_layout(1), 1, 1)
    assert _accounted(client) == _used(_layout(1), 1)


@pytest.mark.parametrize("ahead_bytes", [2 * PAGE_BYTES, PAGE_BYTES // 2])
def test_memory_is_made_ready_a_little_at_a_time_and_kept_until_it_is_used(monkeypatch, ahead_bytes):
    """Never less than a page, which may be more than is meant to come at a time."""
    monkeypatch.setattr("anchortp.engine.plane.AHEAD_BYTES", ahead_bytes)
    client, layout, more = _Client(1 << 24), _layout(1), _layout(4)
    plane = _plane(client)
    assert plane.reserve(Reserve(epoch=1, ticket=1, staged=layout, num_kv_blocks=9, fresh=(DEVICE,))) == ""
    before, taken = _accounted(client), _in_memory(client)
    pieces = [done[DEVICE] for done in plane.commit_ahead({DEVICE: _slots(more)}, 1)]
    new = _used(more, 9)[WEIGHTS_ARENA] - before[WEIGHTS_ARENA]
    assert IntervalSet(r for piece in pieces for r in piece) == new and len(pieces) > 1
    assert max(IntervalSet(piece).total for piece in pieces) <= max(ahead_bytes, PAGE_BYTES)
    assert all(edge % PAGE_BYTES == 0 for piece in pieces for both in piece for edge in both)
    assert _accounted(client) == {WEIGHTS_ARENA: before[WEIGHTS_ARENA] | new, KV_ARENA: before[KV_ARENA]}
    assert _in_memory(client) == taken + new.total  # though nobody has touched it

    assert plane.settle(_layout(2), 9, 2)  # needs some of it
    assert _accounted(client) == _used(more, 9)
    assert list(plane.commit_ahead({DEVICE: _slots(_layout(3))}, 2)) != []
    assert _accounted(client) == _used(_layout(3), 9)  # the rest is of no use now
    assert _in_memory(client) == taken + (_used(_layout(3), 9)[WEIGHTS_ARENA] - before[WEIGHTS_ARENA]).total


def test_only_memory_that_nobody_needs_is_made_ready(monkeypatch):
    monkeypatch.setattr("anchortp.engine.plane.AHEAD_BYTES", PAGE_BYTES)
    layout, more = _layout(1), _layout(4)
    client = _Client(sum(pages.total for pages in _used(layout, WANTED).values()))
    plane, ahead = _plane(client), {DEVICE: _slots(more)}
    full = Reserve(epoch=1, ticket=1, staged=layout, num_kv_blocks=WANTED, fresh=(DEVICE,))
    assert plane.reserve(full) == "" and list(plane.commit_ahead(ahead, 1)) == []  # the cache has it all
    assert plane.settle(layout, WANTED - 300, 2)
    room = client.memory.budget_bytes - client.memory.committed_bytes
    pieces = [done[DEVICE] for done in plane.commit_ahead(ahead, 2)]
    assert 0 < IntervalSet(r for piece in pieces for r in piece).total <= room
    client.memory.validate()

    # Behind the steps, a worker may just have been mapping what is given back, and so have taken it again.
    behind = Reserve(epoch=2, ticket=2, staged=layout, num_kv_blocks=WANTED, fresh=(), background=True)
    assert plane.reserve(behind) == "" and _accounted(client) == _used(layout, WANTED)
    taken = _in_memory(client)
    client.memory.arena(WEIGHTS_ARENA).allocate(*pieces[0][0])
    assert _in_memory(client) > taken
    assert plane.settle(layout, WANTED, 3)
    assert _in_memory(client) == taken


def test_the_other_devices_memory_is_made_ready_though_one_anchor_goes_away(monkeypatch):
    other, gone = "cpu:1", []
    clients = {name: _Client(1 << 24, name) for name in (DEVICE, other)}
    plane = _plane(clients[DEVICE])
    plane._clients[other] = clients[other]
    monkeypatch.setattr(plane, "_give_up", plane._clients.pop)
    monkeypatch.setattr(plane, "_on_gone", gone.append)
    (shard,) = _layout(1).shards
    both = Layout(shards=(shard, replace(shard, device=other)))
    assert plane.reserve(Reserve(epoch=1, ticket=1, staged=both, num_kv_blocks=9, fresh=(DEVICE, other))) == ""

    def ended(name, ranges, epoch):
        raise ChannelClosed("its end")

    monkeypatch.setattr(clients[DEVICE], "commit_now", ended)
    done = list(plane.commit_ahead(dict.fromkeys((DEVICE, other), _slots(_layout(4))), 1))
    assert gone == [DEVICE] and done and all(set(pieces) == {other} for pieces in done)
    assert plane.ready_bytes(other) == IntervalSet(r for pieces in done for r in pieces[other]).total > 0


def _layout(num_experts: int) -> Layout:
    (shard,) = initial_layout(UNITS, (DEVICE,)).shards
    return Layout(shards=(shard.replaced(EXPERT, range(num_experts)),))


def _in_memory(client: _Client) -> int:
    return client.memory.arena(WEIGHTS_ARENA).committed_bytes()


def _slots(layout: Layout) -> Counter[str]:
    return Counter({family: len(layout.shards[0][family]) for family in UNITS.families})


def _total(layout: Layout) -> int:
    return sum(len(layout.shards[0][family]) for family in UNITS.families)


def _accounted(client: _Client) -> dict[str, IntervalSet]:
    return {info.name: IntervalSet(info.ranges) for info in client.memory.infos()}
