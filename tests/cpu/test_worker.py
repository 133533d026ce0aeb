"""What a worker answers, without a process around it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from anchortp.arena import (
    ChunkPool,
    IntervalSet,
    MemfdArena,
    PinnedMapping,
    VmmArena,
    VmmMapping,
    round_down,
    round_up,
)
from anchortp.arena.sim import SimVmm
from anchortp.config import load_model_config
from anchortp.devices import parse_device
from anchortp.engine import messages as m
from anchortp.engine import worker as worker_module
from anchortp.engine.accelerator import Accelerator
from anchortp.engine.faults import FaultProbe, Strike, fired_strikes
from anchortp.engine.mirror_addresses import MirrorAddresses
from anchortp.engine.worker import Worker
from anchortp.errors import ChannelClosed, ChannelTimeout
from anchortp.layout import KV, KVAddresses, WeightAddresses, empty_shard, model_units
from anchortp.model import TorchKernels
from anchortp.state import wire
from anchortp.transfer.work import Geometry
from tests.tiny_model import write_model


class Channel:
    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


class Anchor:
    """One that is gone or stuck."""

    def __init__(self, error=None):
        self.error, self.closed = error, False

    def lease(self, epoch):
        raise self.error

    def close(self):
        self.closed = True


def worker_of(anchor: Anchor) -> tuple[Worker, Channel]:
    channel = Channel()
    worker = Worker(channel)
    probe = FaultProbe((), "/nowhere", lambda kind: None)
    accelerator = Accelerator.of(parse_device("cpu:0"))
    parts = {"device": "cpu:0", "anchor": anchor, "probe": probe, "accelerator": accelerator, "stream": None}
    worker._assignment = SimpleNamespace(**parts)
    return worker, channel


def test_memory_that_was_never_mapped_is_not_handed_over():
    """A spare that has only just taken over holds no descriptor of what its anchor owned."""
    anchor = Anchor()
    worker, channel = worker_of(anchor)
    worker._hand_over(m.HandOver(epoch=4, ranges={"weights": [(0, 4096)], "kv": []}))
    (answer,) = channel.sent
    assert not answer.ok and "weights, kv" in answer.reason
    assert anchor.closed


@pytest.mark.parametrize("error", [ChannelClosed("gone"), ChannelTimeout("stuck")])
def test_a_worker_leaves_an_epoch_without_its_anchor(error):
    worker, channel = worker_of(Anchor(error))
    worker._leave(m.LeaveEpoch(epoch=7))
    assert channel.sent == [m.EpochLeft(epoch=7)]


def test_a_strike_fires_at_its_passage_and_once_per_runtime_directory(tmp_path):
    class Struck(Exception):
        pass

    def strike(kind):
        raise Struck(kind)

    strikes = (Strike(device="cpu:0", point="decode", nth=3, kind="crash"),)
    probe = FaultProbe(strikes, str(tmp_path), strike)
    assert probe
    for point in ("decode", "prefill", "decode", "prefill", "prefill"):
        probe.at(point)
    assert fired_strikes(tmp_path) == []
    with pytest.raises(Struck, match="crash"):
        probe.at("decode")
    (fired,) = fired_strikes(tmp_path)
    assert fired["strike"] == "cpu:0 decode 3 crash"
    assert not FaultProbe(strikes, str(tmp_path), strike)


def test_a_spare_is_ready_when_its_models_kernels_are_compiled_on_every_gpu(tmp_path, monkeypatch):
    """A compiler in the first step after a recovery would hold it up."""
    config = load_model_config(write_model(tmp_path / "model"))
    done = []

    def gpu(device):
        return SimpleNamespace(
            placing=contextlib.nullcontext,
            synchronize=lambda: done.append(device.index),
            fused=lambda config: done.append((device.index, config)),
        )

    monkeypatch.setattr(worker_module.Accelerator, "of", gpu)
    monkeypatch.setattr(worker_module.signal, "signal", lambda *_: None)
    for fused in (None, config):
        ours, theirs = socket.socketpair()
        sender, receiver = wire.Channel(ours, m.FromWorker), wire.Channel(theirs, m.ToZygote)
        sender.send(m.ForkSpare(gpus=(0, 3), fused=fused))
        order = receiver.recv(1.0).message
        done.clear()
        ours.shutdown(socket.SHUT_WR)
        worker_module.worker_main(theirs, order)
        assert sender.recv(1.0).message == m.SpareReady(pid=os.getpid())
        assert done == ([0, 3] if fused is None else [(0, config), 0, (3, config), 3])
        ours.close()


def test_a_worker_has_the_kernels_of_its_order():
    made = []
    accelerator = SimpleNamespace(fused=lambda config: made.append(config) or "fused")
    assert type(worker_module._kernels(SimpleNamespace(kernels="", triton=False), "model", accelerator)) is TorchKernels
    assert worker_module._kernels(SimpleNamespace(kernels="", triton=True), "model", accelerator) == "fused"
    assert made == ["model"]


def test_expert_load_goes_along_every_so_often(monkeypatch):
    worker, _ = worker_of(Anchor())
    now_s = 100.0
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: now_s)
    taken = iter([b"first", b"second"])
    decoder = SimpleNamespace(moe=SimpleNamespace(take_load=lambda: next(taken)))
    assert [worker._expert_load(decoder) for _ in range(3)] == [b"first", b"", b""]
    now_s += worker_module.EXPERT_LOAD_EVERY_S
    assert [worker._expert_load(decoder) for _ in range(2)] == [b"second", b""]
    assert worker._expert_load(SimpleNamespace(moe=None)) == b""


def test_pages_of_the_blocks_that_will_come_are_made_ready_and_no_others(tmp_path):
    config = load_model_config(write_model(tmp_path / "model"))
    kv = KVAddresses(config=config, block_size=1024, num_blocks=8)
    blocks, before, after = [1, 2, 5], empty_shard("cpu:0"), empty_shard("cpu:0").appended(KV, [1])
    with MemfdArena.create("kv", kv.reserved_bytes) as arena:
        worker, _ = worker_of(Anchor())
        worker._assignment.kv = kv
        worker._refreshed.add("kv")
        worker._arenas["kv"] = (arena, torch.frombuffer(arena.map(), dtype=torch.uint8))
        step = worker._pages_ahead(before, after, blocks, 2)
        step()
        assert arena.committed_bytes() > 0
        step()
        wanted = IntervalSet(
            (round_down(start), round_up(stop))
            for block in blocks
            for start, stop in kv.slot_ranges(0, 1, block, block + 1)
        )
        assert arena.committed_ranges() == list(wanted)
        worker._pages_ahead(after, after, blocks, 2)()
        assert arena.committed_ranges() == list(wanted), "no plane is new"
        assert not torch.frombuffer(arena.map(), dtype=torch.uint8).any()


def test_a_load_tells_the_worker_what_it_meets(monkeypatch, tmp_path):
    """A device that fails in the load's threads would otherwise be a load that failed, which ends the service."""
    hooks = []

    def load(geometry, chunks, destination, given, **options):
        hooks.append(given)
        return SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(worker_module, "Load", load)
    addresses = WeightAddresses(units=model_units(load_model_config(write_model(tmp_path / "model"))))
    with MemfdArena.create("weights", addresses.reserved_bytes) as arena:
        worker, _ = worker_of(Anchor())
        worker._assignment.geometry = Geometry(addresses)
        worker._refreshed.add("weights")
        worker._arenas["weights"] = (arena, torch.frombuffer(arena.map(), dtype=torch.uint8))
        worker._start_load(m.LoadUnits(epoch=-1, before={}, after={KV: [0]}, fresh=False))
    assert [given.on_error for given in hooks] == [worker._load_met]


