"""The recovery coordinator: events in, commands out, the clock passed in, every decision with its reason.

```
            Start                      all Left            CensusTaken
  idle ─────────────► census   leaving ────────► census ─────────────┐
                                  ▲                                  ▼
     a fault in any later phase   │      adopting (a dead anchor, a live worker) ─► attaching
     raises the epoch and ────────┘                                                    │ all Attached
     begins again from here                              plan: nothing fits ─► refusing│
                                                                                       ▼
  serving ◄─ forming ◄─ arranging ◄─ restoring ◄─ loading ◄─ reserving ◄────────── compacting
     all Formed   all Arranged   all Restored  all Loaded   Reserved        (where KV has to shrink)
```

Where weights, or the KV cache there was, would not fit otherwise, replicas of experts go before anything is compacted
(`thinning`), and the plan is made again.

Loading is a phase of its own only where the next one needs all bytes: at the start, and before units are given up
(`arranging`). Else weights arrive while planes are restored, the group is formed, and the first step runs: a layer
computes when its bytes are there.

`layout` always says what is whole in the devices' arenas, so a second fault in the middle of a recovery plans
from what really arrived. Changes that nobody has to wait for (`recovery.change`) load while the engine serves, and
then go the same way from leaving to serving, with nothing left to plan or to load. Nothing here reads a clock, a
socket or a tensor; the engine's controller does the IO.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from anchortp.errors import ConfigError, DoesNotFit
from anchortp.layout import (
    ATTENTION,
    EXPERT,
    KV,
    Layout,
    ModelUnits,
    Shard,
    check_devices,
    empty_shard,
    single_replicas,
)
from anchortp.plan import POLICIES, Experts, Move, Plan, Rates, Topology, fill_plan, plan_change
from anchortp.recovery import change as ch
from anchortp.recovery.change import PlannedChange
from anchortp.recovery.devices import Device, fitting_kv_blocks
from anchortp.recovery.events import (
    Abort,
    Adopt,
    Adopted,
    AnchorGone,
    Arrange,
    Arranged,
    Attach,
    Attached,
    CancelLoad,
    CensusTaken,
    Change,
    Command,
    Compact,
    Compacted,
    DeviceFound,
    Drop,
    Event,
    Fence,
    Form,
    Formed,
    KVState,
    Leave,
    Left,
    Load,
    Loaded,
    LoadFailed,
    PlaneSource,
    Progressed,
    Record,
    Refuse,
    Reserve,
    Reserved,
    Restore,
    Restored,
    Resume,
    Start,
    Switch,
    TakeCensus,
    Tick,
    WorkerGone,
    WorkerHung,
)
from anchortp.recovery.progress import Progress, added
from anchortp.recovery.story import Episode, Line

IDLE, LEAVING, CENSUS, ADOPTING, ATTACHING = "idle", "leaving", "census", "adopting", "attaching"
THINNING, COMPACTING, RESERVING, LOADING, RESTORING = "thinning", "compacting", "reserving", "loading", "restoring"
ARRANGING, FORMING, SERVING, REFUSING = "arranging", "forming", "serving", "refusing"
ENGINE_POLICIES = ("makespan", "units", "cmm", "greedy")  # `reload` is what a restart does
# Part of the time that passing units on between survivors must win: the group waits for the last byte then, while
# otherwise it serves as soon as the first layers are there.
MIN_GAIN = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """What the coordinator decides with. Times in seconds.

    `kv_blocks`: blocks of `kv_block_size` tokens that are wanted; `min_kv_blocks`: fewer are not worth serving.
    `max_failures`: a device whose worker dies that often without the engine serving in between is given up.
    `load_bytes_per_s`: a load slower than this counts as hung. `fence_timeout_s`: a killed worker that has not ended by
    then (the driver waits for a kernel that hangs, the kernel for a device) takes its device with it.
    `kv_mirror`: the host keeps copies of KV blocks.
    `policy`: who plans, see `plan.POLICIES`. `pipelined`: serve while weights still arrive.
    """

    kv_block_size: int
    kv_blocks: int
    min_kv_blocks: int
    speeds: Mapping[str, float] | None = None
    leave_timeout_s: float = 10.0
    attach_timeout_s: float = 30.0
    load_timeout_s: float = 30.0
    load_bytes_per_s: float = 20e6
    form_timeout_s: float = 30.0
    fence_timeout_s: float = 20.0
    max_failures: int = 3
    kv_mirror: bool = False
    policy: str = "makespan"
    pipelined: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """A `Load` that was said: when it is answered, `device` holds `after`."""

    device: str
    after: Shard
    fresh: bool


class Coordinator:
    """One engine's recovery. `handle` is the only way in; everything readable is plain attributes.

    `epoch`, `phase`, `deadline_s` (clock time at which a `Tick` is due, None if nothing is awaited), `layout`,
    `num_kv_blocks`, `episodes` (the story, oldest first), `num_faults` (recoveries that a fault began; a fault in the
    middle of one is part of it), `log` (every event with its time, for replay),
    `speeds` (the present ones), `rates` (of links, as measured), `wants_switch` (feed `Switch` as soon as no step is
    in flight).
    """

    def __init__(self, units: ModelUnits, config: RecoveryConfig):
        assert config.policy in ENGINE_POLICIES
        self.units = units
        self.config = config
        self.epoch = 0
        self.phase = IDLE
        self.num_kv_blocks = 0
        self.speeds = dict(config.speeds or {})
        self.rates = Rates(measured={})
        self.episodes: list[Episode] = []
        self.num_faults = 0
        self.log: list[tuple[float, Event]] = []
        self._episode: Episode | None = None  # of the latest recovery; a change has its own
        self._devices: dict[str, Device] = {}
        self._waiting: set[str] = set()
        self._phase_deadline_s: float | None = None
        self._load_deadline_s: float | None = None
        self._ticket = 0
        self._orders: dict[int, _Order] = {}  # by ticket; the answers that would be facts
        self._brought: Progress | None = None  # what the loads that were said last have brought
        self._ordered_s = 0.0  # when they were said
        self._loading: set[str] = set()  # devices that the present layout still waits for
        self._unreadable: set[str] = set()  # devices that could not be copied from, in this recovery
        self._staging: ch.Staging | None = None  # how the present plan is carried out
        self._kv = KVState.lost
        self._copies: set[tuple[str, int, str]] = set()  # (from, KV head, to): planes copied in this episode
        self._restore_failed = False  # in this epoch
        self._missing: set[tuple[str, int]] = set()
        self._change: PlannedChange | None = None
        self._kv_cap: int | None = None  # a change needs room: so many blocks at most until it is through
        self._after_loads: Callable[[], None] | None = None
        self._wishes: deque[Change] = deque()
        self._joining: dict[str, Device] = {}
        self._going: list[str] = []  # members until a moment ago; dropped when the engine serves without them
        self._commands: list[Command] = []
        self._now = 0.0

    # ------------------------------------------------------------------------------------------ reading

    @property
    def layout(self) -> Layout:
        """What is whole in the arenas of the devices that are left, in rank order."""
        return Layout(shards=tuple(d.shard for d in self._devices.values()))

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self._devices)

    @property
    def served(self) -> int:
        """Index of the episode after which the engine serves now."""
        return self.episodes.index(self._recovery)

    @property
    def is_whole(self) -> bool:
        """Every byte of the layout that is served has arrived."""
        return not self._loading

    @property
    def is_loading(self) -> bool:
        """Loads were said and are not answered."""
        return bool(self._orders)

    def awaits(self, ticket: int) -> bool:
        """Whether the load of this ticket is one of them."""
        return ticket in self._orders

    @property
    def is_calm(self) -> bool:
        """Serves, and nothing is changing."""
        return self.phase == SERVING and self.is_whole and self._change is None and not self._wishes

    @property
    def wants_switch(self) -> bool:
        ready = self._change is not None and self._change.step == ch.READY
        return ready and self._recovery.ended_s is not None  # else a worker has just been fenced

    @property
    def deadline_s(self) -> float | None:
        change = self._change.deadline_s if self._change is not None else None
        fences = [self._fence_deadline_s(device) for device in (*self._devices.values(), *self._joining.values())]
        deadlines = (self._phase_deadline_s, self._load_deadline_s, change, *fences)
        return min((d for d in deadlines if d is not None), default=None)

    @property
    def load_deadline_s(self) -> float | None:
        """Until when a step may have to wait for weights; None if it has not."""
        return self._load_deadline_s

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """JSON-able: what each device holds now, for `status`."""
        layout = self.layout
        return {
            name: {
                "budget_bytes": device.budget_bytes,
                "weight_bytes": layout.weight_bytes(self.units, name),
                "has_worker": device.has_worker,
                "has_anchor": device.has_anchor,
                "speed": self.speeds.get(name, 1.0),
                **{f"{family}_units": len(device.shard[family]) for family in self.units.families},
            }
            for name, device in self._devices.items()
        }

    # ---------------------------------------------------------------------------------------- the door

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """One event in; what must be done now, in order, out."""
        self._now = now_s
        self.log.append((now_s, event))
        self._commands = []
        _HANDLERS[type(event)](self, event)
        self.validate()
        commands, self._commands = self._commands, []
        return commands

    def validate(self) -> None:
        """Asserts what holds between any two events."""
        assert self._waiting <= set(self._devices) | set(self._joining), "waits for a device that is gone"
        assert (self._phase_deadline_s is not None) == (self.phase in _TIMED), f"{self.phase}: deadline"
        assert (self._load_deadline_s is not None) == bool(self._loading), "loads without a deadline"
        if self.phase == SERVING:
            assert all(d.has_worker for d in self._devices.values()), "serves without a worker"
            assert not self._waiting
            if self.is_whole:
                self.layout.check(self.units)
        if self._change is not None:
            assert self.phase == SERVING or self._change.step == ch.SWITCHING, "a change outlives the group"

    # ------------------------------------------------------------------------------------------- events

    def _on_start(self, event: Start) -> None:
        assert self.phase == IDLE, "an engine starts once"
        check_devices(self.units, [found.device for found in event.devices], self.config.speeds)
        self.epoch = event.epoch
        self._devices = {found.device: _device(found) for found in event.devices}
        self._begin_episode("start")
        self._forget_lopsided_state()
        if event.num_kv_blocks:
            self._kv, self.num_kv_blocks = KVState.whole, event.num_kv_blocks
            for device in self._devices.values():
                device.planes = frozenset(device.shard[KV])
        self._missing = self._missing_units()
        self._take_census()

    def _on_worker_gone(self, event: WorkerGone) -> None:
        device = self._find(event.device)
        if device is None or not device.has_worker:
            return
        device.has_worker, device.fenced_s = False, None
        device.failures += 1
        self._waiting.discard(event.device)
        self._forget_load(event.device)
        if device.arranging is not None:
            device.arranging, device.fresh, device.planes = None, True, frozenset()
            device.shard = empty_shard(event.device)
        self._fault(f"worker of {event.device} is gone: {event.reason}", event.device)

    def _on_worker_hung(self, event: WorkerHung) -> None:
        if event.device not in self._devices or not self._devices[event.device].has_worker:
            return
        self._begin_episode_if_serving(f"worker of {event.device} hangs: {event.reason}")
        self._say(f"fence {event.device}: {event.reason}")
        # The answer is WorkerGone, which then raises the epoch: a hung worker is a crash made certain.
        self._fence(event.device, event.reason)

    def _on_anchor_gone(self, event: AnchorGone) -> None:
        device = self._find(event.device)
        if device is None or not device.has_anchor:
            return
        device.has_anchor = False
        if event.device in self._joining:
            self._lose_joining(event.device, "its anchor is gone")
        elif self.phase == SERVING and device.has_worker:
            self._say(f"anchor of {event.device} is gone, its worker is not: a new anchor adopts the memory")
            self._do(Adopt(device=event.device, epoch=self.epoch))
        elif self.phase not in (SERVING, LEAVING, CENSUS, REFUSING):
            self._fault(f"anchor of {event.device} is gone", event.device)

    def _on_left(self, event: Left) -> None:
        if event.epoch != self.epoch:
            return
        if self.phase == LEAVING:
            self._arrived(event.device, self._take_census)
        elif self._change is not None:
            self._joined(event.device)

    def _on_census(self, event: CensusTaken) -> None:
        if self.phase != CENSUS or event.epoch != self.epoch:
            return
        for name in [name for name in self._joining if self._change is not None and name not in event.alive]:
            self._lose_joining(name, "its anchor does not answer")
        for name, device in list(self._devices.items()):
            if name not in event.alive:
                device.has_anchor = False
            if not device.has_anchor and not device.has_worker:
                self._lose(name, "its memory is gone with its anchor and its worker")
            elif device.failures > self.config.max_failures:
                self._lose(name, f"its worker died {device.failures} times in a row")
        orphans = [name for name, device in self._devices.items() if not device.has_anchor]
        self._await(ADOPTING, orphans, self.config.attach_timeout_s, self._attach)
        for name in orphans:
            self._do(Adopt(device=name, epoch=self.epoch))

    def _on_adopted(self, event: Adopted) -> None:
        device = self._devices.get(event.device)
        if device is None:
            return
        device.has_anchor = event.ok
        result = "holds its memory" if event.ok else f"failed: {event.reason}"
        self._say(f"new anchor of {event.device} {result}")
        if self.phase == SERVING and not event.ok:
            self._adopt_again(event.device)
        if self.phase != ADOPTING:
            return
        if not event.ok:
            self._fence(event.device, "no anchor can hold its memory")
            return
        self._arrived(event.device, self._attach)

    def _adopt_again(self, name: str) -> None:
        """The worker still holds the memory, so another anchor may have more luck; but not for ever."""
        device = self._devices[name]
        device.failures += 1
        if device.failures <= self.config.max_failures:
            self._do(Adopt(device=name, epoch=self.epoch))

    def _on_attached(self, event: Attached) -> None:
        if event.epoch != self.epoch:
            return
        if self.phase == ATTACHING:
            self._arrived(event.device, self._plan)
        elif self._change is not None:
            self._joined(event.device)

    def _on_reserved(self, event: Reserved) -> None:
        if event.epoch != self.epoch or event.ticket != self._ticket:
            return
        if self.phase == RESERVING:
            if event.refused:
                self._refuse(event.refused)
            else:
                self._load()
        elif self.phase == FORMING and event.refused:
            self._refuse(event.refused)
        elif self._change is not None and self._change.step == ch.RESERVING:
            if event.refused:
                self._give_up_change(event.refused)
            else:
                self._load_behind()

    def _on_loaded(self, event: Loaded) -> None:
        """A fact whatever the epoch: the bytes of the load that was asked for are in the arena."""
        order = self._orders.pop(event.ticket, None)
        if order is None:
            return
        change = self._change if self._change is not None and self._change.step == ch.LOADING else None
        for text in event.rerouted:
            self._say(f"{event.device}: {text}", change.episode if change is not None else None)
        self.rates = self.rates.fold(event.device, {source: (size, rate) for source, size, rate in event.links})
        if change is not None:
            self._loaded_behind(event)
            return
        device, episode = self._devices[order.device], self._recovery
        self._count_load(episode, event)
        self._count_arrivals(episode, event.num_bytes, device.shard, order)
        device.shard, device.fresh = order.after, False
        self._forget_load(event.device)
        if not self._loading:
            self._all_loaded()

    def _count_arrivals(self, episode: Episode, num_bytes: int, before: Shard, order: _Order) -> None:
        """What was missing is there now; all else that came is a further copy of something."""
        families = self.units.families
        came = {(family, unit) for family in families for unit in order.after[family][len(before[family]) :]}
        found = came & self._missing
        self._missing -= found
        replicated = self.units.replicated_bytes if order.fresh else 0
        episode.replicated_bytes += replicated
        episode.replica_bytes += num_bytes - replicated - sum(self.units.unit_bytes[family] for family, _ in found)

    def _on_progressed(self, event: Progressed) -> None:
        behind = self._change is not None and self._change.step == ch.LOADING
        self._say(event.progress.in_words(), self._change.episode if behind else self._recovery)

    def _on_load_failed(self, event: LoadFailed) -> None:
        if self._orders.pop(event.ticket, None) is None:
            return
        reason = f"{event.device} could not load its weights: {event.reason}"
        if self._change is not None and self._change.step == ch.LOADING:
            self._give_up_change(reason)
        elif event.source and event.source not in self._unreadable:
            self._forget_load(event.device)
            self._unreadable.add(event.source)  # the next plan asks somebody else
            self._fault(reason, event.device)
        else:
            self._refuse(reason)

    def _on_compacted(self, event: Compacted) -> None:
        if self.phase == COMPACTING and event.epoch == self.epoch:
            self._arrived(event.device, self._reserve)

    def _on_restored(self, event: Restored) -> None:
        """Good for as long as the engine does not serve: nobody writes to the cache in the meantime."""
        device = self._find(event.device)
        target = self._staging.target if self._staging is not None else Layout(shards=())
        if device is None or event.device not in target.devices:
            return
        self._recovery.kv_copied_bytes += event.copied_bytes
        self._recovery.kv_restored_bytes += event.restored_bytes
        if event.ok:
            device.planes |= frozenset(target[event.device][KV])
        else:
            self._say(f"{event.device} could not restore its KV planes")
            self._restore_failed |= event.epoch == self.epoch
        if self.phase == RESTORING and event.epoch == self.epoch:
            self._arrived(event.device, self._wait_for_loads)

    def _on_arranged(self, event: Arranged) -> None:
        """A fact whatever the epoch, as `Loaded` is."""
        device = self._devices.get(event.device)
        if device is None or device.arranging is None:
            return
        device.shard, device.arranging = device.arranging, None
        device.planes &= frozenset(device.shard[KV])
        if self.phase in (THINNING, ARRANGING) and event.epoch == self.epoch:
            self._arrived(event.device, self._plan if self.phase == THINNING else self._form)

    def _on_formed(self, event: Formed) -> None:
        if self.phase == FORMING and event.epoch == self.epoch:
            self._arrived(event.device, self._serve)

    def _on_tick(self, event: Tick) -> None:
        for name in [*self._devices, *self._joining]:
            device = self._find(name)  # gone with another one, perhaps
            if device is not None and self._is_over(self._fence_deadline_s(device)):
                self._lose_with_its_worker(name, device)
        if self._is_over(self._phase_deadline_s):
            self._phase_deadline_s = self._now + self.config.leave_timeout_s
            self._fence_late(self._waiting, f"phase {self.phase}")
        if self._is_over(self._load_deadline_s):
            self._load_deadline_s = self._now + self.config.leave_timeout_s
            self._fence_late(self._loading, "a load")
        if self._change is not None and self._is_over(self._change.deadline_s):
            late = ", ".join(sorted(self._change.waiting)) or "the shell"
            self._interrupt_change(f"{late} did not answer in time while {self._change.step}")
            self._next_change()

    def _is_over(self, deadline_s: float | None) -> bool:
        return deadline_s is not None and self._now >= deadline_s

    def _fence_late(self, names: set[str], what: str) -> None:
        late = sorted(names)
        self._say(f"{', '.join(late) or 'the shell'} did not answer in time in {what}")
        for name in late:
            device = self._find(name)
            if device is not None and device.has_worker:
                self._fence(name, f"no answer in {what}")

    def _fence(self, name: str, reason: str) -> None:
        """Of a device with a worker. The answer is WorkerGone, or none until `fence_timeout_s` is over."""
        device = self._find(name)
        assert device is not None
        if device.fenced_s is None:
            device.fenced_s = self._now
        self._do(Fence(device=name, reason=reason))

    def _fence_deadline_s(self, device: Device) -> float | None:
        return None if device.fenced_s is None else device.fenced_s + self.config.fence_timeout_s

    def _lose_with_its_worker(self, name: str, device: Device) -> None:
        """SIGKILL has not ended its worker. Whatever that hangs in may still write, so nothing there is believed."""
        assert device.fenced_s is not None
        cause = f"worker of {name} cannot be ended"
        reason = f"its worker has not ended {self._now - device.fenced_s:.1f} s after SIGKILL and may still write to it"
        device.has_worker, device.fenced_s = False, None
        self._waiting.discard(name)
        self._forget_load(name)
        if name in self._joining:
            self._lose_joining(name, reason)
            return
        self._begin_episode_if_serving(cause)
        self._lose(name, reason)
        self._fault(cause, name)

    # ------------------------------------------------------------------------------------------- phases

    def _fault(self, cause: str, name: str) -> None:
        """Something broke. Before anything of this epoch was built, it is only noted; later the epoch rises."""
        if self._change is not None:
            alone = self.phase == SERVING and name in self._joining  # no member has a part in it
            self._interrupt_change(cause)
            if alone:
                self._next_change()
                return
        elif name in self._joining:
            return
        self._begin_episode_if_serving(cause)
        self._say(cause)
        if self.phase == LEAVING:
            if not self._waiting:
                self._take_census()
        elif self.phase not in (CENSUS, REFUSING):
            if self.phase == COMPACTING:
                self._kv = KVState.lost  # some devices have moved their blocks and others have not
            self._raise_epoch()

    def _raise_epoch(self) -> None:
        self._do(Abort(epoch=self.epoch))
        self.epoch += 1
        self._restore_failed = False  # whoever lacks planes is told again where from
        self._loading, self._load_deadline_s = set(), None
        self._brought = None  # a load that is cut short has no end to tell of
        present = self._devices | (self._joining if self._change is not None else {})
        live = [name for name, device in present.items() if device.has_worker]
        self._say(f"epoch {self.epoch} begins; {len(live)} worker(s) leave the old group")
        for name in live:
            self._do(Leave(device=name, epoch=self.epoch))
        self._await(LEAVING, live, self.config.leave_timeout_s, self._take_census)

    def _take_census(self) -> None:
        self._enter(CENSUS)
        joining = tuple(self._joining) if self._change is not None else ()
        self._do(TakeCensus(epoch=self.epoch, devices=(*self.members, *joining)))

    def _attach(self) -> None:
        idle = [name for name, device in self._devices.items() if not device.has_worker]
        for name in idle:
            # From here on its death is heard as WorkerGone, like that of any worker.
            self._devices[name].has_worker = True
            self._recovery.workers_replaced.append(name)
            self._say(f"a spare process takes over {name}")
            self._do(Attach(device=name, epoch=self.epoch))
        self._await(ATTACHING, idle, self.config.attach_timeout_s, self._plan)

    def _plan(self) -> None:
        # Whoever had to answer has: what they loaded is known, and no load of an older epoch runs any more.
        self._orders.clear()
        for device in self._devices.values():
            device.planes &= frozenset(device.shard[KV])  # a plane whose KV head has not arrived has no place either
        if self._change is not None and self._change.step == ch.SWITCHING:
            self._staging = self._change.staging
            self._find_kv_sources()
            self._restore()
            return
        try:
            plan, self._staging, blocks = self._make_plan()
        except DoesNotFit as error:
            if not self._replicas_make_room(0):
                self._refuse(str(error))
            return
        if blocks < self.num_kv_blocks and self._replicas_make_room(blocks):
            return
        self._count_missing(plan)
        self._find_kv_sources()
        before, self.num_kv_blocks = self.num_kv_blocks, blocks
        if blocks < before:
            self._say(f"KV cache shrinks from {before} to {blocks} blocks to make room for weights")
        if not any(self._staging.loads.values()) and blocks == before and not self._any_fresh():
            self._restore()
        elif blocks < before and self._kv is not KVState.lost:
            holders = tuple(name for name, device in self._devices.items() if device.planes)
            self._await(COMPACTING, list(holders), self.config.load_timeout_s, self._reserve)
            self._do(Compact(epoch=self.epoch, num_kv_blocks=blocks, devices=holders))
        else:
            self._reserve()

    def _replicas_make_room(self, num_kv_blocks: int) -> bool:
        """If more than so many blocks fit once each expert has but one replica: gives the others up, to plan again."""
        if EXPERT not in self.units.families or not self._devices:
            return False
        before = self.layout
        single = single_replicas(before, self.units, self.speeds)
        if single == before:
            return False
        try:
            _, _, fitting = self._plan_for(self.members, self.speeds, hurry=True, present=single)
        except DoesNotFit:
            return False
        if fitting <= num_kv_blocks:
            return False
        num_replicas = sum(len(before[d][EXPERT]) - len(single[d][EXPERT]) for d in self.members)
        self._say(f"{num_replicas} replica(s) of experts make room for weights and KV cache")
        after = {shard.device: ch.closed_up(before[shard.device], shard) for shard in single.shards}
        moving = [name for name in self.members if ch.arrangement(before[name], after[name])]
        for name, device in self._devices.items():
            if name in moving:
                device.arranging = after[name]
            else:
                device.shard = after[name]
        self._await(THINNING, moving, self.config.load_timeout_s, self._plan)
        for name in moving:
            self._do(Arrange(device=name, epoch=self.epoch, before=before[name], after=after[name]))
        return True

    def _count_missing(self, plan: Plan) -> None:
        missing = self._missing_units()
        self._recovery.lost_bytes += sum(self.units.unit_bytes[f] for f, _ in missing - self._missing)
        self._missing = missing
        for reason in plan.reasons:
            self._say(reason)

    def _reserve(self) -> None:
        assert self._staging is not None
        self._enter(RESERVING)
        self._ticket += 1
        self._do(
            Reserve(
                epoch=self.epoch,
                ticket=self._ticket,
                staged=self._staging.staged,
                num_kv_blocks=self.num_kv_blocks,
                fresh=tuple(name for name, device in self._devices.items() if device.fresh),
            )
        )

    def _load(self) -> None:
        assert self._staging is not None
        self._order_loads(self._staging, self._devices, background=False)
        if self.episodes[0].ended_s is not None and self.config.pipelined:
            self._restore()
        else:
            self._wait_for_loads(self._restore)

    def _order_loads(self, staging: ch.Staging, devices: Mapping[str, Device], *, background: bool) -> dict[str, int]:
        """Returns the bytes that each device is to get."""
        moves = {name: staging.loads.get(name, ()) for name in devices}
        wanted = {name: _num_bytes(moves[name]) for name in devices if moves[name] or devices[name].fresh}
        for name in wanted:
            device, after = devices[name], staging.staged[name]
            self._ticket += 1
            self._orders[self._ticket] = _Order(device=name, after=after, fresh=device.fresh)
            self._do(
                Load(
                    device=name,
                    epoch=self.epoch,
                    ticket=self._ticket,
                    before=device.shard,
                    after=after,
                    fresh=device.fresh,
                    moves=moves[name],
                    background=background,
                )
            )
        if wanted:
            self._brought, self._ordered_s = Progress(), self._now
        if wanted and not background:
            self._loading = set(wanted)
            self._load_deadline_s = self._now + self._load_timeout(wanted)
        return wanted

    def _load_timeout(self, wanted: Mapping[str, int]) -> float:
        return self.config.load_timeout_s + max(wanted.values(), default=0) / self.config.load_bytes_per_s

    def _all_loaded(self) -> None:
        self._load_deadline_s = None
        self._recovery.whole_s = self._now
        self._tell_brought(self._recovery)
        if self.phase == LOADING:
            then, self._after_loads = self._after_loads, None
            assert then is not None
            then()
        elif self.phase == SERVING:
            self._record()
            self._next_change()

    def _wait_for_loads(self, then: Callable[[], None] | None = None) -> None:
        """Goes on to `then` (by default: to arrange) when all bytes are there, if it needs them."""
        then = then or self._arrange
        assert self._staging is not None
        if self._loading and (self._staging.gives_up or then == self._restore):
            self._enter(LOADING)
            self._after_loads = then
        else:
            then()

    def _new_planes(self) -> dict[str, tuple[PlaneSource, ...]]:
        """Per device the KV heads whose planes it lacks, and the first device that has them."""
        assert self._staging is not None
        result = {}
        for shard in self._staging.target.shards:
            device = self._find(shard.device)
            assert device is not None
            missing = [head for head in shard[KV] if head not in device.planes]
            if missing:
                result[shard.device] = tuple(
                    PlaneSource(head=head, device=next((n for n, d in self._devices.items() if head in d.planes), None))
                    for head in missing
                )
        return result

    def _find_kv_sources(self) -> None:
        """What will be left of the cache: a plane that no device holds comes from the mirror, or not at all."""
        orphans = {p.head for planes in self._new_planes().values() for p in planes if p.device is None}
        if not orphans or self._kv is KVState.lost:
            return
        heads = ", ".join(map(str, sorted(orphans)))
        if self.config.kv_mirror:
            self._kv = KVState.mirrored
            self._say(f"KV head(s) {heads} had no other holder: their planes come from the host's mirror")
        else:
            self._kv = KVState.lost
            self._say(f"KV head(s) {heads} had no other holder and there is no mirror: sequences replay")

    def _restore(self) -> None:
        """Planes that are new on a device are copied from one that has them, or from the mirror."""
        assert self._staging is not None
        new = {} if self._kv is KVState.lost else self._new_planes()
        self._copies |= {(p.device, p.head, name) for name, planes in new.items() for p in planes if p.device}
        self._await(RESTORING, list(new), self.config.load_timeout_s, self._wait_for_loads)
        for name, planes in new.items():
            self._do(Restore(device=name, epoch=self.epoch, planes=planes, layout=self._staging.staged))

    def _arrange(self) -> None:
        """From here on the target holds: units that it does not name are given up, and their slots closed."""
        assert self._staging is not None
        if self._change is not None:
            self._commit_change()
        staged, target = self._staging.staged, self._staging.target
        moving = [shard.device for shard in target.shards if ch.arrangement(staged[shard.device], shard)]
        for shard in target.shards:
            device = self._devices[shard.device]
            if shard.device in moving:
                device.arranging = shard
            elif shard.device not in self._loading:
                device.shard = shard
                device.planes &= frozenset(shard[KV])
        self._await(ARRANGING, moving, self.config.load_timeout_s, self._form)
        for name in moving:
            self._do(Arrange(device=name, epoch=self.epoch, before=staged[name], after=target[name]))

    def _make_plan(self) -> tuple[Plan, ch.Staging, int]:
        """The plan after a fault or at a start, how it is carried out, and how many KV blocks fit beside it."""
        if not self._devices:
            raise DoesNotFit("no device is left; start anchors and serve again.")
        if all(not any(device.shard.slots) for device in self._devices.values()):
            plan = fill_plan(self.units, self.members, self.speeds)
            staging = ch.stage(plan, self.layout)
            return plan, staging, self._fitting_kv_blocks(staging.staged)
        return self._plan_for(self.members, self.speeds, hurry=True)

    def _plan_for(
        self,
        devices: tuple[str, ...],
        speeds: Mapping[str, float],
        *,
        hurry: bool,
        present: Layout | None = None,
    ) -> tuple[Plan, ch.Staging, int]:
        """To the group of `devices`, from what is held now (or from `present`). `hurry`: requests wait for it, and
        balance among experts is left to those who balance them by their load, unless a device has none yet. Where
        memory is short, `units` plans instead if that leaves more for KV: nobody receives what somebody else still
        holds; or experts are balanced after all, if that does.

        Raises DoesNotFit, ConfigError.
        """
        present = present or self.layout
        held = ch.distinct(Layout(shards=tuple(s for s in present.shards if not self._devices[s.device].fresh)))
        topology = self._topology(tuple(dict.fromkeys((*held.devices, *devices))))
        min_gain = MIN_GAIN if hurry and self.config.policy == "makespan" else 0.0

        stay = hurry and EXPERT in self.units.families and set(devices) <= set(held.devices)
        experts: Experts = "stay" if stay else "even"
        attempts: list[tuple[str, Experts]] = [(self.config.policy, experts), ("units", experts), ("units", "even")]

        def attempt(policy: str, kind: Experts) -> tuple[Plan, ch.Staging, int]:
            plan = plan_change(
                self.units,
                held,
                devices,
                topology=topology,
                policy=POLICIES[policy],
                min_gain=min_gain,
                speeds=dict(speeds) or None,
                experts=kind,
            )
            if kind != experts:
                why = "experts that somebody holds are loaded elsewhere as well, for lack of memory"
                plan = replace(plan, reasons=(*plan.reasons, why))
            staging = ch.stage(plan, present)
            return plan, staging, self._fitting_kv_blocks(staging.staged)

        best, refusal = None, None
        for policy, kind in dict.fromkeys(attempts):
            try:
                found = attempt(policy, kind)
            except DoesNotFit as error:
                refusal = error
                continue
            if best is None or found[2] > best[2]:
                best = found
            if best[2] >= self.num_kv_blocks:
                break
        if best is None:
            assert refusal is not None
            raise refusal
        return best

    def _topology(self, devices: tuple[str, ...]) -> Topology:
        """The links of this machine as they were measured, less those from devices that could not be read."""
        topology = self.rates.topology(devices)
        if not self._unreadable:
            return topology
        links = tuple(link for link in topology.links if link.src not in self._unreadable)
        return replace(topology, links=links)

    def _form(self) -> None:
        assert self._staging is not None
        target = self._staging.target
        if self._staging.gives_up and not self._staging.keeps_room:
            self.num_kv_blocks = max(self.num_kv_blocks, self._fitting_kv_blocks(target))
        self._await(FORMING, list(self.members), self.config.form_timeout_s, self._serve)
        self._ticket += 1
        self._do(Form(epoch=self.epoch, ticket=self._ticket, layout=target, num_kv_blocks=self.num_kv_blocks))

    def _serve(self) -> None:
        self._enter(SERVING)
        if self._restore_failed:
            self._kv = KVState.lost
        episode = self._recovery
        episode.kv, episode.ended_s, episode.outcome = self._kv.value, self._now, "serving"
        self._say(_KV_WORDS[self._kv])
        self._do(Resume(epoch=self.epoch, kv=self._kv, num_kv_blocks=self.num_kv_blocks))
        self._copies, self._restore_failed, self._unreadable = set(), False, set()
        # From here on whatever the cache is said to hold is written by this group, to every plane.
        self._kv = KVState.whole
        assert self._staging is not None
        for name, device in self._devices.items():
            device.failures = 0
            device.planes = frozenset(self._staging.target[name][KV])
        for name in self._going:
            self._do(Drop(device=name, reason="it was asked to leave"))
        self._going = []
        if self.is_whole:
            episode.whole_s = self._now
            self._record()
            self._next_change()
        else:
            self._say(f"{', '.join(sorted(self._loading))} still load(s): a layer computes when it is there")

    def _record(self) -> None:
        self._do(Record(epoch=self.epoch, layout=self.layout, num_kv_blocks=self.num_kv_blocks))

    def _refuse(self, reason: str) -> None:
        self._enter(REFUSING)
        self._loading, self._load_deadline_s = set(), None
        self._say(f"refuse: {reason}")
        self._recovery.ended_s, self._recovery.outcome = self._now, f"refusing: {reason}"
        self._do(Refuse(epoch=self.epoch, reason=reason))
        while self._wishes:
            self._turn_down(self._wishes.popleft(), f"the engine refuses requests: {reason}")

    # ------------------------------------------------------------------------------------------ changes

    def _on_change(self, event: Change) -> None:
        if self.phase == REFUSING:
            self._turn_down(event, f"the engine refuses requests: {self._recovery.outcome}")
            return
        self._wishes.append(event)
        self._next_change()

    def _next_change(self) -> None:
        if self.phase != SERVING or not self.is_whole or self._change is not None or not self._wishes:
            return
        wish = self._wishes.popleft()
        problem = self._what_is_wrong_with(wish)
        if problem:
            self._turn_down(wish, problem)
            return
        for found in wish.add:
            if found.device not in self._joining:  # else it has been waiting since a fault
                self._joining[found.device] = replace(_device(found), shard=empty_shard(found.device), fresh=True)
        change = PlannedChange(wish=wish, episode=self._new_episode(_name(wish), wish.change_id), joining=self._joining)
        self._change = change
        change.enter(ch.ATTACHING, self._now, set(self._joining), self.config.attach_timeout_s)
        for name, device in self._joining.items():
            if device.has_worker:
                self._do(Leave(device=name, epoch=self.epoch))
            else:
                device.has_worker = True
                self._do(Attach(device=name, epoch=self.epoch))
        if not self._joining:
            self._plan_change()

    def _what_is_wrong_with(self, wish: Change) -> str:
        members = ", ".join(self.members)
        if wish.problem:
            return wish.problem
        for found in wish.add:
            if found.device in self._devices:
                return f"{found.device} is in the group already, which has {members}"
        for name in wish.remove:
            if name not in self._devices:
                return f"{name} is not in the group, which has {members}"
        for name, _ in wish.speeds or ():
            if name not in self._devices:
                return f"{name} is not in the group, which has {members}"
        if wish.attempt >= ch.MAX_ATTEMPTS:
            return f"faults have interrupted it {wish.attempt} times"
        only_plan = not (wish.add or wish.remove or wish.speeds is not None)
        if only_plan and (wish.plan is None or wish.plan.before != self.layout):
            return "the layout that it was made for is gone"
        return ""

    def _turn_down(self, wish: Change, reason: str) -> None:
        self._end_change(self._new_episode(_name(wish), wish.change_id), f"refused: {reason}")
        self._kv_cap = None
        for found in wish.add:
            if found.device not in self._devices:
                self._joining.pop(found.device, None)
                self._do(Drop(device=found.device, reason=reason))

    def _end_change(self, episode: Episode, outcome: str) -> None:
        self._say(outcome, episode)
        episode.ended_s, episode.outcome = self._now, outcome

    def _joined(self, name: str) -> None:
        change = self._change
        assert change is not None
        if change.step == ch.ATTACHING and name in change.waiting:
            change.waiting.discard(name)
            if not change.waiting:
                self._plan_change()

    def _plan_change(self) -> None:
        change = self._change
        assert change is not None
        wish, everybody = change.wish, self._devices | self._joining
        devices = tuple(name for name in everybody if name not in wish.remove)
        try:
            if wish.plan is not None:
                plan, change.staging = wish.plan, ch.stage(wish.plan, self.layout)
                blocks = self._fitting_kv_blocks(change.staging.staged)
            else:
                plan, change.staging, blocks = self._plan_for(devices, self._speeds_after(wish), hurry=False)
        except (DoesNotFit, ConfigError) as error:
            self._give_up_change(str(error))
            return
        for reason in plan.reasons:
            self._say(reason, change.episode)
        if change.staging.target == self.layout:
            self._give_up_change("nothing has to change", outcome="done: nothing had to change")
        elif blocks < self.num_kv_blocks:
            self._make_room(blocks)
        else:
            self._reserve_behind(change.staging)

    def _reserve_behind(self, staging: ch.Staging) -> None:
        change = self._change
        assert change is not None
        change.enter(ch.RESERVING, self._now, timeout_s=self.config.load_timeout_s)
        self._ticket += 1
        self._do(
            Reserve(
                epoch=self.epoch,
                ticket=self._ticket,
                staged=staging.staged,
                num_kv_blocks=self.num_kv_blocks,
                fresh=tuple(self._joining),
                background=True,
            )
        )

    def _speeds_after(self, wish: Change) -> dict[str, float]:
        speeds = self.speeds if wish.speeds is None else dict(wish.speeds)
        return {name: speed for name, speed in speeds.items() if name not in wish.remove}

    def _make_room(self, blocks: int) -> None:
        """The cache has to shrink first. That needs a pause of its own; then the change begins again."""
        change = self._change
        assert change is not None
        wish, episode = change.wish, change.episode
        self._end_change(episode, f"first the KV cache shrinks to {blocks} blocks to make room")
        self._change, self._kv_cap = None, blocks
        self._wishes.appendleft(wish)
        if self._recovery.ended_s is not None:  # else a worker has just been fenced, and this is part of that
            self._begin_episode(f"make room for: {wish.why}")
        self._raise_epoch()

    def _load_behind(self) -> None:
        change = self._change
        assert change is not None and change.staging is not None
        wanted = self._order_loads(change.staging, self._devices | self._joining, background=True)
        # Steps come first, so it may take a multiple of the time that an undisturbed load would.
        timeout_s = 10 * self._load_timeout(wanted)
        change.enter(ch.LOADING if wanted else ch.READY, self._now, set(wanted), timeout_s if wanted else None)

    def _loaded_behind(self, event: Loaded) -> None:
        change = self._change
        assert change is not None
        self._count_load(change.episode, event)
        if event.device in self._joining:
            change.episode.replicated_bytes += self.units.replicated_bytes
        change.waiting.discard(event.device)
        if not change.waiting:
            self._tell_brought(change.episode)
            change.enter(ch.READY, self._now)

    def _on_switch(self, event: Switch) -> None:
        if not self.wants_switch or self.phase != SERVING:
            return
        change = self._change
        assert change is not None
        change.enter(ch.SWITCHING, self._now)
        self._episode = change.episode
        self._say("all bytes are there: the group switches")
        self._raise_epoch()

    def _commit_change(self) -> None:
        """The point of no return: the new group is the group."""
        change = self._change
        assert change is not None and self._staging is not None
        staged, target = self._staging.staged, self._staging.target
        everybody = self._devices | self._joining
        self._going = [name for name in self._devices if name not in target.devices]
        self._devices = {name: everybody[name] for name in target.devices}
        for name, device in self._devices.items():
            device.shard, device.fresh = staged[name], False
        self.speeds = self._speeds_after(change.wish)
        self._joining, self._change, self._kv_cap = {}, None, None

    def _interrupt_change(self, cause: str) -> None:
        """A fault comes first. What was loaded is forgotten, and the change begins again when the engine serves."""
        change = self._change
        assert change is not None
        self._change = None
        self._end_change(change.episode, f"interrupted: {cause}")
        self._cancel_loads()
        for device in self._joining.values():
            device.planes = frozenset()
        self._wishes.appendleft(ch.again(change.wish))

    def _give_up_change(self, reason: str, outcome: str = "") -> None:
        change = self._change
        assert change is not None
        self._change = self._kv_cap = None
        self._end_change(change.episode, outcome or f"refused: {reason}")
        self._cancel_loads()
        for name in self._joining:
            self._do(Drop(device=name, reason=reason))
        self._joining = {}
        self._next_change()

    def _lose_joining(self, name: str, reason: str) -> None:
        change, cause = self._change, f"{name}: {reason}"
        if change is not None:
            self._interrupt_change(cause)
        self._waiting.discard(name)
        for wish in [w for w in self._wishes if name in (found.device for found in w.add)]:
            self._wishes.remove(wish)
            self._turn_down(wish, cause)
        if self.phase == SERVING:
            self._next_change()
        elif change is not None and self.phase not in (CENSUS, REFUSING):
            self._fault(cause, name)
        elif self.phase == LEAVING and not self._waiting:
            self._take_census()  # it was the last that had not left

    def _cancel_loads(self) -> None:
        for ticket, order in self._orders.items():
            self._do(CancelLoad(device=order.device, ticket=ticket))
        self._orders.clear()

    # ------------------------------------------------------------------------------------------ helpers

    @property
    def _recovery(self) -> Episode:
        assert self._episode is not None
        return self._episode

    def _find(self, name: str) -> Device | None:
        """A member, or a device that is to become one."""
        return self._devices.get(name) or self._joining.get(name)

    def _do(self, command: Command) -> None:
        self._commands.append(command)

    def _say(self, text: str, episode: Episode | None = None) -> None:
        line = Line(at_s=self._now, epoch=self.epoch, phase=self.phase, text=text)
        (episode or self._recovery).lines.append(line)

    def _new_episode(self, cause: str, change_id: int = 0) -> Episode:
        self.episodes.append(Episode(began_s=self._now, cause=cause, first_epoch=self.epoch, change_id=change_id))
        return self.episodes[-1]

    def _begin_episode(self, cause: str) -> None:
        self._episode = self._new_episode(cause)

    def _begin_episode_if_serving(self, cause: str) -> None:
        if self._recovery.ended_s is not None and self.phase != REFUSING:
            self.num_faults += 1
            self._begin_episode(cause)
            self._recovery.phases.append(("detected", self._now))

    def _enter(self, phase: str, timeout_s: float | None = None) -> None:
        self.phase = phase
        if phase not in (SERVING, REFUSING):
            self._recovery.phases.append((phase, self._now))
        self._phase_deadline_s = None if timeout_s is None else self._now + timeout_s
        self._waiting = set()

    def _await(self, phase: str, devices: list[str], timeout_s: float, then: Callable[[], None]) -> None:
        """Enters `phase` until all `devices` have answered; with none to wait for, goes straight on."""
        if not devices:
            then()
            return
        self._enter(phase, timeout_s)
        self._waiting = set(devices)

    def _arrived(self, device: str, then: Callable[[], None]) -> None:
        self._waiting.discard(device)
        if not self._waiting:
            then()

    def _count_load(self, episode: Episode, event: Loaded) -> None:
        episode.loaded_bytes += event.num_bytes - event.peer_bytes
        episode.copied_bytes += event.peer_bytes
        self._say(f"{event.device} has its {event.num_bytes} bytes, {event.peer_bytes} of them from peers", episode)
        links = {source: (size, rate) for source, size, rate in event.links}
        episode.links = added(episode.links, {f"{source}>{event.device}": link for source, link in links.items()})
        if self._brought is not None:
            self._brought = self._brought.heard(event.device, event.num_bytes, event.num_bytes, links, self._now)

    def _tell_brought(self, episode: Episode) -> None:
        if self._brought is not None:
            self._say(self._brought.in_words_at_the_end(self._now - self._ordered_s), episode)
            self._brought = None

    def _forget_load(self, name: str) -> None:
        self._loading.discard(name)
        if not self._loading:
            self._load_deadline_s = None
        self._orders = {ticket: order for ticket, order in self._orders.items() if order.device != name}

    def _lose(self, name: str, reason: str) -> None:
        del self._devices[name]
        self._waiting.discard(name)
        self._recovery.devices_lost.append(name)
        self._say(f"{name} is lost: {reason}")
        self._distrust_copies_from(name)
        self._do(Drop(device=name, reason=reason))
        if self._change is not None:
            self._interrupt_change(f"{name} is lost")

    def _distrust_copies_from(self, name: str) -> None:
        """The device may have died while it was copied from: what this episode copied of its heads is not whole."""
        heads = {head for source, head, _ in self._copies if source == name}
        if not heads:
            return
        self._say(f"KV head(s) {', '.join(map(str, sorted(heads)))} were copied from {name}: not to be trusted")
        for device, state in self._devices.items():
            state.planes -= {head for _, head, to in self._copies if to == device and head in heads}
        self._copies = {copy for copy in self._copies if copy[1] not in heads}

    def _missing_units(self) -> set[tuple[str, int]]:
        layout = self.layout
        return {
            (family, unit)
            for family in self.units.families
            for unit in set(range(self.units.num_units[family])) - layout.held(family)
        }

    def _any_fresh(self) -> bool:
        return any(device.fresh for device in self._devices.values())

    def _fitting_kv_blocks(self, layout: Layout) -> int:
        return fitting_kv_blocks(
            self.units,
            self._devices | self._joining,
            layout,
            block_size=self.config.kv_block_size,
            wanted=self.config.kv_blocks if self._kv_cap is None else self._kv_cap,
            least=self.config.min_kv_blocks,
        )

    def _forget_lopsided_state(self) -> None:
        """Found state is used if it makes the layout that was asked for, or lacks something that is loaded onto
        the emptier devices. If it is whole but leaves devices idle, the asked-for degree wins: load anew."""
        if self._missing_units() or all(d.fresh for d in self._devices.values()):
            return
        counts = [len(device.shard[ATTENTION]) for device in self._devices.values()]
        if self.config.speeds or max(counts) - min(counts) <= 1:
            return
        self._say(f"state found is whole but uneven (q heads {counts}): loaded anew, evenly")
        for name, device in self._devices.items():
            device.shard, device.fresh = empty_shard(name), True


def _device(found: DeviceFound) -> Device:
    shard = found.shard or empty_shard(found.device)
    return Device(budget_bytes=found.budget_bytes, shard=shard, fresh=found.shard is None)


def _name(wish: Change) -> str:
    return wish.why if not wish.attempt else f"{wish.why} (attempt {wish.attempt + 1})"


def _num_bytes(moves: tuple[Move, ...]) -> int:
    return sum(move.num_bytes for move in moves)


_TIMED = (LEAVING, ADOPTING, ATTACHING, THINNING, COMPACTING, RESTORING, ARRANGING, FORMING)

_KV_WORDS = {
    KVState.whole: "KV planes are whole",
    KVState.mirrored: "KV planes are whole where the mirror had them: the newest tokens replay",
    KVState.lost: "KV planes are missing: sequences replay",
}

_HANDLERS: dict[type, Callable[[Coordinator, Any], None]] = {
    Start: Coordinator._on_start,
    Change: Coordinator._on_change,
    Switch: Coordinator._on_switch,
    WorkerGone: Coordinator._on_worker_gone,
    WorkerHung: Coordinator._on_worker_hung,
    AnchorGone: Coordinator._on_anchor_gone,
    Left: Coordinator._on_left,
    CensusTaken: Coordinator._on_census,
    Adopted: Coordinator._on_adopted,
    Attached: Coordinator._on_attached,
    Reserved: Coordinator._on_reserved,
    Loaded: Coordinator._on_loaded,
    Progressed: Coordinator._on_progressed,
    LoadFailed: Coordinator._on_load_failed,
    Arranged: Coordinator._on_arranged,
    Compacted: Coordinator._on_compacted,
    Restored: Coordinator._on_restored,
    Formed: Coordinator._on_formed,
    Tick: Coordinator._on_tick,
}


def replay(
    units: ModelUnits, config: RecoveryConfig, log: list[tuple[float, Event]]
) -> tuple[Coordinator, list[list[Command]]]:
    """Runs a recorded event log through a new coordinator: the same commands and story, no process started."""
    coordinator = Coordinator(units, config)
    return coordinator, [coordinator.handle(event, now_s) for now_s, event in log]
