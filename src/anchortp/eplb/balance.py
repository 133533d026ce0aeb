"""From one placement towards balance, copy by copy, all layers side by side.

Each layer waits for its slowest device. So, in every layer at once: take a slowest device and the one that is
furthest below the even time, and hand over as much work as the nearer of the two is away from it: by tokens alone
where both hold the same expert; by an expert that fits, or by a part of the hottest, which is then replicated. Where
the target has no room a replica of another expert makes way whose tokens others can take, or an expert that goes
elsewhere or comes back in exchange. A copy closes the gap of a device if experts are large enough, so that a layer is
balanced after about as many copies as there are devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from anchortp.eplb.bound import even_time, lower_bound
from anchortp.eplb.fit import fit_shares
from anchortp.eplb.placement import Bools, Floats, Ints, shares_from
from anchortp.errors import DoesNotFit

NEAR = 0.003  # of the even time: a layer that is as close to it is balanced
FITS = 0.02  # an expert that is as close to the work to be handed over goes whole
LITTLE = 3e-4  # of a layer's time: less is no gain; without gain a layer ends after as many steps as there are devices
WIDE = 16  # experts of each device that are looked at for an exchange
MAX_STEPS = 64  # or two for every device, if that is more: so long is the search, at most


@dataclass(slots=True, kw_only=True, eq=False)
class Balancer:
    """The state of one search. L layers, D devices, E experts; work in choices per step, times at speed 1.

    `loads` [L, E], `speeds` [D], `other` [L, D]: work that devices do beside; `per_replica`: work that
    an expert brings each of its holders beside its tokens; `slots` [D]: expert units a device may
    hold, all layers together; `held`, `work` [L, D, E]: changed in place. `home` [L, E] and `node` [D]: an expert is
    to be on devices of its node only. `max_copies` [L]: the most copies in a layer.
    """

    loads: Floats
    speeds: Floats
    other: Floats
    per_replica: float
    slots: Ints
    held: Bools
    work: Floats
    home: Ints
    node: Ints
    max_copies: Ints
    carried: Floats = field(init=False)  # [L, D] all work of a device
    free: Ints = field(init=False)  # [D] slots
    used: Ints = field(init=False)  # [L, D] slots
    replicas: Ints = field(init=False)  # [L, E]
    most: Ints = field(init=False)  # [L] slots that a layer may use for now
    bound: Floats = field(init=False)  # [L] no placement can be faster
    even: Floats = field(init=False)  # [L, D] the time at which all of a node would be done if work were liquid
    num_copies: Ints = field(init=False)  # [L] so far
    history: list[tuple[Floats, Ints]] = field(init=False)  # slowest device's time and copies so far, per layer
    _start: tuple[Bools, Floats] = field(init=False)  # held and work when the search began
    # All that was changed since, one entry each: before which entry of the history; layer, device, expert; holders and
    # work that were added.
    _log: list[tuple[Ints, Ints, Ints, Ints, Ints, Floats]] = field(init=False)

    def __post_init__(self) -> None:
        self.num_copies = np.zeros(len(self.loads), dtype=np.int64)
        self.even = np.empty(self.other.shape)
        for node in np.unique(self.node):
            inside = self.node == node
            total = np.where(self.home == node, self.loads + self.per_replica, 0.0).sum(axis=1)
            self.even[:, inside] = even_time(total, self.speeds[inside], self.other[:, inside])[:, None]
        self._count()
        most_slots = np.maximum(self.used.sum(axis=1) + self.free.sum(), self.loads.shape[1])
        self.bound = lower_bound(self.loads, self.speeds, self.other, most_slots)
        if self.per_replica:
            self.bound = np.maximum(self.bound, self.even.max(axis=1))
        self.history, self._log = [], []
        self._start = self.held.copy(), self.work.copy()
        self.fit()
        self._record()

    def run(self) -> None:
        """Experts that no device holds are placed whatever `max_copies` says.

        Raises DoesNotFit if there is no slot for one."""
        self._leave_foreign_nodes()
        self._place()
        self.fit()
        self._record()
        # First no layer gets more than its part of the slots, then those that still need more share what is left.
        fair = np.maximum(self.slots.sum() // len(self.loads), self.used.sum(axis=1))
        for most in (fair, np.full(len(fair), self.held[0].size)):
            self.most, before = most, np.inf
            while self.slowest.sum() < before * (1 - LITTLE):
                before = self.slowest.sum()
                self._level()
                self.fit()
                self._record()

    def state_at(self, index: Ints) -> tuple[Bools, Floats]:
        """`held` and `work` as they were when `history[index]` was written, `index` [L] of its own for each layer."""
        held, work = self._start[0].astype(np.int64), self._start[1].copy()
        if self._log:
            when, line, device, expert, holders, amount = (
                np.concatenate(column) for column in zip(*self._log, strict=True)
            )
            part = when <= index[line]
            at = line[part], device[part], expert[part]
            np.add.at(held, at, holders[part])
            np.add.at(work, at, amount[part])
        return held > 0, np.where(held > 0, work.clip(min=0.0), 0.0)  # what is not 0 by rounding is

    def fit(self) -> None:
        fit_shares(self.work, self.held, self.carried, self.speeds, self._carry)

    @property
    def slowest(self) -> Floats:
        return (self.carried / self.speeds).max(axis=1)

    def _record(self) -> None:
        self.history.append((self.slowest, self.num_copies.copy()))

    def _count(self) -> None:
        self.used = self.held.sum(axis=2)
        self.carried = self.work.sum(axis=2) + self.other + self.per_replica * self.used
        self.replicas = self.held.sum(axis=1)
        self.free = self.slots - self.used.sum(axis=0)

    # ----------------------------------------------------------------------------- experts that are not at home

    @property
    def _at_home(self) -> Bools:
        return self.held & (self.home[:, None, :] == self.node[None, :, None])

    def _leave_foreign_nodes(self) -> None:
        """Replicas outside their node go, at no cost, where the node has one."""
        if not self.node.any():
            return
        at_home = self._at_home
        weights = shares_from(np.where(at_home, self.work, 0.0), at_home)
        going = np.argwhere(self.held & ~at_home & at_home.any(axis=1, keepdims=True))
        for line, device, expert in going.tolist():
            takers = np.flatnonzero(at_home[line, :, expert])
            amount = weights[line, takers, expert] * self.work[line, device, expert]
            lines, experts = np.full(len(takers), line), np.full(len(takers), expert)
            self._carry(lines, np.full(len(takers), device), takers, experts, amount)
            self._let_go(lines[:1], np.array([device]), experts[:1])

    def _place(self) -> None:
        """Experts that no device of their node holds, largest first, where they are done soonest (Graham 1969), each
        device getting its part of a layer's experts, so that none is left without room for replicas."""
        nowhere = ~self.held.any(axis=1)
        missing = ~self._at_home.any(axis=1)
        order = np.lexsort((-self.loads, ~nowhere, ~missing), axis=1)
        left = np.maximum(np.minimum(missing.sum(axis=1), self.max_copies), nowhere.sum(axis=1))
        at = np.zeros(len(order), dtype=np.int64)
        num_nodes = len(np.unique(self.node))
        node_slots = np.bincount(self.node, weights=self.slots)[self.node]
        fair = np.ceil(self.loads.shape[1] / num_nodes * self.slots / np.maximum(node_slots, 1))
        while (lines := np.flatnonzero(at < left)).size:
            expert = order[lines, at[lines]]
            load = self.loads[lines, expert]
            open_ = (self.free > 0) & (self.node == self.home[lines, expert][:, None])
            if not open_.any(axis=1).all():
                raise DoesNotFit(
                    f"{self.loads.size} experts do not fit in {self.slots.sum()} slots ({self.slots.tolist()} per "
                    "device); give the devices more memory for experts, or use more devices."
                )
            below = open_ & (self.used[lines] < fair)
            open_ = np.where(below.any(axis=1, keepdims=True), below, open_)
            device = np.where(open_, (self.carried[lines] + load[:, None]) / self.speeds, np.inf).argmin(axis=1)
            now = granted(device, load, self.free)
            lines, expert, device, load = lines[now], expert[now], device[now], load[now]
            self._fetch(lines, device, expert, load)
            at[lines] += 1

    def _fetch(self, lines: Ints, device: Ints, expert: Ints, load: Floats) -> None:
        """The expert, all its work, to one device, from wherever it is."""
        which, source = np.nonzero(self.held[lines, :, expert])
        nowhere = self.replicas[lines, expert] == 0
        self._hold(lines, device, expert)
        self._add(lines[nowhere], device[nowhere], expert[nowhere], load[nowhere])
        at = lines[which], source, expert[which]
        self._carry(lines[which], source, device[which], expert[which], self.work[at])
        self._let_go(*at)

    # ------------------------------------------------------------------------------------------------- balance

    def _level(self) -> None:
        num_layers, num_devices = self.carried.shape
        tried = np.zeros((num_layers, num_devices, num_devices), dtype=bool)  # [L, from, to]: nothing could be done
        best, since = self.slowest, np.zeros(num_layers, dtype=np.int64)
        while len(self.history) < max(MAX_STEPS, 2 * num_devices):
            slowest = self.slowest
            better = slowest < best * (1 - LITTLE)
            best, since = np.where(better, slowest, best), np.where(better, 0, since + 1)
            open_ = (slowest > self.bound * (1 + NEAR)) & (since <= num_devices)
            pairs = self._pairs(np.flatnonzero(open_ & (self.num_copies < self.max_copies)), tried)
            if not pairs.lines.size:
                break
            done = self._hand_over(pairs)
            tried[pairs.lines[done]] = False
            missed = pairs.where(~done)
            tried[missed.lines, missed.top, missed.target] = True
            self._record()

    def _pairs(self, lines: Ints, tried: Bools) -> _Pairs:
        """Who is to relieve whom, where any pair is left to try: a slowest device (there may be several, joined by
        experts that they share), and whoever is furthest below the even time, with room if possible."""
        over = self.carried[lines] / self.speeds - self.even[lines]
        near = NEAR * self.even[lines]
        slow = (over > near) & (over >= over.max(axis=1, keepdims=True) - near)
        left = slow[:, :, None] & (over < -near)[:, None, :] & (self.node[:, None] == self.node) & ~tried[lines]
        some = left.any(axis=(1, 2))
        lines, over, left = lines[some], over[some], left[some]
        at = np.arange(len(lines))
        top = np.where(left.any(axis=2), over, -np.inf).argmax(axis=1)
        under = np.where(left[at, top], -over * self.speeds, 0.0)
        with_room = np.where(self.free > 0, under, 0.0)
        target = np.where(with_room.any(axis=1), with_room.argmax(axis=1), under.argmax(axis=1))
        excess = over[at, top] * self.speeds[top]
        return _Pairs(lines=lines, top=top, target=target, excess=excess, deficit=under[at, target])

    def _hand_over(self, pairs: _Pairs) -> Bools:
        """One step for each pair. Returns for which one was possible."""
        done = np.zeros(len(pairs.lines), dtype=bool)
        for step in (self._shift, self._copy, self._evict, self._make_room, self._give_back, self._exchange):
            left = np.flatnonzero(~done)
            if left.size:
                done[left] = step(pairs.where(left))
        return done

    def _shift(self, p: _Pairs) -> Bools:
        """Tokens of an expert that both hold: no copy."""
        common = np.where(self.held[p.lines, p.target], self.work[p.lines, p.top], 0.0)
        expert = common.argmax(axis=1)
        amount = np.minimum(common[p.at, expert], np.minimum(p.excess, p.deficit))
        done = amount > NEAR * p.excess
        q = p.where(done)
        self._carry(q.lines, q.top, q.target, expert[done], amount[done])
        return done

    def _copy(self, p: _Pairs) -> Bools:
        """An expert, or a part of its work, into a free slot."""
        expert, amount, whole = self._choose(p, p.excess, p.deficit)
        done = (amount > 0) & (whole | self._may_grow(p))
        done[done] = granted(p.target[done], p.excess[done], self.free)
        self._take(p.where(done), expert[done], amount[done], whole[done])
        return done

    def _evict(self, p: _Pairs) -> Bools:
        """As `_copy`, into the slot of a replica whose tokens another of its holders can take."""
        spare = self.held[p.lines, p.target] & (self.replicas[p.lines] > 1)
        out, lost = _least(spare, self.work[p.lines, p.target])
        others = self.held[p.lines, :, out].copy()
        others[p.at, p.target] = False
        taker, later = _least(others, (self.carried[p.lines] + lost[:, None]) / self.speeds)
        expert, amount, whole = self._choose(p, p.excess, p.deficit + lost + self.per_replica)
        done = (amount > lost) & (later < self._slowest_of(p) * (1 - NEAR))
        q, out = p.where(done), out[done]
        self._carry(q.lines, q.target, taker[done], out, lost[done])
        self._let_go(q.lines, q.target, out)
        self._take(q, expert[done], amount[done], whole[done])
        return done

    def _make_room(self, p: _Pairs) -> Bools:
        """As `_copy`, into the slot of the target's least expert, which goes where it is done soonest: two copies."""
        return self._replace(p, back=False)

    def _give_back(self, p: _Pairs) -> Bools:
        """As `_make_room`, but the least expert goes to the device that is relieved."""
        return self._replace(p, back=True)

    def _replace(self, p: _Pairs, back: bool) -> Bools:
        out, moved = _least(self.held[p.lines, p.target], self.work[p.lines, p.target])
        moved = np.where(np.isfinite(moved), moved, 0.0)
        all_of_it = moved + self.per_replica
        expert, amount, whole = self._choose(p, p.excess + (all_of_it if back else 0.0), p.deficit + all_of_it)
        later = self.carried[p.lines] + all_of_it[:, None]
        later[p.at, p.top] -= amount
        is_top = np.arange(len(self.speeds)) == p.top[:, None]
        open_ = (self.free > 0) & (self.node == self.node[p.top][:, None]) & ~self.held[p.lines, :, out]
        taker, later = _least(open_ & (is_top == back), later / self.speeds)
        done = (amount > 0) & (expert != out) & (later < self._slowest_of(p) * (1 - NEAR))
        done &= (whole | self._may_grow(p)) & self._has_two_copies_left(p)
        done[done] = granted(taker[done], p.excess[done], self.free)
        q = p.where(done)
        self._take(q.moved(q.target, taker[done]), out[done], moved[done], q.all)
        self._take(q, expert[done], amount[done], whole[done])
        return done

    def _exchange(self, p: _Pairs) -> Bools:
        """Two experts change places: two copies, and no other slot."""
        both = self.held[p.lines, p.top] & self.held[p.lines, p.target]
        going = _largest(np.where(both, 0.0, self.work[p.lines, p.top]))
        back = np.where(both | ~self.held[p.lines, p.target], np.inf, self.work[p.lines, p.target])
        coming = _largest(-back)
        net = self.work[p.lines, p.top][p.at[:, None], going][:, :, None] - back[p.at[:, None], coming][:, None, :]
        left = (p.excess[:, None, None] - net) / self.speeds[p.top][:, None, None]
        left = np.maximum(left, (net - p.deficit[:, None, None]) / self.speeds[p.target][:, None, None])
        left = np.where(net > 0, left, np.inf).reshape(len(left), -1)
        best = left.argmin(axis=1)
        i, j = np.divmod(best, coming.shape[1])
        done = (left[p.at, best] < p.excess / self.speeds[p.top] * (1 - NEAR)) & self._has_two_copies_left(p)
        q, expert, out = p.where(done), going[p.at, i][done], coming[p.at, j][done]
        amount, returned = self.work[q.lines, q.top, expert], self.work[q.lines, q.target, out]
        self._take(q, expert, amount, q.all)
        self._take(q.moved(q.target, q.top), out, returned, q.all)
        return done

    # --------------------------------------------------------------------------------------------------- parts

    def _choose(self, p: _Pairs, excess: Floats, deficit: Floats) -> tuple[Ints, Floats, Bools]:
        """Which expert the target gets, how much of its work, and whether that is all: one that fits, else the hottest
        or a part of it. The amount is not positive if there is nothing to gain."""
        work = np.where(self.held[p.lines, p.target], 0.0, self.work[p.lines, p.top])
        wanted = np.minimum(excess, deficit)
        brings = np.where(work > 0, work + self.per_replica, 0.0)
        nearest = np.abs(brings - wanted[:, None]).argmin(axis=1)
        fits = np.abs(brings[p.at, nearest] - wanted) <= FITS * wanted
        expert = np.where(fits, nearest, work.argmax(axis=1))
        available, part = work[p.at, expert], np.minimum(excess, deficit - self.per_replica)
        whole = fits | (available <= part)
        return expert, np.where(whole, available, part), whole

    def _slowest_of(self, p: _Pairs) -> Floats:
        return self.carried[p.lines, p.top] / self.speeds[p.top]

    def _may_grow(self, p: _Pairs) -> Bools:
        return self.used[p.lines].sum(axis=1) < self.most[p.lines]

    def _has_two_copies_left(self, p: _Pairs) -> Bools:
        return (self.num_copies + 2 <= self.max_copies)[p.lines]

    def _take(self, p: _Pairs, expert: Ints, amount: Floats, whole: Bools) -> None:
        """`amount` of an expert's work goes from top to target, which gets a copy; if that is the whole of it the top
        gives its own up."""
        self._hold(p.lines, p.target, expert)
        self._carry(p.lines, p.top, p.target, expert, amount)
        self._let_go(p.lines[whole], p.top[whole], expert[whole])

    def _carry(self, lines: Ints, source: Ints, target: Ints, expert: Ints, amount: Floats) -> None:
        self._add(lines, source, expert, -amount)
        self._add(lines, target, expert, amount)

    def _add(self, lines: Ints, device: Ints, expert: Ints, amount: Floats) -> None:
        np.add.at(self.work, (lines, device, expert), amount)
        np.add.at(self.carried, (lines, device), amount)
        self._note(lines, device, expert, 0, amount)

    def _hold(self, lines: Ints, device: Ints, expert: Ints) -> None:
        self._set_holder(lines, device, expert, 1)
        self.num_copies[lines] += 1

    def _let_go(self, lines: Ints, device: Ints, expert: Ints) -> None:
        self._set_holder(lines, device, expert, -1)

    def _set_holder(self, lines: Ints, device: Ints, expert: Ints, change: int) -> None:
        self.held[lines, device, expert] = change > 0
        np.add.at(self.used, (lines, device), change)
        np.add.at(self.carried, (lines, device), change * self.per_replica)
        np.add.at(self.replicas, (lines, expert), change)
        np.subtract.at(self.free, device, change)
        self._note(lines, device, expert, change, np.zeros(len(lines)))

    def _note(self, lines: Ints, device: Ints, expert: Ints, holders: int, work: Floats) -> None:
        if lines.size:
            when, change = np.full(len(lines), len(self.history)), np.full(len(lines), holders)
            self._log.append((when, lines, device, expert, change, work))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pairs:
    """In each of the layers `lines`, no two alike: `top` has `excess` work too much, `target` `deficit` too little."""

    lines: Ints
    top: Ints
    target: Ints
    excess: Floats
    deficit: Floats

    @property
    def at(self) -> Ints:
        return np.arange(len(self.lines))

    @property
    def all(self) -> Bools:
        return np.ones(len(self.lines), dtype=bool)

    def where(self, chosen: Bools | Ints) -> _Pairs:
        return _Pairs(
            lines=self.lines[chosen],
            top=self.top[chosen],
            target=self.target[chosen],
            excess=self.excess[chosen],
            deficit=self.deficit[chosen],
        )

    def moved(self, top: Ints, target: Ints) -> _Pairs:
        return _Pairs(lines=self.lines, top=top, target=target, excess=self.excess, deficit=self.deficit)


def _least(valid: Bools, values: Floats) -> tuple[Ints, Floats]:
    """Per row the position of the least valid value, and that value; infinite if none is valid."""
    values = np.where(valid, values, np.inf)
    at = values.argmin(axis=1)
    return at, values[np.arange(len(values)), at]


def _largest(values: Floats) -> Ints:
    """Per row the positions of the WIDE largest values."""
    wide = min(WIDE, values.shape[1])
    return np.argpartition(-values, wide - 1, axis=1)[:, :wide]


def granted(device: Ints, priority: Floats, free: Ints) -> Bools:
    """Which of the requests for one slot each can be met, those of the highest priority first."""
    order = np.lexsort((-priority, device))
    count = np.bincount(device, minlength=len(free))
    place = np.arange(len(device)) - np.repeat(np.cumsum(count) - count, count)
    result = np.empty(len(device), dtype=bool)
    result[order] = place < free[device[order]]
    return result
