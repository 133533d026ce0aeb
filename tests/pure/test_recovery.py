"""The coordinator in a simulated world: random faults at random moments, every command answered exactly once."""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.engine.balancer import ExpertBalancer
from anchortp.eplb.stages import Copy, Drop, Stage
from anchortp.layout import EXPERT, KVAddresses, Layout, Shard, WeightAddresses, initial_layout, model_units
from anchortp.plan import FromPeer, Plan, plan_change
from anchortp.recovery import Coordinator, RecoveryConfig, StepDeadline, replay
from anchortp.recovery import events as ev
from anchortp.recovery.change import arrangement
from anchortp.recovery.coordinator import ARRANGING, COMPACTING, FORMING, LEAVING, LOADING, REFUSING, RESTORING, SERVING
from anchortp.recovery.devices import slots_after_a_loss
from anchortp.recovery.events import KVState
from tests.pure.test_layout_and_shrink import devices, make_config, make_moe

UNITS = model_units(make_config(kv_heads=3, group=3))
CONFIG = RecoveryConfig(kv_block_size=16, kv_blocks=64, min_kv_blocks=8)
PLENTY = 1 << 30


class World:
    """A shell without IO. `anchors` and `workers` are what is alive; `inflight` the answers still to be given."""

    def __init__(self, names=devices(4), budget=PLENTY, units=UNITS, config=CONFIG, shards=None, num_kv_blocks=0):
        self.units = units
        self.anchors = set(names)
        self.workers: set[str] = set()
        self.unkillable: set[str] = set()
        self.inflight: deque[ev.Event] = deque()
        self.now = 100.0
        self.coordinator = Coordinator(units, config)
        self.orders: dict[int, ev.Load] = {}
        self.changes = 0
        self.commands: list[ev.Command] = []
        self.resumed: list[ev.Resume] = []
        self.fresh_loads = 0
        # What really lies in each slot, by device and family; a slot that is being written holds None.
        self.memory: dict[str, dict[str, dict[int, int | None]]] = {}
        self.serving: Layout | None = None
        for name in names:
            self.wipe(name)
            for family in units.families:
                self.memory[name][family] |= dict(enumerate(((shards or {}).get(name) or {family: ()})[family]))
        found = tuple(
            ev.DeviceFound(device=name, budget_bytes=budget, shard=(shards or {}).get(name)) for name in names
        )
        self.give(ev.Start(devices=found, epoch=1, num_kv_blocks=num_kv_blocks))

    def wipe(self, device: str) -> None:
        self.memory[device] = {family: {} for family in self.units.families}

    def load(self, command: ev.Load) -> ev.Loaded:
        """Marks the slots as half written; they are filled when the answer is given."""
        device, target = command.device, self.memory[command.device]
        families = self.units.families
        slots = {(f, i) for f in families for i in range(len(command.before[f]), len(command.after[f]))}
        moved = {(m.family, m.slot + i) for m in command.moves if m.family in families for i in range(m.num_units)}
        assert slots == moved, "the moves do not fill what the shard grows by"
        if self.serving is not None and device in self.serving.devices and command.background:
            in_use = {(f, i) for f in self.units.families for i in range(len(self.serving[device][f]))}
            assert not slots & in_use, "a slot in use is overwritten"
        for family, slot in slots:
            target[family][slot] = None
        for move in command.moves:
            if isinstance(move.source, FromPeer) and move.family in self.units.families:
                held = self.memory[move.source.device][move.family]
                found = [held[move.source.slot + i] for i in range(move.num_units)]
                assert found == list(range(move.unit, move.unit + move.num_units)), "the peer has something else there"
        self.fresh_loads += command.fresh
        peer = sum(m.num_bytes for m in command.moves if isinstance(m.source, FromPeer))
        num_bytes = sum(m.num_bytes for m in command.moves if m.family in self.units.families)
        num_bytes += command.fresh * self.units.replicated_bytes
        self.orders[command.ticket] = command
        return ev.Loaded(device=device, ticket=command.ticket, num_bytes=num_bytes, peer_bytes=peer)

    def fill(self, ticket: int) -> None:
        command = self.orders[ticket]
        for family in self.units.families:
            for slot in range(len(command.before[family]), len(command.after[family])):
                self.memory[command.device][family][slot] = command.after[family][slot]

    def arrange(self, device: str, before: Shard, after: Shard) -> None:
        for family, source, target in arrangement(before, after):
            self.memory[device][family][target] = self.memory[device][family][source]
        for family in self.units.families:
            self.memory[device][family] = {
                i: u for i, u in self.memory[device][family].items() if i < len(after[family])
            }

    def check_memory(self, layout: Layout) -> None:
        for shard in layout.shards:
            for family in self.units.families:
                held = self.memory[shard.device][family]
                assert tuple(held.get(i) for i in range(len(shard[family]))) == shard[family], shard.device

    def give(self, event: ev.Event) -> None:
        self.now += 0.001
        if isinstance(event, ev.Loaded):
            self.fill(event.ticket)
        for command in self.coordinator.handle(event, self.now):
            self.commands.append(command)
            self._perform(command)

    def _perform(self, command: ev.Command) -> None:
        answer: ev.Event | None = None
        match command:
            case ev.Fence(device=device) if device in self.unkillable:
                pass
            case ev.Fence(device=device):
                self.workers.discard(device)
                answer = ev.WorkerGone(device=device, reason="fenced")
            case ev.Leave(device=device) if device in self.unkillable:
                pass
            case ev.Leave(device=device, epoch=epoch):
                self.inflight = deque(a for a in self.inflight if not _is_load_of(a, device))
                answer = ev.Left(device=device, epoch=epoch)
            case ev.TakeCensus(epoch=epoch, devices=names):
                alive = tuple(name for name in names if name in self.anchors)
                answer = ev.CensusTaken(epoch=epoch, alive=alive)
            case ev.Adopt(device=device):
                ok = device in self.workers
                if ok:
                    self.anchors.add(device)
                answer = ev.Adopted(device=device, ok=ok, reason="" if ok else "no worker")
            case ev.Attach(device=device, epoch=epoch):
                self.workers.add(device)
                answer = ev.Attached(device=device, epoch=epoch)
            case ev.Reserve(epoch=epoch, ticket=ticket, fresh=fresh):
                for device in fresh:
                    self.wipe(device)
                answer = ev.Reserved(epoch=epoch, ticket=ticket)
            case ev.Load():
                answer = self.load(command)
            case ev.CancelLoad(ticket=ticket):
                self.inflight = deque(a for a in self.inflight if getattr(a, "ticket", None) != ticket)
            case ev.Arrange(device=device, epoch=epoch, before=before, after=after):
                self.arrange(device, before, after)
                answer = ev.Arranged(device=device, epoch=epoch)
            case ev.Compact(epoch=epoch, devices=names):
                for device in names:
                    self.inflight.append(ev.Compacted(device=device, epoch=epoch))
            case ev.Restore(device=device, epoch=epoch, planes=planes, layout=layout):
                assert {p.head for p in planes} <= set(layout[device]["kv"])
                copied = sum(p.device is not None for p in planes)
                answer = ev.Restored(
                    device=device, epoch=epoch, ok=True, copied_bytes=copied, restored_bytes=len(planes) - copied
                )
            case ev.Form(epoch=epoch, layout=layout):
                layout.check(self.units)
                for device in layout.devices:
                    self.inflight.append(ev.Formed(device=device, epoch=epoch))
            case ev.Record(layout=layout):
                self.check_memory(layout)
                self.serving = layout
            case ev.Resume():
                self.resumed.append(command)
            case ev.Drop(device=device):
                self.anchors.discard(device)
                self.workers.discard(device)
                self.unkillable.discard(device)
        if answer is not None:
            self.inflight.append(answer)

    def answer_one(self, rng: random.Random | None = None) -> None:
        """Gives one outstanding answer; each process answers in order, different ones in any order."""
        index = rng.randrange(len(self.inflight)) if rng else 0
        first = next(i for i, a in enumerate(self.inflight) if _who(a) == _who(self.inflight[index]))
        event = self.inflight[first]
        del self.inflight[first]
        who = _who(event)
        if who in devices(16) and who not in self.workers and not isinstance(event, ev.WorkerGone | ev.Adopted):
            return  # the process that would have answered is dead
        self.give(event)

    def step(self, rng: random.Random | None = None) -> None:
        """One thing that can happen next, if there is any."""
        if self.coordinator.wants_switch and not (self.inflight and rng and rng.random() < 0.5):
            self.give(ev.Switch())
        elif self.inflight:
            self.answer_one(rng)

    def settle(self, rng: random.Random | None = None, switch: bool = True) -> None:
        for _ in range(10_000):
            if self.inflight or (switch and self.coordinator.wants_switch):
                self.step(rng) if switch else self.answer_one(rng)
            elif self.unkillable and self.coordinator.deadline_s is not None:
                self.now = max(self.now, self.coordinator.deadline_s)
                self.give(ev.Tick())
            else:
                break
        assert not self.inflight
        assert self.coordinator.phase in (SERVING, REFUSING), self.coordinator.phase

    def crash(self, device: str) -> None:
        if device in self.workers:
            self.workers.discard(device)
            self.unkillable.discard(device)
            self.give(ev.WorkerGone(device=device, reason="killed by SIGKILL"))

    def lose(self, device: str) -> None:
        self.anchors.discard(device)
        self.crash(device)
        self.give(ev.AnchorGone(device=device))

    def kill_anchor(self, device: str) -> None:
        self.anchors.discard(device)
        self.give(ev.AnchorGone(device=device))

    def hang(self, device: str) -> None:
        self.give(ev.WorkerHung(device=device, reason="no answer"))

    def stick(self, device: str) -> None:
        """It hangs where no SIGKILL ends it, until its device is dropped."""
        if device in self.workers:
            self.unkillable.add(device)
            self.hang(device)


