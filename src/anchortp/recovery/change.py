"""Changes that nobody has to wait for: a device joins or leaves, speeds change, experts are rebalanced.

The bytes move behind the computation, into slots that no step reads. Then the group switches, between two steps:
planes of KV heads that moved are copied, units that were given away make room, a new group is formed. Until the
switch begins to move what is in use (`Arrange`), a change can be called off without a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from anchortp.layout import EVERY_FAMILY, EXPERT, KV, Layout, Shard, empty_shard
from anchortp.plan import FromHost, Move, Plan
from anchortp.recovery.devices import Device
from anchortp.recovery.events import Change
from anchortp.recovery.story import Episode

ATTACHING, RESERVING, LOADING, READY, SWITCHING = "attaching", "reserving", "loading", "ready", "switching"
MAX_ATTEMPTS = 3


@dataclass(slots=True, kw_only=True)
class PlannedChange:
    """One change on its way. `joining`: devices that are no members yet. `waiting`: whose answers are awaited."""

    wish: Change
    episode: Episode
    joining: dict[str, Device]
    step: str = ATTACHING
    staging: Staging | None = None
    waiting: set[str] = field(default_factory=set)
    deadline_s: float | None = None

    def enter(self, step: str, now_s: float, waiting: set[str] | None = None, timeout_s: float | None = None) -> None:
        self.step = step
        self.waiting = waiting or set()
        self.deadline_s = None if timeout_s is None else now_s + timeout_s
        self.episode.phases.append((step, now_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """How a plan is carried out on what is really there.

    A plan says which units go where from where; the slots are ours. `loads`: per device the moves that bring it
    something, into slots behind those in use. `staged`: what all devices hold when everything has arrived and nothing
    has been given up, those that are to leave included. `target`: what the group holds then. `keeps_room`: memory that
    is given up stays free for further replicas of experts; else the KV cache grows into it.
    """

    loads: Mapping[str, tuple[Move, ...]]
    staged: Layout
    target: Layout
    keeps_room: bool

    @property
    def gives_up(self) -> bool:
        return self.staged != self.target


def stage(plan: Plan, held: Layout) -> Staging:
    """`held`: the shards of all devices that are left. It may have units twice of which `plan` knows one place: where
    a recovery that passed units on was cut short."""
    loads, staged = {}, held
    for after in plan.after.shards:
        shard = held[after.device] if after.device in held.devices else empty_shard(after.device)
        moves = []
        for load in sorted(_loads_of(plan, after.device), key=lambda m: (m.family, m.slot)):
            for move in _of_what_lacks(load, shard):
                slot = len(shard[move.family]) if move.family in EVERY_FAMILY else 0
                moves += _from_real_slots(replace(move, slot=slot), held)
                if move.family in EVERY_FAMILY:
                    shard = shard.appended(move.family, range(move.unit, move.unit + move.num_units))
        loads[after.device] = tuple(moves)
        staged = staged.with_shard(shard)
    target = Layout(shards=tuple(closed_up(staged[after.device], after) for after in plan.after.shards))
    return Staging(loads=loads, staged=staged, target=target, keeps_room=plan.policy == "eplb")


def _loads_of(plan: Plan, device: str) -> list[Move]:
    loads = [move for move in plan.moves if move.device == device and not move.is_relocation]
    assert all(move.stage == 0 for move in loads), "the engine reserves everything first and loads in one stage"
    assert all(move.first_byte == 0 for move in loads), "units come whole"
    return loads


def _of_what_lacks(move: Move, shard: Shard) -> Iterator[Move]:
    """The move without units that the device has after all."""
    there = set(shard[move.family]) if move.family in EVERY_FAMILY else set()
    if not any(move.unit + i in there for i in range(move.num_units)):
        yield move
        return
    size = move.num_bytes // move.num_units
    for i in range(move.num_units):
        if move.unit + i not in there:
            yield replace(move, unit=move.unit + i, num_units=1, num_bytes=size)


def _from_real_slots(move: Move, held: Layout) -> Iterator[Move]:
    """The move, in as many runs as its units have in the slots of a peer."""
    if isinstance(move.source, FromHost) or move.family not in EVERY_FAMILY:
        yield move
        return
    there, size = held[move.source.device][move.family], move.num_bytes // move.num_units
    slots = [there.index(move.unit + i) for i in range(move.num_units)]
    begin = 0
    for end in range(1, move.num_units + 1):
        if end == move.num_units or slots[end] != slots[begin] + end - begin:
            yield replace(
                move,
                unit=move.unit + begin,
                slot=move.slot + begin,
                num_units=end - begin,
                num_bytes=(end - begin) * size,
                source=replace(move.source, slot=slots[begin]),
            )
            begin = end


def closed_up(staged: Shard, wanted: Shard) -> Shard:
    """The units of `wanted`, all of which are staged: in the slots where they are, and those in the last slots in place
    of what goes."""
    for family in EVERY_FAMILY:
        keep, units = set(wanted[family]), list(staged[family])
        assert keep <= set(units), f"{staged.device}: {family} units that never arrived"
        tail = [unit for unit in units[len(keep) :] if unit in keep]
        dense = [unit if unit in keep else tail.pop(0) for unit in units[: len(keep)]]
        staged = staged.replaced(family, dense)
    return staged


def distinct(held: Layout) -> Layout:
    """Without second copies of units that have one holder. A recovery that was cut short while it passed units on
    leaves some; who has fewer units keeps them."""
    for family in EVERY_FAMILY:
        if family in (KV, EXPERT):
            continue
        seen: set[int] = set()
        for shard in sorted(held.shards, key=lambda s: len(s[family])):
            held = held.with_shard(shard.replaced(family, (unit for unit in shard[family] if unit not in seen)))
            seen |= set(shard[family])
    return held


def arrangement(staged: Shard, final: Shard) -> tuple[tuple[str, int, int], ...]:
    """(family, from, to): the slots that must be copied so that a device has `final`. None if it only lets go of its
    last slots. A source is always behind the last slot of `final`, a target was given up: any order will do."""
    steps = []
    for family in EVERY_FAMILY:
        before, after = staged[family], final[family]
        assert set(after) <= set(before), f"{staged.device}: {family} units that never arrived"
        where = {unit: slot for slot, unit in enumerate(before)}
        for slot, unit in enumerate(after):
            if before[slot] != unit:
                assert where[unit] >= len(after), f"{staged.device}: {family} {unit} moves for nothing"
                steps.append((family, where[unit], slot))
    return tuple(steps)


def again(wish: Change) -> Change:
    """The same wish, once more after a fault. A plan that was handed in was made for a layout that is gone."""
    return replace(wish, attempt=wish.attempt + 1, plan=None)
