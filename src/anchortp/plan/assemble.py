"""From "these bytes go there, that way" to a plan: stages, slots, runs, drops.

1. Stages. A device reserves every destination before the first byte moves. If what it holds and what it receives
   fit in its memory together, that is one stage; else as much as fits is moved, what has arrived elsewhere is
   dropped, and so on. A unit is dropped only once all its new holders have it.
2. Slots. Whatever a device keeps stays where it is; arrivals take the lowest free slots. If units were dropped
   from the middle, a last stage moves the units at the end into the holes, inside the device.
3. Runs. Pieces that are consecutive in unit, slot and source slot and take the same route become one move.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from anchortp.errors import BudgetExceeded, DoesNotFit, in_words
from anchortp.layout import EXPERT, FAMILIES, KV, Layout, Shard
from anchortp.plan.plan import PLANE, REPLICATED, Drop, FromHost, FromPeer, Move, Plan
from anchortp.plan.problem import Problem
from anchortp.plan.topology import Route


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `[first_byte, first_byte + num_bytes)` of `count` whole units from `unit` on, or of one unit in part,
    go from the place `source` to `device` along `route`."""

    device: str
    family: str
    unit: int
    count: int
    first_byte: int
    num_bytes: int
    source: str
    route: Route


Kept = Mapping[str, Mapping[str, Sequence[int]]]  # family, device -> units in slot order


def assemble(
    problem: Problem,
    *,
    policy: str,
    kept: Kept,
    pieces: Sequence[Piece],
    replayed: Iterable[int] = (),
    reasons: Sequence[str] = (),
    restart: bool = False,
    bound_s: float = 0.0,
) -> Plan:
    """The plan that leaves each device with what it keeps and what arrives. `restart`: everything is dropped
    before the first byte moves.

    Raises DoesNotFit if a device could not hold its new shard, BudgetExceeded if there is no order in which the
    moves would fit; both with the numbers.
    """
    after_units = _after(problem, kept, pieces)
    _check_final(problem, after_units)
    stages = _stages(problem, kept, pieces, restart)
    board = _Board(problem)
    for number, stage in enumerate(stages):
        board.play(number, stage)
    board.close_up()
    return Plan(
        before=problem.before,
        after=board.layout(),
        moves=tuple(board.moves),
        drops=tuple(board.drops),
        lost=problem.lost,
        lost_bytes=problem.lost_bytes + _lost_planes(problem, pieces),
        reasons=tuple(reasons),
        policy=policy,
        replayed=tuple(sorted(set(replayed))),
        bound_s=bound_s,
    )


def _lost_planes(problem: Problem, pieces: Sequence[Piece]) -> int:
    """Bytes of the planes that no living device holds but a mirror does, each once."""
    heads = {piece.unit for piece in pieces if piece.family == PLANE}
    return sum(problem.plane_bytes for head in heads if not problem.holders(PLANE, head))


def _after(problem: Problem, kept: Kept, pieces: Sequence[Piece]) -> dict[str, dict[str, int]]:
    """Per device and family how many units it ends with."""
    count = {d: {f: len(kept[f].get(d, ())) for f in problem.families} for d in problem.devices}
    for piece in pieces:
        if piece.first_byte == 0 and piece.family in count[piece.device]:
            count[piece.device][piece.family] += piece.count
    return count


def _check_final(problem: Problem, after: Mapping[str, Mapping[str, int]]) -> None:
    for device, widths in after.items():
        budget, need = problem.budget(device), problem.shard_bytes(widths)
        if budget is not None and need > budget:
            raise DoesNotFit(
                f"{device} would hold {in_words(need)} of weights and KV planes, its budget is {in_words(budget)}. "
                f"Use more devices, give it more memory, or keep less KV cache."
            )


# --------------------------------------------------------------------------------------------------- stages

Arrival = tuple[str, str, int]  # device, family, unit


@dataclass(slots=True)
class _Stage:
    pieces: list[Piece]
    drops: list[Arrival]


def _drops(problem: Problem, kept: Kept) -> list[Arrival]:
    result = []
    for family in problem.families:
        for device in problem.devices:
            held = problem.slots[family].get(device, ())
            if len(held) > len(kept[family].get(device, ())):
                keep = set(kept[family].get(device, ()))
                result += [(device, family, unit) for unit in held if unit not in keep]
    return result


