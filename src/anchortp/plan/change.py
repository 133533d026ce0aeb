"""What a recovery asks for: from what devices hold to the plan that makes them a group again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from anchortp.errors import CapacityError, DoesNotFit
from anchortp.layout import Layout, ModelUnits, UnitCatalog, empty_shard, initial_layout
from anchortp.plan.bound import lower_bound
from anchortp.plan.cost import predict
from anchortp.plan.plan import Plan, moves_between
from anchortp.plan.policies import Policy, makespan
from anchortp.plan.policies import units as sets_of_units
from anchortp.plan.problem import Experts, Problem
from anchortp.plan.rates import CHECKPOINT_BYTES_PER_S
from anchortp.plan.topology import Topology, local

_GIVEN_UP = {
    "single": "replicas of experts are given up, for lack of memory",
    "even": "experts that somebody holds are loaded elsewhere, for lack of memory",
}


def fill_plan(units: ModelUnits, devices: tuple[str, ...], speeds: Mapping[str, float] | None = None) -> Plan:
    """The first load: from empty devices to the initial layout. Raises as `initial_layout` does."""
    before = Layout(shards=tuple(empty_shard(device) for device in devices))
    after = initial_layout(units, devices, speeds)
    return Plan(
        before=before,
        after=after,
        moves=moves_between(before, after, units),
        lost_bytes=sum(units.num_units[family] * units.unit_bytes[family] for family in units.families),
        reasons=(f"{len(devices)} empty device(s): every unit is loaded from the host",),
    )


def plan_change(
    units: UnitCatalog,
    held: Layout,
    devices: Sequence[str],
    *,
    topology: Topology | None = None,
    policy: Policy = makespan,
    min_gain: float = 0.0,
    speeds: Mapping[str, float] | None = None,
    memory_bytes: Mapping[str, int] | None = None,
    experts: Experts = "even",
) -> Plan:
    """The plan by which `devices`, in rank order, take over: after a loss, for a join or a leave, for other speeds, for
    the first load.

    `held`: what each device that can still be read holds now; units may be missing, in any number. A device of
    `devices` that is not in it, or whose shard is empty, is new: it receives the replicated tensors as well. One of
    `held` that is not in `devices` leaves: it is a source, and free afterwards. Leave out those that are lost.
    `topology`: by default one machine whose devices share its memory, by whatever names; what a device holds is copied
    rather than read from the checkpoint.

    `min_gain`: part of the time that `policy` must be able to win over `units`, by which devices that stay pass
    nothing on; else that is the plan. For a recovery, which can go on before the last byte has arrived if so.

    `experts`: see `Problem`. For a recovery "stay": then what has a replica is not loaded again, and balance is left to
    whoever balances experts by their load. If that does not fit into memory, "single" does, or at last "even"; the
    reasons say so.

    For whoever carries it out, device by device: every move brings whole units from one place, a store or a device
    that held them before (`FromPeer`), so that all moves of a stage can run in any order; nothing is relayed and
    nothing is forwarded. KV planes are not in it: each goes with its KV head, relocations included.

    Raises DoesNotFit if nobody is left, or with the numbers if the model does not fit `memory_bytes`.
    """
    if not devices:
        raise DoesNotFit(f"no device is left of {', '.join(held.devices) or 'the group'}; add one and start again.")
    names = tuple(dict.fromkeys((*held.devices, *devices)))
    problem = Problem(
        units=units,
        before=held,
        devices=tuple(devices),
        topology=topology or local(names, host_bytes_per_s=CHECKPOINT_BYTES_PER_S),
        speeds=speeds,
        memory_bytes=memory_bytes,
        relays=False,
        parts=False,
        experts=experts,
    )
    return _fitting(problem, policy, min_gain)


def _fitting(problem: Problem, policy: Policy, min_gain: float) -> Plan:
    try:
        return _worth(problem, policy, min_gain)
    except CapacityError as error:
        if problem.experts == "even":
            raise
        other: Experts = "single" if problem.experts == "stay" else "even"
        plan = _fitting(replace(problem, experts=other), policy, min_gain)
        return replace(plan, reasons=(*plan.reasons, f"{_GIVEN_UP[other]}: {error}"))


def _worth(problem: Problem, policy: Policy, min_gain: float) -> Plan:
    if min_gain <= 0.0:
        return policy(problem)
    still = sets_of_units(problem)
    seconds, bound_s = predict(still, problem.network).makespan_s, lower_bound(problem).seconds
    if seconds - bound_s >= min_gain * seconds > 0.0:
        return policy(problem)
    why = f"nothing is passed on: at best that would save {1e3 * (seconds - bound_s):.1f} of {1e3 * seconds:.1f} ms"
    return replace(still, reasons=(*still.reasons, why), bound_s=bound_s)
