"""The recovery coordinator: events in, commands out, the clock passed in, every decision with its reason.

```
            Start                      all Left            CensusTaken
  idle ─────────────► census   leaving ────────► census ─────────────┐
                                  ▲                                  ▼
     a fault in any later phase   │      adopting (a dead anchor, a live worker) ─► attaching
     raises the epoch and ────────┘                                                    │ all Attached
     begins again from here                              plan: nothing fits ─► refusing│
                                                                                       ▼
  serving ◄─ forming ◄─ restoring ◄─ loading ◄──── Reserved ──── reserving ◄──── compacting
     all Formed   all Restored   all Loaded                             (where KV has to shrink)
```

`layout` always says what is whole in the devices' arenas, so a second fault in the middle of a recovery plans
from what really arrived. Nothing here reads a clock, a socket or a tensor; the engine's controller does the IO.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anchortp.errors import DoesNotFit
from anchortp.layout import (
    ATTENTION,
    KV,
    KVAddresses,
    Layout,
    ModelUnits,
    Shard,
    WeightAddresses,
    check_devices,
    empty_shard,
)
from anchortp.plan import Plan, fill_plan, shrink_plan
from anchortp.recovery.events import (
    Abort,
    Adopt,
    Adopted,
    AnchorGone,
    Attach,
    Attached,
    CensusTaken,
    Command,
    Compact,
    Compacted,
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
    Refuse,
    Reserve,
    Reserved,
    Restore,
    Restored,
    Resume,
    Start,
    TakeCensus,
    Tick,
    WorkerGone,
    WorkerHung,
)
from anchortp.recovery.story import Episode, Line

IDLE, LEAVING, CENSUS, ADOPTING, ATTACHING = "idle", "leaving", "census", "adopting", "attaching"
COMPACTING, RESERVING, LOADING, RESTORING = "compacting", "reserving", "loading", "restoring"
FORMING, SERVING, REFUSING = "forming", "serving", "refusing"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """What the coordinator decides with. Times in seconds.

    `kv_blocks`: blocks of `kv_block_size` tokens that are wanted; `min_kv_blocks`: fewer are not worth serving.
    `max_failures`: a device whose worker dies that often without the engine serving in between is given up.
    `load_bytes_per_s`: a load slower than this counts as hung. `kv_mirror`: the host keeps copies of KV blocks.
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
    max_failures: int = 3
    kv_mirror: bool = False


@dataclass(slots=True, kw_only=True)
class _Device:
    budget_bytes: int
    shard: Shard
    fresh: bool  # the arena holds nothing yet, not even the replicated tensors
    has_anchor: bool = True
    has_worker: bool = False
    failures: int = 0
    planes: frozenset[int] = frozenset()  # KV heads whose planes are as good as `Coordinator._kv` says