def _is_load_of(event: ev.Event, device: str) -> bool:
    return isinstance(event, ev.Loaded | ev.LoadFailed) and event.device == device


def _who(event: ev.Event) -> str:
    return getattr(event, "device", "shell")


def of_kind(commands, kind):
    return [command for command in commands if isinstance(command, kind)]


def serving(**options) -> World:
    world = World(**options)
    world.settle()
    assert world.coordinator.phase == SERVING
    world.commands.clear()
    return world


def test_cold_start_loads_everything_once():
    world = serving()
    episode = world.coordinator.episodes[0]
    assert world.coordinator.layout == initial_layout(UNITS, devices(4))
    assert world.fresh_loads == 4
    held = sum(world.coordinator.layout.weight_bytes(UNITS, d) for d in devices(4))
    assert episode.loaded_bytes == held
    assert episode.lost_bytes == 0 and episode.outcome == "serving"
    assert world.resumed == [ev.Resume(epoch=1, kv=KVState.lost, num_kv_blocks=64)]


def test_device_lost_shrinks_and_loads_what_was_lost():
    world = serving()
    world.lose("cpu:2")
    world.settle()
    episode = world.coordinator.episodes[-1]
    assert episode.devices_lost == ["cpu:2"]
    assert world.coordinator.layout.devices == ("cpu:0", "cpu:1", "cpu:3")
    assert episode.loaded_bytes == episode.lost_bytes + episode.replica_bytes > 0
    assert episode.copied_bytes == 0
    kinds = [type(command) for command in world.commands]
    order = [ev.Abort, ev.Leave, ev.TakeCensus, ev.Drop, ev.Reserve, ev.Load, ev.Form, ev.Resume, ev.Record]
    assert [kind for kind in sorted(set(kinds), key=kinds.index) if kind is not ev.Restore] == order
    assert not of_kind(world.commands, ev.Attach)


def test_worker_crash_attaches_a_spare_and_loads_nothing():
    world = serving()
    before = world.coordinator.layout
    world.crash("cpu:1")
    world.settle()
    assert world.coordinator.layout == before
    assert not of_kind(world.commands, ev.Load) and not of_kind(world.commands, ev.Reserve)
    assert of_kind(world.commands, ev.Attach) == [ev.Attach(device="cpu:1", epoch=2)]
    assert world.resumed[-1] == ev.Resume(epoch=2, kv=KVState.whole, num_kv_blocks=64)
    assert world.coordinator.episodes[-1].workers_replaced == ["cpu:1"]
    assert world.coordinator.episodes[-1].loaded_bytes == 0


def test_hang_is_fenced_and_then_a_crash():
    world = serving()
    world.hang("cpu:3")
    world.settle()
    assert isinstance(world.commands[0], ev.Fence) and world.commands[0].device == "cpu:3"
    assert world.resumed[-1].kv is KVState.whole and not of_kind(world.commands, ev.Load)
    assert "hangs" in world.coordinator.episodes[-1].cause