def _stages(problem: Problem, kept: Kept, pieces: Sequence[Piece], restart: bool) -> list[_Stage]:
    drops = _drops(problem, kept)
    if restart:
        survivors = [device for device in problem.devices if device in problem.alive]
        drops += [(device, REPLICATED, 0) for device in survivors]
        return [_Stage([], drops), _Stage(list(pieces), [])]
    if _fits_at_once(problem, pieces):
        return [_Stage(list(pieces), drops)]
    return _in_order(problem, pieces, drops)


def _held_bytes(problem: Problem) -> dict[str, int]:
    return {
        device: problem.shard_bytes({f: len(problem.slots[f].get(device, ())) for f in problem.families})
        for device in problem.devices
        if device in problem.alive
    } | dict.fromkeys(problem.fresh, 0)


def _fits_at_once(problem: Problem, pieces: Sequence[Piece]) -> bool:
    used = _held_bytes(problem)
    for piece in pieces:
        used[piece.device] += piece.num_bytes
    budgets = {device: problem.budget(device) for device in used}
    return all(budget is None or used[device] <= budget for device, budget in budgets.items())


def _in_order(problem: Problem, pieces: Sequence[Piece], drops: list[Arrival]) -> list[_Stage]:
    """Stage by stage what fits, each unit whole (with its plane, if it has one), then the drops that free room."""
    waiting: dict[Arrival, list[Piece]] = defaultdict(list)
    for piece in pieces:
        for single in _singles(problem, piece):
            family = KV if single.family == PLANE else single.family
            waiting[single.device, family, single.unit].append(single)
    used, stages = _held_bytes(problem), []
    while waiting:
        admitted: list[Arrival] = []
        for arrival, parts in waiting.items():
            need, budget = sum(part.num_bytes for part in parts), problem.budget(arrival[0])
            # What is forwarded from a device must have come there, or be on its way.
            ready = all(
                (part.source, *arrival[1:]) not in waiting or (part.source, *arrival[1:]) in admitted for part in parts
            )
            if ready and (budget is None or used[arrival[0]] + need <= budget):
                used[arrival[0]] += need
                admitted.append(arrival)
        moved = [part for arrival in admitted for part in waiting.pop(arrival)]
        awaited = {(family, unit) for _, family, unit in waiting}
        freed = [drop for drop in drops if drop[1:] not in awaited]
        drops = [drop for drop in drops if drop[1:] in awaited]
        for device, family, _ in freed:
            used[device] -= problem.size(family) + (problem.plane_bytes if family == KV else 0)
        if not admitted and not freed:
            _refuse(problem, used, waiting)
        stages.append(_Stage(moved, freed))
    return stages or [_Stage([], drops)]


def _refuse(problem: Problem, used: Mapping[str, int], waiting: Mapping[Arrival, Sequence[Piece]]) -> None:
    (device, _, _), parts = next(iter(waiting.items()))
    budget = problem.budget(device)
    assert budget is not None
    need = sum(part.num_bytes for part in parts)
    raise BudgetExceeded(device=device, requested_bytes=need, committed_bytes=used[device], budget_bytes=budget)


def _singles(problem: Problem, piece: Piece) -> Iterator[Piece]:
    if piece.count == 1:
        yield piece
        return
    size = problem.size(piece.family)
    for i in range(piece.count):
        yield Piece(piece.device, piece.family, piece.unit + i, 1, 0, size, piece.source, piece.route)


# ---------------------------------------------------------------------------------------------------- slots


