"""Whether to change a placement, how, and why. Pure: the same question has the same answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchortp.eplb.balance import LITTLE, Balancer
from anchortp.eplb.fit import fit_shares
from anchortp.eplb.homes import homes
from anchortp.eplb.limits import Limits
from anchortp.eplb.placement import Bools, Floats, Ints, Placement, device_times, placement_of, shares_from
from anchortp.eplb.stages import Copy, Drop, Stage, staged
from anchortp.eplb.window import LoadWindow
from anchortp.layout import EXPERT, Layout, UnitCatalog


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rebalance:
    """What to do, if anything, and what it is expected to bring. `stages` turn the placement asked about into
    `placement`; there may be none, and then only shares change, or (`is_change` is False) nothing at all.

    `imbalance`: what the slowest device of each layer takes over what the mean device does, all layers together.
    `step_s`: seconds of a step spent in experts, summed over layers, each as slow as its slowest device.
    `loads`: choices per step `[num_layers, num_experts]` that all this is reckoned with. `reason` is for people.
    """

    placement: Placement
    loads: Floats
    stages: tuple[Stage, ...] = ()
    num_bytes: int = 0
    imbalance_before: float
    imbalance_after: float
    step_s_before: float
    step_s_after: float
    is_change: bool = True
    reason: str

    @property
    def replica_loads(self) -> Floats:
        """Choices per step that each replica is expected to compute, `[num_layers, num_devices, num_experts]`."""
        return self.placement.shares * self.loads[:, None, :]

    @property
    def copies(self) -> tuple[Copy, ...]:
        return tuple(copy for stage in self.stages for copy in stage.copies)

    @property
    def drops(self) -> tuple[Drop, ...]:
        return tuple(drop for stage in self.stages for drop in stage.drops)

    def appended(self, device: str) -> tuple[tuple[int, str | None], ...]:
        """Units that the device gets, in order, and where from."""
        return tuple((copy.unit, copy.source) for copy in self.copies if copy.device == device)

    def dropped(self, device: str) -> tuple[int, ...]:
        return tuple(drop.unit for drop in self.drops if drop.device == device)


def decide(
    window: LoadWindow, layout: Layout, units: UnitCatalog, limits: Limits, previous: Placement | None = None
) -> Rebalance:
    """The next bounded step towards balance. For the controller, every so many steps and after a recovery.

    `previous`: the placement whose shares are in use (that of the last Rebalance carried out); None: shares are even.
    While an expert has no holder nothing is proposed: first recovery brings every expert back, then hot ones are
    replicated again. Imbalance that may be chance (too few choices counted) is left alone.
    """
    now = placement_of(layout, units, previous)
    homeless = int((now.num_replicas == 0).sum())
    if homeless or not window.counts.any():
        why = f"{homeless} experts have no holder; recovery comes first" if homeless else "nothing was counted yet"
        loads = window.loads if window.counts.size else np.zeros(now.num_replicas.shape)
        return _keep(_Question(loads, now, limits), f"kept: {why}")
    return rebalance(window.loads, now, limits, units.unit_bytes[EXPERT], num_steps=window.num_steps)


def rebalance(loads: Floats, now: Placement, limits: Limits, unit_bytes: int, num_steps: float = math.inf) -> Rebalance:
    """The best change to `now` for `loads` (choices per step, `[num_layers, num_experts]`, counted over `num_steps`).

    1. Shares are fitted to the loads: that moves no byte.
    2. A search adds, moves and drops replicas layer by layer (`balance.py`).
    3. Of its copies those are taken that win more seconds within the horizon than they cost, the best first, until
       `max_bytes`. What remains is left to the next decision.
    4. If all that is worth it together wins less than `min_gain`, or nothing but shares does, so much is left out.

    Experts without a holder are placed first, whatever it costs (so from an empty placement this is the first one).
    Raises DoesNotFit if there are more experts than slots; ConfigError if `limits` leave out a device.
    """
    ask = _Question(loads, now, limits)
    forced = (now.num_replicas == 0).sum(axis=1)
    search = ask.balancer(np.full(len(loads), now.held.size) * ask.is_certain(num_steps))
    fitted = search.slowest
    search.run()
    price = unit_bytes * limits.seconds_per_byte / (limits.seconds_per_choice * max(limits.horizon_steps, 1e-300))
    segments = _worth_it(search, forced, price)
    gain = sum(segment.gain for segment in segments)
    before, least = ask.slowest.sum(), limits.min_gain * ask.slowest.sum()
    if not forced.any():
        if gain <= least and before - fitted.sum() < max(least, LITTLE * before):
            return _keep(ask, _why_kept(ask, search, segments))
        segments = segments if gain > least else []
    chosen, left_over = _within(segments, len(loads), limits.max_bytes, unit_bytes)
    copies = np.array([count for _, count in search.history])
    held, work = search.state_at((copies <= forced + chosen).sum(axis=0) - 1)
    return _change(ask, ask.fitted(held, work), unit_bytes, left_over)


@dataclass(slots=True, eq=False)
class _Question:
    loads: Floats
    now: Placement
    limits: Limits

    def __post_init__(self) -> None:
        assert self.loads.shape == self.now.num_replicas.shape, "loads are [layers, experts] of the placement"

    @property
    def speeds(self) -> Floats:
        return self.limits.speeds_of(self.now.devices)

    @property
    def other(self) -> Floats:
        return self.limits.other_of(self.now.devices, self.now.num_layers)

    @property
    def slowest(self) -> Floats:
        return self.times(self.now).max(axis=1)

    @property
    def slots(self) -> Ints:
        """What a device holds already it may go on holding."""
        return np.maximum(self.limits.slots_of(self.now.devices), self.now.slots_used)

    @property
    def node(self) -> Ints:
        node = self.limits.nodes_of(self.now.devices, self.now.num_experts)
        enough = np.bincount(node, weights=self.slots) >= self.loads.size / (node.max() + 1)
        return node if enough.all() else np.zeros_like(node)

    def balancer(self, max_copies: Ints) -> Balancer:
        held, node = self.now.held.copy(), self.node
        return Balancer(
            loads=self.loads,
            speeds=self.speeds,
            other=self.other,
            per_replica=self.limits.choices_per_replica,
            slots=self.slots,
            held=held,
            work=self.now.shares * self.loads[:, None, :],
            home=homes(self.loads, held, node, self.speeds, self.limits.num_groups),
            node=node,
            max_copies=max_copies,
        )

    def fitted(self, held: Bools, work: Floats) -> Placement:
        """With the best shares. `work` is changed."""
        carried = work.sum(axis=2) + self.beside(held)

        def carry(lines: Ints, source: Ints, target: Ints, expert: Ints, amount: Floats) -> None:
            work[lines, source, expert] -= amount
            work[lines, target, expert] += amount
            carried[lines, source] -= amount
            carried[lines, target] += amount

        fit_shares(work, held, carried, self.speeds, carry)
        return Placement(devices=self.now.devices, held=held, shares=shares_from(work.clip(min=0.0), held))

    def is_certain(self, num_steps: float) -> Ints:
        """1 for layers whose imbalance can hardly be chance: if all D devices had the same mean m of choices in the
        window, the largest of their counts would be about sqrt(2 m ln D) above it (Poisson), seldom sqrt(m) more."""
        if math.isinf(num_steps):
            return np.ones(len(self.loads), dtype=np.int64)
        num_devices = len(self.now.devices)
        mean = (self.loads.sum(axis=1) * num_steps / num_devices).clip(min=1e-300)
        excess = (self.slowest / self.mean_times(self.now) - 1) * mean
        return (excess > np.sqrt(mean) * (math.sqrt(2 * math.log(num_devices)) + 1)).astype(np.int64)

    def beside(self, held: Bools) -> Floats:
        """Work of each device that does not depend on shares, `[num_layers, num_devices]`."""
        return self.other + self.limits.choices_per_replica * held.sum(axis=2)

    def times(self, placement: Placement) -> Floats:
        return device_times(self.loads, placement.shares, self.speeds, self.beside(placement.held))

    def mean_times(self, placement: Placement) -> Floats:
        times = self.times(placement)
        return (times @ self.speeds / self.speeds.sum()).clip(min=1e-300)

    def outcome(self, placement: Placement) -> tuple[float, float]:
        """Imbalance and seconds per step."""
        slowest = self.times(placement).max(axis=1).sum()
        imbalance = slowest / self.mean_times(placement).sum() if slowest > 0 else 1.0
        return float(imbalance), float(slowest * self.limits.seconds_per_choice)


# ------------------------------------------------------------------------------------------------- what is worth it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """`num_copies` more copies in a layer make its slowest device `gain` faster (in choices)."""

    layer: int
    gain: float
    num_copies: int


def _worth_it(search: Balancer, forced: Ints, price: float) -> list[_Segment]:
    """Stretches of each layer's search, those that win most per copy first, as long as that is above `price`. Single
    copies may win nothing by themselves (two devices are equally slow), so stretches are those of the convex hull of
    time over copies."""
    times = np.array([time for time, _ in search.history])
    copies = np.array([count for _, count in search.history])
    found = []
    for layer in range(times.shape[1]):
        hull: list[tuple[int, float]] = []
        for count, time in zip(copies[:, layer].tolist(), times[:, layer].tolist(), strict=True):
            if count < forced[layer] or (hull and time >= hull[-1][1]):
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (count, time)):
                hull.pop()
            hull.append((count, time))
        for (c0, t0), (c1, t1) in itertools.pairwise(hull):
            if c1 > c0 and t0 - t1 > (c1 - c0) * price and t0 - t1 > LITTLE * t0:
                found.append(_Segment(layer=layer, gain=t0 - t1, num_copies=c1 - c0))
    return sorted(found, key=lambda segment: -segment.gain / segment.num_copies)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (a[1] - b[1]) / max(b[0] - a[0], 1e-9)


def _within(segments: Sequence[_Segment], num_layers: int, max_bytes: int | None, unit_bytes: int) -> tuple[Ints, int]:
    """Copies per layer that stay within `max_bytes` (always one), and how many were left over. A stretch that is too
    long is begun if there is nothing else."""
    left = math.inf if max_bytes is None else max(1, max_bytes // max(unit_bytes, 1))
    chosen = np.zeros(num_layers, dtype=np.int64)
    blocked: set[int] = set()  # a layer's stretches are taken in order
    over = 0
    for segment in segments:
        if segment.num_copies <= left and segment.layer not in blocked:
            chosen[segment.layer] += segment.num_copies
            left -= segment.num_copies
        else:
            blocked.add(segment.layer)
            over += segment.num_copies
    if segments and not chosen.any():
        chosen[segments[0].layer] = left
        over -= int(left)
    return chosen, over


# --------------------------------------------------------------------------------------------------------- answers


def _change(ask: _Question, placement: Placement, unit_bytes: int, left_over: int) -> Rebalance:
    stages = staged(ask.now, placement, ask.slots, ask.node)
    reached = stages[-1].placement if stages else ask.now
    if (reached.held != placement.held).any():  # devices without a free slot wait for each other
        placement = ask.fitted(reached.held.copy(), reached.shares * ask.loads[:, None, :])
        stages = staged(ask.now, placement, ask.slots, ask.node)
    (imbalance_before, before_s), (imbalance_after, after_s) = ask.outcome(ask.now), ask.outcome(placement)
    if not (ask.now.num_replicas == 0).any():
        if after_s > before_s * (1 - LITTLE) and not left_over:
            needed = "a free slot on each device is needed"
            return _keep(ask, f"kept: imbalance {imbalance_before:.3f}; {needed} to change it")
        if after_s > before_s * (1 + 1e-9):  # only the beginning of a stretch: replicas cost before they help
            return _keep(ask, f"kept: imbalance {imbalance_before:.3f}; what max_bytes allows would be slower")
    copies = tuple(copy for stage in stages for copy in stage.copies)
    num_bytes = len(copies) * unit_bytes
    layers = len({copy.unit // ask.now.num_experts for copy in copies})
    what = f"{len(copies)} copies ({num_bytes} bytes) in {layers} layers" if copies else "other shares, no copies"
    reason = (
        f"{what}: imbalance {imbalance_before:.3f} to {imbalance_after:.3f}, experts' time per step "
        f"{before_s * 1e3:.4g} to {after_s * 1e3:.4g} ms"
    )
    cost_s = num_bytes * ask.limits.seconds_per_byte
    if cost_s and after_s < before_s:
        reason += f"; pays after {math.ceil(cost_s / (before_s - after_s))} steps"
    if left_over:
        reason += f"; {left_over} more copies are left for later (max_bytes)"
    return Rebalance(
        placement=placement,
        loads=ask.loads,
        stages=stages,
        num_bytes=num_bytes,
        imbalance_before=imbalance_before,
        imbalance_after=imbalance_after,
        step_s_before=before_s,
        step_s_after=after_s,
        reason=reason,
    )


def _keep(ask: _Question, reason: str) -> Rebalance:
    imbalance, step_s = ask.outcome(ask.now)
    return Rebalance(
        placement=ask.now,
        loads=ask.loads,
        imbalance_before=imbalance,
        imbalance_after=imbalance,
        step_s_before=step_s,
        step_s_after=step_s,
        is_change=False,
        reason=reason,
    )


def _why_kept(ask: _Question, search: Balancer, segments: Sequence[_Segment]) -> str:
    imbalance, _ = ask.outcome(ask.now)
    before = ask.slowest.sum()
    best = np.array([time for time, _ in search.history]).min(axis=0).sum()
    if not search.max_copies.any() and imbalance > 1 + ask.limits.min_gain:
        return f"kept: imbalance {imbalance:.3f} may be chance, too few choices were counted"
    if before - best < ask.limits.min_gain * before:
        return f"kept: imbalance {imbalance:.3f}, and nothing within the slots is {ask.limits.min_gain:.1%} faster"
    gain = sum(segment.gain for segment in segments)
    return (
        f"kept: imbalance {imbalance:.3f}; experts could be {1 - best / before:.1%} faster, but only "
        f"{gain / before:.1%} is worth its copies within {ask.limits.horizon_steps:.0f} steps"
    )