def test_faults_are_counted_and_changes_and_the_start_are_not():
    world = serving(names=devices(5))
    assert world.coordinator.num_faults == 0
    strikes = [lambda: world.crash("cpu:1"), lambda: world.hang("cpu:3"), lambda: world.lose("cpu:2")]
    for done, strike in enumerate(strikes, start=1):
        strike()
        world.settle()
        assert world.coordinator.num_faults == done
    world.crash("cpu:1")
    world.lose("cpu:4")  # in the middle of that recovery, a part of it
    change(world, remove=("cpu:0",))
    world.settle()
    assert world.coordinator.num_faults == 4 and world.coordinator.members == ("cpu:1", "cpu:3")


def test_anchor_crash_does_not_stop_serving():
    world = serving()
    world.kill_anchor("cpu:0")
    assert world.coordinator.phase == SERVING and world.coordinator.epoch == 1
    world.settle()
    assert world.coordinator.snapshot()["cpu:0"]["has_anchor"]
    world.crash("cpu:0")
    world.settle()
    assert world.coordinator.layout.devices == devices(4)


def test_anchor_and_worker_gone_is_a_loss_even_far_apart():
    world = serving()
    world.kill_anchor("cpu:0")
    world.inflight.clear()  # the new anchor never comes
    world.workers.discard("cpu:0")
    world.give(ev.WorkerGone(device="cpu:0", reason="killed"))
    world.settle()
    assert world.coordinator.episodes[-1].devices_lost == ["cpu:0"]


@pytest.mark.parametrize(("phase", "pipelined"), [(LEAVING, True), (LOADING, False), (FORMING, True), (SERVING, True)])
def test_second_loss_in_every_phase_raises_the_epoch_and_counts_each_byte_once(phase, pipelined):
    world = serving(config=replace(CONFIG, pipelined=pipelined))
    world.lose("cpu:2")
    late = hold_back_loads(world) if phase == SERVING else deque()
    while world.coordinator.phase != phase:
        world.answer_one()
    world.inflight += late
    if phase in (LOADING, SERVING):
        assert not world.coordinator.is_whole
        world.answer_one()  # one survivor has loaded, the others have not
    epoch = world.coordinator.epoch
    world.lose("cpu:3")
    world.settle()
    coordinator, episode = world.coordinator, world.coordinator.episodes[-1]
    told = coordinator.episodes[1:]
    assert len(told) == (2 if phase == SERVING else 1), "one story for both faults, unless the engine served between"
    assert coordinator.epoch > epoch or phase == LEAVING
    assert coordinator.layout.devices == ("cpu:0", "cpu:1")
    assert sorted(name for e in told for name in e.devices_lost) == ["cpu:2", "cpu:3"]
    # Loads that were on their way when the second fault struck, and whose target died, were not counted.
    assert episode.loaded_bytes + episode.copied_bytes == episode.lost_bytes + episode.replica_bytes or len(told) == 2


def test_answers_of_an_old_epoch_are_dropped():
    world = serving()
    world.give(ev.Formed(device="cpu:1", epoch=0))
    world.give(ev.Left(device="cpu:1", epoch=0))
    world.give(ev.CensusTaken(epoch=0, alive=()))
    world.give(ev.Reserved(epoch=0, ticket=0, refused="old"))
    assert world.coordinator.phase == SERVING and not world.commands


def test_memory_that_is_not_there_when_the_group_forms_is_refused_with_the_reason():
    """A GPU may have less than its budget says: others use it too."""
    world = serving()
    world.lose("cpu:1")
    while world.coordinator.phase != FORMING:
        world.answer_one()
    (form,) = of_kind(world.commands, ev.Form)
    world.give(ev.Reserved(epoch=form.epoch, ticket=form.ticket, refused="2 more blocks do not fit"))
    assert world.coordinator.phase == REFUSING
    assert "2 more blocks" in world.coordinator.episodes[-1].outcome


def test_too_little_memory_shrinks_the_kv_cache_first_and_then_refuses():
    units = model_units(make_config(kv_heads=3, group=3, hidden=2048))  # so wide that page rounding is small
    addresses = WeightAddresses(units=units)
    config = replace(CONFIG, kv_blocks=512)
    kv = KVAddresses(config=units.config, block_size=16, num_blocks=512)
    # Room for all the KV that is wanted at degree 4, for some of it at 2, and not for the weights at 1.
    weights = addresses.committed_bytes(initial_layout(units, devices(2)).shards[0])
    budget = int(1.15 * weights) + int(1.3 * 512) * kv.block_bytes
    assert budget < addresses.committed_bytes(initial_layout(units, devices(1)).shards[0])
    world = serving(units=units, config=config, budget=budget)
    blocks = [world.coordinator.num_kv_blocks]
    for device in ("cpu:0", "cpu:1"):
        world.lose(device)
        world.settle()
        assert world.coordinator.phase == SERVING
        assert world.resumed[-1].num_kv_blocks == world.coordinator.num_kv_blocks
        blocks.append(world.coordinator.num_kv_blocks)
    assert 512 == blocks[0] > blocks[2] >= CONFIG.min_kv_blocks
    held = world.coordinator.layout.without(["cpu:2"])
    world.lose("cpu:2")
    world.settle()
    assert world.coordinator.phase == REFUSING
    assert re.search(r"cpu:3 would hold .* bytes\) of weights, its budget is .* bytes\)", world.commands[-1].reason)
    assert world.coordinator.layout == held, "the state is kept"


def test_last_device_lost_is_refused_clearly():
    world = serving(names=devices(1))
    world.lose("cpu:0")
    world.settle()
    assert world.coordinator.phase == REFUSING and "no device is left" in world.commands[-1].reason


def hold_back_loads(world: World) -> deque[ev.Event]:
    """Runs until loads were ordered, and takes their answers away."""
    while world.coordinator.is_whole:
        world.answer_one()
    loads = deque(a for a in world.inflight if isinstance(a, ev.Loaded))
    world.inflight = deque(a for a in world.inflight if not isinstance(a, ev.Loaded))
    return loads


def failed(load: ev.Loaded, source: str = "") -> ev.LoadFailed:
    return ev.LoadFailed(device=load.device, ticket=load.ticket, reason="file is short", source=source)