class _Slots:
    """The slots of one family on one device: `before` in the slots from 0 on, then what has come and gone since.

    Most plans only append, and then nothing but the arrivals is looked at.
    """

    def __init__(self, before: Sequence[int]):
        self.before = before
        self.arrived: dict[int, int] = {}  # unit -> slot
        self.holes: list[int] = []
        self.end = len(before)
        self._at: dict[int, int] | None = None  # all units, once somebody asked; kept up to date from then on

    @property
    def at(self) -> dict[int, int]:
        """unit -> slot."""
        if self._at is None:
            self._at = {unit: slot for slot, unit in enumerate(self.before)} | self.arrived
        return self._at

    def take(self, unit: int, count: int) -> int:
        """Slots for `count` units from `unit` on, consecutive ones if there are several. Returns the first."""
        if unit in self.arrived:
            return self.arrived[unit]  # a further part of a unit that has its slot
        if self.holes and count == 1:
            slot = heappop(self.holes)
        else:
            slot, self.end = self.end, self.end + count
        for i in range(count):
            self.arrived[unit + i] = slot + i
            if self._at is not None:
                self._at[unit + i] = slot + i
        return slot

    def free(self, unit: int) -> int:
        slot = self.at.pop(unit)
        self.arrived.pop(unit, None)
        heappush(self.holes, slot)
        if not self.at:
            self.holes, self.end = [], 0
        return slot

    def units(self) -> tuple[int, ...]:
        """In slot order."""
        if self._at is not None:
            return tuple(sorted(self._at, key=self._at.__getitem__))
        return (*self.before, *sorted(self.arrived, key=self.arrived.__getitem__))


