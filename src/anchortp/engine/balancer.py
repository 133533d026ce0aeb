"""[controller] Expert load in the life of a service: counts it, asks the balancer, and turns its answers into changes.

`anchortp.eplb` decides; the coordinator carries out, as it does for a device that joins: copies arrive behind the
steps, and the group switches between two of them. Where only shares change, a message between two steps is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anchortp.devices import DeviceKind, parse_device
from anchortp.eplb import Limits, LoadWindow, Placement, Rebalance, decide, device_times, placement_of
from anchortp.eplb.placement import Floats
from anchortp.eplb.stages import Stage
from anchortp.layout import EXPERT, Layout, ModelUnits, Part
from anchortp.plan import FromHost, FromPeer, Move, Plan

MAX_BYTES = 256 << 20  # copied by one change, so that the next one sees how the load is by then
# What a byte copied behind the steps costs the service: memory that they do not get meanwhile, at 4 GB/s.
SECONDS_PER_BYTE = 2.5e-10
FIRST_STEPS = 32  # counted before anything is decided
# What an expert costs each device that holds it beside its tokens, in tokens: reading its weights against multiplying
# with them. Measured on a core of a CPU with AVX-512 and bf16 (SmolLM2's MLP: 412 us for a token, 12.4 us for each
# further one); of GPUs: their bf16 FLOP/s over their bytes/s.
CHOICES_PER_REPLICA: dict[DeviceKind, float] = {"cpu": 32.0, "host": 32.0, "sim": 32.0, "cuda": 300.0}


class ExpertBalancer:
    """For a mixture of experts whose devices hold whole experts. Decisions are at least `every_s` apart.
    `choices_per_replica`: see `Limits`; None: as such devices have it."""

    def __init__(self, units: ModelUnits, every_s: float, choices_per_replica: float | None = None):
        moe = units.config.moe
        assert moe is not None and moe.cut == "experts"
        self._units, self._every_s, self._choices_per_replica = units, every_s, choices_per_replica
        self._shape = (units.config.num_layers, moe.num_experts)
        self._window = LoadWindow()
        self._wanted: Placement | None = None  # whose shares are in use, or on their way
        self._due_s = 0.0
        self._num_steps, self._step_s = 0, 0.0  # since the last report
        self._mean_step_s = 0.0
        self._last: Rebalance | None = None
        self._first_imbalance = 0.0
        self._num_changes = 0

    def step_done(self, seconds: float, expert_load: bytes) -> None:
        """After every step. `expert_load`: of rank 0, in some steps; see `messages.StepDone`."""
        self._num_steps += 1
        self._step_s += seconds
        if expert_load:
            counts = np.frombuffer(expert_load, dtype=np.int32).reshape(self._shape)
            self._window = self._window.observe(counts, self._num_steps)
            self._mean_step_s = self._step_s / self._num_steps
            self._num_steps, self._step_s = 0, 0.0

    def is_due(self, now_s: float) -> bool:
        return now_s >= self._due_s and self._window.num_steps >= FIRST_STEPS

    def decide(self, layout: Layout, slots: Mapping[str, int], speeds: Mapping[str, float], now_s: float) -> Rebalance:
        """What to do next. `slots`: expert units that each device has memory for."""
        limits = Limits(
            slots=slots,
            seconds_per_choice=self._seconds_per_choice(layout),
            choices_per_replica=self._replica_cost(layout),
            seconds_per_byte=SECONDS_PER_BYTE,
            max_bytes=MAX_BYTES,
            speeds=speeds,
        )
        answer = decide(self._window, layout, self._units, limits, self._wanted)
        self._due_s = now_s + self._every_s
        self._first_imbalance = self._first_imbalance or answer.imbalance_before
        self._last = answer
        return answer

    def _seconds_per_choice(self, layout: Layout) -> float:
        """As if a step were experts alone: each layer takes as long as its slowest device."""
        choices = self._times(layout, placement_of(layout, self._units, self._wanted)).max(axis=1).sum()
        return max(self._mean_step_s, 1e-6) / max(float(choices), 1.0)

    def _replica_cost(self, layout: Layout) -> float:
        if self._choices_per_replica is not None:
            return self._choices_per_replica
        return max(CHOICES_PER_REPLICA[parse_device(device).kind] for device in layout.devices)

    def _times(self, layout: Layout, placement: Placement) -> Floats:
        """`[num_layers, num_devices]`, in choices."""
        beside = self._replica_cost(layout) * placement.held.sum(axis=2)
        return device_times(self._loads, placement.shares, np.ones(len(layout.devices)), beside)

    @property
    def _loads(self) -> Floats:
        return self._window.loads if self._window.counts.size else np.zeros(self._shape)

    def plan(self, stage: Stage, layout: Layout, reason: str) -> Plan:
        """The copies of one stage as moves, and its drops as what the layout after it lacks."""
        return _plan(stage, layout, self._units.unit_bytes[EXPERT], reason)

    def adopt(self, placement: Placement) -> None:
        """These shares hold from the next step on, or from the next layout on."""
        self._wanted = placement
        self._num_changes += 1

    def parts(self, layout: Layout) -> dict[str, dict[int, Part]]:
        """Per device the parts of tokens, for experts that several devices of the layout hold."""
        placement = placement_of(layout, self._units, self._wanted)
        return {device: placement.parts(device) for device in layout.devices}

    def status(self, layout: Layout) -> dict[str, Any]:
        """JSON-able. `imbalance`: what the slowest device of each layer takes over what the mean device does, all
        layers together, by the balancer's model of time; `first_imbalance`: at the first decision, with one replica
        each. `step_choices`: what the slowest devices take, in choices; `device_load`, `expert_load`: choices."""
        loads, placement = self._loads, placement_of(layout, self._units, self._wanted)
        times = self._times(layout, placement)
        work = np.einsum("lde,le->d", placement.shares, loads)
        mean = float(times.mean(axis=1).sum())
        return {
            "imbalance": float(times.max(axis=1).sum()) / mean if mean else 1.0,
            "first_imbalance": self._first_imbalance,
            "replicas": int(placement.num_replicas.sum() - placement.num_replicas.size),
            "rebalanced": self._num_changes,
            "step_choices": float(times.max(axis=1).sum()),
            "device_load": dict(zip(layout.devices, work.tolist(), strict=True)),
            "expert_load": {str(expert): load for expert, load in enumerate(loads.sum(axis=0).tolist())},
            "reason": self._last.reason if self._last is not None else "",
        }


def _plan(stage: Stage, layout: Layout, size: int, reason: str) -> Plan:
    after, moves = layout, []
    for copy in stage.copies:
        shard, source = after[copy.device], FromHost()
        if copy.source is not None:
            source = FromPeer(device=copy.source, slot=layout[copy.source][EXPERT].index(copy.unit))
        slot = len(shard[EXPERT])
        moves.append(Move(device=copy.device, family=EXPERT, unit=copy.unit, slot=slot, source=source, num_bytes=size))
        after = after.with_shard(shard.appended(EXPERT, (copy.unit,)))
    for drop in stage.drops:
        shard = after[drop.device]
        after = after.with_shard(shard.replaced(EXPERT, (unit for unit in shard[EXPERT] if unit != drop.unit)))
    return Plan(before=layout, after=after, moves=tuple(moves), lost_bytes=0, reasons=(reason,), policy="eplb")