def test_checkpoint_that_cannot_be_read_is_refused_and_the_state_kept():
    world = serving()
    world.lose("cpu:2")
    load = hold_back_loads(world)[0]
    world.settle()
    held = world.coordinator.layout
    world.give(failed(load))
    assert world.coordinator.phase == REFUSING and "file is short" in world.commands[-1].reason
    assert world.coordinator.layout == held


def test_silence_is_fenced_at_the_deadline():
    world = serving()
    world.crash("cpu:1")
    world.inflight = deque(a for a in world.inflight if _who(a) != "cpu:3")  # cpu:3 never leaves
    while world.inflight:
        world.answer_one()
    assert world.coordinator.phase == LEAVING and world.coordinator.deadline_s is not None
    world.give(ev.Tick())
    assert not of_kind(world.commands, ev.Fence), "not before the deadline"
    world.now = world.coordinator.deadline_s
    world.give(ev.Tick())
    assert [c.device for c in of_kind(world.commands, ev.Fence)] == ["cpu:3"]
    world.settle()
    assert world.coordinator.phase == SERVING and world.coordinator.layout.devices == devices(4)


def wait(world: World, seconds: float) -> None:
    """The clock goes on, and ticks whenever the coordinator wants to be asked."""
    end = world.now + seconds
    while (due := world.coordinator.deadline_s) is not None and due <= end:
        world.now = max(world.now, due)
        world.give(ev.Tick())
        while world.inflight:
            world.answer_one()
    world.now = end


def test_a_worker_that_sigkill_does_not_end_takes_its_device_with_it():
    world = serving()
    world.unkillable.add("cpu:3")
    world.hang("cpu:3")
    assert world.coordinator.phase == SERVING, "its end is what dissolves the group"
    wait(world, CONFIG.fence_timeout_s - 1)
    assert "cpu:3" in world.coordinator.members, "not before the bound"
    wait(world, 2)
    episode = world.coordinator.episodes[-1]
    assert world.coordinator.phase == SERVING and world.coordinator.layout.devices == devices(3)
    assert episode.devices_lost == ["cpu:3"] and episode.loaded_bytes == episode.lost_bytes + episode.replica_bytes > 0
    assert episode.cause == "worker of cpu:3 hangs: no answer"
    (said,) = [line.text for line in episode.lines if "SIGKILL" in line.text]
    assert said == "cpu:3 is lost: its worker has not ended 20.0 s after SIGKILL and may still write to it"
    assert [c.device for c in of_kind(world.commands, ev.Drop)] == ["cpu:3"]
    world.commands.clear()
    world.give(ev.WorkerGone(device="cpu:3", reason="at last"))
    assert not world.commands and world.coordinator.phase == SERVING


def test_a_worker_that_neither_leaves_nor_ends_holds_up_a_recovery_no_longer_than_the_bounds():
    world = serving()
    world.unkillable.add("cpu:3")
    world.crash("cpu:1")
    while world.inflight:
        world.answer_one()
    assert world.coordinator.phase == LEAVING
    wait(world, CONFIG.leave_timeout_s + CONFIG.fence_timeout_s + 1)
    assert world.coordinator.phase == SERVING and world.coordinator.layout.devices == devices(3)
    assert world.coordinator.episodes[-1].workers_replaced == ["cpu:1"]


def test_a_fence_that_is_answered_costs_no_device():
    world = serving()
    world.hang("cpu:3")
    world.settle()
    assert world.coordinator.deadline_s is None
    wait(world, 10 * CONFIG.fence_timeout_s)
    world.give(ev.Tick())
    assert world.coordinator.layout.devices == devices(4)


def test_a_joining_worker_that_cannot_be_ended_is_turned_down_and_the_group_goes_on():
    world = serving(names=devices(5))
    change(world, add=(new_device(world, "cpu:5"),))
    world.settle(switch=False)
    world.unkillable.add("cpu:5")
    world.give(ev.Switch())  # everybody leaves the group of four, but for the new one
    while world.inflight:
        world.answer_one()
    world.crash("cpu:0")  # calls the change off while the new one is still waited for
    assert world.coordinator.phase == LEAVING
    wait(world, CONFIG.leave_timeout_s + CONFIG.fence_timeout_s + 1)
    world.settle()
    assert world.coordinator.phase == SERVING and world.coordinator.layout.devices == devices(5)
    assert [c.device for c in of_kind(world.commands, ev.Drop)] == ["cpu:5"]


def test_a_device_whose_workers_keep_dying_is_given_up():
    world = serving()
    for _ in range(20):
        if "cpu:1" not in world.coordinator.members:
            break
        world.crash("cpu:1")
        while world.inflight and "cpu:1" not in world.workers:
            world.answer_one()
    world.settle()
    assert "cpu:1" not in world.coordinator.members
    assert "in a row" in " ".join(line.text for line in world.coordinator.episodes[-1].lines)


def test_warm_attach_loads_nothing():
    layout = initial_layout(UNITS, devices(4))
    world = World(shards={shard.device: shard for shard in layout.shards})
    world.settle()
    assert world.coordinator.episodes[0].loaded_bytes == 0 and not of_kind(world.commands, ev.Load)
    assert world.resumed[-1].kv is KVState.lost


def test_warm_attach_fills_a_replaced_device_with_what_is_missing():
    layout = initial_layout(UNITS, devices(4))
    world = World(shards={shard.device: shard for shard in layout.shards if shard.device != "cpu:1"})
    world.settle()
    after = world.coordinator.layout
    after.check(UNITS)
    assert {load.device for load in of_kind(world.commands, ev.Load)} == {"cpu:1"}
    assert [after[d] for d in ("cpu:0", "cpu:2", "cpu:3")] == [layout[d] for d in ("cpu:0", "cpu:2", "cpu:3")]


def test_whole_state_on_fewer_devices_gives_way_to_the_degree_asked_for():
    layout = initial_layout(UNITS, devices(2))
    world = World(shards={shard.device: shard for shard in layout.shards})
    world.settle()
    assert world.coordinator.layout == initial_layout(UNITS, devices(4))