def test_a_save_is_answered_when_its_copies_are_made(monkeypatch):
    """On a GPU they are made behind the steps; here two marks say how far it has got."""
    done = {"first": False, "second": False}
    names = iter(done)
    worker, channel = worker_of(Anchor(ChannelClosed("gone")))

    def mark():
        name = next(names)
        return lambda: done[name]

    worker._assignment.accelerator = SimpleNamespace(mark=mark, synchronize=lambda: done.update(second=True))
    monkeypatch.setattr(worker, "_mirror", lambda mirror_id, pairs: "mirror")
    monkeypatch.setattr(worker, "_blocks", lambda heads: SimpleNamespace(save=lambda mirror, pairs, heads: None))
    for ticket in (1, 2):
        worker._save_blocks(m.SaveBlocks(epoch=-1, ticket=ticket, heads=[0], pairs=[(3, 0)], mirror_id="one"))
    assert channel.sent == []
    done["first"] = True
    worker._answer_saves()
    assert channel.sent == [m.BlocksSaved(ticket=1, ok=True)]
    worker._leave(m.LeaveEpoch(epoch=7))
    assert channel.sent[1:] == [m.BlocksSaved(ticket=2, ok=True), m.EpochLeft(epoch=7)]


def test_a_worker_with_saves_under_way_does_not_wait_for_a_message_to_answer_them(monkeypatch):
    monkeypatch.setattr(worker_module, "SAVE_POLL_S", 0.0)
    reached, timeouts = iter([False, False, True]), []

    class Silent(Channel):
        def recv(self, timeout_s):
            timeouts.append(timeout_s)
            if self.sent:
                raise ChannelClosed("the end")
            raise ChannelTimeout("silence")

    channel = Silent()
    worker = Worker(channel)
    worker._saves.append((5, lambda: next(reached)))
    with pytest.raises(ChannelClosed):
        worker.serve()
    assert channel.sent == [m.BlocksSaved(ticket=5, ok=True)]
    assert timeouts == [0.0, 0.0, worker_module.IDLE_TIMEOUT_S]


