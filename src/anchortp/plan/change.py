"""What a recovery asks for: from what devices hold to the plan that makes them a group again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anchortp.layout import Layout, UnitCatalog
from anchortp.plan.plan import Plan
from anchortp.plan.policies import makespan
from anchortp.plan.problem import Problem
from anchortp.plan.topology import Topology, local

CHECKPOINT_BYTES_PER_S = 1.2e9  # out of the page cache, converted on the way: measured with 3 workers on 2 cores


def plan_change(
    units: UnitCatalog,
    held: Layout,
    devices: Sequence[str],
    *,
    topology: Topology | None = None,
    speeds: Mapping[str, float] | None = None,
    memory_bytes: Mapping[str, int] | None = None,
) -> Plan:
    """The plan by which `devices`, in rank order, take over: after a loss, for a join or a leave, for other speeds, for
    the first load.

    `held`: what each device that can still be read holds now; units may be missing, in any number. A device of
    `devices` that is not in it, or whose shard is empty, is new: it receives the replicated tensors as well. One of
    `held` that is not in `devices` leaves: it is a source, and free afterwards. Leave out those that are lost.
    `topology`: by default one machine whose devices share its memory, by whatever names; what a device holds is copied
    rather than read from the checkpoint.

    For whoever carries it out, device by device: every move brings whole units from one place, a store or a device
    that held them before (`FromPeer`), so that all moves of a stage can run in any order; nothing is relayed and
    nothing is forwarded. KV planes are not in it: each goes with its KV head, relocations included.

    Raises DoesNotFit if nobody is left, or with the numbers if the model does not fit `memory_bytes`.
    """
    names = tuple(dict.fromkeys((*held.devices, *devices)))
    return makespan(
        Problem(
            units=units,
            before=held,
            devices=tuple(devices),
            topology=topology or local(names, host_bytes_per_s=CHECKPOINT_BYTES_PER_S),
            speeds=speeds,
            memory_bytes=memory_bytes,
            relays=False,
            parts=False,
        )
    )