@settings(deadline=None, max_examples=300)
@given(st.integers(2, 9), st.integers(1, 6), st.randoms(use_true_random=False))
def test_any_faults_in_any_order_end_well(num_devices, num_faults, rng: random.Random):
    world = World(names=devices(num_devices))
    world.settle(rng)
    for _ in range(num_faults):
        for _ in range(rng.randint(0, 12)):
            if world.inflight:
                world.answer_one(rng)
        device = rng.choice(devices(num_devices))
        fault = rng.choice([world.crash, world.lose, world.kill_anchor, world.hang, world.stick])
        if fault == world.kill_anchor and device not in world.workers:
            fault = world.lose
        fault(device)
    world.settle(rng)
    coordinator = world.coordinator
    if coordinator.phase == SERVING:
        coordinator.layout.check(UNITS)
        assert set(coordinator.members) == world.workers
        assert world.resumed[-1].epoch == coordinator.epoch
        widths = [len(shard["attention"]) for shard in coordinator.layout.shards]
        assert max(widths) - min(widths) <= 1
    else:
        assert not coordinator.members, "only nobody at all is refused here"
    for episode in coordinator.episodes[1:]:
        assert episode.loaded_bytes <= episode.lost_bytes + episode.replica_bytes

    again, commands = replay(UNITS, CONFIG, coordinator.log)
    assert [c for batch in commands for c in batch] == world.commands
    assert again.episodes == coordinator.episodes and again.layout == coordinator.layout


def test_story_is_json_able_and_its_phases_add_up():
    world = serving()
    world.lose("cpu:2")
    world.settle()
    told = world.coordinator.episodes[-1].as_dict()
    assert told["bytes"]["copied"] == 0 and told["outcome"] == "serving"
    assert sum(told["phases"].values()) == pytest.approx(told["seconds"])
    assert any("nothing is passed on" in line["text"] for line in told["timeline"]), "why the plan is as it is"


def test_speeds_weigh_the_shards():
    config = replace(CONFIG, speeds={"cpu:0": 2.0})
    world = serving(config=config)
    widths = [len(shard["mlp"]) for shard in world.coordinator.layout.shards]
    assert widths[0] > max(widths[1:])


def test_step_deadline_learns_from_steps():
    deadline = StepDeadline(floor_s=1.0, first_s=60.0, factor=8.0)
    assert deadline.for_step(1) == 60.0
    for _ in range(10):
        deadline.observe(8, 0.25)
    assert deadline.for_step(8) == pytest.approx(2.0)
    deadline.observe(500, 1.0)
    assert deadline.for_step(500) == pytest.approx(8 * (0.25 + 1.0))
    for _ in range(deadline.window):
        deadline.observe(8, 0.01)
    assert deadline.for_step(8) == 1.0, "old, slow steps are forgotten, and the floor holds"


def kv_world(**options) -> World:
    """Degree 4 of 9 q heads and 3 KV heads: KV heads 1 and 2 have two holders each, KV head 0 has one."""
    world = serving(**options)
    assert [shard["kv"] for shard in world.coordinator.layout.shards] == [(0,), (1,), (1, 2), (2,)]
    return world


def test_planes_that_survive_elsewhere_are_copied_from_there():
    world = kv_world()
    world.lose("cpu:1")
    world.settle()
    (restore,) = of_kind(world.commands, ev.Restore)
    assert restore.planes == (ev.PlaneSource(head=1, device="cpu:2"),)
    assert world.resumed[-1].kv is KVState.whole
    assert world.coordinator.episodes[-1].kv_copied_bytes == 1


def test_planes_without_a_holder_come_from_the_mirror_or_are_replayed():
    for mirror, expected in ((True, KVState.mirrored), (False, KVState.lost)):
        world = kv_world(config=replace(CONFIG, kv_mirror=mirror))
        world.lose("cpu:0")
        world.settle()
        planes = [plane for restore in of_kind(world.commands, ev.Restore) for plane in restore.planes]
        assert bool(planes) == mirror and all(plane.device is None for plane in planes)
        assert world.resumed[-1].kv is expected
        world.crash("cpu:1")
        world.settle()
        assert world.resumed[-1].kv is KVState.whole, "what was replayed since is whole again"


def test_no_plane_is_restored_where_every_holder_is_left():
    world = kv_world()
    world.lose("cpu:2")
    world.settle()
    assert not of_kind(world.commands, ev.Restore) and world.resumed[-1].kv is KVState.whole


def test_a_source_that_dies_while_it_is_copied_from_is_not_believed():
    world = kv_world()
    world.lose("cpu:1")
    while world.coordinator.phase != RESTORING:
        world.answer_one()
    world.lose("cpu:2")
    world.settle()
    assert world.resumed[-1].kv is KVState.lost


def test_a_crash_while_planes_are_restored_restores_them_again():
    world = kv_world()
    world.lose("cpu:1")
    while world.coordinator.phase != RESTORING:
        world.answer_one()
    world.crash("cpu:3")
    world.settle()
    assert world.resumed[-1].kv is KVState.whole
    assert len(of_kind(world.commands, ev.Restore)) == 2


def test_a_restore_that_fails_ends_in_replay():
    world = kv_world()
    world.lose("cpu:1")
    while world.coordinator.phase != RESTORING:
        world.answer_one()
    (answer,) = of_kind(world.inflight, ev.Restored)
    world.inflight.remove(answer)
    world.give(replace(answer, ok=False))
    world.settle()
    assert world.coordinator.phase == SERVING and world.resumed[-1].kv is KVState.lost


def test_kv_left_by_an_earlier_engine_is_kept_if_it_is_whole():
    layout = initial_layout(UNITS, devices(4))
    shards = {shard.device: shard for shard in layout.shards}
    for left, expected in ((shards, KVState.whole), ({**shards, "cpu:0": None}, KVState.lost)):
        world = World(shards=left, num_kv_blocks=64)
        world.settle()
        assert world.resumed[-1].kv is expected


def small_kv_world() -> World:
    """Losing cpu:2 leaves room for fewer KV blocks, though every plane of it survives elsewhere."""
    units = model_units(make_config(kv_heads=3, group=3, hidden=2048))
    kv = KVAddresses(config=units.config, block_size=16, num_blocks=256)
    fullest = initial_layout(units, devices(4)).shards[2]  # two KV heads
    rounding = 2 * 4 * 4096 * units.config.num_layers
    budget = WeightAddresses(units=units).committed_bytes(fullest) + 2 * 256 * kv.block_bytes + rounding
    return kv_world(units=units, config=replace(CONFIG, kv_blocks=256), budget=budget)