class _Board:
    """The slots of all devices while the stages are played; collects moves and drops."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.moves: list[Move] = []
        self.drops: list[Drop] = []
        self.names = tuple(link.name for link in problem.network.links)
        self.routes: dict[Route, tuple[str, ...]] = {}
        self.stores = {p.name: FromHost(place=p.name) for p in problem.topology.places if p.kind != "device"}
        self.stage = 0
        self.slots: dict[tuple[str, str], _Slots] = {}
        # (device, KV head) whose plane is there; those to be replayed are not.
        self.planes = {(d, head) for d, heads in problem.slots.get(KV, {}).items() for head in heads}

    def of(self, family: str, device: str) -> _Slots:
        key = (family, device)
        if key not in self.slots:
            before = self.problem.slots.get(family, {}).get(device, ())
            if family == REPLICATED and device in self.problem.alive:
                before = (0,)
            self.slots[key] = _Slots(before)
        return self.slots[key]

    def play(self, number: int, stage: _Stage) -> None:
        self.stage = number
        placed = [(p, self._place(p)) for p in stage.pieces if p.family != PLANE]
        # A plane lies in the slot of its KV head, which has its slot now.
        planes = [p for p in stage.pieces if p.family == PLANE]
        placed += [(p, self.of(KV, p.device).at[p.unit]) for p in planes]
        self.planes |= {(p.device, p.unit) for p in planes}
        for piece, slot in placed:
            self._move(piece, slot, piece.count)
        freed: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for device, family, unit in stage.drops:
            if family == KV:
                self.planes.discard((device, unit))
            freed[device, family].append((self.of(family, device).free(unit), unit))
        for (device, family), pairs in freed.items():
            self._drop_runs(device, family, sorted(pairs))

    def _place(self, piece: Piece) -> int:
        return 0 if piece.family == REPLICATED else self.of(piece.family, piece.device).take(piece.unit, piece.count)

    def _move(self, piece: Piece, slot: int, count: int) -> None:
        """One move per run of source slots."""
        route = self.routes.get(piece.route)
        if route is None:
            route = self.routes[piece.route] = tuple(self.names[link] for link in piece.route)
        if piece.source in self.stores:
            self._add(piece, piece.unit, slot, count, self.stores[piece.source], route)
            return
        if piece.family == REPLICATED:
            self._add(piece, 0, 0, 1, FromPeer(device=piece.source, slot=0), route)
            return
        there = self.of(KV if piece.family == PLANE else piece.family, piece.source).at
        begin = 0
        for end in range(1, count + 1):
            first = there[piece.unit + begin]
            if end == count or there[piece.unit + end] != first + end - begin:
                source = FromPeer(device=piece.source, slot=first)
                self._add(piece, piece.unit + begin, slot + begin, end - begin, source, route)
                begin = end

    def _add(
        self,
        piece: Piece,
        unit: int,
        slot: int,
        count: int,
        source: FromHost | FromPeer,
        route: tuple[str, ...],
    ) -> None:
        num_bytes = piece.num_bytes if piece.count == 1 else count * self.problem.size(piece.family)
        self.moves.append(
            Move(
                device=piece.device,
                family=piece.family,
                unit=unit,
                slot=slot,
                source=source,
                num_bytes=num_bytes,
                num_units=count,
                first_byte=piece.first_byte,
                route=route,
                stage=self.stage,
            )
        )

    def _drop_runs(self, device: str, family: str, pairs: list[tuple[int, int]]) -> None:
        for slot, unit, count in _runs(pairs):
            self.drops.append(
                Drop(device=device, family=family, unit=unit, slot=slot, num_units=count, stage=self.stage)
            )

    def close_up(self) -> None:
        """Moves the units at the end of each device into the holes, so that the slots are dense again; in as many
        stages as the device's memory asks for."""
        first = self.stage + 1
        for device in self.problem.devices:
            for number, batch in enumerate(self._batches(device, self._relocations(device))):
                self.stage = first + number
                for family in self.problem.families:
                    self._relocate(family, device, [(old, unit, new) for f, old, unit, new in batch if f == family])

    def _relocations(self, device: str) -> Iterator[tuple[str, int, int, int]]:
        """(family, old slot, unit, new slot)."""
        for family in self.problem.families:
            slots = self.slots.get((family, device))
            if slots is not None and slots.holes:
                taken = set(slots.at.values())
                holes = [slot for slot in range(len(taken)) if slot not in taken]
                tail = sorted((slot, unit) for unit, slot in slots.at.items() if slot >= len(taken))
                for (old, unit), new in zip(tail, holes, strict=True):
                    slots.at[unit] = new
                    yield family, old, unit, new

    def _batches(
        self, device: str, relocations: Iterable[tuple[str, int, int, int]]
    ) -> Iterator[list[tuple[str, int, int, int]]]:
        """As many at once as fit beside what the device holds."""
        problem, budget = self.problem, self.problem.budget(device)
        held = problem.shard_bytes({f: len(self.of(f, device).units()) for f in problem.families})
        batch: list[tuple[str, int, int, int]] = []
        used = held
        for step in relocations:
            size = problem.size(step[0]) + (problem.plane_bytes if step[0] == KV else 0)
            if budget is not None and used + size > budget:
                if not batch:
                    raise BudgetExceeded(device=device, requested_bytes=size, committed_bytes=held, budget_bytes=budget)
                yield batch
                batch, used = [], held
            batch.append(step)
            used += size
        if batch:
            yield batch

    def _relocate(self, family: str, device: str, steps: Sequence[tuple[int, int, int]]) -> None:
        begin = 0
        for end in range(1, len(steps) + 1):
            old, unit, new = steps[begin]
            count = end - begin
            if end == len(steps) or steps[end] != (old + count, unit + count, new + count):
                self._shift(family, device, unit, old, new, count)
                for i in range(count) if family == KV and self.problem.plane_bytes else ():
                    if (device, unit + i) in self.planes:
                        self._shift(PLANE, device, unit + i, old + i, new + i, 1)
                begin = end
        self._drop_runs(device, family, [(old, unit) for old, unit, _ in steps])

    def _shift(self, family: str, device: str, unit: int, old: int, new: int, count: int) -> None:
        self.moves.append(
            Move(
                device=device,
                family=family,
                unit=unit,
                slot=new,
                source=FromPeer(device=device, slot=old),
                num_bytes=count * self.problem.size(family),
                num_units=count,
                stage=self.stage,
            )
        )

    def layout(self) -> Layout:
        shards = []
        for device in self.problem.devices:
            shard = Shard(device=device, slots=tuple(self.of(family, device).units() for family in FAMILIES))
            shards.append(shard.appended(EXPERT, self.of(EXPERT, device).units()))
        return Layout(shards=tuple(shards))


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(slot, unit, count) of pairs that are consecutive in both; `pairs` ascend by slot."""
    begin = 0
    for end in range(1, len(pairs) + 1):
        slot, unit = pairs[begin]
        if end == len(pairs) or pairs[end] != (slot + end - begin, unit + end - begin):
            yield slot, unit, end - begin
            begin = end