class Coordinator:
    """One engine's recovery. `handle` is the only way in; everything readable is plain attributes.

    `epoch`, `phase`, `deadline_s` (clock time at which a `Tick` is due, None if nothing is awaited), `layout`,
    `num_kv_blocks`, `episodes` (the story, oldest first), `log` (every event with its time, for replay).
    """

    def __init__(self, units: ModelUnits, config: RecoveryConfig):
        self.units = units
        self.config = config
        self.epoch = 0
        self.phase = IDLE
        self.deadline_s: float | None = None
        self.num_kv_blocks = 0
        self.episodes: list[Episode] = []
        self.log: list[tuple[float, Event]] = []
        self._devices: dict[str, _Device] = {}
        self._waiting: set[str] = set()
        self._plan_made: Plan | None = None
        self._target: Layout | None = None
        self._kv = KVState.lost
        self._copies: set[tuple[str, int, str]] = set()  # (from, KV head, to): planes copied in this episode
        self._restore_failed = False  # in this epoch
        self._missing: set[tuple[str, int]] = set()
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

    def held_bytes(self) -> int:
        return sum(self.layout.weight_bytes(self.units, d) for d in self._devices)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """JSON-able: what each device holds now, for `status`."""
        layout = self.layout
        return {
            name: {
                "budget_bytes": device.budget_bytes,
                "weight_bytes": layout.weight_bytes(self.units, name),
                "has_worker": device.has_worker,
                "has_anchor": device.has_anchor,
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
        assert self._waiting <= set(self._devices), "waits for a device that is gone"
        assert (self.deadline_s is not None) == (self.phase in _TIMED), f"{self.phase}: deadline"
        if self.phase == SERVING:
            self.layout.check(self.units)
            assert all(d.has_worker for d in self._devices.values()), "serves without a worker"
            assert not self._waiting

    # ------------------------------------------------------------------------------------------- events

    def _on_start(self, event: Start) -> None:
        assert self.phase == IDLE, "an engine starts once"
        check_devices(self.units, [found.device for found in event.devices], self.config.speeds)
        self.epoch = event.epoch
        self._devices = {
            found.device: _Device(
                budget_bytes=found.budget_bytes,
                shard=found.shard or empty_shard(found.device),
                fresh=found.shard is None,
            )
            for found in event.devices
        }
        self._begin_episode("start")
        self._forget_lopsided_state()
        if event.num_kv_blocks:
            self._kv, self.num_kv_blocks = KVState.whole, event.num_kv_blocks
            for device in self._devices.values():
                device.planes = frozenset(device.shard[KV])
        self._missing = self._missing_units()
        self._take_census()

    def _on_worker_gone(self, event: WorkerGone) -> None:
        device = self._devices.get(event.device)
        if device is None or not device.has_worker:
            return
        device.has_worker = False
        device.failures += 1
        self._waiting.discard(event.device)
        self._fault(f"worker of {event.device} is gone: {event.reason}")

    def _on_worker_hung(self, event: WorkerHung) -> None:
        if event.device not in self._devices or not self._devices[event.device].has_worker:
            return
        self._begin_episode_if_serving(f"worker of {event.device} hangs: {event.reason}")
        self._say(f"fence {event.device}: {event.reason}")
        # The answer is WorkerGone, which then raises the epoch: a hung worker is a crash made certain.
        self._do(Fence(device=event.device, reason=event.reason))

    def _on_anchor_gone(self, event: AnchorGone) -> None:
        device = self._devices.get(event.device)
        if device is None or not device.has_anchor:
            return
        device.has_anchor = False
        if self.phase == SERVING and device.has_worker:
            self._say(
                f"anchor of {event.device} is gone, its worker is not: a new anchor adopts the memory",
                self.episodes[-1],
            )
            self._do(Adopt(device=event.device, epoch=self.epoch))
        elif self.phase not in (SERVING, LEAVING, CENSUS, REFUSING):
            self._fault(f"anchor of {event.device} is gone")

    def _on_left(self, event: Left) -> None:
        if self.phase == LEAVING and event.epoch == self.epoch:
            self._arrived(event.device, self._take_census)

    def _on_census(self, event: CensusTaken) -> None:
        if self.phase != CENSUS or event.epoch != self.epoch:
            return
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
        self._say(
            f"new anchor of {event.device} " + ("holds its memory" if event.ok else f"failed: {event.reason}"),
            self.episodes[-1],
        )
        if self.phase == SERVING and not event.ok:
            self._adopt_again(event.device)
        if self.phase != ADOPTING:
            return
        if not event.ok:
            self._do(Fence(device=event.device, reason="no anchor can hold its memory"))
            return
        self._arrived(event.device, self._attach)

    def _adopt_again(self, name: str) -> None:
        """The worker still holds the memory, so another anchor may have more luck; but not for ever."""
        device = self._devices[name]
        device.failures += 1
        if device.failures <= self.config.max_failures:
            self._do(Adopt(device=name, epoch=self.epoch))

    def _on_attached(self, event: Attached) -> None:
        device = self._devices.get(event.device)
        if device is None:
            return
        if self.phase == ATTACHING and event.epoch == self.epoch:
            self._arrived(event.device, self._plan)

    def _on_reserved(self, event: Reserved) -> None:
        if self.phase != RESERVING or event.epoch != self.epoch:
            return
        if event.refused:
            self._refuse(event.refused)
            return
        assert self._target is not None
        to_load = [
            (name, shard)
            for name, shard in ((s.device, s) for s in self._target.shards)
            if shard != self._devices[name].shard or self._devices[name].fresh
        ]
        largest = max((self._load_bytes(name, shard) for name, shard in to_load), default=0)
        timeout = self.config.load_timeout_s + largest / self.config.load_bytes_per_s
        for name, shard in to_load:
            device = self._devices[name]
            self._do(Load(device=name, epoch=self.epoch, before=device.shard, after=shard, fresh=device.fresh))
        self._await(LOADING, [name for name, _ in to_load], timeout, self._restore)

    def _on_loaded(self, event: Loaded) -> None:
        """A fact whatever the epoch: the bytes of the load that was asked for are in the arena."""
        device = self._devices.get(event.device)
        if device is None or self._target is None or event.device not in self._target.devices:
            return
        after = self._target[event.device]
        episode = self.episodes[-1]
        episode.loaded_bytes += event.num_bytes
        if device.fresh:
            episode.replicated_bytes += self.units.replicated_bytes
        for family in self.units.families:
            new = after[family][len(device.shard[family]) :]
            self._missing -= {(family, unit) for unit in new}
        device.shard, device.fresh = after, False
        if self.phase == LOADING and event.epoch == self.epoch:
            self._say(f"{event.device} loaded {event.num_bytes} bytes")
            self._arrived(event.device, self._restore)

    def _on_load_failed(self, event: LoadFailed) -> None:
        if self.phase == LOADING and event.epoch == self.epoch:
            self._refuse(f"{event.device} could not load its weights: {event.reason}")

    def _on_compacted(self, event: Compacted) -> None:
        if self.phase == COMPACTING and event.epoch == self.epoch:
            self._arrived(event.device, self._reserve)

    def _on_restored(self, event: Restored) -> None:
        """Good for as long as the engine does not serve: nobody writes to the cache in the meantime."""
        device = self._devices.get(event.device)
        if device is None or self._target is None or event.device not in self._target.devices:
            return
        episode = self.episodes[-1]
        episode.kv_copied_bytes += event.copied_bytes
        episode.kv_restored_bytes += event.restored_bytes
        if event.ok:
            device.planes = frozenset(self._target[event.device][KV])
        else:
            self._say(f"{event.device} could not restore its KV planes")
            self._restore_failed |= event.epoch == self.epoch
        if self.phase == RESTORING and event.epoch == self.epoch:
            self._arrived(event.device, self._form)

    def _on_formed(self, event: Formed) -> None:
        if self.phase == FORMING and event.epoch == self.epoch:
            self._arrived(event.device, self._serve)

    def _on_tick(self, event: Tick) -> None:
        if self.deadline_s is None or self._now < self.deadline_s:
            return
        late = sorted(self._waiting)
        self._say(f"{', '.join(late) or 'the shell'} did not answer in time in phase {self.phase}")
        self.deadline_s = self._now + self.config.leave_timeout_s
        for name in late:
            if self._devices[name].has_worker:
                self._do(Fence(device=name, reason=f"no answer in phase {self.phase}"))

    # ------------------------------------------------------------------------------------------- phases

    def _fault(self, cause: str) -> None:
        """Something broke. Before anything of this epoch was built, it is only noted; later the epoch rises."""
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
        live = [name for name, device in self._devices.items() if device.has_worker]
        self._say(f"epoch {self.epoch} begins; {len(live)} worker(s) leave the old group")
        for name in live:
            self._do(Leave(device=name, epoch=self.epoch))
        self._await(LEAVING, live, self.config.leave_timeout_s, self._take_census)

    def _take_census(self) -> None:
        self._enter(CENSUS)
        self._do(TakeCensus(epoch=self.epoch, devices=self.members))

    def _attach(self) -> None:
        idle = [name for name, device in self._devices.items() if not device.has_worker]
        for name in idle:
            # From here on its death is heard as WorkerGone, like that of any worker.
            self._devices[name].has_worker = True
            self.episodes[-1].workers_replaced.append(name)
            self._say(f"a spare process takes over {name}")
            self._do(Attach(device=name, epoch=self.epoch))
        self._await(ATTACHING, idle, self.config.attach_timeout_s, self._plan)

    def _plan(self) -> None:
        try:
            plan = self._make_plan()
            blocks = self._fit_kv_blocks(plan.after)
        except DoesNotFit as error:
            self._refuse(str(error))
            return
        episode = self.episodes[-1]
        missing = self._missing_units()
        episode.lost_bytes += sum(self.units.unit_bytes[f] for f, _ in missing - self._missing)
        self._missing = missing
        episode.replica_bytes += plan.replica_bytes
        for reason in plan.reasons:
            self._say(reason)
        self._plan_made, self._target = plan, plan.after
        self._find_kv_sources()
        before, self.num_kv_blocks = self.num_kv_blocks, blocks
        if blocks < before:
            self._say(f"KV cache shrinks from {before} to {blocks} blocks to make room for weights")
        if not plan.moves and blocks == before and not self._any_fresh():
            self._restore()
        elif blocks < before and self._kv is not KVState.lost:
            holders = tuple(name for name, device in self._devices.items() if device.planes)
            self._await(COMPACTING, list(holders), self.config.load_timeout_s, self._reserve)
            self._do(Compact(epoch=self.epoch, num_kv_blocks=blocks, devices=holders))
        else:
            self._reserve()

    def _reserve(self) -> None:
        assert self._plan_made is not None
        self._enter(RESERVING)
        fresh = tuple(name for name, device in self._devices.items() if device.fresh)
        self._do(Reserve(epoch=self.epoch, plan=self._plan_made, num_kv_blocks=self.num_kv_blocks, fresh=fresh))

    def _new_planes(self) -> dict[str, tuple[PlaneSource, ...]]:
        """Per device the KV heads whose planes it lacks, and the first device that has them."""
        assert self._target is not None
        result = {}
        for shard in self._target.shards:
            missing = [head for head in shard[KV] if head not in self._devices[shard.device].planes]
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
        assert self._target is not None
        new = {} if self._kv is KVState.lost else self._new_planes()
        self._copies |= {(p.device, p.head, name) for name, planes in new.items() for p in planes if p.device}
        self._await(RESTORING, list(new), self.config.load_timeout_s, self._form)
        for name, planes in new.items():
            self._do(Restore(device=name, epoch=self.epoch, planes=planes, layout=self._target))

    def _make_plan(self) -> Plan:
        if not self._devices:
            raise DoesNotFit("no device is left; start anchors and serve again.")
        if all(not any(device.shard.slots) for device in self._devices.values()):
            return fill_plan(self.units, self.members, self.config.speeds)
        return shrink_plan(self.units, self.layout, (), self.config.speeds)

    def _form(self) -> None:
        assert self._target is not None
        self._await(FORMING, list(self.members), self.config.form_timeout_s, self._serve)
        self._do(Form(epoch=self.epoch, layout=self._target, num_kv_blocks=self.num_kv_blocks))

    def _serve(self) -> None:
        self._enter(SERVING)
        if self._restore_failed:
            self._kv = KVState.lost
        episode = self.episodes[-1]
        episode.kv, episode.ended_s, episode.outcome = self._kv.value, self._now, "serving"
        self._say(_KV_WORDS[self._kv])
        self._do(Resume(epoch=self.epoch, kv=self._kv, num_kv_blocks=self.num_kv_blocks))
        self._copies, self._restore_failed = set(), False
        # From here on whatever the cache is said to hold is written by this group, to every plane.
        self._kv = KVState.whole
        for device in self._devices.values():
            device.failures = 0
            device.planes = frozenset(device.shard[KV])

    def _refuse(self, reason: str) -> None:
        self._enter(REFUSING)
        self._waiting.clear()
        self._say(f"refuse: {reason}")
        self.episodes[-1].ended_s, self.episodes[-1].outcome = self._now, f"refusing: {reason}"
        self._do(Refuse(epoch=self.epoch, reason=reason))

    # ------------------------------------------------------------------------------------------ helpers

    def _do(self, command: Command) -> None:
        self._commands.append(command)

    def _say(self, text: str, episode: Episode | None = None) -> None:
        line = Line(at_s=self._now, epoch=self.epoch, phase=self.phase, text=text)
        (episode or self.episodes[-1]).lines.append(line)

    def _begin_episode(self, cause: str) -> None:
        self.episodes.append(Episode(began_s=self._now, cause=cause, first_epoch=self.epoch))

    def _begin_episode_if_serving(self, cause: str) -> None:
        if self.episodes[-1].ended_s is not None and self.phase != REFUSING:
            self._begin_episode(cause)
            self.episodes[-1].phases.append(("detected", self._now))

    def _enter(self, phase: str, timeout_s: float | None = None) -> None:
        self.phase = phase
        if phase not in (SERVING, REFUSING):
            self.episodes[-1].phases.append((phase, self._now))
        self.deadline_s = None if timeout_s is None else self._now + timeout_s
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

    def _lose(self, name: str, reason: str) -> None:
        del self._devices[name]
        self._waiting.discard(name)
        self.episodes[-1].devices_lost.append(name)
        self._say(f"{name} is lost: {reason}")
        self._distrust_copies_from(name)
        self._do(Drop(device=name, reason=reason))

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

    def _load_bytes(self, name: str, after: Shard) -> int:
        held = self._devices[name]
        new = sum((len(after[f]) - len(held.shard[f])) * self.units.unit_bytes[f] for f in self.units.families)
        return new + (self.units.replicated_bytes if held.fresh else 0)

    def _fit_kv_blocks(self, layout: Layout) -> int:
        """As many KV blocks as wanted, or as fit beside the weights on the fullest device."""
        weights = WeightAddresses(units=self.units)
        kv = KVAddresses(
            config=self.units.config,
            block_size=self.config.kv_block_size,
            num_blocks=self.config.kv_blocks,
        )
        best = self.config.kv_blocks
        for shard in layout.shards:
            need = weights.committed_bytes(shard)
            room = self._devices[shard.device].budget_bytes - need
            if room < 0:
                raise DoesNotFit(
                    f"{shard.device} would hold {need} bytes of weights, its budget is "
                    f"{self._devices[shard.device].budget_bytes} bytes. Give it more memory or use more devices."
                )
            fitting = kv.blocks_that_fit(len(shard[KV]), room)
            if fitting < self.config.min_kv_blocks:
                raise DoesNotFit(
                    f"{shard.device} has {room} bytes left for KV cache beside {need} bytes of weights: "
                    f"{fitting} block(s) of {self.config.kv_block_size} tokens, but at least "
                    f"{self.config.min_kv_blocks} are needed. Give it more memory or use more devices."
                )
            best = min(best, fitting)
        return best

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


_TIMED = (LEAVING, ADOPTING, ATTACHING, COMPACTING, LOADING, RESTORING, FORMING)

_KV_WORDS = {
    KVState.whole: "KV planes are whole",
    KVState.mirrored: "KV planes are whole where the mirror had them: the newest tokens replay",
    KVState.lost: "KV planes are missing: sequences replay",
}

_HANDLERS: dict[type, Callable[[Coordinator, Any], None]] = {
    Start: Coordinator._on_start,
    WorkerGone: Coordinator._on_worker_gone,
    WorkerHung: Coordinator._on_worker_hung,
    AnchorGone: Coordinator._on_anchor_gone,
    Left: Coordinator._on_left,
    CensusTaken: Coordinator._on_census,
    Adopted: Coordinator._on_adopted,
    Attached: Coordinator._on_attached,
    Reserved: Coordinator._on_reserved,
    Loaded: Coordinator._on_loaded,
    LoadFailed: Coordinator._on_load_failed,
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