def test_a_smaller_kv_cache_is_compacted_before_memory_is_given_back():
    world = small_kv_world()
    world.lose("cpu:2")
    world.settle()
    kinds = [type(command) for command in world.commands]
    assert world.resumed[-1].kv is KVState.whole and world.resumed[-1].num_kv_blocks < 256
    assert kinds.index(ev.Compact) < kinds.index(ev.Reserve)
    (compact,) = of_kind(world.commands, ev.Compact)
    assert compact.devices == world.coordinator.members


def test_a_fault_while_blocks_are_moved_ends_in_replay():
    world = small_kv_world()
    world.lose("cpu:2")
    while world.coordinator.phase != COMPACTING:
        world.answer_one()
    world.crash("cpu:3")
    world.settle()
    assert world.coordinator.phase == SERVING and world.resumed[-1].kv is KVState.lost


# ------------------------------------------------------------------------------------------------ planned changes


def new_device(world: World, name: str, budget: int = PLENTY) -> ev.DeviceFound:
    world.anchors.add(name)
    world.wipe(name)
    return ev.DeviceFound(device=name, budget_bytes=budget)


def change(world: World, **wish) -> None:
    world.changes += 1
    world.give(ev.Change(why="a wish", change_id=world.changes, **wish))


def outcome(world: World) -> str:
    return [e for e in world.coordinator.episodes if e.change_id == world.changes][-1].outcome


def test_a_device_joins_and_the_group_switches_between_two_steps():
    world = kv_world()
    change(world, add=(new_device(world, "cpu:4"),))
    world.settle(switch=False)
    assert world.coordinator.phase == SERVING and world.coordinator.wants_switch and world.coordinator.epoch == 1
    assert world.coordinator.members == devices(4), "not before the switch"
    assert all(load.background for load in of_kind(world.commands, ev.Load))
    assert not of_kind(world.commands, ev.Abort)
    world.settle()
    layout = world.coordinator.layout
    layout.check(UNITS)
    assert layout.devices == devices(5) and world.coordinator.epoch == 2
    assert world.resumed[-1].kv is KVState.whole and outcome(world) == "serving"
    for family in ("attention", "mlp", "vocab"):
        widths = [len(shard[family]) for shard in layout.shards]
        assert max(widths) - min(widths) <= 1
    world.lose("cpu:1")
    world.settle()
    world.coordinator.layout.check(UNITS)


def test_a_member_leaves_and_its_bytes_come_from_itself_or_the_host():
    world = kv_world()
    change(world, remove=("cpu:0",))
    world.settle()
    assert world.coordinator.members == ("cpu:1", "cpu:2", "cpu:3") and outcome(world) == "serving"
    kinds = [type(command) for command in world.commands]
    assert kinds.index(ev.Load) < kinds.index(ev.Abort) < kinds.index(ev.Resume) < kinds.index(ev.Drop)
    assert world.resumed[-1].kv is KVState.whole, "planes are copied from the device that leaves"


def test_other_speeds_move_units_and_slots_are_closed():
    world = serving()
    change(world, speeds=(("cpu:0", 3.0), ("cpu:3", 0.5)))
    world.settle()
    widths = [len(shard["mlp"]) for shard in world.coordinator.layout.shards]
    assert widths[0] > 2 * widths[1] > 2 * widths[3]
    world.lose("cpu:2")
    world.settle()
    widths = [len(shard["mlp"]) for shard in world.coordinator.layout.shards]
    assert widths[0] > 2 * widths[1], "what was set stays set"


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"remove": ("cpu:7",)}, "cpu:7 is not in the group"),
        ({"remove": devices(4)}, "no device is left"),
        ({"speeds": (("cpu:9", 2.0),)}, "cpu:9 is not in the group"),
        ({"speeds": (("cpu:1", -1.0),)}, "greater than 0"),
        ({"speeds": ()}, "nothing had to change"),
    ],
)
def test_a_change_that_cannot_be_is_turned_down_and_serving_goes_on(wish, words):
    world = serving()
    change(world, **wish)
    world.settle()
    assert words in outcome(world) and world.coordinator.epoch == 1
    assert world.coordinator.members == devices(4)


def test_a_device_without_room_is_turned_down_with_the_numbers_and_dropped():
    world = serving()
    change(world, add=(new_device(world, "cpu:4", budget=1000),))
    world.settle()
    assert re.search(r"cpu:4 would hold .* its budget is 1.0 kB", outcome(world))
    assert ev.Drop(device="cpu:4", reason=world.commands[-1].reason) == world.commands[-1]
    change(world, add=(new_device(world, "cpu:4"),))
    world.settle()
    assert "cpu:4" in world.coordinator.members


def test_room_is_made_before_a_member_leaves():
    world = small_kv_world()
    change(world, remove=("cpu:2",))
    world.settle()
    kinds = [type(command) for command in world.commands]
    assert world.coordinator.members == ("cpu:0", "cpu:1", "cpu:3")
    assert kinds.index(ev.Compact) < kinds.index(ev.Load)
    assert [r.kv for r in world.resumed[1:]] == [KVState.whole, KVState.whole]
    assert world.coordinator.num_kv_blocks == world.resumed[-1].num_kv_blocks < 256
    assert world.coordinator.num_faults == 0


def test_kv_cache_grows_again_with_the_group():
    world = small_kv_world()
    world.lose("cpu:2")
    world.settle()
    small = world.coordinator.num_kv_blocks
    change(world, add=(new_device(world, "cpu:2", world.coordinator.snapshot()["cpu:0"]["budget_bytes"]),))
    world.settle()
    assert world.coordinator.members == ("cpu:0", "cpu:1", "cpu:3", "cpu:2")
    assert small < world.resumed[-1].num_kv_blocks


def test_a_fault_calls_a_change_off_and_it_begins_again():
    world = serving()
    change(world, add=(new_device(world, "cpu:4"),))
    while not of_kind(world.commands, ev.Load):
        world.answer_one()
    world.crash("cpu:1")
    world.settle()
    outcomes = [e.outcome for e in world.coordinator.episodes if e.change_id == 1]
    assert outcomes[0].startswith("interrupted") and outcomes[1:] == ["serving"]
    assert world.coordinator.members == devices(5)
    assert of_kind(world.commands, ev.CancelLoad)