def test_the_mirror_is_pinned_where_a_device_has_memory_of_its_own(monkeypatch, tmp_path):
    """Slots are registered before they are used, and no others; another host anchor's arena is another mapping."""
    config = load_model_config(write_model(tmp_path / "model"))
    kv = KVAddresses(config=config, block_size=1024, num_blocks=8)
    slots = MirrorAddresses(kv=kv, num_slots=64)
    monkeypatch.setattr(PinnedMapping.__init__, "__kwdefaults__", {"window_bytes": slots.slot_bytes})
    worker, _ = worker_of(Anchor())
    worker._assignment.kv = kv
    driver = SimVmm()
    worker._assignment.accelerator = Accelerator(torch_device=None, open_driver=lambda: driver)
    with MemfdArena.create("kv-mirror", slots.reserved_bytes) as arena:
        monkeypatch.setattr(worker, "_open", lambda *_: contextlib.nullcontext(arena))
        memory = worker._mirror("one", [(7, 2), (5, 40)])
        base = memory.data_ptr()
        assert {(at - base) // slots.slot_bytes for at in driver.pinned} == {2, 40}
        assert worker._mirror("one", [(7, 2)]) is memory
        del memory
        worker._mirror("two", [(1, 3)])
        assert len(driver.pinned) == 1
        worker._mapped_mirror = None
        assert driver.pinned == {}


def test_a_step_whose_weights_are_on_their_way_is_computed_without_graphs(monkeypatch):
    """And so is one that the graphs do not take; the batch for graphs is made in host memory, the other's where it is
    computed."""
    worker, _ = worker_of(Anchor())
    placed = []

    @contextlib.contextmanager
    def placing():
        placed.append(True)
        yield
        placed.pop()

    worker._assignment.accelerator = SimpleNamespace(placing=placing)
    worker._assignment.order = SimpleNamespace(kv_block_size=16)
    worker._group = "group"
    worker._graphs = SimpleNamespace(takes=lambda seqs: seqs == ["one"], forward=lambda batch, group: ("graphs", batch))
    worker._decoder = SimpleNamespace(forward=lambda batch, group, gate: ("plain", batch, gate))
    batch_of = SimpleNamespace(build=lambda seqs, block_size: (*seqs, "on device" if placed else "in host memory"))
    monkeypatch.setattr(worker_module, "ForwardBatch", batch_of)
    assert worker._forward(["one"], None) == ("graphs", ("one", "in host memory"))
    assert worker._forward(["other"], None) == ("plain", ("other", "on device"), None)
    assert worker._forward(["one"], "gate") == ("plain", ("one", "on device"), "gate")
    worker._graphs = None
    assert worker._forward(["one"], None) == ("plain", ("one", "on device"), None)


class _WatchfulVmm(SimVmm):
    """Waiting for the device, as a mapping does that goes, would void a capture: nobody may be in one."""

    alone: threading.Lock
    num_waits = 0

    def synchronize(self):
        assert self.alone.locked()
        self.num_waits += 1


def test_the_mapping_of_a_source_goes_as_it_is_closed_and_not_during_a_capture(monkeypatch):
    """A load closes its sources on a thread of its own, while steps are captured."""
    driver = _WatchfulVmm()
    page = driver.granule_bytes
    pool = ChunkPool(driver)
    arena = VmmArena(name="weights", reserved_bytes=4 * page, pool=pool)
    arena.commit([(0, 2 * page)])
    mapping = VmmMapping(name="weights", reserved_bytes=4 * page, open_driver=lambda: driver)
    chunks = arena.newer(0, 9)
    mapping.attach(chunks, [arena.export(offset) for offset, _ in chunks])
    seen = weakref.ref(mapping)
    opened = [mapping]
    del mapping
    client = SimpleNamespace(
        open_arena=lambda name, epoch: opened.pop(), refresh=lambda *_: None, is_gone=lambda: False, close=lambda: None
    )
    monkeypatch.setattr(worker_module.AnchorClient, "connect", lambda *_, **__: client)
    worker, _ = worker_of(Anchor())
    accelerator = Accelerator(torch_device=None, open_driver=lambda: driver)
    worker._assignment.accelerator, driver.alone = accelerator, accelerator.alone
    worker._assignment.order = SimpleNamespace(runtime_dir="/nowhere")
    source = worker._source("sim:0/1")
    assert seen() is not None and driver.num_waits == 0

    accelerator.alone.acquire()  # a capture
    closing = threading.Thread(target=source.close)
    closing.start()
    assert seen() is not None and driver.num_waits == 0
    accelerator.alone.release()
    closing.join(20.0)
    assert not closing.is_alive()
    assert seen() is None and driver.num_waits == 1
    arena.close()
    pool.close()


@pytest.mark.parametrize("step", ["open_arena", "refresh", "PeerSource"])
def test_a_source_that_cannot_be_opened_leaves_nothing_open(monkeypatch, step):
    def fail(*_, **__):
        raise OSError(step)

    closed, arena = [], MemfdArena.create("weights", 4096)
    client = SimpleNamespace(
        open_arena=lambda name, epoch: arena,
        refresh=lambda *_: None,
        is_gone=lambda: False,
        close=lambda: closed.append("client"),
    )
    monkeypatch.setattr(MemfdArena, "close", lambda arena: closed.append("arena"))
    monkeypatch.setattr(*((worker_module, step) if step == "PeerSource" else (client, step)), fail)
    monkeypatch.setattr(worker_module.AnchorClient, "connect", lambda *_, **__: client)
    worker, _ = worker_of(Anchor())
    worker._assignment.order = SimpleNamespace(runtime_dir="/nowhere")
    with pytest.raises(OSError, match=step):
        worker._source("cpu:1")
    assert closed == (["client"] if step == "open_arena" else ["arena", "client"])
    assert not worker._assignment.accelerator.alone.locked()
    monkeypatch.undo()
    arena.close()


def test_a_worker_that_forgets_its_arenas_frees_what_was_captured_over_them():
    closed = []
    worker, _ = worker_of(Anchor())
    worker._graphs = SimpleNamespace(close=lambda: closed.append(True))
    worker._forget_arenas()
    assert closed == [True] and worker._graphs is None
    worker._forget_arenas()


def test_who_captures_steps():
    assert Accelerator.of(parse_device("cpu:0")).capture() is None
    capture = Accelerator.of(parse_device("sim:0/0")).capture()
    assert capture is not None and capture(print) is print
