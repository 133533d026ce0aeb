"""Changes that nobody has to wait for: a device joins or leaves, speeds change, experts are rebalanced.

The bytes move behind the computation, into slots that no step reads. Then the group switches, between two steps:
planes of KV heads that moved are copied, units that were given away make room, a new group is formed. Until the
switch begins to move what is in use (`Arrange`), a change can be called off without a trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from anchortp.layout import EVERY_FAMILY, Layout, Shard, empty_shard
from anchortp.plan import Move, Plan
from anchortp.recovery.devices import Device
from anchortp.recovery.events import Change
from anchortp.recovery.story import Episode

ATTACHING, MAKING_ROOM, RESERVING, LOADING, READY, SWITCHING = (
    "attaching",
    "making room",
    "reserving",
    "loading",
    "ready",
    "switching",
)
MAX_ATTEMPTS = 3


@dataclass(slots=True, kw_only=True)
class PlannedChange:
    """One change on its way. `joining`: devices that are no members yet. `waiting`: whose answers are awaited."""

    wish: Change
    episode: Episode
    joining: dict[str, Device]
    step: str = ATTACHING
    plan: Plan | None = None
    ticket: int = 0
    waiting: set[str] = field(default_factory=set)
    deadline_s: float | None = None

    def enter(self, step: str, now_s: float, waiting: set[str] | None = None, timeout_s: float | None = None) -> None:
        self.step = step
        self.waiting = waiting or set()
        self.deadline_s = None if timeout_s is None else now_s + timeout_s
        self.episode.phases.append((step, now_s))


def loads_of(plan: Plan) -> tuple[Move, ...]:
    """The moves that bring bytes to a device from elsewhere. The others only close up slots, see `Arrange`."""
    loads = tuple(move for move in plan.moves if not move.is_relocation)
    assert all(move.stage == 0 for move in loads), "the engine reserves everything first and loads in one stage"
    return loads


def staged_layout(plan: Plan, held: Layout) -> Layout:
    """What all devices hold, in slots, when everything has arrived and nothing has been given up.

    `held`: the shards of all devices that are left, those that are to leave included.
    """
    staged = held
    for device in plan.after.devices:
        shard = held[device] if device in held.devices else empty_shard(device)
        staged = staged.with_shard(_with_arrivals(plan, shard))
    return staged


def _with_arrivals(plan: Plan, shard: Shard) -> Shard:
    arrivals: dict[str, dict[int, int]] = {}
    for move in loads_of(plan):
        if move.device == shard.device and move.family in EVERY_FAMILY:
            slots = arrivals.setdefault(move.family, {})
            slots |= {move.slot + i: move.unit + i for i in range(move.num_units)}
    for family, slots in arrivals.items():
        first = len(shard[family])
        assert sorted(slots) == list(range(first, first + len(slots))), f"{shard.device}: {family} leaves a gap"
        shard = shard.appended(family, (slots[slot] for slot in sorted(slots)))
    return shard


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