def test_a_joining_device_that_dies_is_dropped_and_serving_goes_on():
    world = serving()
    change(world, add=(new_device(world, "cpu:4"),))
    while not of_kind(world.commands, ev.Load):
        world.answer_one()
    world.lose("cpu:4")
    world.settle()
    assert world.coordinator.epoch == 1 and world.coordinator.phase == SERVING
    assert "refused" in outcome(world) and "cpu:4" in outcome(world)


def test_a_device_that_dies_while_it_is_arranged_holds_nothing():
    world = serving(config=replace(CONFIG, policy="cmm"))  # borders of intervals shift: the first units are given up
    world.lose("cpu:0")
    while world.coordinator.phase != ARRANGING:
        world.step()
    (arrange, *_) = of_kind(world.commands, ev.Arrange)
    world.inflight = deque(a for a in world.inflight if _who(a) != arrange.device)
    world.crash(arrange.device)
    world.settle()
    assert world.fresh_loads == 4 + 1
    world.coordinator.layout.check(UNITS)


def test_a_recovery_that_was_cut_while_units_were_passed_on_leaves_none_twice():
    world = serving(config=replace(CONFIG, policy="cmm", pipelined=False))
    world.lose("cpu:3")
    while world.coordinator.phase != LOADING:
        world.answer_one()
    world.answer_one()
    held = [unit for shard in world.coordinator.layout.shards for unit in shard["mlp"]]
    assert len(held) > len(set(held)), "one device has what another still has"
    world.lose("cpu:2")
    world.settle()
    world.coordinator.layout.check(UNITS)
    world.check_memory(world.coordinator.layout)


def test_changes_that_are_asked_for_during_a_recovery_wait():
    world = serving()
    world.lose("cpu:2")
    change(world, add=(new_device(world, "cpu:4"),))
    change(world, remove=("cpu:0",))
    world.settle()
    assert world.coordinator.members == ("cpu:1", "cpu:3", "cpu:4")


@pytest.mark.parametrize("policy", ["makespan", "units", "cmm", "greedy"])
def test_every_policy_of_the_engine_ends_in_a_whole_layout(policy):
    world = serving(config=replace(CONFIG, policy=policy))
    for device in ("cpu:1", "cpu:3"):
        world.lose(device)
        world.settle()
        world.coordinator.layout.check(UNITS)
    change(world, add=(new_device(world, "cpu:1"),))
    world.settle()
    assert outcome(world) == "serving"


def test_a_peer_that_cannot_be_read_is_not_asked_again():
    world = serving()
    change(world, add=(new_device(world, "cpu:4"),))
    world.settle()
    world.lose("cpu:0")
    load = hold_back_loads(world)[0]
    world.give(failed(load, source="cpu:2"))
    world.settle()
    assert world.coordinator.phase == SERVING
    sources = {
        m.source.device for c in of_kind(world.commands, ev.Load)[-3:] for m in c.moves if m.source.kind == "peer"
    }
    assert "cpu:2" not in sources


MOE_UNITS = model_units(make_moe(layers=2, experts=4, hidden=512, width=512))


def moved_experts(world: World, rng: random.Random) -> Plan:
    """What the balancer may ask for: replicas of some experts, and others gone of which one is left."""
    layout = world.coordinator.layout
    held = {shard.device: set(shard[EXPERT]) for shard in layout.shards}
    copies, drops = [], []
    for _ in range(rng.randint(1, 3)):
        source, device = rng.choice(layout.devices), rng.choice(layout.devices)
        units = sorted(set(layout[source][EXPERT]) - held[device])
        if units:
            copies.append(Copy(unit=rng.choice(units), device=device, source=rng.choice([source, None])))
            held[device].add(copies[-1].unit)
    for device, units in held.items():
        others = set().union(*(held[other] for other in held if other != device))
        for unit in sorted(units & others & set(layout[device][EXPERT])):
            if rng.random() < 0.3 and all(copy.source != device or copy.unit != unit for copy in copies):
                drops.append(Drop(unit=unit, device=device))
                held[device].discard(unit)
                break
    stage = Stage(copies=tuple(copies), drops=tuple(drops), placement=None)
    return ExpertBalancer(world.units, 1.0).plan(stage, layout, "a copy here, a copy there")


def test_experts_that_were_to_move_stay_when_a_fault_comes_while_room_is_made():
    kv = KVAddresses(config=MOE_UNITS.config, block_size=16, num_blocks=1 << 14)
    (fullest, *_) = sorted(initial_layout(MOE_UNITS, devices(3)).shards, key=lambda shard: -len(shard[EXPERT]))
    budget = WeightAddresses(units=MOE_UNITS).committed_bytes(fullest) + kv.room_for(1, 1 << 14)
    world = serving(names=devices(3), units=MOE_UNITS, budget=budget, config=replace(CONFIG, kv_blocks=1 << 14))
    layout, device = world.coordinator.layout, fullest.device
    source, unit = next((s.device, u) for s in layout.shards for u in s[EXPERT] if s.device != device)
    stage = Stage(copies=(Copy(unit=unit, device=device, source=source),), drops=(), placement=None)
    change(world, plan=ExpertBalancer(MOE_UNITS, 1.0).plan(stage, layout, "hot"))
    assert "to make room" in outcome(world) and world.coordinator.phase == LEAVING
    world.lose(source)
    world.settle()
    assert outcome(world) == "refused: the layout that it was made for is gone"
    assert world.coordinator.phase == SERVING


def replicated(world: World, device: str, num: int) -> None:
    """The balancer copies `num` experts that others hold to a device."""
    layout = world.coordinator.layout
    sources = {u: s.device for s in layout.shards for u in s[EXPERT] if u not in layout[device][EXPERT]}
    copies = tuple(Copy(unit=unit, device=device, source=sources[unit]) for unit in sorted(sources)[:num])
    stage = Stage(copies=copies, drops=(), placement=None)
    change(world, plan=ExpertBalancer(MOE_UNITS, 1.0).plan(stage, layout, "hot"))
    world.settle()
    assert len(world.coordinator.layout[device][EXPERT]) == len(layout[device][EXPERT]) + num


@pytest.mark.parametrize("policy", ["makespan", "units"])
def test_experts_with_a_replica_are_not_loaded_again(policy):
    world = serving(names=devices(4), units=MOE_UNITS, config=replace(CONFIG, policy=policy))
    replicated(world, "cpu:0", 4)
    before = world.coordinator.layout.without(["cpu:3"])
    world.commands.clear()
    world.lose("cpu:3")
    world.settle()
    loads = [m for c in of_kind(world.commands, ev.Load) for m in c.moves if m.family == EXPERT]
    assert sum(m.num_units for m in loads) == MOE_UNITS.num_units[EXPERT] - len(before.held(EXPERT)) < 2
    for shard in before.shards:
        assert world.coordinator.layout[shard.device][EXPERT][: len(shard[EXPERT])] == shard[EXPERT]
    assert not of_kind(world.commands, ev.Arrange), "nobody waits until experts are even"


@pytest.mark.parametrize("num_losses", [1, 2])
def test_replicas_make_room_before_the_kv_cache_shrinks(num_losses):
    """So much memory that after the losses the weights and all the KV that is wanted just fit, without replicas."""
    names, config = devices(4), replace(CONFIG, kv_blocks=512)
    kv = KVAddresses(config=MOE_UNITS.config, block_size=16, num_blocks=512)
    lean = serving(names=names, units=MOE_UNITS, config=config)
    for name in names[3 : 3 - num_losses : -1]:
        lean.lose(name)
        lean.settle()
    addresses = WeightAddresses(units=MOE_UNITS)
    unit = MOE_UNITS.unit_bytes[EXPERT]
    need = [addresses.committed_bytes(s) + kv.room_for(len(s["kv"]), 512) for s in lean.coordinator.layout.shards]
    world = serving(names=names, units=MOE_UNITS, config=config, budget=max(need) + unit)
    for name in names[:3]:
        shard = world.coordinator.layout[name]
        room = max(need) + unit - addresses.committed_bytes(shard) - kv.room_for(len(shard["kv"]), 512)
        replicated(world, name, min(room // unit, MOE_UNITS.num_units[EXPERT] - len(shard[EXPERT])))
    for name in names[3 : 3 - num_losses : -1]:
        world.lose(name)
        world.settle()
        assert world.coordinator.phase == SERVING and world.coordinator.num_kv_blocks == 512
        world.check_memory(world.coordinator.layout)
    assert any(
        "make room for weights and KV cache" in line.text for e in world.coordinator.episodes for line in e.lines
    )


@settings(deadline=None, max_examples=300)
@given(st.integers(2, 6), st.integers(1, 8), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_any_faults_and_changes_in_any_order_end_well(num_devices, num_events, moe, tight, rng: random.Random):
    units, budget = MOE_UNITS if moe else UNITS, PLENTY
    policy = rng.choice(["makespan", "makespan", "units", "cmm", "greedy"])
    config = replace(CONFIG, policy=policy, pipelined=rng.random() < 0.5, kv_mirror=rng.random() < 0.5)
    if tight:  # there is just enough for so few devices, with fewer blocks than are wanted or a few replicas of experts
        few = initial_layout(units, devices(rng.randint(1, num_devices)))
        weights, kv = WeightAddresses(units=units), KVAddresses(config=units.config, block_size=16, num_blocks=64)
        most = rng.randint(CONFIG.min_kv_blocks, 64)
        budget = max(weights.committed_bytes(s) + kv.room_for(len(s["kv"]), most) for s in few.shards)
        budget += rng.randint(0, 3) * units.unit_bytes.get(EXPERT, 0)
    world = World(names=devices(num_devices), budget=budget, units=units, config=config)
    world.settle(rng)
    for _ in range(rng.randint(0, 6) * moe):
        if world.coordinator.is_calm:
            change(world, plan=moved_experts(world, rng))
            world.settle(rng)
    for _ in range(num_events):
        for _ in range(rng.randint(0, 15)):
            world.step(rng)
        device = rng.choice(devices(8))
        kind = rng.choice(["fault", "fault", "add", "remove", "speeds"] + ["experts"] * 3 * moe)
        if kind == "add" and device not in world.anchors | set(world.coordinator.members):
            change(world, add=(new_device(world, device),))
        elif kind == "experts" and world.coordinator.is_calm:
            change(world, plan=moved_experts(world, rng))
        elif kind == "remove" and len(world.coordinator.members) > 1:
            change(world, remove=(device,))
        elif kind == "speeds":
            change(world, speeds=((device, rng.choice([0.5, 1.0, 2.0])),))
        elif kind == "fault":
            fault = rng.choice([world.crash, world.lose, world.kill_anchor, world.hang, world.stick])
            if fault == world.kill_anchor and device not in world.workers:
                fault = world.lose
            fault(device)
    world.settle(rng)
    coordinator = world.coordinator
    if coordinator.phase == SERVING:
        coordinator.layout.check(units)
        world.check_memory(coordinator.layout)
        assert set(coordinator.members) == world.workers
        assert world.resumed[-1].epoch == coordinator.epoch and world.serving == coordinator.layout
        if set(coordinator.speeds.values()) <= {1.0}:
            widths = [len(shard["attention"]) for shard in coordinator.layout.shards]
            assert max(widths) - min(widths) <= 1
    else:
        told = [e.outcome for e in coordinator.episodes if e.outcome.startswith("refus")]
        assert not coordinator.members or (tight and any("more memory" in outcome for outcome in told))
    assert all(e.ended_s is not None for e in coordinator.episodes), "no wish is left without an answer"

    _, commands = replay(units, config, coordinator.log)
    assert [c for batch in commands for c in batch] == world.commands


@pytest.mark.parametrize("num_devices", [2, 3, 4, 8])
@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_slots_made_ready_for_a_loss_are_nearly_those_that_it_needs(num_devices, speed):
    """What is spread by whole units may go to one device or the other; far too many would be memory wasted."""
    units, names = model_units(make_config(kv_heads=4, group=4, mlp=960)), devices(num_devices)
    speeds = {names[0]: speed}
    layout, needed = initial_layout(units, names, speeds), Counter()
    for lost in names:
        held = Layout(shards=tuple(shard for shard in layout.shards if shard.device != lost))
        after = plan_change(units, held, held.devices, speeds={n: speeds.get(n, 1.0) for n in held.devices}).after
        for shard in after.shards:
            for family in units.families:
                needed[shard.device, family] = max(needed[shard.device, family], len(shard[family]))
    ready = slots_after_a_loss(units, layout, speeds)
    for (device, family), count in needed.items():
        assert abs(ready[device][family] - count) <= 1, (device, family)


def test_a_device_alone_has_no_loss_to_get_ready_for():
    layout = initial_layout(UNITS, devices(1))
    assert slots_after_a_loss(UNITS, layout, {}) == {}
